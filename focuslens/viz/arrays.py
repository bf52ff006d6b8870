"""Checks of what is handed to a figure or view, with messages that name the argument."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

__all__ = ["as_array", "as_arrays", "require_kind"]


def as_array(values: Any, name: str, axes: str, example: str = "") -> np.ndarray:
    """The argument ``name`` as an array of numbers. It may be an array, a tensor on any device, or nested lists.

    Args:
        values: The argument.
        name: Its name, for messages.
        axes: Names of its axes, such as ``layer head``.
        example: What the user may have meant, for messages.

    Raises:
        TypeError: If the values are no numbers.
        ValueError: If they have another number of axes.
    """
    wanted = f"it must be an array or a tensor of numbers [{axes}]" + f", {example}" * bool(example)
    if isinstance(values, Tensor):
        values = values.detach().cpu()
        values = (values.double() if values.is_floating_point() else values).numpy()
    try:
        array = np.asarray(values)
    except ValueError:  # lists of different lengths
        array = np.asarray(None)
    if array.dtype.kind not in "biuf":
        raise TypeError(f"{name} is a {type(values).__name__}; {wanted}")
    if array.ndim != len(axes.split()):
        raise ValueError(f"{name} has the shape {array.shape}; {wanted}")
    return array


def as_arrays(values: Any, name: str, axes: str) -> dict[str, np.ndarray]:
    """The argument ``name``, a mapping from names to arrays, with the values of :func:`as_array`.

    Raises:
        TypeError: If it is no mapping, or a value in it is no array of numbers.
        ValueError: If a value has another number of axes.
    """
    require_kind(values, Mapping, name, f"{{'name': [{axes}]}}")
    return {label: as_array(value, f"{name}[{label!r}]", axes) for label, value in values.items()}


def require_kind(value: Any, kind: type[Any] | tuple[type[Any], ...], name: str, example: str) -> None:
    """Raise ``TypeError`` unless the argument ``name`` is of a kind. ``example`` says how the user gets one."""
    if not isinstance(value, kind):
        names = " or ".join(one.__name__ for one in (kind if isinstance(kind, tuple) else (kind,)))
        raise TypeError(f"{name} is a {type(value).__name__}; it must be a {names}: {example}")
