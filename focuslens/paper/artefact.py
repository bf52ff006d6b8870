"""What a reproduction leaves behind: artefacts on disk, whole or not at all, each with what made it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeAlias

import matplotlib.pyplot as plt
from matplotlib.axes import Axes

from focuslens.evaluation import Interval
from focuslens.files import write_csv, write_json
from focuslens.viz import save_figure
from focuslens.viz.report import Table

__all__ = [
    "Artefact",
    "Finding",
    "Verdict",
    "keep_figure",
    "load_artefact",
    "save_artefact",
    "verdict_by",
    "write_csv",
]

Verdict: TypeAlias = Literal["holds", "does not hold", "cannot be told", ""]
"""Whether a finding of the paper is seen here; empty where the sentence is no such finding."""


def verdict_by(change: Interval) -> Verdict:
    """Whether something that should be above zero is, by its interval."""
    return "holds" if change.low > 0 else "does not hold" if change.high < 0 else "cannot be told"


@dataclass(frozen=True)
class Finding:
    """One sentence about what came out, and whether a finding of the paper is seen in it."""

    text: str
    verdict: Verdict = ""


@dataclass(frozen=True)
class Artefact:
    """One table or figure of the paper.

    Attributes:
        key: Its folder, and its name on the command line.
        title: What it shows.
        paper: Which figures and tables of the paper it stands for.
        findings: What came out.
        figures: Caption and file name of each picture, in the artefact's folder.
        tables: The numbers; each is written as CSV too.
        reported: The paper's own figures for Llama-3.2-3B-Instruct, where its text gives any.
    """

    key: str
    title: str
    paper: str
    findings: tuple[Finding, ...] = ()
    figures: tuple[tuple[str, str], ...] = ()
    tables: tuple[Table, ...] = ()
    reported: tuple[Table, ...] = field(default=())


def keep_figure(axes: Axes, path: Path) -> None:
    """Write a figure, and let it go: a reproduction draws dozens."""
    save_figure(axes, path)
    plt.close(axes.get_figure(root=True))


def save_artefact(folder: Path, artefact: Artefact, header: Mapping[str, Any]) -> None:
    """Write an artefact's tables as CSV and, last, ``artefact.json``, which says that it is finished."""
    for place, table in enumerate(artefact.tables, start=1):
        write_csv(folder / f"table_{place}.csv", table.columns, table.rows)
    content = {
        "header": header,
        "key": artefact.key,
        "title": artefact.title,
        "paper": artefact.paper,
        "findings": [[one.text, one.verdict] for one in artefact.findings],
        "figures": [list(one) for one in artefact.figures],
        "tables": [_to_json(table) for table in artefact.tables],
        "reported": [_to_json(table) for table in artefact.reported],
    }
    write_json(folder / "artefact.json", content)


def load_artefact(folder: Path, header: Mapping[str, Any]) -> Artefact | None:
    """An artefact that was finished under the same header; ``None`` where there is none."""
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
