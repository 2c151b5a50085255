"""Labelled images of torchvision's datasets, downloaded and written to shards once, then read like any other shards.

    torchvision:cifar10@train    its training images; without @train the same
    torchvision:cifar10@test     another split, by torchvision's name of it
    torchvision:eurosat          one that has no splits

    CACHE/torchvision/cifar10/download/                       what torchvision downloads: it checks the sums
    CACHE/torchvision/cifar10/train/cifar10-train-000000.tar  whole, or not there, and classes.json

Names are torchvision's classes in lower case: those that it can download and whose targets are whole numbers. Files of
images are taken as they are; images that come as arrays (CIFAR, MNIST) become PNG, which loses nothing.

torchvision reads some of its downloads (CIFAR) by unpickling them, after it has compared their checksums with its own:
who can write into the cache folder could have a program run. What is in the shards is no pickle.
"""

import inspect
import io
import json
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from numbers import Integral
from pathlib import Path
from typing import Any

import webdataset
from PIL import Image

from ssl_global.data.cache import alone, cache_folder
from ssl_global.data.progress import report
from ssl_global.errors import UserError

PREFIX = "torchvision:"
SHARD_BYTES = 256 * 2**20  # a shard is closed before it would grow beyond this (ours)
DOWNLOAD = "download"  # a folder that is no split's
NO_SPLITS = "all"  # the folder of a dataset without any
# Those whose targets are not one class of an image: they would be downloaded in vain.
OTHER_TARGETS = {
    "celeba", "kinetics", "kitti", "lfwpairs", "middlebury2014stereo", "movingmnist", "phototour", "sbdataset", "sbu",
    "vocdetection", "vocsegmentation", "widerface",
}  # fmt: skip


def shards_of(address: str) -> list[str]:
    """The shards of the dataset, written first if they are not there. Raises UserError, one line saying what is wrong.

    One process of a machine downloads and writes, others wait for it.
    """
    name, _, split = address.removeprefix(PREFIX).partition("@")
    kinds = datasets()
    if name not in kinds:
        raise UserError(f"{address}: no dataset of torchvision's with classes; there are {', '.join(sorted(kinds))}")
    split = split or default_split(kinds[name])
    if not re.fullmatch(r"[A-Za-z0-9+_-]+", split) or split == DOWNLOAD:
        raise UserError(f"{address}: {split!r} is no name of a split")
    folder = cache_folder() / "torchvision" / name
    with alone(folder / f".{split}.lock"):
        if not (folder / split).exists():
            write(address, kinds[name], folder, name, split)
    return sorted(map(str, (folder / split).glob("*.tar")))


def datasets() -> dict[str, Callable[..., Any]]:
    """By their names in lower case."""
    import torchvision.datasets as known  # a second, which is not for everyone

    classes = {name.lower(): kind for name, kind in vars(known).items() if inspect.isclass(kind)}
    return {n: kind for n, kind in classes.items() if "download" in options(kind) and n not in OTHER_TARGETS}


def options(kind: Callable[..., Any]) -> set[str]:
    return set(inspect.signature(kind).parameters)


def default_split(kind: Callable[..., Any]) -> str:
    return "train" if options(kind) & {"train", "split"} else NO_SPLITS


def write(address: str, kind: Callable[..., Any], folder: Path, name: str, split: str) -> None:
    """All of it under a temporary name, then renamed."""
    dataset = download(address, kind, folder / DOWNLOAD, split)
    temporary = None
    try:
        temporary = Path(tempfile.mkdtemp(prefix=f".{split}-", dir=folder))
        with report("written", len(dataset), visible=True) as done:
            most = write_shards(address, dataset, temporary / f"{name}-{split}", done)
        classes = [c if isinstance(c, str) else str(c[0]) for c in getattr(dataset, "classes", ())]
        if len(classes) > most:
            (temporary / "classes.json").write_text(json.dumps(classes))
        temporary.chmod(0o755)  # mkdtemp's is its user's alone
        temporary.rename(folder / split)
    except OSError as error:
        raise UserError(f"{address}: {folder} cannot be written to: {error.strerror}; set XDG_CACHE_HOME") from error
    finally:
        if temporary is not None:
            shutil.rmtree(temporary, ignore_errors=True)


def download(address: str, kind: Callable[..., Any], root: Path, split: str) -> Any:
    """The dataset, open. Whatever torchvision raises, as one line."""
    said: dict[str, Any] = {}
    if "train" in options(kind):
        if split not in ("train", "test"):
            raise UserError(f"{address}: there is no split {split}; there are train, test")
        said["train"] = split == "train"
    elif "split" in options(kind):
        said["split"] = split
    elif split != NO_SPLITS:
        raise UserError(f"{address}: has no splits; give {address.partition('@')[0]}")
    if "loader" in options(kind):
        said["loader"] = lambda path: Path(path).read_bytes()
    try:
        root.mkdir(parents=True, exist_ok=True)
        return kind(str(root), download=True, **said)
    except Exception as error:  # of the network, of the archive, of a package that a few of them need
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(f"{address}: torchvision cannot open it in {root}: {reason}") from error


def write_shards(address: str, dataset: Any, path: Path, done: Callable[[int], None]) -> int:
    """`path`-000000.tar and on. Returns the highest label, -1 for none."""
    most, number, filled, writer = -1, 0, SHARD_BYTES, None
    try:
        for index, (image, label) in enumerate(samples(address, dataset)):
            if writer is None or filled + len(image) > SHARD_BYTES:
                if writer is not None:
                    writer.close()
                writer = webdataset.TarWriter(f"{path}-{number:06d}.tar", encoder=False, mtime=0)
                number, filled = number + 1, 0
            sample = {"__key__": f"{index:09d}", suffix(image): image}
            writer.write(sample if label < 0 else sample | {"cls": str(label).encode()})
            most, filled = max(most, label), filled + len(image)
            done(index + 1)
    finally:
        if writer is not None:
            writer.close()
    return most


def samples(address: str, dataset: Any) -> Iterator[tuple[bytes, int]]:
    """(encoded image, label); -1: it has none."""
    for index in range(len(dataset)):
        image, label = dataset[index]
        if isinstance(image, Image.Image):
            image = as_png(image)
        if not isinstance(image, bytes) or not (label is None or isinstance(label, Integral)):
            raise UserError(f"{address}: its targets are no classes of images: {type(label).__name__}")
        yield image, -1 if label is None else int(label)


def as_png(image: Image.Image) -> bytes:
    file = io.BytesIO()
    image.save(file, "PNG")
    return file.getvalue()


def suffix(image: bytes) -> str:
    """Of the member's name; what it is the decoder sees for itself."""
    return "png" if image.startswith(b"\x89PNG") else "jpg"
