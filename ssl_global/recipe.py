"""What a run is: frozen, typed values that a recipe fills in, and the rules that say which of them can go together.

A recipe is a Python file with two functions, `recipe()` (a paper's setting) and `demo()` (the same road, small). Both
return a `Recipe`. The comment behind a field is its help text on the command line. `Recipe.check()` refuses what cannot
be, in one line, before data is read or a model is built.

Where the data lies and where the results go are not part of a recipe: they are `--data`, `--val` and `--out`.
"""

import importlib
import math
import re
from dataclasses import dataclass, field, fields, is_dataclass
from pathlib import Path
from types import UnionType
from typing import TYPE_CHECKING, Any, Literal, Union, get_args, get_origin, get_type_hints

from ssl_global.errors import UserError, wrong

HERE = Path(__file__).resolve().parent
MAX_PIXELS = 128 * 2**20  # 11 585 x 11 585 (ours): satellite tiles pass
MOST_PIXELS = 178_956_970  # Pillow's own refusal

if TYPE_CHECKING:  # only for the signatures: a recipe builds nothing until it is asked to
    from ssl_global.encoders.encoder import Encoder
    from ssl_global.methods.method import Method


@dataclass(frozen=True, kw_only=True)
class Data:
    """How samples are read."""

    reader: Literal["indexed", "stream"] = "indexed"  # stream: webdataset's own; pipe:COMMAND is run by the shell
    epoch_images: int | None = None  # images that a stream's epoch is taken to have; indexed data are counted
    channels: int = 3  # of the decoded image: 3 (colour), 1 (grey), or another number: all bands that the files have
    mean: tuple[float, ...] | Literal["auto"] = (0.485, 0.456, 0.406)  # of each channel, in 0..1; or the data's
    std: tuple[float, ...] | Literal["auto"] = (0.229, 0.224, 0.225)  # as mean; these are ImageNet's
    max_pixels: int = MAX_PIXELS  # of an image before it is decoded; larger ones count as bad
    shuffle_block: int = 8  # neighbouring samples of a shard that stay near each other, so that reads are in a row
    shuffle_window: int = 1024  # blocks whose samples are shuffled among each other
    images_per_class: int | None = None  # to learn from, at most, the ones that the seed says; None: all there are
    repeats: int = 1  # view sets of a decoded sample in a batch (Hoffer et al. 2020); an epoch counts each
    last_batch: Literal["carry", "drop"] = "carry"  # what is left of an epoch goes first in the next, or is left out
    workers: int | None = None  # decoders beside each training process; None: the cores it has, 16 at most; 0: itself
    worker_kind: Literal["threads", "processes"] = "threads"  # processes only for decoders that hold Python's lock
    max_bad_fraction: float = 0.001  # of unreadable samples, counted and replaced; one more stops the run

    def check(self) -> None:
        if self.reader == "stream":
            if self.epoch_images is None or self.epoch_images < 1:
                raise wrong("data.epoch_images", self.epoch_images, "a stream is not counted: say how many it has")
            if self.repeats != 1:
                raise wrong("data.repeats", self.repeats, "1 for data.reader stream")
        elif self.epoch_images is not None:
            raise wrong("data.epoch_images", self.epoch_images, "only for data.reader stream: indexed data are counted")
        if self.images_per_class is not None:
            if self.images_per_class < 1:
                raise wrong("data.images_per_class", self.images_per_class, "at least 1, or None for all")
            if self.reader == "stream":
                raise wrong("data.images_per_class", self.images_per_class, "None for data.reader stream")
        if self.channels < 1:
            raise wrong("data.channels", self.channels, "3 (colour), 1 (grey), or the number of the files' bands")
        for name in ("mean", "std"):
            values = getattr(self, name)
            if values != "auto" and len(values) != self.channels:
                raise wrong(f"data.{name}", values, f"one number for each of data.channels = {self.channels}, or auto")
        if "auto" in (self.mean, self.std) and self.reader == "stream":
            raise wrong("data.mean", "auto", "numbers: a stream is not measured")
        if self.std != "auto" and min(self.std) <= 0:
            raise wrong("data.std", self.std, "each must be above 0, ImageNet's are 0.229 0.224 0.225")
        if not 1 <= self.max_pixels <= MOST_PIXELS:
            raise wrong("data.max_pixels", self.max_pixels, f"1 to {MOST_PIXELS}: more is refused by Pillow")
        for name in ("shuffle_block", "shuffle_window", "repeats"):
            if getattr(self, name) < 1:
                raise wrong(f"data.{name}", getattr(self, name), "at least 1")
        if self.workers is not None and self.workers < 0:
            raise wrong("data.workers", self.workers, "0 (decode in the training process) or more")
        in_range("data.max_bad_fraction", self.max_bad_fraction, 0, 1)

    @property
    def normalisation(self) -> tuple[tuple[float, ...], tuple[float, ...]]:
        """Mean and deviation of each channel, once data.statistics has put numbers in the place of "auto"."""
        assert self.mean != "auto"
        assert self.std != "auto"
        return self.mean, self.std


