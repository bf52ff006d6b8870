"""Table 3: changes of contextual scores under focus directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import Head
from focuslens.interventions import FocusSteering
from focuslens.scores.contextual_scores import ContextualScores
from focuslens.studies.paper import paper_values
from focuslens.studies.paper.artefact import Artefact, Finding, Verdict, all_of, signed, verdict_below, verdict_by
from focuslens.studies.paper.scored import KINDS_CAPTION, head_mean
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
    """Measure the top heads' contextual scores on test questions, with few heads and with many heads steered."""
    settings, heads = study.settings.steered_scores, steerable(study)
    top = heads[: study.settings.scores.top]
    plain = {case: _of_first(study, study.scores("test", case), settings.questions) for case in ("long", "gold")}
    few, many = (
        _steered(study, heads[:k], alphas)
        for k, alphas in ((settings.few, settings.few_alphas), (settings.many, settings.many_alphas))
    )
    changes = _Changes(study, few, plain, top[: settings.few])
    tables = (_table(few, plain, top, heads[: settings.few]), _table(many, plain, top, heads[: settings.many]))
    return Artefact(
        KEY,
        "Attention under focus directions",
        "Table 3",
        (
            *_towards(changes),
            *_by_strength(changes),
            _too_far(_Changes(study, many, plain, top[: settings.many])),
        ),
        (),
        tables,
        (paper_values.TABLE_3_FEW, paper_values.TABLE_3_MANY),
    )


def _steered(study: Study, heads: Sequence[Head], alphas: Sequence[float]) -> dict[float, _Cases]:
    """Contextual scores with ``heads`` steered, by strength and case."""
    by_alpha: dict[float, _Cases] = {}
    questions = study.settings.steered_scores.questions
    for alpha in alphas:
        focus = [FocusSteering(study.directions, alpha, heads)]
        by_alpha[alpha] = {case: study.scores("test", case, focus, questions) for case in ("long", "gold")}
    return by_alpha


def _of_first(study: Study, scores: ContextualScores, questions: int | None) -> ContextualScores:
    """Scores of the first questions alone, which are not measured again."""
    ids = {sample.id for sample in study.samples("test", questions)}
    return scores.where([id in ids for id in scores.sample_ids], scores.case)


def _table(by_alpha: Mapping[float, _Cases], plain: _Cases, top: Sequence[Head], steered: Sequence[Head]) -> Table:
    columns = ("head", "alpha", *(part for name, _, _ in _COLUMNS for part in (name, f"{name} change")))
    return Table(
        f"Contextual scores on test questions with the top {len(steered)} heads steered, and their change from no "
        f"steering, with the responses of the steered model. {KINDS_CAPTION}. Columns with gold are of prompts with "
        "the relevant document alone",
        columns,
        tuple(row for alpha, cases in by_alpha.items() for row in _rows(cases, plain, top, alpha)),
    )


def _rows(cases: _Cases, plain: _Cases, heads: Sequence[Head], alpha: float) -> list[tuple[Cell, ...]]:
    rows: list[tuple[Cell, ...]] = []
    for head in heads:
        cells: list[Cell] = [str(head), f"{alpha:g}"]
        for _, case, kind in _COLUMNS:
            value, before = (head_mean(scores[case], kind, head) for scores in (cases, plain))
            cells += ["-", "-"] if value is None or before is None else [value, value - before]
        rows.append(tuple(cells))
    return rows


