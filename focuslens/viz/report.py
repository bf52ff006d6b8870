"""Reports as single HTML files, which work from disk, without a network, on phones, and in light and dark mode."""

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
"""Text of the style sheet of reports."""

_PNG = b"\x89PNG\r\n\x1a\n"
_LONG = 24
"""Maximum number of rows that a table shows without scrolling."""


@dataclass(frozen=True)
class Table:
    """Table of a report. Readers can sort the table by any column.

    Args:
        caption: Description of the content, with units.
        columns: Names of the columns.
        rows: The rows, each with one cell per column. Floats are shown with three decimals, or with two significant
            digits if they would round to zero. To use a different format for a number, pass it as a string.

    Raises:
        ValueError: If a row does not have one cell per column.
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
    """Picture of a report.

    Args:
        caption: Description of the content.
        file: Path of a PNG file. The report embeds the picture.
        data: Path of the file with the figure's numbers, relative to the report; empty for no link.
    """

    caption: str
    file: Path
    data: str = ""


@dataclass(frozen=True)
class Section:
    """Section of a report.

    Args:
        key: Anchor of the section in links, with letters, digits, hyphens and underscores only.
        title: Heading of the section.
        findings: Findings, one sentence each. The report begins with the findings of all sections.
        figures: Pictures of the section.
        tables: Tables of the section.
        views: Interactive views, as pairs (caption, view).
        missing: Sentences about missing content, each with the reason.
        links: Links to files, as pairs (text, address).

    Raises:
        ValueError: If ``key`` is empty or contains other characters.
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
                f"the key of a section is {self.key!r}; it must consist of letters, digits, hyphens and underscores"
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
    """Write a short self-contained report atomically, and return its path.

    All text is treated as plain text and escaped.

    Args:
        path: The file to write, usually ``report.html``.
        title: Name of the run.
        facts: Facts that are needed to repeat the run, by name: model, data, settings, seed and versions.
        findings: Findings, one sentence each. The report begins with the findings.
        tables: Tables, in the order in which the report shows them.
        figures: Figures, as pairs (caption, PNG file). The report embeds the files.
        views: Interactive views, as pairs (caption, view).

    Raises:
        FileNotFoundError: If a figure's file does not exist.
        ValueError: If a figure's file is not a PNG.
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
    """Write a report with several sections atomically, and return its path.

    The report begins with the findings of all sections. The sections follow with their figures, tables and views. The
    facts come last.

    Args:
        path: The file to write.
        title: Name of the run.
        facts: Facts that are needed to repeat the run, by name: model, data, settings, seed and versions.
        sections: Sections, in the order in which the report shows them. Their keys must be unique.

    Raises:
        FileNotFoundError: If a figure's file does not exist.
        ValueError: If a figure's file is not a PNG.
    """
    links = "".join(f'<a href="#{section.key}">{escape(section.title)}</a>' for section in sections)
    findings = [text for section in sections for text in section.findings]
    parts = [
        f"<h1>{escape(title)}</h1>",
        f'<nav aria-label="Parts of the report">{links}</nav>' if len(sections) > 1 else "",
        _section("Findings", [_findings(findings)] if findings else []),
        *(_section(section.title, _content(section), section.key) for section in sections),
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
    for figure in section.figures:
        parts.append(figure_html(figure.caption, figure.file))
        parts += [link_html(f"The numbers of this figure: {figure.data}", figure.data)] if figure.data else []
    for table in section.tables:
        html = table_html(table)
        parts.append(f'<div class="long">{html}</div>' if len(table.rows) > _LONG else html)
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
    """HTML paragraph with a link to a file. ``address`` is relative to the report."""
    return f'<p class="data"><a href="{escape(quote(address))}">{escape(text)}</a></p>'


def table_html(table: Table) -> str:
    """HTML of a table. If the page is too narrow for the table, the table scrolls sideways."""
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
    """Number as text, with three decimals, or with two significant digits for tiny numbers such as p-values."""
    return f"{number:.2g}" if 0 < abs(number) < 0.0005 else f"{number:.3f}"


def figure_html(caption: str, file: Path) -> str:
    """HTML of an embedded PNG picture with its caption.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a PNG.
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
