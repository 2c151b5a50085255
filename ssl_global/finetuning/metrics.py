"""How good the answers are, summed up batch by batch; nothing but sums is kept.

    metric = Classified(num_classes=10)
    metric.update(logits, target)          # as often as there are batches
    metric.sums = reduced(metric.sums)     # several processes: their sum is that of all images
    metric.figures(), metric.table(names)

Each metric's whole state is one float64 tensor, `sums`, in which counts are exact. Figures are shares, 0 to 1, unless
they say otherwise, and NaN where nothing was counted.

    B  images    K  classes    H, W  rows and columns of the image
"""

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

CALIBRATION_BINS = 15  # Guo et al. 2017, section 5
MOST_CONFUSED = 2048  # ours: classes up to which who is taken for whom is kept; 32 MB there

LOGIT_BINS = 16384  # ours
LOGIT_BINS_PER_UNIT = 512  # ours: odds are told apart if they differ by 0.2 %; logits from -16 to 16


class Metric:
    """Named parts of one tensor. sizes: what each part is, in the order in which they lie."""

    def __init__(self, sizes: dict[str, tuple[int, ...]], device: torch.device | str | None) -> None:
        self.sizes = sizes
        self.sums = torch.zeros(sum(map(math.prod, sizes.values())), dtype=torch.float64, device=device)

    def part(self, name: str) -> Tensor:
        """A view: what is added to it is added to `sums`."""
        start = 0
        for other, size in self.sizes.items():
            if other == name:
                return self.sums[start : start + math.prod(size)].view(size)
            start += math.prod(size)
        raise KeyError(name)

    def figures(self) -> dict[str, float]:
        raise NotImplementedError

    def table(self, names: Sequence[str] | None = None) -> list[dict[str, str | float]]:
        """A row for each class, for people."""
        raise NotImplementedError


class Classified(Metric):
    """One class for each image.

    top1, top5            how often it was the first guess, or among the first min(5, K)
    mean_class_accuracy   the mean, over classes that occur, of their shares of top1
    ece                   expected calibration error: how far confidence is from accuracy, by 15 bins of confidence,
                          (0, 1/15] to (14/15, 1], weighed by their images (Guo et al. 2017,
                          https://arxiv.org/abs/1706.04599)
    nll                   mean negative log-likelihood, nats
    images                how many
    """

    bins: ClassVar[Tensor] = torch.arange(1, CALIBRATION_BINS, dtype=torch.float64) / CALIBRATION_BINS

    def __init__(self, num_classes: int, *, device: torch.device | str | None = None) -> None:
        self.num_classes = num_classes
        sizes: dict[str, tuple[int, ...]] = {"hits": (num_classes,), "images": (num_classes,), "top5": (1,)}
        sizes |= {"nll": (1,), "in_bin": (CALIBRATION_BINS,), "right": (CALIBRATION_BINS,)}
        sizes |= {"confidence": (CALIBRATION_BINS,)}
        if num_classes <= MOST_CONFUSED:
            sizes["confusion"] = (num_classes, num_classes)
        super().__init__(sizes, device)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """(B, K) and (B,) integers, 0 to K - 1. Raises ValueError for others, and for logits that are NaN."""
        target = target.long()
        check(logits, target, target, self.num_classes)
        log_p = logits.double().log_softmax(dim=1)
        confidence, answers = log_p.max(dim=1)
        confidence, right = confidence.exp(), answers == target
        best = log_p.topk(min(5, self.num_classes), dim=1).indices
        self.part("hits").add_(torch.bincount(target[right], minlength=self.num_classes))
        self.part("images").add_(torch.bincount(target, minlength=self.num_classes))
        self.part("top5").add_((best == target[:, None]).sum())
        self.part("nll").sub_(log_p.gather(1, target[:, None]).sum())
        bins = torch.bucketize(confidence, self.bins.to(confidence.device))
        self.part("in_bin").add_(torch.bincount(bins, minlength=CALIBRATION_BINS))
        self.part("right").add_(torch.bincount(bins[right], minlength=CALIBRATION_BINS))
        self.part("confidence").index_add_(0, bins, confidence)
        if "confusion" in self.sizes:
            self.part("confusion").add_(pairs(target, answers, self.num_classes))

    @property
    def confusion(self) -> Tensor:
        """int64 (K, K): how many images of the row's class were taken for the column's."""
        if "confusion" not in self.sizes:
            raise ValueError(f"{self.num_classes} classes: who is taken for whom is kept up to {MOST_CONFUSED}")
        return self.part("confusion").long()

    def figures(self) -> dict[str, float]:
        hits, images = self.part("hits"), self.part("images")
        gaps = (self.part("right") - self.part("confidence")).abs()
        return {
            "top1": share(hits.sum(), images.sum()),
            "top5": share(self.part("top5").sum(), images.sum()),
            "mean_class_accuracy": mean_where(hits / images, images > 0),
            "ece": share(gaps.sum(), images.sum()),
            "nll": share(self.part("nll").sum(), images.sum()),
            "images": images.sum().item(),
        }

    def table(self, names: Sequence[str] | None = None) -> list[dict[str, str | float]]:
        """`taken_for`: which other class it was most often answered with, if any."""
        names = named(names, self.num_classes)
        rows: list[dict[str, str | float]] = []
        for k, (hits, images) in enumerate(zip(self.part("hits"), self.part("images"), strict=True)):
            row: dict[str, str | float] = {"class": names[k], "images": images.item(), "accuracy": share(hits, images)}
            if "confusion" in self.sizes:
                wrong = self.part("confusion")[k].clone()
                wrong[k] = 0
                row["taken_for"] = names[int(wrong.argmax())] if wrong.any() else ""
            rows.append(row)
        return rows


