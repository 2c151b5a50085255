"""What goes wrong with data while it is read: each is a named error or a counted skip, never silence, never a hang."""

import errno
import os
from pathlib import Path

import pytest
from loaders import recipe_of, serve
from PIL import Image
from webdataset import TarWriter

from ssl_global.data import source as source_module
from ssl_global.data.decode import BadImage
from ssl_global.data.source import Source, difference, open_source
from ssl_global.errors import UserError


@pytest.fixture
def shards(tmp_path: Path) -> Source:
    """Three shards of six images."""
    for shard in range(3):
        with TarWriter(str(tmp_path / f"{shard}.tar")) as tar:
            for number in range(6):
                image = Image.new("RGB", (40 + number, 30), (40 * shard, 20 * number, 99))
                tar.write({"__key__": f"{number}", "png": image, "cls": shard})
    return open_source(str(tmp_path))


def faulty(monkeypatch: pytest.MonkeyPatch, *, after: int = 0, error: int = errno.EIO) -> None:
    """The disk answers `after` reads, and then no more."""
    pread, reads = os.pread, iter(range(10**9))

    def read(file: int, size: int, offset: int) -> bytes:
        if next(reads) >= after:
            raise OSError(error, os.strerror(error))
        return pread(file, size, offset)

    monkeypatch.setattr(source_module.os, "pread", read)


def test_a_read_error_is_one_bad_image(shards: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    faulty(monkeypatch)
    with pytest.raises(BadImage, match=r"cannot be read at byte \d+: Input/output error"):
        shards.read(3)


@pytest.mark.parametrize("workers", [0, 2])
def test_a_disk_that_vanishes_ends_the_run_by_name(
    shards: Source, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    faulty(monkeypatch, after=9)
    served = serve(shards, recipe_of(workers=workers), stop=5)
    assert workers or not served[0]["lost"]  # of two workers one may be far ahead
    (last, *_) = served[-1]["lost"]
    assert "Input/output error" in last
    assert "nor any of the 8 samples behind it" in last


def test_a_bad_sector_is_replaced_and_counted(shards: Source, monkeypatch: pytest.MonkeyPatch) -> None:
    pread = os.pread
    broken = int(shards.offsets[4])  # type: ignore[attr-defined]

    def read(file: int, size: int, offset: int) -> bytes:
        if offset == broken:
            raise OSError(errno.EIO, "Input/output error")
        return pread(file, size, offset)

    monkeypatch.setattr(source_module.os, "pread", read)
    served = serve(shards, recipe_of(), stop=9)
    assert not any(batch["lost"] for batch in served)
    assert {key for batch in served for key, _ in batch["bad"]} == {"0.tar/4", "1.tar/4", "2.tar/4"}


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda path: os.truncate(path, 600), "became shorter since it was opened: byte"),
        (lambda path: path.write_bytes(path.read_bytes() + bytes(512)), "was changed since it was opened"),
        (lambda path: os.utime(path, ns=(0, 10**18)), "was changed since it was opened"),
    ],
    ids=["cut", "grown", "touched"],
)
def test_a_shard_that_changes_while_it_is_read(shards: Source, tmp_path: Path, change, words: str) -> None:
    """Not replaced: a sample of other data would be as wrong as this one."""
    for index in range(18):
        shards.read(index)
    change(tmp_path / "1.tar")
    shards.read(2)
    with pytest.raises(UserError, match=rf"1\.tar: {words}"):
        shards.read(8)
    served = serve(shards, recipe_of(), stop=5)
    assert any("1.tar" in why and words.partition(":")[0] in why for batch in served for why in batch["lost"])
    assert not any(batch["bad"] for batch in served)


def test_a_shard_that_is_replaced_goes_on_from_the_file_that_was_opened(shards: Source, tmp_path: Path) -> None:
    before = [shards.read(index) for index in range(18)]
    (tmp_path / "new").write_bytes(b"other")
    os.replace(tmp_path / "new", tmp_path / "1.tar")
    assert [shards.read(index) for index in range(18)] == before


def test_a_shard_that_is_gone_before_its_first_read(shards: Source, tmp_path: Path) -> None:
    (tmp_path / "2.tar").unlink()
    with pytest.raises(BadImage, match="No such file"):
        shards.read(13)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_shard_that_may_not_be_read(tmp_path: Path, shards: Source) -> None:
    (tmp_path / "1.tar").chmod(0)
    with pytest.raises(UserError, match=r"1\.tar: cannot be read: Permission denied"):
        open_source(str(tmp_path))


def test_many_shards_ask_for_many_open_files(monkeypatch: pytest.MonkeyPatch) -> None:
    asked = []
    monkeypatch.setattr(source_module.resource, "getrlimit", lambda _: (1024, 4096))
    monkeypatch.setattr(source_module.resource, "setrlimit", lambda _, limits: asked.append(limits))
    assert source_module.may_stay_open(100) == 100
    assert asked == []
    assert source_module.may_stay_open(2000) == 512  # as many as the old limit leaves: this system gave no more
    assert asked == [(2512, 4096)]


def test_the_difference_between_two_sources_is_named() -> None:
    before = {"0.tar": "a", "1.tar": "b", "2.tar": "c", "3.tar": "d", "4.tar": "e"}
    assert difference(before, before | {"1.tar": "x"}) == "changed: 1.tar"
    assert difference(before, {"0.tar": "a", "9.tar": "z"}) == "missing: 1.tar, 2.tar, 3.tar and 1 more; new: 9.tar"
    assert difference(before, dict(reversed(before.items()))) == "in another order"