@dataclass(frozen=True, kw_only=True)
class Crops:
    """Random resized crops of one size, and what is done to each: flip, colour jitter, grey, blur, solarize."""

    count: int  # of an image
    pixels: int = 224  # side of the square
    area: tuple[float, float] = (0.2, 1.0)  # smallest and largest share of the image's area
    flip: float = 0.5  # probability
    jitter: float = 0.0  # probability that colours are jittered at all
    brightness: float = 0.4  # factor drawn from 1 ± this
    contrast: float = 0.4  # factor drawn from 1 ± this
    saturation: float = 0.2  # factor drawn from 1 ± this
    hue: float = 0.1  # turn of the colour circle drawn from ± this; 0.5 is half the circle
    grey: float = 0.0  # probability
    blur: tuple[float, ...] = (0.0,)  # probability: one for all crops, or one for each
    solarize: tuple[float, ...] = (0.0,)  # probability: one for all crops, or one for each
    augment: str = ""  # RandAugment as timm writes it, "rand-m9-mstd0.5-inc1"; holds Python's lock: data.worker_kind
    erase: float = 0.0  # probability that a box of a fiftieth to a third of the crop becomes noise (Zhong et al. 2017)

    def check(self, name: str) -> None:
        if self.pixels < 2:  # torch's uint8 resize cannot make 1 x 1
            raise wrong(f"{name}.pixels", self.pixels, "at least 2")
        low, high = self.area
        if not 0 < low <= high <= 1:
            raise wrong(f"{name}.area", self.area, "two shares of the image, 0 < smallest <= largest <= 1")
        if self.augment and not re.fullmatch(r"rand(-(m|n|p|mstd|mmax|inc)[\d.]+)*", self.augment):
            raise wrong(
                f"{name}.augment", self.augment, "timm's words would be right, as rand-m9-mstd0.5-inc1, or none"
            )
        for probability in ("flip", "jitter", "grey", "erase"):
            in_range(f"{name}.{probability}", getattr(self, probability), 0, 1)
        for factor in ("brightness", "contrast", "saturation"):
            in_range(f"{name}.{factor}", getattr(self, factor), 0, 1)
        in_range(f"{name}.hue", self.hue, 0, 0.5)
        for each in ("blur", "solarize"):
            values = getattr(self, each)
            if len(values) not in (1, self.count):
                raise wrong(f"{name}.{each}", values, f"1 probability, or {self.count}, one for each crop")
            for value in values:
                in_range(f"{name}.{each}", value, 0, 1)


