"""Images of a dataset of Hugging Face's `datasets`, downloaded once by that library and then read from its Arrow files.

    datasets:beans                     a dataset of the hub, its split "train"
    datasets:cifar10@test              another split
    datasets:owner/name:config@train   one of several configurations
    datasets:/data/saved@train         what Dataset.save_to_disk or DatasetDict.save_to_disk wrote

The library is an extra: pip install 'ssl_global[huggingface]'.
"""

import os
from pathlib import Path
from typing import Any

import numpy as np

from ssl_global.data.decode import BadImage
from ssl_global.data.source import Source, counted
from ssl_global.errors import UserError

LABELS = ("label", "labels", "cls")  # columns that may hold the class


class HuggingFaceSource(Source):
    """The rows of one split, in its order. Encoded images are read straight from the Arrow table."""

    def __init__(self, path: str, dataset: Any, split: str) -> None:
        self.path = path
        self.split = split
        # Of a selection, flatten_indices() would write all its images anew.
        self.rows = None if dataset._indices is None else dataset._indices.column(0).to_numpy()
        self.table = dataset.select_columns([image_column(path, dataset)]).data  # from a file: pickled as its path
        self.find_images()
        self.sizes = self.take(sizes_of(self.images))
        self.labels, self.classes = labels_of(path, dataset)
        self.labels = None if self.labels is None else self.take(self.labels)

    def find_images(self) -> None:
        """The chunks as they lie in the mapped file. One chunk of them all would be a copy of all images in memory."""
        self.images = self.table.column(0).chunks
        self.starts = np.cumsum([0] + [len(chunk) for chunk in self.images])

    def take(self, values: np.ndarray) -> np.ndarray:
        return values if self.rows is None else values[self.rows]

    def __getstate__(self) -> dict[str, object]:
        return {name: value for name, value in self.__dict__.items() if name != "images"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self.find_images()

    def key(self, index: int) -> str:
        return f"{self.split}/{index:09d}"

    def read(self, index: int) -> bytes:
        row = index if self.rows is None else int(self.rows[index])
        chunk = int(np.searchsorted(self.starts, row, side="right")) - 1
        image = self.images[chunk][row - int(self.starts[chunk])].as_py()
        if image is None or (image.get("bytes") is None and image.get("path") is None):
            raise BadImage("there is no image in this row")
        if image.get("bytes") is not None:
            data: bytes = image["bytes"]
            return data
        if not os.path.isfile(image["path"]):  # a device or a pipe would be read for ever
            raise BadImage(f"{image['path']} cannot be read: No such file")
        try:
            return Path(image["path"]).read_bytes()
        except OSError as error:
            raise BadImage(f"{image['path']} cannot be read: {error.strerror}") from error

    def describe(self) -> str:
        return f"{counted(len(self), 'image')} of {self.path}, {self.describe_labels()}"


def open_dataset(address: str) -> HuggingFaceSource:
    """The images at `address` (see the head of this file). Raises UserError, one line naming what is wrong."""
    try:
        import datasets
    except ImportError as error:
        raise UserError(f"{address}: needs the package datasets; pip install 'ssl_global[huggingface]'") from error
    rest, _, split = address.removeprefix("datasets:").partition("@")
    split = split or "train"
    try:
        if os.path.isdir(rest) and is_saved(Path(rest)):
            loaded = datasets.load_from_disk(rest)
            if isinstance(loaded, datasets.DatasetDict):
                if split not in loaded:
                    raise UserError(f"{address}: there is no split {split}; there are {', '.join(loaded)}")
                loaded = loaded[split]
            elif "@" in address and loaded.split is not None and str(loaded.split) != split:
                raise UserError(f"{address}: there is no split {split}; what is saved there is {loaded.split}")
        else:
            name, _, config = rest.partition(":")
            loaded = datasets.load_dataset(name, config or None, split=split)
    except UserError:
        raise
    except Exception as error:  # of the hub, the network, the builder: each has its own kinds
        raise UserError(f"{address}: {type(error).__name__}: {error}".splitlines()[0]) from error
    if not len(loaded):
        raise UserError(f"{address}: there is no row in this split")
    return HuggingFaceSource(address, loaded, split)


def is_saved(folder: Path) -> bool:
    return (folder / "dataset_dict.json").is_file() or (folder / "state.json").is_file()


def image_column(path: str, dataset: Any) -> str:
    from datasets import Image

    columns = [name for name, feature in dataset.features.items() if isinstance(feature, Image)]
    if len(columns) > 1 and "image" in columns:
        return "image"
    if len(columns) != 1:
        found = f"several columns of images: {', '.join(columns)}" if columns else "no column of images"
        raise UserError(f"{path}: {found}; one named image is used (columns: {', '.join(dataset.column_names)})")
    return columns[0]


def sizes_of(chunks: list[Any]) -> np.ndarray:
    """int64 (N,): bytes of each image, from the Arrow table's own lengths; of a file where only its path is kept."""
    return np.concatenate([sizes_of_chunk(chunk) for chunk in chunks])


def sizes_of_chunk(images: Any) -> np.ndarray:
    import pyarrow.compute as pc

    lengths = pc.binary_length(pc.struct_field(images, "bytes"))
    sizes: np.ndarray = pc.fill_null(lengths, -1).to_numpy(zero_copy_only=False).astype(np.int64)
    for row in np.flatnonzero(sizes < 0).tolist():
        image = images[row].as_py()
        path = image and image.get("path")
        sizes[row] = os.path.getsize(path) if path and os.path.isfile(path) else 0
    return sizes


def labels_of(path: str, dataset: Any) -> tuple[np.ndarray | None, list[str] | None]:
    """Of the column of classes, if there is one and every row has one."""
    from datasets import ClassLabel

    classed = [name for name, feature in dataset.features.items() if isinstance(feature, ClassLabel)]
    plain = [name for name in LABELS if str(getattr(dataset.features.get(name), "dtype", "")).startswith("int")]
    if not (classed or plain):
        return None, None
    name = next((label for label in LABELS if label in classed), (classed or plain)[0])
    labels = dataset.data.column(name).to_numpy()
    if labels.dtype.kind == "f" or labels.dtype == object or labels.min() < 0:  # None, or -1: not labelled
        return None, None
    names = [str(known) for known in dataset.features[name].names] if classed else None
    if names is not None and labels.max() >= len(names):
        raise UserError(f"{path}: {name} has {len(names)} classes, but there are rows of the label {labels.max()}")
    return labels.astype(np.int64), names
