"""Figure 9: contextual heads against the retrieval heads of Wu et al. (2024)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes

from focuslens.data.needles import NeedleSample, load_haystack, load_needles, needle_samples, synthetic_needles
from focuslens.heads import Head
from focuslens.paper import reported
from focuslens.paper.artefact import Artefact, Finding, keep_figure, write_csv
from focuslens.paper.study import Study
from focuslens.retrieval_heads import NoRunCountsError, RetrievalScores, retrieval_scores
from focuslens.viz import Table, head_map

__all__ = ["KEY", "SECTIONS", "check", "run"]

KEY = "retrieval"
SECTIONS = ("retrieval",)
_TITLE = "Contextual heads and retrieval heads"


def run(study: Study) -> Artefact:
    """Copy scores on needle-in-a-haystack prompts, and the overlap of the best with the best contextual heads."""
    wanted, ranking = study.settings.retrieval, study.ranking
    try:
        scores = retrieval_scores(
            study.executor,
            _samples(study),
            max_new_tokens=wanted.max_new_tokens,
            batch_tokens=study.settings.batch_tokens,
            progress=study.progress,
        )
    except NoRunCountsError as error:
        finding = Finding(f"The model finds no needle, so its retrieval heads are not known: {error}", "cannot be told")
        return Artefact(KEY, _TITLE, "Figure 9", (finding,), reported=(reported.FIGURE_9,))
    k = min(wanted.top, len(ranking) // 4)
    retrieving, contextual = scores.top_heads(k), ranking[:k]
    keep_figure(
        head_map(
            scores.scores.numpy(),
            heads=retrieving,
            title="Retrieval heads",
            label="copy score (share of the needle)",
        ),
        study.folder(KEY) / "retrieval_heads.png",
    )
    keep_figure(_both(study, contextual, retrieving), study.folder(KEY) / "overlap.png")
    _write_heads(study, scores, contextual, retrieving)
    return Artefact(
        KEY,
        _TITLE,
        "Figure 9",
        tuple(_findings(study, scores, contextual, retrieving)),
        (
            (f"Copy score of every head; the best {k} are outlined.", "retrieval_heads.png"),
            (
                f"The top {k} contextual heads (1), retrieval heads (2) and heads that are both (3); all others 0.",
                "overlap.png",
            ),
        ),
        (_heads_table(study, scores, contextual, retrieving),),
        (reported.FIGURE_9,),
    )


def _write_heads(study: Study, scores: RetrievalScores, contextual: Sequence[Head], retrieving: Sequence[Head]) -> None:
    """The numbers of both pictures, a line a head."""
    shape = study.executor.shape
    every = [Head(layer, head) for layer in range(shape.n_layers) for head in range(shape.n_heads)]
    copies = [(head.layer, head.head, float(scores.scores[head])) for head in every]
    kinds = [(*head, int(head in contextual), int(head in retrieving)) for head in every]
    write_csv(study.folder(KEY) / "retrieval_heads.csv", ("layer", "head", "copy score"), copies)
    write_csv(study.folder(KEY) / "overlap.csv", ("layer", "head", "contextual", "retrieval"), kinds)


def check(study: Study) -> None:
    """Say now, not after hours of other work, that there are no essays.

    Raises:
        FileNotFoundError: If there are none, or no needles.
    """
    wanted = study.settings.retrieval.haystack
    if wanted == "synthetic":
        return
    folder = study.haystack or Path(wanted)
    try:
        load_needles(folder / "needles.jsonl")
        load_haystack(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; name the folder of essays and needles with --haystack") from None


def _samples(study: Study) -> list[NeedleSample]:
    wanted = study.settings.retrieval
    if wanted.haystack == "synthetic":
        samples: list[NeedleSample] = []
        for count in wanted.lengths:
            places = sorted({round(depth * (count - 1)) for depth in wanted.depths})
            samples += synthetic_needles(
                count, places, wanted.repeats * len(places), split="train", seed=study.settings.seed
            )
        return samples
    folder = study.haystack or Path(wanted.haystack)
    needles = load_needles(folder / "needles.jsonl")
    return needle_samples(study.executor, load_haystack(folder), needles, wanted.lengths, wanted.depths)


def _both(study: Study, contextual: Sequence[Head], retrieving: Sequence[Head]) -> Axes:
    kinds = np.zeros((study.executor.shape.n_layers, study.executor.shape.n_heads))
    for value, heads in ((1, contextual), (2, retrieving)):
        for head in heads:
            kinds[head] += value
    return head_map(
        kinds,
        heads=sorted(set(contextual) & set(retrieving)),
        title="Contextual and retrieval heads",
        label="1 contextual, 2 retrieval, 3 both",
    )


def _heads_table(
    study: Study, scores: RetrievalScores, contextual: Sequence[Head], retrieving: Sequence[Head]
) -> Table:
    place = {head: i for i, head in enumerate(study.ranking, start=1)}
    rows = tuple(
        (i, str(ours), str(theirs), float(scores.scores[theirs]), place[theirs])
        for i, (ours, theirs) in enumerate(zip(contextual, retrieving, strict=True), start=1)
    )
    counted = sum(scores.counted)
    return Table(
        f"Best heads of both kinds ({counted} of {len(scores)} needle runs count: ROUGE-1 recall above "
        f"{scores.min_recall:g})",
        ("place", "contextual head", "retrieval head", "its copy score", "its place among contextual heads"),
        rows,
    )


def _layers(heads: Sequence[Head]) -> str:
    layers = sorted(head.layer for head in heads)
    return f"layers {layers[0]} to {layers[-1]} (median {layers[len(layers) // 2]})"


def _findings(
    study: Study, scores: RetrievalScores, contextual: Sequence[Head], retrieving: Sequence[Head]
) -> list[Finding]:
    k, n = len(contextual), len(study.ranking)
    shared = len(set(contextual) & set(retrieving))
    return [
        Finding(
            f"{shared} of the top {k} contextual heads are among the top {k} retrieval heads; {k * k / n:.1f} would be "
            "by chance. The paper finds them different (5 of 20).",
            "holds" if shared <= k / 2 else "does not hold",
        ),
        Finding(
            f"Contextual heads lie in {_layers(contextual)}, retrieval heads in {_layers(retrieving)}, of "
            f"{study.executor.shape.n_layers} layers counted from 0."
        ),
    ]
