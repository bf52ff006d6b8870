"""Spans of HELMET's prompts: the context, its documents, and the question after it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, cast

import torch
from jaxtyping import Int
from torch import Tensor

from focuslens.prompts.encoder import token_span
from focuslens.prompts.prompt import Span

__all__ = ["RecordingTokenizer", "character_spans"]


class RecordingTokenizer:
    """Tokenizer that remembers the last text it tokenised, for the character ranges of a prompt's tokens.

    Args:
        tokenizer: The fast tokenizer to call.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._call: tuple[str, bool] = ("", True)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __call__(self, text: Any, **options: Any) -> Any:
        """Tokenise a text, or a list whose last text is remembered."""
        self._call = (text if isinstance(text, str) else text[-1], options.get("add_special_tokens", True))
        return self._tokenizer(text, **options)

    def spans(self, tokens: Int[Tensor, "pos"], item: Mapping[str, Any]) -> dict[str, tuple[Span, ...]]:
        """Token ranges of the spans of the prompt that was tokenised last; empty if its tokens are others.

        Args:
            tokens: Tokens of the prompt.
            item: The sample, with the fields from which HELMET wrote the prompt.
        """
        text, special = self._call
        encoding = self._tokenizer(text, add_special_tokens=special, return_offsets_mapping=True)
        if encoding["input_ids"] != tokens.tolist():
            return {}
        offsets = torch.tensor(encoding["offset_mapping"], dtype=torch.long).reshape(-1, 2)
        ranges = {
            name: [token_span(offsets, span) for span in spans] for name, spans in character_spans(text, item).items()
        }
        return {name: tuple(span for span in spans if span is not None) for name, spans in ranges.items()}


def character_spans(text: str, item: Mapping[str, Any]) -> dict[str, list[Span]]:
    """Character ranges in a prompt: ``context``, ``question`` and, if the sample has passages, ``document``.

    The question is its last occurrence after the context or, if HELMET words it in another way, all text after the
    context. A document is a passage in the context, with the heading and the title before it. Without a context in the
    text, there are no ranges.

    Args:
        text: The prompt.
        item: The sample. A context that HELMET cut is the cut one.
    """
    context = str(item.get("context") or "")
    start = text.rfind(context) if context else -1
    if start < 0:
        return {}
    end = start + len(context)
    question = str(item.get("question") or item.get("query") or "").strip()
    asked = text.rfind(question) if question else -1
    rest = (end + len(text[end:]) - len(text[end:].lstrip()), len(text.rstrip()))
    spans = {"context": [(start, end)], "question": [(asked, asked + len(question)) if asked >= end else rest]}
    documents = _documents(text, start, end, item.get("ctxs"))
    return {**spans, "document": documents} if documents else spans


def _documents(text: str, start: int, end: int, passages: Any) -> list[Span]:
    """Character ranges of the passages in a context, up to the passage that HELMET cut."""
    documents: list[Span] = []
    for passage in cast("Sequence[Mapping[str, Any]]", passages or ()):
        written = str(passage.get("text") or "").strip()
        place = text.find(written, start, end) if written else -1
        if place < 0:
            break
        stop = place + len(written)
        documents.append((start + len(text[start:place]) - len(text[start:place].lstrip()), stop))
        start = stop
    return documents
