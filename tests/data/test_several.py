"""Folders with a labels.csv: any number of classes for each image, all the way into a batch, and what is refused."""

import io
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from loaders import recipe_of, serve
from PIL import Image

from ssl_global.data.few import few_of_each_class
from ssl_global.data.pack import pack
from ssl_global.data.several import Sets
from ssl_global.data.source import Source, open_source
from ssl_global.errors import UserError

LABELS = {"a.png": "dog|cat", "b.png": "", "deep/c.png": "red fox", "deep/d.png": "cat"}
CLASSES = ["cat", "dog", "red fox"]
WHOLE = "".join(f"{name},{labels}\n" for name, labels in LABELS.items())


def folder_of(tmp_path: Path, text: str | None = None) -> Path:
    for number, name in enumerate(LABELS):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (12, 12), (60 * number, 0, 0)).save(tmp_path / name)
    lines = "".join(f"{name},{labels}\n" for name, labels in reversed(LABELS.items()))
    (tmp_path / "labels.csv").write_text(f"image,labels\n{lines}" if text is None else text)
    return tmp_path


def named(source: Source) -> dict[str, set[str]]:
    assert source.sets is not None
    assert source.classes is not None
    return {source.key(n): {source.classes[k] for k in source.sets[n]} for n in range(len(source))}


def test_sets_are_those_of_the_file(tmp_path: Path) -> None:
    source = open_source(str(folder_of(tmp_path)))
    assert named(source) == {n: set(labels.split("|")) - {""} for n, labels in LABELS.items()}
    assert source.classes == CLASSES
    assert source.labels is None
    assert source.describe() == "4 images, 3 classes, any number for each image"
    assert source.sets is not None
    assert source.sets.target(0, 3).tolist() == [1, 1, 0]
    assert source.sets.target(1, 3).tolist() == [0, 0, 0]


def test_quotes_byte_order_marks_and_windows_lines_are_read(tmp_path: Path) -> None:
    folder_of(tmp_path)
    lines = "".join(f'"{name}","{labels}"\r\n' for name, labels in LABELS.items())
    (tmp_path / "labels.csv").write_bytes(f"\ufeffimage,labels\r\n{lines}\r\n".encode())
    assert named(open_source(str(tmp_path)))["a.png"] == {"cat", "dog"}


def test_other_labels_are_other_data(tmp_path: Path) -> None:
    before = open_source(str(folder_of(tmp_path))).fingerprint
    assert open_source(str(tmp_path)).fingerprint == before
    (tmp_path / "labels.csv").write_text((tmp_path / "labels.csv").read_text().replace("d.png,cat", "d.png,dog"))
    assert open_source(str(tmp_path)).fingerprint != before


def test_batches_have_a_row_for_each_image(tmp_path: Path) -> None:
    source = open_source(str(folder_of(tmp_path)))
    seen = set()
    for batch in serve(source, recipe_of(4, repeats=2), stop=3):
        assert batch["label"].shape == (4, 3)
        for key, row in zip(batch["key"], batch["label"], strict=True):
            assert row.tolist() == [name in LABELS[key].split("|") for name in CLASSES]
            seen.add(key)
    assert seen == set(LABELS)


def test_a_batch_with_a_lost_image_is_whole(tmp_path: Path) -> None:
    """The run stops at it and says why; it must come so far."""
    source = open_source(str(folder_of(tmp_path)))
    recipe = recipe_of(4)
    (tmp_path / "labels.csv").unlink()
    source.sets = Sets.of([[0], [1], [2]])  # the fourth image has none: an error of its own
    (batch,) = serve(source, recipe, stop=1)
    assert len(batch["lost"]) == 1
    assert (batch["label"].shape, batch["label"].dtype) == ((4, 3), torch.uint8)


