"""A few images of each class: which ones, what the whole river makes of them, and what is refused."""

import pickle
from pathlib import Path

import numpy as np
import pytest
from loaders import recipe_of, steps
from PIL import Image

from ssl_global.data.few import few_of_each_class
from ssl_global.data.pack import pack
from ssl_global.data.source import Source, open_source
from ssl_global.errors import UserError

COUNTS = {"ant": 7, "bee": 2, "cow": 5}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("classes")
    for label, (name, count) in enumerate(COUNTS.items()):
        (folder / name).mkdir()
        for number in range(count):
            Image.new("RGB", (20, 20), (40 * label, 30 * number, 0)).save(folder / name / f"{number}.png")
    return folder


@pytest.fixture(scope="module")
def shards(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("shards")
    pack(open_source(str(folder)), out, shard_bytes=8000, progress=False)  # a few images in each
    return out


@pytest.fixture(params=["folder", "shards"])
def source(request: pytest.FixtureRequest) -> Source:
    return open_source(str(request.getfixturevalue(request.param)))


def keys(source: Source) -> list[str]:
    return [source.key(index) for index in range(len(source))]


def test_as_many_of_each_class_as_wanted_or_as_there_are(source: Source) -> None:
    few = few_of_each_class(source, 3, seed=0)
    assert few.labels is not None
    assert np.bincount(few.labels).tolist() == [3, 2, 3]
    assert few.classes == list(COUNTS)
    assert few.describe() == "8 of 14 images, 3 classes, 3 images of each (1 class has less)"
    assert few_of_each_class(source, 2, seed=0).describe() == "6 of 14 images, 3 classes, 2 images of each"


def test_its_images_are_the_sources_own_in_its_order(source: Source) -> None:
    few = few_of_each_class(source, 3, seed=4)
    assert source.labels is not None
    assert few.labels is not None
    found = [keys(source).index(key) for key in keys(few)]
    assert found == sorted(set(found))
    assert [few.read(n) for n in range(len(few))] == [source.read(n) for n in found]
    assert [few.place(n) for n in range(len(few))] == [source.place(n) for n in found]
    assert few.labels.tolist() == source.labels[found].tolist()
    assert few.sizes.tolist() == source.sizes[found].tolist()


def test_bounds_are_where_the_shards_begin_that_have_any(shards: Path) -> None:
    source = open_source(str(shards))
    few = few_of_each_class(source, 1, seed=0)
    of_shard = [key.partition("/")[0] for key in keys(few)]
    assert len(source.bounds) > len(few.bounds) > 2
    assert few.bounds.tolist() == [0, *(n for n in range(1, 3) if of_shard[n] != of_shard[n - 1]), 3]


def test_the_seed_says_which_and_fewer_are_among_more(source: Source) -> None:
    chosen = {tuple(keys(few_of_each_class(source, 1, seed=seed))) for seed in range(20)}
    assert len(chosen) > 10
    assert keys(few_of_each_class(source, 3, seed=1)) == keys(few_of_each_class(source, 3, seed=1))
    kept: set[str] = set()
    for count in range(1, 8):
        now = set(keys(few_of_each_class(source, count, seed=1)))
        assert kept <= now
        kept = now
    assert kept == set(keys(source))


def test_every_image_is_as_likely(folder: Path) -> None:
    source = open_source(str(folder))
    times = np.zeros(14)
    for seed in range(700):
        few = few_of_each_class(source, 1, seed=seed)
        times[few.indices] += 1
    assert (np.abs(times[:7] - 100) < 40).all()  # four deviations of a binomial of 700 at 1/7


def test_its_fingerprint_is_that_of_its_images(folder: Path, tmp_path: Path) -> None:
    source = open_source(str(folder))
    prints = {few_of_each_class(source, count, seed=seed).fingerprint for count in (1, 2) for seed in (0, 1)}
    assert len(prints | {source.fingerprint}) == 5
    few = few_of_each_class(source, 2, seed=0)
    assert few.fingerprint == few_of_each_class(open_source(str(folder)), 2, seed=0).fingerprint
    for key in keys(few):
        (tmp_path / key).parent.mkdir(exist_ok=True)
        (tmp_path / key).write_bytes((folder / key).read_bytes())
    assert few.fingerprint != few_of_each_class(open_source(str(tmp_path)), 1, seed=0).fingerprint


def test_batches_are_the_same_on_any_number_of_processes_and_after_a_stop(source: Source) -> None:
    few = pickle.loads(pickle.dumps(few_of_each_class(source, 2, seed=0)))
    recipe = recipe_of(4)
    whole = steps(few, recipe, start=0, stop=6)
    assert steps(few, recipe, start=0, stop=6, processes=2) == whole
    assert steps(few, recipe, start=3, stop=6) == whole[3:]
    assert {row[0] for step in whole for row in step} == set(keys(few))


def test_what_cannot_be_is_refused_in_a_line(folder: Path) -> None:
    with pytest.raises(UserError, match=r"data.images_per_class = 0: at least 1, or None for all"):
        few_of_each_class(open_source(str(folder)), 0, seed=0)
    with pytest.raises(UserError, match=r"data.images_per_class = 2: the images of .*ant have no labels to choose by"):
        few_of_each_class(open_source(str(folder / "ant")), 2, seed=0)
