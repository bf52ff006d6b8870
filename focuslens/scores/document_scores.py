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
from focuslens.prompts.gold import Gold, gold_documents
from focuslens.prompts.sample import Case, MultiDocSample
from focuslens.scores.answer_sources import AnswerSources
from focuslens.scores.base import SCORED_SPANS, SINK, ResponseRun, each_document
from focuslens.scores.chance import ABOVE_UNITS, DocumentsAboveChance, Measure, chance_of_documents
from focuslens.scores.document_sums import gold_ranks, ideal_gain
from focuslens.scores.frames import document_frame
from focuslens.scores.given_responses import GivenResponses, given_responses
from focuslens.scores.saved_results import SavedResult
from focuslens.util.frames import SHARE, long_frame, rows_frame
from focuslens.util.statistics import Interval, bootstrap_mean

if TYPE_CHECKING:
    import pandas as pd

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
        rank: Rank of the gold document per sample, counted from 1, or of the best of several. If other documents have
            the same score, the gold document gets the worst of the tied ranks.
        accuracy: Share of samples with a gold document at rank 1.
        mrr: Mean reciprocal rank of the gold document, or of the best of several.
        ndcg: Mean normalised discounted cumulative gain. With one gold document, the value for a sample is
            ``1 / log2(1 + rank)``. With several, their values are added and divided by the sum for the first ranks.
        ranks: Ranks of all gold documents per sample, the best first.
    """

    top: tuple[int, ...]
    rank: tuple[int, ...]
    accuracy: Interval
    mrr: Interval
    ndcg: Interval
    ranks: tuple[tuple[int, ...], ...]

    def to_frame(self) -> pd.DataFrame:
        """Data frame with one row per ranked sample: top document, rank of the gold document, and its values."""
        rows = [
            {"top": top, "rank": ranks[0], "reciprocal_rank": 1 / ranks[0], "ndcg": _ndcg(ranks)}
            for top, ranks in zip(self.top, self.ranks, strict=True)
        ]
        return rows_frame(rows, {"reciprocal_rank": "0 to 1", "ndcg": "0 to 1"})


@dataclass(frozen=True, eq=False)
class DocumentScores(DocumentsAboveChance, SavedResult):
    """Contextual scores per head and document: attention from the response tokens, averaged over these tokens.

    :meth:`save` and :meth:`load` keep scores in a folder.

    Attributes:
        scores: Scores of each sample, ``[layer head document]``, with the documents in prompt order. All scores of a
            sample with an empty response are NaN.
        gold: Index of the gold document per sample, a tuple of several, or ``None`` for none.
        sample_ids: ``MultiDocSample.id`` of each sample.
        question_ids: ``MultiDocSample.question_id`` of each sample.
        responses: The scored response of each sample.
        correct: Whether each response contains an accepted answer.
        chance: Scores of even attention for the documents of each sample, by layer; empty if they are unknown (see
            :meth:`with_chance`).
    """

    scores: tuple[Float[Tensor, "layer head _"], ...]
    gold: tuple[Gold, ...]
    sample_ids: tuple[str, ...]
    question_ids: tuple[str, ...]
    responses: tuple[str, ...]
    correct: tuple[bool, ...]
    chance: tuple[Float[Tensor, "layer _"], ...] = ()

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        return f"DocumentScores({len(self)} samples, {sum(self.correct)} answered right)"

    def of(self, heads: Iterable[tuple[int, int]], by: Measure = "score") -> list[Float[Tensor, "_"]]:
        """Score of each document, or another measure of it, averaged over ``heads``. There is one tensor per sample.

        Raises:
            ValueError: If ``heads`` is empty or contains a head that does not exist, or as for :meth:`measured`.
        """
        head_list = as_heads(heads)
        if not head_list:
            raise ValueError("there are no heads to attribute by; give at least one, such as scores.top_heads(4)")
        if self.scores:
            check_heads(head_list, *self.scores[0].shape[:2])
        return [
            torch.stack([values[layer, head] for layer, head in head_list]).mean(dim=0) for values in self.measured(by)
        ]

    def sources(self, heads: Iterable[tuple[int, int]]) -> AnswerSources:
        """Document that each response came from, by mean score over ``heads``. No gold document is needed.

        Raises:
            ValueError: If ``heads`` is empty or contains a head that does not exist.
        """
        head_list = as_heads(heads)
        return AnswerSources(tuple(self.of(head_list)), head_list, self.sample_ids, self.responses)

    def to_frame(self, heads: Iterable[tuple[int, int]] | None = None) -> pd.DataFrame:
        """Data frame with one row per sample, document and head.

        If the chance level is known, there are columns with it and with the excess over it; see :data:`Measure`.

        Args:
            heads: The heads; by default all.

        Raises:
            ValueError: If ``heads`` contains a head that does not exist.
        """
        values = {"score": self.scores, **self._above_chance()}
        return document_frame(self.sample_ids, self.question_ids, self.gold, values, heads, ABOVE_UNITS)

    def attribution(
        self,
        heads: Iterable[tuple[int, int]],
        *,
        by: Measure = "score",
        correct: bool | None = None,
        seed: int = 0,
    ) -> Attribution:
        """Rank the documents of each sample by mean score over ``heads``, and return the ranks of the gold documents.

        Samples without a gold document and samples with an empty response are left out.

        Args:
            heads: The heads to average over.
            by: The measure to rank by: the score, which favours long documents, or its ``excess`` over chance.
            correct: Samples to use: ``True`` for those with a correct response, ``False`` for those with a wrong
                response, ``None`` for all.
            seed: Random seed of the bootstrap.

        Raises:
            ValueError: If ``heads`` is empty or contains a head that does not exist, or if all samples are left out.
        """
        used = [correct in (None, is_right) for is_right in self.correct]
        scores = [
            torch.full_like(one, torch.nan) if not use else one
            for one, use in zip(self.of(heads, by), used, strict=True)
        ]
        return rank_documents(scores, self.gold, self.question_ids, seed=seed)


def rank_documents(
    scores: Sequence[Float[Tensor, "_"]], gold: Sequence[Gold], question_ids: Sequence[str], *, seed: int = 0
) -> Attribution:
    """Rank the documents of each sample by score, and return the ranks of the gold documents.

    Samples without a gold document and samples whose scores are NaN are left out.

    Args:
        scores: Score of each document, one tensor per sample.
        gold: Index of the gold document per sample, a tuple of several, or ``None`` for none.
        question_ids: Question of each sample.
        seed: Random seed of the bootstrap.

    Raises:
        ValueError: If all samples are left out.
    """
    rankings = [
        (int(values.argmax()), tuple(gold_ranks(values, gold_documents(places)).tolist()), question)
        for values, places, question in zip(scores, gold, question_ids, strict=True)
        if gold_documents(places) and not bool(values.isnan().any())
    ]
    if not rankings:
        raise ValueError("no sample has a gold document and a response, so there is nothing to attribute")
    top, ranks, questions = zip(*rankings, strict=True)
    accuracy, mrr, ndcg = (
        bootstrap_mean(values, groups=questions, seed=seed)
        for values in (
            [float(own[0] == 1) for own in ranks],
            [1 / own[0] for own in ranks],
            [_ndcg(own) for own in ranks],
        )
    )
    return Attribution(top, tuple(own[0] for own in ranks), accuracy, mrr, ndcg, ranks)


def _ndcg(ranks: Sequence[int]) -> float:
    """Discounted cumulative gain of the ranks of all gold documents, over that of the first ranks."""
    return sum(1 / math.log2(1 + rank) for rank in ranks) / ideal_gain(len(ranks))


@dataclass(frozen=True, eq=False)
class AttentionBudget(SavedResult):
    """Share of the response tokens' attention that each part of the text receives. A head's shares sum to 1 per sample.

    :meth:`save` and :meth:`load` keep shares in a folder.

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

    def to_frame(self) -> pd.DataFrame:
        """Data frame with one row per sample, head and part."""
        _, n_layers, n_heads, _ = self.shares.shape
        axes = {"sample_id": self.sample_ids, "layer": range(n_layers), "head": range(n_heads), "part": BUDGET_PARTS}
        return long_frame(axes, {"share": self.shares}, {"share": SHARE})

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
    responses: GivenResponses | None = None,
    interventions: Sequence[Intervention] = (),
    max_new_tokens: int = 100,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool | None = None,
) -> DocumentScores:
    """Compute the contextual scores (equation 1) of every document in the long prompts.

    Args:
        model: The model, or an executor that runs the model in other processes, such as :class:`RayPool`.
        samples: The samples to score.
        responses: Responses to score, which are read in one pass after each prompt: one per sample, or a dictionary
            from ``MultiDocSample.id`` to the response. A response is a text, token ids or a :class:`Generation`. A text
            is tokenised as the continuation of its prompt. Token ids count up to the first stop token of the model. The
            scores of the tokens of a generation are those that the generation itself has. If ``None``, the model
            generates the responses.
        interventions: Interventions, applied in order during generation and scoring.
        max_new_tokens: Maximum length of a generated response, in tokens.
        batch_tokens: Maximum number of prompt tokens per batch; halved when memory runs out.
        progress: Whether to show a progress bar; :mod:`focuslens.util.progress` describes the default.

    Raises:
        ValueError: If there are no samples, if an accepted answer is empty after normalisation, if there is not one
            response per sample, or if a token id is not in the vocabulary.
        TypeError: If a response is neither a text nor token ids nor a generation.
    """
    executor, sample_list = executor_for(model), require_samples(samples)
    given = None if responses is None else given_responses(responses, sample_list, executor)
    options = RunOptions(max_new_tokens, batch_tokens, progress)
    run = ResponseRun(executor, sample_list, "long", options, interventions, given)
    scores, texts = [torch.empty(0)] * len(sample_list), [""] * len(sample_list)
    for batch in run.masses(each_document, _LABEL, needs=("document",)):
        for index, masses, response in zip(*batch, strict=True):
            scores[index], texts[index] = masses[..., : len(sample_list[index].documents)], response
    return DocumentScores(
        tuple(scores),
        tuple(sample.gold for sample in sample_list),
        tuple(sample.id for sample in sample_list),
        tuple(sample.question_id for sample in sample_list),
        tuple(texts),
        answered_right(texts, sample_list),
        chance_of_documents(executor, sample_list, texts),
    )


