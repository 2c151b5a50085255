"""What a batch holds depends on seed, epoch and sample; not on workers, processes, or where a run began."""

import contextlib
import multiprocessing
import os
import signal
import threading
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from loaders import DINO, recipe_of, rows, serve, steps
from webdataset import TarWriter

from ssl_global.data import loader as loader_module
from ssl_global.data.loader import Indexed, Loader, ahead_on_device, to_device
from ssl_global.data.order import Order
from ssl_global.data.sample import photograph
from ssl_global.data.source import Source, open_source
from ssl_global.data.workers import num_workers
from ssl_global.recipe import Data

NUM_IMAGES = 37


def crop(number):
    return photograph("chelsea.png").crop((7 * number, 3 * number, 7 * number + 90, 3 * number + 70))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    for number in range(10):
        crop(number).save(path / f"{number}.png")
    return path


@pytest.fixture(scope="module")
def shards(tmp_path_factory):
    """37 JPEGs in three shards of other lengths: no step, block, window or epoch ends where another does."""
    path = tmp_path_factory.mktemp("shards")
    for shard, images in enumerate((range(13), range(13, 33), range(33, NUM_IMAGES))):
        with TarWriter(str(path / f"{shard}.tar"), encoder=True) as tar:
            for number in images:
                tar.write({"__key__": f"{number:02d}", "jpg": crop(number), "cls": number % 5})
    return open_source(str(path))


def river(**data):
    return recipe_of(8, shuffle_block=3, shuffle_window=4, **data)


@pytest.fixture(scope="module")
def uninterrupted(shards):
    """Eleven steps of 8 of 37 images, more than two epochs, by one process without workers."""
    return steps(shards, river(), start=0, stop=11)


combination = st.tuples(st.sampled_from([1, 2, 4]), st.sampled_from([0, 1, 2]), st.sampled_from([1, 2]))


@settings(max_examples=25)
@given(first=combination, second=combination, stopped_at=st.integers(0, 11))
def test_any_stop_and_any_other_machine_leave_every_step_as_it_was(shards, uninterrupted, first, second, stopped_at):
    """(processes, workers, accumulation) before the stop, and others after it: samples, random numbers and pixels."""
    taken = []
    for (processes, workers, parts), start, stop in ((first, 0, stopped_at), (second, stopped_at, 11)):
        recipe = river(workers=workers)
        taken += steps(shards, recipe, start=start, stop=stop, processes=processes, parts=parts)
    assert taken == uninterrupted


@pytest.mark.parametrize("count", [1, 2])
def test_worker_processes_serve_the_same(shards, uninterrupted, count):
    recipe = river(workers=count, worker_kind="processes")
    assert steps(shards, recipe, start=3, stop=11, processes=2, parts=2) == uninterrupted[3:]


def test_every_sample_once_an_epoch_and_the_rest_of_a_batch_goes_first_in_the_next(uninterrupted):
    keys = [key for step in uninterrupted for key, *_ in step]
    for epoch in (0, 1):
        assert len(set(keys[epoch * NUM_IMAGES : (epoch + 1) * NUM_IMAGES])) == NUM_IMAGES
    assert len({row for step in uninterrupted for row in step}) == 88  # other random numbers in another epoch
    assert len({(seed, pixels) for step in uninterrupted for _, seed, pixels, _ in step}) == 88


def test_or_the_rest_is_left_out(shards):
    taken = steps(shards, river(last_batch="drop"), start=0, stop=8)
    epochs = [[key for step in taken[first : first + 4] for key, *_ in step] for first in (0, 4)]
    assert [len(set(epoch)) for epoch in epochs] == [32, 32]
    assert set(epochs[0]) != set(epochs[1])  # not always the same ones


