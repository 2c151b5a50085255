"""Each figure is its definition, as a loop over images, and does not depend on how images are cut into batches."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ssl_global.finetuning import metrics
from ssl_global.finetuning.metrics import LOGIT_BINS_PER_UNIT, Classified, Labelled, Segmented


def same(a, b, **tolerance):
    assert a.keys() == b.keys()
    for name in a:
        assert a[name] == pytest.approx(b[name], nan_ok=True, **tolerance), name


def mean(values):
    values = list(values)
    return sum(values) / len(values) if values else math.nan


# ------------------------------------------------------------------------------------------------------- one class


def classified_slowly(logits, target):
    p = logits.double().softmax(1).tolist()
    target = target.tolist()
    k = len(p[0])
    answers = [max(range(k), key=row.__getitem__) for row in p]
    right = [a == t for a, t in zip(answers, target, strict=True)]
    ranks = [sorted(range(k), key=lambda j, row=row: -row[j]).index(t) for row, t in zip(p, target, strict=True)]
    ece = 0.0
    for m in range(1, 16):
        inside = [i for i, row in enumerate(p) if (m - 1) / 15 < max(row) <= m / 15]
        if inside:
            gap = mean(right[i] for i in inside) - mean(max(p[i]) for i in inside)
            ece += len(inside) / len(p) * abs(gap)
    return {
        "top1": mean(right),
        "top5": mean(rank < 5 for rank in ranks),
        "mean_class_accuracy": mean(mean(r for r, t in zip(right, target, strict=True) if t == c) for c in set(target)),
        "ece": ece,
        "nll": mean(-math.log(row[t]) for row, t in zip(p, target, strict=True)),
        "images": len(p),
    }


@given(seed=st.integers(0, 99), images=st.integers(1, 40), num_classes=st.integers(1, 9), parts=st.integers(1, 3))
def test_classified_is_its_definition(seed, images, num_classes, parts):
    generator = torch.Generator().manual_seed(seed)
    logits = 2 * torch.randn(images, num_classes, generator=generator)
    target = torch.randint(num_classes, (images,), generator=generator)
    summed = Classified(num_classes)
    for part in torch.arange(images).chunk(parts):
        process = Classified(num_classes)
        process.update(logits[part], target[part])
        summed.sums = summed.sums + process.sums
    same(summed.figures(), classified_slowly(logits, target))
    answers = logits.argmax(1)
    for c in range(num_classes):
        for d in range(num_classes):
            assert summed.confusion[c, d] == ((target == c) & (answers == d)).sum()


def test_calibration_of_what_is_always_sure_and_half_right():
    metric = Classified(2)
    metric.update(torch.tensor([[100.0, 0.0]] * 4), torch.tensor([0, 1, 0, 1]))
    assert metric.figures()["ece"] == pytest.approx(0.5)
    metric = Classified(2)
    metric.update(torch.zeros(4, 2), torch.tensor([0, 1, 0, 1]))
    assert metric.figures()["ece"] == pytest.approx(0)
    assert metric.figures()["nll"] == pytest.approx(math.log(2))


def test_classified_for_people(monkeypatch):
    logits = torch.eye(3)[[0, 2, 2, 1]]
    metric = Classified(3)
    metric.update(logits, torch.tensor([0, 0, 0, 1]))
    rows = metric.table(["cat", "dog", "owl"])
    assert rows[0] == {"class": "cat", "images": 3, "accuracy": pytest.approx(1 / 3), "taken_for": "owl"}
    assert rows[1] == {"class": "dog", "images": 1, "accuracy": 1, "taken_for": ""}
    assert math.isnan(rows[2]["accuracy"])
    monkeypatch.setattr(metrics, "MOST_CONFUSED", 2)
    many = Classified(3)
    many.update(logits, torch.tensor([0, 0, 0, 1]))
    assert many.figures() == metric.figures()
    assert many.table()[0] == {"class": "0", "images": 3, "accuracy": pytest.approx(1 / 3)}
    with pytest.raises(ValueError, match="3 classes"):
        _ = many.confusion


# --------------------------------------------------------------------------------------------------- several classes


def labelled_slowly(logits, target):
    """With sorted scores; -1 is not known."""
    precisions, f1s, counts = [], [], [0, 0, 0]
    for c in range(logits.shape[1]):
        pairs = [(x, t) for x, t in zip(logits[:, c].tolist(), target[:, c].tolist(), strict=True) if t >= 0]
        positives = sum(t for _, t in pairs)
        tp = sum(t for x, t in pairs if x >= 0)
        fp, fn = sum(1 - t for x, t in pairs if x >= 0), positives - tp
        counts = [a + b for a, b in zip(counts, (tp, fp, fn), strict=True)]
        if not positives:
            continue
        precision, reached = 0.0, 0.0
        for threshold in sorted({x for x, _ in pairs}, reverse=True):
            above = [t for x, t in pairs if x >= threshold]
            precision += (sum(above) / positives - reached) * sum(above) / len(above)
            reached = sum(above) / positives
        precisions.append(precision)
        f1s.append(2 * tp / (2 * tp + fp + fn))
    tp, fp, fn = counts
    micro = 2 * tp / (2 * tp + fp + fn) if tp + fp + fn else math.nan
    return {"map": mean(precisions), "f1_micro": micro, "f1_macro": mean(f1s)}


@given(
    seed=st.integers(0, 99), images=st.integers(1, 30), num_classes=st.integers(1, 4), unknown=st.sampled_from([0, 0.3])
)
def test_labelled_is_its_definition_of_scores_in_bins(seed, images, num_classes, unknown):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(images, num_classes, generator=generator)
    logits = (logits * 8).round() / 8 if seed % 2 else (logits * LOGIT_BINS_PER_UNIT).floor() / LOGIT_BINS_PER_UNIT
    target = torch.randint(2, (images, num_classes), generator=generator)
    target[torch.rand(target.shape, generator=generator) < unknown] = -1
    whole, halves = Labelled(num_classes), [Labelled(num_classes) for _ in range(2)]
    whole.update(logits, target)
    for half, part in zip(halves, (slice(None, images // 2), slice(images // 2, None)), strict=True):
        half.update(logits[part], target[part].float())
    assert torch.equal(halves[0].sums + halves[1].sums, whole.sums)
    same(whole.figures(), labelled_slowly(logits, target))


@pytest.mark.parametrize("spread", [0.3, 3.0])
def test_bins_cost_little(spread):
    generator = torch.Generator().manual_seed(0)
    target = (torch.rand(2000, 2, generator=generator) < 0.1).long()
    logits = spread * (torch.randn(2000, 2, generator=generator) + 1.5 * target) - 4
    metric = Labelled(2)
    metric.update(logits, target)
    exact = labelled_slowly(logits, target)
    print(f"spread {spread}: mAP {metric.figures()['map']:.5f}, exactly {exact['map']:.5f}")
    same(metric.figures(), exact, abs=1e-3)


def test_scores_beyond_the_bins_count_as_the_outermost():
    metric = Labelled(1)
    metric.update(torch.tensor([[1e9], [math.inf], [-math.inf], [-1e9]]), torch.tensor([[1], [1], [0], [0]]))
    assert metric.figures() == {"map": 1, "f1_micro": 1, "f1_macro": 1}
    assert metric.table(["a"]) == [{"class": "a", "images": 2, "ap": 1, "f1": 1}]


# ----------------------------------------------------------------------------------------------------------- pixels


def segmented_slowly(answers, target, num_classes, ignore_index):
    pairs = [(a, t) for a, t in zip(answers.flatten().tolist(), target.flatten().tolist(), strict=True)
             if t != ignore_index]  # fmt: skip
    ious, accuracies = [], []
    for c in range(num_classes):
        both, either = (sum(f((a == c, t == c)) for a, t in pairs) for f in (all, any))
        ious += [both / either] if either else []
        of_target = sum(t == c for _, t in pairs)
        accuracies += [both / of_target] if of_target else []
    return {
        "miou": mean(ious),
        "pixel_accuracy": mean(a == t for a, t in pairs),
        "mean_class_accuracy": mean(accuracies),
        "pixels": len(pairs),
    }


@given(
    seed=st.integers(0, 99),
    shape=st.tuples(st.integers(1, 3), st.integers(1, 5), st.integers(1, 5)),
    num_classes=st.integers(1, 6),
    ignored=st.sampled_from([0.0, 0.4, 1.0]),
    ignore_index=st.sampled_from([255, -1, 0]),
)
def test_segmented_is_its_definition(seed, shape, num_classes, ignored, ignore_index):
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(shape[0], num_classes, *shape[1:], generator=generator)
    target = torch.randint(num_classes, shape, generator=generator)
    target[torch.rand(shape, generator=generator) < ignored] = ignore_index
    whole, alone = Segmented(num_classes, ignore_index=ignore_index), Segmented(num_classes, ignore_index=ignore_index)
    whole.update(logits, target)
    for image in range(shape[0]):
        alone.update(logits[image : image + 1], target[image : image + 1])
    assert torch.equal(whole.sums, alone.sums)
    same(whole.figures(), segmented_slowly(logits.argmax(1), target, num_classes, ignore_index))


def test_segmented_for_people():
    metric = Segmented(3)
    answers = torch.tensor([[[0, 0], [1, 1]]])
    metric.update(torch.eye(3)[answers].permute(0, 3, 1, 2), torch.tensor([[[0, 1], [1, 255]]], dtype=torch.uint8))
    rows = metric.table(["road", "sky", "tree"])
    assert rows[0] == {"class": "road", "pixels": 1, "iou": 0.5, "accuracy": 1}
    assert rows[1] == {"class": "sky", "pixels": 2, "iou": 0.5, "accuracy": 0.5}
    assert math.isnan(rows[2]["iou"])
    assert metric.confusion.tolist() == [[1, 0, 0], [1, 1, 0], [0, 0, 0]]
    assert metric.figures()["miou"] == 0.5


# ------------------------------------------------------------------------------------------------- what cannot be


@pytest.mark.parametrize(
    ("metric", "logits", "target", "said"),
    [
        (Classified(3), torch.zeros(2, 3), torch.tensor([0, 3]), "target: 0 to 3, and there are 3"),
        (Classified(3), torch.zeros(2, 3), torch.tensor([-1, 0]), "target: -1 to 0"),
        (Classified(3), torch.zeros(2, 4), torch.tensor([0, 1]), r"logits \(2, 4\) of 3 classes"),
        (Classified(3), torch.full((2, 3), math.nan), torch.tensor([0, 1]), "NaN"),
        (Labelled(3), torch.zeros(2, 3), torch.zeros(2), "both"),
        (Labelled(3), torch.zeros(2, 3), torch.full((2, 3), 2), "target: 1, 0, or -1"),
        (Labelled(3), torch.full((2, 3), math.nan), torch.zeros(2, 3), "NaN"),
        (Segmented(3), torch.zeros(1, 3, 2, 2), torch.full((1, 2, 2), 3), "target: 3 to 3"),
        (Segmented(3), torch.zeros(1, 3, 2, 2), torch.zeros(1, 4, 4), r"target \(1, 4, 4\)"),
        (Segmented(3), torch.full((1, 3, 2, 2), math.nan), torch.zeros(1, 2, 2), "NaN"),
    ],
)
def test_what_cannot_be_is_refused_and_not_counted(metric, logits, target, said):
    with pytest.raises(ValueError, match=said):
        metric.update(logits, target)
    assert not metric.sums.any()


@pytest.mark.parametrize("metric", [Classified(3), Labelled(3), Segmented(3)])
def test_of_nothing_the_figures_are_nan(metric):
    counts = {"images", "pixels"}
    assert all(math.isnan(value) for name, value in metric.figures().items() if name not in counts)
    assert len(metric.table()) == 3
    with pytest.raises(ValueError, match="2 names for 3 classes"):
        metric.table(["a", "b"])
