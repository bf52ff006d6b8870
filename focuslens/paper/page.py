"""``index.html``: all artefacts of one model on one page that opens from disk."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from focuslens.files import write_atomically
from focuslens.paper.artefact import Artefact
from focuslens.viz.page import page
from focuslens.viz.report import CSS, figure_html, table_html

__all__ = ["write_index"]

_CSS = """
nav { display: flex; flex-wrap: wrap; gap: .3rem 1rem; margin: 0 0 1rem }
a { color: var(--key) }
.verdict { display: inline-block; padding: 0 .5rem; border-radius: 1rem; font-size: .85rem; font-weight: 600;
           border: 1px solid var(--line); white-space: nowrap }
.holds { background: #0b7a4b22 } .not { background: #b0002022 } .unknown { background: #8882 }
.reported { border-left: 4px solid var(--line); padding-left: .8rem; color: var(--soft) }
.long { max-height: 28rem; overflow: auto }
.paper { color: var(--soft); font-weight: 400 }
"""
_CLASSES = {"holds": "holds", "does not hold": "not", "cannot be told": "unknown"}
_LONG = 40
"""Rows from which on a table scrolls within its place."""


def write_index(path: Path, title: str, facts: Mapping[str, str], artefacts: Sequence[Artefact]) -> None:
    """Write the page.

    Args:
        path: The file; artefacts lie in folders beside it.
        title: What was reproduced.
        facts: What made it.
        artefacts: In the order in which they are shown.

    Raises:
        FileNotFoundError: If a picture is missing.
    """
    links = "".join(f'<a href="#{escape(one.key)}">{escape(one.title)}</a>' for one in artefacts)
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<nav>{links}</nav>",
        "<section><h2>What was found</h2>",
        *(_findings(one) for one in artefacts),
        "</section>",
        *(_section(path.parent, one) for one in artefacts),
        f'<section><h2>How it was made</h2><div class="card"><dl>{lines}</dl></div></section>',
    ]
    write_atomically(path, page(title, "\n".join(body), css=CSS + _CSS).encode())


def _findings(artefact: Artefact) -> str:
    items = [f"<li>{_verdict(one.verdict)} {escape(one.text)}</li>" for one in artefact.findings]
    return f'<ul class="findings">{"".join(items)}</ul>' if items else ""


def _verdict(verdict: str) -> str:
    return f'<span class="verdict {_CLASSES[verdict]}">{escape(verdict)}</span>' if verdict else ""


def _link(name: str) -> str:
    return f'<p><a href="{escape(name)}">{escape(name)}</a></p>'


def _section(folder: Path, artefact: Artefact) -> str:
    heading = f'{escape(artefact.title)} <span class="paper">({escape(artefact.paper)})</span>'
    parts = [f'<section id="{escape(artefact.key)}"><h2>{heading}</h2>', _findings(artefact)]
    for caption, name in artefact.figures:
        parts.append(figure_html(caption, folder / artefact.key / name))
        numbers = Path(artefact.key) / f"{Path(name).stem}.csv"
        if (folder / numbers).is_file():  # Where there is none, the section's tables are the picture's numbers.
            parts.append(_link(str(numbers)))
    for place, table in enumerate(artefact.tables, start=1):
        whole = table_html(table)
        parts.append(f'<div class="long">{whole}</div>' if len(table.rows) > _LONG else whole)
        parts.append(_link(f"{artefact.key}/table_{place}.csv"))
    parts += [f'<div class="reported">{table_html(table)}</div>' for table in artefact.reported]
    return "\n".join([*parts, "</section>"])