class Labelled(Metric):
    """Any number of classes for each image.

    map        mean average precision over classes that occur; a class's is sum (R_n - R_n-1) P_n over the scores n from
               the highest, with equal scores as one
    f1_micro   2 TP / (2 TP + FP + FN) of all answers together, a class being answered at a probability of at least 0.5
    f1_macro   the mean of the same by class, over classes that occur

    Average precision needs all scores in order. They are kept as counts, by class, of logits in bins 1/512 wide from
    -16 to 16, beyond which they count as the outermost: so that processes can be summed, and of 256 KB a class
    however many images there are. Scores in one bin count as equal, which is all that is not exact.
    """

    def __init__(self, num_classes: int, *, device: torch.device | str | None = None) -> None:
        self.num_classes = num_classes
        super().__init__({"with": (num_classes, LOGIT_BINS), "without": (num_classes, LOGIT_BINS)}, device)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """(B, K) and (B, K) of 1 (has it), 0 (has it not) and -1 (not known: not counted).

        Raises ValueError for others, and for logits that are NaN."""
        if logits.shape != target.shape or logits.ndim != 2 or logits.shape[1] != self.num_classes:
            raise ValueError(
                f"logits {tuple(logits.shape)} and target {tuple(target.shape)}: both (B, {self.num_classes})"
            )
        if not ((target == 0) | (target == 1) | (target == -1)).all():
            raise ValueError("target: 1, 0, or -1 for what is not known")
        if logits.isnan().any():
            raise ValueError("logits are NaN")
        bins = ((logits.double() * LOGIT_BINS_PER_UNIT).floor() + LOGIT_BINS // 2).clamp(0, LOGIT_BINS - 1).long()
        bins = bins + torch.arange(self.num_classes, device=bins.device) * LOGIT_BINS
        for name, value in (("with", 1), ("without", 0)):
            counts = torch.bincount(bins[target == value], minlength=self.num_classes * LOGIT_BINS)
            self.part(name).add_(counts.view(self.num_classes, LOGIT_BINS))

    def average_precision(self) -> Tensor:
        """(K,), NaN for classes that do not occur."""
        true, false = (self.part(name).flip(1) for name in ("with", "without"))  # from the highest score
        precision = true.cumsum(1) / (true + false).cumsum(1).clamp_min(1)
        return (true * precision).sum(1) / true.sum(1)

    def answered(self) -> tuple[Tensor, Tensor, Tensor]:
        """TP, FP and FN, each (K,), at a probability of at least 0.5, a logit of at least 0."""
        half = LOGIT_BINS // 2
        true, false = self.part("with"), self.part("without")
        return true[:, half:].sum(1), false[:, half:].sum(1), true[:, :half].sum(1)

    def figures(self) -> dict[str, float]:
        occurs = self.part("with").sum(1) > 0
        hits, wrong, missed = self.answered()
        return {
            "map": mean_where(self.average_precision(), occurs),
            "f1_micro": share(2 * hits.sum(), (2 * hits + wrong + missed).sum()),
            "f1_macro": mean_where(2 * hits / (2 * hits + wrong + missed), occurs),
        }

    def table(self, names: Sequence[str] | None = None) -> list[dict[str, str | float]]:
        names = named(names, self.num_classes)
        images, precision = self.part("with").sum(1), self.average_precision()
        hits, wrong, missed = self.answered()
        f1 = 2 * hits / (2 * hits + wrong + missed)
        return [
            {"class": names[k], "images": images[k].item(), "ap": precision[k].item(), "f1": f1[k].item()}
            for k in range(self.num_classes)
        ]


class Segmented(Metric):
    """One class for each pixel.

    miou                  the mean over classes that occur, in the target or the answers, of TP / (TP + FP + FN), the
                          sums taken over all pixels of all images
    pixel_accuracy        pixels that are right
    mean_class_accuracy   the mean, over classes that occur in the target, of the share of their pixels that is right
    pixels                how many count
    """

    def __init__(self, num_classes: int, *, ignore_index: int = 255, device: torch.device | str | None = None) -> None:
        self.num_classes, self.ignore_index = num_classes, ignore_index
        super().__init__({"confusion": (num_classes, num_classes)}, device)

    def update(self, logits: Tensor, target: Tensor) -> None:
        """(B, K, H, W), or probabilities, and (B, H, W) integers, 0 to K - 1 or ignore_index.

        Raises ValueError for others, and for logits that are NaN."""
        target = target.long()
        counted = target != self.ignore_index
        check(logits, target, target[counted], self.num_classes)
        answers = logits.argmax(dim=1)
        self.part("confusion").add_(pairs(target[counted], answers[counted], self.num_classes))

    @property
    def confusion(self) -> Tensor:
        """int64 (K, K): how many pixels of the row's class were taken for the column's."""
        return self.part("confusion").long()

    def iou(self) -> Tensor:
        """(K,), NaN for classes that occur neither in the target nor in the answers."""
        confusion = self.part("confusion")
        hits = confusion.diagonal()
        return hits / (confusion.sum(0) + confusion.sum(1) - hits)

    def figures(self) -> dict[str, float]:
        confusion, iou = self.part("confusion"), self.iou()
        hits, pixels = confusion.diagonal(), confusion.sum(1)
        return {
            "miou": mean_where(iou, ~iou.isnan()),
            "pixel_accuracy": share(hits.sum(), pixels.sum()),
            "mean_class_accuracy": mean_where(hits / pixels, pixels > 0),
            "pixels": pixels.sum().item(),
        }

    def table(self, names: Sequence[str] | None = None) -> list[dict[str, str | float]]:
        names = named(names, self.num_classes)
        confusion, iou = self.part("confusion"), self.iou()
        hits, pixels = confusion.diagonal(), confusion.sum(1)
        return [
            {"class": names[k], "pixels": pixels[k].item(), "iou": iou[k].item(), "accuracy": share(hits[k], pixels[k])}
            for k in range(self.num_classes)
        ]


def check(logits: Tensor, target: Tensor, counted: Tensor, num_classes: int) -> None:
    if logits.shape[:1] + logits.shape[2:] != target.shape or logits.shape[1] != num_classes:
        raise ValueError(f"logits {tuple(logits.shape)} of {num_classes} classes, and target {tuple(target.shape)}")
    if counted.numel() and not 0 <= counted.min() <= counted.max() < num_classes:
        raise ValueError(f"target: {int(counted.min())} to {int(counted.max())}, and there are {num_classes} classes")
    if logits.isnan().any():
        raise ValueError("logits are NaN")


def pairs(target: Tensor, answers: Tensor, num_classes: int) -> Tensor:
    return torch.bincount(target * num_classes + answers, minlength=num_classes**2).view(num_classes, num_classes)


def share(part: Tensor, whole: Tensor) -> float:
    return (part / whole).item()


def mean_where(values: Tensor, which: Tensor) -> float:
    return values[which].mean().item()


def named(names: Sequence[str] | None, num_classes: int) -> Sequence[str]:
    if names is not None and len(names) != num_classes:
        raise ValueError(f"{len(names)} names for {num_classes} classes")
    return [str(k) for k in range(num_classes)] if names is None else names