def attention_budget(
    model: FocusModel | Executor,
    samples: Iterable[MultiDocSample],
    case: Case = "long",
    *,
    responses: GivenResponses | None = None,
    interventions: Sequence[Intervention] = (),
    max_new_tokens: int = 100,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool | None = None,
) -> AttentionBudget:
    """Compute the share of the response tokens' attention that each part of the text receives.

    A token in several parts counts only for the part that comes first in :data:`BUDGET_PARTS`. ``case`` selects the
    documents in the prompts. All other arguments are those of :func:`document_scores`.
    """
    executor, sample_list = executor_for(model), require_samples(samples)
    given = None if responses is None else given_responses(responses, sample_list, executor)
    options = RunOptions(max_new_tokens, batch_tokens, progress)
    run = ResponseRun(executor, sample_list, case, options, interventions, given)
    shape = (len(sample_list), executor.shape.n_layers, executor.shape.n_heads, len(BUDGET_PARTS))
    shares, texts = torch.full(shape, torch.nan), [""] * len(sample_list)
    for batch in run.masses(_prompt_parts, _LABEL, needs=(*SCORED_SPANS, "question")):
        for index, masses, response in zip(*batch, strict=True):
            # Each row sums to 1. Attention that does not go to the prompt therefore goes to the response.
            shares[index] = torch.cat((masses, 1 - masses.sum(dim=-1, keepdim=True)), dim=-1)
            texts[index] = response
    return AttentionBudget(
        shares,
        tuple(sample.id for sample in sample_list),
        tuple(texts),
        answered_right(texts, sample_list),
        tuple(sample.question_id for sample in sample_list),
    )


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
