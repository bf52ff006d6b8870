"""Attention from a prompt's question to each document, before anything is generated, and rankings of documents by it.

The scoring of documents is that of published rerankers, on the prompts of this package:

* ``attention``: mean attention of the question's rows, summed over the tokens of a document.
* ``calibrated``: the same minus the attention of a null question after the same documents.
* ``filtered``: the same, without the tokens of a document whose calibrated attention, summed over the heads, is not
  above the mean of the document minus two standard deviations. With all heads this is ICR's scoring (Chen et al., 2024,
  arXiv 2410.02642), with heads chosen by QRHead's or CoRe's criterion it is theirs (arXiv 2506.09944 and 2510.02219).
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import Head, as_heads, check_heads
from focuslens.model.batching import BATCH_TOKENS, RunOptions, map_parts, require_fitting
from focuslens.model.execution import Executor, executor_for
from focuslens.model.question_rows import QuestionRows, check_rows, question_attention
from focuslens.prompts.answers import require_samples
from focuslens.prompts.batch import EncodedPrompt
from focuslens.prompts.gold import Gold, gold_documents
from focuslens.prompts.prompt import Span
from focuslens.prompts.sample import Document, MultiDocSample
from focuslens.prompts.spans import require_spans
from focuslens.scores.document_scores import Attribution, rank_documents
from focuslens.scores.document_sums import criterion, document_sums, filtered_sums
from focuslens.scores.frames import document_frame
from focuslens.scores.saved_results import SavedResult
from focuslens.util.frames import rows_frame
from focuslens.util.progress import progress_bar

if TYPE_CHECKING:
    import pandas as pd

    from focuslens.model.focus_model import FocusModel

__all__ = ["NULL_QUESTION", "QuestionScores", "Reranking", "Scoring", "question_scores", "rerank"]

NULL_QUESTION = "N/A"
"""Question without content, as in the code of ICR, QRHead and CoRe."""

Scoring: TypeAlias = Literal["attention", "calibrated", "filtered"]
"""How documents are scored; see the module."""

Selection: TypeAlias = Literal["attention", "ndcg", "contrast"]
"""Criterion of :meth:`QuestionScores.select`."""

_LABEL = "attention of questions"
"""Label of the progress bars."""


@dataclass(frozen=True, eq=False)
class QuestionScores(SavedResult):
    """Attention from the question to each document per head, before anything is generated.

    :meth:`save` and :meth:`load` keep scores in a folder.

    Attributes:
        attention: Attention of each sample, ``[layer head document]``, averaged over the question's rows and summed
            over a document's tokens, with the documents in prompt order.
        calibrated: The same minus the attention of the null question. Empty without a null question.
        filtered: The same without the tokens whose calibrated attention is not above the mean of the document minus two
            standard deviations, per head. Empty without a null question.
        ranked: Scores ``[document]`` of the scoring ``filtered`` for the heads :attr:`heads` together. Empty without a
            null question.
        ranked_by_all: The same for all heads of the model together.
        heads: Heads whose attention is summed in :attr:`ranked`.
        gold: Index of the gold document per sample, a tuple of several, or ``None`` for none.
        sample_ids: ``MultiDocSample.id`` of each sample.
        question_ids: ``MultiDocSample.question_id`` of each sample.
    """

    attention: tuple[Float[Tensor, "layer head _"], ...]
    calibrated: tuple[Float[Tensor, "layer head _"], ...]
    filtered: tuple[Float[Tensor, "layer head _"], ...]
    ranked: tuple[Float[Tensor, "_"], ...]
    ranked_by_all: tuple[Float[Tensor, "_"], ...]
    heads: tuple[Head, ...]
    gold: tuple[Gold, ...]
    sample_ids: tuple[str, ...]
    question_ids: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.attention)

    def __repr__(self) -> str:
        how = "calibrated" if self.calibrated else "not calibrated"
        return f"QuestionScores({len(self)} samples, {how}, ranked by {len(self.heads)} heads)"

    def of(
        self, heads: Iterable[tuple[int, int]] | None = None, scoring: Scoring = "attention"
    ) -> list[Float[Tensor, "_"]]:
        """Score of each document, one tensor per sample.

        Args:
            heads: The heads to sum over; by default :attr:`heads`. The scoring ``filtered`` knows these and all heads.
            scoring: How documents are scored; see :mod:`focuslens.scores.question_scores`.

        Raises:
            ValueError: If ``heads`` is empty or contains a head that does not exist, if the scoring is unknown or needs
                a null question, or if it is ``filtered`` and ``heads`` are other ones.
        """
        _check_scoring(scoring)
        if scoring != "attention" and not self.calibrated:
            raise ValueError(f"the scoring {scoring!r} needs a null question; pass null='{NULL_QUESTION}'")
        chosen = self.heads if heads is None else as_heads(heads)
        if not chosen:
            raise ValueError("there are no heads to rank by; give at least one, such as scores.top_heads(16)")
        if scoring == "filtered":
            if len(set(chosen)) == math.prod(self.attention[0].shape[:2]):
                return list(self.ranked_by_all)
            if set(chosen) != set(self.heads):
                raise ValueError(
                    "the scoring 'filtered' drops tokens by the sum over the heads, so it is computed for the heads "
                    "that were given to question_scores only; pass these heads there"
                )
            return list(self.ranked)
        values = self.attention if scoring == "attention" else self.calibrated
        check_heads(chosen, *self.attention[0].shape[:2])
        return [torch.stack([value[layer, head] for layer, head in chosen]).sum(dim=0) for value in values]

    def to_frame(self, heads: Iterable[tuple[int, int]] | None = None) -> pd.DataFrame:
        """Data frame with one row per sample, document and head, of ``heads`` or of all heads.

        Raises:
            ValueError: If ``heads`` contains a head that does not exist.
        """
        calibrated = {"calibrated": self.calibrated, "filtered": self.filtered} if self.calibrated else {}
        values = {"attention": self.attention, **calibrated}
        return document_frame(self.sample_ids, self.question_ids, self.gold, values, heads)

    def attribution(
        self, heads: Iterable[tuple[int, int]] | None = None, scoring: Scoring = "attention", *, seed: int = 0
    ) -> Attribution:
        """Rank the documents of each sample, and return the ranks of the gold documents.

        Samples without a gold document are left out.

        Args:
            heads: The heads to sum over; by default :attr:`heads`.
            scoring: How documents are scored.
            seed: Random seed of the bootstrap.

        Raises:
            ValueError: As for :meth:`of`, or if no sample has a gold document.
        """
        return rank_documents(self.of(heads, scoring), self.gold, self.question_ids, seed=seed)

    def select(
        self,
        k: int | None = None,
        *,
        by: Selection = "attention",
        temperature: float = 0.1,
        skip_upper: float = 0.0,
    ) -> list[tuple[Head, float]]:
        r"""Rank all heads by how well they find the gold document from the question.

        The criteria are ``attention`` (mean attention to the gold document, as for contextual heads), ``ndcg`` (mean
        NDCG@10 of the documents ranked by the head's filtered attention, QRHead's criterion) and ``contrast`` (mean of
        :math:`\mathrm{softmax}_d(a_d / T)` at the gold document, where :math:`a_d` is the attention to document
        :math:`d`: CoRe's criterion, which needs hard negatives). Of several gold documents, the attention and the
        softmax are added.

        Args:
            k: Number of heads; by default all.
            by: The criterion.
            temperature: Temperature :math:`T` of ``contrast``.
            skip_upper: Share of the upper layers to leave out, from 0 to less than 1. CoRe leaves out up to half.

        Returns:
            The heads with their values, the best first.

        Raises:
            ValueError: If a value is out of range, ``ndcg`` has no null question, or no sample has a gold document.
        """
        if by not in get_args(Selection):
            raise ValueError(f"by is {by!r}; it must be one of {', '.join(get_args(Selection))}")
        if not 0 <= skip_upper < 1:
            raise ValueError(f"skip_upper is {skip_upper}; it must be a share from 0 to less than 1")
        if not (math.isfinite(temperature) and temperature > 0):
            raise ValueError(f"temperature is {temperature}; it must be a positive number")
        if by == "ndcg" and not self.filtered:
            raise ValueError(f"the criterion 'ndcg' needs a null question; pass null='{NULL_QUESTION}'")
        values = [
            criterion(source, gold_documents(gold), by, temperature)
            for source, gold in zip(self.filtered if by == "ndcg" else self.attention, self.gold, strict=True)
            if gold_documents(gold)
        ]
        if not values:
            raise ValueError("no sample has a gold document, so no head can be chosen by it")
        mean = torch.stack(values).double().mean(dim=0)
        n_layers = int(len(mean) * (1 - skip_upper))
        ranked = sorted(
            (
                (Head(layer, head), float(mean[layer, head]))
                for layer in range(n_layers)
                for head in range(mean.shape[1])
            ),
            key=lambda entry: (-entry[1], entry[0]),
        )
        return ranked[:k]


def _check_scoring(scoring: str) -> None:
    if scoring not in get_args(Scoring):
        raise ValueError(f"scoring is {scoring!r}; it must be one of {', '.join(get_args(Scoring))}")


@dataclass(frozen=True)
class _Item:
    """Prompts of a sample, and the token ranges of its documents."""

    prompt: EncodedPrompt
    null: EncodedPrompt | None

    @property
    def documents(self) -> tuple[Span, ...]:
        return self.prompt.spans["document"]


def question_scores(
    model: FocusModel | Executor,
    samples: Iterable[MultiDocSample],
    heads: Iterable[tuple[int, int]] | None = None,
    *,
    rows: QuestionRows = "tail",
    null: str | None = NULL_QUESTION,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool | None = None,
) -> QuestionScores:
    """Attention from the question of each long prompt to each document, per head, before anything is generated.

    Each prompt is run once. The rows of the question are then run again over its keys and values, and so are those of
    the null question.

    Args:
        model: The model, or an executor that runs the model in other processes, such as :class:`RayPool`.
        samples: The samples to score.
        heads: Heads whose attention the scoring ``filtered`` sums; by default all, as in ICR.
        rows: ``question`` for the rows of the question's tokens, ``tail`` for the rows from the question's first token
            to the prompt's end, as in the published rerankers, or ``last`` for the row of the last prompt token.
        null: Question without content that calibrates the scores; ``None`` for none.
        batch_tokens: Maximum number of prompt tokens per batch; halved when memory runs out.
        progress: Whether to show a progress bar; :mod:`focuslens.util.progress` describes the default.

    Raises:
        ValueError: If there are no samples, if ``rows`` is unknown, if a head does not exist, or if a prompt does not
            fit the context.
    """
    check_rows(rows)
    executor, sample_list, shape = executor_for(model), require_samples(samples), executor_for(model).shape
    every = [Head(layer, head) for layer in range(shape.n_layers) for head in range(shape.n_heads)]
    chosen = tuple(every) if heads is None else check_heads(heads, shape.n_layers, shape.n_heads)
    options = RunOptions(1, batch_tokens, progress)
    items = [
        _Item(
            executor.encode(sample.prompt()),
            None if null is None else executor.encode(replace(sample, question=null).prompt()),
        )
        for sample in sample_list
    ]
    needs = ("document",) if rows == "last" else ("document", "question")
    require_spans(sample_list, [item.prompt for item in items], needs)
    names, lengths = [sample.id for sample in sample_list], [len(item.prompt.tokens) for item in items]
    require_fitting(names, lengths, shape.n_ctx)
    run = partial(_read_batch, every=every, chosen=chosen, rows=rows, n_heads=shape.n_heads)
    found: list[_Scores | None] = [None] * len(items)
    with progress_bar(_LABEL, len(items), show=options.progress) as bar:
        for batch, scores in map_parts(executor, run, items, names, lengths, options.batch_tokens):
            for index, one in zip(batch, scores, strict=True):
                found[index] = one
            bar.update(len(batch))
    complete = [one for one in found if one is not None]
    return QuestionScores(
        tuple(one.attention for one in complete),
        tuple(one.calibrated for one in complete if one.calibrated is not None),
        tuple(one.filtered for one in complete if one.filtered is not None),
        tuple(one.ranked for one in complete if one.ranked is not None),
        tuple(one.ranked_by_all for one in complete if one.ranked_by_all is not None),
        chosen,
        tuple(sample.gold for sample in sample_list),
        tuple(sample.id for sample in sample_list),
        tuple(sample.question_id for sample in sample_list),
    )


@dataclass(frozen=True)
class _Scores:
    """Scores of one sample."""

    attention: Float[Tensor, "layer head document"]
    calibrated: Float[Tensor, "layer head document"] | None = None
    filtered: Float[Tensor, "layer head document"] | None = None
    ranked: Float[Tensor, "document"] | None = None
    ranked_by_all: Float[Tensor, "document"] | None = None


@torch.no_grad()
def _read_batch(
    model: FocusModel,
    items: Sequence[_Item],
    budget: int,
    *,
    every: Sequence[Head],
    chosen: Sequence[Head],
    rows: QuestionRows,
    n_heads: int,
) -> list[_Scores]:
    """Scores of each sample of a batch."""
    prefix = model.prefill([item.prompt for item in items], hold_last=True)
    nulls = [item.null for item in items if item.null is not None]
    read = question_attention(model, prefix, every, rows, nulls or None)
    places = [layer * n_heads + head for layer, head in chosen]
    scores: list[_Scores] = []
    for i, (item, padding) in enumerate(zip(items, prefix.batch.padding, strict=True)):
        attention = read.attention[i, :, padding:]
        plain = document_sums(attention, item.documents).unflatten(0, (-1, n_heads))
        if read.null is None:
            scores.append(_Scores(plain))
            continue
        change = attention - read.null[i, :, padding:]
        scores.append(
            _Scores(
                plain,
                document_sums(change, item.documents).unflatten(0, (-1, n_heads)),
                filtered_sums(change, item.documents).unflatten(0, (-1, n_heads)),
                filtered_sums(change[places].sum(dim=0), item.documents),
                filtered_sums(change.sum(dim=0), item.documents),
            )
        )
    return scores


@dataclass(frozen=True, eq=False)
class Reranking:
    """Order of documents for a question.

    Attributes:
        order: Indices of the documents, the most relevant first. Documents with equal scores keep their order.
        scores: Score of each document, in the given order of documents.
    """

    order: tuple[int, ...]
    scores: tuple[float, ...]

    def to_frame(self) -> pd.DataFrame:
        """Data frame with one row per document, the most relevant first: ``rank`` from 1, ``document``, ``score``."""
        rows = [{"rank": i, "document": one, "score": self.scores[one]} for i, one in enumerate(self.order, start=1)]
        return rows_frame(rows, {"score": "attention from the question, summed over heads"})


def rerank(
    model: FocusModel | Executor,
    question: str,
    documents: Sequence[Document | str],
    heads: Iterable[tuple[int, int]] | None = None,
    *,
    scoring: Scoring = "filtered",
    rows: QuestionRows = "tail",
    null: str = NULL_QUESTION,
) -> Reranking:
    """Order documents by the attention that they receive from a question.

    With the default settings and no heads, this is ICR's algorithm on the prompt of this package; with heads chosen by
    ``QuestionScores.select(by="ndcg")`` or read from a file, QRHead's; with heads of ``by="contrast"``, CoRe's.

    Args:
        model: The model, or an executor.
        question: The question.
        documents: The documents, as :class:`Document` or as texts without a title.
        heads: The heads to sum over; by default all.
        scoring: How documents are scored; see :mod:`focuslens.scores.question_scores`.
        rows: Rows to read; see :func:`question_scores`.
        null: Question without content that calibrates the scores.

    Raises:
        ValueError: If there are no documents, if the scoring is unknown, or as for :func:`question_scores`.
    """
    _check_scoring(scoring)
    given = tuple(one if isinstance(one, Document) else Document("", one) for one in documents)
    # Samples need an answer. It is not in the prompt, and no response is generated.
    sample = MultiDocSample(question, (question,), given, None)
    scores = question_scores(model, [sample], heads, rows=rows, null=null, progress=False).of(scoring=scoring)[0]
    order = sorted(range(len(given)), key=lambda i: (-float(scores[i]), i))
    return Reranking(tuple(order), tuple(scores.tolist()))
