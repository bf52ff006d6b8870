"""A report that is one HTML file: it opens from disk, on a phone as well, in light and dark, without a network."""

from __future__ import annotations

from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TypeAlias

from focuslens.files import write_atomically
from focuslens.viz.page import inner_page, page
from focuslens.viz.view import AttentionView

__all__ = ["CSS", "Cell", "Table", "figure_html", "table_html", "write_report"]

Cell: TypeAlias = str | int | float
"""What a table holds. Numbers are set right-aligned, floats with three decimals; for others give the text."""

_PNG = b"\x89PNG\r\n\x1a\n"
CSS = """
:root { color-scheme: light dark;
        --ink: #16202a; --soft: #56626e; --paper: #fbfbf9; --card: #fff; --line: #dfe3e7; --key: #0b5fa5 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e4e8ec; --soft: #9ba7b3; --paper: #12161a; --card: #1a2026; --line: #333c45; --key: #7ab8f0 } }
* { box-sizing: border-box }
body { margin: 0 auto; max-width: 60rem; padding: 1.5rem 1rem 4rem; background: var(--paper); color: var(--ink);
       font: 16px/1.55 system-ui, -apple-system, "Segoe UI", sans-serif; overflow-wrap: anywhere }
h1 { font-size: 1.7rem; line-height: 1.2; margin: 0 0 1rem; text-wrap: balance }
h2 { font-size: 1.15rem; margin: 2.4rem 0 .7rem; padding-top: .5rem; border-top: 3px solid var(--key) }
.findings { margin: 0; padding-left: 1.2rem; font-size: 1.05rem }
.findings li { margin: .35rem 0 }
.card { background: var(--card); border: 1px solid var(--line); border-radius: 8px;
        padding: .8rem; margin: 0 0 1.2rem }
dl { display: grid; grid-template-columns: minmax(7rem, max-content) 1fr; gap: .25rem 1rem;
     margin: 0; font-size: .92rem }
dt { color: var(--soft) }
dd { margin: 0 }
figure { margin: 0 0 1.6rem }
figure img { display: block; max-width: 100%; height: auto; background: #fff;
             border: 1px solid var(--line); border-radius: 8px }
figcaption, caption { color: var(--soft); font-size: .92rem; text-align: left; padding: .4rem 0 }
.scroll { overflow-x: auto; margin: 0 0 1.4rem }
table { border-collapse: collapse; width: 100%; font-size: .92rem;
        font-variant-numeric: tabular-nums; overflow-wrap: normal }
th, td { padding: .3rem .6rem; border-bottom: 1px solid var(--line); text-align: left; vertical-align: top }
th { color: var(--soft); font-weight: 600; border-bottom-width: 2px }
.number { text-align: right; white-space: nowrap }
@media (max-width: 34rem) { dl { grid-template-columns: 1fr } dd { margin-bottom: .4rem } }
"""


@dataclass(frozen=True)
class Table:
    """A table of a report.

    Args:
        caption: What it shows, with the units.
        columns: Names of the columns.
        rows: The lines, each with a cell for every column.

    Raises:
        ValueError: If a row has not one cell for each column.
    """

    caption: str
    columns: tuple[str, ...]
    rows: tuple[tuple[Cell, ...], ...]

    def __post_init__(self) -> None:
        for index, row in enumerate(self.rows):
            if len(row) != len(self.columns):
                raise ValueError(
                    f"row {index} of table {self.caption!r} has {len(row)} cells "
                    f"for {len(self.columns)} columns: {row!r}"
                )


def write_report(
    path: str | Path,
    *,
    title: str,
    facts: Mapping[str, str],
    findings: Sequence[str],
    tables: Sequence[Table] = (),
    figures: Sequence[tuple[str, str | Path]] = (),
    views: Sequence[tuple[str, AttentionView]] = (),
) -> Path:
    """Write a report with everything in it, whole or not at all, and return its path.

    All text is taken as plain text.

    Args:
        path: The file to write, ``report.html`` by custom.
        title: What was run.
        facts: Model, data, settings, seed, versions: what a reader needs in order to repeat it.
        findings: What came out, a sentence each; they stand first.
        tables: The numbers.
        figures: Caption and PNG file of each figure; the files are copied into the report.
        views: Caption and view of each interactive picture.

    Raises:
        FileNotFoundError: If a figure's file does not exist.
        ValueError: If it is not a PNG.
    """
    path = Path(path)
    items = "".join(f"<li>{escape(text)}</li>" for text in findings)
    sections = [
        f"<h1>{escape(title)}</h1>",
        _section("Findings", [f'<ul class="findings">{items}</ul>'] if findings else []),
        _section("Figures", [figure_html(caption, Path(file)) for caption, file in figures]),
        _section("Numbers", [table_html(table) for table in tables]),
        _section("Attention", [_view(caption, view) for caption, view in views]),
        _section("How it was made", [_facts(facts)] if facts else []),
    ]
    write_atomically(path, page(title, "\n".join(filter(None, sections)), css=CSS).encode())
    return path


def _section(heading: str, parts: Sequence[str]) -> str:
    return f"<section>\n<h2>{heading}</h2>\n" + "\n".join(parts) + "\n</section>" if parts else ""


def _facts(facts: Mapping[str, str]) -> str:
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f'<div class="card"><dl>{lines}</dl></div>'


def table_html(table: Table) -> str:
    """A table, which scrolls sideways where the page is too narrow for it."""
    numeric = [all(not isinstance(row[place], str) for row in table.rows) for place in range(len(table.columns))]
    head = _line("th", table.columns, numeric)
    body = "\n".join(_line("td", row, [not isinstance(cell, str) for cell in row]) for row in table.rows)
    caption = f"<caption>{escape(table.caption)}</caption>"
    return f'<div class="scroll"><table>{caption}<thead>{head}</thead><tbody>\n{body}\n</tbody></table></div>'


def _line(tag: str, cells: Sequence[Cell], numeric: Sequence[bool]) -> str:
    texts = [f"{cell:.3f}" if isinstance(cell, float) else escape(str(cell)) for cell in cells]
    classes = [' class="number"' if right else "" for right in numeric]
    return "<tr>" + "".join(f"<{tag}{c}>{text}</{tag}>" for c, text in zip(classes, texts, strict=True)) + "</tr>"


def figure_html(caption: str, file: Path) -> str:
    """A PNG with its caption, the picture within the page itself.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If it is not a PNG.
    """
    content = file.read_bytes()
    if not content.startswith(_PNG):
        raise ValueError(f"figure {file} is not a PNG; write it with save_figure")
    text = escape(caption)
    data = b64encode(content).decode()
    return f'<figure><img alt="{text}" src="data:image/png;base64,{data}"><figcaption>{text}</figcaption></figure>'


def _view(caption: str, view: AttentionView) -> str:
    frame = inner_page(view.html, title=view.title, height=view.height)
    return f'<figure><div class="card">{frame}</div><figcaption>{escape(caption)}</figcaption></figure>'
