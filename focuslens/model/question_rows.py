"""Attention from a prompt's question to every token before it, per head, before anything is generated."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, Protocol, TypeAlias, get_args, runtime_checkable

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import Head, heads_by_layer
from focuslens.hooks import Hook, RowHook, hook_name, row_wise
from focuslens.prompts.batch import EncodedPrompt, PromptBatch
from focuslens.prompts.prompt import Span

if TYPE_CHECKING:
    from focuslens.model.generation import Generation, Prefix

__all__ = [
    "QuestionAttention",
    "QuestionRows",
    "RowMeans",
    "answer_attention",
    "check_rows",
    "question_attention",
    "row_weights",
    "variant_attention",
]


@runtime_checkable
class RowReader(Protocol):
    """Model interface that reads rows of prompts, implemented by :class:`focuslens.FocusModel`."""

    def read_rows(
        self,
        prefix: Prefix,
        start: int,
        observers: Sequence[Hook],
        *,
        tokens: Tensor | None = None,
        mask: Tensor | None = None,
    ) -> None:
        """Run the last columns of the prompts again; see :meth:`ModelRunner.read_rows`."""
        ...

    def decode(
        self,
        prefix: Prefix,
        interventions: Sequence[Any] = (),
        *,
        max_new_tokens: int = 100,
        observers: Sequence[Hook] = (),
    ) -> list[Generation]:
        """Generate responses; see :meth:`ModelRunner.decode`."""
        ...


QuestionRows: TypeAlias = Literal["question", "tail", "last"]
"""Rows to read: those of the question's tokens, those from the question's first token to the prompt's end, or the row
of the prompt's last token."""


def check_rows(rows: str) -> None:
    """Raise ``ValueError`` unless ``rows`` is ``question``, ``tail`` or ``last``."""
    if rows not in get_args(QuestionRows):
        raise ValueError(f"rows is {rows!r}; it must be one of {', '.join(get_args(QuestionRows))}")


def row_weights(batch: PromptBatch, rows: QuestionRows) -> Float[Tensor, "batch column"]:
    """Weight of each row in the mean over the chosen rows. The weights of a prompt sum to 1.

    Raises:
        KeyError: If the rows depend on the question, and a prompt has no span ``question``.
        ValueError: If the span is empty.
    """
    weights = torch.zeros(len(batch), batch.width)
    for row, prompt, padding in zip(weights, batch.prompts, batch.padding, strict=True):
        for start, end in _ranges(prompt, rows):
            row[padding + start : padding + end] = 1
    return weights / weights.sum(dim=1, keepdim=True)


def _ranges(prompt: EncodedPrompt, rows: QuestionRows) -> Sequence[Span]:
    """Token ranges of the rows."""
    n = len(prompt.tokens)
    if rows == "last":
        return [(n - 1, n)]
    spans = prompt.resolve("question")
    if not spans:
        raise ValueError("a prompt has an empty span 'question', so no row of its question can be read")
    # The rows of a question before the documents do not see them.
    documents = prompt.spans.get("document") or ()
    first = min((start for start, _ in documents), default=0)
    after = [span for span in spans if span[0] >= first]
    if not after:
        raise ValueError(
            "a prompt asks its question before its documents, so the rows of the question do not see them; read the "
            "rows 'last', or ask the question after the documents (question_place='after' or 'both')"
        )
    return after if rows == "question" else [(after[0][0], n)]


@dataclass(frozen=True, eq=False)
class QuestionAttention:
    """Mean attention from the rows of a question to each token, for a batch of prompts.

    Attributes:
        heads: The heads, in the order of the second axis.
        attention: Mean attention to each column, ``[batch head column]``.
        null: The same for a question without content after the same documents; ``None`` if it was not measured. Columns
            that the two prompts do not share are zero.
    """

    heads: tuple[Head, ...]
    attention: Float[Tensor, "batch head column"]
    null: Float[Tensor, "batch head column"] | None = None


