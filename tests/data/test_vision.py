"""Datasets of torchvision's, made here in their own formats on the disk: nothing is downloaded."""

import io
import struct
import urllib.error
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import torchvision
from PIL import Image

from ssl_global.data import vision
from ssl_global.data.decode import decode
from ssl_global.data.source import Source, open_source
from ssl_global.errors import UserError


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    def no_network(*_: object, **__: object) -> None:
        raise urllib.error.URLError("Name or service not known")

    monkeypatch.setattr(urllib.request, "urlopen", no_network)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    return tmp_path / "ssl_global" / "torchvision"


def idx(values: np.ndarray) -> bytes:
    """The format of MNIST's files: type and dimensions, sizes, values, all big-endian."""
    return struct.pack(">HBB", 0, 8, values.ndim) + struct.pack(f">{values.ndim}I", *values.shape) + values.tobytes()


@pytest.fixture
def mnist(cache: Path) -> tuple[np.ndarray, np.ndarray]:
    """Its digits and their classes, lying there as if they had been downloaded."""
    random = np.random.default_rng(0)
    digits = random.integers(0, 256, (30, 28, 28), dtype=np.uint8)
    classes = (np.arange(30, dtype=np.uint8) * 7) % 10
    raw = cache / "mnist" / "download" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    for part, some in (("train", slice(0, 20)), ("t10k", slice(20, 30))):
        (raw / f"{part}-images-idx3-ubyte").write_bytes(idx(digits[some]))
        (raw / f"{part}-labels-idx1-ubyte").write_bytes(idx(classes[some]))
    return digits, classes


def pixels(source: Source) -> np.ndarray:
    return np.stack([decode(source.read(index), 1)[0].numpy() for index in range(len(source))])


def refused(address: str) -> str:
    with pytest.raises(UserError) as caught:
        open_source(address)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_arrays_become_images_with_the_same_pixels(mnist: tuple[np.ndarray, np.ndarray], cache: Path) -> None:
    digits, classes = mnist
    for split, some in (("train", slice(0, 20)), ("test", slice(20, 30))):
        source = open_source(f"torchvision:mnist@{split}")
        assert np.array_equal(pixels(source), digits[some])
        assert source.labels is not None
        assert source.labels.tolist() == classes[some].tolist()
        assert source.classes is not None
        assert source.classes[7] == "7 - seven"
        assert source.path == f"torchvision:mnist@{split}"
    assert sorted(path.name for path in (cache / "mnist").iterdir() if path.name[0] != ".") == [
        "download", "test", "train",
    ]  # fmt: skip


def test_the_shards_are_written_once_and_are_the_same_anew(
    mnist: tuple[np.ndarray, np.ndarray], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(vision, "SHARD_BYTES", 4000)
    with ThreadPoolExecutor(4) as pool:  # flock holds between descriptors, so threads are as processes here
        sources = list(pool.map(open_source, ["torchvision:mnist"] * 4))
    assert {source.fingerprint for source in sources} == {sources[0].fingerprint}
    shards = sorted((cache / "mnist" / "train").glob("*.tar"))
    assert len(shards) > 3
    assert shards[0].name == "mnist-train-000000.tar"
    before = [shard.read_bytes() for shard in shards]
    (cache / "mnist" / "download").rename(cache / "gone")
    assert np.array_equal(pixels(open_source("torchvision:mnist@train")), mnist[0][:20])
    (cache / "gone").rename(cache / "mnist" / "download")
    (cache / "mnist" / "train").rename(cache / "old")
    assert open_source("torchvision:mnist@train").fingerprint == sources[0].fingerprint
    assert [shard.read_bytes() for shard in shards] == before


def test_files_are_taken_as_they_are(cache: Path) -> None:
    """EuroSAT has no splits, and folders of JPEG."""
    written = {}
    for label, name in enumerate(("Forest", "River")):
        folder = cache / "eurosat" / "download" / "eurosat" / "2750" / name
        folder.mkdir(parents=True)
        for number in range(2):
            file = io.BytesIO()
            Image.new("RGB", (16, 12), (99 * number, 80 * label, 0)).save(file, "JPEG")
            (folder / f"{name}_{number}.jpg").write_bytes(file.getvalue())
            written[file.getvalue()] = label
    source = open_source("torchvision:eurosat")
    assert source.labels is not None
    assert {source.read(n): int(source.labels[n]) for n in range(4)} == written
    assert source.classes == ["Forest", "River"]
    assert source.key(3) == "eurosat-all-000000.tar/000000003"
    assert refused("torchvision:eurosat@test") == "torchvision:eurosat@test: has no splits; give torchvision:eurosat"


def test_a_writing_that_was_stopped_leaves_nothing_that_would_be_taken_for_whole(
    mnist: tuple[np.ndarray, np.ndarray], cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    encode, encoded = vision.as_png, []

    def stopping(image: Image.Image) -> bytes:
        encoded.append(image)
        if len(encoded) == 5:
            raise KeyboardInterrupt
        return encode(image)

    with monkeypatch.context() as patched:
        patched.setattr(vision, "as_png", stopping)
        with pytest.raises(KeyboardInterrupt):
            open_source("torchvision:mnist")
    assert [path.name for path in (cache / "mnist").iterdir() if path.is_dir()] == ["download"]
    assert len(open_source("torchvision:mnist")) == 20


def test_images_without_labels_have_none(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Fake:
        def __init__(self, root: str, split: str = "train", download: bool = False) -> None:
            self.image = Image.new("RGB", (8, 8))

        def __len__(self) -> int:
            return 3

        def __getitem__(self, index: int) -> tuple[Image.Image, int | None]:
            return self.image, None

    monkeypatch.setattr(torchvision.datasets, "STL10", Fake)
    assert open_source("torchvision:stl10@unlabeled").labels is None
    monkeypatch.setattr(Fake, "__getitem__", lambda self, index: (self.image, (1, 2)))
    assert refused("torchvision:stl10@test") == ("torchvision:stl10@test: its targets are no classes of images: tuple")


def test_without_a_network_it_is_one_line(cache: Path) -> None:
    error = refused("torchvision:cifar10@train")
    assert error.startswith(f"torchvision:cifar10@train: torchvision cannot open it in {cache}/cifar10/download: ")
    assert "Name or service not known" in error


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("torchvision:cifar", "no dataset of torchvision's with classes; there are caltech101, caltech256, cifar10, "),
        ("torchvision:vocdetection", "no dataset of torchvision's with classes; there are "),
        ("torchvision:fakedata", "no dataset of torchvision's with classes; there are "),
        ("torchvision:cifar10@val", "there is no split val; there are train, test"),
        ("torchvision:dtd@tests", "Unknown value 'tests' for argument split. Valid values are "),
        ("torchvision:mnist@../train", "'../train' is no name of a split"),
        ("torchvision:mnist@download", "'download' is no name of a split"),
        ("cifar10", "there is no such file or folder; of torchvision's datasets it is torchvision:cifar10"),
    ],
)
def test_what_cannot_be_is_refused(address: str, message: str) -> None:
    assert refused(address).startswith(f"{address}: ")
    assert message in refused(address)


def test_a_cache_that_cannot_be_written_to_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("in the way")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert str(tmp_path / "file") in refused("torchvision:mnist@train")
