"""Attention from response tokens to each document, and the share of attention that each part of the text receives."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import as_heads, check_heads
from focuslens.hooks import Intervention
from focuslens.model.batching import BATCH_TOKENS, RunOptions
from focuslens.model.execution import Executor, executor_for
from focuslens.prompts.answers import answered_right, require_samples
from focuslens.prompts.batch import PromptBatch
from focuslens.prompts.sample import Case, MultiDocSample
from focuslens.scores.base import SINK, ResponseRun
from focuslens.util.statistics import Interval, bootstrap_mean

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel

__all__ = [
    "BUDGET_PARTS",
    "AttentionBudget",
    "Attribution",
    "DocumentScores",
    "attention_budget",
    "document_scores",
    "rank_documents",
]

BUDGET_PARTS = ("sink", "relevant", "irrelevant", "question", "template", "response")
"""Parts of the text. ``sink`` is the first two tokens, and ``template`` is the rest of the prompt."""


_LABEL = "attention by part"
"""Label of the progress bars."""


@dataclass(frozen=True)
class Attribution:
    """Ranks of the gold documents when the documents of each sample are ranked by contextual score.

    The means ``accuracy``, ``mrr`` and ``ndcg`` have 95 % bootstrap intervals over questions.

    Attributes:
        top: Index of the document with the highest score, per sample.
        rank: Rank of the gold document per sample, counted from 1. If other documents have the same score, the
            gold document gets the worst of the tied ranks.
        accuracy: Share of samples whose gold document has rank 1.
        mrr: Mean reciprocal rank of the gold document.
        ndcg: Mean normalised discounted cumulative gain. With one relevant document per sample, the value for a sample
            is ``1 / log2(1 + rank)``.
    """

    top: tuple[int, ...]
    rank: tuple[int, ...]
    accuracy: Interval
    mrr: Interval
    ndcg: Interval


@dataclass(frozen=True, eq=False)
class DocumentScores:
    """Contextual scores per head and document: attention from the response tokens, averaged over these tokens.

    Attributes:
        scores: Scores of each sample, ``[layer head document]``, with the documents in prompt order. All scores of a
            sample with an empty response are NaN.
        gold: Index of the gold document per sample; ``None`` for a sample without a gold document.
        sample_ids: ``MultiDocSample.id`` of each sample.
        question_ids: ``MultiDocSample.question_id`` of each sample.
        responses: The scored response of each sample.
        correct: Whether each response contains an accepted answer.
    """

    scores: tuple[Float[Tensor, "layer head _"], ...]
    gold: tuple[int | None, ...]
    sample_ids: tuple[str, ...]
    question_ids: tuple[str, ...]
    responses: tuple[str, ...]
    correct: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        return f"DocumentScores({len(self)} samples, {sum(self.correct)} answered right)"

    def of(self, heads: Iterable[tuple[int, int]]) -> list[Float[Tensor, "_"]]:
        """Score of each document, averaged over ``heads``. The list contains one tensor per sample.

        Raises:
            ValueError: If ``heads`` is empty or contains a head that does not exist.
        """
        head_list = as_heads(heads)
        if not head_list:
            raise ValueError("there are no heads to attribute by; give at least one, such as scores.top_heads(4)")
        if self.scores:
            check_heads(head_list, *self.scores[0].shape[:2])
        return [torch.stack([scores[layer, head] for layer, head in head_list]).mean(dim=0) for scores in self.scores]

    def attribution(
        self, heads: Iterable[tuple[int, int]], *, correct: bool | None = None, seed: int = 0
    ) -> Attribution:
        """Rank the documents of each sample by mean score over ``heads``, and return the ranks of the gold documents.

        Samples without a gold document and samples with an empty response are left out.

        Args:
            heads: The heads to average over.
            correct: Samples to use: ``True`` for those with a correct response, ``False`` for those with a wrong
                response, ``None`` for all.
            seed: Random seed of the bootstrap.

        Raises:
            ValueError: If ``heads`` is empty or contains a head that does not exist, or if all samples are left out.
        """
        used = [correct in (None, is_right) for is_right in self.correct]
        scores = [
            torch.full_like(one, torch.nan) if not use else one for one, use in zip(self.of(heads), used, strict=True)
        ]
        return rank_documents(scores, self.gold, self.question_ids, seed=seed)


def rank_documents(
    scores: Sequence[Float[Tensor, "_"]], gold: Sequence[int | None], question_ids: Sequence[str], *, seed: int = 0
) -> Attribution:
    """Rank the documents of each sample by score, and return the ranks of the gold documents.

    Samples without a gold document and samples whose scores are NaN are left out.

    Args:
        scores: Score of each document, one tensor per sample.
        gold: Index of the gold document per sample.
        question_ids: Question of each sample.
        seed: Random seed of the bootstrap.

    Raises:
        ValueError: If all samples are left out.
    """
    rankings = [
        (int(values.argmax()), int((values >= values[place]).sum()), question)
        for values, place, question in zip(scores, gold, question_ids, strict=True)
        if place is not None and not bool(values.isnan().any())
    ]
    if not rankings:
        raise ValueError("no sample has a gold document and a response, so there is nothing to attribute")
    top, rank, questions = (tuple(column) for column in zip(*rankings, strict=True))
    accuracy, mrr, ndcg = (
        bootstrap_mean(values, groups=questions, seed=seed)
        for values in (
            [float(gold_rank == 1) for gold_rank in rank],
            [1 / gold_rank for gold_rank in rank],
            [1 / math.log2(1 + gold_rank) for gold_rank in rank],
        )
    )
    return Attribution(top, rank, accuracy, mrr, ndcg)


@dataclass(frozen=True, eq=False)
class AttentionBudget:
    """Share of the response tokens' attention that each part of the text receives. A head's shares sum to 1 per sample.

    Attributes:
        shares: Share of each part in :data:`BUDGET_PARTS`; NaN for a sample with an empty response.
        sample_ids: ``MultiDocSample.id`` of each sample.
        responses: The response of each sample.
        correct: Whether each response contains an accepted answer.
        question_ids: ``MultiDocSample.question_id`` of each sample. If ``question_ids`` is empty, each sample counts as
            a separate question.
    """

    shares: Float[Tensor, "sample layer head part"]
    sample_ids: tuple[str, ...]
    responses: tuple[str, ...]
    correct: tuple[bool, ...]
    question_ids: tuple[str, ...] = ()

    def __repr__(self) -> str:
        n_layers, n_heads = self.shares.shape[1:3]
        return f"AttentionBudget({len(self.sample_ids)} samples, {n_layers} layers x {n_heads} heads)"

    def mean(self, heads: Iterable[tuple[int, int]]) -> dict[str, float]:
        """Mean share of each part over samples and ``heads``. Samples with an empty response are left out."""
        return dict(zip(BUDGET_PARTS, self._of(heads).nanmean(dim=0).tolist(), strict=True))

    def intervals(self, heads: Iterable[tuple[int, int]], *, seed: int = 0) -> dict[str, Interval]:
        """Mean share of each part over samples and ``heads``, with a 95 % bootstrap interval over questions.

        Raises:
            ValueError: If ``heads`` is empty or contains a head that does not exist, or if every response is empty.
        """
        shares = self._of(heads)
        indices = [i for i, row in enumerate(shares) if not bool(row.isnan().any())]
        if not indices:
            raise ValueError(f"none of the {len(shares)} samples has a response, so there is no attention to share")
        questions = [(self.question_ids or self.sample_ids)[i] for i in indices]
        return {
            part: bootstrap_mean(shares[indices, column].tolist(), groups=questions, seed=seed)
            for column, part in enumerate(BUDGET_PARTS)
        }

    def _of(self, heads: Iterable[tuple[int, int]]) -> Float[Tensor, "sample part"]:
        """Mean shares over ``heads``, for each sample."""
        head_list = check_heads(heads, *self.shares.shape[1:3])
        if not head_list:
            raise ValueError("there are no heads to average over; give at least one, such as scores.top_heads(4)")
        return torch.stack([self.shares[:, layer, head] for layer, head in head_list]).mean(dim=0)


def document_scores(
    model: FocusModel | Executor,
    samples: Iterable[MultiDocSample],
    *,
    interventions: Sequence[Intervention] = (),
    max_new_tokens: int = 100,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool | None = None,
) -> DocumentScores:
    """Generate responses to the long prompts, and compute the contextual scores (equation 1) of every document.

    Args:
        model: The model, or an executor that runs the model in other processes, such as :class:`RayPool`.
        samples: The samples to score.
        interventions: Interventions, applied in order during generation.
        max_new_tokens: Maximum length of a response, in tokens.
        batch_tokens: Maximum number of prompt tokens per batch; halved when memory runs out.
        progress: Whether to show a progress bar; :mod:`focuslens.util.progress` describes the default.

    Raises:
        ValueError: If there are no samples, or if an accepted answer is empty after normalisation.
    """
    executor, sample_list = executor_for(model), require_samples(samples)
    run = ResponseRun(executor, sample_list, "long", RunOptions(max_new_tokens, batch_tokens, progress), interventions)
    scores, responses = [torch.empty(0)] * len(sample_list), [""] * len(sample_list)
    for batch in run.masses(_documents, _LABEL):
        for index, masses, response in zip(*batch, strict=True):
            scores[index], responses[index] = masses[..., : len(sample_list[index].documents)], response
    return DocumentScores(
        tuple(scores),
        tuple(sample.gold_index for sample in sample_list),
        tuple(sample.id for sample in sample_list),
        tuple(sample.question_id for sample in sample_list),
        tuple(responses),
        answered_right(responses, sample_list),
    )


def attention_budget(
    model: FocusModel | Executor,
    samples: Iterable[MultiDocSample],
    case: Case = "long",
    *,
    interventions: Sequence[Intervention] = (),
    max_new_tokens: int = 100,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool | None = None,
) -> AttentionBudget:
    """Generate responses, and compute the share of the response tokens' attention that each part of the text receives.

    A token in several parts counts only for the part that comes first in :data:`BUDGET_PARTS`. ``case`` selects the
    documents in the prompts. All other arguments are those of :func:`document_scores`.
    """
    executor, sample_list = executor_for(model), require_samples(samples)
    run = ResponseRun(executor, sample_list, case, RunOptions(max_new_tokens, batch_tokens, progress), interventions)
    shape = (len(sample_list), executor.shape.n_layers, executor.shape.n_heads, len(BUDGET_PARTS))
    shares, responses = torch.full(shape, torch.nan), [""] * len(sample_list)
    for batch in run.masses(_prompt_parts, _LABEL):
        for index, masses, response in zip(*batch, strict=True):
            # Each row sums to 1. Attention that does not go to the prompt therefore goes to the response.
            shares[index] = torch.cat((masses, 1 - masses.sum(dim=-1, keepdim=True)), dim=-1)
            responses[index] = response
    return AttentionBudget(
        shares,
        tuple(sample.id for sample in sample_list),
        tuple(responses),
        answered_right(responses, sample_list),
        tuple(sample.question_id for sample in sample_list),
    )


def _documents(batch: PromptBatch) -> Float[Tensor, "batch key part"]:
    """Key masks of the documents: one part per document, in prompt order."""
    n_documents = max(len(prompt.spans["document"]) for prompt in batch.prompts)
    parts = torch.zeros(len(batch), batch.width, n_documents)
    for row, prompt, padding in zip(parts, batch.prompts, batch.padding, strict=True):
        for part, (start, end) in enumerate(prompt.spans["document"]):
            row[padding + start : padding + end, part] = 1
    return parts


def _prompt_parts(batch: PromptBatch) -> Float[Tensor, "batch key part"]:
    """Key masks of all parts in :data:`BUDGET_PARTS` except the response. Each prompt token belongs to one part."""
    names = BUDGET_PARTS[:-1]
    parts = torch.zeros(len(batch), batch.width, len(names))
    for row, prompt, padding in zip(parts, batch.prompts, batch.padding, strict=True):
        spans = {**prompt.spans, "sink": ((0, SINK),), "template": ((0, len(prompt.tokens)),)}
        # Parts are written in reverse order, so that earlier parts override later parts.
        for part, name in reversed(list(enumerate(names))):
            for start, end in spans.get(name, ()):
                row[padding + start : padding + end] = 0
                row[padding + start : padding + end, part] = 1
    return parts
