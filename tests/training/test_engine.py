"""What is said of the engine before a run; what it computes is in test_engines.py."""

import torch

from ssl_global.training import engine


def test_a_precision_that_is_slower_here_is_named(monkeypatch):
    cpu = torch.device("cpu")
    monkeypatch.setattr(engine, "seconds_of_a_product", {torch.bfloat16: 0.01, torch.float32: 0.002}.get)
    said = engine.slower_than_float32(cpu, "bf16")
    assert said == "train.precision = bf16: this processor's products take 5.0 times as long as in fp32"
    assert engine.slower_than_float32(cpu, "fp32") is None
    assert engine.slower_than_float32(torch.device("cuda"), "bf16") is None
    monkeypatch.setattr(engine, "seconds_of_a_product", {torch.bfloat16: 0.002, torch.float32: 0.01}.get)
    assert engine.slower_than_float32(cpu, "bf16") is None


def test_what_is_timed_is_a_product():
    assert 0 < engine.seconds_of_a_product(torch.float32) < 10
