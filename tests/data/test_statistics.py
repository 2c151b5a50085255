"""`auto`: the data's own mean and deviation, from a pack's summary or from the images."""

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from ssl_global.data import statistics
from ssl_global.data.pack import pack
from ssl_global.data.source import Source, open_source
from ssl_global.data.statistics import evenly_spread, with_statistics
from ssl_global.errors import UserError
from ssl_global.recipe import Data


@pytest.fixture
def folder(tmp_path: Path) -> Source:
    random = np.random.default_rng(0)
    (tmp_path / "images").mkdir()
    for number in range(9):
        size = (int(random.integers(5, 40)), int(random.integers(5, 40)), 3)
        values = random.integers(10 * number, 10 * number + 90, size).astype(np.uint8)
        Image.fromarray(values).save(tmp_path / "images" / f"{number}.png")
    (tmp_path / "images" / "9.png").write_text("no image")
    return open_source(str(tmp_path / "images"))


def by_hand(folder: Source, channels: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Each image weighs the same."""
    mode = "RGB" if channels == 3 else "L"
    images = [
        np.array(Image.open(folder.place(i)).convert(mode), np.float64).reshape(-1, channels) / 255 for i in range(9)
    ]
    mean = np.mean([image.mean(0) for image in images], axis=0)
    return mean, np.sqrt(np.mean([(image**2).mean(0) for image in images], axis=0) - mean**2)


@pytest.mark.parametrize("workers", [0, 2])
def test_measured(folder: Source, workers: int) -> None:
    data = with_statistics(Data(mean="auto", std="auto", workers=workers), folder)
    np.testing.assert_allclose(data.normalisation, by_hand(folder), atol=1e-4)


def test_grey(folder: Source) -> None:
    data = with_statistics(Data(channels=1, mean="auto", std="auto"), folder)
    np.testing.assert_allclose(data.normalisation, by_hand(folder, 1), atol=1e-4)


def test_from_the_summary_of_the_pack(folder: Source, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pack(folder, tmp_path / "shards", shard_bytes=3000, progress=False)
    monkeypatch.setattr(statistics, "measure", lambda *_: pytest.fail("measured"))
    data = with_statistics(Data(mean="auto", std="auto"), open_source(str(tmp_path / "shards")))
    np.testing.assert_allclose(data.normalisation, by_hand(folder), atol=1e-4)


def test_a_part_of_the_shards_is_measured_itself(folder: Source, tmp_path: Path) -> None:
    packed = pack(folder, tmp_path / "shards", shard_bytes=3000, progress=False)
    part = open_source(str(packed.shards[0]))
    data = with_statistics(Data(mean="auto", std="auto"), part)
    assert np.abs(np.array(data.normalisation) - by_hand(folder)).max() > 1e-3


def test_only_what_is_asked_for(folder: Source) -> None:
    data = with_statistics(Data(mean="auto", std=(0.1, 0.2, 0.3)), folder)
    assert data.std == (0.1, 0.2, 0.3)
    np.testing.assert_allclose(data.normalisation[0], by_hand(folder)[0], atol=1e-4)
    plain = Data()
    assert with_statistics(plain, folder) is plain


def test_nothing_to_measure(tmp_path: Path) -> None:
    (tmp_path / "1.png").write_text("no image")
    with pytest.raises(UserError, match="none of the images looked at can be read"):
        with_statistics(Data(mean="auto", std="auto"), open_source(str(tmp_path)))
    Image.new("RGB", (8, 8), "red").save(tmp_path / "1.png")
    with pytest.raises(UserError, match="same value everywhere"):
        with_statistics(Data(mean="auto", std="auto"), open_source(str(tmp_path)))


def test_images_looked_at_are_spread() -> None:
    assert evenly_spread(10, 4) == [0, 2, 5, 7]
    assert evenly_spread(3, 4) == evenly_spread(3, None) == [0, 1, 2]
