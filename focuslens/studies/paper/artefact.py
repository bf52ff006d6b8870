"""Artefacts of a reproduction, and their files, which are written atomically and record their origin."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import matplotlib.pyplot as plt
import numpy as np
from jaxtyping import Shaped
from matplotlib.axes import Axes

from focuslens.evaluation import Interval
from focuslens.util.files import write_csv, write_json
from focuslens.util.html import Cell
from focuslens.viz import Curve, save_figure
from focuslens.viz.report import Table

__all__ = [
    "Artefact",
    "Finding",
    "Piece",
    "Verdict",
    "all_of",
    "keep_curves",
    "keep_figure",
    "keep_heads",
    "load_artefact",
    "save_artefact",
    "signed",
    "verdict_below",
    "verdict_by",
]

Verdict: TypeAlias = Literal["holds", "does not hold", "cannot be told", ""]
"""Verdict on a finding of the paper; empty for a sentence that is not a finding of the paper."""


def verdict_by(value: Interval, above: float = 0.0) -> Verdict:
    """Verdict on the claim that a value is above a limit, from the interval of the value."""
    return "holds" if value.low > above else "does not hold" if value.high < above else "cannot be told"


def verdict_below(value: Interval, limit: float) -> Verdict:
    """Verdict on the claim that a value is below a limit, from the interval of the value."""
    return "holds" if value.high < limit else "does not hold" if value.low > limit else "cannot be told"


def all_of(*verdicts: Verdict) -> Verdict:
    """Verdict on a finding with several claims. The finding holds if all claims hold, and fails if one claim fails."""
    if "does not hold" in verdicts:
        return "does not hold"
    return "cannot be told" if "cannot be told" in verdicts else "holds"


def signed(change: Interval, digits: int = 3) -> str:
    """Text of a change and its interval, with signs. A number that rounds to zero is ``0``."""
    texts = (f"{number:+.{digits}f}" for number in (change.mean, change.low, change.high))
    mean, low, high = (text if float(text) else "0" for text in texts)
    return f"{mean} [{low}, {high}]"


@dataclass(frozen=True)
class Finding:
    """One sentence about the results, and the verdict on the paper's finding that it tests."""

    text: str
    verdict: Verdict = ""


@dataclass(frozen=True)
class Artefact:
    """One table or figure of the paper.

    Attributes:
        key: Name of the artefact on the command line, and name of its folder.
        title: Heading of the artefact.
        paper: The corresponding figures and tables of the paper.
        findings: Findings on the results, one sentence each.
        figures: Caption and file name of each picture, in the artefact's folder.
        tables: The tables. Each is also written as CSV.
        reported: The paper's own numbers for Llama-3.2-3B-Instruct, if its text has any.
    """

    key: str
    title: str
    paper: str
    findings: tuple[Finding, ...] = ()
    figures: tuple[tuple[str, str], ...] = ()
    tables: tuple[Table, ...] = ()
    reported: tuple[Table, ...] = field(default=())


@dataclass(frozen=True)
class Piece:
    """Findings, figures and tables of one subject of an artefact; see :class:`Artefact`."""

    findings: tuple[Finding, ...]
    figures: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...]


def keep_figure(axes: Axes, path: Path) -> None:
    """Write a figure and close it, because a reproduction draws dozens of figures."""
    save_figure(axes, path)
    plt.close(axes.get_figure(root=True))


def keep_curves(axes: Axes, path: Path, lines: Sequence[Curve], levels: Mapping[str, Interval] | None = None) -> None:
    """Write a figure of lines, and beside it a CSV file of the numbers, with columns named after the axes."""
    columns = ("line", axes.get_xlabel(), axes.get_ylabel(), "low", "high")
    rows: list[tuple[Cell, ...]] = [
        (name, "", level.mean, level.low, level.high) for name, level in (levels or {}).items()
    ]
    for line in lines:
        rows += [(line.label, *point) for point in zip(line.x, line.estimate, line.low, line.high, strict=True)]
    keep_figure(axes, path)
    write_csv(path.with_suffix(".csv"), columns, rows)


def keep_heads(axes: Axes, path: Path, columns: Mapping[str, Shaped[np.ndarray, "layer head"]]) -> None:
    """Write a map of all heads, and beside it a CSV file of the numbers, one row per head."""
    keep_figure(axes, path)
    places = np.ndindex(next(iter(columns.values())).shape)
    rows = [(*place, *(values[place].item() for values in columns.values())) for place in places]
    write_csv(path.with_suffix(".csv"), ("layer", "head", *columns), rows)


def save_artefact(folder: Path, artefact: Artefact, header: Mapping[str, Any]) -> None:
    """Write an artefact's tables as CSV and, last, ``artefact.json``, which marks the artefact as finished."""
    for place, table in enumerate(artefact.tables, start=1):
        write_csv(folder / f"table_{place}.csv", table.columns, table.rows)
    content = {
        "header": header,
        "key": artefact.key,
        "title": artefact.title,
        "paper": artefact.paper,
        "findings": [[finding.text, finding.verdict] for finding in artefact.findings],
        "figures": [list(figure) for figure in artefact.figures],
        "tables": [_to_json(table) for table in artefact.tables],
        "reported": [_to_json(table) for table in artefact.reported],
    }
    write_json(folder / "artefact.json", content)


def load_artefact(folder: Path, header: Mapping[str, Any]) -> Artefact | None:
    """The finished artefact in a folder; ``None`` if there is no artefact or it has a different header."""
    path = folder / "artefact.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    if content["header"] != json.loads(json.dumps(header)):
        return None
    return Artefact(
        content["key"],
        content["title"],
        content["paper"],
        tuple(Finding(text, verdict) for text, verdict in content["findings"]),
        tuple((caption, name) for caption, name in content["figures"]),
        tuple(_from_json(table) for table in content["tables"]),
        tuple(_from_json(table) for table in content["reported"]),
    )


def _to_json(table: Table) -> dict[str, Any]:
    return {"caption": table.caption, "columns": list(table.columns), "rows": [list(row) for row in table.rows]}


def _from_json(table: Mapping[str, Any]) -> Table:
    return Table(table["caption"], tuple(table["columns"]), tuple(tuple(row) for row in table["rows"]))
