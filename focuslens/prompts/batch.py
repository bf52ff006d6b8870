"""Left-padded batches of tokenised prompts, and the positions of their spans.

The package counts positions in two ways. A *token position* is counted from the first token of the prompt itself (BOS
included). A *column* is counted from the left edge of the padded batch: column = token position + left padding. Because
padding is on the left, the last prompt token of every sample is in the same column, ``width - 1``. The row of that
column produces the first response token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from focuslens.prompts.prompt import Span

__all__ = ["EncodedPrompt", "PromptBatch", "SpanLike", "disjoint"]

SpanLike = str | Span
"""A span of the prompt: its name, or a half-open range of token positions."""


def disjoint(spans: Sequence[Span]) -> list[Span]:
    """Merge spans into ranges that do not overlap. Two spans of a text can share a token."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """Tokens of a prompt, from the model's own tokenizer, and spans of the prompt as token ranges.

    Attributes:
        tokens: Token ids, BOS and chat template included.
        spans: Half-open ranges of token positions by span name. A token belongs to a span if the two share a character.
        text: The tokenised text, chat template included; empty if only the tokens are known.
    """

    tokens: Int[Tensor, "pos"]
    spans: Mapping[str, tuple[Span, ...]]
    text: str = ""

    def resolve(self, span: SpanLike) -> tuple[Span, ...]:
        """The token ranges of a span.

        Raises:
            KeyError: If no span has that name.
            ValueError: If a range does not lie in the prompt.
        """
        if isinstance(span, str):
            if span not in self.spans:
                raise KeyError(self._unknown_span(span))
            return self.spans[span]
        start, end = span
        if not 0 <= start < end <= len(self.tokens):
            raise ValueError(
                f"span ({start}, {end}) does not lie in a prompt of {len(self.tokens)} tokens; "
                "a span is a half-open range with 0 <= start < end <= length"
            )
        return ((start, end),)

    def _unknown_span(self, name: str) -> str:
        """Error message for the name of a span that the prompt does not have."""
        if self.spans:
            return (
                f"this prompt has no part {name!r}; it has {sorted(self.spans)}. Name one of these, or give a "
                "(start, end) range of token positions"
            )
        return (
            f"this prompt is a plain text and has no part {name!r}; give sample.prompt(), or "
            f"fl.Prompt(text, spans={{{name!r}: [(start, end)]}}) with character positions, or a (start, end) "
            "range of token positions as span"
        )


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Prompts of unequal length, padded on the left to one width."""

    prompts: tuple[EncodedPrompt, ...]

    @classmethod
    def of(cls, prompts: Sequence[EncodedPrompt]) -> PromptBatch:
        """Make a batch of one or more prompts. No prompt may be empty."""
        if not prompts:
            raise ValueError("a batch needs at least one prompt")
        for prompt in prompts:
            if len(prompt.tokens) == 0:
                raise ValueError("a prompt has no tokens; there is nothing to run the model on")
        return cls(tuple(prompts))

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def width(self) -> int:
        """Number of columns in the batch, which is the length of the longest prompt in tokens."""
        return max(len(prompt.tokens) for prompt in self.prompts)

    @property
    def padding(self) -> tuple[int, ...]:
        """Number of padding tokens to the left of each prompt."""
        return tuple(self.width - len(prompt.tokens) for prompt in self.prompts)

    def tokens(self, pad_token: int) -> Int[Tensor, "batch pos"]:
        """Token ids of each prompt by column; ``pad_token`` fills the padding."""
        rows = torch.full((len(self), self.width), pad_token, dtype=torch.long)
        for row, prompt, padding in zip(rows, self.prompts, self.padding, strict=True):
            row[padding:] = prompt.tokens
        return rows

    def mask(self) -> Int[Tensor, "batch pos"]:
        """Mask of the batch: 1 where a column holds a token, 0 where it is padding."""
        columns = torch.arange(self.width)
        return (columns >= torch.tensor(self.padding)[:, None]).long()

    def repeated(self, copies: int) -> PromptBatch:
        """A batch with ``copies`` adjacent copies of every prompt."""
        return PromptBatch(tuple(prompt for prompt in self.prompts for _ in range(copies)))

    def first_response_row(self, start: int) -> int:
        """Index of the first row that produces a response token, among the rows from column ``start`` on."""
        return max(0, self.width - 1 - start)

    def columns(self, span: SpanLike, n_keys: int) -> Bool[Tensor, "batch key"]:
        """Mask over ``n_keys`` key columns, which is true where a column belongs to the span."""
        mask = torch.zeros(len(self), n_keys, dtype=torch.bool)
        for row, prompt, padding in zip(mask, self.prompts, self.padding, strict=True):
            for start, end in prompt.resolve(span):
                row[padding + start : padding + end] = True
        return mask
