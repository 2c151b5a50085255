"""A dataset of Hugging Face's is mapped, never copied."""

import os
import pickle
from pathlib import Path

import datasets
import pyarrow as pa
import pytest
from datasets.table import InMemoryTable

from ssl_global.data.huggingface import HuggingFaceSource, open_dataset
from ssl_global.errors import UserError

FEATURES = datasets.Features({"image": datasets.Image()})


def test_more_than_arrow_counts_in_one_chunk() -> None:
    """2.4 GB by its lengths: 40 times the same 60 MB."""
    images = pa.array([{"bytes": bytes(60_000_000), "path": None}], type=FEATURES.arrow_schema.field("image").type)
    batch = pa.record_batch([images], schema=FEATURES.arrow_schema)
    dataset = datasets.Dataset(InMemoryTable(pa.Table.from_batches([batch] * 40)), fingerprint="large")
    source = HuggingFaceSource("large", dataset, "train")
    assert source.sizes.tolist() == [60_000_000] * 40
    assert len(source.read(39)) == 60_000_000


def saved(folder: Path) -> str:
    rows = [{"bytes": os.urandom(100_000), "path": None} for _ in range(100)]
    datasets.Dataset.from_dict({"image": rows}, features=FEATURES, split="train").save_to_disk(folder)
    return f"datasets:{folder}"


def test_only_the_place_is_pickled(tmp_path: Path) -> None:
    source = open_dataset(saved(tmp_path))
    pickled = pickle.dumps(source)
    assert len(pickled) < 100_000
    assert pickle.loads(pickled).read(99) == source.read(99)


def test_a_split_that_is_not_the_saved_one(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no split test; what is saved there is train"):
        open_dataset(saved(tmp_path) + "@test")
