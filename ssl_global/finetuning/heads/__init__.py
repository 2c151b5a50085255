"""Segmentation heads, one a file and found by its name: a backbone's maps in, a logit of each class at each place out.

    from ssl_global.finetuning import heads

    heads.names()
    heads.build("upernet", channels=(96, 192, 384, 768), strides=(4, 8, 16, 32), num_classes=19, width=512)

Maps come from ssl_global/finetuning/pyramid.py, which also enlarges what a head says to the image. auxiliary.py is no
head of its own: it stands beside any of them.
"""

import difflib
import importlib
import inspect
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ssl_global.finetuning.heads.base import Head

NO_HEADS = {"__init__", "base", "auxiliary"}


def names() -> list[str]:
    """Of all heads: the files of this folder that hold one."""
    return sorted({file.stem for file in Path(__file__).parent.glob("*.py")} - NO_HEADS)


def build(name: str, channels: Sequence[int], strides: Sequence[float], num_classes: int, **options: Any) -> Head:
    """The head of that name; its class says which options it has.

    Raises ValueError for a name or an option that is none, with those that there are.
    """
    chosen = head_class(name)
    given = {"channels", "strides", "num_classes"}
    known = [option for option in inspect.signature(chosen).parameters if option not in given]
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"{name}: no option {unknown[0]!r}; there are {', '.join(known)}")
    return chosen(channels, strides, num_classes, **options)


def head_class(name: str) -> type[Head]:
    if name not in names():
        nearest = difflib.get_close_matches(name, names(), n=3, cutoff=0.3) or names()
        raise ValueError(f"head {name!r}: there is none; the nearest are {', '.join(nearest)}")
    file = importlib.import_module(f"ssl_global.finetuning.heads.{name}")
    (found,) = (
        thing for thing in vars(file).values()
        if isinstance(thing, type) and issubclass(thing, Head) and thing.__module__ == file.__name__
    )  # fmt: skip
    return found
