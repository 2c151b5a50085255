"""Shards: what is there is found, and every kind of damage has its shard and byte."""

import io
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from ssl_global.data import shards as shards_module
from ssl_global.data.shards import index_shard, split_name
from ssl_global.data.source import open_source
from ssl_global.errors import UserError


def tar_bytes(members: list[tuple[str | tarfile.TarInfo, bytes]], kind: int = tarfile.USTAR_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=kind) as tar:
        for member, data in members:
            header = tarfile.TarInfo(member) if isinstance(member, str) else member
            header.size = len(data)
            tar.addfile(header, io.BytesIO(data))
    return file.getvalue()


def make_shard(tmp_path: Path, *members: tuple[str | tarfile.TarInfo, bytes], name: str = "s.tar") -> str:
    (tmp_path / name).write_bytes(tar_bytes(list(members)))
    return str(tmp_path / name)


def found(path: str) -> dict[str, bytes]:
    index, raw = index_shard(path), Path(path).read_bytes()
    places = zip(index.keys, index.offsets, index.sizes, strict=True)
    return {key: raw[offset : offset + size] for key, offset, size in places}


# --------------------------------------------------------------------------------------------------------------- index


NAMES = st.text(st.characters(exclude_characters="./\0", exclude_categories=["Cs"]), min_size=1, max_size=120)


@given(
    st.lists(
        st.tuples(NAMES, st.binary(max_size=1500), st.integers(0, 99)), min_size=1, max_size=6, unique_by=lambda s: s[0]
    ),
    st.sampled_from([tarfile.PAX_FORMAT, tarfile.GNU_FORMAT]),
)
def test_every_tar_is_read_as_tarfile_reads_it(
    tmp_path_factory: pytest.TempPathFactory, samples: list[tuple[str, bytes, int]], kind: int
) -> None:
    path = tmp_path_factory.mktemp("tar") / "s.tar"
    members = [
        pair for name, data, label in samples for pair in ((f"{name}.jpg", data), (f"{name}.cls", b"%d" % label))
    ]
    path.write_bytes(tar_bytes(members, kind))  # type: ignore[arg-type]  # list is invariant
    assert found(str(path)) == {name: data for name, data, _ in samples}
    assert index_shard(str(path)).labels.tolist() == [label for _, _, label in samples]


@pytest.mark.parametrize(
    ("name", "key", "suffix"),
    [
        ("a.jpg", "a", ".jpg"),
        ("./x/a.JPG", "x/a", ".jpg"),
        ("x.y/a.seg.png", "x.y/a", ".seg.png"),
        ("x/._a.jpg", "x/._a.jpg", ""),
        ("x/a", "x/a", ""),
    ],
)
def test_key_is_up_to_the_first_dot(name: str, key: str, suffix: str) -> None:
    assert split_name(name) == (key, suffix)


def test_samples_of_all_kinds(tmp_path: Path) -> None:
    path = make_shard(
        tmp_path,
        ("1.jpg", b"one"), ("1.json", b'{"label": 4}'), ("1.txt", b"a caption"),
        ("2.png", b"mask"), ("2.jpg", b"two"), ("2.cls", b"5\n"), ("2.json", b'{"label": 1}'),
        ("3.cls", b"9"), ("4.seg.png", b"mask"), ("5.webp", b""), ("5.json", b'{"cls": 6}'),
    )  # fmt: skip
    assert found(path) == {"1": b"one", "2": b"two", "5": b""}
    assert index_shard(path).labels.tolist() == [4, 5, 6]


def test_a_number_in_a_text_is_a_label_and_a_caption_is_none(tmp_path: Path) -> None:
    path = make_shard(
        tmp_path,
        ("1.jpg", b""), ("1.txt", b" 7\n"), ("2.jpg", b""), ("2.txt", b"8" * 40), ("2.json", b'{"label": 2}'),
        ("3.jpg", b""), ("3.txt", b"-3"), ("4.jpg", b""), ("4.txt", b"5"), ("4.cls", b"6"),
    )  # fmt: skip
    assert index_shard(path).labels.tolist() == [7, 2, -1, 6]


@pytest.mark.parametrize(
    ("suffix", "written"),
    [("cls", b"-1"), ("json", b"{"), ("json", b"[3]"), ("json", b'{"label": "cat"}'), ("json", b'{"label": true}')],
)
def test_partly_labelled_shards_have_no_labels(tmp_path: Path, suffix: str, written: bytes) -> None:
    path = make_shard(tmp_path, ("1.jpg", b"1"), ("1.cls", b"0"), ("2.jpg", b"2"), (f"2.{suffix}", written))
    source = open_source(path)
    assert source.labels is None
    assert source.describe() == "2 images in 1 shard, no labels (only 1 have one)"


