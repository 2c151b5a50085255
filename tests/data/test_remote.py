"""Remote shards: through fsspec's memory and a real web server, with the failures that servers have."""

import http.server
import shutil
import threading
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import fsspec
import pytest
from webdataset import TarWriter

from ssl_global.data import remote
from ssl_global.data.remote import fetch
from ssl_global.data.source import open_source
from ssl_global.errors import UserError


def tar(path: Path, *numbers: int) -> bytes:
    with TarWriter(str(path), encoder=False, mtime=0) as writer:
        for number in numbers:
            writer.write({"__key__": f"{number}", "jpg": bytes([number]) * 3000, "cls": b"0"})
    return path.read_bytes()


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.0)
    return tmp_path / "cache" / "ssl_global"


@pytest.fixture
def memory(tmp_path: Path) -> Iterator[fsspec.AbstractFileSystem]:
    """Three shards and classes.json at memory://bucket/train."""
    system = fsspec.filesystem("memory")
    for number in range(3):
        system.pipe(f"/bucket/train/t-{number}.tar", tar(tmp_path / "t.tar", *range(number + 1)))
    system.pipe("/bucket/train/classes.json", b'["cat"]')
    yield system
    system.rm("/bucket", recursive=True)


@pytest.mark.parametrize("pattern", ["t-{0..2}.tar", "t-*.tar", ""])
def test_shards_come_to_the_cache_and_are_read_there(
    cache: Path, memory: fsspec.AbstractFileSystem, pattern: str, capfd: pytest.CaptureFixture[str]
) -> None:
    source = open_source(f"memory://bucket/train/{pattern}")
    assert [source.key(i) for i in range(6)] == [f"t-{shard}.tar/{n}" for shard in range(3) for n in range(shard + 1)]
    assert source.read(5) == bytes([2]) * 3000
    assert source.classes == ["cat"]
    (folder,) = (cache / "shards").iterdir()
    assert (folder / "url.txt").read_text() == "memory:///bucket/train\n"
    assert not list(folder.glob("*.unfinished"))
    assert "fetching 4 files" in capfd.readouterr().err
    open_source(f"memory://bucket/train/{pattern}")
    assert capfd.readouterr().err == ""  # nothing is missing


def test_the_order_of_braces_is_kept(cache: Path, memory: fsspec.AbstractFileSystem) -> None:
    assert [Path(shard).name for shard in fetch("memory://bucket/train/t-{2,0}.tar")] == ["t-2.tar", "t-0.tar"]


