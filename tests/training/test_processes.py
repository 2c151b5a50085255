"""Two real processes over gloo: they equal one, survive a signal, and agree on what is bad."""

import json
import os
import shutil
import signal
import subprocess
import sys

import pytest
import torch
from tiny_runs import ROOT, TINY, arguments, assert_bit_equal, finish, losses, start, tensors, torchrun, wait_for_step

from ssl_global.data.pack import pack
from ssl_global.data.source import open_source


@pytest.mark.parametrize(("method", "more"), [*((method, []) for method in TINY), ("dino", ["--train.split-views"])])
def test_two_processes_equal_one(method, more, run, photographs, tmp_path):
    two = start(arguments(method, photographs, tmp_path / "two", *more))
    one = run(method, tmp_path / "one")
    code, out, error = finish(two)
    assert code == 0, error[-2000:]
    assert "2 processes x 1 x 6 images = 12 a step" in out
    assert out.count("step 8/8") == 1  # one of them talks
    assert losses(one) == pytest.approx(losses(tmp_path / "two"), rel=1e-4)
    a, b = tensors(one), tensors(tmp_path / "two")
    for name in (name for name in a if name.startswith("method/")):
        torch.testing.assert_close(a[name], b[name], rtol=1e-3, atol=2e-5, msg=name)
    centre = a.get("method/centre.value")
    assert centre is None or centre.abs().max() > 0


def test_two_processes_stopped_by_a_signal_and_resumed_are_bit_equal(photographs, tmp_path):
    """What goes on are processes in a fresh Python, whose hashes of strings are others."""
    words = ["--encoder.drop-path=0.2", "--train.steps=40"]
    whole = start(arguments("dino", photographs, tmp_path / "whole", *words))
    parted = start(arguments("dino", photographs, tmp_path / "parted", *words))
    wait_for_step(parted, tmp_path / "parted", 3)
    parted.send_signal(signal.SIGTERM)
    _, out, error = finish(parted)  # torchrun ends with its own code after a signal
    assert "the same command goes on" in out, error[-2000:]
    assert not (tmp_path / "parted" / "summary.json").exists()
    code, out, error = finish(torchrun(arguments("dino", photographs, tmp_path / "parted", *words)))
    assert code == 0, error[-2000:]
    assert "going on from" in out
    assert finish(whole)[0] == 0
    assert_bit_equal(tensors(tmp_path / "whole"), tensors(tmp_path / "parted"))
    assert losses(tmp_path / "whole") == losses(tmp_path / "parted")


def test_bad_samples_stop_all_processes_together(photographs, tmp_path):
    data = tmp_path / "data"
    shutil.copytree(photographs, data)
    (data / "coffee" / "03.jpg").write_text("no image")
    code, _, error = finish(start(arguments("mae", data, tmp_path / "run")))
    assert code != 0
    assert error.count("error: data.max_bad_fraction = 0.001: 1 of 24 samples cannot be read") == 1
    assert 'Traceback (most recent call last):\n  File "' + str(ROOT / "pretrain.py") not in error


def test_a_shard_that_changes_under_way_stops_all_processes_together(photographs, tmp_path):
    """Only one of them may read it at that step; both end, with the same line."""
    packed = pack(open_source(str(photographs)), tmp_path / "shards", shard_bytes=40_000, progress=False)
    out = tmp_path / "run"
    running = start(arguments("mae", tmp_path / "shards", out, "--train.steps=4000", "--checkpoint.every=4000"))
    wait_for_step(running, out, 3)
    os.truncate(packed.shards[0], 10_000)
    code, _, error = finish(running)
    assert code != 0
    assert error.count("error: the data cannot be read") == 1
    assert packed.shards[0].name in error
    assert "exitcode  : 2" in error
    assert not (out / "summary.json").exists()


def test_a_batch_that_two_cannot_share_is_one_line(photographs, tmp_path):
    code, _, error = finish(start(arguments("mae", photographs, tmp_path / "run", "--train.global-batch=13")))
    assert code != 0
    assert error.count("error: train.global_batch = 13: cannot be shared by 2 processes; 12 or 14 can") == 1


def test_one_process_stopped_by_a_signal_ends_with_code_0(photographs, tmp_path):
    words = arguments("mae", photographs, tmp_path / "run", "--train.steps=2000")
    process = subprocess.Popen(
        [sys.executable, str(ROOT / "pretrain.py"), *words], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    wait_for_step(process, tmp_path / "run", 3)
    process.send_signal(signal.SIGINT)
    code, out, error = finish(process)
    assert code == 0, error[-2000:]
    assert "stopped by SIGINT after step" in out
    (newest, *_) = sorted((tmp_path / "run" / "checkpoints").iterdir(), reverse=True)
    assert json.loads((newest / "checkpoint.json").read_text())["state"]["step"] >= 3
