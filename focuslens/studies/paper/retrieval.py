"""Figure 9: contextual heads compared with the retrieval heads of Wu et al. (2024)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from einops import rearrange, reduce
from jaxtyping import Bool, Float, Int

from focuslens.data.needles import NeedleSample, load_haystack, load_needles, needle_samples, synthetic_needles
from focuslens.evaluation import percentile_interval, resampled_means
from focuslens.heads import Head
from focuslens.scores.retrieval_scores import NoRunCountsError, RetrievalScores
from focuslens.studies.paper import paper_values
from focuslens.studies.paper.artefact import Artefact, Finding, keep_heads, signed, verdict_below, verdict_by
from focuslens.studies.paper.scored import retrieval_in_chunks
from focuslens.studies.paper.study import Study
from focuslens.viz import Table, head_groups, head_map

__all__ = ["KEY", "SECTIONS", "check", "run"]

KEY = "retrieval"
SECTIONS = ("retrieval",)
_TITLE = "Contextual heads and retrieval heads"
_ALONE = "All needles in counted runs answer the same question, so the dependence on the question is unknown."


def run(study: Study) -> Artefact:
    """Compute copy scores on needle prompts, and compare the retrieval heads with the contextual heads."""
    settings, ranking, samples = study.settings.retrieval, study.ranking, _samples(study)
    try:
        scores = retrieval_in_chunks(
            study.executor, samples, study.kept("needles", "retrieval"), study.run_options(settings.max_new_tokens)
        )
    except NoRunCountsError as error:
        finding = Finding(f"The model finds no needle, so its retrieval heads are unknown: {error}", "cannot be told")
        return Artefact(KEY, _TITLE, "Figure 9", (finding,), reported=(paper_values.FIGURE_9,))
    k = min(settings.top, len(ranking) // 4)
    retrieving, contextual = scores.top_heads(k), ranking[:k]
    _draw(study, scores, contextual, retrieving)
    return Artefact(
        KEY,
        _TITLE,
        "Figure 9",
        tuple(_findings(study, samples, scores, contextual, retrieving)),
        (
            (f"Copy score of every head. The best {k} are outlined.", "retrieval_heads.png"),
            (f"The top {k} contextual heads, the top {k} retrieval heads, and the heads that are both.", "overlap.png"),
        ),
        (_heads_table(study, scores, contextual, retrieving),),
        (paper_values.FIGURE_9,),
    )


def check(study: Study) -> None:
    """Check that the essays and needles exist, before hours of work on other artefacts.

    Raises:
        FileNotFoundError: If the essays or the needles are missing.
    """
    haystack = study.settings.retrieval.haystack
    if haystack == "synthetic":
        return
    folder = study.haystack or Path(haystack)
    try:
        load_needles(folder / "needles.jsonl")
        load_haystack(folder)
    except FileNotFoundError as error:
        raise FileNotFoundError(f"{error}; name the folder of essays and needles with --haystack") from None


def _samples(study: Study) -> list[NeedleSample]:
    settings = study.settings.retrieval
    if settings.haystack == "synthetic":
        samples: list[NeedleSample] = []
        for count in settings.lengths:
            places = sorted({round(depth * (count - 1)) for depth in settings.depths})
            samples += synthetic_needles(
                count, places, settings.repeats * len(places), split="train", seed=study.settings.seed
            )
        return samples
    folder = study.haystack or Path(settings.haystack)
    needles = load_needles(folder / "needles.jsonl")
    return needle_samples(study.executor, load_haystack(folder), needles, settings.lengths, settings.depths)


def _draw(study: Study, scores: RetrievalScores, contextual: Sequence[Head], retrieving: Sequence[Head]) -> None:
    """Draw the map of copy scores, and the map of contextual and retrieval heads."""
    copies, folder = scores.scores.numpy(), study.folder(KEY)
    label = "copy score (share of the needle)"
    axes = head_map(copies, heads=retrieving, title="Retrieval heads", label=label)
    keep_heads(axes, folder / "retrieval_heads.png", {"copy score": copies})
    kinds = {"contextual": contextual, "retrieval": retrieving}
    marks = {name: np.zeros(copies.shape, dtype=np.int64) for name in kinds}
    for name, heads in kinds.items():
        for head in heads:
            marks[name][head] = 1
    groups, names = marks["contextual"] + 2 * marks["retrieval"], ("neither", "contextual", "retrieval", "both")
    axes = head_groups(groups, names, title="Contextual and retrieval heads")
    keep_heads(axes, folder / "overlap.png", marks)


def _heads_table(
    study: Study, scores: RetrievalScores, contextual: Sequence[Head], retrieving: Sequence[Head]
) -> Table:
    place = {head: i for i, head in enumerate(study.ranking, start=1)}
    rows = tuple(
        (i, str(contextual_head), str(head), float(scores.scores[head]), place[head])
        for i, (contextual_head, head) in enumerate(zip(contextual, retrieving, strict=True), start=1)
    )
    counted = sum(scores.counted)
    return Table(
        f"Best heads of both kinds, from {counted} of {len(scores)} needle runs with a ROUGE-1 recall above "
        f"{scores.min_recall:g}",
        (
            "place",
            "contextual head",
            "retrieval head",
            "its copy score (share of the needle)",
            "its place among contextual heads",
        ),
        rows,
    )


def _best(means: Float[np.ndarray, "resample head"], k: int) -> Bool[np.ndarray, "resample head"]:
    """Mask of the ``k`` best heads in each resample. Ties go to the first head, as in ``focuslens.rank_heads``."""
    best = np.zeros(means.shape, dtype=np.bool_)
    np.put_along_axis(best, np.argsort(-means, axis=1, kind="stable")[:, :k], True, axis=1)
    return best


def _held(best: Bool[np.ndarray, "resample head"], n_layers: int) -> Int[np.ndarray, "resample"]:
    """Number of layers that contain at least one of the best heads, per resample."""
    return reduce(best, "resample (layer head) -> resample layer", "max", layer=n_layers).sum(axis=1)


def _layers(heads: Sequence[Head]) -> str:
    layers = sorted(head.layer for head in heads)
    return f"layers {layers[0]} to {layers[-1]} (median {layers[len(layers) // 2]})"


def _findings(
    study: Study,
    samples: Sequence[NeedleSample],
    scores: RetrievalScores,
    contextual: Sequence[Head],
    retrieving: Sequence[Head],
) -> list[Finding]:
    """Findings on the overlap and the layers of contextual and retrieval heads, with intervals over questions."""
    k, n, n_layers = len(contextual), len(study.ranking), study.executor.shape.n_layers
    ranked_on, counted = study.scores("train", "long"), torch.tensor(scores.counted)
    pairs = zip(samples, scores.counted, strict=True)
    questions = [sample.prompt.part("question") for sample, is_counted in pairs if is_counted]
    copies = rearrange(scores.by_sample[counted], "sample layer head -> sample (layer head)").numpy()
    # The seed differs from that of the training questions, so that the two sets of questions are drawn independently.
    by_copies = _best(resampled_means(copies, groups=questions, seed=study.settings.seed + 1), k)
    by_scores = _best(study.resampled("train", ranked_on.relevant, ranked_on.sample_ids), k)
    shared = percentile_interval(len(set(contextual) & set(retrieving)), (by_copies & by_scores).sum(axis=1))
    more = percentile_interval(
        len({head.layer for head in retrieving}) - len({head.layer for head in contextual}),
        _held(by_copies, n_layers) - _held(by_scores, n_layers),
    )
    alone = len(set(questions)) < 2
    return [
        Finding(
            f"Contextual heads are not the retrieval heads: {shared.mean:g} [{shared.low:g}, {shared.high:g}] of the "
            f"top {k} of one kind are also among the top {k} of the other. {k * k / n:.1f} are expected by chance, and "
            f"the paper has 5 of 20. The limit for different kinds is half.{' ' + _ALONE if alone else ''}",
            "cannot be told" if alone else verdict_below(shared, k // 2 + 0.5),
        ),
        Finding(
            f"Retrieval heads are spread over more layers: contextual heads are in {_layers(contextual)}, retrieval "
            f"heads in {_layers(retrieving)}, of {n_layers} layers counted from 0. The number of layers with such a "
            f"head differs by {signed(more, 0)}.",
            "cannot be told" if alone else verdict_by(more),
        ),
    ]
