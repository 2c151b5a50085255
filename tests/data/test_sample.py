"""The built-in sample: written once, the same everywhere, balanced, and no pixel of it in both parts."""

import multiprocessing
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_global.data import sample as sample_module
from ssl_global.data.decode import decode
from ssl_global.data.sample import NUM_TRAIN, NUM_VAL, PHOTOGRAPHS, PIXELS, built_in_sample, crop
from ssl_global.data.source import open_source
from ssl_global.errors import UserError


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return built_in_sample(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_module, "NUM_TRAIN", 40)
    monkeypatch.setattr(sample_module, "NUM_VAL", 20)


@pytest.mark.parametrize(("part", "count"), [(0, NUM_TRAIN), (1, NUM_VAL)])
def test_crops_are_small_different_balanced_images(parts: tuple[str, str], part: int, count: int) -> None:
    source = open_source(parts[part])
    assert len(source) == count
    assert source.classes == [Path(name).stem for name in PHOTOGRAPHS]
    assert source.labels is not None
    numbers = np.bincount(source.labels, minlength=len(PHOTOGRAPHS))
    assert numbers.max() - numbers.min() <= 1
    assert len({source.read(i) for i in range(count)}) == count
    for index in range(0, count, 50):
        assert decode(source.read(index), 3).shape == (3, PIXELS, PIXELS)


@pytest.mark.parametrize(("part", "colour"), [("train", (255, 0, 0)), ("val", (0, 0, 255))])
def test_no_pixel_is_in_both_parts(part: str, colour: tuple[int, int, int]) -> None:
    """A photograph that is red up to the border and blue behind it gives crops of one colour."""
    image = Image.new("RGB", (400, 300), "blue")
    image.paste("red", (0, 0, round(400 * sample_module.TRAIN_SHARE), 300))
    for number in range(50):
        pixels = decode(crop(image, part, number), 3).float()
        assert (pixels.amax((1, 2)) - pixels.amin((1, 2))).max() == 0
        assert (pixels.mean((1, 2)) - pixels.new_tensor(colour)).abs().max() <= 1


def write(cache: Path) -> tuple[str, str]:
    return built_in_sample(cache)


def test_two_processes_at_once_leave_one_sample(tmp_path: Path, small: None) -> None:
    with multiprocessing.get_context("fork").Pool(4) as pool:
        answers = set(pool.map(write, [tmp_path] * 4))
    assert len(answers) == 1
    assert len(list(tmp_path.iterdir())) == 1
    assert len(open_source(answers.pop()[0])) == 40


def test_the_same_bytes_every_time_and_written_once(
    tmp_path: Path, small: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    folders = []
    for place in ("a", "b"):
        built_in_sample(tmp_path / place)
        files = sorted((tmp_path / place).rglob("*"))
        folders.append({str(f.relative_to(tmp_path / place)): f.read_bytes() for f in files if f.is_file()})
    assert folders[0] == folders[1]
    monkeypatch.setattr(sample_module, "write", lambda *_: pytest.fail("written again"))
    built_in_sample(tmp_path / "a")


def test_cache_that_cannot_be_written(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="XDG_CACHE_HOME"):
        built_in_sample(tmp_path / "file" / "cache")


def test_missing_photograph_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sample_module, "PHOTOGRAPHS", ("nobody.png",))
    with pytest.raises(UserError, match=r"nobody\.png: this scikit-image has no such photograph"):
        built_in_sample(tmp_path)
