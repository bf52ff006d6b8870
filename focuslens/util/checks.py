"""Checks of arguments at the place where they are taken, with messages that name the argument."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any

__all__ = ["checked_integer", "checked_text", "integers"]


def checked_integer(value: Any, name: str) -> int:
    """An integer of any kind, such as NumPy's, as Python's own. Any other value raises ``TypeError``."""
    try:
        return operator.index(value)
    except TypeError:
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be an integer") from None


def integers(values: Iterable[Any], name: str) -> list[int]:
    """Integers of any kind as Python's own. Anything else in the argument ``name`` raises ``TypeError``."""
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} is {values!r}; it must be a sequence of integers")
    return [checked_integer(value, f"{name}[{i}]") for i, value in enumerate(values)]


def checked_text(value: Any, name: str, *, may_be_empty: bool = True) -> str:
    """A text that can be encoded.

    Raises:
        TypeError: If the value is not a string.
        ValueError: If the text is empty although it must not be, or contains half of a surrogate pair.
    """
    if not isinstance(value, str):
        raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be a string")
    if not may_be_empty and not value.strip():
        raise ValueError(f"{name} is empty")
    try:
        value.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} contains half of a surrogate pair at character {error.start} ({value[error.start]!r}), which is "
            "not text; remove or replace it"
        ) from error
    return value
