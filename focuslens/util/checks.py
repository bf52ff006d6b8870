"""Checks of arguments at the place where they are taken, with messages that name the argument."""

from __future__ import annotations

import operator
from collections.abc import Iterable
from typing import Any, TypeVar, cast

__all__ = ["checked_integer", "checked_number", "checked_text", "integers", "is_range", "items_of", "numbers"]

_T = TypeVar("_T")


def checked_integer(value: Any, name: str, wanted: str = "an integer") -> int:
    """An integer of any kind, such as NumPy's, as Python's own. Any other value, also a bool, raises ``TypeError``.

    ``wanted`` says in the message what the argument ``name`` must be.
    """
    try:
        # Elements of a mask of torch are integers to Python.
        if not isinstance(value, bool) and not str(getattr(value, "dtype", "")).endswith("bool"):
            return operator.index(value)
    except TypeError:
        pass
    raise TypeError(f"{name} is {value!r}, a {type(value).__name__}; it must be {wanted}")


def integers(values: Iterable[Any], name: str) -> list[int]:
    """Integers of any kind as Python's own. Anything else in the argument ``name`` raises ``TypeError``."""
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} is {values!r}; it must be a sequence of integers")
    return [checked_integer(value, f"{name}[{i}]") for i, value in enumerate(values)]


def checked_number(value: Any, name: str) -> float:
    """A number of any kind as Python's ``float``. Anything else, also a list of numbers, raises ``TypeError``."""
    try:
        if not isinstance(value, str | bool):
            return float(value)
    except (TypeError, ValueError, RuntimeError):  # RuntimeError: a tensor of several numbers
        pass
    raise TypeError(f"{name} is {value!r:.80}, a {type(value).__name__}; it must be one number")


def checked_positive(value: Any, name: str) -> int:
    """The value as an integer of 1 or more.

    Raises:
        TypeError: If the value is not an integer.
        ValueError: If it is less than 1.
    """
    number = checked_integer(value, name)
    if number < 1:
        raise ValueError(f"{name} is {number}; it must be at least 1")
    return number


def checked_share(value: Any, name: str) -> float:
    """The value as a number from 0 to 1.

    Raises:
        TypeError: If the value is not a number.
        ValueError: If it is out of range.
    """
    number = checked_number(value, name)
    if not 0 <= number <= 1:
        raise ValueError(f"{name} is {number}; it must be a number from 0 to 1")
    return float(number)


def numbers(values: Any, name: str) -> list[float]:
    """Numbers of any kind as Python's ``float``. Anything else in the argument ``name`` raises ``TypeError``."""
    if isinstance(values, str) or not hasattr(values, "__iter__"):
        raise TypeError(f"{name} is {values!r}; it must be a sequence of numbers, such as [0.1, 0.3]")
    return [checked_number(value, f"{name}[{i}]") for i, value in enumerate(values)]


def is_range(value: Any) -> bool:
    """Whether a value is a pair of integers, such as ``(0, 4)``."""
    if not hasattr(value, "__len__"):  # an iterator would be empty afterwards
        return False
    try:
        numbers = [checked_integer(number, "") for number in value]
    except (TypeError, ValueError):
        return False
    return len(numbers) == 2


def items_of(values: Any, kind: type[_T], name: str, example: str) -> tuple[_T, ...]:
    """The values of the argument ``name`` as a tuple of ``kind``. Anything else raises ``TypeError``.

    ``example`` is an item as the user would write it, for the message.
    """
    wanted = f"it must be a list of {kind.__name__}, such as [{example}]"
    if isinstance(values, str | kind) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is {values!r:.80}, a {type(values).__name__}; {wanted}")
    items = tuple(cast("Iterable[Any]", values))
    for i, item in enumerate(items):
        if not isinstance(item, kind):
            raise TypeError(f"{name}[{i}] is {item!r:.80}, a {type(item).__name__}; {wanted}")
    return items


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
