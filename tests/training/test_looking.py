"""A run that is looked at learns what it would, and its pictures and figures are where they belong."""

import itertools
import os
import signal

import numpy as np
import pytest
import torch
from PIL import Image
from recipes_under_test import load_recipe
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tiny_runs import TINY, arguments, assert_bit_equal, finish, losses, metrics, start, tensors

from ssl_global.data.source import open_source
from ssl_global.errors import UserError
from ssl_global.explain.gallery import Gallery
from ssl_global.explain.monitor import AttentionMonitor
from ssl_global.methods.method import Method
from ssl_global.pretrain import main
from ssl_global.training import loop
from ssl_global.training.engine import compile_blocks, seen_backbone, whole_backbone

LOOKED_AT = ["--explain.every=4", "--explain.attention-every=3", "--explain.images=2"]


@pytest.mark.parametrize("method", list(TINY))
def test_looking_changes_nothing(method, run, tmp_path, capsys):
    plain = run(method, tmp_path / "plain", "--explain.every=None", "--explain.attention-every=None")
    looked = run(method, tmp_path / "looked", *LOOKED_AT)
    assert_bit_equal(tensors(plain), tensors(looked))
    assert losses(plain) == losses(looked)
    names = ["attention", "colours", "likeness", *(["rebuilt"] if method.startswith("mae") else [])]
    said = capsys.readouterr().out
    expected = {f"{name}-{step:08d}.png" for name in names for step in (4, 8)}
    assert {file.name for file in (looked / "pictures").iterdir()} == expected, said
    at = [line["step"] for line in metrics(looked) if any(name.startswith("attention/") for name in line)]
    assert at == [3, 6, 8]
    entropies = [v for line in metrics(looked) for k, v in line.items() if k.endswith("/entropy") and "head_" not in k]
    assert len(entropies) >= 3 * 2
    assert all(0 < value <= 1 + 1e-6 for value in entropies)
    assert "looked at 2 images in" in said
    assert not (plain / "pictures").exists()


def test_pictures_go_to_tensorboard(photographs, tmp_path):
    out = tmp_path / "run"
    main([*arguments("mae", photographs, out, *LOOKED_AT)[:-1], "--log-with", "tensorboard"])
    events = EventAccumulator(str(out / "run"))
    events.Reload()
    assert {"pictures/attention", "pictures/colours", "pictures/likeness", "pictures/rebuilt"} <= set(
        events.Tags()["images"]
    )
    shown = events.Images("pictures/attention")
    assert [one.step for one in shown] == [4, 8]
    with Image.open(out / "pictures" / "attention-00000008.png") as kept:
        assert (shown[-1].width, shown[-1].height) == kept.size
        assert np.asarray(kept).std() > 10  # not one grey


def test_what_cannot_be_shown_is_said_once(tmp_path, photographs):
    from ssl_global.encoders.pretrained import Pretrained, PretrainedConfig

    recipe = load_recipe("finetune", "demo")
    explain = type(recipe.explain)(every=1, attention_every=1, images=2)
    recipe = type(recipe)(**{**vars(recipe), "explain": explain})
    gallery = Gallery(recipe, open_source(str(photographs)), torch.device("cpu"))
    encoder = Pretrained(PretrainedConfig(name="test_resnet"), pixels=64, channels=3).train()
    first, second = (gallery.look(encoder, torch.nn.Identity(), step, end=False, trained=True) for step in (1, 2))
    assert set(first.pictures) == set(second.pictures) == {"colours", "likeness"}
    assert len(first.warnings) == 2
    assert all("no attention" in warning for warning in first.warnings), first.warnings
    assert second.warnings == []
    assert encoder.training
    assert [len(m._forward_hooks) + len(m._forward_pre_hooks) for m in encoder.modules() if m._forward_hooks] == []


def test_a_look_that_fails_leaves_every_mode(tmp_path, photographs, monkeypatch):
    """Memory may be full in a hook: an encoder that stayed in evaluation would learn without drop path."""
    recipe = load_recipe("dino", "demo")
    explain = type(recipe.explain)(every=None, attention_every=1, images=2)
    recipe = type(recipe)(**{**vars(recipe), "explain": explain})
    gallery = Gallery(recipe, open_source(str(photographs)), torch.device("cpu"))
    encoder = next(iter(recipe.method.build(recipe).backbones().values())).train()
    frozen = encoder.model.blocks[0].eval()

    def full(monitor, event):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(AttentionMonitor, "see", full)
    looked = gallery.look(encoder, None, 1, end=False, trained=True)
    assert looked.warnings == ["no attention figures is shown: OutOfMemoryError: CUDA out of memory"]
    assert encoder.training
    assert encoder.model.blocks[1].training
    assert not frozen.training


