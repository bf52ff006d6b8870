"""Table 3: how contextual scores change under focus directions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from focuslens.evaluation import Interval
from focuslens.heads import Head
from focuslens.interventions import FocusSteering
from focuslens.paper import reported
from focuslens.paper.artefact import Artefact, Finding, verdict_by
from focuslens.paper.scored import head_mean
from focuslens.paper.steering import steerable
from focuslens.paper.study import Study
from focuslens.scoring import ContextualScores
from focuslens.viz.report import Cell, Table

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
    tables: list[Table] = []
    changes: dict[float, _Cases] = {}
    for k, alphas in ((wanted.few, wanted.few_alphas), (wanted.many, wanted.many_alphas)):
        steered = min(k, len(heads))
        rows: list[tuple[Cell, ...]] = []
        for alpha in alphas:
            focus = [FocusSteering(study.directions, alpha, heads[:steered])]
            cases = {case: study.scores("test", case, focus) for case in ("long", "gold")}
            changes.setdefault(alpha, cases)
            rows += _rows(cases, plain, top, alpha)
        names = tuple(name for name, _, _ in _COLUMNS)
        caption = (
            f"Contextual scores on test questions with the top {steered} heads steered, and their change against no "
            "steering; measured with the responses that the steered model gives"
        )
        tables.append(
            Table(
                caption, ("head", "alpha", *(part for name in names for part in (name, f"{name} change"))), tuple(rows)
            )
        )
    return Artefact(
        KEY,
        "What focus directions do to attention",
        "Table 3",
        tuple(_findings(study, changes, plain, top[: wanted.few])),
        (),
        tuple(tables),
        (reported.TABLE_3_FEW, reported.TABLE_3_MANY),
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


def _change(study: Study, after: _Cases, before: _Cases, kind: str, heads: Sequence[Head]) -> Interval | None:
    """Change of one kind of score, averaged over heads, with its interval over the questions that have both."""
    changes = [
        getattr(after["long"], kind)[:, head.layer, head.head] - getattr(before["long"], kind)[:, head.layer, head.head]
        for head in heads
    ]
    return study.interval("test", torch.stack(changes).mean(dim=0), after["long"].sample_ids)


def _findings(study: Study, changes: Mapping[float, _Cases], plain: _Cases, heads: Sequence[Head]) -> list[Finding]:
    """What the gentlest direction does to the heads that are steered in both tables."""
    positive = [alpha for alpha in changes if alpha > 0]
    if not positive:
        return []
    alpha = min(positive)
    found = [_change(study, changes[alpha], plain, kind, heads) for kind in ("relevant", "sink", "irrelevant")]
    gained, sink, others = found
    if gained is None or sink is None or others is None:
        return [Finding(f"Nothing is said of alpha = {alpha:g}: no response to score.", "cannot be told")]
    more = verdict_by(gained)
    from_sink = gained.low > 0 and sink.high < 0 and abs(sink) > max(0.0, -others.mean)
    return [
        Finding(
            f"A direction turns attention to the relevant document: at alpha = {alpha:g} the top {len(heads)} heads "
            f"give it {_signed(gained)}.",
            more,
        ),
        Finding(
            f"They take it from the sink: it changes by {_signed(sink)}, irrelevant documents by {_signed(others)}.",
            "holds" if from_sink else "does not hold" if more != "cannot be told" else more,
        ),
    ]


def _signed(change: Interval) -> str:
    return f"{change.mean:+.4f} [{change.low:+.4f}, {change.high:+.4f}]"