def question_attention(
    model: RowReader,
    prefix: Prefix,
    heads: Sequence[Head],
    rows: QuestionRows,
    null_prompts: Sequence[EncodedPrompt] | None = None,
) -> QuestionAttention:
    """Attention of the rows of each question of a prefix.

    The rows are run once more over the keys and values of the prefix: a few per prompt, up to the last layer that
    contains one of the heads. A null question is run over the columns that its prompt shares with the prompt.

    Args:
        model: The model.
        prefix: Prefix of the prompts.
        heads: The heads to read.
        rows: Rows to read.
        null_prompts: Each prompt with a null question in place of its question.

    Raises:
        KeyError: If the rows depend on the question, and a prompt has no span ``question``.
        ValueError: If the span is empty, or there are no heads.
    """
    if not heads:
        raise ValueError("there are no heads to read; give at least one, such as scores.top_heads(16)")
    weights = row_weights(prefix.batch, rows)
    means = RowMeans(heads, weights)
    model.read_rows(prefix, int(weights.any(dim=0).nonzero()[0]), means.hooks())
    if null_prompts is None:
        return QuestionAttention(tuple(heads), means.means())
    return QuestionAttention(tuple(heads), means.means(), _null_attention(model, prefix, heads, rows, null_prompts))


def _null_attention(
    model: RowReader, prefix: Prefix, heads: Sequence[Head], rows: QuestionRows, nulls: Sequence[EncodedPrompt]
) -> Float[Tensor, "batch head column"]:
    """Attention of the null questions to the columns that each prompt shares with its null question's prompt."""
    batch = prefix.batch
    means, attention = (
        variant_attention(model, prefix, heads, rows, nulls),
        torch.zeros(len(batch), len(heads), batch.width),
    )
    for i, (own, null, padding) in enumerate(zip(batch.prompts, nulls, batch.padding, strict=True)):
        end = padding + _shared_length(own, null, rows)
        attention[i, :, :end] = means[i, :, :end]
    return attention


def variant_attention(
    model: RowReader, prefix: Prefix, heads: Sequence[Head], rows: QuestionRows, variants: Sequence[EncodedPrompt]
) -> Float[Tensor, "batch head column"]:
    """Attention of the rows of variants of prompts to each column. The column of a token is padding + position.

    Tokens with which a prompt and its variant begin are not run again.

    Args:
        model: The model.
        prefix: Prefix of the prompts.
        heads: The heads to read.
        rows: Rows to read, which are those of the variants.
        variants: One variant of each prompt.
    """
    batch = prefix.batch
    shared = [_shared_length(own, variant, rows) for own, variant in zip(batch.prompts, variants, strict=True)]
    start = min(padding + n for padding, n in zip(batch.padding, shared, strict=True))
    # A short prompt beside one whose variant differs early can begin after ``start``. Padding then comes before it.
    before = [max(0, padding - start) for padding in batch.padding]
    parts = [variant.tokens[max(0, start - n) :] for variant, n in zip(variants, batch.padding, strict=True)]
    n_new = max(n + len(part) for n, part in zip(before, parts, strict=True))
    tokens, mask = (torch.zeros(len(batch), n_new, dtype=torch.long) for _ in range(2))
    weights = torch.zeros(len(batch), start + n_new)
    for i, (n, part, variant, padding) in enumerate(zip(before, parts, variants, batch.padding, strict=True)):
        tokens[i, n : n + len(part)], mask[i, n : n + len(part)] = part, 1
        weights[i, padding : padding + len(variant.tokens)] = row_weights(PromptBatch.of([variant]), rows)[0]
    reader = RowMeans(heads, weights)
    model.read_rows(prefix, start, reader.hooks(), tokens=tokens, mask=mask)
    return reader.means()


def _shared_length(own: EncodedPrompt, variant: EncodedPrompt, rows: QuestionRows) -> int:
    """Number of tokens with which both prompts begin, up to the first row to read of the variant."""
    first = _ranges(variant, rows)[0][0]
    n = min(len(own.tokens), first)
    differs = (own.tokens[:n] != variant.tokens[:n]).nonzero()
    return int(differs[0]) if len(differs) else n


