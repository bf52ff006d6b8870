"""Exact match and contextual scores under steering, by site (rotary, projection) and by rows (all, response rows)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

from focuslens.evaluation import Setting, Sweep
from focuslens.heads import Head
from focuslens.interventions import FocusSteering
from focuslens.scores.contextual_scores import KINDS, ContextualScores
from focuslens.studies.paper.artefact import Finding, Piece
from focuslens.studies.paper.scored import KINDS_CAPTION, head_mean
from focuslens.studies.paper.study import Study
from focuslens.util.html import Cell
from focuslens.viz import Table

__all__ = ["piece"]

_Site = Literal["rotary", "projection"]


def piece(study: Study, heads: Sequence[Head], key: str) -> Piece:
    """Compare steering at the rotary and the projection site, on all rows and on response rows only.

    Directions read from a directory act at a single site. For these directions, only the rows are compared.

    Args:
        study: The model and its validation questions.
        heads: Heads with directions, best first.
        key: Key of the artefact. The artefact's folder contains the records.
    """
    sites: tuple[_Site, ...] = ("rotary", "projection")
    if study.settings.directions.source != "train":
        sites = (study.directions.site,)
    steered = heads[: study.settings.anatomy.k]
    settings = [Setting("baseline"), *(setting for site in sites for setting in _settings(study, site, steered))]
    sweep = study.sweep(key, "validation", settings)
    kinds = [("site", site) for site in sites] + [("positions", positions) for positions in ("all", "response")]
    findings = tuple(_best_of(sweep, name, value) for name, value in kinds)
    return Piece(findings, (), (_table(study, sweep, steered),))


def _settings(study: Study, site: _Site, heads: Sequence[Head]) -> list[Setting]:
    directions, k = study.directions_at(site), len(heads)
    return [
        Setting(
            f"{site}, {positions}, alpha={alpha:g} k={k}",
            (FocusSteering(directions, alpha, heads, positions),),
            parameters={"site": site, "positions": positions, "alpha": alpha, "k": k},
        )
        for positions in ("all", "response")
        for alpha in study.settings.anatomy.alphas
    ]


def _table(study: Study, sweep: Sweep, heads: Sequence[Head]) -> Table:
    rows: list[tuple[Cell, ...]] = []
    for setting, row in zip(sweep.settings, sweep.rows(), strict=True):
        measured = study.scores("validation", "long", setting.interventions)
        means = (_mean_of_heads(measured, kind, heads) for kind in KINDS)
        rows.append((row["name"], row["em"], row["em_low"], row["em_high"], row["mcnemar_p"], *means))
    return Table(
        "Exact match (share of samples) on validation questions by site, rows and strength, its 95 % interval and the "
        f"exact p-value, and mean contextual scores of the {len(heads)} steered heads. {KINDS_CAPTION}",
        ("setting", "exact match", "low", "high", "p", "R", "IR", "IR max", "sink"),
        tuple(rows),
    )


def _mean_of_heads(scores: ContextualScores, kind: str, heads: Sequence[Head]) -> float | str:
    means = [head_mean(scores, kind, head) for head in heads]
    known = [mean for mean in means if mean is not None]
    return sum(known) / len(known) if known else "-"


def _best_of(sweep: Sweep, name: str, value: str) -> Finding:
    settings = [setting for setting in sweep.settings if setting.parameters.get(name) == value]
    best = max(settings, key=lambda setting: sweep[setting.name].em.mean)
    subject = f"At the {value} site" if name == "site" else f"With steering on {value} rows"
    return Finding(
        f"{subject}, the best strength ({best.name}) gives {sweep[best.name].em} on validation questions. The baseline "
        f"gives {sweep['baseline'].em}."
    )
