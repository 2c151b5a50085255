"""What a person sees while it runs: a live bar on a terminal, plain lines elsewhere."""

import time
from types import TracebackType

from rich.console import Console
from rich.live import Live
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TaskID,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table

# Metric -> (what it is called on the screen, how it is written).
COLUMNS = {
    "loss": ("loss", "{:.4f}"),
    "lr": ("lr", "{:.2e}"),
    "gradient_norm": ("grad norm", "{:.2f}"),
    "images_per_second": ("images/s", "{:.0f}"),
    "waiting_for_data": ("data wait", "{:.0%}"),
    "knn": ("k-NN", "{:.3f}"),
    "rankme": ("RankMe", "{:.1f}"),
    "train_top1": ("train top-1", "{:.3f}"),
    "top1": ("top-1", "{:.3f}"),
    "ece": ("calibration error", "{:.3f}"),
    "miou": ("mIoU", "{:.3f}"),
}


class Display:
    """Shows metrics as they come; silent where `visible` is False (all processes but the first)."""

    def __init__(self, num_steps: int, *, start_step: int, visible: bool) -> None:
        self.console = Console(quiet=not visible, highlight=False, soft_wrap=True)
        self.num_steps = num_steps
        self.metrics: dict[str, float] = {}
        self.start_step = start_step
        self.started: float | None = None  # when start_step was done: what came before the first step says nothing
        self.live: Live | None = None
        if self.console.is_terminal and visible:
            self.bar = Progress(
                TextColumn("step"), BarColumn(), MofNCompleteColumn(), TimeElapsedColumn(), TextColumn("left"),
                TimeRemainingColumn(), console=self.console,
            )  # fmt: skip
            self.task: TaskID = self.bar.add_task("train", total=num_steps, completed=start_step)
            self.live = Live(self.render(), console=self.console, refresh_per_second=4)

    def __enter__(self) -> "Display":
        if self.live:
            self.live.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self.live:
            self.live.stop()

    def step(self, step: int) -> None:
        """One more step is done."""
        if self.started is None:
            self.started, self.start_step = time.monotonic(), step
        if self.live:
            self.bar.update(self.task, completed=step)

    def show(self, step: int, metrics: dict[str, float]) -> None:
        """New figures: on the live table, or as one line."""
        self.metrics |= metrics
        if self.live:
            self.live.update(self.render())
        else:
            figures = [f"{name} {form.format(metrics[key])}" for key, (name, form) in COLUMNS.items() if key in metrics]
            if self.started is not None and (done := step - self.start_step):
                left = (time.monotonic() - self.started) / done * (self.num_steps - step)
                figures.append(f"left {duration(left)}")
            self.console.print(f"step {step}/{self.num_steps}  {'  '.join(figures)}")

    def say(self, text: str) -> None:
        """A line that stays."""
        self.console.print(text, markup=False)

    def warn(self, text: str) -> None:
        self.console.print(f"warning: {text}", style="yellow", markup=False)

    def render(self) -> Table:
        table = Table.grid(padding=(0, 2))
        table.add_row(self.bar)
        figures = Table(box=None, padding=(0, 2))
        shown = {key: spec for key, spec in COLUMNS.items() if key in self.metrics}
        for name, _ in shown.values():
            figures.add_column(name, justify="right")
        figures.add_row(*[form.format(self.metrics[key]) for key, (_, form) in shown.items()])
        table.add_row(figures)
        return table


def duration(seconds: float) -> str:
    """71 -> "1:11", 7300 -> "2:01:40"."""
    minutes, second = divmod(int(seconds), 60)
    hour, minute = divmod(minutes, 60)
    return f"{hour}:{minute:02d}:{second:02d}" if hour else f"{minute}:{second:02d}"
