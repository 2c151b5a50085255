"""Sources as other people's tools leave them: webdataset's own writer, links to themselves, a process shot dead."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import webdataset
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from ssl_global import cli
from ssl_global.data.decode import BadImage
from ssl_global.data.loader import read_or_replace
from ssl_global.data.shards import pack
from ssl_global.data.source import FolderSource, open_source
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


def test_a_shard_cut_while_it_is_read_is_replaced_and_named(tmp_path: Path) -> None:
    Image.new("RGB", (2, 3)).save(tmp_path / "i.png")
    data = (tmp_path / "i.png").read_bytes()
    shards = [webdataset_shard(tmp_path / f"{n}.tar", {"__key__": "k", "png": data, "cls": b"1"}) for n in range(2)]
    source = open_source(str(tmp_path / "*.tar"))
    os.truncate(shards[0], 600)
    image, used, bad = read_or_replace(source, 0, 3)
    assert image is not None
    assert used == 1
    assert [key for key, _ in bad] == ["0.tar/k"]
    assert "became shorter" in bad[0][1]


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    random = np.random.default_rng(0)
    for number in range(40):
        file = tmp_path / "photos" / ("ant", "bee")[number % 2] / f"{number}.jpg"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_bytes(random.bytes(60_000 + 500 * number))
    return tmp_path / "photos"


def test_pack_from_the_command_line(photos: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cli.main(["pack", str(photos), str(tmp_path / "out"), "--shard-mb", "1"])
    folder, packed = open_source(str(photos)), open_source(str(tmp_path / "out"))
    assert [packed.read(i) for i in range(40)] == [folder.read(i) for i in range(40)]
    assert packed.describe() == "40 images in 3 shards, 2 classes"
    assert "40 images, 2 classes, 3 shards (3 written now)" in capsys.readouterr().out
    assert all(0.8e6 < size <= 1e6 for size in [s.stat().st_size for s in sorted((tmp_path / "out").glob("*.tar"))[:2]])


DIE_AT_THE_20TH = """
import os, signal, sys
from pathlib import Path
from ssl_global.data import source
read = source.FolderSource.read
def read_or_die(self, index):
    if index == 20:
        os.kill(os.getpid(), signal.SIGKILL)
    return read(self, index)
source.FolderSource.read = read_or_die
from ssl_global.data.shards import pack
pack(source.FolderSource(sys.argv[1]), Path(sys.argv[2]), shard_bytes=500_000, progress=False)
"""


def test_pack_goes_on_where_it_was_shot(photos: Path, tmp_path: Path) -> None:
    out, folder = tmp_path / "out", FolderSource(str(photos))
    shot = subprocess.run([sys.executable, "-c", DIE_AT_THE_20TH, photos, out], check=False)
    assert shot.returncode == -signal.SIGKILL
    done = {shard.name: shard.stat().st_mtime_ns for shard in out.glob("*.tar")}
    assert len(done) >= 2
    assert len(list(out.glob("*.unfinished"))) == 1
    pack(folder, out, shard_bytes=500_000, progress=False)
    pack(folder, tmp_path / "whole", shard_bytes=500_000, progress=False)
    files = [{file.name: file.read_bytes() for file in place.iterdir()} for place in (out, tmp_path / "whole")]
    assert files[0] == files[1]
    assert {name: (out / name).stat().st_mtime_ns for name in done} == done