@dataclass(frozen=True, kw_only=True)
class Views:
    """The views of an image: global ones first, then local ones."""

    globals: Crops
    locals: Crops = field(default_factory=lambda: Crops(count=0, pixels=96, area=(0.05, 0.4)))

    def check(self) -> None:
        if self.globals.count < 1:
            raise wrong("views.globals.count", self.globals.count, "at least 1 global view of each image")
        if self.locals.count < 0:
            raise wrong("views.locals.count", self.locals.count, "0 or more local views of each image")
        for name, crops in self.groups().items():
            crops.check(f"views.{name}")

    def groups(self) -> dict[str, Crops]:
        """The kinds of crops that there are, global first: crops of a kind share a size and travel as one tensor."""
        return {"globals": self.globals} | ({"locals": self.locals} if self.locals.count else {})


@dataclass(frozen=True, kw_only=True)
class EncoderConfig:
    """What an encoder's own settings must offer; each encoder's file has its subclass."""

    drop_path: float = 0.0  # probability that the last block is skipped for an image, rising linearly from the first
    weights: str | None = None  # to begin from: a timm name.tag, export, run, .safetensors or .pth; None: untrained

    def check(self, recipe: "Recipe") -> None:
        raise NotImplementedError

    def waiting_epochs(self) -> float:
        """How long the run goes on before the encoder learns."""
        return 0.0

    def hides(self, masking: str) -> int | None:
        """Side, in pixels, of the patches that it can leave out or replace under that masking; None: it cannot."""
        raise NotImplementedError

    def summary_stands_apart(self) -> bool:
        """Whether the summary has parameters of its own, on which no patch depends."""
        return False

    def build(self, recipe: "Recipe") -> "Encoder":
        """For the recipe's global views and channels."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class PretrainableConfig(EncoderConfig):
    """Of encoders that learn without labels."""

    frozen_epochs: float = 1.0  # of a run from weights: new heads are trained first, then the encoder's rate warms up

    def check_beginning(self) -> None:
        if self.frozen_epochs < 0:
            raise wrong("encoder.frozen_epochs", self.frozen_epochs, "0 or more")

    def waiting_epochs(self) -> float:
        return 0.0 if self.weights is None else self.frozen_epochs


@dataclass(frozen=True, kw_only=True)
class MethodConfig:
    """What a method's own settings must offer; each method's file has its subclass."""

    def check(self, recipe: "Recipe") -> None:
        raise NotImplementedError

    def check_durations(self, epochs: float) -> None:
        """Refuses a warm-up or the like that outlasts the run; `epochs` is the run's length."""

    def splits_views(self) -> bool:
        """Whether the loss is a sum over views, so that each can have a backward pass of its own."""
        return False

    def images_together(self) -> int:
        """How many images of a batch must not be parted from each other: a process takes multiples of it."""
        return 1

    def settled(self, recipe: "Recipe") -> "MethodConfig":
        """With what other files say of it, once, before the run's folder is touched. Raises UserError if they cannot be
        read."""
        return self

    def build(self, recipe: "Recipe") -> "Method":
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class Optim:
    """AdamW; no weight decay on biases, norms and other 1-D parameters."""

    lr_per_256_images: float  # the peak is this times train.global_batch / 256 (Goyal et al. 2017)
    lr_end: float = 0.0  # at the run's last step, after half a cosine
    warmup_epochs: float  # a straight line from 0 to the peak
    weight_decay: tuple[float, float]  # at the first and at the last step, half a cosine between
    betas: tuple[float, float] = (0.9, 0.999)  # AdamW's moving averages
    clip_norm: float | None = None  # largest norm of the whole gradient; None: not clipped

    def check(self) -> None:
        if self.lr_per_256_images <= 0:
            raise wrong("optim.lr_per_256_images", self.lr_per_256_images, "above 0")
        if not self.lr_end >= 0:
            raise wrong("optim.lr_end", self.lr_end, "0 or more")
        if self.warmup_epochs < 0:
            raise wrong("optim.warmup_epochs", self.warmup_epochs, "0 or more")
        if min(self.weight_decay) < 0:
            raise wrong("optim.weight_decay", self.weight_decay, "0 or more, at the start and at the end")
        if not all(0 <= beta < 1 for beta in self.betas):
            raise wrong("optim.betas", self.betas, "each 0 or more and below 1")
        if self.clip_norm is not None and self.clip_norm <= 0:
            raise wrong("optim.clip_norm", self.clip_norm, "above 0, or None for no clipping")