@dataclass(frozen=True)
class _Changes:
    """Changes of contextual scores under steering, on the long prompts of the test samples."""

    study: Study
    by_alpha: Mapping[float, _Cases]
    plain: _Cases
    heads: Sequence[Head]

    @property
    def positive_alphas(self) -> list[float]:
        """Strengths above zero, in ascending order."""
        return sorted(alpha for alpha in self.by_alpha if alpha > 0)

    def at(self, alpha: float, kind: str) -> Float[Tensor, "sample"]:
        """Change of one kind of score at one strength, averaged over heads, one number per sample."""
        after, before = (getattr(cases["long"], kind) for cases in (self.by_alpha[alpha], self.plain))
        return torch.stack([(after - before)[:, head.layer, head.head] for head in self.heads]).mean(dim=0)

    def finding(self, text: str, *changes: tuple[Float[Tensor, "sample"], int]) -> Finding:
        """Finding on one or more changes, with a verdict from their intervals.

        Args:
            text: Text with one placeholder per change, for the change's mean and interval.
            changes: Changes, each with the claimed sign of its mean: 1 (above zero), -1 (below zero) or 0 (no claim).
        """
        ids = self.plain["long"].sample_ids
        intervals = [(self.study.interval("test", change, ids), sign) for change, sign in changes]
        known = [(interval, sign) for interval, sign in intervals if interval is not None]
        if len(known) < len(intervals):  # no sample has a response both with and without steering
            return Finding(text.format(*("(unknown: no responses)" for _ in intervals)), "cannot be told")
        verdicts: list[Verdict] = [
            verdict_by(interval) if sign > 0 else verdict_below(interval, 0.0) for interval, sign in known if sign
        ]
        return Finding(text.format(*(signed(interval, 4) for interval, _ in known)), all_of(*verdicts))


def _towards(changes: _Changes) -> list[Finding]:
    """Findings on the changes at the smallest positive strength."""
    if not changes.positive_alphas:
        return []
    alpha = changes.positive_alphas[0]
    relevant, irrelevant, sink = (changes.at(alpha, kind) for kind in ("relevant", "irrelevant", "sink"))
    return [
        changes.finding(
            f"A direction turns attention to the relevant document: at alpha = {alpha:g} its share of the attention of "
            f"the top {len(changes.heads)} heads changes by {{}}.",
            (relevant, 1),
        ),
        changes.finding(
            "Most of that attention comes from the sink: the share of the sink changes by {}, and the share of "
            "irrelevant documents by {}. The loss of the sink minus half of the gain of the relevant document is {}.",
            (sink, -1),
            (irrelevant, 0),
            (-sink - relevant / 2, 1),
        ),
    ]


def _by_strength(changes: _Changes) -> list[Finding]:
    """Findings on attention to the relevant document under a stronger direction and under the opposite direction."""
    findings: list[Finding] = []
    if len(changes.positive_alphas) > 1:
        smallest, largest = changes.positive_alphas[0], changes.positive_alphas[-1]
        more = changes.at(largest, "relevant") - changes.at(smallest, "relevant")
        text = (
            f"A stronger direction turns more attention: from alpha = {smallest:g} to {largest:g} the share of the "
            "relevant document changes by {}."
        )
        findings.append(changes.finding(text, (more, 1)))
    lowest = min(changes.by_alpha)
    if lowest < 0:
        text = (
            f"The opposite direction turns attention away: at alpha = {lowest:g} the share of the relevant document "
            "changes by {}."
        )
        findings.append(changes.finding(text, (changes.at(lowest, "relevant"), -1)))
    return findings


def _too_far(changes: _Changes) -> Finding:
    """Finding on attention to an irrelevant document under too strong a direction, with many heads steered."""
    claim = "Too strong a direction turns attention to an irrelevant document"
    if len(changes.positive_alphas) < 2:
        return Finding(f"{claim}: fewer than two strengths were tried.", "cannot be told")
    smallest, largest = changes.positive_alphas[0], changes.positive_alphas[-1]
    relevant, irrelevant = (
        changes.at(largest, kind) - changes.at(smallest, kind) for kind in ("relevant", "irrelevant_max")
    )
    return changes.finding(
        f"{claim}: from alpha = {smallest:g} to {largest:g}, with many heads steered, the largest share of an "
        "irrelevant document changes by {} and the share of the relevant document by {}, a difference of {}.",
        (irrelevant, 1),
        (relevant, 0),
        (irrelevant - relevant, 1),
    )
