"""What a run writes down: metrics.jsonl, and the trackers that Accelerate knows (TensorBoard, wandb, ...)."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from accelerate import Accelerator
from accelerate.tracking import TensorBoardTracker, WandBTracker
from PIL import Image

from ssl_global.data.files import read_json_lines


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
        """Forget what was written after that step, and what is no line of metrics."""
        if self.accelerator.is_main_process and self.file.exists():
            lines = [line for line in read_json_lines(self.file) if type(at := line.get("step")) is int and at <= step]
            temporary = self.file.with_name(f".{self.file.name}.tmp")
            temporary.write_text("".join(f"{json.dumps(line)}\n" for line in lines))
            temporary.rename(self.file)

    def draw(self, step: int, pictures: dict[str, Image.Image]) -> None:
        """Pictures go to OUT/pictures, and to the trackers that take some."""
        folder = self.file.parent / "pictures"
        for name, picture in pictures.items():
            folder.mkdir(exist_ok=True)
            temporary = folder / f".{name}.png"
            picture.save(temporary)
            temporary.rename(folder / f"{name}-{step:08d}.png")
        for tracker in self.accelerator.trackers if pictures else []:
            if isinstance(tracker, TensorBoardTracker):
                rows = {f"pictures/{name}": np.asarray(one)[None] for name, one in pictures.items()}
                tracker.log_images(rows, step=step, dataformats="NHWC")
            elif isinstance(tracker, WandBTracker):
                tracker.log_images({f"pictures/{name}": [one] for name, one in pictures.items()}, step=step)

    def write(self, step: int, metrics: dict[str, float]) -> None:
        if self.accelerator.is_main_process:
            with self.file.open("a") as file:
                file.write(json.dumps({"step": step, **metrics}) + "\n")
        self.accelerator.log(metrics, step=step)