@dataclass(frozen=True, kw_only=True)
class Train:
    """How long, how much at once, how exactly. Give epochs or steps."""

    epochs: float | None = None  # the run's length in passes over the data
    steps: int | None = None  # the run's length in optimizer steps
    global_batch: int  # images of one optimizer step, over all processes: learning does not change with the machine
    micro_batch: int | Literal["auto"] | None = None  # images that a process takes at once, at most; auto: what fits
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"  # of the forward pass; weights and losses stay in float32
    compile: bool = False  # torch.compile each transformer block
    split_views: bool = False  # a backward pass for each view: less memory, the same gradient; only DINO
    recompute_activations: bool = False  # keep none of the blocks' activations: less memory, about a third slower
    max_bad_steps: int = 10  # steps in a row without a finite loss and gradient; one more stops the run

    def check(self) -> None:
        if (self.epochs is None) == (self.steps is None):
            raise wrong(
                "train.epochs", self.epochs, f"give train.epochs or train.steps (now {self.steps}), one of them"
            )
        if self.epochs is not None and self.epochs <= 0:
            raise wrong("train.epochs", self.epochs, "above 0")
        if self.steps is not None and self.steps < 1:
            raise wrong("train.steps", self.steps, "at least 1")
        if self.global_batch < 1:
            raise wrong("train.global_batch", self.global_batch, "at least 1 image, over all processes")
        if isinstance(self.micro_batch, int) and self.micro_batch < 1:
            right = "at least 1 image, auto for what fits, or None for all of a process's share"
            raise wrong("train.micro_batch", self.micro_batch, right)
        if self.max_bad_steps < 0:
            raise wrong("train.max_bad_steps", self.max_bad_steps, "0 or more")


@dataclass(frozen=True, kw_only=True)
class Eval:
    """How the backbone is judged while it learns."""

    every: int  # steps between two evaluations; the last step is always evaluated
    linear: bool = False  # train a linear probe too, on the untrained encoder and at the end of the run
    knn_neighbours: int = 20  # DINO, eval_knn.py
    knn_temp: float = 0.07  # DINO, eval_knn.py
    bank_images: int = 50_000  # training images, at most, that the k-NN and the probe learn from (ours)
    batch: int = 256  # images at once, in each process
    max_fall: float = 0.05  # of a run from weights: share of its start's k-NN (RankMe without labels) that may be lost

    def check(self) -> None:
        in_range("eval.max_fall", self.max_fall, 0, 1)
        for name in ("every", "knn_neighbours", "bank_images", "batch"):
            if getattr(self, name) < 1:
                raise wrong(f"eval.{name}", getattr(self, name), "at least 1")
        if self.knn_temp <= 0:
            raise wrong("eval.knn_temp", self.knn_temp, "above 0, DINO uses 0.07")


@dataclass(frozen=True, kw_only=True)
class Log:
    """What is written down while it runs."""

    every: int = 10  # steps between two lines of metrics

    def check(self) -> None:
        if self.every < 1:
            raise wrong("log.every", self.every, "at least 1 step")


