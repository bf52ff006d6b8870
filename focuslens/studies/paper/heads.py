"""Figures 2, 5 and 6 and Table 1: contextual heads, and their scores for right and wrong answers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.evaluation import percentile_interval
from focuslens.heads import Head
from focuslens.scores.contextual_scores import ContextualScores
from focuslens.studies.paper import paper_values
from focuslens.studies.paper.artefact import Artefact, Finding, all_of, keep_heads, signed, verdict_below, verdict_by
from focuslens.studies.paper.chance import EXCESS_FIGURE, chance_finding, chance_table, excess_counts
from focuslens.studies.paper.scored import KINDS_CAPTION
from focuslens.studies.paper.study import Study
from focuslens.util.html import Cell
from focuslens.viz import Table, head_map

__all__ = ["KEY", "SECTIONS", "run"]

KEY = "heads"
SECTIONS = ("scores",)
_OUTLINED = 20
"""Maximum number of outlined heads in the map. In small models, only a quarter of all heads are outlined."""
_READS = 0.1
"""Relevant score above which a head counts as contextual."""
_FEW = 0.25
"""Share of all heads below which the contextual heads count as sparse."""
_KINDS = {"R": "relevant", "IR": "irrelevant", "IR max": "irrelevant_max", "sink": "sink"}


def run(study: Study) -> Artefact:
    """Draw a map of all heads on training questions, and tabulate the top heads' scores on test questions."""
    settings, ranking = study.settings.scores, study.ranking
    ranked_on = study.ranked_on
    cases = study.scores_by_case("test")
    top = ranking[: settings.top]
    best = ranking[: min(_OUTLINED, len(ranking) // 4)]
    _draw(study, ranked_on, best)
    sparsity = ranked_on.sparsity(settings.thresholds)
    counts = Table(
        "Heads whose relevant contextual score (share of attention, training questions) exceeds a threshold, and "
        "heads whose excess over the score of even attention does",
        ("threshold", "heads", "share of heads", "first layer", "last layer", "heads by excess", "by document excess"),
        tuple(
            (level.threshold, level.count, level.fraction, *(level.layers or ("-", "-")), *counts)
            for level, counts in zip(sparsity, excess_counts(ranked_on, settings.thresholds), strict=True)
        ),
    )
    long = cases["long"].with_chance(study.executor, study.samples("test"))
    caption = (
        f"Contextual scores of the top {settings.top} heads on held-out questions. {KINDS_CAPTION}. Samples: "
        f"{_sizes(cases)}. Correct and wrong are long prompts, split by whether the answer is right. Only samples that "
        "are answered right with the relevant document alone count"
    )
    return Artefact(
        KEY,
        "Contextual heads",
        "Figures 2, 5 and 6, Table 1",
        (*_findings(study, ranked_on, cases, top), chance_finding(study, ranked_on, _READS, top)),
        (
            (
                f"Relevant contextual score of every head on training questions. The best {len(best)} are outlined. "
                "Dots mark scores above chance, which is the score of even attention.",
                "head_map.png",
            ),
            (EXCESS_FIGURE, "excess_map.png"),
        ),
        (counts, scores_table(caption, cases, top), _map_table(ranked_on), chance_table(study, "test", long, top)),
        (paper_values.FIGURE_2, paper_values.TABLE_1),
    )


def _draw(study: Study, scores: ContextualScores, best: Sequence[Head]) -> None:
    """Write the map of the relevant scores and the map of their excess over chance."""
    means = {by: scores.mean(by=by).numpy() for by in ("score", "chance", "excess")}
    axes = head_map(means["score"], heads=best, chance=means["chance"])
    keep_heads(axes, study.folder(KEY) / "head_map.png", {"relevant": means["score"]})
    label = "score minus chance (share of attention)"
    axes = head_map(means["excess"], heads=best, center=0.0, title="Excess over chance", label=label)
    keep_heads(axes, study.folder(KEY) / "excess_map.png", {by: means[by] for by in ("chance", "excess")})


def scores_table(caption: str, cases: Mapping[str, ContextualScores], heads: Sequence[Head]) -> Table:
    """Table of mean scores per head and case, in the layout of Table 1. Cells without a score contain ``-``."""
    columns: list[str] = ["head"]
    rows: list[list[Cell]] = [[str(head)] for head in heads]
    for case, scores in cases.items():
        kinds = ("R", "sink") if case == "gold" else tuple(_KINDS)
        columns += [f"{kind} {case}" for kind in kinds]
        for kind in kinds:
            is_empty = not len(scores) or bool(getattr(scores, _KINDS[kind]).isnan().all())
            means = None if is_empty else scores.mean(_KINDS[kind])
            for row, head in zip(rows, heads, strict=True):
                row.append("-" if means is None else float(means[head]))
    return Table(caption, tuple(columns), tuple(tuple(row) for row in rows))


def _sizes(cases: Mapping[str, ContextualScores]) -> str:
    return ", ".join(f"{len(scores)} {case}" for case, scores in cases.items())


def _map_table(scores: ContextualScores) -> Table:
    frame = scores.to_frame()
    return Table(
        "Contextual scores (share of attention) of every head on training questions, best first",
        tuple(frame.columns),
        tuple(tuple(int(x) if i < 2 else float(x) for i, x in enumerate(row)) for row in frame.itertuples(index=False)),
    )


def _over_heads(values: Tensor, heads: Sequence[Head]) -> Float[Tensor, "sample"]:
    """Mean of ``values`` over ``heads``, one number per sample."""
    return torch.stack([values[:, head.layer, head.head] for head in heads]).mean(dim=0)


def _where_they_are(study: Study, ranked_on: ContextualScores) -> list[Finding]:
    """Findings on the number of contextual heads and on their layers, with intervals from resampled questions."""
    (above,), n = ranked_on.sparsity((_READS,)), study.executor.shape.n_layers
    reads = study.resampled("train", ranked_on.relevant, ranked_on.sample_ids) > _READS
    share = percentile_interval(above.fraction, reads.mean(axis=1))
    sparse = Finding(
        f"Contextual heads are sparse: {above.count} of {reads.shape[1]} heads, a share of {share}, have a relevant "
        f"score above {_READS:g}. The limit for sparse is a share of {_FEW:g}.",
        all_of(verdict_by(share), verdict_below(share, _FEW)),
    )
    drawn = reads[reads.any(axis=1)]
    if above.layers is None or not len(drawn):
        return [sparse]
    # A layer's depth is the depth of its middle. All layers have the same number of heads.
    late = np.repeat([(layer + 0.5) / n > 1 / 3 for layer in range(n)], study.executor.shape.n_heads)
    estimate = float((ranked_on.mean().flatten().numpy() > _READS)[late].sum() / above.count)
    late_share = percentile_interval(estimate, drawn[:, late].sum(axis=1) / drawn.sum(axis=1))
    return [
        sparse,
        Finding(
            f"Contextual heads are mostly in middle and late layers: {late_share} of them are behind the first third "
            f"of the layers, where {late.mean():.3f} of all heads are. They are in layers {above.layers[0]} to "
            f"{above.layers[1]} of {n}, counted from 0.",
            verdict_by(late_share, above=float(late.mean())),
        ),
    ]


def _findings(
    study: Study, ranked_on: ContextualScores, cases: Mapping[str, ContextualScores], top: Sequence[Head]
) -> list[Finding]:
    findings = _where_they_are(study, ranked_on)
    for case, sign in (("correct", 1), ("wrong", -1)):
        scores = cases[case]
        gaps = sign * _over_heads(scores.relevant - scores.irrelevant_max, top)
        margin = study.interval("test", gaps, scores.sample_ids)
        text = (
            f"For {case} answers, the top {len(top)} heads attend {'more' if sign > 0 else 'less'} to the relevant "
            "document than to any other"
        )
        if margin is None:
            findings.append(Finding(f"{text}: there is no such question.", "cannot be told"))
            continue
        findings.append(Finding(f"{text}: by {signed(margin, 4)}.", verdict_by(margin)))
    more = study.interval("test", _over_heads(cases["gold"].sink - cases["long"].sink, top), cases["long"].sample_ids)
    if more is not None:
        text = "With the relevant document alone, these heads attend more to the sink: by"
        findings.append(Finding(f"{text} {signed(more, 4)}.", verdict_by(more)))
    return findings
