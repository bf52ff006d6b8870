"""Prompts to tokens, and characters to token positions, by the model's own tokenizer."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from focuslens.prompts.batch import EncodedPrompt
from focuslens.prompts.prompt import Prompt, Span

__all__ = ["PromptEncoder", "token_span"]

_MARK = "\ue000"
"""A character of the private use area, which no chat template writes."""


def token_span(offsets: list[Span], span: Span) -> Span | None:
    """Half-open range of the tokens that share a character with a half-open character range, ``None`` if none does."""
    start, end = span
    inside = [i for i, (first, last) in enumerate(offsets) if first < end and last > start]
    return (inside[0], inside[-1] + 1) if inside else None


@dataclass(frozen=True)
class PromptEncoder:
    """Turns prompts into the tokens the model's own tokenizer gives, chat template included.

    Attributes:
        tokenizer: A fast Hugging Face tokenizer, as the checkpoint has it.
        chat: Whether prompts become the user's turn of the tokenizer's chat template.
        template_kwargs: Further arguments of the chat template (Llama 3 puts today's date into the prompt unless
            ``date_string`` is given).
    """

    tokenizer: Any
    chat: bool
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        if self.chat and not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("chat=True, but the tokenizer has no chat template; use chat=False for a base model")

    def _text(self, prompt: str) -> tuple[str, int]:
        """What is tokenised, and the character in it at which the prompt begins."""
        if not self.chat:
            return str(prompt), 0
        text = self._render(str(prompt))
        # The template's own words may be the prompt's too ("user"), so the place is looked up with a mark instead.
        start = self._render(_MARK).find(_MARK)
        if start >= 0 and text.startswith(str(prompt), start):
            return text, start
        # Llama 3's template strips the turn. Parts that white space at the ends does not belong to are still known.
        stripped, ranges = prompt.strip(), getattr(prompt, "spans", {}).values()
        before = len(prompt) - len(prompt.lstrip())
        inside = all(before <= a and b <= before + len(stripped) for part in ranges for a, b in part)
        if start < 0 or not text.startswith(stripped, start) or not inside:
            if any(ranges):
                raise ValueError(
                    "the chat template changes the prompt's text (it may strip white space at its ends), so the "
                    "positions of its parts are unknown; give the prompt as the template leaves it"
                )
            return text, 0
        return text, start - before

    @property
    def digest(self) -> str:
        """Of how prompts become tokens: the chat template with all that it writes, today's date included, and BOS."""
        text, _ = self._text(_MARK)
        return hashlib.sha256(repr((text, self._tokenize(text)[0])).encode()).hexdigest()[:16]

    def _render(self, content: str) -> str:
        turn = [{"role": "user", "content": content}]
        return self.tokenizer.apply_chat_template(
            turn, tokenize=False, add_generation_prompt=True, **self.template_kwargs
        )

    def _tokenize(self, text: str) -> tuple[list[int], list[Span]]:
        # A chat template writes its own BOS, so the tokenizer must not add another.
        encoding = self.tokenizer(text, add_special_tokens=not self.chat, return_offsets_mapping=True)
        return encoding["input_ids"], encoding["offset_mapping"]

    def encode(self, prompt: str) -> EncodedPrompt:
        """Tokens and token spans of a prompt.

        Raises:
            ValueError: If a part of the prompt shares no character with any token.
        """
        text, shift = self._text(prompt)
        ids, offsets = self._tokenize(text)
        spans: dict[str, tuple[Span, ...]] = {}
        for name, ranges in (prompt.spans if isinstance(prompt, Prompt) else {}).items():
            found = [token_span(offsets, (start + shift, end + shift)) for start, end in ranges]
            if None in found:
                raise ValueError(f"part {name!r} of the prompt has no token; is it only white space?")
            spans[name] = tuple(span for span in found if span is not None)
        return EncodedPrompt(torch.tensor(ids, dtype=torch.long), spans, text)

    def encode_response(self, prompt: EncodedPrompt, response: str) -> Int[Tensor, "response"]:
        """Tokens of a response that follows a prompt: after one space for base models, directly in a chat template.

        The response is tokenised together with the prompt, as text, so that a tokenizer that merges across the
        space gives what the model would have generated; where that would change the prompt's own tokens, alone.
        """
        continuation = response if self.chat else " " + response.lstrip()
        ids, _ = self._tokenize(prompt.text + continuation)
        length = len(prompt.tokens)
        if ids[:length] != prompt.tokens.tolist():
            ids = prompt.tokens.tolist() + self.tokenizer(continuation, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids[length:], dtype=torch.long)

    def texts(self, prompt: EncodedPrompt) -> list[str]:
        """What each token of a prompt stands for: together the text, as far as tokens do not share characters.

        A token that holds no character of its own (BOS, all but the first of several that make up one character) is
        called by its name in the vocabulary, or is empty.
        """
        ids = prompt.tokens.tolist()
        found, offsets = self._tokenize(prompt.text) if prompt.text else ([], [])
        if found != ids:
            return [str(self.tokenizer.decode([one])) for one in ids]
        texts: list[str] = []
        reached = 0
        for one, (start, end) in zip(ids, offsets, strict=True):
            if start == end == 0 or end <= start:
                texts.append(str(self.tokenizer.convert_ids_to_tokens(one)) if one in self._special else "")
                continue
            # White space that a tokenizer leaves out belongs to the token behind it.
            texts.append(prompt.text[reached:end])
            reached = max(reached, end)
        return texts

    def response_texts(self, prompt: EncodedPrompt, tokens: Int[Tensor, "response"]) -> list[str]:
        """What each token of a response that follows a prompt stands for, the space before it included."""
        ids, last = tokens.tolist(), prompt.tokens.tolist()[-1:]
        texts: list[str] = []
        before = str(self.tokenizer.decode(last))
        for n in range(1, len(ids) + 1):
            text = str(self.tokenizer.decode([*last, *ids[:n]]))
            # A character of several tokens is there with the last of them; one that is never finished, in the end.
            unfinished = text.endswith("\ufffd") and n < len(ids)
            texts.append("" if unfinished else text[len(before) :])
            before = before if unfinished else text
        return texts

    @property
    def _special(self) -> set[int]:
        return set(self.tokenizer.all_special_ids)