@dataclass(frozen=True, kw_only=True)
class Explain:
    """What is looked at while it runs: always the same few images. It changes nothing of what is learnt."""

    every: int | None = None  # steps between two sets of pictures, for the trackers and OUT/pictures; None: none
    attention_every: int | None = None  # steps between two looks at how attention is doing; None: none
    images: int = 6  # that are looked at, evenly spread over those to judge with

    def check(self) -> None:
        for name in ("every", "attention_every"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise wrong(f"explain.{name}", value, "at least 1 step, or None")
        if self.images < 1:
            raise wrong("explain.images", self.images, "at least 1")


@dataclass(frozen=True, kw_only=True)
class Checkpoint:
    """When the run is saved, besides at its end and on a signal."""

    every: int  # steps between two checkpoints
    keep: int = 2  # newest ones that stay
    keep_every: int | None = None  # steps; a checkpoint at a multiple of this stays for good

    def check(self) -> None:
        if self.every < 1:
            raise wrong("checkpoint.every", self.every, "at least 1 step")
        if self.keep < 2:
            raise wrong(
                "checkpoint.keep", self.keep, "at least 2: should the newest be damaged, the one before it serves"
            )
        if self.keep_every is not None and (self.keep_every < 1 or self.keep_every % self.every):
            raise wrong(
                "checkpoint.keep_every", self.keep_every, f"a multiple of checkpoint.every = {self.every}, or None"
            )


@dataclass(frozen=True, kw_only=True)
class Recipe:
    """All that is learnt and how. A run is this, a seed, and data."""

    seed: int = 0  # of initialisation, order, views, masks, drop path
    data: Data
    views: Views
    encoder: EncoderConfig
    method: MethodConfig
    optim: Optim
    train: Train
    eval: Eval
    log: Log = field(default_factory=Log)
    explain: Explain = field(default_factory=Explain)
    checkpoint: Checkpoint

    def check(self) -> None:
        """Raises UserError, with the field, its value and what would be right, for the first thing that cannot be."""
        for name, value in flatten(self).items():
            numbers = value if isinstance(value, tuple) else (value,)
            if any(isinstance(number, float) and not math.isfinite(number) for number in numbers):
                raise wrong(name, value, "a finite number would be right")
        if not 0 <= self.seed < 2**63:
            raise wrong("seed", self.seed, "0 or more, below 2**63")
        for part in (self.data, self.views, self.optim, self.train, self.eval, self.log, self.explain, self.checkpoint):
            part.check()
        self.encoder.check(self)
        self.method.check(self)
        if self.train.split_views and not self.method.splits_views():
            raise wrong("train.split_views", True, "False: this method's loss is not a sum over views")
        if self.train.epochs is not None:
            self.check_durations(self.train.epochs)

    def check_durations(self, epochs: float) -> None:
        """Refuses a warm-up longer than the run. A run in steps knows its epochs once its data is counted."""
        not_longer_than_run("optim.warmup_epochs", self.optim.warmup_epochs, epochs)
        not_longer_than_run("encoder.frozen_epochs", self.encoder.waiting_epochs(), epochs)
        self.method.check_durations(epochs)


# Fields that may differ between a checkpoint and the command that resumes it: they say how fast, how visibly and how
# safely the run goes, not what it learns.
MAY_CHANGE_ON_RESUME = frozenset(
    {
        "data.workers",
        "data.worker_kind",
        "data.max_bad_fraction",
        "method.teacher",  # where it lies; which one it is method.teacher_hash says
        "train.micro_batch",
        "train.compile",
        "train.recompute_activations",
        "train.split_views",
        "train.max_bad_steps",
        "eval.every",
        "eval.batch",
        "eval.max_fall",
        "log.every",
        "explain.every",
        "explain.attention_every",
        "explain.images",
        "checkpoint.every",
        "checkpoint.keep",
        "checkpoint.keep_every",
    }
)


def in_range(name: str, value: float, low: float, high: float) -> None:
    if not low <= value <= high:
        raise wrong(name, value, f"between {low:g} and {high:g}")


def not_longer_than_run(name: str, duration_epochs: float, epochs: float) -> None:
    if duration_epochs > epochs:
        raise wrong(name, duration_epochs, f"longer than the run, which has {epochs:g} epochs; give at most {epochs:g}")


def flatten(config: Any, prefix: str = "") -> dict[str, Any]:
    """{"optim.lr_end": 0.0, ...}: every field by the name that it has on the command line."""
    flat: dict[str, Any] = {}
    for f in fields(config):
        value = getattr(config, f.name)
        flat |= flatten(value, f"{prefix}{f.name}.") if is_dataclass(value) else {f"{prefix}{f.name}": value}
    return flat


def as_json(recipe: Recipe) -> dict[str, Any]:
    """The recipe as JSON can hold it: flat names, tuples as lists, encoder and method by the name of their file."""
    kinds = {
        f"{part}.kind": type(getattr(recipe, part)).__module__.rpartition(".")[2] for part in ("encoder", "method")
    }
    return kinds | {n: list(v) if isinstance(v, tuple) else v for n, v in flatten(recipe).items()}


def from_json(saved: dict[str, Any]) -> Recipe:
    """The recipe that `as_json` wrote. Encoder and method must be files of this package: nothing else is imported."""

    def build(cls: type, prefix: str) -> Any:
        values, kinds = {}, get_type_hints(cls)
        for f in fields(cls):
            name = prefix + f.name
            if name in saved:
                values[f.name] = tuple(saved[name]) if isinstance(saved[name], list) else saved[name]
                if not is_a(values[f.name], kinds[f.name]):
                    raise wrong(name, saved[name], f"of another type than {kinds[f.name]}")
            elif any(other.startswith(f"{name}.") for other in saved):
                values[f.name] = build(part_class(cls, f.name), f"{name}.")
        return cls(**values)

    def part_class(cls: type, part: str) -> type:
        if cls is Recipe and part in ("encoder", "method"):
            return config_class(part, saved[f"{part}.kind"])
        return PARTS[part]

    return build(Recipe, "")


def is_a(value: Any, kind: Any) -> bool:
    """Whether what JSON gave is of a field's type."""
    origin, inside = get_origin(kind), get_args(kind)
    if origin in (Union, UnionType):
        return any(is_a(value, one) for one in inside)
    if origin is Literal:
        return value in inside
    if origin is tuple and isinstance(value, tuple):
        kinds = inside[:1] * len(value) if inside[1] is ... else inside
        return len(value) == len(kinds) and all(map(is_a, value, kinds))
    if origin is dict and isinstance(value, dict):
        return all(is_a(one, inside[1]) for one in value.values())
    if kind in (int, float):
        return type(value) in (int, kind)  # True is an int too
    return kind is Any or isinstance(value, origin or kind)


def config_class(part: str, kind: str) -> type:
    """The settings' class in ssl_global/encoders/KIND.py, or ssl_global/methods/KIND.py or finetuning/KIND.py."""
    base = {"encoder": EncoderConfig, "method": MethodConfig}[part]
    if not (isinstance(kind, str) and kind.isidentifier()):
        raise wrong(f"{part}.kind", kind, f"the name of a file in ssl_global/{part}s")
    rooms = {"encoder": ("encoders",), "method": ("methods", "finetuning")}[part]
    room = next((room for room in rooms if (HERE / room / f"{kind}.py").is_file()), None)
    if room is None:
        raise wrong(f"{part}.kind", kind, f"there is no ssl_global/{rooms[0]}/{kind}.py here")
    module = importlib.import_module(f"ssl_global.{room}.{kind}")
    own = [c for c in vars(module).values() if isinstance(c, type) and c.__module__ == module.__name__]
    settings = [c for c in own if issubclass(c, base)]
    if not settings:
        raise wrong(f"{part}.kind", kind, f"there are no settings of {part}s in that file")
    return settings[0]


PARTS = {
    "data": Data, "views": Views, "globals": Crops, "locals": Crops, "optim": Optim, "train": Train,
    "eval": Eval, "log": Log, "explain": Explain, "checkpoint": Checkpoint,
}  # fmt: skip


def refuse_changes(saved: dict[str, Any], now: dict[str, Any], *, where: str) -> None:
    """Raises UserError listing what differs between a checkpoint's recipe and the present one, if it matters."""
    names = [n for n in sorted(saved.keys() | now.keys()) if n not in MAY_CHANGE_ON_RESUME]
    changed = [f"{n} was {saved.get(n)}, is {now.get(n)}" for n in names if saved.get(n) != now.get(n)]
    if changed:
        raise UserError(
            f"{where}: the run there was begun with another recipe ({'; '.join(changed)}); "
            "give the same command to go on, --fresh to begin anew, or another --out"
        )