def test_what_is_sharded_is_not_called_by_one_process(run, tmp_path, monkeypatch, capsys):
    """Its parts would be asked of the others, who take their next step meanwhile."""
    monkeypatch.setattr(loop, "is_sharded", lambda method: isinstance(method, Method))
    out = run("mae", tmp_path / "run", *LOOKED_AT)
    assert {file.name.partition("-")[0] for file in (out / "pictures").iterdir()} == {
        "attention", "colours", "likeness"
    }  # fmt: skip
    assert "rebuilt" not in capsys.readouterr().out


def test_pictures_that_cannot_be_written_end_no_run(run, tmp_path, capsys):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "pictures").write_text("no folder")
    out = run("dino", tmp_path / "run", *LOOKED_AT)
    assert "the pictures cannot be written: " in capsys.readouterr().out
    assert (out / "summary.json").exists()


def test_a_signal_goes_before_pictures(run, tmp_path, monkeypatch):
    """As before evaluations: the time until the machine is taken away is for the checkpoint."""

    def clip_and_be_stopped(accelerator, optimizer, norm):
        if next(steps) == 4:
            os.kill(os.getpid(), signal.SIGTERM)
        return clip(accelerator, optimizer, norm)

    steps, clip = itertools.count(1), loop.clip
    monkeypatch.setattr(loop, "clip", clip_and_be_stopped)
    out = run("dino", tmp_path / "run", *LOOKED_AT)
    assert [folder.name for folder in (out / "checkpoints").glob("step-*4")]
    assert not (out / "pictures").exists()


SLOW_PICTURES = """\
import sys, time
from ssl_global.explain.gallery import Gallery
from ssl_global.pretrain import main

look = Gallery.look

def slowly(gallery, encoder, method, step, **more):
    time.sleep(7 if step == 4 else 0)
    return look(gallery, encoder, method, step, **more)

Gallery.look = slowly
main(sys.argv[1:])
"""


def test_the_others_wait_for_the_pictures(tmp_path, photographs):
    """A process that waited in its next step would take the first one for one that hangs, and end the run."""
    script = tmp_path / "slow_pictures.py"
    script.write_text(SLOW_PICTURES)
    words = arguments("dino", photographs, tmp_path / "run", "--explain.every=4", "--explain.images=2", "--timeout=3")
    code, _, error = finish(start(words, script=script))
    assert code == 0, error
    assert (tmp_path / "run" / "summary.json").exists()


def test_images_that_cannot_be_had_end_no_run(photographs):
    """As of a shard that changed since it was opened: said once, and nothing is looked at."""
    from ssl_global.data.source import open_source

    recipe = load_recipe("dino", "demo")
    source = open_source(str(photographs))

    def changed(index):
        raise UserError("it changed while it was read")

    source.read = changed
    gallery = Gallery(recipe, source, torch.device("cpu"))
    method = recipe.method.build(recipe)
    encoder = next(iter(method.backbones().values()))
    first, second = (gallery.look(encoder, method, step, end=True, trained=True) for step in (1, 2))
    assert first.warnings == ["no image is shown: it changed while it was read"]
    assert second.warnings == []
    assert first.pictures == second.pictures == {}


def test_a_compiled_backbone_is_looked_at_in_a_copy():
    recipe = load_recipe("dino", "demo")
    recipe = type(recipe)(**{**vars(recipe), "train": type(recipe.train)(**{**vars(recipe.train), "compile": True})})
    torch.manual_seed(0)
    method = recipe.method.build(recipe)
    compile_blocks(method, backend="eager")
    seen, own = (f(method, recipe, torch.device("cpu")) for f in (seen_backbone, whole_backbone))
    assert seen is not own
    assert not any(module._compiled_call_impl for module in seen.modules())
    assert any(module._compiled_call_impl for module in own.modules())
    for (name, a), b in zip(seen.state_dict().items(), own.state_dict().values(), strict=True):
        assert torch.equal(a, b), name


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ("--explain.every=0", "explain.every = 0: at least 1 step, or None"),
        ("--explain.images=0", "explain.images = 0: at least 1"),
    ],
)
def test_wrong_settings_are_one_line(words, message, run, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        run("dino", tmp_path / "run", words)
    assert stopped.value.code == 2
    assert message in capsys.readouterr().err
