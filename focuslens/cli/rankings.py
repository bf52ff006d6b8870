"""Scores and rankings of heads, for the commands that need them."""

from __future__ import annotations

import hashlib
import logging
import math
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focuslens.cli.common import RunSettings, Samples, open_samples

if TYPE_CHECKING:
    from focuslens.data.selection import Part
    from focuslens.heads import Head, Sparsity
    from focuslens.model.execution import Executor
    from focuslens.model.focus_model import FocusModel
    from focuslens.prompts.sample import MultiDocSample
    from focuslens.scores.chance import Measure
    from focuslens.scores.contextual_scores import ContextualScores

__all__ = [
    "chance_entries",
    "count_heads",
    "get_ranking",
    "remove_scores",
    "score_intervals",
    "score_samples",
    "sparsity_entries",
]

_LOG = logging.getLogger(__name__)

_SCORES = "unfinished_scores.jsonl"
"""Name of the file in ``--out`` with the scores of a command that has not finished."""


def score_samples(
    settings: RunSettings, model: FocusModel | Executor, data: Samples, case: Any = "long"
) -> ContextualScores:
    """Contextual scores of every head on each sample, under the command's settings.

    With ``--out``, the scores are written to a file from which a killed command resumes. :func:`remove_scores` removes
    the file when the command has finished.
    """
    from focuslens.scores.contextual_scores import contextual_scores
    from focuslens.util.refused_runs import OtherResultsError

    work = partial(
        contextual_scores,
        model,
        data.samples,
        case,
        max_new_tokens=settings.max_new_tokens,
        batch_tokens=settings.batch_tokens,
        out=None if settings.out is None else settings.out / _SCORES,
        data=data.description,
    )
    try:
        return work()
    except OtherResultsError:
        _LOG.info("%s in --out is left of another command and cannot be resumed here; it is removed", _SCORES)
        remove_scores(settings)
        return work()


def remove_scores(settings: RunSettings) -> None:
    """Remove the file of :func:`score_samples`."""
    if settings.out is not None:
        (settings.out / _SCORES).unlink(missing_ok=True)


def score_intervals(
    scores: ContextualScores,
    samples: Sequence[MultiDocSample],
    heads: Sequence[Head],
    seed: int,
    most: int = 20,
    by: Measure = "score",
) -> dict[str, list[float]]:
    """95 % bootstrap intervals of the mean relevant score, or of another measure, for each of the first ``most`` heads.

    The bootstrap draws whole questions, and leaves out samples without a score. The result maps ``layer/head``, such
    as ``3/5``, to the ends of the head's interval.
    """
    from focuslens.evaluation import bootstrap_mean

    questions = {sample.id: sample.question_id for sample in samples}
    by_head = scores.measured("relevant", by)
    intervals: dict[str, list[float]] = {}
    for layer, head in heads[:most]:
        values = by_head[:, layer, head]
        known = [i for i, value in enumerate(values.tolist()) if not math.isnan(value)]
        groups = [questions[scores.sample_ids[i]] for i in known]
        interval = bootstrap_mean(values[known].tolist(), groups=groups, seed=seed)
        intervals[f"{layer}/{head}"] = [interval.low, interval.high]
    return intervals


def chance_entries(
    scores: ContextualScores, samples: Sequence[MultiDocSample], heads: Sequence[Head], seed: int
) -> dict[str, Any]:
    """Entries of a result file on the chance level; empty if it is unknown.

    They are the mean share that even attention would give to the relevant document, the numbers of heads whose excess
    over chance is above each threshold, and the intervals of the excess of the first heads.
    """
    share = scores.even_share()
    if share is None:
        return {}
    return {
        "chance": share,
        "sparsity_of_excess": sparsity_entries(scores.sparsity(by="excess")),
        "sparsity_of_document_excess": sparsity_entries(scores.sparsity(by="document_excess")),
        "excess_intervals": score_intervals(scores, samples, heads, seed, by="excess"),
    }


def sparsity_entries(rows: Sequence[Sparsity]) -> list[dict[str, Any]]:
    """Numbers of heads above thresholds, for result files."""
    return [{"threshold": row.threshold, "count": row.count, "fraction": row.fraction} for row in rows]


def get_ranking(
    file: str | None,
    settings: RunSettings,
    model: FocusModel | Executor,
    *,
    evaluated: bool = True,
    part: Part = "train",
) -> tuple[list[Head], dict[str, Any]]:
    """Ranking of heads, and a description of the ranking's source for result files.

    Args:
        file: File with a ranking, from ``--heads``. If ``None``, heads are ranked by their scores on training samples.
        settings: Settings of the command. Their number of documents also applies to the training samples.
        model: Model whose heads are scored.
        evaluated: Whether the command evaluates the samples of ``--split``.
        part: Part of the data that ranks the heads.

    Raises:
        ValueError: If heads would be ranked on samples that the command then evaluates, or on samples without a known
            relevant document.
    """
    from focuslens.heads import load_ranking
    from focuslens.util.rankings import ranking_path

    if file:
        digest = hashlib.sha256(ranking_path(file).read_bytes()).hexdigest()
        return load_ranking(file), {"file": Path(file).name, "sha256": digest}
    split = settings.samples.split
    if evaluated and split in ("train", "all"):
        raise ValueError(
            f"--split {split} evaluates training samples, on which heads would be ranked too; give --heads a ranking "
            "that was made on different samples, or leave --split out"
        )
    # Which rows are evaluated has no influence on the rows that rank heads.
    samples = replace(settings.samples, split=None, having=(), left_out=0)
    settings = replace(settings, samples=samples).fitted(model)
    train = open_samples(settings.samples, part)
    if all(sample.gold_index is None for sample in train.samples):
        raise ValueError(
            f"no relevant document is known in {settings.samples.file}, and heads are ranked by their attention to it; "
            "give --heads a ranking, or data whose relevant documents are known"
        )
    return score_samples(settings, model, train).ranking(), {"scored_on": train.identify()}


def count_heads(option: str, given: int | None, n: int, default: int = 20) -> int:
    """Number of heads that an option selects from ``n`` heads.

    If the option is not given, the number is ``default`` or ``n``, whichever is smaller.

    Raises:
        ValueError: If ``given`` is not between 1 and ``n``, or ``n`` is 0.
    """
    if n < 1:
        raise ValueError("there are no heads to choose from: the ranking is empty, or no head of it has a direction")
    if given is None:
        return min(default, n)
    if not 1 <= given <= n:
        raise ValueError(f"{option} {given}: there are {n} heads to choose from; give a number from 1 to {n}")
    return given
