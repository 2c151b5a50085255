"""The whole built-in sample: another process without a network writes the same bytes; every box lies in its region."""

import subprocess
import sys
from pathlib import Path

import pytest

from ssl_global.data.randomness import SAMPLE, stream
from ssl_global.data.sample import (
    NUM_TRAIN,
    NUM_VAL,
    PHOTOGRAPHS,
    SEED,
    SIDES,
    TRAIN_SHARE,
    built_in_sample,
    photograph,
)

WITHOUT_A_NETWORK = """
import socket, sys
from pathlib import Path
def refuse(*_, **__):
    raise RuntimeError("the sample asked for the network")
socket.socket.connect = socket.create_connection = socket.getaddrinfo = refuse
from ssl_global.data.sample import built_in_sample
built_in_sample(Path(sys.argv[1]))
"""


def test_another_process_without_a_network_writes_the_same_bytes(tmp_path: Path) -> None:
    built_in_sample(tmp_path / "here")
    subprocess.run([sys.executable, "-c", WITHOUT_A_NETWORK, tmp_path / "there"], check=True)
    here, there = (
        {str(file.relative_to(place)): file.read_bytes() for file in place.rglob("*") if file.is_file()}
        for place in (tmp_path / "here", tmp_path / "there")
    )
    assert len(here) == 4 + 1 + 2  # shards of both parts, and their classes.json
    assert here == there


@pytest.mark.parametrize(("part", "count"), [(0, NUM_TRAIN), (1, NUM_VAL)])
def test_every_box_lies_in_its_region(part: int, count: int) -> None:
    """The formula, written once more: training boxes end where validation boxes may begin, or before."""
    sizes = [photograph(name).size for name in PHOTOGRAPHS]
    for number in range(count):
        width, height = sizes[number % len(sizes)]
        border = round(TRAIN_SHARE * width)
        first, end = (border, width) if part else (0, border)
        random = stream(SEED, SAMPLE, part, number)
        side = round(random.uniform(*SIDES) * min(end - first, height))
        x, y = int(random.integers(first, end - side + 1)), int(random.integers(0, height - side + 1))
        assert first <= x < x + side <= end
        assert 0 <= y < y + side <= height
        assert side >= 0.35 * min(end - first, height) - 1
