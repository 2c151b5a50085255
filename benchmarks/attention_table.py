"""An article's table of attention modules on CIFAR-10, measured again: ResNet-18 for 32 pixels, without and with each.

    python -m benchmarks attention_table --out table.json                          # demo(), built-in sample
    python -m benchmarks attention_table --data cifar10/train/ --val cifar10/test/ --runs runs/cifar10      # recipe()

The article (one of this library's sources) gives parameters, accuracy and minutes of an epoch; of seeds, epochs and
optimizer it says nothing, and its criss-cross cannot run, so that row is no measurement. Here each is trained with
several seeds by recipes/small_resnet.py. Of a seed all have the same first weights of the ResNet, the same images and
the same crops in the same order, so they are compared in pairs: the mean over the seeds of the difference to the
baseline, and its 95 % interval by Student's t. That is about the seeds; which images judge is chance too, the same for
all. And there are five comparisons: even if nothing helped, up to 23 % of such tables would show a difference.

Parameters are those of the whole network with ten classes: ours, what the article's own code makes (counted from its
layers), and what its table says. Ours have besides a gamma for each channel (non-local, dual, criss-cross), a norm
(non-local, CBAM) and biases (CBAM). The article does not say where dual and criss-cross stand: here where non-local
does. A single criss-cross behind the third stage would make 11.256 M of its code.

Seeds take turns, and each begins with another row. A run that is done is not done again, one that was stopped goes on.

Measured, 2026-11-21, 2 busy cores of a Xeon server, demo(), built-in sample, seeds 0, 1, 2, in %, to the baseline:

    baseline     63.9, 60.3, 58.8
    SE           62.8, 61.9, 61.2      +1.0  (-3.6 to  +5.6)
    CBAM         63.8, 62.4, 67.1      +3.4  (-7.4 to +14.3)
    non-local    62.0, 65.6, 71.0      +5.2 (-12.3 to +22.7)
    dual         61.9, 60.6, 60.2      -0.1  (-4.4 to  +4.2)
    criss-cross  61.1, 58.6, 61.0      -0.8  (-7.4 to  +5.8)

No row shows a difference: three seeds and 900 images are too few for the article's gains of 1.2 to 1.8. On CIFAR-10:
unmeasured here. Under load a training took four to six minutes; how long the table takes alone is unmeasured.
"""

import contextlib
import json
import math
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import torch
import tyro
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table
from scipy.stats import t as student

from benchmarks.measure import alone, machine
from ssl_global import finetune
from ssl_global.command_line import find
from ssl_global.encoders.pretrained import PretrainedConfig
from ssl_global.finetuning.classify import ClassifyConfig

RECIPE = "small_resnet"
CONFIDENCE = 0.95
BASELINE = "Baseline"
BASELINE_PARAMETERS = 11_173_962
BLOCKS = (64, 64, 128, 128, 256, 256, 512, 512)  # channels of each
STAGES = (64, 128, 256)  # of the first three
SMALL = [
    '--encoder.model-args={"channels": [8, 8, 16, 16]}', "--views.globals.pixels=8", "--train.epochs=None",
    "--train.steps=2", "--train.global-batch=4", "--optim.warmup-epochs=0", "--data.workers=0",
]  # fmt: skip


@dataclass(frozen=True)
class Variant:
    """A row of the article's table.

    attention  what is put in, as `finetune.py --attention` takes it
    added      parameters that the article's own module has, of its channels, and the places where it stands
    said       the article's figures: parameters in M, accuracy in %, minutes of an epoch
    """

    attention: str | None
    added: Callable[[int], int]
    places: tuple[int, ...]
    said: tuple[float, float, float]

    @property
    def parameters_of_its_code(self) -> int:
        return BASELINE_PARAMETERS + sum(map(self.added, self.places))


