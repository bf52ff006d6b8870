"""Figures 2, 5 and 6 and Table 1: which heads read the relevant document, and what they do when the answer is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.evaluation import percentile_interval
from focuslens.heads import Head
from focuslens.scores.contextual import ContextualScores
from focuslens.studies.paper import reported
from focuslens.studies.paper.artefact import Artefact, Finding, all_of, keep_heads, signed, verdict_below, verdict_by
from focuslens.studies.paper.scored import KINDS_SAID
from focuslens.studies.paper.study import Study
from focuslens.util.html import Cell
from focuslens.viz import Table, head_map

__all__ = ["KEY", "SECTIONS", "run"]

KEY = "heads"
SECTIONS = ("scores",)
_OUTLINED = 20
"""Heads that are outlined, where they are no more than a quarter of all."""
_READS = 0.1
"""The relevant score above which a head counts as one that reads the relevant document."""
_FEW = 0.25
"""The share of heads below which they are few."""
_KINDS = {"R": "relevant", "IR": "irrelevant", "IR max": "irrelevant_max", "sink": "sink"}


def run(study: Study) -> Artefact:
    """The head map on training questions, and the top heads' scores on held-out ones."""
    settings, ranking = study.settings.scores, study.ranking
    ranked_on = study.scores("train", "long")
    cases = study.scores_by_case("test")
    top = ranking[: settings.top]
    means, best = ranked_on.mean().numpy(), ranking[: min(_OUTLINED, len(ranking) // 4)]
    keep_heads(head_map(means, heads=best), study.folder(KEY) / "head_map.png", {"relevant": means})
    sparsity = ranked_on.sparsity(settings.thresholds)
    counts = Table(
        "Heads whose relevant contextual score (share of attention, training questions) exceeds a threshold",
        ("threshold", "heads", "share of heads", "first layer", "last layer"),
        tuple((one.threshold, one.count, one.fraction, *(one.layers or ("-", "-"))) for one in sparsity),
    )
    caption = (
        f"Contextual scores of the top {settings.top} heads on held-out questions. {KINDS_SAID}. Samples: "
        f"{_sizes(cases)}; correct and wrong: right with the relevant document alone, and right or wrong with all"
    )
    return Artefact(
        KEY,
        "Contextual heads",
        "Figures 2, 5 and 6, Table 1",
        tuple(_findings(study, ranked_on, cases, top)),
        (
            (
                f"Relevant contextual score of every head on training questions; the best {len(best)} are outlined.",
                "head_map.png",
            ),
        ),
        (counts, scores_table(caption, cases, top), _map_table(ranked_on)),
        (reported.FIGURE_2, reported.TABLE_1),
    )


def scores_table(caption: str, cases: Mapping[str, ContextualScores], heads: Sequence[Head]) -> Table:
    """Mean scores of some heads in every case that has samples, in the layout of Table 1."""
    columns: list[str] = ["head"]
    rows: list[list[Cell]] = [[str(head)] for head in heads]
    for case, scores in cases.items():
        kinds = ("R", "sink") if case == "gold" else tuple(_KINDS)
        columns += [f"{kind} {case}" for kind in kinds]
        for kind in kinds:
            nothing = not len(scores) or bool(getattr(scores, _KINDS[kind]).isnan().all())
            means = None if nothing else scores.mean(_KINDS[kind])
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
    """One value a sample: the mean of some heads."""
    return torch.stack([values[:, head.layer, head.head] for head in heads]).mean(dim=0)


def _where_they_are(study: Study, ranked_on: ContextualScores) -> list[Finding]:
    """How many heads read the relevant document, and in which layers; resampled over training questions."""
    (above,), n = ranked_on.sparsity((_READS,)), study.executor.shape.n_layers
    reads = study.resampled("train", ranked_on.relevant, ranked_on.sample_ids) > _READS
    share = percentile_interval(above.fraction, reads.mean(axis=1))
    sparse = Finding(
        f"Contextual heads are sparse: {above.count} of {reads.shape[1]} heads, a share of {share}, have a relevant "
        f"score above {_READS:g}; sparse is less than {_FEW:g}.",
        all_of(verdict_by(share), verdict_below(share, _FEW)),
    )
    drawn = reads[reads.any(axis=1)]
    if above.layers is None or not len(drawn):
        return [sparse]
    # The depth of a layer is that of its middle; every layer has as many heads.
    late = np.repeat([(layer + 0.5) / n > 1 / 3 for layer in range(n)], study.executor.shape.n_heads)
    estimate = float((ranked_on.mean().flatten().numpy() > _READS)[late].sum() / above.count)
    lying = percentile_interval(estimate, drawn[:, late].sum(axis=1) / drawn.sum(axis=1))
    return [
        sparse,
        Finding(
            f"They lie mostly in middle and late layers: {lying} of them lie behind the first third of the layers, "
            f"where {late.mean():.3f} of all heads do; they are in layers {above.layers[0]} to {above.layers[1]} of "
            f"{n}, counted from 0.",
            verdict_by(lying, above=float(late.mean())),
        ),
    ]


def _findings(
    study: Study, ranked_on: ContextualScores, cases: Mapping[str, ContextualScores], top: Sequence[Head]
) -> list[Finding]:
    found = _where_they_are(study, ranked_on)
    for case, sign in (("correct", 1), ("wrong", -1)):
        scores = cases[case]
        gaps = sign * _over_heads(scores.relevant - scores.irrelevant_max, top)
        margin = study.interval("test", gaps, scores.sample_ids)
        text = (
            f"Where the answer is {case}, the top {len(top)} heads attend {'more' if sign > 0 else 'less'} to the "
            "relevant document than to any other"
        )
        if margin is None:
            found.append(Finding(f"{text}: there is no such question.", "cannot be told"))
            continue
        found.append(Finding(f"{text}: by {signed(margin, 4)}.", verdict_by(margin)))
    more = study.interval("test", _over_heads(cases["gold"].sink - cases["long"].sink, top), cases["long"].sample_ids)
    if more is not None:
        text = "Where the relevant document stands alone, the sink gets more of these heads' attention: by"
        found.append(Finding(f"{text} {signed(more, 4)}.", verdict_by(more)))
    return found
