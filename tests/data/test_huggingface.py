"""Datasets of Hugging Face's library, made here and saved to disk: nothing is downloaded."""

import io
import pickle
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from datasets import ClassLabel, Dataset, DatasetDict, Features, Image, Value
from PIL import Image as Pillow

from ssl_global.data.decode import BadImage, decode
from ssl_global.data.huggingface import HuggingFaceSource
from ssl_global.data.source import Source, open_source
from ssl_global.errors import UserError

pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of the library's own parts


def jpeg(number: int) -> bytes:
    file = io.BytesIO()
    Pillow.new("RGB", (20 + number, 10), (9 * number, 0, 0)).save(file, "JPEG")
    return file.getvalue()


def rows(count: int = 6, **columns: list) -> dict[str, list]:
    return {"image": [{"bytes": jpeg(n), "path": None} for n in range(count)]} | columns


def saved(tmp_path: Path, dataset: Dataset | DatasetDict, split: str = "") -> Source:
    dataset.save_to_disk(str(tmp_path / "saved"))
    return open_source(f"datasets:{tmp_path / 'saved'}{split}")


CLASSED = Features({"image": Image(), "label": ClassLabel(names=["cat", "dog"])})


def test_images_keys_labels_and_classes(tmp_path: Path) -> None:
    source = saved(tmp_path, Dataset.from_dict(rows(label=[0, 1, 0, 1, 1, 0]), features=CLASSED))
    assert [source.read(i) for i in range(len(source))] == [jpeg(n) for n in range(6)]
    assert source.sizes.tolist() == [len(jpeg(n)) for n in range(6)]
    assert source.key(3) == "train/000000003"
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1, 0, 1, 1, 0]
    assert source.classes == ["cat", "dog"]
    assert decode(source.read(5), 3).shape == (3, 10, 25)
    assert "6 images of datasets:" in source.describe()


def test_a_selection_in_another_order(tmp_path: Path) -> None:
    dataset = Dataset.from_dict(rows(label=[0, 1, 0, 1, 1, 0]), features=CLASSED).select([4, 0, 3])
    source = saved(tmp_path, dataset)
    assert [source.read(i) for i in range(3)] == [jpeg(n) for n in (4, 0, 3)]


def test_splits(tmp_path: Path) -> None:
    parts = DatasetDict(
        {
            name: Dataset.from_dict(rows(n), features=Features({"image": Image()}))
            for n, name in ((2, "train"), (3, "test"))
        }
    )
    assert len(saved(tmp_path, parts)) == 2
    test = open_source(f"datasets:{tmp_path / 'saved'}@test")
    assert len(test) == 3
    assert test.labels is None
    with pytest.raises(UserError, match="there is no split val; there are train, test"):
        open_source(f"datasets:{tmp_path / 'saved'}@val")


def test_several_chunks(tmp_path: Path) -> None:
    from datasets import concatenate_datasets

    part = Dataset.from_dict(rows(), features=Features({"image": Image()}))
    source = saved(tmp_path, concatenate_datasets([part, part, part]))
    assert [source.read(i) for i in range(18)] == [jpeg(n) for n in range(6)] * 3


def test_paths_instead_of_bytes_and_rows_without_an_image(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg(1))
    paths = [str(tmp_path / name) for name in ("a.jpg", "gone.jpg")]
    images = [{"bytes": None, "path": paths[0]}, None, {"bytes": None, "path": paths[1]}]
    dataset = Dataset.from_dict({"image": images}, features=Features({"image": Image(decode=False)}))
    source = HuggingFaceSource("datasets:here", dataset, "train")
    assert source.read(0) == jpeg(1)
    assert source.sizes.tolist() == [len(jpeg(1)), 0, 0]
    with pytest.raises(BadImage, match="no image in this row"):
        source.read(1)
    with pytest.raises(BadImage, match=r"gone\.jpg cannot be read: No such file"):
        source.read(2)


@pytest.mark.parametrize("labels", [[0, 1, -1], [0, 1, None]])
def test_partly_labelled_is_not_labelled(tmp_path: Path, labels: list[int | None]) -> None:
    features = Features({"image": Image(), "label": Value("int64")})
    assert saved(tmp_path, Dataset.from_dict(rows(3, label=labels), features=features)).labels is None


def test_plain_numbers_are_labels(tmp_path: Path) -> None:
    features = Features({"image": Image(), "cls": Value("int32")})
    source = saved(tmp_path, Dataset.from_dict(rows(3, cls=[2, 0, 1]), features=features))
    assert source.labels is not None
    assert source.labels.tolist() == [2, 0, 1]
    assert source.classes is None


def test_threads_and_pickles(tmp_path: Path) -> None:
    source = saved(tmp_path, Dataset.from_dict(rows(40), features=Features({"image": Image()})))
    with ThreadPoolExecutor(4) as pool:
        assert list(pool.map(source.read, list(range(40)) * 5)) == [jpeg(n) for n in range(40)] * 5
    again = pickle.loads(pickle.dumps(source))
    assert again.read(7) == jpeg(7)
    assert again.fingerprint == source.fingerprint


def test_what_is_wrong_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def unreachable(*_: object, **__: object) -> None:
        raise ConnectionError("Couldn't reach the hub\nat all")

    monkeypatch.setattr("datasets.load_dataset", unreachable)
    with pytest.raises(UserError, match=r"^datasets:no/such-dataset: ConnectionError: Couldn't reach the hub$"):
        open_source("datasets:no/such-dataset")
    with pytest.raises(UserError, match="no column of images"):
        saved(tmp_path, Dataset.from_dict({"text": ["a"]}))
    both = Features({"left": Image(), "right": Image()})
    two = {"left": rows(1)["image"], "right": rows(1)["image"]}
    (tmp_path / "two").mkdir()
    with pytest.raises(UserError, match="several columns of images: left, right"):
        saved(tmp_path / "two", Dataset.from_dict(two, features=both))
