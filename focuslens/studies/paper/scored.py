"""Scores and attention budgets of many samples, stored in chunks so that a killed run can resume."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from einops import rearrange

from focuslens.data.needles import NeedleSample
from focuslens.evaluation import AttentionBudget, DocumentScores, attention_budget, document_scores
from focuslens.heads import Head
from focuslens.hooks import Intervention
from focuslens.model.batching import RunOptions
from focuslens.model.execution import Executor, executor_for
from focuslens.model.focus_model import FocusModel
from focuslens.prompts.sample import Case, MultiDocSample
from focuslens.scores.contextual_scores import KINDS, ContextualScores, contextual_scores
from focuslens.scores.retrieval_scores import RetrievalScores, copy_runs
from focuslens.studies.paper.chunks import Measured, chunk_size, measure_in_chunks

__all__ = [
    "KINDS_CAPTION",
    "budget_in_chunks",
    "documents_in_chunks",
    "head_mean",
    "retrieval_in_chunks",
    "score_in_chunks",
]


KINDS_CAPTION = (
    "Shares of attention: R to the relevant document, IR to all other documents together, IR max to the other document "
    "with the largest share, sink to the first two tokens"
)
"""Explanation of the columns ``R``, ``IR``, ``IR max`` and ``sink``, for captions of tables."""


def score_in_chunks(
    model: FocusModel | Executor,
    samples: Sequence[MultiDocSample],
    case: Case,
    folder: Path,
    options: RunOptions,
    interventions: Sequence[Intervention] = (),
) -> ContextualScores:
    """Run :func:`contextual_scores` in chunks. Finished chunks are read from ``folder``."""

    def measure(chunk: Sequence[MultiDocSample]) -> Measured:
        scores = contextual_scores(model, chunk, case, interventions=interventions, **asdict(options))
        about = {name: getattr(scores, name) for name in ("sample_ids", "responses", "correct")}
        return Measured({kind: getattr(scores, kind) for kind in KINDS}, about)

    measured = _in_chunks(model, samples, folder, measure, f"scores ({case})", options)
    return ContextualScores(
        *(measured.tensors[kind] for kind in KINDS),
        case=case,
        **{name: tuple(values) for name, values in measured.about.items()},
    )


def documents_in_chunks(
    model: FocusModel | Executor, samples: Sequence[MultiDocSample], folder: Path, options: RunOptions
) -> DocumentScores:
    """Run :func:`document_scores` in chunks. Finished chunks are read from ``folder``."""

    def measure(chunk: Sequence[MultiDocSample]) -> Measured:
        scores = document_scores(model, chunk, **asdict(options))
        # Tensors are concatenated along the document axis, because samples may have different numbers of documents.
        documents = [rearrange(shares, "layer head document -> document layer head") for shares in scores.scores]
        about = {name: getattr(scores, name) for name in ("sample_ids", "responses", "correct")}
        return Measured({"scores": torch.cat(documents)}, about)

    measured = _in_chunks(model, samples, folder, measure, "scores (documents)", options)
    by_sample = measured.tensors["scores"].split([len(sample.documents) for sample in samples])
    return DocumentScores(
        tuple(rearrange(shares, "document layer head -> layer head document") for shares in by_sample),
        tuple(sample.gold for sample in samples),
        question_ids=tuple(sample.question_id for sample in samples),
        **{name: tuple(values) for name, values in measured.about.items()},
    )


def budget_in_chunks(
    model: FocusModel | Executor,
    samples: Sequence[MultiDocSample],
    folder: Path,
    options: RunOptions,
    interventions: Sequence[Intervention] = (),
) -> AttentionBudget:
    """Run :func:`attention_budget` on the long prompts in chunks. Finished chunks are read from ``folder``."""

    def measure(chunk: Sequence[MultiDocSample]) -> Measured:
        budget = attention_budget(model, chunk, interventions=interventions, **asdict(options))
        about = {name: getattr(budget, name) for name in ("sample_ids", "responses", "correct")}
        return Measured({"shares": budget.shares}, about)

    measured = _in_chunks(model, samples, folder, measure, "attention budget", options)
    about = {name: tuple(values) for name, values in measured.about.items()}
    return AttentionBudget(measured.tensors["shares"], **about)


def retrieval_in_chunks(
    model: FocusModel | Executor, samples: Sequence[NeedleSample], folder: Path, options: RunOptions
) -> RetrievalScores:
    """Run :func:`focuslens.retrieval_scores` in chunks. Finished chunks are read from ``folder``.

    Raises:
        NoRunCountsError: If no response contains its needle.
    """

    def measure(chunk: Sequence[NeedleSample]) -> Measured:
        copies, responses = copy_runs(model, chunk, options)
        return Measured({"copies": copies}, {"sample_ids": [sample.id for sample in chunk], "responses": responses})

    measured = _in_chunks(model, samples, folder, measure, "retrieval scores", options)
    return RetrievalScores.of_runs(samples, measured.tensors["copies"], measured.about["responses"])


def _in_chunks(
    model: FocusModel | Executor,
    samples: Sequence[Any],
    folder: Path,
    measure: Callable[[Sequence[Any]], Measured],
    label: str,
    options: RunOptions,
) -> Measured:
    size = chunk_size(executor_for(model), samples[0]) if samples else 1
    return measure_in_chunks(samples, folder, measure, label=label, chunk=size, progress=options.progress)


def head_mean(scores: ContextualScores, kind: str, head: Head) -> float | None:
    """Mean score of one head over all samples with a score, or ``None`` if no sample has a score."""
    values = getattr(scores, kind)[:, head.layer, head.head]
    return None if bool(values.isnan().all()) else float(values.nanmean())