def test_a_shard_that_changed_is_fetched_again(cache: Path, memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    (shard,) = fetch("memory://bucket/train/t-0.tar")
    before = Path(shard).read_bytes()
    memory.pipe("/bucket/train/t-0.tar", tar(tmp_path / "t.tar", 7))  # of the same size
    assert fetch("memory://bucket/train/t-0.tar") == [shard]
    assert Path(shard).read_bytes() != before


def test_two_folders_never_meet(cache: Path, memory: fsspec.AbstractFileSystem, tmp_path: Path) -> None:
    memory.pipe("/bucket/train-x/t-0.tar", tar(tmp_path / "t.tar", 9))
    first, second = (fetch(f"memory://bucket/{name}/t-0.tar")[0] for name in ("train", "train-x"))
    assert Path(first).read_bytes() != Path(second).read_bytes()


@pytest.mark.parametrize(
    ("pattern", "words"),
    [
        ("memory://bucket/train/t-{0..5}.tar", "t-3.tar: there is no such file"),
        ("memory://bucket/train/x-*.tar", "no shard there"),
        ("memory://bucket/empty/", "no shard there"),
        ("memory://bucket/train/t-{0..2.tar", "a brace is not closed"),
        ("nothing://bucket/t-0.tar", "unknown scheme"),
        ("pipe:cat x.tar", "data.reader stream"),
        ("http://127.0.0.1:9/t-0.tar", "http://127.0.0.1:9/t-0.tar: "),
    ],
)
def test_what_cannot_be_found_is_one_line(
    cache: Path, memory: fsspec.AbstractFileSystem, pattern: str, words: str
) -> None:
    with pytest.raises(UserError) as refused:
        open_source(pattern)
    assert words in str(refused.value)
    assert "\n" not in str(refused.value)


def test_a_missing_package_is_named(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(url: str) -> None:
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr(remote, "url_to_fs", missing)
    with pytest.raises(UserError, match=r"s3://bucket/0\.tar: needs the package s3fs; pip install s3fs"):
        fetch("s3://bucket/0.tar")


def test_a_disk_that_is_too_small(
    cache: Path, memory: fsspec.AbstractFileSystem, monkeypatch: pytest.MonkeyPatch
) -> None:
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(remote.shutil, "disk_usage", lambda _: usage._replace(free=20_000))
    with pytest.raises(
        UserError, match=r"20\.0 kB are free there, but the shards need 41\.0 kB more; set XDG_CACHE_HOME"
    ):
        fetch("memory://bucket/train/t-*.tar")
    assert not list(cache.rglob("*.tar"))


@pytest.mark.parametrize("name", ["..", ".hidden.tar", "a\\b.tar"])
def test_a_name_is_no_path(cache: Path, name: str) -> None:
    with pytest.raises(UserError, match="is no name for a local file"):
        remote.look(fsspec.filesystem("memory"), f"/bucket/{name}", cache)


# -------------------------------------------------------------------------------------------------------- a web server


class Server(http.server.SimpleHTTPRequestHandler):
    """A server with faults: `faults[path]` says what happens to the first requests for it."""

    faults: dict[str, list[str]]
    asked: Counter[str]
    with_length = True

    def do_GET(self) -> None:
        type(self).asked[self.path] += 1
        fault = self.faults.get(self.path, [])
        kind = fault.pop(0) if fault else "none"
        if kind == "error":
            self.send_error(500)
            return
        try:
            data = Path(self.translate_path(self.path)).read_bytes()
        except OSError:
            self.send_error(404)
            return
        self.send_response(200)
        if self.with_length:
            self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2] if kind == "cut" else data)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(tmp_path: Path, cache: Path) -> Iterator[tuple[str, type[Server]]]:
    folder = tmp_path / "www"
    folder.mkdir()
    for number in range(2):
        tar(folder / f"t-{number}.tar", number)
    handler = type("Handler", (Server,), {"faults": {}, "asked": Counter()})
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), lambda *a: handler(*a, directory=str(folder))) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"http://127.0.0.1:{serving.server_port}", handler
        serving.shutdown()
        thread.join()
    fsspec.filesystem("http").clear_instance_cache()


@pytest.mark.parametrize("with_length", [True, False])
def test_over_http(server: tuple[str, type[Server]], tmp_path: Path, with_length: bool) -> None:
    address, handler = server
    handler.with_length = with_length
    for _ in range(2):
        shards = fetch(address + "/t-{0..1}.tar", progress=False)
    for number, shard in enumerate(shards):
        assert Path(shard).read_bytes() == (tmp_path / "www" / f"t-{number}.tar").read_bytes()


@pytest.mark.parametrize("fault", ["error", "cut"])
def test_one_failure_is_tried_again(server: tuple[str, type[Server]], tmp_path: Path, fault: str) -> None:
    address, handler = server
    handler.faults["/t-0.tar"] = [fault]
    (shard,) = fetch(f"{address}/t-0.tar", progress=False)
    assert Path(shard).read_bytes() == (tmp_path / "www" / "t-0.tar").read_bytes()


def test_many_failures_are_told_and_nothing_half_is_left(server: tuple[str, type[Server]], cache: Path) -> None:
    address, handler = server
    handler.faults["/t-0.tar"] = ["cut"] * 9
    with pytest.raises(UserError, match=r"t-0\.tar: .*\(tried 3 times\)"):
        fetch(f"{address}/t-0.tar", progress=False)
    assert not [file for file in cache.rglob("t-0.tar*") if not file.name.endswith(".lock")]


def test_two_at_once_download_once(server: tuple[str, type[Server]]) -> None:
    address, handler = server
    with ThreadPoolExecutor(2) as pool:
        first, second = pool.map(lambda _: fetch(f"{address}/t-0.tar", progress=False), range(2))
    assert first == second
    assert handler.asked["/t-0.tar"] <= 2  # one of them may have been the question how large it is
