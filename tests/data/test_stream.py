"""webdataset's own reader: endless, counted where it fails, never a hang; and what the command line says of it."""

import gc
import os
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

import numpy as np
import pytest
from loaders import recipe_of
from PIL import Image
from webdataset import TarWriter

from ssl_global.data.decode import BadImage
from ssl_global.data.loader import Loader
from ssl_global.data.order import Order
from ssl_global.data.stream import Stream
from ssl_global.errors import UserError
from ssl_global.recipe import Data

# A stream that is left in the middle leaves webdataset's file to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning"
)


@pytest.fixture(autouse=True)
def collected() -> Iterator[None]:
    yield
    gc.collect()


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    for shard in range(3):
        with TarWriter(str(tmp_path / f"s-{shard}.tar")) as tar:
            for number in range(8):
                image = Image.new("RGB", (40, 30), (80 * shard, 30 * number, 9))
                tar.write({"__key__": f"{shard}-{number}", "png": image, "cls": shard})
    return tmp_path


def taken(path: str, count: int, **begin: int) -> list[str]:
    samples = Stream(path, epoch_images=24, seed=begin.pop("seed", 0)).begin(**{"process": 0, "step": 0} | begin)
    return [next(iter(samples.candidates(0))).key for _ in range(count)]


@pytest.mark.parametrize("pattern", ["s-{0..2}.tar", "s-*.tar"])
def test_all_shards_come_in_a_mixed_order_and_it_never_ends(shards: Path, pattern: str) -> None:
    keys = taken(str(shards / pattern), 300)
    assert {key.rpartition("/")[2] for key in keys} == {f"{s}-{n}" for s in range(3) for n in range(8)}
    assert len({key.rpartition("/")[0] for key in keys[:24]}) > 1


def test_processes_seeds_and_later_steps_draw_others_and_the_same_ones_the_same(shards: Path) -> None:
    path = str(shards / "s-*.tar")
    ways = [taken(path, 60), taken(path, 60, process=1), taken(path, 60, step=5), taken(path, 60, seed=1)]
    assert len({tuple(way) for way in ways}) == 4
    assert taken(path, 60) == ways[0]


def test_a_pipe_is_read(shards: Path) -> None:
    keys = taken(f"pipe:cat {shards}/s-{{0..2}}.tar", 100)
    assert len({key.rpartition("/")[2] for key in keys}) == 24


def test_a_shard_that_cannot_be_read_is_one_bad_sample(shards: Path) -> None:
    (shards / "s-1.tar").write_bytes(b"no tar" * 1000)
    samples = Stream(str(shards / "s-*.tar"), epoch_images=24, seed=0).begin(process=0, step=0)
    seen = list(islice((samples.next() for _ in iter(int, 1)), 200))
    bad = [candidate for candidate in seen if "s-1.tar" in candidate.key]
    assert bad
    assert len(bad) < 100
    with pytest.raises(BadImage, match="shard cannot be read"):
        bad[0].read()


def test_when_no_shard_can_be_read_it_ends(tmp_path: Path) -> None:
    samples = Stream(str(tmp_path / "gone-{0..2}.tar"), epoch_images=24, seed=0).begin(process=0, step=0)
    with pytest.raises(UserError, match=r"9 shards in a row cannot be read, the last: .*No such file"):
        list(islice((samples.next() for _ in iter(int, 1)), 20))


def test_and_the_run_stops_with_these_words(tmp_path: Path) -> None:
    recipe = recipe_of(4, reader="stream", epoch_images=24)
    samples = Stream(str(tmp_path / "gone-{0..2}.tar"), epoch_images=24, seed=0).begin(process=0, step=0)
    order = Order.of(np.array([0, 24]), recipe)
    with Loader(samples, order, recipe, [range(4)], micro_batch=4).serving() as served:
        (batch,) = served
    assert any("9 shards in a row cannot be read" in why for why in batch["lost"])


def test_batches_of_a_stream(shards: Path) -> None:
    """Labelled views; a broken image is replaced by the next and named."""
    with TarWriter(str(shards / "s-0.tar"), encoder=False) as tar:
        tar.write({"__key__": "broken", "jpg": b"no image", "cls": b"0"})
        tar.write({"__key__": "text", "txt": b"no image at all"})
    recipe = recipe_of(4, reader="stream", epoch_images=24, workers=2)
    samples = Stream(str(shards / "s-*.tar"), epoch_images=24, seed=0).begin(process=0, step=0)
    order = Order.of(np.array([0, 24]), recipe)
    images = [range(first, first + 4) for first in range(0, 80, 4)]
    with Loader(samples, order, recipe, images, micro_batch=4).serving() as served:
        batches = [dict(batch) for batch in served]
    assert len(batches) == 20
    assert not any(batch["lost"] for batch in batches)
    assert {label for batch in batches for label in batch["label"].tolist()} == {1, 2}
    assert {key.rpartition("/")[2] for batch in batches for key, _ in batch["bad"]} == {"broken"}


def test_what_a_stream_needs_and_cannot() -> None:
    for data, words in (
        (Data(reader="stream"), "data.epoch_images = None"),
        (Data(reader="stream", epoch_images=9, repeats=2), "data.repeats = 2"),
        (Data(reader="stream", epoch_images=9, mean="auto"), "data.mean = auto"),
        (Data(epoch_images=9), "only for data.reader stream"),
    ):
        with pytest.raises(UserError) as refused:
            data.check()
        assert words in str(refused.value)
    with pytest.raises(UserError, match="no shard matches"):
        Stream(os.path.join("nowhere", "*.tar"), epoch_images=1, seed=0)
