import math

import pytest
import torch
import torch.nn.functional as F

from ssl_global.evaluation.features import Features, Split
from ssl_global.evaluation.linear import linear, linear_probe, standardise, train_probes


def clusters(*, images: int, classes: int = 4, width: int = 8, spread: float = 0.05, seed: int = 0):
    """Features around one corner of the cube for each class; every class is there."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(images) % classes
    return torch.eye(classes, width)[labels] + spread * torch.randn(images, width, generator=generator), labels


def test_separable_classes_are_told_apart():
    train, train_labels = clusters(images=120)
    val, val_labels = clusters(images=40, seed=1)
    result = linear_probe(train, train_labels, val, val_labels, num_classes=4, epochs=10)
    assert result.top1 == 1.0
    assert result.confusion.tolist() == (10 * torch.eye(4, dtype=torch.int64)).tolist()


def test_the_best_of_the_table_is_reported():
    train, train_labels = clusters(images=200, spread=1.0)
    val, val_labels = clusters(images=100, spread=1.0, seed=1)
    result = linear_probe(train, train_labels, val, val_labels, num_classes=4, epochs=5, lrs=(1e-6, 0.1, 1.0))
    assert [row["lr"] for row in result.table] == [1e-6, 0.1, 1.0]
    assert result.top1 == max(row["top1"] for row in result.table)
    assert {"lr": result.best_lr, "top1": result.top1} in result.table
    assert result.confusion.trace().item() == pytest.approx(100 * result.top1)


def test_the_same_seed_gives_the_same_probes():
    x, labels = clusters(images=50, spread=1.0)
    first, again, other = (
        train_probes(x, labels, num_classes=4, lrs=(0.1, 1.0), epochs=3, batch=16, seed=seed)[0] for seed in (5, 5, 6)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def train_alone(x, labels, *, num_classes, lr, epochs, batch, seed):
    """torch's own layer, optimizer and schedule, one learning rate."""
    layer = torch.nn.Linear(x.shape[1], num_classes)
    torch.nn.init.zeros_(layer.weight)
    torch.nn.init.zeros_(layer.bias)
    optimizer = torch.optim.SGD(layer.parameters(), lr=lr, momentum=0.9)
    steps = epochs * math.ceil(len(x) / batch)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5 * (1 + math.cos(math.pi * step / steps)))
    generator = torch.Generator().manual_seed(seed)
    for _ in range(epochs):
        for rows in torch.randperm(len(x), generator=generator).split(batch):
            optimizer.zero_grad()
            F.cross_entropy(layer(x[rows]), labels[rows]).backward()
            optimizer.step()
            schedule.step()
    return layer


def test_each_probe_learns_as_if_it_were_alone():
    x, labels = clusters(images=70, spread=1.0)
    lrs = (0.003, 0.1, 1.0)
    setting = {"num_classes": 4, "epochs": 4, "batch": 16, "seed": 3}
    weight_DLC, bias_LC = train_probes(x, labels, lrs=lrs, **setting)
    for probe, lr in enumerate(lrs):
        alone = train_alone(x, labels, lr=lr, **setting)
        torch.testing.assert_close(weight_DLC[:, probe].T, alone.weight.detach(), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(bias_LC[probe], alone.bias.detach(), rtol=1e-4, atol=1e-5)


def test_features_are_standardised_with_the_training_ones():
    generator = torch.Generator().manual_seed(0)
    train = 5 + 3 * torch.randn(1000, 4, generator=generator)
    scaled_train, scaled_val = standardise(train, torch.full((2, 4), 5.0))
    torch.testing.assert_close(scaled_train.mean(dim=0), torch.zeros(4), atol=1e-5, rtol=0)
    torch.testing.assert_close(scaled_train.std(dim=0, correction=0), torch.ones(4), atol=1e-5, rtol=0)
    assert scaled_val.abs().max() < 0.1


def test_a_constant_feature_does_no_harm():
    train, train_labels = clusters(images=60)
    train[:, 0] = 7.0
    result = linear_probe(train, train_labels, train, train_labels, num_classes=4, epochs=10)
    assert math.isfinite(result.top1)


def test_a_split_is_judged():
    train, train_labels = clusters(images=60)
    val, val_labels = clusters(images=20, seed=1)
    split = Split(
        bank=Features(x=train, labels=train_labels, bad=[]),
        queries=Features(x=val, labels=val_labels, bad=[]),
        said="",
        classes=None,
    )
    assert linear(split, device=torch.device("cpu")).top1 == 1.0
