"""Scores of single responses: attention to each document, and shares of attention by part of the prompt."""

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
from focuslens.prompts.prompt import Case, MultiDocSample
from focuslens.scores.attention_mass import SINK, ResponseRun
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
]

BUDGET_PARTS = ("sink", "relevant", "irrelevant", "question", "template", "response")
"""Parts that divide the attention; ``sink`` is the first two tokens, and ``template`` is the rest of the prompt."""


_LABEL = "attention by part"
"""Text of the progress bars."""


@dataclass(frozen=True)
class Attribution:
    """Rank of the gold document when documents are ranked by their contextual score.

    Attributes:
        top: Index of the document with the highest score, per sample.
        rank: Rank of the gold document per sample, starting at 1. In a tie, it is the last of the tied ranks.
        accuracy: Share of samples whose gold document ranks first, with a 95 % bootstrap interval over questions.
        mrr: Mean reciprocal rank of the gold document.
        ndcg: Mean normalised discounted cumulative gain. For one relevant document, it is ``1 / log2(1 + rank)``.
    """

    top: tuple[int, ...]
    rank: tuple[int, ...]
    accuracy: Interval
    mrr: Interval
    ndcg: Interval


@dataclass(frozen=True, eq=False)
class DocumentScores:
    """Contextual scores per head and document: attention from the response, averaged over its tokens.

    Attributes:
        scores: Scores ``[layer head document]`` of each sample, documents in prompt order; NaN for an empty response.
        gold: Index of the gold document per sample; ``None`` for a sample without a gold document.
        sample_ids: ``MultiDocSample.id`` of each sample.
        question_ids: Question id of each sample.
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
        """Scores of each document, averaged over some heads. The list has one tensor per sample.

        Raises:
            ValueError: If there are no heads, or a head does not exist.
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
        """Rank the documents by their mean score over some heads, and report the rank of the gold document.

        Args:
            heads: The heads to average over.
            correct: ``True`` for samples answered right, ``False`` for samples answered wrong, ``None`` for all.
            seed: Seed of the bootstrap.

        Raises:
            ValueError: If no remaining sample has a gold document and a response.
        """
        rankings: list[tuple[int, int, str]] = []
        for scores, gold, question, is_right in zip(
            self.of(heads), self.gold, self.question_ids, self.correct, strict=True
        ):
            if gold is None or bool(scores.isnan().any()) or correct not in (None, is_right):
                continue
            rankings.append((int(scores.argmax()), int((scores >= scores[gold]).sum()), question))
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
    """Shares of the response tokens' attention by part of the text. The shares of a head sum to one.

    Attributes:
        shares: Share of each part of :data:`BUDGET_PARTS`; NaN for a sample whose response is empty.
        sample_ids: ``MultiDocSample.id`` of each sample.
        responses: The response to each sample.
        correct: Whether each response contains an accepted answer.
        question_ids: Question id of each sample. If empty, each sample counts as its own question.
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
        """Mean share of each part, over the samples and some heads."""
        return dict(zip(BUDGET_PARTS, self._of(heads).nanmean(dim=0).tolist(), strict=True))

    def intervals(self, heads: Iterable[tuple[int, int]], *, seed: int = 0) -> dict[str, Interval]:
        """Mean share of each part over some heads, with 95 % bootstrap intervals over questions.

        Raises:
            ValueError: If there are no heads, or no sample has a response.
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
        """Each sample's shares, averaged over some heads."""
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
    """Contextual scores (equation 1) of every document in the long prompts, for responses that the model generates.

    Args:
        model: The model, or an executor such as :class:`RayPool` that runs it elsewhere.
        samples: The samples to score.
        interventions: Interventions, applied in order during generation.
        max_new_tokens: Maximum length of a response, in tokens.
        batch_tokens: Maximum number of prompt tokens per batch; halved when memory runs out.
        progress: Whether to show a progress bar; :mod:`focuslens.util.progress` describes the default.

    Raises:
        ValueError: If there are no samples, or an answer is empty after normalisation.
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
    """Shares of the response tokens' attention by part of the text.

    A token that lies in two parts counts only for the part that comes first in :data:`BUDGET_PARTS`. ``case`` is the
    prompt to answer. All other arguments are those of :func:`document_scores`.
    """
    executor, sample_list = executor_for(model), require_samples(samples)
    run = ResponseRun(executor, sample_list, case, RunOptions(max_new_tokens, batch_tokens, progress), interventions)
    shape = (len(sample_list), executor.shape.n_layers, executor.shape.n_heads, len(BUDGET_PARTS))
    shares, responses = torch.full(shape, torch.nan), [""] * len(sample_list)
    for batch in run.masses(_prompt_parts, _LABEL):
        for index, masses, response in zip(*batch, strict=True):
            # Rows sum to one, so attention that is not on the prompt is on the response itself.
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
    """Masks of the documents: one column per document, in prompt order."""
    n_documents = max(len(prompt.spans["document"]) for prompt in batch.prompts)
    parts = torch.zeros(len(batch), batch.width, n_documents)
    for row, prompt, padding in zip(parts, batch.prompts, batch.padding, strict=True):
        for part, (start, end) in enumerate(prompt.spans["document"]):
            row[padding + start : padding + end, part] = 1
    return parts


def _prompt_parts(batch: PromptBatch) -> Float[Tensor, "batch key part"]:
    """Masks of the parts of :data:`BUDGET_PARTS`, except the response. Each key of a prompt belongs to one part."""
    names = BUDGET_PARTS[:-1]
    parts = torch.zeros(len(batch), batch.width, len(names))
    for row, prompt, padding in zip(parts, batch.prompts, batch.padding, strict=True):
        spans = {**prompt.spans, "sink": ((0, SINK),), "template": ((0, len(prompt.tokens)),)}
        # The first part is written last, so that it overrides the other parts.
        for part, name in reversed(list(enumerate(names))):
            for start, end in spans.get(name, ()):
                row[padding + start : padding + end] = 0
                row[padding + start : padding + end, part] = 1
    return parts
