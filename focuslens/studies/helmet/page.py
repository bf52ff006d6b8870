"""Measured tables in the paper's layout, as Markdown and HTML, with the paper's numbers below the measured numbers."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from html import escape
from pathlib import Path
from statistics import fmean

from focuslens.evaluation import Interval
from focuslens.studies.helmet.paper_values import ReportedRow
from focuslens.studies.helmet.tables import BASELINE, OVERALL, ComparedScore, LengthTable
from focuslens.studies.helmet.tasks import CATEGORIES, TASKS
from focuslens.viz.page import page
from focuslens.viz.report import CSS

__all__ = ["Grid", "GridCell", "grids_of", "markdown", "to_html"]

_CSS = """
body { max-width: 120rem }
h1 + p { max-width: 60rem }
table { font-size: .84rem; width: auto; min-width: min(100%, 34rem) }
th, td { padding: .3rem .45rem }
td.better { background: #0b7a4b22 } td.worse { background: #b0002022 }
td.better.certain { background: #0b7a4b55 } td.worse.certain { background: #b0002055 }
td.certain { font-weight: 700 }
td small { display: block; color: var(--soft); font-weight: 400; font-size: .72rem }
tr.reported td, tr.reported th { color: var(--soft); font-style: italic; font-weight: 400 }
tr.reported th { padding-left: 1.3rem }
tbody th { font-weight: 600; white-space: nowrap; border-bottom-width: 1px }
tbody th, thead th:first-child { position: sticky; left: 0; background: var(--paper) }
th.number { white-space: normal; vertical-align: bottom }
caption { caption-side: top; max-width: 60rem }
details { margin: 0 0 1.4rem }
summary { cursor: pointer; color: var(--key) }
"""
_SIGNS = {"better": "▲", "worse": "▼", "same": "=", "": ""}
_LEGEND = (
    "Settings have their names from the paper: baseline, or HEADS_ALPHA for directions of strength ALPHA on the best "
    "HEADS heads. ▲ is better and ▼ is worse than the baseline. Below the score are the difference and its 95 % "
    "bootstrap interval over questions; * marks an interval without zero. Numbers from the paper (arXiv 2503.23306) "
    "are in italics, without intervals."
)
_NAMED = 4
"""Maximum number of missing tasks that a caption names. With more, the caption counts the tasks of the run instead."""


@dataclass(frozen=True)
class GridCell:
    """One cell of a table: a number, a detail below the number, and the result of the comparison with the baseline."""

    text: str
    detail: str = ""
    mark: str = ""
    certain: bool = False


@dataclass(frozen=True)
class Grid:
    """One table of the page.

    Attributes:
        caption: Caption of the table.
        columns: Names of the columns, including the column of row labels.
        rows: For each row: the label, the cells, and whether the numbers are from the paper. A row from the paper
            follows the measured row of the same setting.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[str, tuple[GridCell, ...], bool], ...]


def grids_of(table: LengthTable, model: str, reported: Sequence[ReportedRow]) -> list[Grid]:
    """Tables of tasks, averages and sink scores at one length, with the paper's numbers for the same model.

    Args:
        table: The measured numbers.
        model: Name of the model. The part after the last slash selects the model's rows in the paper's tables.
        reported: All rows of the paper's tables.
    """
    own = [row for row in reported if row.length == table.length and row.model == Path(model).name]
    averages = [average for row in own if (average := _averages_over(row, table.tasks, own)) is not None]
    grids = [
        _grid(f"Tasks under {table.length:,} tokens{_cut(table)}", table, table.tasks, own),
        _grid(f"Averages under {table.length:,} tokens{_missing(table)}", table, table.averages, averages),
    ]
    if table.sinks:
        grids.append(_sink_grid(table, own))
    return grids


def _cut(table: LengthTable) -> str:
    parts = [f"{n} of {table.samples[task]} of {task}" for task, n in table.truncated.items()]
    return f" (HELMET cut the context of {', '.join(parts)})" if parts else ""


def _missing(table: LengthTable) -> str:
    absent = [task.name for task in TASKS if task.name not in table.tasks]
    if not absent:
        return ""
    if len(absent) == len(TASKS):
        return " (none of the paper's tasks was run)"
    if len(absent) <= _NAMED:
        return f" (over the tasks of this run, without {', '.join(absent)})"
    return f" (over the tasks of this run: {len(TASKS) - len(absent)} of the paper's {len(TASKS)})"


def _averages_over(row: ReportedRow, tasks: Sequence[str], rows: Sequence[ReportedRow]) -> ReportedRow | None:
    """The paper's averages over the tasks of this run, for one row of the paper's tables of tasks.

    If the run includes all tasks in the row, the averages are the paper's averages. Otherwise the averages over the
    run's tasks are computed from the row's numbers, in the same way as in the paper. Returns ``None`` if the row has no
    scores for tasks of this run.
    """
    categories = {task.name: task.category for task in TASKS if task.name in row.values}
    if not row.setting or not categories:
        return None
    if categories.keys() <= set(tasks):
        return next((other for other in rows if other.setting == row.setting and OVERALL in other.values), None)
    values: dict[str, float] = {}
    for category in CATEGORIES:
        scores = [row.values[task] for task, name in categories.items() if name == category and task in tasks]
        if scores:
            values[category] = fmean(scores)
    if not values:
        return None
    return replace(row, source=f"{row.source}, these tasks", values={**values, OVERALL: fmean(values.values())})


def _grid(caption: str, table: LengthTable, columns: Sequence[str], reported: Sequence[ReportedRow]) -> Grid:
    paper_rows = {
        row.setting: (f"{row.source}: {row.setting}", _given(row, columns, _baseline_of(row, reported)), True)
        for row in reported
        if row.setting and any(column in row.values for column in columns)
    }
    rows: list[tuple[str, tuple[GridCell, ...], bool]] = []
    for name in table.settings:
        rows.append((name, tuple(_cell(table.cells[name, column]) for column in columns), False))
        rows += [paper_rows.pop(name)] if name in paper_rows else []
    return Grid(caption, ("setting", *columns), (*rows, *paper_rows.values()))


def _sink_grid(table: LengthTable, reported: Sequence[ReportedRow]) -> Grid:
    columns = (*table.tasks, "STD")
    rows: list[tuple[str, tuple[GridCell, ...], bool]] = []
    for name in table.settings:
        std = table.sink_std(name)
        cells = [_level(table.sinks.get((name, task))) for task in table.tasks]
        rows.append((name, (*cells, GridCell("-" if std is None else f"{std:.2f}")), False))
    paper_rows = [(row.source, _given(row, columns), True) for row in reported if not row.setting]
    # The rows of the paper's sink scores follow the baseline, because the paper measures sinks without steering.
    place = table.settings.index(BASELINE) + 1 if BASELINE in table.settings else len(rows)
    rows[place:place] = paper_rows
    caption = f"Attention to the first two tokens, in percent, under {table.length:,} tokens (mean of the top heads)"
    return Grid(caption, ("setting", *columns), tuple(rows))


def _cell(score: ComparedScore) -> GridCell:
    change = score.difference
    if change is None:
        return _level(score.score)
    detail = f"{change.mean:+.2f} [{change.low:+.2f}, {change.high:+.2f}]"
    return GridCell(f"{score.score.mean:.2f}", detail, score.mark, score.certain)


def _level(level: Interval | None) -> GridCell:
    return GridCell("-") if level is None else GridCell(f"{level.mean:.2f}", f"[{level.low:.2f}, {level.high:.2f}]")


def _baseline_of(row: ReportedRow, reported: Sequence[ReportedRow]) -> ReportedRow | None:
    """Baseline row in the same table and for the same model as ``row``; ``None`` for baselines and sink scores."""
    if row.setting in ("", BASELINE):
        return None
    key = (row.source, row.length, row.model)
    same = (other for other in reported if (other.source, other.length, other.model) == key)
    return next((other for other in same if other.setting == BASELINE), None)


def _given(row: ReportedRow, columns: Sequence[str], baseline: ReportedRow | None = None) -> tuple[GridCell, ...]:
    """Cells with the paper's numbers and, if ``baseline`` is given, with the differences from the paper's baseline."""
    cells: list[GridCell] = []
    for column in columns:
        if column not in row.values:
            cells.append(GridCell("-"))
        elif baseline is None or column not in baseline.values:
            cells.append(GridCell(f"{row.values[column]:.2f}"))
        else:
            change = round(row.values[column] - baseline.values[column], 2)
            mark = "better" if change > 0 else "worse" if change < 0 else "same"
            cells.append(GridCell(f"{row.values[column]:.2f}", f"{change:+.2f}", mark))
    return tuple(cells)


def markdown(title: str, facts: Mapping[str, str], grids: Iterable[Grid]) -> str:
    """All tables as Markdown."""
    parts = [f"# {title}", "", _LEGEND, ""]
    for grid in grids:
        parts += [f"**{grid.caption}**", "", _line(grid.columns), _line(["---"] * len(grid.columns))]
        for label, cells, reported in grid.rows:
            parts.append(_line([f"*{label}*" if reported else label, *map(_markdown_cell, cells)]))
        parts.append("")
    parts += [f"- {name}: {value}" for name, value in facts.items()]
    return "\n".join(parts) + "\n"


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _markdown_cell(cell: GridCell) -> str:
    sign = f"{_SIGNS[cell.mark]}{'*' if cell.certain else ''}"
    return " ".join(part for part in (cell.text, cell.detail, sign) if part)


def to_html(
    title: str, facts: Mapping[str, str], grids: Iterable[Grid], reported: Sequence[ReportedRow], lengths: Sequence[int]
) -> str:
    """HTML page with the measured tables and the paper's tables for every model. The page opens from disk.

    Args:
        title: Title of the page.
        facts: Facts about the run by name, such as the model and the seed.
        grids: The measured tables.
        reported: All rows of the paper's tables.
        lengths: The measured lengths. The paper's tables at these lengths are initially expanded.
    """
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    body = [f"<h1>{escape(title)}</h1>", f"<p>{escape(_LEGEND)}</p>", "<section><h2>Measured</h2>"]
    body += [_table(grid) for grid in grids]
    body += ["</section>", "<section><h2>The paper's own tables</h2>"]
    paper_lengths = sorted({row.length for row in reported})
    unfolded = set(lengths) & set(paper_lengths) or set(paper_lengths[:1])
    for length in paper_lengths:
        opened = " open" if length in unfolded else ""
        tables = "".join(_table(grid) for grid in _paper_grids(reported, length))
        body.append(f"<details{opened}><summary>{length:,} tokens</summary>{tables}</details>")
    body += ["</section>", f'<section><h2>How it was made</h2><div class="card"><dl>{lines}</dl></div></section>']
    return page(title, "\n".join(body), css=CSS + _CSS)


def _paper_grids(reported: Sequence[ReportedRow], length: int) -> list[Grid]:
    """The paper's tables at one length."""
    order = [*(task.name for task in TASKS), *CATEGORIES, OVERALL, "STD"]
    sources: dict[str, list[ReportedRow]] = {}
    for row in reported:
        if row.length == length:
            sources.setdefault(row.source, []).append(row)
    grids: list[Grid] = []
    for source, group in sorted(sources.items(), key=lambda item: int(item[0].split()[1])):  # by number, not by name
        columns = sorted({column for row in group for column in row.values}, key=order.index)
        rows = [
            (f"{row.model} {row.setting}".strip(), _given(row, columns, _baseline_of(row, group)), True)
            for row in group
        ]
        content = "sink scores in percent" if "STD" in columns else "averages" if OVERALL in columns else "tasks"
        grids.append(Grid(f"{source} of arXiv 2503.23306: {content}", ("model and setting", *columns), tuple(rows)))
    return grids


def _table(grid: Grid) -> str:
    first, *others = grid.columns
    head = f"<th>{escape(first)}</th>" + "".join(f'<th class="number">{escape(column)}</th>' for column in others)
    has_measured = not all(reported for *_, reported in grid.rows)
    rows = "\n".join(
        _row(label, cells, "reported" if reported and has_measured else "") for label, cells, reported in grid.rows
    )
    caption = f"<caption>{escape(grid.caption)}</caption>"
    return f'<div class="scroll"><table>{caption}<thead><tr>{head}</tr></thead><tbody>\n{rows}\n</tbody></table></div>'


def _row(label: str, cells: Sequence[GridCell], name: str) -> str:
    kind = f' class="{name}"' if name else ""
    return f"<tr{kind}><th>{escape(label)}</th>{''.join(map(_html_cell, cells))}</tr>"


def _html_cell(cell: GridCell) -> str:
    names = " ".join(["number", *([cell.mark] if cell.mark in ("better", "worse") else [])])
    names += " certain" if cell.certain else ""
    sign = f" {_SIGNS[cell.mark]}{'*' if cell.certain else ''}" if cell.mark else ""
    detail = f"<small>{escape(cell.detail).replace(' [', '<br>[')}</small>" if cell.detail else ""
    return f'<td class="{names}">{escape(cell.text)}{escape(sign)}{detail}</td>'
