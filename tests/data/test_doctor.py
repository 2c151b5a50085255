"""The doctor reads everything once, names all that is bad, and times the rest."""

import json
import os
from pathlib import Path

import pytest
from PIL import Image
from webdataset import TarWriter

from ssl_global import cli
from ssl_global.data import doctor
from ssl_global.data.doctor import Diagnosis, advice


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "SECONDS", 0.05)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for shard in range(3):
        with TarWriter(str(tmp_path / f"{shard}.tar"), encoder=False) as tar:
            for number in range(5):
                path = tmp_path / "i.jpg"
                Image.new("RGB", (40, 30), (80 * shard, 40 * number, 9)).save(path)
                whole = path.read_bytes()
                bad = (shard, number) == (1, 3)
                tar.write({"__key__": f"{number}", "jpg": whole[:300] if bad else whole})
    (tmp_path / "i.jpg").unlink()
    return tmp_path


def examined(capsys: pytest.CaptureFixture[str], *words: object) -> tuple[int, str]:
    with pytest.raises(SystemExit) as end:
        cli.main(["doctor", *map(str, words)])
    return end.value.code, capsys.readouterr().out  # type: ignore[return-value]


def test_bad_images_and_damaged_shards_are_all_named(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    os.truncate(shards / "2.tar", 1500)
    code, said = examined(capsys, shards, "--workers", 2, "--recipe", "dino:demo", "--json", shards / "found.json")
    assert code == 1
    assert "10 images in 2 shards" in said
    assert f"damaged shard: {shards / '2.tar'}: cut short at byte 1500" in said
    assert f"bad image: {shards / '1.tar'} at byte " in said
    assert "read     10 images, 1 of them bad (10.000%)" in said
    found = json.loads((shards / "found.json").read_text())
    assert len(found["bad_images"]) == 1
    assert set(found["images_per_second"]) == {"1", "2"}


def test_nothing_wrong_ends_with_0(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (shards / "1.tar").unlink()
    cli.main(["doctor", str(shards), "--recipe", "mae:demo", "--workers", "1"])
    said = capsys.readouterr().out
    assert "10 images, 0 of them bad" in said
    assert "images/s by one worker" in said


def test_no_whole_shard_and_a_folder_of_images(shards: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number in range(3):
        os.truncate(shards / f"{number}.tar", 700)
    code, said = examined(capsys, shards)
    assert code == 1
    assert said.count("damaged shard") == 3
    (shards / "photos").mkdir()
    (shards / "photos" / "a.png").write_text("no image")
    code, said = examined(capsys, shards / "photos")
    assert f"bad image: {shards}/photos/a.png: 8 bytes that are no JPEG" in said


def test_advice_is_arithmetic(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "num_cores", lambda: 8)
    views, feeding = advice(Diagnosis("", 9, [], [], {1: 300.0, 4: 1100.0}), 1000)
    assert views.endswith("300 images/s by one worker, 1100 by 4")
    assert "1000 images/s needs 4 workers" in feeding
    assert "8 cores feed 2.2 of them" in feeding
