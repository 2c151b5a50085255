"""2D attention modules, one a file and found by its name: (B, C, H, W) -> (B, C, H, W), any H and W.

    from ssl_global import attention

    attention.names()
    attention.build("non_local", channels=256, sub_sample=True)

Each begins as an exact identity, or as it is published with start="paper" (base.py).
"""

import difflib
import importlib
import inspect
from pathlib import Path
from typing import Any

from ssl_global.attention.base import Attention

NO_MODULES = {"__init__", "base", "windows", "dyt", "attach", "places", "layout", "cost", "recommend"}  # dyt is a norm


def names() -> list[str]:
    """Of all modules: the files of this folder that hold one."""
    return sorted({file.stem for file in Path(__file__).parent.glob("*.py")} - NO_MODULES)


def build(name: str, channels: int, **options: Any) -> Attention:
    """The module of that name for so many channels; its class says which options it has.

    Raises ValueError for a name or an option that is none, with those that there are; for what cannot be built the
    module says why.
    """
    chosen = module_class(name)
    known = [option for option in inspect.signature(chosen).parameters if option != "channels"]
    if unknown := [option for option in options if option not in known]:
        raise ValueError(f"{name}: no option {unknown[0]!r}; there are {', '.join(known)}")
    return chosen(channels, **options)


def module_class(name: str) -> type[Attention]:
    if name not in names():
        nearest = difflib.get_close_matches(name, names(), n=3, cutoff=0.3) or names()
        raise ValueError(f"attention {name!r}: there is none; the nearest are {', '.join(nearest)}")
    file = importlib.import_module(f"ssl_global.attention.{name}")
    (found,) = (
        thing for thing in vars(file).values()
        if isinstance(thing, type) and issubclass(thing, Attention) and thing.__module__ == file.__name__
    )  # fmt: skip
    return found
