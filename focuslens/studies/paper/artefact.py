"""Artefacts of a reproduction, and their files, written atomically. ``artefact.json`` records an artefact's origin."""

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
from focuslens.util.refused_runs import same_run
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
"""Verdict on a claim of the paper; empty for a finding that tests no claim of the paper."""


def verdict_by(value: Interval, above: float = 0.0) -> Verdict:
    """Verdict on the claim that a value exceeds the limit ``above``. The value's interval decides."""
    return "holds" if value.low > above else "does not hold" if value.high < above else "cannot be told"


def verdict_below(value: Interval, limit: float) -> Verdict:
    """Verdict on the claim that a value is less than ``limit``. The value's interval decides."""
    return "holds" if value.high < limit else "does not hold" if value.low > limit else "cannot be told"


def all_of(*verdicts: Verdict) -> Verdict:
    """Verdict on a finding with several claims, from the verdicts on the claims.

    A finding holds if all claims hold, and does not hold if any claim does not hold. Otherwise it ``cannot be told``.
    """
    if "does not hold" in verdicts:
        return "does not hold"
    return "cannot be told" if "cannot be told" in verdicts else "holds"


def signed(change: Interval, digits: int = 3) -> str:
    """Format a change and its interval with signs. A number that rounds to zero becomes ``0``."""
    texts = (f"{number:+.{digits}f}" for number in (change.mean, change.low, change.high))
    mean, low, high = (text if float(text) else "0" for text in texts)
    return f"{mean} [{low}, {high}]"


@dataclass(frozen=True)
class Finding:
    """Statement about the results, and the verdict on the paper's claim, if the statement tests a claim."""

    text: str
    verdict: Verdict = ""


@dataclass(frozen=True)
class Artefact:
    """Reproduction of one or more tables and figures of the paper, or an analysis beyond the paper.

    Attributes:
        key: Name of the artefact on the command line, and name of its folder.
        title: Heading of the artefact.
        paper: Corresponding figures and tables of the paper, such as ``Figure 9``, or ``beyond the paper``.
        findings: Findings on the results.
        figures: Caption and file name of each picture. The pictures are in the artefact's folder.
        tables: Tables of results. Each table is also written as a CSV file.
        reported: Tables of the paper's numbers for Llama-3.2-3B-Instruct; empty if the paper gives no numbers.
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
    """Part of an artefact: the findings, figures and tables on one topic, in the form of :class:`Artefact`."""

    findings: tuple[Finding, ...]
    figures: tuple[tuple[str, str], ...]
    tables: tuple[Table, ...]


def keep_figure(axes: Axes, path: Path) -> None:
    """Write a figure and close it to free memory. A reproduction draws dozens of figures."""
    save_figure(axes, path)
    plt.close(axes.get_figure(root=True))


def keep_curves(axes: Axes, path: Path, lines: Sequence[Curve], levels: Mapping[str, Interval] | None = None) -> None:
    """Write a figure of curves and horizontal lines, and a CSV file of their numbers in the same folder.

    Args:
        axes: Axes of the figure. Their labels become column names of the CSV file.
        path: Path of the figure. The CSV file has the same name with the suffix ``.csv``.
        lines: The curves.
        levels: Heights of the horizontal lines, by label.
    """
    columns = ("line", axes.get_xlabel(), axes.get_ylabel(), "low", "high")
    rows: list[tuple[Cell, ...]] = [
        (name, "", level.mean, level.low, level.high) for name, level in (levels or {}).items()
    ]
    for line in lines:
        rows += [(line.label, *point) for point in zip(line.x, line.estimate, line.low, line.high, strict=True)]
    keep_figure(axes, path)
    write_csv(path.with_suffix(".csv"), columns, rows)


def keep_heads(axes: Axes, path: Path, columns: Mapping[str, Shaped[np.ndarray, "layer head"]]) -> None:
    """Write a map of all heads, and a CSV file in the same folder with one row per head.

    Args:
        axes: Axes of the map.
        path: Path of the map. The CSV file has the same name with the suffix ``.csv``.
        columns: Values per head, by column name of the CSV file.
    """
    keep_figure(axes, path)
    places = np.ndindex(next(iter(columns.values())).shape)
    rows = [(*place, *(values[place].item() for values in columns.values())) for place in places]
    write_csv(path.with_suffix(".csv"), ("layer", "head", *columns), rows)


def save_artefact(folder: Path, artefact: Artefact, header: Mapping[str, Any]) -> None:
    """Write an artefact's tables as CSV files, and then ``artefact.json``, which marks the artefact as finished."""
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
    """Load the finished artefact in a folder.

    Returns ``None`` if there is none with this header, or if one of its pictures or CSV files is gone.
    """
    path = folder / "artefact.json"
    if not path.is_file():
        return None
    content = json.loads(path.read_text())
    files = [name for _, name in content["figures"]]
    files += [f"table_{place}.csv" for place in range(1, len(content["tables"]) + 1)]
    if not same_run(content["header"], header) or not all((folder / name).is_file() for name in files):
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
