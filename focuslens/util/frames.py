"""Results as pandas data frames in long form: one row per observation, named columns, and their units."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["DIFFERENCE", "SHARE", "UNITS", "long_frame", "rows_frame", "stacked_frames"]

UNITS = "units"
"""Key of the units, by column, in the ``attrs`` of a data frame."""

SHARE = "share of attention, 0 to 1"
"""Unit of attention."""

DIFFERENCE = "difference of shares of attention, -1 to 1"
"""Unit of attention above that of even attention."""


def rows_frame(
    rows: Iterable[Mapping[str, Any]], units: Mapping[str, str], columns: Sequence[str] | None = None
) -> pd.DataFrame:
    """Data frame of rows, with the unit of each measured column in ``attrs["units"]``.

    Args:
        rows: The rows, by column.
        units: Unit of each column with a measured number.
        columns: Columns of a table that may have no rows; by default those of the rows.
    """
    import pandas as pd

    frame = pd.DataFrame(list(rows), columns=None if columns is None else list(columns))
    return _with_units(frame, units)


def long_frame(axes: Mapping[str, Sequence[Any]], values: Mapping[str, Any], units: Mapping[str, str]) -> pd.DataFrame:
    """Data frame with one row per element of arrays: the labels of the element, and its value in each array.

    Args:
        axes: Labels along each axis of the arrays, by column.
        values: Arrays or tensors of one shape, by column.
        units: Unit of each array.

    Raises:
        ValueError: If an array does not have one element per combination of labels.
    """
    import pandas as pd

    shape = tuple(len(labels) for labels in axes.values())
    columns: dict[str, Any] = {}
    for axis, (name, labels) in enumerate(axes.items()):
        inner, outer = math.prod(shape[axis + 1 :]), math.prod(shape[:axis])
        columns[name] = np.tile(np.repeat(_column(labels), inner), outer)
    for name, array in values.items():
        flat = np.asarray(array)
        if flat.shape != shape:
            raise ValueError(f"{name} has the shape {flat.shape}; with these labels it must be {shape}")
        columns[name] = flat.reshape(-1)
    return _with_units(pd.DataFrame(columns), units)


def stacked_frames(frames: Sequence[pd.DataFrame], units: Mapping[str, str]) -> pd.DataFrame:
    """One or more frames with the same columns below each other, such as one frame per sample."""
    import pandas as pd

    return _with_units(pd.concat(frames, ignore_index=True), units)


def _column(labels: Sequence[Any]) -> Any:
    """Labels as an array. Texts and missing values stay Python objects, as in any other data frame."""
    array = np.empty(len(labels), dtype=object)
    array[:] = list(labels)
    numeric = all(isinstance(label, int | float | bool) for label in labels)
    return np.asarray(list(labels)) if numeric and len(labels) else array


def _with_units(frame: pd.DataFrame, units: Mapping[str, str]) -> pd.DataFrame:
    frame.attrs[UNITS] = {name: unit for name, unit in units.items() if name in frame.columns}
    return frame