class RowMeans:
    """Collector of the weighted mean attention of rows, per head. Hooks on ``hook_pattern`` read the rows.

    Args:
        heads: The heads to read.
        weights: Weight of the row of each column, ``[batch column]``. The weights of a prompt sum to 1.
    """

    def __init__(self, heads: Sequence[Head], weights: Float[Tensor, "batch column"]) -> None:
        self._heads, self._weights = tuple(heads), weights
        self._sums: dict[int, Float[Tensor, "batch head key"]] = {}

    def hooks(self) -> list[Hook]:
        """Hooks for passes over the rows."""
        return [
            (hook_name(layer, "hook_pattern"), self._observer(layer, torch.as_tensor(chosen)))
            for layer, chosen in heads_by_layer(self._heads).items()
        ]

    def _observer(self, layer: int, chosen: Tensor) -> RowHook:
        def read(pattern: Float[Tensor, "batch head row key"]) -> None:
            n_rows, n_keys = pattern.shape[-2:]
            weights = self._weights[:, n_keys - n_rows : n_keys].to(pattern.device)
            rows = pattern[:, chosen.to(pattern.device)].float()
            means = einsum(rows, weights, "batch head row key, batch row -> batch head key").cpu()
            sums = self._sums.setdefault(layer, torch.zeros(*means.shape[:2], self._weights.shape[1]))
            sums[..., :n_keys] += means

        @row_wise
        def observe(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
            read(pattern)

        return RowHook(observe, read, reads=True)

    def means(self) -> Float[Tensor, "batch head column"]:
        """Mean attention to each column, with the heads in their given order."""
        place = {
            Head(layer, head): (layer, i)
            for layer, chosen in heads_by_layer(self._heads).items()
            for i, head in enumerate(chosen)
        }
        return torch.stack([self._sums[layer][:, i] for layer, i in (place[head] for head in self._heads)], dim=1)


def answer_attention(
    model: RowReader, prefix: Prefix, heads: Sequence[Head], n_rows: int
) -> tuple[Float[Tensor, "batch head column"], Float[Tensor, "batch head"]]:
    """Mean attention from the rows of an answer to each column of the prompt, and the mean of what is left of each row.

    A row and what is left of it sum to one: the mass of a head's sink (gpt-oss), and rounding in other heads. Only
    interventions that changed the prompt act on the answer.

    Args:
        model: The model.
        prefix: Prefix of the prompts, without their last tokens.
        heads: The heads to read.
        n_rows: Maximum number of response tokens. The mean of an empty response is zero.
    """
    rows = _AnswerRows(heads, prefix.batch.width)
    acting = [item for item in prefix.under if item.changes_prompt]
    generated = model.decode(prefix, acting, max_new_tokens=n_rows, observers=rows.hooks())
    means = rows.means([len(response.tokens) for response in generated])
    return means[..., :-1], means[..., -1]


class _AnswerRows:
    """Collector of the attention of response rows to the columns of the prompt, per head.

    One more column contains one minus the sum of the row.
    """

    def __init__(self, heads: Sequence[Head], width: int) -> None:
        self._heads, self._width = tuple(heads), width
        self._rows: dict[int, list[Float[Tensor, "batch head column"]]] = {}

    def hooks(self) -> list[Hook]:
        return [
            (hook_name(layer, "hook_pattern"), self._observer(layer, torch.as_tensor(chosen)))
            for layer, chosen in heads_by_layer(self._heads).items()
        ]

    def _observer(self, layer: int, chosen: Tensor) -> RowHook:
        rows = self._rows.setdefault(layer, [])

        def read(pattern: Float[Tensor, "batch head 1 key"]) -> None:
            if pattern.shape[-1] > self._width:  # otherwise the row is the last one of the prompt
                row = pattern[:, chosen.to(pattern.device), 0].float()
                lacking = 1 - row.sum(dim=-1, keepdim=True)
                rows.append(torch.cat((row[..., : self._width], lacking), dim=-1).cpu())

        return RowHook(lambda pattern, hook: read(pattern), read, reads=True)

    def means(self, lengths: Sequence[int]) -> Float[Tensor, "batch head column"]:
        """Mean over the rows of each response. A batch also contains rows after the end of a shorter one."""
        means = torch.zeros(len(lengths), len(self._heads), self._width + 1)
        for layer, chosen in heads_by_layer(self._heads).items():
            for i, head in enumerate(chosen):
                place = self._heads.index(Head(layer, head))
                for prompt, length in enumerate(lengths):
                    if length:
                        rows = [row[prompt, i] for row in self._rows[layer][:length]]
                        means[prompt, place] = torch.stack(rows).mean(dim=0)
        return means
