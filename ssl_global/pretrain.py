"""The main job: from images without labels to a backbone that timm loads. How it goes is in training/job.py."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from ssl_global import command_line
from ssl_global.command_line import Command
from ssl_global.data.source import Source
from ssl_global.data.stream import Stream
from ssl_global.encoders.pretrained import PretrainedConfig
from ssl_global.encoders.weights import Weights, read
from ssl_global.errors import UserError
from ssl_global.evaluation.judge import Judge
from ssl_global.export import export
from ssl_global.methods.method import Method
from ssl_global.recipe import Recipe
from ssl_global.training import report
from ssl_global.training.checkpoint import load_encoder
from ssl_global.training.job import Job, do


def main(argv: Sequence[str] | None = None) -> None:
    command_line.main(Command, pretrain, argv)


def pretrain(command: Command, overridden: dict[str, object]) -> None:
    do(JOB, command, overridden)


def settle(recipe: Recipe, train: Source | Stream, val: Source | None) -> Recipe:
    if isinstance(recipe.encoder, PretrainedConfig):
        raise UserError("--recipe: a recipe for finetune.py, whose backbone hides nothing and has no views to match")
    return replace(recipe, method=recipe.method.settled(recipe))


def begin(method: Method, recipe: Recipe) -> list[str]:
    """The encoder's weights, if the recipe says where they are."""
    name = recipe.encoder.weights
    if name is None:
        return []
    lines = method.begin_with(of_unfinished_run(name) or read(name))
    epochs, warmup = recipe.encoder.waiting_epochs(), recipe.optim.warmup_epochs
    waits = f"the encoder waits {epochs:g} epochs for what is new, then its rate rises for {warmup:g}"
    return [*lines, f"  {waits if epochs else 'the encoder learns from the first step on, beside heads that are new'}"]


def of_unfinished_run(name: str) -> Weights | None:
    """A run that has no export yet has its newest checkpoint."""
    folder = Path(name)
    if not (folder / "checkpoints").is_dir() or (folder / "export").is_dir():
        return None
    _, _, encoder = load_encoder(folder, None)
    return Weights(name, encoder.model.state_dict(), of=encoder.architecture)


JOB = Job(
    settle=settle, begin=begin, judge=Judge, export=export,
    figures=("knn", "knn_untrained", "knn_pixels"), say_baselines=report.baselines,
    say_summary=report.summary,
)  # fmt: skip

if __name__ == "__main__":
    main()
