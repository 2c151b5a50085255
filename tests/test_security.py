"""A checkpoint, export, shard, dataset folder, index file or run folder of a stranger never executes code.

Each place that reads something is fed what an attacker would send: a pickle bomb, an object that makes a folder when it
is unpickled, in whatever dress that place might undress; and files that are merely odd. The bomb must not go off, and
what people see is one line that names the file, or nothing at all because the file is not looked at.

A recipe given as a .py path is a program, and `--help` says so. Among a run's own processes torch.distributed's object
collectives pickle what they send: that channel is trusted, as all that has joined the run's rendezvous is.
"""

import ast
import contextlib
import gc
import io
import json
import os
import pickle
import re
import resource
import shutil
import struct
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import fsspec
import numpy as np
import pytest
import torch
import webdataset
from accelerate.state import AcceleratorState, GradientState, PartialState
from loaders import recipe_of, serve
from PIL import EpsImagePlugin, Image, UnidentifiedImageError
from safetensors.torch import load_file, save_file
from tiny_runs import arguments

from benchmarks import data as benchmark
from ssl_global import cli, pretrain
from ssl_global.data import remote
from ssl_global.data.decode import BadImage, decode
from ssl_global.data.examine import examine
from ssl_global.data.files import read_json
from ssl_global.data.index import indexes
from ssl_global.data.loader import Loader
from ssl_global.data.order import Order
from ssl_global.data.source import open_source
from ssl_global.data.stream import Stream
from ssl_global.data.summary import read_summary
from ssl_global.errors import UserError
from ssl_global.training import checkpoint
from ssl_global.training.folder import refuse_other_data
from ssl_global.training.guard import BadSamples
from ssl_global.training.log import MetricsLog

ROOT = Path(__file__).parents[1]
SHARD = "shard-00001-model-00001-of-00001.safetensors"


def left_open(test: Callable[..., None]) -> Callable[..., None]:
    """A stream that is left in the middle leaves webdataset's file to the garbage collector."""
    ignored = ("ignore:unclosed file:ResourceWarning", "ignore::pytest.PytestUnraisableExceptionWarning")
    return pytest.mark.usefixtures("collected")(pytest.mark.filterwarnings(*ignored)(test))


@pytest.fixture(scope="module")
def few_objects() -> Iterator[None]:
    """All that was there before is left out when garbage is collected: it takes a fraction of the time."""
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture
def collected(few_objects: None) -> Iterator[None]:
    yield
    gc.collect()


# ----------------------------------------------------------------------------------------------------------- the bomb


class Bomb:
    """Whoever unpickles it makes a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., object], tuple[str]]:
        return os.mkdir, (str(self.marker),)

    def dressed(self, dress: str) -> bytes:
        file = io.BytesIO()
        if dress == "pickle":
            return pickle.dumps(self)
        if dress == "npz":
            np.savez(file, **{name: np.array([self], dtype=object) for name in ("version", "stamp", "keys")})
        elif dress == "npy":
            np.save(file, np.array([self], dtype=object))
        else:
            torch.save({"state_dict": self}, file, _use_new_zipfile_serialization=dress == "torch zip")
        return file.getvalue()


DRESSES = ("pickle", "torch zip", "torch legacy", "npz", "npy")


@pytest.fixture
def bomb(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Bomb]:
    """It must not have gone off when the test is over."""
    bomb = Bomb(tmp_path_factory.mktemp("bomb") / "went off")
    yield bomb
    assert not bomb.marker.exists(), "the bomb went off"


@pytest.fixture(autouse=True)
def alone(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Caches and current folder are the test's own; each run begins with a fresh Accelerate."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()


@pytest.mark.parametrize("dress", DRESSES)
def test_the_bomb_goes_off_where_pickles_are_loaded(tmp_path: Path, dress: str) -> None:
    """Else the tests below would prove nothing."""
    bomb = Bomb(tmp_path / "went off")
    file = io.BytesIO(bomb.dressed(dress))
    if dress == "pickle":
        pickle.load(file)
    elif dress in ("npz", "npy"):
        found = np.load(file, allow_pickle=True)
        assert (found if dress == "npy" else found["version"]).dtype == object
    else:
        torch.load(file, weights_only=False)
    assert bomb.marker.is_dir()


# ------------------------------------------------------------------------------------------------------ what is seen


def ssl_global(*words: object) -> None:
    cli.main([str(word) for word in words])


def refused(capsys: pytest.CaptureFixture[str], command: Callable[..., None], *words: object) -> str:
    """The one line on stderr of a command that ends with code 2."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        command(*words)
    error = capsys.readouterr().err
    assert end.value.code == 2, error
    assert error.startswith(("ssl-global: ", "error: ")), error
    assert error.count("\n") == 1, error
    return error


DEEP = b"[" * 100_000
ODD = {
    "nothing": b"",
    "no JSON": b"{",
    "no text": b"\xff\xfe\x00\x01",
    "null": b"null",
    "a list": b"[1, 2]",
    "a number": b"7",
    "a word": b'"word"',
    "other fields": b'{"x": 1}',
    "words for numbers": b'{"step": "1", "knn": "1", "sample": 5, "reason": 6, "mean": "m", "images": "i"}',
    "lists for all": b'{"step": [], "knn": [], "sample": [], "reason": [], "mean": [], "std": [], "images": []}',
    "beyond all numbers": b'{"step": 1e999, "knn": 1e999, "mean": [1e999], "std": [1e999], "images": 1e999}',
    "not in Unicode": b'{"knn": "\\ud800", "sample": "\\ud800", "reason": "\\ud800"}',
    "deep": DEEP,
    "many digits": b"9" * 5000,
    "a pickle": b"",  # the bomb's
}  # fmt: skip


@pytest.fixture(params=ODD)
def odd(request: pytest.FixtureRequest, bomb: Bomb) -> bytes:
    """The content of a file that should be JSON."""
    return ODD[request.param] if request.param != "a pickle" else bomb.dressed("pickle")


# ------------------------------------------------------------------------------------------------------- a run folder


