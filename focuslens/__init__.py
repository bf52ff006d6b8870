"""Contextual heads, split-softmax and focus directions: tools to measure and change a language model's attention.

``__init__.pyi`` lists the public names. Each name is imported on first use, so that ``focuslens --help`` does not wait
for torch.
"""

from __future__ import annotations

import logging
import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from typing import Any

import lazy_loader

__version__ = "0.1.0"

_public, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = [name for name in _names if name != "viz"]  # pyright: ignore[reportUnsupportedDunderAll]


class _Serving(ModuleType):
    """``focuslens.serving``: the functions that write checkpoints and tasks for other tools."""

    __all__ = ("ExportedCheckpoint", "FoldedCheckpoint", "export", "fold", "write_harness_task")

    def __getattr__(self, name: str) -> Any:
        if name in self.__all__:
            return _public(name)
        raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")


serving = sys.modules[f"{__name__}.serving"] = _Serving(f"{__name__}.serving")
serving.__spec__ = ModuleSpec(serving.__name__, None)

# By default, the library prints no log messages. Applications can configure the logger "focuslens" to print them.
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """Import a public name or a submodule of the package on first use."""
    if name in _names:
        return _public(name)
    if find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
