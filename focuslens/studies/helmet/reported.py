"""The paper's own tables of HELMET (2 and 4 to 13), to stand beside what is measured here."""

from __future__ import annotations

import csv
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

__all__ = ["ReportedRow", "reported_rows"]

_FOLDER = Path(__file__).parent / "paper_tables"


@dataclass(frozen=True)
class ReportedRow:
    """One line of one of the paper's tables.

    Attributes:
        source: The table.
        length: Tokens.
        model: As the paper calls it, without its owner.
        setting: ``baseline`` or ``HEADS_ALPHA``; empty in the tables of sink scores.
        values: By column, those that the table has.
    """

    source: str
    length: int
    model: str
    setting: str
    values: Mapping[str, float]


def reported_rows() -> list[ReportedRow]:
    """All lines of all tables.

    Raises:
        FileNotFoundError: If the files are not there.
    """
    if not _FOLDER.is_dir():
        raise FileNotFoundError(f"the paper's tables are not in {_FOLDER}; reinstall focuslens")
    rows: list[ReportedRow] = []
    for path in sorted(_FOLDER.glob("table_*.csv")):
        with path.open(newline="") as file:
            for row in csv.DictReader(file):
                named = {name: row.pop(name, "") for name in ("source", "length", "model", "setting")}
                values = {column: float(value) for column, value in row.items() if value}
                rows.append(
                    ReportedRow(named["source"], int(named["length"]), named["model"], named["setting"], values)
                )
    return rows
