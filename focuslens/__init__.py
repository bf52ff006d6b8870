"""Contextual heads, split-softmax and focus directions: where a language model looks, and how to change it.

The public names are those of ``__init__.pyi``. Each is imported when it is first used, so that the command's help does
not wait for torch.
"""

from __future__ import annotations

import logging
from importlib import import_module
from importlib.util import find_spec
from typing import Any

import lazy_loader

__version__ = "0.1.0"

_public, __dir__, _names = lazy_loader.attach_stub(__name__, __file__)
__all__ = [name for name in _names if name != "viz"]  # pyright: ignore[reportUnsupportedDunderAll]

# A library keeps silent unless whoever uses it asks to be told: logging.getLogger("focuslens").
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """A public name, or a module of the package, which needs no import of its own."""
    if name in _names:
        return _public(name)
    if find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
