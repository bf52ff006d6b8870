"""Table 3: how contextual scores change under focus directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import Head
from focuslens.interventions import FocusSteering
from focuslens.scores.contextual import ContextualScores
from focuslens.studies.paper import reported
from focuslens.studies.paper.artefact import Artefact, Finding, Verdict, all_of, signed, verdict_below, verdict_by
from focuslens.studies.paper.scored import KINDS_SAID, head_mean
from focuslens.studies.paper.steering import steerable
from focuslens.studies.paper.study import Study
from focuslens.util.html import Cell
from focuslens.viz.report import Table

__all__ = ["KEY", "SECTIONS", "run"]

KEY = "steered_scores"
SECTIONS = ("scores", "directions", "steered_scores")
_COLUMNS = (("R", "long", "relevant"), ("IR", "long", "irrelevant"), ("IR max", "long", "irrelevant_max"),
            ("sink", "long", "sink"), ("R gold", "gold", "relevant"), ("sink gold", "gold", "sink"))  # fmt: skip

_Cases = Mapping[str, ContextualScores]


def run(study: Study) -> Artefact:
    """Scores of the top heads on test questions, with few and with many heads steered."""
    wanted, heads = study.settings.steered_scores, steerable(study)
    top = heads[: study.settings.scores.top]
    plain = {case: study.scores("test", case) for case in ("long", "gold")}
    few, many = (
        _steered(study, heads[:k], alphas)
        for k, alphas in ((wanted.few, wanted.few_alphas), (wanted.many, wanted.many_alphas))
    )
    gentle = _Changes(study, few, plain, top[: wanted.few])
    tables = (_table(few, plain, top, heads[: wanted.few]), _table(many, plain, top, heads[: wanted.many]))
    return Artefact(
        KEY,
        "What focus directions do to attention",
        "Table 3",
        (
            *_towards(gentle),
            *_by_strength(gentle),
            _too_far(_Changes(study, many, plain, top[: wanted.many])),
        ),
        (),
        tables,
        (reported.TABLE_3_FEW, reported.TABLE_3_MANY),
    )


def _steered(study: Study, heads: Sequence[Head], alphas: Sequence[float]) -> dict[float, _Cases]:
    """Scores with some heads steered, by strength."""
    found: dict[float, _Cases] = {}
    for alpha in alphas:
        focus = [FocusSteering(study.directions, alpha, heads)]
        found[alpha] = {case: study.scores("test", case, focus) for case in ("long", "gold")}
    return found


def _table(found: Mapping[float, _Cases], plain: _Cases, top: Sequence[Head], steered: Sequence[Head]) -> Table:
    columns = ("head", "alpha", *(part for name, _, _ in _COLUMNS for part in (name, f"{name} change")))
    return Table(
        f"Contextual scores on test questions with the top {len(steered)} heads steered, and their change against no "
        f"steering; measured with the responses that the steered model gives. {KINDS_SAID}; gold: with the relevant "
        "document alone",
        columns,
        tuple(row for alpha, cases in found.items() for row in _rows(cases, plain, top, alpha)),
    )


def _rows(cases: _Cases, plain: _Cases, heads: Sequence[Head], alpha: float) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = []
    for head in heads:
        cells: list[Cell] = [str(head), f"{alpha:g}"]
        for _, case, kind in _COLUMNS:
            value, before = (head_mean(one[case], kind, head) for one in (cases, plain))
            cells += ["-", "-"] if value is None or before is None else [value, value - before]
        rows.append(tuple(cells))
    return rows


@dataclass(frozen=True)
class _Changes:
    """What steering changes in the scores of the long prompts, averaged over heads, one number a test sample."""

    study: Study
    found: Mapping[float, _Cases]
    plain: _Cases
    heads: Sequence[Head]

    @property
    def ahead(self) -> list[float]:
        """Strengths above zero, the gentlest first."""
        return sorted(alpha for alpha in self.found if alpha > 0)

    def at(self, alpha: float, kind: str) -> Float[Tensor, "sample"]:
        """Of one kind of score, against no steering."""
        after, before = (getattr(cases["long"], kind) for cases in (self.found[alpha], self.plain))
        return torch.stack([(after - before)[:, head.layer, head.head] for head in self.heads]).mean(dim=0)

    def told(self, text: str, *changes: tuple[Float[Tensor, "sample"], int]) -> Finding:
        """A finding on changes, whose intervals stand in the text's places.

        Each comes with what is claimed of it: 1 (above zero), -1 (below zero), or 0, where nothing is.
        """
        ids = self.plain["long"].sample_ids
        intervals = [(self.study.interval("test", change, ids), sign) for change, sign in changes]
        known = [(one, sign) for one, sign in intervals if one is not None]
        if len(known) < len(intervals):  # no sample has a response with and without steering
            return Finding(text.format(*("(nothing said)" for _ in intervals)), "cannot be told")
        verdicts: list[Verdict] = [
            verdict_by(one) if sign > 0 else verdict_below(one, 0.0) for one, sign in known if sign
        ]
        return Finding(text.format(*(signed(one, 4) for one, _ in known)), all_of(*verdicts))


def _towards(changes: _Changes) -> list[Finding]:
    """What the gentlest direction does."""
    if not changes.ahead:
        return []
    alpha = changes.ahead[0]
    relevant, irrelevant, sink = (changes.at(alpha, kind) for kind in ("relevant", "irrelevant", "sink"))
    return [
        changes.told(
            f"A direction turns attention to the relevant document: at alpha = {alpha:g} the top {len(changes.heads)} "
            "heads give it {}.",
            (relevant, 1),
        ),
        changes.told(
            "They take most of that from the sink: it changes by {}, irrelevant documents by {}; what the sink loses, "
            "less half of what the relevant document gets, is {}.",
            (sink, -1),
            (irrelevant, 0),
            (-sink - relevant / 2, 1),
        ),
    ]


def _by_strength(changes: _Changes) -> list[Finding]:
    """The strongest direction beside the gentlest, and the opposite one."""
    findings: list[Finding] = []
    if len(changes.ahead) > 1:
        gentlest, strongest = changes.ahead[0], changes.ahead[-1]
        more = changes.at(strongest, "relevant") - changes.at(gentlest, "relevant")
        text = f"A stronger one turns more: from alpha = {gentlest:g} to {strongest:g} the relevant document gets {{}}."
        findings.append(changes.told(text, (more, 1)))
    back = min(changes.found)
    if back < 0:
        text = f"The opposite direction turns it away: at alpha = {back:g} the relevant document gets {{}}."
        findings.append(changes.told(text, (changes.at(back, "relevant"), -1)))
    return findings


def _too_far(changes: _Changes) -> Finding:
    """What the strongest direction does beside the gentlest one, many heads steered."""
    what = "Too strong a direction turns attention to an irrelevant document"
    if len(changes.ahead) < 2:
        return Finding(f"{what}: fewer than two strengths were tried.", "cannot be told")
    gentlest, strongest = changes.ahead[0], changes.ahead[-1]
    relevant, largest = (
        changes.at(strongest, kind) - changes.at(gentlest, kind) for kind in ("relevant", "irrelevant_max")
    )
    return changes.told(
        f"{what}: from alpha = {gentlest:g} to {strongest:g}, more heads steered, the one that gets most gets {{}} and "
        "the relevant one {}, a difference of {}.",
        (largest, 1),
        (relevant, 0),
        (largest - relevant, 1),
    )