@pytest.mark.parametrize("workers", [0, 2])
def test_repeats_decode_once_and_draw_anew(shards, workers, monkeypatch):
    """The views of a repeated sample are as different from each other as those of two epochs."""
    decoded = Counter()
    look = loader_module.look
    monkeypatch.setattr(loader_module, "look", lambda data, *a: (decoded.update([data]), look(data, *a))[1])
    recipe = river(repeats=2, workers=workers)
    taken = steps(shards, recipe, start=0, stop=5, processes=2, parts=2)
    assert decoded.total() == 5 * 8 // 2
    assert all(Counter(key for key, *_ in step).most_common()[-1][1] == 2 for step in taken)
    assert len({row for step in taken for row in step}) == 40
    once = steps(shards, river(repeats=2), start=0, stop=5)
    assert taken == once
    assert [key for step in once for key, *_ in step][::2] == [
        key for step in steps(shards, river(), start=0, stop=3) for key, *_ in step
    ][:20]


def test_the_ring_is_reused_and_says_how_large_it_is(shards):
    recipe = river(workers=2)
    order = Order.of(shards.bounds, recipe)
    loader = Loader(Indexed(shards), order, recipe, [range(8 * n, 8 * n + 8) for n in range(7)], micro_batch=8)
    with loader.serving() as served:
        places = [tuple(kind.data_ptr() for kind in batch["crops"]) for batch in served]
    assert len(set(places)) == len(loader.ring) == 3
    size = 8 * 3 * (2 * 32 * 32 + 4 * 16 * 16)
    assert sum(kind.numel() for kind in loader.ring[0]) == size
    assert loader.describe() == f"2 threads into a ring of 3 x 8 images, {3 * size / 1e6:.0f} MB"


def test_a_run_that_ends_early_leaves_no_worker(shards):
    before = threading.enumerate()
    recipe = river(workers=2)
    loader = Loader(
        Indexed(shards), Order.of(shards.bounds, recipe), recipe, (range(8) for _ in iter(int, 1)), micro_batch=8
    )
    with contextlib.suppress(KeyError), loader.serving() as served:
        next(served)
        raise KeyError
    assert threading.enumerate() == before


def test_worker_processes_outlive_signals(shards, uninterrupted):
    """A signal reaches the whole process group, and they must serve the step after which the run is saved."""
    recipe = river(workers=2, worker_kind="processes")
    images = [range(8 * n, 8 * n + 8) for n in range(11)]
    taken = []
    loader = Loader(Indexed(shards), Order.of(shards.bounds, recipe), recipe, images, micro_batch=8)
    with loader.serving() as served:
        for batch in served:
            taken.append(rows(batch))
            if len(taken) >= 4:  # they have begun: at their first line a signal still kills
                for worker in multiprocessing.active_children():
                    os.kill(worker.pid, signal.SIGTERM)
                    os.kill(worker.pid, signal.SIGINT)
                    os.kill(worker.pid, signal.SIGUSR1)
    assert taken == uninterrupted
    assert multiprocessing.active_children() == []


def test_decoding_threads_leave_torchs_own_as_they_were(shards):
    threads = torch.get_num_threads()
    serve(shards, river(workers=3), stop=2)
    assert torch.get_num_threads() == threads


# ------------------------------------------------------------------------------------------------- what cannot be read


def test_a_bad_image_is_replaced_by_the_next_and_named(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "3.png").write_bytes(b"")
    served = serve(open_source(str(tmp_path)), recipe_of())
    assert {key for batch in served for key, _ in batch["bad"]} == {"3.png"}
    assert "3.png" not in {key for batch in served for key in batch["key"]}
    assert all(len(batch["key"]) == 4 and not batch["lost"] for batch in served)
    good = [batch["key"] for batch in serve(open_source(str(folder)), recipe_of())]
    assert [[key if key != "3.png" else "4.png" for key in keys] for keys in good] == [b["key"] for b in served]


