"""The paper's own tables of HELMET (2 and 4 to 13), for comparison with the measured numbers."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ReportedRow", "reported_rows"]

_FOLDER = Path(__file__).parent / "paper_tables"
_FIELDS = ("source", "length", "model", "setting")


@dataclass(frozen=True)
class ReportedRow:
    """One row of one of the paper's tables.

    Attributes:
        source: The table.
        length: Context length in tokens.
        model: The paper's name of the model, without its owner.
        setting: ``baseline`` or ``HEADS_ALPHA``; empty in the tables of sink scores.
        values: The table's numbers by column.
    """

    source: str
    length: int
    model: str
    setting: str
    values: Mapping[str, float]


def reported_rows() -> list[ReportedRow]:
    """All rows of all tables.

    Raises:
        FileNotFoundError: If the files are missing.
    """
    if not _FOLDER.is_dir():
        raise FileNotFoundError(f"the paper's tables are not in {_FOLDER}; reinstall focuslens")
    rows: list[ReportedRow] = []
    for path in sorted(_FOLDER.glob("table_*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                source, length, model, setting = (row.pop(name, "") for name in _FIELDS)
                values = {column: float(value) for column, value in row.items() if value}
                rows.append(ReportedRow(source, int(length), model, setting, values))
    return rows
