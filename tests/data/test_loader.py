"""What a batch holds depends on seed, epoch and sample; not on workers, processes, or where a run began."""

from dataclasses import replace

import pytest
import torch
from recipes_under_test import load_recipe

from ssl_global.data.loader import loader, num_workers, serving, to_device
from ssl_global.data.order import batches
from ssl_global.data.sample import photograph
from ssl_global.data.source import open_source
from ssl_global.recipe import Data

DINO = load_recipe("dino", "demo")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("images")
    image = photograph("chelsea.png")
    for number in range(10):
        image.crop((20 * number, 10, 20 * number + 100, 90)).save(path / f"{number}.png")
    return path


def load(folder, *, workers=0, start=0, process=0, processes=1, micro=4):
    recipe = replace(DINO, data=replace(DINO.data, workers=workers))
    positions = batches(
        start_step=start, num_steps=6, global_batch=4, micro_batch=micro, process=process, num_processes=processes
    )
    with serving(loader(open_source(str(folder)), recipe, positions, processes_here=1, pin=False)) as served:
        return list(served)


def assert_same(a, b):
    assert a["key"] == b["key"]
    assert torch.equal(a["seed"], b["seed"])
    for part in ("crops", "colours"):
        assert all(torch.equal(x, y) for x, y in zip(a[part], b[part], strict=True))


@pytest.mark.parametrize("workers", [1, 2])
def test_workers_change_nothing(folder, workers):
    for a, b in zip(load(folder), load(folder, workers=workers), strict=True):
        assert_same(a, b)


def test_a_run_that_begins_later_gets_what_the_other_would_have_got(folder):
    for a, b in zip(load(folder)[3:], load(folder, start=3), strict=True):
        assert_same(a, b)


def test_two_processes_share_the_batch_of_one(folder):
    halves = [load(folder, process=p, processes=2, micro=2) for p in (0, 1)]
    for whole, first, second in zip(load(folder), *halves, strict=True):
        assert whole["key"] == first["key"] + second["key"]
        assert torch.equal(whole["seed"], torch.cat([first["seed"], second["seed"]]))
        for part in ("crops", "colours"):
            for x, y, z in zip(whole[part], first[part], second[part], strict=True):
                assert torch.equal(x, torch.cat([y, z]))


def test_a_sample_has_other_views_in_another_epoch(folder):
    served = load(folder)
    seen = [(key, seed) for batch in served for key, seed in zip(batch["key"], batch["seed"].tolist(), strict=True)]
    assert sorted(key for key, _ in seen[:10]) == [f"{n}.png" for n in range(10)]
    assert len(set(seen)) == len(seen) == 24


def test_a_bad_image_is_replaced_by_the_next_and_named(folder, tmp_path):
    for file in folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "3.png").write_bytes(b"")
    served = load(tmp_path)
    assert {key for batch in served for key, _ in batch["bad"]} == {"3.png"}
    assert "3.png" not in {key for batch in served for key in batch["key"]}
    assert all(len(batch["key"]) == 4 and batch["lost"] == 0 for batch in served)
    good = [batch["key"] for batch in load(folder)]
    assert [[key if key != "3.png" else "4.png" for key in keys] for keys in good] == [b["key"] for b in served]


def test_nothing_readable_is_counted_as_lost(tmp_path):
    for number in range(3):
        (tmp_path / f"{number}.jpg").write_text("no image")
    first = load(tmp_path)[0]
    assert first["lost"] == 4
    assert {key for key, _ in first["bad"]} == {"0.jpg", "1.jpg", "2.jpg"}


def test_views_on_the_device_are_global_first_and_normalised(folder):
    batch = to_device(load(folder)[0], Data(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5)), torch.device("cpu"))
    assert [tuple(view.shape) for view in batch["views"]] == [(4, 3, 32, 32)] * 2 + [(4, 3, 16, 16)] * 4
    assert all(view.dtype == torch.float32 and view.abs().max() <= 1.0001 for view in batch["views"])
    assert batch["seed"].dtype == torch.int64


def test_number_of_workers():
    assert num_workers(Data(workers=3), 1) == 3
    assert num_workers(Data(workers=0), 1) == 0
    assert 1 <= num_workers(Data(), 1000) <= 8
