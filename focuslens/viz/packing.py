"""Attention rows in few bytes: what a page of some thousand tokens and twenty heads can hold."""

from __future__ import annotations

from base64 import b64encode
from dataclasses import dataclass

import numpy as np
from jaxtyping import Float, UInt8, UInt16, UInt32

__all__ = ["PackedRows", "pack_rows"]

_SCALE = 65535
_LONGEST_STEP = 255


@dataclass(frozen=True, eq=False)
class PackedRows:
    """Rows of shares, sparse: the largest entries of each, in order of their columns.

    An entry is a step from the column before it (from -1 in the first) and a value in 65,535ths. A value of 0 is there
    to take a step longer than 255.

    Attributes:
        counts: Entries of each row.
        steps: Of all rows, one after the other.
        values: Of each entry.
        kept: The least share of its sum that any row kept.
    """

    counts: UInt32[np.ndarray, "row"]
    steps: UInt8[np.ndarray, "entry"]
    values: UInt16[np.ndarray, "entry"]
    kept: float

    def to_json(self) -> dict[str, str]:
        """The arrays in base 64, little-endian."""
        return {
            "counts": b64encode(self.counts.astype("<u4").tobytes()).decode(),
            "steps": b64encode(self.steps.tobytes()).decode(),
            "values": b64encode(self.values.astype("<u2").tobytes()).decode(),
        }


def pack_rows(rows: Float[np.ndarray, "row column"], most_bytes: int) -> PackedRows:
    """The largest entries of each row: so many that all rows together take ``most_bytes`` in base 64, or all.

    Args:
        rows: Shares between 0 and 1.
        most_bytes: The size that is aimed at; a row keeps at least eight entries.
    """
    n_rows, n_columns = rows.shape
    quota = min(n_columns, max(8, most_bytes // (4 * n_rows)))  # three bytes an entry are four characters
    levels = np.round(np.clip(rows, 0, 1) * _SCALE).astype(np.int64)
    counts, steps, values = [], [], []
    kept = 1.0
    for row in levels:
        columns = np.flatnonzero(row)
        if len(columns) > quota:
            columns = np.sort(columns[np.argpartition(row[columns], -quota)[-quota:]])
        own_steps, own_values = _entries(columns, row[columns])
        counts.append(len(own_steps))
        steps.append(own_steps)
        values.append(own_values)
        kept = min(kept, float(row[columns].sum() / row.sum()) if row.any() else 1.0)
    return PackedRows(np.array(counts, np.uint32), np.concatenate(steps), np.concatenate(values), kept)


def _entries(columns: np.ndarray, levels: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Steps and values of one row, long steps in several."""
    steps = np.diff(columns, prepend=-1)
    fillers = (steps - 1) // _LONGEST_STEP
    places = np.cumsum(1 + fillers) - 1
    all_steps = np.full(int((1 + fillers).sum()), _LONGEST_STEP, np.uint8)
    all_values = np.zeros(len(all_steps), np.uint16)
    all_steps[places] = steps - fillers * _LONGEST_STEP
    all_values[places] = levels
    return all_steps, all_values
