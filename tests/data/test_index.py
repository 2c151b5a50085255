"""The index of a shard is kept, is what the headers say, and is never believed of a shard that has changed."""

import io
import os
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from webdataset import TarWriter

from ssl_global.data import index as index_module
from ssl_global.data.index import indexes, places
from ssl_global.data.shards import Names, index_shard
from ssl_global.data.source import open_source
from ssl_global.errors import UserError


def shard(path: Path, count: int = 3, size: int = 700) -> str:
    with TarWriter(str(path), encoder=False, mtime=0) as tar:
        for number in range(count):
            tar.write({"__key__": f"{path.stem}/{number}", "jpg": bytes([number]) * size, "cls": b"%d" % number})
    return str(path)


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache"


def never(path: str) -> None:
    pytest.fail(f"{path} was read again")


def test_read_once_and_the_same_afterwards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    paths = [shard(tmp_path / f"{n}.tar", count=n + 1) for n in range(3)]
    first = indexes(paths)
    monkeypatch.setattr(index_module, "index_shard", never)
    for path, before, now in zip(paths, first, indexes(paths), strict=True):
        assert list(now.keys) == list(before.keys) == [f"{Path(path).stem}/{k}" for k in range(len(now.sizes))]
        for field in ("offsets", "sizes", "labels"):
            assert np.array_equal(getattr(now, field), getattr(before, field))
        assert now.stamp == before.stamp
        assert now.digest() == before.digest()
    assert sorted(file.name for file in tmp_path.glob("*")) == sorted(
        name for n in range(3) for name in (f"{n}.tar", f"{n}.tar.index.npz")
    )


def test_a_shard_that_changed_is_read_again(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar")
    (before,) = indexes([path])
    os.utime(path, ns=(0, 10**18))  # of the same size
    shard(tmp_path / "other.tar", count=2)
    assert indexes([path])[0].stamp != before.stamp
    os.replace(tmp_path / "other.tar", path)
    assert len(indexes([path])[0].keys) == 2


@pytest.mark.parametrize("damage", [b"", b"no index", "half", "of another version"])
def test_a_damaged_index_is_made_anew(tmp_path: Path, damage: bytes | str, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard(tmp_path / "s.tar")
    kept = Path(path + ".index.npz")
    with monkeypatch.context() as other:
        if damage == "of another version":
            other.setattr(index_module, "VERSION", 0)
        indexes([path])
    whole = kept.read_bytes()
    if damage == "half":
        kept.write_bytes(whole[: len(whole) // 2])
    elif isinstance(damage, bytes):
        kept.write_bytes(damage)
    assert list(indexes([path])[0].keys) == ["s/0", "s/1", "s/2"]
    assert len(kept.read_bytes()) == len(whole)


def test_a_pickle_in_its_place_is_not_run(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar")
    trap = io.BytesIO()
    np.savez(trap, version=np.array([object()], dtype=object))
    Path(path + ".index.npz").write_bytes(trap.getvalue())
    assert len(indexes([path])[0].keys) == 3


def test_where_nothing_can_be_written_it_is_kept_in_the_cache(
    tmp_path: Path, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = shard(tmp_path / "s.tar")
    write = index_module.write

    def refused(place: Path, index: object) -> None:
        if place.parent == tmp_path:
            raise PermissionError(13, "Permission denied")
        write(place, index)

    monkeypatch.setattr(index_module, "write", refused)
    indexes([path])
    assert not Path(path + ".index.npz").exists()
    assert places(path)[1].is_file()
    assert cache in places(path)[1].parents
    monkeypatch.setattr(index_module, "index_shard", never)
    assert len(indexes([path])[0].keys) == 3


def test_many_shards_are_read_by_several_processes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(index_module, "num_cores", lambda: 2)
    paths = [shard(tmp_path / f"{n:02d}.tar") for n in range(20)]
    assert [list(index.keys) for index in indexes(paths)] == [list(index_shard(path).keys) for path in paths]
    os.truncate(paths[7], 800)
    for path in paths:
        os.utime(path, ns=(0, 10**18))
    with pytest.raises(UserError, match=r"07\.tar: cut short at byte 800"):
        indexes(paths)


def test_a_missing_shard_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"gone\.tar: cannot be read: No such file"):
        indexes([str(tmp_path / "gone.tar")])


@given(st.lists(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=9), max_size=9), min_size=1))
def test_names_in_arrays_are_the_names(parts: list[list[str]]) -> None:
    joined = Names.join([Names.of(part) for part in parts])
    assert list(joined) == [name for part in parts for name in part]
    assert len(joined) == sum(map(len, parts))


def test_a_source_of_many_shards_finds_its_images(tmp_path: Path) -> None:
    for n in range(4):
        shard(tmp_path / f"{n}.tar", count=n + 1)
    source = open_source(str(tmp_path))
    assert source.bounds.tolist() == [0, 1, 3, 6, 10]
    assert [source.key(i) for i in (0, 1, 5, 9)] == ["0.tar/0/0", "1.tar/1/0", "2.tar/2/2", "3.tar/3/3"]
    assert [source.read(i)[:1] for i in range(10)] == [bytes([k]) for n in range(4) for k in range(n + 1)]
    assert source.place(5).startswith(str(tmp_path / "2.tar at byte "))
