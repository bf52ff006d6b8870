"""Left-padded batches of tokenised prompts, and the token ranges of the prompts' spans.

The package uses two kinds of position. A *token position* is counted from the first token of the unpadded prompt,
including BOS. A *column* is counted from the left edge of the padded batch: column = token position + left padding.
Because padding is on the left, the last token of every prompt is in the same column, ``width - 1``. The row of this
column produces the first response token.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeAlias

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from focuslens.prompts.prompt import Span
from focuslens.util.checks import is_range

__all__ = ["EncodedPrompt", "PromptBatch", "PromptInput", "SpanLike", "disjoint", "is_one_prompt"]

SpanLike = str | Span
"""Span of a prompt, given by name or as a half-open range of token positions."""


def disjoint(spans: Sequence[Span]) -> list[Span]:
    """Merge overlapping and adjacent spans, and return disjoint ranges in ascending order."""
    merged: list[Span] = []
    for start, end in sorted(spans):
        if merged and start <= merged[-1][1]:
            merged[-1] = (merged[-1][0], max(merged[-1][1], end))
        else:
            merged.append((start, end))
    return merged


@dataclass(frozen=True, eq=False)
class EncodedPrompt:
    """Tokens of a prompt, with the prompt's spans as token ranges.

    Attributes:
        tokens: Token ids, including BOS and the chat template.
        spans: Half-open ranges of token positions, by span name. A token belongs to a span if it shares at least one
            character with the span.
        text: The text that was tokenised, including the chat template; empty if only the tokens are known.
        characters: Half-open ranges of characters of ``text``, by span name; empty if they are unknown.
        literal: Half-open ranges of characters of ``text`` that contain no control tokens. Text in these ranges that
            looks like a control token is text.
    """

    tokens: Int[Tensor, "pos"]
    spans: Mapping[str, tuple[Span, ...]]
    text: str = ""
    characters: Mapping[str, tuple[Span, ...]] = field(default_factory=dict[str, tuple[Span, ...]])
    literal: tuple[Span, ...] = ()

    def resolve(self, span: SpanLike) -> tuple[Span, ...]:
        """Token ranges of a span that is given by name or as a single range.

        Raises:
            KeyError: If the prompt does not have a span with this name.
            TypeError: If the span is neither a name nor one range.
            ValueError: If the range is empty or not inside the prompt.
        """
        if isinstance(span, str):
            if span not in self.spans:
                raise KeyError(self._unknown_span(span))
            return self.spans[span]
        if not is_range(span):
            raise TypeError(
                f"span is {span!r:.80}; it must be the name of a span, or one range (start, end) of token positions"
            )
        start, end = span
        if not 0 <= start < end <= len(self.tokens):
            raise ValueError(
                f"span ({start}, {end}) does not lie in a prompt of {len(self.tokens)} tokens; "
                "a span is a half-open range with 0 <= start < end <= length"
            )
        return ((start, end),)

    def _unknown_span(self, name: str) -> str:
        """Error message for a span name that the prompt does not have."""
        if self.spans:
            return (
                f"this prompt has no span {name!r}; it has {sorted(self.spans)}. Name one of these, or give a "
                "(start, end) range of token positions"
            )
        return (
            f"this prompt is a plain text and has no span {name!r}; give sample.prompt(), or "
            f"fl.Prompt(text, spans={{{name!r}: [(start, end)]}}) with character positions, or a (start, end) "
            "range of token positions as span"
        )


PromptInput: TypeAlias = str | EncodedPrompt | Tensor | Sequence[int] | Sequence[Mapping[str, Any]]
"""One prompt: a text, an encoded prompt, token ids ``[pos]`` or ``[1, pos]``, or the messages of a chat."""


def is_one_prompt(prompts: Any) -> bool:
    """Whether a value is one prompt rather than a sequence of prompts."""
    if isinstance(prompts, str | EncodedPrompt | Tensor):
        return True
    if not isinstance(prompts, Sequence) or isinstance(prompts, bytes) or not prompts:
        return False
    return isinstance(prompts[0], Mapping) or _is_token(prompts[0])


def _is_token(value: Any) -> bool:
    return hasattr(value, "__index__") and not isinstance(value, bool | Tensor)


@dataclass(frozen=True, eq=False)
class PromptBatch:
    """Batch of prompts, padded on the left to the length of the longest prompt.

    Attributes:
        prompts: The prompts.
        rows: Rows of the forward pass that run these prompts, if the pass runs further prompts too; by default all.
    """

    prompts: tuple[EncodedPrompt, ...]
    rows: slice = field(default_factory=lambda: slice(None))

    @classmethod
    def of(cls, prompts: Sequence[EncodedPrompt]) -> PromptBatch:
        """Create a batch from one or more prompts.

        Raises:
            ValueError: If there are no prompts, or if a prompt has no tokens.
        """
        if not prompts:
            raise ValueError("a batch needs at least one prompt")
        for prompt in prompts:
            if len(prompt.tokens) == 0:
                raise ValueError("a prompt has no tokens; there is nothing to run the model on")
        return cls(tuple(prompts))

    def __len__(self) -> int:
        return len(self.prompts)

    @cached_property
    def width(self) -> int:
        """Number of columns, which equals the number of tokens in the longest prompt."""
        return max(len(prompt.tokens) for prompt in self.prompts)

    @cached_property
    def padding(self) -> tuple[int, ...]:
        """Number of padding tokens to the left of each prompt."""
        return tuple(self.width - len(prompt.tokens) for prompt in self.prompts)

    def tokens(self, pad_token: int) -> Int[Tensor, "batch pos"]:
        """Token ids of the padded batch. All padding columns contain ``pad_token``."""
        rows = torch.full((len(self), self.width), pad_token, dtype=torch.long)
        for row, prompt, padding in zip(rows, self.prompts, self.padding, strict=True):
            row[padding:] = prompt.tokens
        return rows

    def mask(self) -> Int[Tensor, "batch pos"]:
        """Attention mask of the batch: 1 for tokens, 0 for padding."""
        columns = torch.arange(self.width)
        return (columns >= torch.tensor(self.padding)[:, None]).long()

    def repeated(self, copies: int) -> PromptBatch:
        """Batch that contains each prompt ``copies`` times in succession."""
        return PromptBatch(tuple(prompt for prompt in self.prompts for _ in range(copies)))

    def first_response_row(self, start: int) -> int:
        """Index of the first row that produces a response token, in a forward pass that starts at column ``start``."""
        return max(0, self.width - 1 - start)

    def columns(self, span: SpanLike, n_keys: int) -> Bool[Tensor, "batch key"]:
        """Mask over ``n_keys`` key columns: true for columns that belong to the span, false for all other columns."""
        mask = torch.zeros(len(self), n_keys, dtype=torch.bool)
        for row, prompt, padding in zip(mask, self.prompts, self.padding, strict=True):
            for start, end in prompt.resolve(span):
                row[padding + start : padding + end] = True
        return mask
