"""Sources as other people's tools leave them: webdataset's own writer, links to themselves."""

from pathlib import Path

import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st

from ssl_global.data.decode import BadImage
from ssl_global.data.source import open_source
from ssl_global.errors import UserError

PARTS = st.text(st.characters(exclude_characters="./\0", exclude_categories=["Cs"]), min_size=1, max_size=120)
NAMES = st.lists(PARTS, min_size=1, max_size=3).map("/".join)


def webdataset_shard(path: Path, *samples: dict[str, object]) -> str:
    with path.open("wb") as file, webdataset.TarWriter(file, encoder=False) as tar:
        for sample in samples:
            tar.write(sample)
    return str(path)


@given(
    samples=st.lists(
        st.tuples(NAMES, st.binary(max_size=1500), st.integers(0, 2**31 - 1)),
        min_size=1,
        max_size=6,
        unique_by=lambda sample: sample[0],
    ),
    suffix=st.sampled_from(["jpg", "png", "webp"]),
    in_json=st.booleans(),
)
def test_what_webdataset_writes_is_read_back(
    tmp_path_factory: pytest.TempPathFactory, samples: list[tuple[str, bytes, int]], suffix: str, in_json: bool
) -> None:
    path = tmp_path_factory.mktemp("webdataset") / "s.tar"
    label_as = (lambda label: {"json": b'{"label": %d}' % label}) if in_json else (lambda label: {"cls": b"%d" % label})
    webdataset_shard(path, *({"__key__": name, suffix: data, **label_as(label)} for name, data, label in samples))
    source = open_source(str(path))
    assert [source.key(i) for i in range(len(source))] == [f"s.tar/{name}" for name, _, _ in samples]
    assert [source.read(i) for i in range(len(source))] == [data for _, data, _ in samples]
    assert source.labels is not None
    assert source.labels.tolist() == [label for _, _, label in samples]


@pytest.mark.parametrize("digits", [b"9" * 23, b"9" * 5000])
def test_a_label_that_no_integer_holds(tmp_path: Path, digits: bytes) -> None:
    with pytest.raises(UserError, match=r"k\.cls holds '99999"):
        open_source(webdataset_shard(tmp_path / "s.tar", {"__key__": "k", "jpg": b"x", "cls": digits}))
    in_json = {"__key__": "k", "jpg": b"x", "json": b'{"label": ' + digits + b"}"}
    assert open_source(webdataset_shard(tmp_path / "t.tar", in_json)).labels is None


def test_a_link_to_itself_is_one_bad_image_or_nothing(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_bytes(b"x")
    (tmp_path / "2.png").symlink_to("2.png")
    (tmp_path / "folder").symlink_to("folder")
    source = open_source(str(tmp_path))
    assert [source.key(i) for i in range(len(source))] == ["1.png", "2.png"]
    with pytest.raises(BadImage, match="symbolic links"):
        source.read(1)