def test_renumbered() -> None:
    sets = Sets.of([[0, 1], [], [1]]).renumbered([4, 2])
    assert [sets[n].tolist() for n in range(3)] == [[2, 4], [], [2]]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "line 1: ''; image,labels would be right"),
        ("file,tags\n", "line 1: 'file,tags'; image,labels would be right"),
        (f"image,labels\n{WHOLE}e.png,cat\n", "line 6: there is no image e.png in "),
        (f"image,labels\n{WHOLE}a.png,cat\n", "line 6: a.png a second time"),
        ("image,labels\na.png,cat,dog\n", "line 2: 3 values; image,name|name would be right"),
        ("image,labels\na.png\n", "line 2: 1 value; image,name|name would be right"),
        ("image,labels\na.png,cat||dog\n", "line 2: 'cat||dog' holds an empty name; name|name would be right"),
        ("image,labels\na.png,cat\n", "has no line for b.png and 2 more; one of no class ends with its comma"),
    ],
)
def test_what_is_wrong_is_named_with_its_line(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(UserError) as caught:
        open_source(str(folder_of(tmp_path, text)))
    assert str(caught.value).startswith(str(tmp_path / "labels.csv"))
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_what_is_no_text_is_named(tmp_path: Path) -> None:
    (folder_of(tmp_path) / "labels.csv").write_bytes(b"image,labels\n\xff\xfe\n")
    with pytest.raises(UserError, match=r"labels.csv: cannot be read: .* 0xff"):
        open_source(str(tmp_path))


def test_what_needs_one_class_says_so(tmp_path: Path) -> None:
    source = open_source(str(folder_of(tmp_path)))
    with pytest.raises(UserError, match=r"data.images_per_class = 2: the images of .* have several classes each"):
        few_of_each_class(source, 2, seed=0)


def test_shards_keep_the_sets(tmp_path: Path) -> None:
    source = open_source(str(folder_of(tmp_path / "images")))
    packed = pack(source, tmp_path / "shards", shard_bytes=4000, processes=1, progress=False)
    assert len(packed.shards) > 1
    assert packed.summary["classes"] == {"cat": 2, "dog": 1, "red fox": 1}
    for _ in range(2):  # from the headers, then from the index beside them
        shards = open_source(str(tmp_path / "shards"))
        assert list(named(shards).values()) == list(named(source).values())
        assert (shards.labels, shards.classes) == (None, CLASSES)


def shard_of(path: Path, *samples: dict[str, bytes]) -> Source:
    with tarfile.open(path / "s.tar", "w") as tar:
        for number, sample in enumerate(samples):
            for suffix, data in ({"png": (path / "a.png").read_bytes()} | sample).items():
                member = tarfile.TarInfo(f"{number}.{suffix}")
                member.size = len(data)
                tar.addfile(member, io.BytesIO(data))
    return open_source(str(path / "s.tar"))


def test_labels_of_shards_may_be_written_in_several_ways(tmp_path: Path) -> None:
    folder_of(tmp_path)
    ways = [{"cls": b"3 1"}, {"cls": b"2"}, {"json": b'{"labels": [0, 3]}'}, {"json": b'{"labels": []}'}]
    source = shard_of(tmp_path, *ways)
    assert source.sets is not None
    assert [source.sets[n].tolist() for n in range(4)] == [[1, 3], [2], [0, 3], []]
    assert source.classes == ["0", "1", "2", "3"]
    some = shard_of(tmp_path, {"cls": b"3 1"}, {})
    assert (some.labels, some.sets) == (None, None)
    assert "no labels (only 1 have one)" in some.describe()
    for written in (b"3 cat", b"3 -1", b"3 9999999999"):
        with pytest.raises(UserError, match=f"0.cls holds '{written.decode()}'; a label is a whole number"):
            shard_of(tmp_path, {"cls": written})
    with pytest.raises(UserError, match="holds the label 2000000000; classes are numbered from 0, below 1048576"):
        shard_of(tmp_path, {"cls": b"1 2000000000"})


def test_a_strangers_index_is_not_believed(tmp_path: Path) -> None:
    """Whatever it says that no shard could say: it is built anew."""
    folder_of(tmp_path)
    shard_of(tmp_path, {"cls": b"3 1"}, {"cls": b"2"})
    path = tmp_path / "s.tar.index.npz"
    right = dict(np.load(path))
    for name, value in (("set_ends", [2]), ("set_ends", [3, 2]), ("set_ends", [-1, 3]), ("set_members", [1, 3]),
                        ("set_members", [1, -3, 2]), ("set_members", [1, 3, 2**40]), ("labels", [-3, 2])):  # fmt: skip
        with path.open("wb") as file:
            np.savez(file, **(right | {name: np.array(value, dtype=np.int64)}))
        source = open_source(str(tmp_path / "s.tar"))
        assert source.sets is not None
        assert [source.sets[n].tolist() for n in range(2)] == [[1, 3], [2]]
