"""HELMET results in the paper (Tables 2 and 4 to 13), for comparison with measured numbers."""

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
    """One row of a table in the paper.

    Attributes:
        source: Name of the table, such as ``Table 4``.
        length: Context length in tokens.
        model: The paper's name for the model, without the owner on the hub.
        setting: ``baseline`` or ``HEADS_ALPHA``; empty in the tables of sink scores.
        values: Numbers of the row, by column.
    """

    source: str
    length: int
    model: str
    setting: str
    values: Mapping[str, float]


def reported_rows() -> list[ReportedRow]:
    """All rows of the paper's HELMET tables, read from the package's CSV files.

    Raises:
        FileNotFoundError: If the folder of CSV files is missing.
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
