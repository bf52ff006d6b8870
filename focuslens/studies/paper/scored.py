"""Scores of many samples in every form that the artefacts need, kept chunk by chunk so that a killed run goes on."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import torch
from einops import rearrange

from focuslens.data.needles import NeedleSample
from focuslens.evaluation import AttentionBudget, DocumentScores, attention_budget, document_scores
from focuslens.heads import Head
from focuslens.hooks import Intervention
from focuslens.model.batching import RunOptions
from focuslens.model.execution import Executor
from focuslens.model.focus_model import FocusModel
from focuslens.prompts.prompt import Case, MultiDocSample
from focuslens.scores.contextual import KINDS, ContextualScores, contextual_scores
from focuslens.scores.retrieval import RetrievalScores, copy_runs
from focuslens.studies.paper.chunks import Measured, measure_in_chunks

__all__ = [
    "KINDS_SAID",
    "budget_in_chunks",
    "documents_in_chunks",
    "head_mean",
    "retrieval_in_chunks",
    "score_in_chunks",
]


KINDS_SAID = (
    "Shares of attention: R to the relevant document, IR to all others together, IR max to the one other that gets "
    "most, sink to the first two tokens"
)
"""What the columns of a table of scores are."""


def score_in_chunks(
    model: FocusModel | Executor,
    samples: Sequence[MultiDocSample],
    case: Case,
    folder: Path,
    options: RunOptions,
    interventions: Sequence[Intervention] = (),
) -> ContextualScores:
    """:func:`contextual_scores`, taken from ``folder`` as far as they are there."""

    def measure(chunk: Sequence[MultiDocSample]) -> Measured:
        scores = contextual_scores(model, chunk, case, interventions=interventions, **asdict(options))
        about = {name: getattr(scores, name) for name in ("sample_ids", "responses", "correct")}
        return Measured({kind: getattr(scores, kind) for kind in KINDS}, about)

    found = measure_in_chunks(samples, folder, measure, label=f"scores ({case})", progress=options.progress)
    return ContextualScores(
        *(found.tensors[kind] for kind in KINDS),
        case=case,
        **{name: tuple(values) for name, values in found.about.items()},
    )


def documents_in_chunks(
    model: FocusModel | Executor, samples: Sequence[MultiDocSample], folder: Path, options: RunOptions
) -> DocumentScores:
    """:func:`document_scores`, taken from ``folder`` as far as they are there."""

    def measure(chunk: Sequence[MultiDocSample]) -> Measured:
        scores = document_scores(model, chunk, **asdict(options))
        # Prompts may differ in how many documents they have, so these are what is joined.
        documents = [rearrange(one, "layer head document -> document layer head") for one in scores.scores]
        about = {name: getattr(scores, name) for name in ("sample_ids", "responses", "correct")}
        return Measured({"scores": torch.cat(documents)}, about)

    found = measure_in_chunks(samples, folder, measure, label="scores (documents)", progress=options.progress)
    by_sample = found.tensors["scores"].split([len(sample.documents) for sample in samples])
    return DocumentScores(
        tuple(rearrange(one, "document layer head -> layer head document") for one in by_sample),
        tuple(sample.gold_index for sample in samples),
        question_ids=tuple(sample.question_id for sample in samples),
        **{name: tuple(values) for name, values in found.about.items()},
    )


def budget_in_chunks(
    model: FocusModel | Executor,
    samples: Sequence[MultiDocSample],
    folder: Path,
    options: RunOptions,
    interventions: Sequence[Intervention] = (),
) -> AttentionBudget:
    """:func:`attention_budget` of the long prompts, taken from ``folder`` as far as it is there."""

    def measure(chunk: Sequence[MultiDocSample]) -> Measured:
        budget = attention_budget(model, chunk, interventions=interventions, **asdict(options))
        about = {name: getattr(budget, name) for name in ("sample_ids", "responses", "correct")}
        return Measured({"shares": budget.shares}, about)

    found = measure_in_chunks(samples, folder, measure, label="attention budget", progress=options.progress)
    return AttentionBudget(found.tensors["shares"], **{name: tuple(values) for name, values in found.about.items()})


def retrieval_in_chunks(
    model: FocusModel | Executor, samples: Sequence[NeedleSample], folder: Path, options: RunOptions
) -> RetrievalScores:
    """:func:`focuslens.retrieval_scores`, taken from ``folder`` as far as they are there.

    Raises:
        NoRunCountsError: If no response finds its needle.
    """

    def measure(chunk: Sequence[NeedleSample]) -> Measured:
        copies, responses = copy_runs(model, chunk, options)
        return Measured({"copies": copies}, {"sample_ids": [one.id for one in chunk], "responses": responses})

    found = measure_in_chunks(samples, folder, measure, label="retrieval scores", progress=options.progress)
    return RetrievalScores.of_runs(samples, found.tensors["copies"], found.about["responses"])


def head_mean(scores: ContextualScores, kind: str, head: Head) -> float | None:
    """One head's mean score; ``None`` where no sample has one."""
    values = getattr(scores, kind)[:, head.layer, head.head]
    return None if bool(values.isnan().all()) else float(values.nanmean())
