"""Remote shards against servers that answer otherwise than one would like."""

import os
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import fsspec
import pytest

from ssl_global.data import remote
from ssl_global.data.remote import fetch
from ssl_global.errors import UserError

SHARD = os.urandom(3_000_000)


class Server(BaseHTTPRequestHandler):
    """Knows x.tar alone, and no ranges. Answers the first `failures` requests for it with `status`."""

    status, failures = 200, 0

    def do_HEAD(self) -> None:
        self.answer()

    def do_GET(self) -> None:
        if self.answer() == 200:
            self.wfile.write(SHARD)

    def answer(self) -> int:
        status = 200 if "/x.tar" in self.path else 404
        if status == 200 and type(self).failures > 0:
            type(self).failures -= 1
            status = self.status
        self.send_response(status)
        self.send_header("Content-Length", str(len(SHARD) if status == 200 else 0))
        self.end_headers()
        return status

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[str, type[Server]]]:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.0)
    handler = type("OneServer", (Server,), {})
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as serving:
        thread = threading.Thread(target=serving.serve_forever)
        thread.start()
        yield f"127.0.0.1:{serving.server_port}", handler
        serving.shutdown()
        thread.join()


def test_no_ranges_are_asked_for_and_a_query_is_no_name(server: tuple[str, type[Server]], tmp_path: Path) -> None:
    (local,) = fetch(f"http://{server[0]}/x.tar?download=1", tmp_path, progress=False)
    assert Path(local).name == "x.tar"
    assert Path(local).read_bytes() == SHARD


@pytest.mark.parametrize("status", [403, 500])
def test_the_server_s_own_answer_is_told(server: tuple[str, type[Server]], tmp_path: Path, status: int) -> None:
    server[1].status, server[1].failures = status, 1000
    with pytest.raises(UserError, match=rf"x\.tar: .*{status}"):
        fetch(f"http://{server[0]}/x.tar", tmp_path, progress=False)


def test_nobody_answers(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.0)
    with pytest.raises(UserError, match=r"x\.tar: .*Cannot connect"):
        fetch("http://127.0.0.1:1/x.tar", tmp_path, progress=False)


def test_a_question_is_asked_again(server: tuple[str, type[Server]], tmp_path: Path) -> None:
    server[1].status, server[1].failures = 503, 2
    assert len(fetch(f"http://{server[0]}/x.tar", tmp_path, progress=False)) == 1


def test_no_password_is_left_on_the_disk(server: tuple[str, type[Server]], tmp_path: Path) -> None:
    (local,) = fetch(f"http://me:secret@{server[0]}/x.tar", tmp_path, progress=False)
    for file in Path(local).parent.iterdir():
        assert b"secret" not in file.read_bytes()


@pytest.fixture
def memory() -> Iterator[None]:
    files = fsspec.filesystem("memory")
    files.pipe({"/servers/f/x.tar": b"1" * 1000, "/servers/f/classes.json": b"[]"})
    yield
    files.rm("/servers", recursive=True)


@pytest.mark.parametrize("pattern", ["f", "f/", "*/x.tar", "f/x.tar"])
def test_classes_come_along(memory: None, tmp_path: Path, pattern: str) -> None:
    (local,) = fetch(f"memory://servers/{pattern}", tmp_path, progress=False)
    assert Path(local).with_name("classes.json").exists()


def test_a_shard_named_twice(memory: None, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"x\.tar twice"):
        fetch("memory://servers/f/{x,x}.tar", tmp_path, progress=False)


def test_a_copy_that_was_cut_is_fetched_again(memory: None, tmp_path: Path) -> None:
    (local,) = fetch("memory://servers/f/x.tar", tmp_path, progress=False)
    os.truncate(local, 5)
    fetch("memory://servers/f/x.tar", tmp_path, progress=False)
    assert os.path.getsize(local) == 1000
