import io
import threading
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
import warm
from PIL import Image

from ssl_global.errors import UserError
from ssl_global.evaluation.features import evenly_spread, extract, pixel_features, split
from ssl_global.recipe import Data

CPU = torch.device("cpu")
DATA = Data(workers=0, max_bad_fraction=0.2)


class Pictures:
    """A source in memory: picture i is evenly 10 * i bright, apart from `bad` ones, which are no pictures."""

    path = Path("memory")
    fingerprint = "memory"

    def __init__(self, count, *, bad=(), labels=None, classes=None):
        self.count, self.bad, self.classes = count, bad, classes
        self.labels = None if labels is None else np.array(labels)

    def __len__(self):
        return self.count

    def key(self, index):
        return f"picture-{index}"

    def read(self, index):
        if index in self.bad:
            return b"no picture"
        file = io.BytesIO()
        Image.new("RGB", (20, 16), (10 * index,) * 3).save(file, "png")
        return file.getvalue()


def brightness(images):
    """(B, 3, H, W), normalised -> (B, 2): the number of each picture, twice."""
    mean, std = torch.tensor(DATA.mean), torch.tensor(DATA.std)
    numbers = (images.mean((2, 3)) * std + mean).mean(1) * 25.5
    return numbers[:, None].expand(-1, 2)


def features(source, *, data=DATA, batch=3, limit=None):
    return extract(brightness, source, data=data, pixels=8, batch=batch, device=CPU, limit=limit)


def numbers(x):
    return [round(n) for n in x[:, 0].tolist()]


@pytest.mark.parametrize("workers", [0, 2])
def test_features_come_in_the_order_of_the_source(workers):
    found = features(Pictures(10, labels=range(10)), data=Data(workers=workers))
    assert found.x.shape == (10, 2)
    assert found.x.dtype == torch.float32
    assert numbers(found.x) == list(range(10))
    assert found.labels.tolist() == list(range(10))
    assert found.bad == []


def test_without_labels():
    assert features(Pictures(4)).labels is None


def test_unreadable_images_are_left_out_and_named():
    found = features(Pictures(10, bad=(3, 9), labels=range(10)))
    assert numbers(found.x) == found.labels.tolist() == [0, 1, 2, 4, 5, 6, 7, 8]
    assert found.bad == ["picture-3", "picture-9"]


def test_too_many_unreadable_images_are_listed():
    with pytest.raises(UserError, match=r"(?s)3 of 10 images.*data.max_bad_fraction = 0.2.*picture-1\n.*picture-9"):
        features(Pictures(10, bad=(1, 3, 9)))


def test_a_limit_takes_images_from_everywhere():
    assert numbers(features(Pictures(10), limit=5).x) == [0, 2, 4, 6, 8]
    assert features(Pictures(4), limit=100).x.shape == (4, 2)
    spread = evenly_spread(1000, 333)
    assert len(set(spread)) == 333
    assert np.diff(spread).max() <= 4


def test_pixel_features_are_what_they_say():
    x = pixel_features(Pictures(3), data=DATA, batch=2, device=CPU).x
    assert x.shape == (3, 3 * 32 * 32)
    for number, row in enumerate(x):
        channels = (torch.full((3,), 10 * number / 255) - torch.tensor(DATA.mean)) / torch.tensor(DATA.std)
        torch.testing.assert_close(row, channels.repeat_interleave(32 * 32))


def test_workers_are_gone_when_it_fails():
    before = threading.active_count()

    def fail(images):
        assert threading.active_count() == before + 2
        raise RuntimeError("out of memory")

    with pytest.raises(RuntimeError, match="out of memory"):
        extract(fail, Pictures(20), data=Data(workers=2), pixels=8, batch=1, device=CPU)
    assert threading.active_count() == before


def one_of_two(rank, folder):
    dist.init_process_group("gloo", init_method=f"file://{folder}/meeting", rank=rank, world_size=2)
    found = features(Pictures(7, bad=(4,), labels=range(7)))
    torch.save((found.x, found.labels, found.bad), f"{folder}/{rank}.pt")
    one = features(Pictures(1))  # fewer images than processes
    assert numbers(one.x) == [0]
    dist.destroy_process_group()


def test_two_processes_get_what_one_gets(tmp_path):
    warm.ensure_serving()
    torch.multiprocessing.start_processes(one_of_two, args=(str(tmp_path),), nprocs=2, start_method="forkserver")
    alone = features(Pictures(7, bad=(4,), labels=range(7)))
    for rank in range(2):
        x, labels, bad = torch.load(tmp_path / f"{rank}.pt", weights_only=True)
        assert torch.equal(x, alone.x)
        assert torch.equal(labels, alone.labels)
        assert bad == alone.bad == ["picture-4"]


def test_a_labelled_training_source_is_the_bank():
    train, val = Pictures(6, labels=[0, 1] * 3), Pictures(4, labels=[0, 1] * 2)
    parts = split(features, train, val, bank_images=3)
    assert numbers(parts.bank.x) == [0, 2, 4]
    assert numbers(parts.queries.x) == [0, 1, 2, 3]
    assert "3 training images" in parts.said
    assert parts.num_classes == 2


@pytest.mark.parametrize("train", [None, Pictures(6)])
def test_else_half_of_val_is(train):
    parts = split(features, train, Pictures(5, labels=range(5)))
    assert numbers(parts.bank.x) == parts.bank.labels.tolist() == [0, 2, 4]
    assert numbers(parts.queries.x) == parts.queries.labels.tolist() == [1, 3]
    assert "no training labels" in parts.said


def test_classes_are_matched_by_name():
    train = Pictures(2, labels=[0, 1], classes=["cat", "dog"])
    val = Pictures(3, labels=[0, 0, 1], classes=["dog", "cat"])
    assert split(features, train, val).queries.labels.tolist() == [1, 1, 0]


def test_other_classes_are_named():
    train = Pictures(2, labels=[0, 1], classes=["cat", "dog"])
    val = Pictures(2, labels=[0, 1], classes=["cat", "wolf"])
    with pytest.raises(UserError, match="only train: dog; only val: wolf"):
        split(features, train, val)


@pytest.mark.parametrize(
    ("val", "words"), [(Pictures(4), "need labels"), (Pictures(1, labels=[0]), "at least 2 are needed")]
)
def test_what_cannot_be_split_is_refused(val, words):
    with pytest.raises(UserError, match=words):
        split(partial(features, batch=2), None, val)
