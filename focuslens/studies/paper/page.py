"""Page ``index.html`` with all artefacts of one model. The page opens from disk, without a server."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from html import escape
from pathlib import Path

from focuslens.studies.paper.artefact import Artefact, Finding
from focuslens.util.files import write_atomically
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
.long { max-height: 28rem; overflow: auto; margin: 0 0 1.4rem }
.long .scroll { overflow: visible; margin: 0 }
.long th { position: sticky; top: 0; background: var(--paper) }
.file { margin: -.9rem 0 1.6rem; font-size: .85rem }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem }
.paper { color: var(--soft); font-weight: 400 }
"""
_CLASSES = {"holds": "holds", "does not hold": "not", "cannot be told": "unknown"}
_LONG = 40
"""Maximum number of rows in a table without a scroll bar."""


def write_index(path: Path, title: str, facts: Mapping[str, str], artefacts: Sequence[Artefact]) -> None:
    """Write the page with all artefacts.

    Args:
        path: File to write. The artefacts' folders must be in the same directory.
        title: Title of the page.
        facts: Facts about the run by name, such as the model and the seed.
        artefacts: The artefacts, in the order of the page.

    Raises:
        FileNotFoundError: If a picture of an artefact is missing.
    """
    links = "".join(f'<a href="#{escape(artefact.key)}">{escape(artefact.title)}</a>' for artefact in artefacts)
    lines = "".join(f"<dt>{escape(name)}</dt><dd>{escape(value)}</dd>" for name, value in facts.items())
    body = [
        f"<h1>{escape(title)}</h1>",
        f"<nav>{links}</nav>",
        _summary(artefacts),
        *(_section(path.parent, artefact) for artefact in artefacts),
        f'<section><h2>How it was made</h2><div class="card"><dl>{lines}</dl></div></section>',
    ]
    write_atomically(path, page(title, "\n".join(body), css=CSS + _CSS).encode())


def _summary(artefacts: Sequence[Artefact]) -> str:
    """HTML section with the number of findings per verdict, and with the findings that have a verdict."""
    verdicts = [finding.verdict for artefact in artefacts for finding in artefact.findings]
    counts = ", ".join(f"{_verdict(verdict)}{verdicts.count(verdict)}" for verdict in _CLASSES)
    parts = ["<section><h2>The paper's findings, and the verdicts of this run</h2>", f"<p>{counts}</p>"]
    for artefact in artefacts:
        judged = [finding for finding in artefact.findings if finding.verdict]
        if judged:
            link = f'<a href="#{escape(artefact.key)}">{escape(artefact.title)}</a>'
            parts += [f'<h3>{link} <span class="paper">({escape(artefact.paper)})</span></h3>', _findings(judged)]
    return "\n".join([*parts, "</section>"])


def _findings(findings: Sequence[Finding]) -> str:
    items = [f"<li>{_verdict(finding.verdict)}{escape(finding.text)}</li>" for finding in findings]
    return f'<ul class="findings">{"".join(items)}</ul>' if items else ""


def _verdict(verdict: str) -> str:
    return f'<span class="verdict {_CLASSES[verdict]}">{escape(verdict)}</span> ' if verdict else ""


def _link(name: str) -> str:
    return f'<p class="file"><a href="{escape(name)}">{escape(name)}</a></p>'


def _section(folder: Path, artefact: Artefact) -> str:
    heading = f'{escape(artefact.title)} <span class="paper">({escape(artefact.paper)})</span>'
    parts = [f'<section id="{escape(artefact.key)}"><h2>{heading}</h2>', _findings(artefact.findings)]
    for caption, name in artefact.figures:
        parts.append(figure_html(caption, folder / artefact.key / name))
        parts.append(_link(f"{artefact.key}/{Path(name).stem}.csv"))
    for place, table in enumerate(artefact.tables, start=1):
        html = table_html(table)
        parts.append(f'<div class="long">{html}</div>' if len(table.rows) > _LONG else html)
        parts.append(_link(f"{artefact.key}/table_{place}.csv"))
    parts += [f'<div class="reported">{table_html(table)}</div>' for table in artefact.reported]
    return "\n".join([*parts, "</section>"])
