"""Twenty steps of each demo give the losses that are written down: what should not compute differently does not.

After a change that should, this writes them anew; say so in the commit:

    PYTHONPATH=.:tests python tests/training/test_golden.py [NAME ...]
"""

import json
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from recipes_under_test import TUNING
from tiny_runs import tiny_teacher

from ssl_global.command_line import recipe_files
from ssl_global.data.sample import built_in_sample
from ssl_global.finetune import main as finetune
from ssl_global.pretrain import main as pretrain

GOLDEN = Path(__file__).parent / "golden_losses.json"
STEPS = 20


def twenty_losses(name: str, out: Path) -> list[float]:
    train, val = built_in_sample()
    words = [
        f"--recipe={name}:demo", f"--data={train}", f"--out={out}", "--device=cpu", f"--train.steps={STEPS}",
        "--optim.warmup-epochs=0.1", "--log.every=1", "--eval.every=1000", "--checkpoint.every=1000",
        "--data.workers=0",
    ]  # fmt: skip
    if name.startswith("dino"):
        words.append("--method.freeze-prototypes-epochs=0.1")
    if name == "hires":  # without the run that it would begin from
        words += ["--encoder.weights=None", "--train.global-batch=16", "--eval.bank-images=64"]
    if name == "distill":
        words.append(f"--method.teacher={tiny_teacher(out.parent / 'teacher')}")
    if name.startswith("dinov2"):
        words += ["--train.global-batch=16", "--method.koleo-images=16"]  # in a quarter of the time
    if name in TUNING:
        words += [] if name == "finetune" else ["--train.global-batch=16"]  # the others take longer
        finetune([*words, f"--val={val}", "--log-with"])
    else:
        pretrain([*words, "--log-with"])
    lines = (out / "metrics.jsonl").read_text().splitlines()
    return [line["loss"] for line in map(json.loads, lines) if "loss" in line]


LONG = {"hires"}  # DINO at other sizes


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LONG)) for name in recipe_files()]
)
def test_losses_are_golden(name, tmp_path):
    """To 1 in 1000: processors differ in the last digits, and twenty steps let them grow."""
    golden = json.loads(GOLDEN.read_text())
    assert golden.keys() == recipe_files().keys()
    found = twenty_losses(name, tmp_path / "run")
    assert found == pytest.approx(golden[name], rel=1e-3)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        found = {name: twenty_losses(name, Path(folder, name)) for name in sys.argv[1:] or recipe_files()}
    kept = json.loads(GOLDEN.read_text()) | found
    golden = {name: kept[name] for name in recipe_files()}
    GOLDEN.write_text(json.dumps(golden, indent=1) + "\n")
