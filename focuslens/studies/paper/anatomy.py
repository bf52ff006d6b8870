"""Anatomy of focus directions: decomposition of their bias, attention under steering, comparison of sites and rows."""

from __future__ import annotations

from focuslens.studies.paper import budget, compared_sites, decomposition
from focuslens.studies.paper.artefact import Artefact
from focuslens.studies.paper.steering import steerable
from focuslens.studies.paper.study import Study

__all__ = ["KEY", "SECTIONS", "run"]

KEY = "anatomy"
SECTIONS = ("directions", "anatomy")


def run(study: Study) -> Artefact:
    """Measure attention budgets, compare steering by site and rows, and decompose the directions' bias on logits.

    The bias is decomposed only for directions at the rotary site.
    """
    heads, folder = steerable(study), study.folder(KEY)
    pieces = [budget.piece(study, heads, folder), compared_sites.piece(study, heads, KEY)]
    if study.directions.site == "rotary":
        pieces.insert(0, decomposition.piece(study, heads, folder))
    return Artefact(
        KEY,
        "Anatomy of a direction",
        "beyond the paper",
        tuple(finding for piece in pieces for finding in piece.findings),
        tuple(figure for piece in pieces for figure in piece.figures),
        tuple(table for piece in pieces for table in piece.tables),
    )