def test_one_whose_pixels_are_broken_is_replaced_too(folder, tmp_path):
    """Its header is right, so its boxes are drawn, and drawn again for the size of the other."""
    crop(0).resize((400, 300)).save(tmp_path / "a.jpg")
    crop(1).save(tmp_path / "b.jpg")
    whole = (tmp_path / "a.jpg").read_bytes()
    (tmp_path / "a.jpg").write_bytes(whole[: len(whole) // 2])
    (batch,) = serve(open_source(str(tmp_path)), recipe_of(2), stop=1)
    assert batch["key"] == ["b.jpg", "b.jpg"]
    assert [key for key, _ in batch["bad"]] == ["a.jpg"]


def test_nothing_readable_is_counted_as_lost(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_text("no image")
    first = serve(open_source(str(tmp_path)), recipe_of(), stop=1)[0]
    assert len(first["lost"]) == 4
    assert "cannot be read" in first["lost"][0]
    assert "nor any of the 2 samples behind it" in first["lost"][0]
    assert {key for key, _ in first["bad"]} == {"0.jpg", "1.jpg", "2.jpg"}
    assert all(not kind.any() for kind in first["crops"])


@pytest.mark.parametrize("kind", ["threads", "processes"])
def test_a_fault_in_a_worker_is_told_with_the_samples_name(folder, kind, monkeypatch):
    """Not raised: one process that ends alone would leave the others waiting for ever."""
    monkeypatch.setattr(Source, "read", None)
    source = open_source(str(folder))
    read = type(source).read

    def fails(self, index):
        if self.key(index) == "7.png":
            raise MemoryError("no room")
        return read(self, index)

    monkeypatch.setattr(type(source), "read", fails)
    served = serve(source, recipe_of(workers=1, worker_kind=kind), stop=3)
    (lost,) = {why for batch in served for why in batch["lost"]}
    assert lost == "7.png: MemoryError('no room')"


def test_a_killed_worker_process_is_told_too(folder, monkeypatch):
    source = open_source(str(folder))
    monkeypatch.setattr(type(source), "read", lambda self, index: os.kill(os.getpid(), signal.SIGKILL))
    first = serve(source, recipe_of(workers=1, worker_kind="processes"), stop=1)[0]
    assert first["lost"] == ["a decoding process was killed; is there enough memory?"] * 4


# ------------------------------------------------------------------------------------------------------- on the device


def test_views_on_the_device_are_global_first_and_normalised(folder):
    batch = serve(open_source(str(folder)), recipe_of(), stop=1)[0]
    recipe = replace(recipe_of(), data=Data(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)))
    out = to_device(batch, recipe, torch.device("cpu"))
    assert [tuple(view.shape) for view in out["views"]] == [(4, 3, 32, 32)] * 2 + [(4, 3, 16, 16)] * 4
    assert all(view.dtype == torch.float32 and view.abs().max() <= 1.0001 for view in out["views"])
    assert out["seed"].dtype == torch.int64


def test_without_a_gpu_nothing_is_copied_ahead(folder):
    served = serve(open_source(str(folder)), recipe_of())
    assert list(ahead_on_device(iter(served), torch.device("cpu"))) == served


@pytest.mark.gpu
def test_batches_copied_ahead_are_the_batches(shards):
    recipe = river(workers=2)
    loader = Loader(
        Indexed(shards), Order.of(shards.bounds, recipe), recipe, [range(8 * n, 8 * n + 8) for n in range(11)],
        micro_batch=8, pin=True,
    )  # fmt: skip
    expected = [rows(batch) for batch in serve(shards, recipe, stop=11)]
    with loader.serving() as served:
        found = [
            rows(b | {"crops": [k.cpu() for k in b["crops"]]}) for b in ahead_on_device(served, torch.device("cuda"))
        ]
    assert found == expected


def test_number_of_workers():
    assert num_workers(Data(workers=3), 1) == 3
    assert num_workers(Data(workers=0), 1) == 0
    assert 1 <= num_workers(Data(), 1000) <= 16


def test_channels_and_kinds_of_the_ring():
    recipe = replace(DINO, data=Data(channels=5, mean=(0.5,) * 5, std=(0.5,) * 5, workers=0))
    loader = Loader(Indexed.__new__(Indexed), Order(np.array([0, 4]), 0, block=1, window=1), recipe, [], micro_batch=4)
    assert [tuple(kind.shape) for kind in loader.ring[0]] == [(4, 2, 5, 32, 32), (4, 4, 5, 16, 16)]
    assert all(kind.stride(2) == 1 for kind in loader.ring[0])  # a pixel's channels lie side by side