def test_names_that_could_be_dangerous_are_passed_over(tmp_path: Path) -> None:
    link, device = tarfile.TarInfo("link.jpg"), tarfile.TarInfo("device.jpg")
    link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
    device.type = tarfile.CHRTYPE
    path = make_shard(
        tmp_path, (link, b""), (device, b""), ("/etc/a.jpg", b"a"), ("x/../../b.jpg", b"b"), ("c.jpg", b"c")
    )
    assert found(path) == {"c": b"c"}


def test_large_sizes_are_written_in_binary() -> None:
    header = tarfile.TarInfo("a.jpg")
    header.size = 9 * 2**30
    assert shards_module.check_header("s.tar", header.tobuf(tarfile.GNU_FORMAT)[:512], 0) == (b"0", 9 * 2**30)


# -------------------------------------------------------------------------------------------------------------- damage


def refused(path: str, *words: str) -> None:
    with pytest.raises(UserError) as caught:
        index_shard(path)
    assert "\n" not in str(caught.value)
    for word in (path, *words):
        assert word in str(caught.value)


@pytest.fixture
def shard(tmp_path: Path) -> str:
    """1.jpg at bytes 0 (header) and 512, 1.cls at 1536 and 2048, 2.jpg at 2560 and 3072, end mark from 4096."""
    return make_shard(tmp_path, ("1.jpg", b"x" * 1000), ("1.cls", b"0"), ("2.jpg", b"y" * 1000))


@pytest.mark.parametrize(
    "length", [1, 511, 512, 1000, 1535, 1536, 1600, 2048, 2560, 3072, 4000, 4096, 4097, 4608, 5119]
)
def test_cut_short_anywhere(shard: str, length: int) -> None:
    Path(shard).write_bytes(Path(shard).read_bytes()[:length])
    refused(shard, f"cut short at byte {length}")


def test_shortest_whole_archive(shard: str) -> None:
    Path(shard).write_bytes(Path(shard).read_bytes()[:5120])
    assert list(found(shard)) == ["1", "2"]


@pytest.mark.parametrize("at", [0, 1536, 2560])
def test_damaged_header(shard: str, at: int) -> None:
    raw = bytearray(Path(shard).read_bytes())
    raw[at + 5] ^= 1
    Path(shard).write_bytes(raw)
    refused(shard, f"damaged header at byte {at}")


def test_zeros_over_a_header(shard: str) -> None:
    raw = bytearray(Path(shard).read_bytes())
    raw[1536:2560] = bytes(1024)
    Path(shard).write_bytes(raw)
    refused(shard, "end mark is at byte 1536, but there is more at byte 2560")


def test_files_that_are_no_tar(tmp_path: Path) -> None:
    for name, data in {"empty": b"", "text": b"no tar" * 200, "gzip": b"\x1f\x8b" + bytes(2000)}.items():
        (tmp_path / f"{name}.tar").write_bytes(data)
        refused(str(tmp_path / f"{name}.tar"), "byte 0")
    (tmp_path / "zeros.tar").write_bytes(bytes(10240))
    refused(str(tmp_path / "zeros.tar"), "no image in this shard")


@pytest.mark.parametrize("record", [b"x", b"0 path=a\n", b"9999999 path", b"-5 path=a\n", b"13 size=abc\n"])
def test_damaged_extended_header(tmp_path: Path, record: bytes) -> None:
    header = tarfile.TarInfo("pax")
    header.type = tarfile.XHDTYPE
    refused(make_shard(tmp_path, (header, record), ("a.jpg", b"a")), "damaged extended header at byte 512")


def test_the_same_member_twice(tmp_path: Path) -> None:
    refused(make_shard(tmp_path, ("1.jpg", b"a"), ("1.JPG", b"b")), "1.JPG a second time, at byte 1536")


def test_a_label_that_is_no_number(tmp_path: Path) -> None:
    refused(make_shard(tmp_path, ("1.jpg", b"a"), ("1.cls", b"cat")), "1.cls holds 'cat'")


def test_no_image(tmp_path: Path) -> None:
    refused(make_shard(tmp_path, ("1.txt", b"a"), ("a.b.jpg", b"b")), "no image in this shard")


@given(st.data())
def test_damage_is_a_user_error_or_harmless(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    path = tmp_path_factory.mktemp("tar") / "s.tar"
    raw = bytearray(tar_bytes([(f"{'d' * 90}/{n}.jpg", bytes(600)) for n in range(3)], tarfile.PAX_FORMAT))
    for _ in range(data.draw(st.integers(1, 3))):
        raw[data.draw(st.integers(0, 4000))] = data.draw(st.integers(0, 255))
    path.write_bytes(raw)
    try:
        index = index_shard(str(path))
    except UserError:
        return
    assert (index.offsets + index.sizes <= len(raw)).all()
