"""Contextual heads, split-softmax and focus directions: where a language model looks, and how to change it.

``__init__.pyi`` lists the public names. Each is imported on first use, so that the command's help does not wait for
torch.
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

# The library prints no log messages by default; an application configures the logger "focuslens" to see them.
logging.getLogger(__name__).addHandler(logging.NullHandler())


def __getattr__(name: str) -> Any:
    """A public name or a module of the package, imported on first use."""
    if name in _names:
        return _public(name)
    if find_spec(f"{__name__}.{name}") is not None:
        return import_module(f"{__name__}.{name}")
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
