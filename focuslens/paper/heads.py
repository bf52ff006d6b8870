"""Figures 2, 5 and 6 and Table 1: which heads read the relevant document, and what they do when the answer is wrong."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import Head
from focuslens.paper import reported
from focuslens.paper.artefact import Artefact, Finding, keep_figure, verdict_by
from focuslens.paper.study import Study
from focuslens.scoring import ContextualScores
from focuslens.viz import Table, head_map

__all__ = ["KEY", "SECTIONS", "run"]

KEY = "heads"
SECTIONS = ("scores",)
_KINDS = {"R": "relevant", "IR": "irrelevant", "IR max": "irrelevant_max", "sink": "sink"}


def run(study: Study) -> Artefact:
    """The head map on training questions, and the top heads' scores on held-out ones."""
    settings, ranking = study.settings.scores, study.ranking
    ranked_on = study.scores("train", "long")
    cases = study.scores_by_case("test")
    top = ranking[: settings.top]
    figure = head_map(ranked_on.mean().numpy(), heads=ranking[: min(20, len(ranking))])
    keep_figure(figure, study.folder(KEY) / "head_map.png")
    sparsity = ranked_on.sparsity(settings.thresholds)
    counts = Table(
        "Heads whose relevant contextual score (share of attention, training questions) exceeds a threshold",
        ("threshold", "heads", "share of heads", "first layer", "last layer"),
        tuple(
            (one.threshold, one.count, f"{100 * one.fraction:.1f} %", *(one.layers or ("-", "-"))) for one in sparsity
        ),
    )
    caption = f"Contextual scores of the top {settings.top} heads on held-out questions ({_sizes(cases)})"
    return Artefact(
        KEY,
        "Contextual heads",
        "Figures 2, 5 and 6, Table 1",
        tuple(_findings(study, ranked_on, cases, top)),
        (("Relevant contextual score of every head on training questions; the best are outlined.", "head_map.png"),),
        (counts, scores_table(caption, cases, top), _map_table(ranked_on)),
        (reported.FIGURE_2, reported.TABLE_1),
    )


def scores_table(caption: str, cases: Mapping[str, ContextualScores], heads: Sequence[Head]) -> Table:
    """Mean scores of some heads in every case that has samples, in the layout of Table 1."""
    columns, rows = ["head"], [[str(head)] for head in heads]
    for case, scores in cases.items():
        kinds = ("R", "sink") if case == "gold" else tuple(_KINDS)
        columns += [f"{kind} {case}" for kind in kinds]
        for kind in kinds:
            nothing = not len(scores) or bool(getattr(scores, _KINDS[kind]).isnan().all())
            means = None if nothing else scores.mean(_KINDS[kind])
            for row, head in zip(rows, heads, strict=True):
                row.append("-" if means is None else f"{float(means[head]):.3f}")
    return Table(caption, tuple(columns), tuple(tuple(row) for row in rows))


def _sizes(cases: Mapping[str, ContextualScores]) -> str:
    return ", ".join(f"{len(scores)} {case}" for case, scores in cases.items())


def _map_table(scores: ContextualScores) -> Table:
    frame = scores.to_frame()
    return Table(
        "Scores of every head on training questions, best first",
        tuple(frame.columns),
        tuple(tuple(int(x) if i < 2 else float(x) for i, x in enumerate(row)) for row in frame.itertuples(index=False)),
    )


def _over_heads(values: Tensor, heads: Sequence[Head]) -> Float[Tensor, "sample"]:
    """One value a sample: the mean of some heads."""
    return torch.stack([values[:, head.layer, head.head] for head in heads]).mean(dim=0)


def _findings(
    study: Study, ranked_on: ContextualScores, cases: Mapping[str, ContextualScores], top: Sequence[Head]
) -> list[Finding]:
    above = ranked_on.sparsity((0.1,))[0]
    where = "" if above.layers is None else f", in layers {above.layers[0]} to {above.layers[1]}"
    found = [
        Finding(
            f"Contextual heads are sparse: {above.count} of {ranked_on.relevant[0].numel()} heads have a relevant "
            f"score above 0.1{where} of {study.executor.shape.n_layers}, counted from 0.",
            "holds" if 0 < above.fraction < 0.25 else "does not hold",
        )
    ]
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
        found.append(Finding(f"{text}: by {margin}.", verdict_by(margin)))
    more = study.interval("test", _over_heads(cases["gold"].sink - cases["long"].sink, top), cases["long"].sample_ids)
    if more is not None:
        text = "Where the relevant document stands alone, the sink gets more of these heads' attention: by"
        found.append(Finding(f"{text} {more}.", verdict_by(more)))
    return found