def of_criss_cross(channels: int) -> int:
    """Query and key of an eighth of the channels, value, gamma."""
    return 2 * (channels + 1) * (channels // 8) + (channels + 1) * channels + 1


VARIANTS = {
    BASELINE: Variant(None, lambda c: 0, (), (11.17, 92.34, 1.2)),
    "SE": Variant(
        "layer*.bn2=se",  # before the addition
        lambda c: (c + 1) * (c // 16) + (c // 16 + 1) * c,
        BLOCKS,
        (11.22, 93.56, 1.3),
    ),
    "CBAM": Variant("layer*.bn2=cbam", lambda c: 2 * c * (c // 16) + 2 * 7 * 7, BLOCKS, (11.23, 93.78, 1.4)),
    "Non-Local": Variant(
        "layer[123]=non_local", lambda c: 3 * (c + 1) * (c // 2) + (c // 2 + 1) * c, STAGES, (11.45, 93.91, 2.1)
    ),
    "Dual": Variant("layer[123]=dual", lambda c: of_criss_cross(c) + 1, STAGES, (11.38, 94.12, 1.8)),
    "Criss-Cross": Variant("layer[123]=criss_cross", of_criss_cross, STAGES, (11.25, 93.85, 1.6)),
}


@dataclass(frozen=True)
class Trained:
    """What came of one training."""

    accuracy: float  # top-1, in %
    images_per_second: float


@dataclass(frozen=True)
class Difference:
    """To the baseline, in points: the mean over the seeds and its interval, of which a single seed has none."""

    mean: float
    interval: tuple[float, float] | None

    @property
    def verdict(self) -> str:
        if self.interval is None:
            return "one seed: not known"
        low, high = self.interval
        return "better" if low > 0 else "worse" if high < 0 else "no difference shown"


def main() -> None:
    tyro.cli(run, prog="python -m benchmarks attention_table")


def run(
    seeds: int = 3,
    epochs: float | None = None,
    data: str | None = None,
    val: str | None = None,
    variants: tuple[str, ...] = tuple(VARIANTS),
    runs: Path = Path("runs/attention_table"),
    small: bool = False,
    out: Path | None = None,
) -> None:
    """Trains a ResNet-18 for 32 pixels with each attention module of the article's table, and compares.

    Args:
        seeds: Trainings of each.
        epochs: Of each training; None: the recipe's.
        data: Labelled images, as finetune.py takes them, for recipe(); None: the built-in sample, with demo().
        val: Labelled images to judge on; None: the sample's.
        variants: Rows, the baseline first.
        runs: Folder of the trainings.
        small: Two steps of a tiny network: whether it runs.
        out: File for all figures, JSON.
    """
    if wrong := [name for name in variants if name not in VARIANTS]:
        raise SystemExit(f"--variants {wrong[0]}: none of {', '.join(VARIANTS)}")
    if variants[:1] != (BASELINE,) or (data is None) != (val is None) or seeds < 1:
        raise SystemExit(f"--variants begin with {BASELINE}, --data and --val go together, --seeds is at least 1")
    words = ["--log-with", *(SMALL if small else [])]
    words += [] if epochs is None else [f"--train.epochs={epochs}"]
    words += [f"--recipe={RECIPE}:demo"] if data is None else [f"--recipe={RECIPE}", f"--data={data}", f"--val={val}"]
    trained: dict[str, list[Trained]] = {name: [] for name in variants}
    for seed in range(seeds):
        turn = seed % len(variants)
        for name in variants[turn:] + variants[:turn]:
            folder = runs / f"{name.lower().replace('-', '_')}-{seed}"
            trained[name].append(train(name, [*words, f"--seed={seed}", f"--out={folder}"], folder))
            print(f"{name}, seed {seed}: {trained[name][-1].accuracy:.1f} %", flush=True)
    console = Console(width=120)
    for table in tables(trained):
        console.print(table)
    if out:
        content = {"machine": machine(), "words": words, "rows": {name: figures(name, trained) for name in variants}}
        out.write_text(json.dumps(content, indent=2) + "\n")


# ----------------------------------------------------------------------------------------------------------- trainings


def train(name: str, words: list[str], folder: Path) -> Trained:
    """A process of its own does it, and says in FOLDER.txt how it goes; only an unfinished one learns anything."""
    attention = VARIANTS[name].attention
    folder.parent.mkdir(parents=True, exist_ok=True)
    alone(fine_tune, [*words, *([] if attention is None else ["--attention", attention])], folder.with_suffix(".txt"))
    summary = folder / "summary.json"
    if not summary.exists():
        raise SystemExit(f"{folder}: stopped; the same command goes on")
    found = json.loads(summary.read_text())
    return Trained(accuracy=100 * found["top1"], images_per_second=found["images_per_second"])


def fine_tune(words: list[str], said: Path) -> int:
    with said.open("a") as file, contextlib.redirect_stdout(file):
        finetune.main(words)
    return 0


def parameters(name: str) -> int:
    """Of this library's network, at full width, with ten classes."""
    recipe = find(f"{RECIPE}:recipe")[2]()
    assert isinstance(recipe.method, ClassifyConfig)
    assert isinstance(recipe.encoder, PretrainedConfig)
    attention = VARIANTS[name].attention
    encoder = replace(recipe.encoder, attention=() if attention is None else (attention,))
    method = replace(recipe.method, classes=tuple(map(str, range(10))))
    with torch.device("meta"):
        network = method.build(replace(recipe, encoder=encoder, method=method)).model
    return sum(parameter.numel() for parameter in network.parameters())


# -------------------------------------------------------------------------------------------------------------- figures


def difference(of: list[float], to: list[float]) -> Difference:
    """Of pairs: the mean, and where it is with a probability of CONFIDENCE if their differences are normal."""
    pairs = [a - b for a, b in zip(of, to, strict=True)]
    middle = mean(pairs)
    if len(pairs) < 2:
        return Difference(middle, None)
    reach = float(student.ppf((1 + CONFIDENCE) / 2, len(pairs) - 1)) * stdev(pairs) / math.sqrt(len(pairs))
    return Difference(middle, (middle - reach, middle + reach))


def times_as_long(of: list[Trained], to: list[Trained]) -> float:
    """Median over the seeds: they take turns, so a slow minute is in both."""
    return median(b.images_per_second / a.images_per_second for a, b in zip(of, to, strict=True))


def figures(name: str, trained: dict[str, list[Trained]]) -> dict[str, Any]:
    variant, own = VARIANTS[name], accuracies(trained[name])
    millions, accuracy, minutes = variant.said
    found: dict[str, Any] = {
        "parameters": parameters(name),
        "accuracies": own,
        "mean": mean(own),
        "times_as_long": times_as_long(trained[name], trained[BASELINE]),
        "article": {
            "parameters_of_its_code": variant.parameters_of_its_code,
            "parameters_in_millions": millions,
            "accuracy": accuracy,
            "difference": round(accuracy - VARIANTS[BASELINE].said[1], 2),
            "times_as_long": minutes / VARIANTS[BASELINE].said[2],
        },
    }
    if name != BASELINE:
        to_baseline = difference(own, accuracies(trained[BASELINE]))
        found["difference"] = asdict(to_baseline) | {"verdict": to_baseline.verdict}
    return found


def accuracies(trained: list[Trained]) -> list[float]:
    return [one.accuracy for one in trained]


def tables(trained: dict[str, list[Trained]]) -> tuple[Table, Table]:
    rows = {name: figures(name, trained) for name in trained}
    cost = Table("", "parameters", "article's code", "article's table", "time x baseline", "article's",
                 title="what each costs", box=SIMPLE_HEAD)  # fmt: skip
    gain = Table("", "seeds", "mean", "to the baseline", "95 % interval", "", "article's",
                 title="accuracy in %, one column of numbers for each seed", box=SIMPLE_HEAD)  # fmt: skip
    for name, row in rows.items():
        article = row["article"]
        cost.add_row(
            name, f"{row['parameters']:,}", f"{article['parameters_of_its_code']:,}",
            f"{article['parameters_in_millions']:.2f} M", f"{row['times_as_long']:.2f}",
            f"{article['times_as_long']:.2f}",
        )  # fmt: skip
        each, found = ", ".join(f"{value:.1f}" for value in row["accuracies"]), row.get("difference")
        words = ["", "", ""]
        if found:
            interval = " to ".join(f"{end:+.1f}" for end in found["interval"] or ())
            words = [f"{found['mean']:+.1f}", interval, found["verdict"]]
        gain.add_row(name, each, f"{row['mean']:.1f}", *words, f"{article['accuracy']:.2f}")
    return cost, gain