@pytest.fixture(scope="module")
def pictures(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """24 of them, in two class folders."""
    folder, random = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for name in ("cat", "dog"):
        (folder / name).mkdir()
        for number in range(12):
            pixels = random.integers(0, 255, (30, 40, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(folder / name / f"{number:02d}.png")
    return folder


@pytest.fixture(scope="module")
def whole_run(pictures: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a run leaves: made once."""
    out = tmp_path_factory.mktemp("runs") / "run"
    threads = torch.get_num_threads()
    pretrain.main(command_of(pictures, out))
    torch.set_num_threads(threads)
    return out


def command_of(pictures: Path, out: Path) -> list[str]:
    return arguments("mae", pictures, out, "--train.steps=2", "--encoder.depth=1")


@pytest.fixture
def run(whole_run: Path, tmp_path: Path) -> Path:
    """A copy, still to be finished."""
    shutil.copytree(whole_run, tmp_path / "run")
    (tmp_path / "run" / "summary.json").unlink()
    return tmp_path / "run"


def newest(run: Path) -> Path:
    return max((run / "checkpoints").glob("step-*"))


def rewrite(run: Path, change: Callable[[dict], object]) -> None:
    """As somebody would who knows how the record is checked."""
    folder = newest(run)
    record = json.loads((folder / "checkpoint.json").read_text())
    del record["crc32"]
    record["files"] |= {file.name: checkpoint.describe(file) for file in folder.glob("*.safetensors")}
    change(record)
    (folder / "checkpoint.json").write_text(json.dumps(record | {"crc32": checkpoint.own_checksum(record)}))


def commands_on(run: Path, pictures: Path, tmp_path: Path) -> dict[str, Callable[[], None]]:
    """All that reads a checkpoint."""
    judge = ("evaluate", "knn", run, "--val", pictures, "--device", "cpu", "--workers", "0")
    return {
        "export": lambda: ssl_global("export", run, "--out", tmp_path / "exported"),
        "merge": lambda: ssl_global("merge", run, "--out", tmp_path / "merged.safetensors"),
        "evaluate": lambda: ssl_global(*judge),
        "resume": lambda: pretrain.main(command_of(pictures, run)),
    }


PLANTED = (
    ".metadata", "__0_0.distcp", "__1_0.distcp", "optimizer.pkl", "optimizer.bin", "random_states_0.pkl", "model.pt",
    "pytorch_model.bin", "scheduler.bin", "model.safetensors.index.json", "data.pickle", "method.py", "__init__.py",
)  # fmt: skip


def test_pickles_beside_a_checkpoint_are_not_looked_at(
    run: Path, pictures: Path, tmp_path: Path, bomb: Bomb, capsys: pytest.CaptureFixture[str]
) -> None:
    for folder in (run, run / "checkpoints", newest(run)):
        for number, name in enumerate(PLANTED):
            (folder / name).write_bytes(bomb.dressed(DRESSES[number % 3]))
    ssl_global("runs", tmp_path)
    assert capsys.readouterr().out.count("yes") == 1
    for command in commands_on(run, pictures, tmp_path).values():
        command()
    assert (run / "summary.json").is_file()


@pytest.mark.parametrize("what", ["export", "merge", "evaluate", "resume"])
@pytest.mark.parametrize("dress", ["pickle", "torch zip", "torch legacy"])
@pytest.mark.parametrize("name", [SHARD, "shard-00002-model-00001-of-00001.safetensors"])
def test_a_shard_that_is_a_pickle_is_named(
    run: Path, pictures: Path, tmp_path: Path, bomb: Bomb, what: str, dress: str, name: str,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    (newest(run) / name).write_bytes(bomb.dressed(dress))
    rewrite(run, lambda record: None)
    assert str(newest(run)) in refused(capsys, commands_on(run, pictures, tmp_path)[what])


def test_a_shard_that_the_record_does_not_name_is_refused(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """It would take the place of the run's own tensors, whose checksums are right."""
    rewrite(run, lambda record: None)
    shutil.copy(newest(run) / SHARD, newest(run) / "zzz.safetensors")
    for command in commands_on(run, pictures, tmp_path).values():
        assert "zzz.safetensors is none of its files" in refused(capsys, command)


def put(part: str, **values: object) -> Callable[[dict], object]:
    return lambda record: record[part].update({name.replace("__", "."): value for name, value in values.items()})


KINDS = ["os", "evil", "__init__", "__main__", "__pycache__", "method", "masking", "../evil", "os.system", "evil:run",
         "", 5, None, ["mae"], {"a": 1}, "a" * 5000]  # fmt: skip
RECIPES = {
    **{f"method.kind {kind!r:.20}": put("recipe", method__kind=kind) for kind in KINDS},
    **{f"encoder.kind {kind!r:.20}": put("recipe", encoder__kind=kind) for kind in KINDS[:4]},
    **{
        f"encoder.name {name!r:.20}": put("recipe", encoder__name=name)
        for name in ("hf-hub:evil/model", "local-dir:evil", "vit_../evil", "resnet50", "", 5, None, ["a"])
    },
    "a wide encoder": put("recipe", encoder__width=10**12),
    "a wordy width": put("recipe", encoder__width="wide"),
    "a negative depth": put("recipe", encoder__depth=-1),
    "heads of nothing": put("recipe", encoder__heads=0),
    "an endless picture": put("recipe", views__globals__pixels=10**30),
    "channels by the billion": put("recipe", data__channels=2**40),
    "a mean of words": put("recipe", data__mean=["a", "b", "c"]),
    "a field that is not there": lambda record: record["recipe"].pop("optim.lr_per_256_images"),
    "a recipe in depth": lambda record: record.update(recipe={"a": {"b": {}}}),
}
RECORDS = {
    "another recipe": put("recipe", method__kind="dino"),
    "no recipe": lambda record: record.pop("recipe"),
    "a recipe that is a list": lambda record: record.update(recipe=[1]),
    "state of words": put("state", step="2"),
    "an unknown state": put("state", __class__="os.system"),
    "a negative place": put("state", moved_past=-5),
    "a place beyond all data": put("state", moved_past=10**30),
    "another step": put("state", step=7),
    "baselines of words": put("state", baselines={"knn_untrained": "much"}),
    "a layout of words": put("layout", processes="many"),
    "tensors in a list": lambda record: record.update(tensors=[1]),
    "tensors of numbers": lambda record: record.update(tensors={"method/x": 5}),
    "tensors without end": put("tensors", **{"method/x": ["float32", 10**30]}),
    "a file elsewhere": put("files", **{"../../../secret": {"bytes": 5, "crc32": 0}}),
    "a file at the root": put("files", **{"/etc/passwd": {"bytes": 5, "crc32": 0}}),
    "a file without a name": put("files", **{"": {"bytes": 5, "crc32": 0}}),
    "files of numbers": put("files", **{"x": 5}),
    "files in a list": lambda record: record.update(files=[1]),
    "another format": lambda record: record.update(format="os.system"),
}


@pytest.mark.parametrize("change", RECIPES.values(), ids=RECIPES)
def test_a_recipe_in_a_checkpoint_that_is_none_of_ours_is_one_line(
    run: Path, tmp_path: Path, change: Callable[[dict], object], bomb: Bomb, capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """What it names is not imported, wherever a module of that name lies."""
    for folder in (tmp_path / "here", newest(run), tmp_path / "path"):
        for name in ("evil.py", "evil/__init__.py", "methods/evil.py"):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_text(f"import os\nos.mkdir({str(bomb.marker)!r})\n")
    monkeypatch.syspath_prepend(tmp_path / "path")
    rewrite(run, change)
    error = refused(capsys, ssl_global, "export", run, "--out", tmp_path / "exported")
    assert f"{newest(run)}: its recipe cannot be built" in error


@pytest.mark.parametrize("change", RECORDS.values(), ids=RECORDS)
def test_a_forged_record_is_one_line(
    run: Path, pictures: Path, tmp_path: Path, change: Callable[[dict], object], capsys: pytest.CaptureFixture[str]
) -> None:
    """Its checksum is right."""
    rewrite(run, change)
    ssl_global("runs", tmp_path)
    assert str(run) in refused(capsys, pretrain.main, command_of(pictures, run))
    with contextlib.suppress(UserError):
        checkpoint.load_encoder(run, None)


CALLED = ("step-evil", "step-", "step-²", "step--5", "step-00000009", "step-1e9", ".old-step-00000007")


@pytest.mark.parametrize("name", CALLED)
@pytest.mark.parametrize("kind", ["folder", "file", "link", "bomb inside"])
def test_what_is_only_called_a_checkpoint_is_passed_over(
    run: Path, tmp_path: Path, name: str, kind: str, bomb: Bomb, capsys: pytest.CaptureFixture[str]
) -> None:
    place = run / "checkpoints" / name
    if kind == "file":
        place.write_bytes(bomb.dressed("pickle"))
    elif kind == "link":
        (tmp_path / "elsewhere").mkdir()
        place.symlink_to(tmp_path / "elsewhere")
    else:
        place.mkdir()
    if kind == "bomb inside":
        (place / "checkpoint.json").write_bytes(bomb.dressed("torch zip"))
    ssl_global("runs", tmp_path)
    folder, _ = checkpoint.newest_of(run)
    assert folder.name == "step-00000002"
    assert capsys.readouterr().err == ""


PLACES = {
    "no JSON": "{",
    "a list": "[1]",
    "lists": '{"T": []}',
    "words": '{"T": {"saved_offsets": "ab"}}',
    "negative": '{"T": {"saved_offsets": [-1, -1]}}',
    "too few": '{"T": {"saved_offsets": [0]}}',
    "terabytes": '{"T": {"saved_offsets": [1000000000, 1000000000]}}',
    "not a number": '{"T": {"saved_offsets": [NaN, 0]}}',
    "deep": "[" * 100_000,
}


@pytest.mark.parametrize("places", PLACES.values(), ids=PLACES)
def test_a_shard_that_claims_a_place_of_its_own_is_named(
    run: Path, pictures: Path, tmp_path: Path, places: str, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where a part of a tensor belongs is said in its file's header."""
    tensors = load_file(newest(run) / SHARD)
    name = next(name for name, tensor in tensors.items() if name.startswith("method/encoder") and tensor.ndim == 2)
    save_file(tensors, newest(run) / SHARD, metadata={"DCP_SHARDING_INFO": places.replace("T", name)})
    rewrite(run, lambda record: None)
    commands = commands_on(run, pictures, tmp_path)
    for what in ("merge", "resume"):
        assert str(newest(run)) in refused(capsys, commands[what])


def test_tensors_of_other_shapes_are_named(
    run: Path, pictures: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """One number would else be spread over all weights; the record says what it said before."""
    tensors = load_file(newest(run) / SHARD)
    name = next(name for name, tensor in tensors.items() if name.startswith("method/encoder") and tensor.ndim == 2)
    save_file(tensors | {name: torch.ones(1)}, newest(run) / SHARD)
    rewrite(run, lambda record: None)
    commands = commands_on(run, pictures, tmp_path)
    for what in ("export", "resume"):
        assert f"{name} is ['float32', 1]" in refused(capsys, commands[what])


def test_odd_content_in_a_run_folder_is_left_out(
    run: Path, pictures: Path, tmp_path: Path, odd: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """A last line that was cut off by a power cut is as odd."""
    whole = (run / "metrics.jsonl").read_bytes()
    for name in ("summary.json", "data.json", "run.json", "bad_samples.jsonl"):
        (run / name).write_bytes(odd)
    (run / "metrics.jsonl").write_bytes(whole + odd)
    ssl_global("runs", tmp_path)
    if b"ud800" in odd or odd == b"null":
        ssl_global("export", run)
    with pytest.raises(UserError, match="not the samples that the run in"):
        refuse_other_data("others", open_source(str(pictures)), None, run)
    assert all(
        isinstance(word, str) for pair in BadSamples(run / "bad_samples.jsonl", 9, 1).known.items() for word in pair
    )
    log = MetricsLog(SimpleNamespace(is_main_process=True, log_with=[]), run, start_step=2, settings={})  # type: ignore[arg-type]
    assert log.file.read_bytes() == whole
    if odd == b"{":  # the run itself, once: it takes half a second
        (run / "summary.json").unlink()
        pretrain.main(command_of(pictures, run))
        assert json.loads((run / "summary.json").read_text())["steps"] == 2


@pytest.mark.parametrize("name", [".lock", "metrics.jsonl", "bad_samples.jsonl", ".summary.json.tmp"])
@pytest.mark.parametrize("there", [True, False])
def test_a_run_writes_through_no_link_to_files_of_the_user(
    run: Path, pictures: Path, tmp_path: Path, name: str, there: bool, capsys: pytest.CaptureFixture[str]
) -> None:
    """The shell's profile, say: a line of metrics.jsonl has the names of samples, which a shell would expand."""
    profile = tmp_path / "profile"
    if there:
        profile.write_text("alias ls=ls")
    (run / name).unlink(missing_ok=True)
    (run / name).symlink_to(profile)
    assert f"{name} is a link to {profile}" in refused(capsys, pretrain.main, command_of(pictures, run))
    assert profile.exists() == there
    assert not there or profile.read_text() == "alias ls=ls"


# ----------------------------------------------------------------------------------------------------- an export folder


@pytest.fixture
def export(whole_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(whole_run / "export", tmp_path / "export"))


def judge(backbone: object, pictures: object) -> None:
    ssl_global("evaluate", "knn", backbone, "--val", pictures, "--device", "cpu", "--workers", "0")


WEIGHTS = (
    "pytorch_model.bin",
    "pytorch_model.pth",
    "model.pth",
    "open_clip_pytorch_model.bin",
    "a.pth",
    "a.bin",
    "a.pth.tar",
)


def test_pickles_beside_an_exports_weights_are_not_looked_at(
    export: Path, pictures: Path, bomb: Bomb, capsys: pytest.CaptureFixture[str]
) -> None:
    for name in WEIGHTS:
        (export / name).write_bytes(bomb.dressed("torch zip"))
    judge(export, pictures)
    assert "knn" in capsys.readouterr().out


@pytest.mark.parametrize("name", WEIGHTS)
def test_pickles_instead_of_an_exports_weights_are_refused(
    export: Path, pictures: Path, bomb: Bomb, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (export / "model.safetensors").unlink()
    (export / name).write_bytes(bomb.dressed("torch legacy"))
    assert f"{export}: no model.safetensors there" in refused(capsys, judge, export, pictures)


@pytest.mark.parametrize("dress", DRESSES)
def test_an_exports_weights_that_are_a_pickle_are_named(
    export: Path, pictures: Path, bomb: Bomb, dress: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (export / "model.safetensors").write_bytes(bomb.dressed(dress))
    assert str(export) in refused(capsys, judge, export, pictures)


CONFIGS = {
    "an unknown model": {"architecture": "evil"},
    "the hub's model": {"architecture": "hf-hub:evil/model"},
    "a module": {"architecture": "os.system"},
    "another folder's": {"architecture": "local-dir:../evil"},
    "no name": {"architecture": None},
    "a list": {"architecture": ["vit_tiny_patch16_224"]},
    "a convolution": {"architecture": "resnet18"},
    "arguments of create_model": {"model_args": {"checkpoint_path": "pytorch_model.bin"}},
    "arguments of its builder": {"model_args": {"pretrained_cfg_overlay": {"file": "pytorch_model.bin"}}},
    "a filter": {"model_args": {"pretrained_filter_fn": "os.system"}},
    "a layer by name": {"model_args": {"norm_layer": "os.system"}},
    "a block by name": {"model_args": {"block_fn": "builtins.eval"}},
    "a wide one": {"model_args": {"embed_dim": 10**12}},
    "no arguments": {"model_args": [1]},
    "no description": {"pretrained_cfg": 5},
    "a picture without end": {"pretrained_cfg": {"input_size": [3, 10**9, 10**9]}},
    "a picture in words": {"pretrained_cfg": {"input_size": "large"}},
    "a mean of words": {"pretrained_cfg": {"mean": ["a", "b", "c"]}},
    "a mean of two": {"pretrained_cfg": {"mean": [0.5, 0.5]}},
    "no deviation": {"pretrained_cfg": {"std": [0, 0, 0]}},
}


@pytest.mark.parametrize("change", CONFIGS.values(), ids=CONFIGS)
def test_a_config_that_asks_for_what_cannot_be_is_one_line(
    export: Path, pictures: Path, bomb: Bomb, change: dict[str, object], capsys: pytest.CaptureFixture[str]
) -> None:
    config = json.loads((export / "config.json").read_text())
    for name, value in change.items():
        config[name] = config[name] | value if isinstance(value, dict) else value
    (export / "config.json").write_text(json.dumps(config))
    (export / "pytorch_model.bin").write_bytes(bomb.dressed("torch zip"))
    assert str(export) in refused(capsys, judge, export, pictures)


@pytest.mark.parametrize("source", ["url", "file", "hf_hub_id", "custom_load", "state_dict"])
def test_a_config_cannot_have_the_weights_taken_from_elsewhere(
    export: Path, pictures: Path, bomb: Bomb, source: str, capsys: pytest.CaptureFixture[str]
) -> None:
    elsewhere = export.parent / "elsewhere.pth"
    elsewhere.write_bytes(bomb.dressed("torch zip"))
    config = json.loads((export / "config.json").read_text())
    values = {"url": elsewhere.as_uri(), "hf_hub_id": "evil/model", "custom_load": True, "state_dict": {"a": 1}}
    config["pretrained_cfg"] |= {source: values.get(source, str(elsewhere)), "source": "", "hf_hub_filename": "a.bin"}
    (export / "config.json").write_text(json.dumps(config))
    judge(export, pictures)
    assert "knn" in capsys.readouterr().out


def test_a_config_that_is_no_json_is_one_line(
    export: Path, pictures: Path, odd: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    (export / "config.json").write_bytes(odd)
    assert str(export) in refused(capsys, judge, export, pictures)


# ------------------------------------------------------------------------------------------------------------- shards


def picture(colour: int = 0) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (40, 30), (colour, 9, 9)).save(file, "PNG")
    return file.getvalue()


def tar(path: Path, *members: tuple[str, bytes], special: bool = False) -> Path:
    """A .tar, if so wished with links and devices of every kind."""
    with tarfile.open(path, "w") as file:
        for name, data in members:
            member = tarfile.TarInfo(name)
            member.size = len(data)
            file.addfile(member, io.BytesIO(data))
        for number, kind in enumerate(b"123456" if special else b""):
            for name in (f"special-{number}.png", f"../special-{number}.png", f"/tmp/special-{number}.png"):
                member = tarfile.TarInfo(name)
                member.type, member.linkname = bytes([kind]), "/etc/passwd"
                file.addfile(member)
    return path


def streamed(path: object, count: int = 30) -> list[tuple[str, int]]:
    """(key, label) of what webdataset's reader gives."""
    samples = Stream(str(path), epoch_images=4, seed=0).begin(process=0, step=0)
    found = [next(iter(samples.candidates(0))) for _ in range(count)]
    return [(candidate.key, candidate.label) for candidate in found]


def names_below(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


PICKLED = ("pyd", "pkl", "pickle", "pth", "pt", "npy", "npz", "ten", "cbor", "mp", "py", "cls.pyd", "json.pickle")


@left_open
def test_members_that_are_pickles_are_not_looked_at(tmp_path: Path, bomb: Bomb) -> None:
    """By neither reader; webdataset's own decoder would unpickle them."""
    dresses = [bomb.dressed("pickle"), bomb.dressed("torch zip"), bomb.dressed("npz")]
    extra = [(f"a/{key}.{end}", dresses[n % 3]) for key in "01" for n, end in enumerate(PICKLED)]
    members = [("a/0.png", picture()), ("a/1.png", picture(50)), ("a/0.cls", b"3"), ("a/1.cls", b"4")]
    shard = tar(tmp_path / "s.tar", *sorted(members + extra))
    source = open_source(str(shard))
    assert [source.key(i) for i in range(len(source))] == ["s.tar/a/0", "s.tar/a/1"]
    assert source.labels is not None
    assert source.labels.tolist() == [3, 4]
    (batch,) = serve(source, recipe_of(4), stop=1)
    assert not batch["lost"]
    assert {(key.removeprefix(f"{tmp_path}/"), label) for key, label in streamed(shard)} == {
        ("s.tar/a/0", 3), ("s.tar/a/1", 4),
    }  # fmt: skip
    recipe = recipe_of(4, reader="stream", epoch_images=4)
    samples = Stream(str(shard), epoch_images=4, seed=0).begin(process=0, step=0)
    with Loader(samples, Order.of(np.array([0, 4]), recipe), recipe, [range(4)], micro_batch=4).serving() as served:
        (batch,) = served
    assert not batch["lost"]


@left_open
def test_webdatasets_decoder_would_unpickle_them(tmp_path: Path) -> None:
    """So `.decode()` must not be called on it: see the last test of this file."""
    bomb = Bomb(tmp_path / "went off")
    shard = tar(tmp_path / "s.tar", ("0.pyd", bomb.dressed("pickle")))
    list(webdataset.WebDataset(str(shard), shardshuffle=False).decode())
    assert bomb.marker.is_dir()


@left_open
@pytest.mark.parametrize("dress", DRESSES)
def test_a_shard_that_is_a_pickle_is_no_shard(
    tmp_path: Path, bomb: Bomb, dress: str, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = tmp_path / "s.tar"
    shard.write_bytes(bomb.dressed(dress))
    error = refused(capsys, ssl_global, "pack", shard, tmp_path / "packed")
    assert f"{shard}: damaged header at byte 0" in error or f"{shard}: cut short at byte" in error
    with pytest.raises(UserError, match=r"9 shards in a row cannot be read, the last: .*"):
        streamed(shard)


@left_open
def test_what_a_shard_calls_its_members_is_no_path(tmp_path: Path) -> None:
    """Nothing is extracted; what is no regular file, or has a name that leads elsewhere, is passed over."""
    names = ("/tmp/evil", "../../evil", "a/../../evil", "a/b", "~/evil", "pipe:touch evil", "a\\..\\evil", "a\nb")
    shard = tar(tmp_path / "s.tar", *((f"{name}.png", picture()) for name in names), special=True)
    before = names_below(tmp_path)
    source = open_source(str(shard))
    assert [source.key(i) for i in range(len(source))] == [
        f"s.tar/{name}" for name in names if ".." not in name and not name.startswith("/")
    ]
    serve(source, recipe_of(4), stop=2)
    assert not any("special" in key for key, _ in streamed(shard))
    (tmp_path / "s.tar.index.npz").unlink()
    assert names_below(tmp_path) == before
    ssl_global("pack", shard, tmp_path / "packed")
    (packed,) = (tmp_path / "packed").glob("*.tar")
    with tarfile.open(packed) as file:
        assert file.getnames() == [f"{number:09d}.png" for number in range(4)]


@left_open
def test_labels_that_no_array_holds_are_none_of_a_stream(tmp_path: Path) -> None:
    members = (("a.png", picture()), ("a.cls", b"9" * 30), ("b.png", picture()), ("b.cls", b"-" + b"9" * 30))
    assert {label for _, label in streamed(tar(tmp_path / "s.tar", *members))} == {-1}


def test_a_label_beyond_all_classes_is_one_line(
    export: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = tar(
        tmp_path / "s.tar", ("a.png", picture()), ("a.cls", b"2147483647"), ("b.png", picture()), ("b.cls", b"0")
    )
    assert f"{shard}: holds the label 2147483647" in refused(capsys, judge, export, shard)


# ------------------------------------------------------------------------------------------- what lies beside shards


def good_index(shard: Path) -> dict[str, np.ndarray]:
    """As it is kept, after it was made."""
    shard.with_name(f"{shard.name}.index.npz").unlink(missing_ok=True)
    indexes([str(shard)])
    with np.load(f"{shard}.index.npz", allow_pickle=False) as kept:
        return dict(kept)


def zipped(name: str, method: int) -> bytes:
    """A zip whose one member is packed by a method that nobody knows, or locked."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr(name, b"x" * 100)
    raw = bytearray(file.getvalue())
    place = raw.find(b"PK\x01\x02")
    raw[place + 8] |= method & 1
    raw[place + 10] = method
    return bytes(raw)


HEADER = b"\x93NUMPY\x01\x00" + struct.pack("<H", 118)
INDEX_FILES = {
    "locked": zipped("version.npy", 1),
    "packed in an unknown way": zipped("version.npy", 98),
    "an array, not a zip": None,
    "a header that is Python": HEADER + b"{'descr': __import__('os').mkdir('evil'), 'shape': ()}".ljust(117) + b"\n",
    "a header without end": HEADER + b"(" * 117 + b"\n",
    "terabytes": HEADER + b"{'descr': '<i8', 'fortran_order': False, 'shape': (1000000000000,), }".ljust(117) + b"\n",
}  # fmt: skip
INDEX_FIELDS = {
    "keys of numbers": {"keys": np.zeros(6)},
    "keys of no text": {"keys": np.full(6, 255, np.uint8)},
    "keys cut within a letter": {"keys": np.frombuffer("aéébb".encode()[:6], np.uint8), "key_ends": np.array([2, 6])},
    "keys in a square": {"keys": np.zeros((2, 3), np.uint8)},
    "ends behind the end": {"key_ends": np.array([3, 10**12])},
    "ends that fall": {"key_ends": np.array([9, 6])},
    "ends of less than nothing": {"key_ends": np.array([-3, 6])},
    "ends of halves": {"key_ends": np.array([3.0, 6.0])},
    "more places than keys": {"offsets": np.zeros(5, np.int64)},
    "places in a square": {"offsets": np.zeros((2, 1), np.int64)},
    "places before the file": {"offsets": np.array([-512, 0])},
    "places behind the file": {"offsets": np.array([512, 2**62])},
    "bytes without end": {"sizes": np.array([100, 2**62])},
    "bytes below none": {"sizes": np.array([100, -1])},
    "labels of words": {"labels": np.array(["a", "b"])},
    "labels beyond all": {"labels": np.array([0, 2**40])},
    "labels below none": {"labels": np.array([0, -7])},
    "nothing at all": {
        "keys": np.zeros(0, np.uint8), **{n: np.zeros(0, np.int64) for n in ("key_ends", "offsets", "sizes", "labels")},
    },
    "a version of many": {"version": np.array([1, 1])},
    "a stamp of words": {"stamp": np.array(["a", "b"])},
}  # fmt: skip


@pytest.fixture
def shard(tmp_path: Path) -> Path:
    return tar(tmp_path / "s.tar", ("abc.png", picture()), ("abc.cls", b"0"), ("def.png", picture()), ("def.cls", b"1"))


def assert_made_anew(shard: Path, index: bytes) -> None:
    """What is read is what the shard's own headers say, and the odd file is replaced."""
    Path(f"{shard}.index.npz").write_bytes(index)
    source = open_source(str(shard))
    assert [source.key(i) for i in range(len(source))] == ["s.tar/abc", "s.tar/def"]
    assert [source.read(i) for i in range(len(source))] == [picture(), picture()]
    assert source.labels is not None
    assert source.labels.tolist() == [0, 1]
    assert Path(f"{shard}.index.npz").read_bytes() != index


@pytest.mark.parametrize("dress", DRESSES)
def test_an_index_that_is_a_pickle_is_made_anew(shard: Path, bomb: Bomb, dress: str) -> None:
    assert_made_anew(shard, bomb.dressed(dress))


@pytest.mark.parametrize("kind", INDEX_FILES)
def test_an_index_that_is_no_npz_is_made_anew(shard: Path, kind: str) -> None:
    file = io.BytesIO()
    np.save(file, np.arange(5))
    content = INDEX_FILES[kind] or file.getvalue()
    assert_made_anew(shard, content)
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as archive:
        archive.writestr("version.npy", content)
    assert_made_anew(shard, file.getvalue())
    assert not Path("evil").exists()


@pytest.mark.parametrize("bombed", ["version", "stamp", "keys", "key_ends", "offsets", "sizes", "labels"])
def test_an_index_with_a_pickle_in_one_field_is_made_anew(shard: Path, bomb: Bomb, bombed: str) -> None:
    file = io.BytesIO()
    np.savez(file, **good_index(shard) | {bombed: np.array([bomb, bomb], dtype=object)})
    assert_made_anew(shard, file.getvalue())


@pytest.mark.parametrize("change", INDEX_FIELDS.values(), ids=INDEX_FIELDS)
def test_an_index_of_other_numbers_is_made_anew(shard: Path, change: dict[str, np.ndarray]) -> None:
    """Its stamp is the shard's: whoever sends both can see to that."""
    file = io.BytesIO()
    np.savez(file, **good_index(shard) | change)
    assert_made_anew(shard, file.getvalue())


def test_an_index_is_written_through_no_link_to_a_file_of_the_user(shard: Path, tmp_path: Path) -> None:
    """A folder may hold links under all names that its index will have while it is written."""
    profile = tmp_path / "profile"
    profile.write_text("alias ls=ls")
    (tmp_path / f".s.tar.index.npz.{os.getpid()}").symlink_to(profile)
    (tmp_path / "s.tar.index.npz").symlink_to(profile)
    assert len(open_source(str(shard))) == 2
    assert profile.read_text() == "alias ls=ls"


def test_odd_classes_beside_shards_are_none(shard: Path, odd: bytes) -> None:
    (shard.parent / "classes.json").write_bytes(odd)
    assert open_source(str(shard)).classes is None


@pytest.mark.parametrize("names", [["[/red]", "[bold"], ["\ud800", "\x1b[2J"], ["", "a\nb"]])
def test_classes_of_any_name_are_shown_as_they_are(
    export: Path, shard: Path, names: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    (shard.parent / "classes.json").write_text(json.dumps(names))
    words = ("--val", shard, "--device", "cpu", "--workers", "0", "--confusion")
    ssl_global("evaluate", "knn", export, *words)
    assert "most often taken for" in capsys.readouterr().out


SUMMARIES = {
    "words": {"images": "many", "mean": "a", "std": "b"},
    "lists": {"images": [2], "mean": [[0.1] * 3], "std": [0.1] * 3},
    "a short mean": {"images": 2, "mean": [0.1, 0.1], "std": [0.1, 0.1, 0.1]},
    "a mean beyond white": {"images": 2, "mean": [1e300] * 3, "std": [0.1] * 3},
    "no number": {"images": 2, "mean": [float("nan")] * 3, "std": [0.1] * 3},
    "no images": {"images": 0, "mean": [0.1] * 3, "std": [0.1] * 3},
    "images without end": {"images": 10**400, "mean": [0.1] * 3, "std": [0.1] * 3},
    "tables": {"images": {}, "mean": {}, "std": {}},
}


@pytest.mark.parametrize("change", SUMMARIES.values(), ids=SUMMARIES)
def test_a_summary_of_odd_figures_beside_shards_is_left_out(tmp_path: Path, change: dict[str, object]) -> None:
    shard = tar(tmp_path / "s-000000.tar", ("a.png", picture()))
    summary = {"shards": 1, "bytes": shard.stat().st_size, **change}
    (tmp_path / "s-summary.json").write_text(json.dumps(summary))
    assert read_summary([str(shard)]) is None


def test_odd_files_beside_shards_are_left_out_or_named(
    tmp_path: Path, odd: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    shard = tar(tmp_path / "s-000000.tar", ("a.png", picture()))
    (tmp_path / "s-summary.json").write_bytes(odd)
    assert read_summary([str(shard)]) is None
    out = tmp_path / "packed"
    out.mkdir()
    (out / "s-000000-pack.json").write_bytes(odd)
    if isinstance(read_json(out / "s-000000-pack.json"), type(None)):  # it is taken for one that was cut off
        ssl_global("pack", shard, out)
        assert "1 image in 1 shard" in capsys.readouterr().out
    else:
        assert "s-000000-pack.json" in refused(capsys, ssl_global, "pack", shard, out)


@left_open
def test_a_shard_that_holds_no_image_is_no_endless_wait(tmp_path: Path) -> None:
    shard = tar(tmp_path / "s.tar", ("a.txt", b"no image"))
    with pytest.raises(UserError, match=r"s\.tar: 9 shards in a row hold no image"):
        streamed(shard)


# ---------------------------------------------------------------------------------------------- commands in addresses


@left_open
@pytest.mark.parametrize("pattern", ["*.tar", "*.t?r", "*/*.tar", "p*/p*.tar", "[p]*.tar"])
def test_a_file_whose_name_is_a_command_is_only_a_file(tmp_path: Path, pattern: str) -> None:
    """webdataset runs what follows "pipe:", and a stranger's folder may hold a file of that name."""
    Path("pipe:mkdir evil;").mkdir()
    for name in ("pipe:mkdir evil; #.tar", "pipe:mkdir evil;/pipe: #.tar", "http:evil.tar", "-.tar", "ok.tar"):
        tar(Path(name), ("a.png", picture()))
    before = names_below(Path())
    assert all(label == -1 for _, label in streamed(pattern))
    assert names_below(Path()) == before
    open_source(pattern)
    assert "evil" not in names_below(Path())


@left_open
def test_a_file_that_is_named_itself_is_only_a_file() -> None:
    name = "pipe:mkdir evil; #.tar"
    tar(Path(name), ("a.png", picture()))
    assert streamed(name, 5) == [(f"./{name}/a", -1)] * 5
    assert not Path("evil").exists()


@pytest.mark.parametrize(
    "address", ["pipe:mkdir evil", "{pipe:mkdir evil,b}", "PIPE:mkdir evil", "simplecache::pipe:mkdir evil"]
)
def test_a_pipe_is_run_by_no_reader_but_the_streaming_one(
    export: Path, tmp_path: Path, address: str, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ("--recipe=mae:demo", f"--data={address}", f"--out={tmp_path / 'out'}", "--device=cpu")
    for words in (
        ("pack", address, tmp_path / "packed"),
        ("doctor", address),
        ("evaluate", "knn", export, "--val", address, "--device", "cpu"),
    ):
        refused(capsys, ssl_global, *words)
    refused(capsys, pretrain.main, run)
    refused(capsys, pretrain.main, (*run, f"--val={address}", "--data.reader=stream", "--data.epoch-images=9"))
    assert not Path("evil").exists()
    assert not (tmp_path / "out").exists()


# ------------------------------------------------------------------------------------------------- recipes, and --help


def shown_help(capsys: pytest.CaptureFixture[str], command: Callable[..., None], *words: object) -> str:
    """Its words, without the frames around them."""
    with pytest.raises(SystemExit) as end:
        command(*words)
    assert end.value.code == 0
    return " ".join(re.sub(r"[│╭╮╰╯─]", " ", capsys.readouterr().out).split())


def test_help_says_what_is_run(capsys: pytest.CaptureFixture[str]) -> None:
    said = shown_help(capsys, pretrain.main, ["--recipe", "dino", "--help"])
    assert "A recipe given as a .py file is a program: it is run." in said
    assert "stream: webdataset's own; pipe:COMMAND is run by the shell" in said
    assert "a .py file is a program: it is run" in shown_help(capsys, ssl_global, "doctor", "--help")


NAMES = (
    "../../evil", "../evil", "./evil", "evil", "os", "os.path", "os:system", "evil.py/..", "evil.pyc", "evil.PY",
    "dino.", "recipes.dino", "dino:__class__", "dino:os", "dino:__builtins__", "", ":", "evil/__init__",
)  # fmt: skip


@pytest.mark.parametrize("name", NAMES)
def test_only_a_path_that_ends_in_py_is_a_program(
    tmp_path: Path, name: str, bomb: Bomb, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    program = f"import os\nos.mkdir({str(bomb.marker)!r})\n"
    for place in ("evil.py", "evil.pyc", "evil.PY", "evil", "recipes/dino.py", "recipes/__init__.py"):
        for folder in (tmp_path, tmp_path / "here"):
            (folder / place).parent.mkdir(exist_ok=True)
            (folder / place).write_text(program)
    monkeypatch.syspath_prepend(tmp_path)
    refused(capsys, pretrain.main, [f"--recipe={name}", "--print"])
    refused(capsys, ssl_global, "doctor", tmp_path, f"--recipe={name}")


def test_and_such_a_path_is_one(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The one exception of the promise."""
    recipe = tmp_path / "mine.py"
    recipe.write_text("import os\nos.mkdir('ran')\ndef recipe():\n    raise TypeError('enough')\n")
    assert refused(capsys, pretrain.main, [f"--recipe={recipe}:recipe"]) == f"error: {recipe}: enough\n"
    assert Path("ran").is_dir()


# ------------------------------------------------------------------------------------------------------------- images


POSTSCRIPT = b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 20 20\n%%EndComments\n(evil) run\nshowpage\n%%EOF\n"


@pytest.fixture
def ghostscript(tmp_path: Path, bomb: Bomb, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A program of that name, which does what the bomb does."""
    (tmp_path / "bin").mkdir()
    (tmp_path / "bin" / "gs").write_text(f"#!/bin/sh\nmkdir -p '{bomb.marker}'\n")
    (tmp_path / "bin" / "gs").chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")
    monkeypatch.setattr(EpsImagePlugin, "gs_binary", None)
    return bomb.marker


def test_pillow_would_run_ghostscript(ghostscript: Path) -> None:
    """Else the next test would prove nothing."""
    with contextlib.suppress(OSError), Image.open(io.BytesIO(POSTSCRIPT)) as image:
        image.load()  # the program that is called so here writes no picture
    ghostscript.rmdir()


@pytest.mark.parametrize("name", ["a.jpg", "a.png", "a.tiff"])
def test_postscript_is_no_image(
    ghostscript: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "folder" / name).write_bytes(POSTSCRIPT)
    shard = tar(tmp_path / "s.tar", (name, POSTSCRIPT))
    for channels in (1, 3, 4, 13):
        with pytest.raises(BadImage):
            decode(POSTSCRIPT, channels)
    with pytest.raises(BadImage):
        examine(POSTSCRIPT, 16, 90)
    for source in (tmp_path / "folder", shard):
        assert "none of its 1 image can be read" in refused(capsys, ssl_global, "pack", source, tmp_path / "packed")
        with pytest.raises(SystemExit) as end:
            ssl_global("doctor", source)
        assert end.value.code == 1
        assert "1 of them bad" in capsys.readouterr().out
    with pytest.raises(UnidentifiedImageError):
        benchmark.opened(POSTSCRIPT)
    with pytest.raises(UnidentifiedImageError):
        benchmark.Files(open_source(str(tmp_path / "folder")))[0]


def test_a_file_whose_name_is_no_text_is_named_all_the_same(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Such a name cannot be printed as it is."""
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / os.fsdecode(b"\xff[bold].png")).write_bytes(b"no image")
    with pytest.raises(SystemExit) as end:
        ssl_global("doctor", folder)
    assert end.value.code == 1
    assert "\\udcff[bold].png: 8 bytes that are no" in capsys.readouterr().out


def png(width: int, height: int, *chunks: tuple[bytes, bytes]) -> bytes:
    """Of a few bytes, whatever it says of itself."""
    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    parts = [(b"IHDR", header), *chunks, (b"IDAT", zlib.compress(bytes(100))), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data)) for kind, data in parts
    )


def tiff(*tags: tuple[int, int, int, int], after: int = 0, big: bool = False) -> bytes:
    """A directory of (tag, type, count, value), and where the next one is."""
    directory = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags)
    return b"II*\0" + struct.pack("<I", 8) + directory + struct.pack("<I", after) + bytes(20)


def tiff_of(width: int, height: int, bands: int) -> bytes:
    return tiff(
        (256, 4, 1, width), (257, 4, 1, height), (258, 3, 1, 16), (259, 3, 1, 1), (262, 3, 1, 1), (273, 4, 1, 8),
        (277, 3, 1, bands), (278, 4, 1, height), (279, 4, 1, 10), (284, 3, 1, 1),
    )  # fmt: skip


def jpeg(width: int, height: int) -> bytes:
    frame = struct.pack(">BHHB", 8, height, width, 3) + bytes((1, 17, 0, 2, 17, 0, 3, 17, 0))
    return b"\xff\xd8\xff\xc0" + struct.pack(">H", len(frame) + 2) + frame + b"\xff\xd9"


def bmp(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IIIIiiHHIIiiII", 99, 0, 54, 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


HOSTILE = {
    "png without end": png(2**31 - 1, 2**31 - 1),
    "png of many pixels": png(50_000, 50_000),
    "png of one long line": png(2**31 - 1, 1),
    "png of nothing": png(0, 0),
    "png with a bomb of text": png(20, 20, (b"zTXt", b"a\0\0" + zlib.compress(bytes(300_000_000), 1))),
    "png with a bomb of a profile": png(20, 20, (b"iCCP", b"a\0\0" + zlib.compress(bytes(300_000_000), 1))),
    "jpeg of many pixels": jpeg(65_500, 65_500),
    "jpeg of nothing": jpeg(0, 0),
    "tiff without end": tiff_of(2**32 - 1, 2**32 - 1, 3),
    "tiff of many pixels": tiff_of(50_000, 50_000, 3),
    "tiff of many bands": tiff_of(10_000, 10_000, 13),
    "tiff in a circle": tiff(after=8),
    "tiff of endless tags": tiff(*((tag, 2, 2**31, 2**31) for tag in range(256, 300))),
    "bmp of many pixels": bmp(2**30, 2**30),
    "bmp upside down": bmp(2**30, -(2**31)),
    "gif of many pixels": b"GIF89a" + b"\xff" * 4 + b"\0\0\0,\0\0\0\0" + b"\xff" * 4 + b"\0\x02\0;",
    "webp of many pixels": b"RIFF\x1a\0\0\0WEBPVP8X\x0a\0\0\0" + bytes(4) + b"\xff\x3f\0\xff\x3f\0",
}  # fmt: skip


@pytest.mark.parametrize("data", HOSTILE.values(), ids=HOSTILE)
def test_an_image_that_claims_more_than_memory_is_bad(data: bytes) -> None:
    """At once, and without taking the memory."""
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for channels in (1, 3, 13):
        with pytest.raises(BadImage) as reason:
            decode(data, channels)
        assert "\n" not in str(reason.value)
    with pytest.raises(BadImage):
        examine(data, 16, 90)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 400_000  # kilobytes


# ----------------------------------------------------------------------------------------------- Hugging Face's folders


@pytest.fixture
def offline(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    """No network, no cache of before, and none of the library's bars among our lines."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "datasets"))
    datasets.disable_progress_bars()
    yield
    datasets.enable_progress_bars()


library = pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning")  # of its own parts


@library
@pytest.mark.usefixtures("offline")
def test_a_loading_script_is_not_run(tmp_path: Path, bomb: Bomb, capsys: pytest.CaptureFixture[str]) -> None:
    """`datasets` from version 4 on knows none, and says so."""
    folder = tmp_path / "evil"
    folder.mkdir()
    (folder / "evil.py").write_text(f"import os\nos.mkdir({str(bomb.marker)!r})\n")
    (folder / "a.png").write_bytes(picture())
    for address in (folder, folder / "evil.py"):
        error = refused(capsys, ssl_global, "pack", f"datasets:{address}", tmp_path / "packed")
        assert f"datasets:{address}: RuntimeError: Dataset scripts are no longer supported, but found evil.py" in error


@library
@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize(
    "name", ["a.pkl", "a.pickle", "a.parquet", "a.arrow", "a.csv", "a.json", "a.npz", "a.h5", "a.zip", "a.png"]
)
def test_pickles_in_a_folder_of_datasets_are_one_line(
    tmp_path: Path, bomb: Bomb, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "evil").mkdir()
    (tmp_path / "evil" / name).write_bytes(bomb.dressed("pickle" if name != "a.zip" else "torch zip"))
    (tmp_path / "evil" / "README.md").write_text(f"---\nconfigs:\n- config_name: default\n  data_files: {name}\n---\n")
    error = refused(capsys, ssl_global, "pack", f"datasets:{tmp_path / 'evil'}", tmp_path / "packed")
    assert str(tmp_path / "evil") in error


@library
@pytest.mark.usefixtures("offline")
def test_pickles_in_a_shard_that_datasets_reads_are_not_unpickled(tmp_path: Path, bomb: Bomb) -> None:
    (tmp_path / "evil").mkdir()
    tar(
        tmp_path / "evil" / "s.tar",
        ("0.png", picture()),
        *((f"0.{end}", bomb.dressed("pickle")) for end in ("pyd", "pickle")),
    )
    source = open_source(f"datasets:{tmp_path / 'evil'}")
    assert source.read(0) == picture()
    tar(
        tmp_path / "evil" / "s.tar",
        ("0.png", picture()),
        ("0.npy", bomb.dressed("npy")),
        ("0.pth", bomb.dressed("torch zip")),
    )
    with pytest.raises(UserError, match="evil"):
        open_source(f"datasets:{tmp_path / 'evil'}")


def saved_dataset(folder: Path) -> dict[str, Path]:
    import datasets

    features = datasets.Features({"image": datasets.Image(), "label": datasets.ClassLabel(names=["a", "b"])})
    rows = {"image": [{"bytes": picture(), "path": None}] * 3, "label": [0, 1, 0]}
    datasets.Dataset.from_dict(rows, features=features).save_to_disk(str(folder))
    return {file.name: file for file in folder.iterdir()}


def arrow_file(files: dict[str, Path]) -> Path:
    return next(file for name, file in files.items() if name.endswith(".arrow"))


@library
@pytest.mark.usefixtures("offline")
def test_odd_files_of_a_saved_dataset_are_one_line(
    tmp_path: Path, odd: bytes, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its state and its table; of its description all is known from the table too."""
    for name, file in saved_dataset(tmp_path / "saved").items():
        before = file.read_bytes()
        file.write_bytes(odd)
        if name == "dataset_info.json":
            packed_or_refused(tmp_path, capsys)
        else:
            error = refused(capsys, ssl_global, "pack", f"datasets:{tmp_path / 'saved'}", tmp_path / "packed")
            assert f"datasets:{tmp_path / 'saved'}" in error, name
        file.write_bytes(before)


def packed_or_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """All three images, or one line with the address."""
    address = f"datasets:{tmp_path / 'saved'}"
    with contextlib.suppress(SystemExit):
        ssl_global("pack", address, tmp_path / "packed")
    said = capsys.readouterr()
    if said.err:
        assert said.err.startswith(f"ssl-global: {address}: ")
        assert said.err.count("\n") == 1
    else:
        assert "3 images in 1 shard" in said.out


FEATURES = {
    "a class by name": {"image": {"_type": "os.system"}},
    "a function": {"image": {"_type": "eval"}},
    "numbers as images": {"image": {"_type": "Value", "dtype": "int64"}, "label": {"_type": "Image"}},
    "words as labels": {"label": {"_type": "ClassLabel", "names": "abc"}},
    "labels of no class": {"label": {"_type": "ClassLabel", "names": [5, None]}},
    "labels of fewer classes": {"label": {"_type": "ClassLabel", "names": ["a"]}},
    "another column": {"evil": {"_type": "Image"}},
    "no columns": {},
    "a list": [1],
}


@library
@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("change", FEATURES.values(), ids=FEATURES)
def test_a_saved_dataset_may_describe_itself_otherwise(
    tmp_path: Path, change: object, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved_dataset(tmp_path / "saved")["dataset_info.json"]
    info = json.loads(file.read_text())
    info["features"] = info["features"] | change if isinstance(change, dict) and change else change
    file.write_text(json.dumps(info))
    packed_or_refused(tmp_path, capsys)
    with contextlib.suppress(UserError):
        source = open_source(f"datasets:{tmp_path / 'saved'}")
        assert source.classes is None or all(isinstance(name, str) for name in source.classes)


@library
@pytest.mark.usefixtures("offline")
def test_a_type_of_arrow_that_is_a_pickle_is_not_unpickled(
    tmp_path: Path, bomb: Bomb, capsys: pytest.CaptureFixture[str]
) -> None:
    """pyarrow before 14.0.1 did so with whatever file it opened (CVE-2023-47248)."""
    import pyarrow

    files = saved_dataset(tmp_path / "saved")
    metadata = {"ARROW:extension:name": "arrow.py_extension_type", "ARROW:extension:metadata": bomb.dressed("pickle")}
    field = pyarrow.field("image", pyarrow.binary(), metadata=metadata)
    table = pyarrow.table([pyarrow.array([picture()])], schema=pyarrow.schema([field]))
    with pyarrow.OSFile(str(arrow_file(files)), "wb") as out, pyarrow.ipc.new_stream(out, table.schema) as writer:
        writer.write_table(table)
    refused(capsys, ssl_global, "pack", f"datasets:{tmp_path / 'saved'}", tmp_path / "packed")


@library
@pytest.mark.usefixtures("offline")
@pytest.mark.parametrize("path", ["/dev/zero", "/dev", "pipe", "https://evil/a.png", "a\0b"])
def test_a_row_that_names_a_device_is_one_bad_image(tmp_path: Path, path: str) -> None:
    import pyarrow

    os.mkfifo("pipe")
    place = arrow_file(saved_dataset(tmp_path / "saved"))
    with pyarrow.memory_map(str(place)) as file, pyarrow.ipc.open_stream(file) as before:
        schema = before.schema
    rows = {"image": [{"bytes": None, "path": path}], "label": [0]}
    with pyarrow.OSFile(str(place), "wb") as out, pyarrow.ipc.new_stream(out, schema) as writer:
        writer.write_table(pyarrow.Table.from_pydict(rows, schema=schema))
    with pytest.raises(BadImage, match="cannot be read"):
        open_source(f"datasets:{tmp_path / 'saved'}").read(0)


# ------------------------------------------------------------------------------------------------------ from a server


class Server(fsspec.AbstractFileSystem):
    """Lists and describes what an attacker likes."""

    protocol = "evil"
    cachable = False
    names: ClassVar[list[str]] = []
    said: ClassVar[dict[str, object]] = {}

    def glob(self, path: str, **options: object) -> list[str]:
        return self.names if path.endswith("*.tar") else []

    def info(self, path: str, **options: object) -> dict[str, object]:
        return {"name": path, "type": "file", "size": 5} | self.said

    def get_file(self, rpath: str, lpath: str, **options: object) -> None:
        Path(lpath).write_bytes(b"evil!")


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> type[Server]:
    monkeypatch.setattr(remote, "PAUSE_SECONDS", 0.0)
    monkeypatch.setattr(Server, "names", [])
    monkeypatch.setattr(Server, "said", {})
    fsspec.register_implementation("evil", Server, clobber=True)
    return Server


@pytest.mark.parametrize(
    "name",
    ["bucket/../../../evil.tar", "../evil.tar", "/tmp/evil.tar", "bucket/..", "bucket/.ssh.tar", "a\\..\\evil.tar",
     "a\0.tar", "pipe:mkdir evil.tar", "a/", "", "a.tar.index.npz", "x" * 300 + ".tar"],
)  # fmt: skip
def test_what_a_server_calls_its_files_stays_in_the_cache(tmp_path: Path, server: type[Server], name: str) -> None:
    server.names = [name]
    before = names_below(tmp_path)
    with pytest.raises(UserError):
        open_source("evil://bucket/shards")
    assert all(path.startswith("cache/ssl_global") for path in names_below(tmp_path) - before - {"cache"})


@pytest.mark.parametrize("size", ["5", -1, 2**80, 1e999, [5], {"a": 1}])
def test_sizes_that_a_server_makes_up_are_one_line(server: type[Server], size: object) -> None:
    server.names, server.said = ["bucket/a.tar"], {"size": size}
    with pytest.raises(UserError, match=r"shards need|a\.tar: cut short at byte 5"):
        open_source("evil://bucket/shards")


# -------------------------------------------------------------------------------------------- what the code cannot say

FORBIDDEN_MODULES = {
    "pickle",
    "cPickle",
    "_pickle",
    "marshal",
    "shelve",
    "dill",
    "cloudpickle",
    "joblib",
    "code",
    "runpy",
    "pty",
}
FORBIDDEN_NAMES = {"eval", "exec", "compile", "__import__"}
FORBIDDEN_CALLS = {
    "os.system", "os.popen", "os.execv", "os.execvp", "os.spawnv", "subprocess.getoutput", "subprocess.getstatusoutput",
    "yaml.load", "yaml.unsafe_load", "yaml.full_load", "torch.hub.load", "pandas.read_pickle", "pd.read_pickle",
    "tarfile.extractall",
}  # fmt: skip
FORBIDDEN_VALUES = {("shell", True), ("allow_pickle", True), ("weights_only", False), ("trust_remote_code", True)}
NEEDED = {
    "torch.load": ("weights_only", True),
    "np.load": ("allow_pickle", False),
    "numpy.load": ("allow_pickle", False),
}
IMPORTERS = {"importlib.import_module", "module_spec.loader.exec_module"}


def dotted(node: ast.AST) -> str:
    """ "os.path.join" of such an expression; of others what can be said."""
    if isinstance(node, ast.Attribute):
        return f"{dotted(node.value)}.{node.attr}"
    return node.id if isinstance(node, ast.Name) else ""


def complaints(text: str) -> Iterator[str]:
    """What in a Python file could run code that a file of data brings; imports by name, too."""
    tree = ast.parse(text)
    decodes_itself = "webdataset" in {
        name.name for node in ast.walk(tree) if isinstance(node, ast.Import) for name in node.names
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [name.name for name in node.names]
            yield from (f"import {name}" for name in names if name.partition(".")[0] in FORBIDDEN_MODULES)
            if isinstance(node, ast.ImportFrom):
                within = {f"{node.module}.{name.name}" for name in node.names}
                yield from sorted(within & (FORBIDDEN_CALLS | NEEDED.keys() | IMPORTERS))
        if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load) and node.id in FORBIDDEN_NAMES:
            yield node.id
        if isinstance(node, ast.Attribute) and dotted(node) in FORBIDDEN_CALLS:
            yield dotted(node)
        if isinstance(node, ast.Call):
            called = dotted(node.func)
            given = {(word.arg, getattr(word.value, "value", None)) for word in node.keywords}
            yield from (f"{called}({name}={value})" for name, value in sorted(given & FORBIDDEN_VALUES))
            if called in NEEDED and NEEDED[called] not in given:
                yield f"{called} without {NEEDED[called][0]}={NEEDED[called][1]}"
            if called in IMPORTERS or called.endswith(("exec_module", "extractall", "import_module")):
                yield called
            if decodes_itself and called.endswith(".decode") and "webdataset" in ast.unparse(node.func).lower():
                yield "webdataset's decoder"


ALLOWED = {
    ("ssl_global/command_line.py", "module_spec.loader.exec_module"),  # a .py recipe: the one exception, see --help
    ("ssl_global/recipe.py", "importlib.import_module"),  # of this package's own encoders and methods
    ("ssl_global/attention/__init__.py", "importlib.import_module"),  # of the modules beside it, by names()
    ("ssl_global/finetuning/heads/__init__.py", "importlib.import_module"),  # of the heads beside it, by names()
    ("ssl_global/encoders/files.py", "import pickle"),  # for the name of its error
    ("benchmarks/attention.py", "importlib.import_module"),  # of the attention modules, by names()
    ("benchmarks/__main__.py", "importlib.import_module"),  # of the benchmarks beside it
}


def test_no_file_of_the_program_can_run_what_data_brings() -> None:
    files = [
        *ROOT.glob("*.py"),
        *(file for name in ("ssl_global", "benchmarks", "recipes") for file in (ROOT / name).rglob("*.py")),
    ]
    found = {(str(file.relative_to(ROOT)), said) for file in files for said in complaints(file.read_text())}
    print(f"{len(files)} files looked at")
    assert len(files) > 60
    assert found == ALLOWED, f"in {len(files)} files"


@pytest.mark.parametrize(
    "line",
    [
        "import pickle", "from pickle import loads", "import marshal as m", "import shelve", "eval('1')", "exec(text)",
        "run = exec", "torch.load(file)", "torch.load(file, weights_only=False)", "np.load(file)", "yaml.load(file)",
        "np.load(file, allow_pickle=True)", "os.system('ls')", "subprocess.run('ls', shell=True)", "tar.extractall()",
        "from os import system", "from torch import load", "importlib.import_module(name)", "f = os.popen",
        "import webdataset\nwebdataset.WebDataset('a').decode('pil')", "load_dataset('a', trust_remote_code=True)",
    ],
)  # fmt: skip
def test_the_walk_above_finds_what_it_looks_for(line: str) -> None:
    assert list(complaints(line))
