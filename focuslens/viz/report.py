"""A report that is one HTML file: it opens from disk, on a phone as well, in light and dark, without a network."""

from __future__ import annotations

import re
from base64 import b64encode
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from urllib.parse import quote

from focuslens.util.files import write_atomically
from focuslens.util.html import Cell
from focuslens.viz.page import asset, inner_page, page
from focuslens.viz.view import AttentionView

__all__ = [
    "CSS",
    "Figure",
    "Section",
    "Table",
    "figure_html",
    "link_html",
    "table_html",
    "write_report",
    "write_sections",
]

CSS = asset("report.css")
"""The style sheet of reports."""

_PNG = b"\x89PNG\r\n\x1a\n"
_LONG = 24
"""Rows from which on a table scrolls within its place."""


@dataclass(frozen=True)
class Table:
    """A table of a report; on the page its columns sort.

    Args:
        caption: What it shows, with the units.
        columns: Names of the columns.
        rows: The lines, each with a cell for every column. Floats have three decimals, or two significant digits where
            three decimals would be zero; give other numbers as text.

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


@dataclass(frozen=True)
class Figure:
    """A picture of a report.

    Args:
        caption: What it shows.
        file: A PNG, which is copied into the report.
        data: The file that holds its numbers, as the report is to link to it: relative to where the report lies.
    """

    caption: str
    file: Path
    data: str = ""


@dataclass(frozen=True)
class Section:
    """A part of a report.

    Args:
        key: Its name in addresses; letters, digits, hyphens and underscores.
        title: Its heading.
        findings: What came out, a sentence each; all sections' findings stand first in the report.
        figures: The pictures.
        tables: The numbers.
        views: Caption and view of each interactive picture.
        missing: What could not be shown, and why, a sentence each.
        links: Text and address of files that belong to it.
    """

    key: str
    title: str
    findings: tuple[str, ...] = ()
    figures: tuple[Figure, ...] = ()
    tables: tuple[Table, ...] = ()
    views: tuple[tuple[str, AttentionView], ...] = ()
    missing: tuple[str, ...] = ()
    links: tuple[tuple[str, str], ...] = ()

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_-]+", self.key):
            raise ValueError(
                f"the key of a section is {self.key!r}; it must be of letters, digits, hyphens and underscores"
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
    """Write a short report with everything in it, whole or not at all, and return its path.

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
    parts = [
        f"<h1>{escape(title)}</h1>",
        _section("Findings", [_findings(findings)] if findings else []),
        _section("Figures", [figure_html(caption, Path(file)) for caption, file in figures]),
        _section("Numbers", [table_html(table) for table in tables]),
        _section("Attention", [_view(caption, view) for caption, view in views]),
        _section("How it was made", [_facts(facts)] if facts else []),
    ]
    return _write(Path(path), title, parts)


def write_sections(path: str | Path, *, title: str, facts: Mapping[str, str], sections: Sequence[Section]) -> Path:
    """Write a report of several parts, whole or not at all, and return its path.

    The findings of all parts stand first; then each part with its figures, tables and views; then how it was made.

    Args:
        path: The file to write.
        title: What was run.
        facts: Model, data, settings, seed, versions.
        sections: The parts, of different keys.

    Raises:
        FileNotFoundError: If a figure's file does not exist.
        ValueError: If it is not a PNG.
    """
    links = "".join(f'<a href="#{one.key}">{escape(one.title)}</a>' for one in sections)
    found = [text for one in sections for text in one.findings]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<nav aria-label="Parts of the report">{links}</nav>' if len(sections) > 1 else "",
        _section("What was found", [_findings(found)] if found else []),
        *(_section(one.title, _content(one), one.key) for one in sections),
        _section("How it was made", [_facts(facts)] if facts else []),
    ]
    return _write(Path(path), title, parts)


def _write(path: Path, title: str, parts: Sequence[str]) -> Path:
    html = page(title, "\n".join(filter(None, parts)), css=CSS, scripts=(asset("report.js"),))
    write_atomically(path, html.encode())
    return path


def _content(section: Section) -> list[str]:
    missing = "".join(f"<p>{escape(text)}</p>" for text in section.missing)
    parts = [f'<div class="missing" role="note">{missing}</div>'] if missing else []
    for one in section.figures:
        parts.append(figure_html(one.caption, one.file))
        parts += [link_html(f"The numbers of this figure: {one.data}", one.data)] if one.data else []
    for table in section.tables:
        whole = table_html(table)
        parts.append(f'<div class="long">{whole}</div>' if len(table.rows) > _LONG else whole)
    parts += [_view(caption, view) for caption, view in section.views]
    return parts + [link_html(text, address) for text, address in section.links]


def _section(heading: str, parts: Sequence[str], key: str = "") -> str:
    name = f' id="{key}"' if key else ""
    return f"<section{name}>\n<h2>{escape(heading)}</h2>\n" + "\n".join(parts) + "\n</section>" if parts else ""


def _findings(findings: Sequence[str]) -> str:
    items = "".join(f"<li>{escape(text)}</li>" for text in findings)
    return f'<ul class="findings">{items}</ul>'


def _facts(facts: Mapping[str, str]) -> str:
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    return f'<div class="card"><dl>{lines}</dl></div>'


def link_html(text: str, address: str) -> str:
    """A link to a file beside the report, in a paragraph of its own."""
    return f'<p class="data"><a href="{escape(quote(address))}">{escape(text)}</a></p>'


def table_html(table: Table) -> str:
    """A table, which scrolls sideways where the page is too narrow for it."""
    numeric = [all(not isinstance(row[place], str) for row in table.rows) for place in range(len(table.columns))]
    head = _line("th", table.columns, numeric)
    body = "\n".join(_line("td", row, [not isinstance(cell, str) for cell in row]) for row in table.rows)
    caption = f"<caption>{escape(table.caption)}</caption>"
    return f'<div class="scroll"><table>{caption}<thead>{head}</thead><tbody>\n{body}\n</tbody></table></div>'


def _line(tag: str, cells: Sequence[Cell], numeric: Sequence[bool]) -> str:
    texts = [_shown(cell) if isinstance(cell, float) else escape(str(cell)) for cell in cells]
    classes = [' class="number"' if right else "" for right in numeric]
    return "<tr>" + "".join(f"<{tag}{c}>{text}</{tag}>" for c, text in zip(classes, texts, strict=True)) + "</tr>"


def _shown(number: float) -> str:
    """Three decimals; a p-value of 0.000 would say nothing."""
    return f"{number:.2g}" if 0 < abs(number) < 0.0005 else f"{number:.3f}"


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
    return f'<figure><figcaption>{escape(caption)}</figcaption><div class="card">{frame}</div></figure>'
