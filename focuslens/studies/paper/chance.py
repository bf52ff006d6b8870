"""Chance level of contextual heads: their excess over the score of even attention, with intervals over questions."""

from __future__ import annotations

from collections.abc import Sequence

from focuslens.evaluation import percentile_interval
from focuslens.heads import Head
from focuslens.scores.chance import Measure
from focuslens.scores.contextual_scores import ContextualScores
from focuslens.studies.paper.artefact import Finding
from focuslens.studies.paper.study import Part, Study
from focuslens.util.html import Cell
from focuslens.viz import Table

__all__ = ["EXCESS_FIGURE", "chance_finding", "chance_table", "excess_counts"]

EXCESS_FIGURE = (
    "Relevant contextual score of every head on training questions minus chance, which is the score of even attention. "
    "Heads below chance are purple."
)
"""Caption of the map of the excess."""

_MEASURES: tuple[Measure, ...] = ("excess", "document_excess")


def excess_counts(scores: ContextualScores, thresholds: Sequence[float]) -> list[tuple[int, int]]:
    """Number of heads whose excess is above each threshold, and number of those whose document excess is."""
    by_measure = [scores.sparsity(thresholds, by=measure) for measure in _MEASURES]
    return [(excess.count, in_documents.count) for excess, in_documents in zip(*by_measure, strict=True)]


def chance_table(study: Study, part: Part, scores: ContextualScores, heads: Sequence[Head]) -> Table:
    """Table of the relevant score, the chance level and the excess of heads on the long prompts of a part."""
    is_empty = bool(scores.relevant.isnan().all())
    means = [] if is_empty else [scores.mean(by=by) for by in ("score", "chance")]
    rows: list[tuple[Cell, ...]] = []
    for head in heads:
        cells: list[Cell] = [str(head), *([float(values[head]) for values in means] or ["-", "-"])]
        for measure in _MEASURES:
            values = scores.measured(by=measure)[:, head.layer, head.head]
            interval = study.interval(part, values, scores.sample_ids)
            cells += ["-"] * 3 if interval is None else [interval.mean, interval.low, interval.high]
        rows.append(tuple(cells))
    columns = (f"{measure.replace('_', ' ')}{end}" for measure in _MEASURES for end in ("", " low", " high"))
    return Table(
        "Relevant contextual score R of the top heads on held-out questions beside chance, which is the score of even "
        "attention: the share of the relevant document's tokens. Excess is R minus chance. Document excess is R minus "
        "the score of an even spread of the head's attention over all documents. Each excess has its 95 % interval",
        ("head", "R", "chance", *columns),
        tuple(rows),
    )


def chance_finding(study: Study, ranked_on: ContextualScores, threshold: float, top: Sequence[Head]) -> Finding:
    """Finding on the heads above chance. It tests no claim of the paper, whose scores are raw."""
    means = {by: ranked_on.mean(by=by) for by in ("score", "chance", "excess")}
    (exceeding,) = ranked_on.sparsity((threshold,), by="excess")
    drawn = study.resampled("train", ranked_on.measured(by="excess"), ranked_on.sample_ids) > threshold
    part = percentile_interval(exceeding.fraction, drawn.mean(axis=1))
    above = means["score"] > threshold
    at_most = means["excess"] <= 0
    below = sum(bool(at_most[head]) for head in top)
    return Finding(
        f"Even attention would give the relevant document {float(means['chance'].mean()):.3f}, by its share of the "
        f"tokens (chance). Of the {int(above.sum())} heads with a relevant score above {threshold:g}, "
        f"{int((above & at_most).sum())} are at or below chance, and so are {below} of the top {len(top)}. "
        f"{exceeding.count} heads, a share of {part}, exceed chance by more than {threshold:g}."
    )
