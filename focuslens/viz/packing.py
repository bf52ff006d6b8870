"""Compact encoding of attention rows, for pages with a few thousand tokens and twenty heads."""

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
    """Sparse rows of attention shares: the largest entries of each row, in column order.

    An entry consists of a step and a value. The step is the distance from the previous entry's column, or from column
    -1 for the first entry of a row. The value is the share times 65,535, rounded. A step longer than 255 is split into
    several entries. Only the last entry of a split step has a nonzero value.

    Attributes:
        counts: Number of entries per row.
        steps: Steps of all entries, row by row.
        values: Values of all entries, row by row.
        kept: Fraction of a row's sum that its entries retain, as the minimum over all rows.
    """

    counts: UInt32[np.ndarray, "row"]
    steps: UInt8[np.ndarray, "entry"]
    values: UInt16[np.ndarray, "entry"]
    kept: float

    def to_json(self) -> dict[str, str]:
        """Counts, steps and values as base64 strings of little-endian integers."""
        return {
            "counts": b64encode(self.counts.astype("<u4").tobytes()).decode(),
            "steps": b64encode(self.steps.tobytes()).decode(),
            "values": b64encode(self.values.astype("<u2").tobytes()).decode(),
        }


def pack_rows(rows: Float[np.ndarray, "row column"], most_bytes: int) -> PackedRows:
    """Keep the largest entries of each row, as many as fit into ``most_bytes`` after base64 encoding.

    Args:
        rows: Shares between 0 and 1.
        most_bytes: Target size of all rows together, in bytes. Each row can keep eight entries even if the rows then
            exceed this size.
    """
    n_rows, n_columns = rows.shape
    quota = min(n_columns, max(8, most_bytes // (4 * n_rows)))  # an entry has 3 bytes, or 4 base64 characters
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
    """Steps and values of one row, with steps above 255 split into several entries."""
    steps = np.diff(columns, prepend=-1)
    fillers = (steps - 1) // _LONGEST_STEP
    places = np.cumsum(1 + fillers) - 1
    all_steps = np.full(int((1 + fillers).sum()), _LONGEST_STEP, np.uint8)
    all_values = np.zeros(len(all_steps), np.uint16)
    all_steps[places] = steps - fillers * _LONGEST_STEP
    all_values[places] = levels
    return all_steps, all_values
