"""Section of a run's report on the documents that answers came from, by ``focuslens attribute``."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from focuslens.util.html import Cell, shorten
from focuslens.viz.answers import source_findings
from focuslens.viz.report import Section, Table
from focuslens.viz.run_report.sections import ReportFolder

__all__ = ["attribution_section"]

_LONGEST_NAME = 90
"""Maximum number of characters of a document's title in the table."""


def attribution_section(output: ReportFolder, path: Path, content: Mapping[str, Any]) -> Section:
    """Section with the findings, the table of answers, and links to the picture and to the numbers."""
    entries = content["samples"]
    tops = [None if entry["document"] is None else int(entry["document"]) - 1 for entry in entries]
    shares, margins = ([_number(entry[name]) for entry in entries] for name in ("share", "margin"))
    heads = ", ".join(f"L{layer}H{head}" for layer, head in content["heads"])
    table = Table(
        f"Source of each of {len(entries)} {content['responses']} answers, by the heads {heads}: its share of the "
        "attention to all documents, and the margin to the next document",
        ("question", "answer", "document", "title", "share", "margin"),
        tuple(map(_row, entries)),
    )
    files = (("The picture of the answers and their documents", ".html"), ("Every document of every answer", ".csv"))
    links = [(text, path.with_suffix(suffix)) for text, suffix in files]
    return Section(
        output.name(path),
        "Documents that the answers came from",
        findings=(*source_findings(tops, shares, margins), *_known(content.get("known"))),
        tables=(table,),
        links=tuple((f"{text}: {file.name}", output.link(file)) for text, file in links if file.is_file()),
    )


def _number(value: float | None) -> float:
    return math.nan if value is None else value


def _row(entry: Mapping[str, Any]) -> tuple[Cell, ...]:
    answer = entry["response"].strip() or "(empty)"
    if entry["document"] is None:
        return entry["question"], answer, "-", "-", "-", "-"
    title = shorten(entry["title"].strip(), _LONGEST_NAME) or "-"
    return entry["question"], answer, entry["document"], title, entry["share"], entry["margin"]


def _known(known: Mapping[str, Any] | None) -> list[str]:
    """Finding on the answers whose relevant document is known."""
    if known is None:
        return []
    share = known["accuracy"]
    return [
        f"The source is the relevant document in {share['mean']:.3f} [{share['low']:.3f}, {share['high']:.3f}] of the "
        f"{known['samples']} answers whose relevant document is known."
    ]
