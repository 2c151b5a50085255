"""What a run writes down: metrics.jsonl, and the trackers that Accelerate knows (TensorBoard, wandb, ...)."""

import contextlib
import json
from pathlib import Path
from typing import Any

from accelerate import Accelerator


def lines_of(file: Path) -> list[dict[str, Any]]:
    """What a .jsonl file has; a line that a kill cut short is left out. Nothing where there is no file."""
    found = []
    for line in file.read_text(errors="replace").splitlines() if file.is_file() else []:
        with contextlib.suppress(ValueError):
            found.append(json.loads(line))
    return [line for line in found if isinstance(line, dict)]


class MetricsLog:
    """Only the main process writes. A resumed run drops the lines of steps that it will take again."""

    def __init__(self, accelerator: Accelerator, run: Path, *, start_step: int, settings: dict[str, Any]) -> None:
        self.accelerator = accelerator
        self.file = run / "metrics.jsonl"
        self.rewind(start_step)
        if accelerator.log_with:
            flat = {
                name: value if isinstance(value, int | float | str | bool) else str(value)
                for name, value in settings.items()
            }
            accelerator.init_trackers(run.name, config=flat, init_kwargs={"tensorboard": {"purge_step": start_step}})

    def rewind(self, step: int) -> None:
        """Forget what was written after that step."""
        if self.accelerator.is_main_process and self.file.exists():
            lines = [json.dumps(line) for line in lines_of(self.file) if line["step"] <= step]
            temporary = self.file.with_name(f".{self.file.name}.tmp")
            temporary.write_text("".join(f"{line}\n" for line in lines))
            temporary.rename(self.file)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with self.file.open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.accelerator.log(metrics, step=step)
