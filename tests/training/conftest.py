"""What the tests of runs share: each begins with a fresh Accelerate, and one small folder of photographs serves all."""

from pathlib import Path

import pytest
import torch
from accelerate.state import AcceleratorState, GradientState, PartialState
from tiny_runs import arguments

from ssl_global.data.sample import photograph
from ssl_global.pretrain import main


@pytest.fixture(autouse=True)
def fresh_accelerate():
    threads = torch.get_num_threads()
    yield
    AcceleratorState._reset_state(True)
    PartialState._reset_state()
    GradientState._reset_state()
    torch.set_num_threads(threads)


@pytest.fixture(scope="session")
def photographs(tmp_path_factory) -> Path:
    """24 images in two class folders."""
    folder = tmp_path_factory.mktemp("photographs")
    for name in ("astronaut", "coffee"):
        (folder / name).mkdir()
        image = photograph(f"{name}.png")
        for number in range(12):
            x, y = 25 * number, 10 * number
            image.crop((x, y, x + 120, y + 100)).save(folder / name / f"{number:02d}.jpg", quality=90)
    return folder


@pytest.fixture
def run(photographs):
    """run(method, out, *more) trains in this process and returns the run's folder."""

    def train(method: str, out: Path, *more: str, data: Path | str = photographs) -> Path:
        main(arguments(method, data, out, *more))
        AcceleratorState._reset_state(True)
        return out

    return train
