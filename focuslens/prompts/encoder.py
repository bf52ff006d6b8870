"""Tokenisation of prompts and responses, and conversion of character ranges to token ranges."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Bool, Int
from torch import Tensor

from focuslens.prompts.batch import EncodedPrompt, PromptInput, is_one_prompt
from focuslens.prompts.chat import MARK, ChatTemplate
from focuslens.prompts.control_tokens import ControlTokens
from focuslens.prompts.prompt import Prompt, Span, checked_arguments
from focuslens.prompts.rewriting import Edit, rewritten_text

__all__ = ["PromptEncoder", "sentence_ranges", "token_span"]

_OF_CALLS = ("padding", "truncation")

_LITERAL = ""
"""Name of the ranges that are only text, among the spans of a prompt. No span has an empty name."""

_TEXT_SPANS = ("instruction", "document", "relevant", "irrelevant", "question")
"""Spans that contain no control tokens, in prompts without a chat template."""


def token_span(offsets: Int[Tensor, "token 2"], span: Span) -> Span | None:
    """Half-open range of the tokens that overlap a half-open character range; ``None`` if no token overlaps the range.

    ``offsets`` contains the character range of each token.
    """
    start, end = span
    inside = ((offsets[:, 0] < end) & (offsets[:, 1] > start)).nonzero()
    return (int(inside[0]), int(inside[-1]) + 1) if len(inside) else None


_SENTENCE_END = re.compile(r"(?<=[.!?])[\"')\]]*\s+|\n+")


def sentence_ranges(text: str) -> list[Span]:
    """Character ranges of the sentences of a text, without the white space between them.

    A sentence ends with a full stop, a question mark or an exclamation mark before white space, or with the line.
    """
    ends = [match.span() for match in _SENTENCE_END.finditer(text)]
    starts = [0, *(end for _, end in ends)]
    # Closing quotation marks belong to the sentence that they end.
    stops = [start + len(text[start:end].rstrip()) for start, end in ends] + [len(text.rstrip())]
    return [(start, stop) for start, stop in zip(starts, stops, strict=True) if text[start:stop].strip()]


def _token_spans(offsets: Sequence[Span], characters: Mapping[str, Sequence[Span]]) -> dict[str, tuple[Span, ...]]:
    """Token ranges of named character ranges.

    Raises:
        ValueError: If a range does not overlap any token.
    """
    bounds = torch.tensor(offsets, dtype=torch.long).reshape(-1, 2)
    spans: dict[str, tuple[Span, ...]] = {}
    for name, ranges in characters.items():
        found = [token_span(bounds, span) for span in ranges]
        if None in found:
            raise ValueError(f"span {name!r} of the prompt has no token; is it only white space?")
        spans[name] = tuple(span for span in found if span is not None)
    return spans


@dataclass(frozen=True)
class PromptEncoder:
    """Encoder that converts prompts and responses to tokens, with or without a chat template.

    Attributes:
        tokenizer: The checkpoint's fast Hugging Face tokenizer.
        chat: Whether each prompt is put into the tokenizer's chat template, as the user's turn.
        template_kwargs: Additional arguments for the chat template. For example, the template of Llama 3 puts today's
            date into the prompt unless ``date_string`` is given.
    """

    tokenizer: Any
    chat: bool
    template_kwargs: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        checked_arguments(self.template_kwargs, "chat_template_kwargs")
        if self.chat and not getattr(self.tokenizer, "chat_template", None):
            raise ValueError("chat=True, but the tokenizer has no chat template; use chat=False for a base model")

    @cached_property
    def _template(self) -> ChatTemplate:
        return ChatTemplate(self.tokenizer, self.template_kwargs)

    @cached_property
    def _control(self) -> ControlTokens:
        return ControlTokens(self.tokenizer)

    def _text(self, prompt: str) -> tuple[str, int, tuple[Span, ...]]:
        """The text to tokenise, the index of the prompt's first character in it, and the ranges that are only text.

        A plain string has no such ranges: its control tokens are control tokens.
        """
        if not self.chat:
            return self._text_without_template(prompt)
        chat = self._template.rendered(prompt)
        for content in chat.unlocated:
            if self._control.look_alikes(content, [(0, len(content))]):
                raise ValueError(
                    "an earlier message contains a text that looks like a control token, and the chat template changes "
                    f"or repeats the message, so that its position is unknown: {content!r:.80}; give the message as "
                    "the template leaves it, or without that text"
                )
        return chat.text, chat.start, chat.contents if isinstance(prompt, Prompt) else ()

    def _text_without_template(self, prompt: str) -> tuple[str, int, tuple[Span, ...]]:
        if not isinstance(prompt, Prompt):
            return str(prompt), 0, ()
        conversation = prompt.conversation
        if conversation.messages or conversation.arguments:
            part = "a system prompt or earlier messages" if conversation.messages else "arguments of a chat template"
            raise ValueError(
                f"the prompt has {part}, but prompts are not put into a chat template (chat=False); leave them out of "
                "the PromptTemplate, or open the model with chat=True"
            )
        ranges = [span for name in _TEXT_SPANS for span in prompt.spans.get(name, ())]
        return str(prompt) + conversation.prefix, 0, tuple(dict.fromkeys(ranges))

    @property
    def digest(self) -> str:
        """Digest of the vocabulary, and of the text and tokens that the encoder adds to every prompt.

        They are BOS and the rendered chat template. If the template inserts today's date, the digest includes the date.
        """
        text = self._text(MARK)[0]
        return hashlib.sha256(repr((text, self._tokenize(text)[0], self._vocabulary)).encode()).hexdigest()[:16]

    @cached_property
    def _vocabulary(self) -> str:
        """Digest of the tokenizer's rules and tokens. Padding and truncation are those of single calls."""
        backend = getattr(self.tokenizer, "backend_tokenizer", None)
        if backend is None:
            return ""
        rules = {name: rule for name, rule in json.loads(backend.to_str()).items() if name not in _OF_CALLS}
        return hashlib.sha256(json.dumps(rules, sort_keys=True).encode()).hexdigest()

    @property
    def generation_prompt_length(self) -> int | None:
        """Number of tokens with which the chat template begins a response; ``None`` without a template."""
        if not self.chat:
            return None
        texts = [self._template.render("Hi", beginning=beginning) for beginning in (True, False)]
        return len(self._tokenize(texts[0])[0]) - len(self._tokenize(texts[1])[0])

    def template_mask(self, prompt: EncodedPrompt) -> Bool[Tensor, "pos"]:
        """Mask of the tokens of a prompt that are special, such as BOS, or belong to the chat template."""
        special = torch.isin(prompt.tokens, torch.tensor(sorted(self._special), dtype=torch.long))
        if self.chat and prompt.literal:
            return special | self._outside(prompt)
        before, _, after = self._text(MARK)[0].partition(MARK) if self.chat else ("", "", "")
        if not prompt.text or not (prompt.text.startswith(before) and prompt.text.endswith(after)):
            return special
        offsets = torch.tensor(self._tokenize(prompt.text)[1], dtype=torch.long).reshape(-1, 2)
        outside = (offsets[:, 1] <= len(before)) | (offsets[:, 0] >= len(prompt.text) - len(after))
        return special | (outside & (len(before) + len(after) > 0))

    def _outside(self, prompt: EncodedPrompt) -> Bool[Tensor, "pos"]:
        """Mask of the tokens of a prompt that share no character with the contents of its messages."""
        offsets = torch.tensor(self._tokenize(prompt.text, prompt.literal)[1], dtype=torch.long).reshape(-1, 2)
        outside = torch.ones(len(offsets), dtype=torch.bool)
        for start, end in prompt.literal:
            outside &= (offsets[:, 1] <= start) | (offsets[:, 0] >= end)
        return outside

    def _tokenize(self, text: str, literal: Sequence[Span] = ()) -> tuple[list[int], list[Span]]:
        """Token ids and their character ranges. Control tokens in the ``literal`` ranges are taken for text."""
        # The tokenizer must not add BOS to a chat prompt, because the chat template already contains BOS.
        apart = self._control.tokenize(text, literal, add_special_tokens=not self.chat)
        if apart is not None:
            return apart
        encoding = self.tokenizer(text, add_special_tokens=not self.chat, return_offsets_mapping=True)
        return encoding["input_ids"], encoding["offset_mapping"]

    def encode(self, prompt: PromptInput) -> EncodedPrompt:
        """Tokenise a prompt, and convert its spans to token ranges.

        Raises:
            ValueError: If a span of the prompt does not overlap any token, or if the chat template changes the prompt's
                text in such a way that the spans cannot be located.
        """
        if not isinstance(prompt, str):
            return self._encode_other(prompt)
        text, shift, literal = self._text(prompt)
        ids, offsets = self._tokenize(text, literal)
        characters = {
            name: tuple((start + shift, end + shift) for start, end in ranges)
            for name, ranges in (prompt.spans if isinstance(prompt, Prompt) else {}).items()
        }
        spans = _token_spans(offsets, characters)
        return EncodedPrompt(torch.tensor(ids, dtype=torch.long), spans, text, characters, literal)

    def with_question(self, prompt: EncodedPrompt, question: str) -> EncodedPrompt:
        """The prompt with another text in place of its span ``question``.

        Raises:
            ValueError: If the text of the prompt or the characters of its question are unknown.
        """
        if not prompt.characters.get("question"):
            raise ValueError(
                "the prompt has no text with a span 'question' that could be replaced; give sample.prompt(), or "
                "fl.Prompt(text, spans={'question': [(start, end)]}) with character positions"
            )
        return self.rewritten(prompt, [Edit(start, end, question) for start, end in prompt.characters["question"]])

    def rewritten(self, prompt: EncodedPrompt, edits: Sequence[Edit]) -> EncodedPrompt:
        """The prompt with another text. Its spans move along, without ranges of which no character is left.

        Raises:
            ValueError: If the text of the prompt is unknown, or if two edits change the same characters.
        """
        if not prompt.text:
            raise ValueError("the text of the prompt is unknown, so it cannot be changed; give a text, not tokens")
        text, moved = rewritten_text(prompt.text, {**prompt.characters, _LITERAL: prompt.literal}, edits)
        literal = moved[_LITERAL]
        characters = {name: moved[name] for name in prompt.characters}
        ids, offsets = self._tokenize(text, literal)
        spans = _token_spans(offsets, characters)
        return EncodedPrompt(torch.tensor(ids, dtype=torch.long), spans, text, characters, literal)

    def sentences(self, prompt: EncodedPrompt) -> list[Span]:
        """Token ranges of the sentences of a prompt; see :meth:`sentence_spans`."""
        return [tokens for _, tokens in self.sentence_spans(prompt)]

    def sentence_spans(self, prompt: EncodedPrompt) -> list[tuple[Span, Span]]:
        """Character and token range of each sentence of a prompt, of its documents if it has the span ``document``.

        A token that belongs to two sentences counts for the first.

        Raises:
            ValueError: If the text of the prompt is unknown.
        """
        if not prompt.text:
            raise ValueError("the text of the prompt is unknown, so it has no sentences; give a text, not tokens")
        _, offsets = self._tokenize(prompt.text, prompt.literal)
        bounds = torch.tensor(offsets, dtype=torch.long).reshape(-1, 2)
        spans: list[tuple[Span, Span]] = []
        for first, last in prompt.characters.get("document") or ((0, len(prompt.text)),):
            for start, end in sentence_ranges(prompt.text[first:last]):
                characters = (first + start, first + end)
                span = token_span(bounds, characters)
                reached = spans[-1][1][1] if spans else 0
                if span is not None and span[1] > max(span[0], reached):
                    spans.append((characters, (max(span[0], reached), span[1])))
        return spans

    def _encode_other(self, prompt: Any) -> EncodedPrompt:
        """Encode a prompt that is not a text.

        Raises:
            TypeError: If the value is not a prompt.
            ValueError: If tokens are not one sequence, or there is no chat template for messages.
        """
        if isinstance(prompt, EncodedPrompt):
            return prompt
        if isinstance(prompt, Sequence) and prompt and all(isinstance(message, Mapping) for message in prompt):
            if not self.chat:
                raise ValueError("the prompt is a list of messages, but prompts are not put into a chat template")
            text = self._template.fill(list(prompt))
            ids, _ = self._tokenize(text)
            return EncodedPrompt(torch.tensor(ids, dtype=torch.long), {}, text)
        if isinstance(prompt, Tensor) or is_one_prompt(prompt):
            tokens = torch.as_tensor(prompt).cpu()
            if tokens.ndim == 2 and len(tokens) == 1:
                tokens = tokens[0]
            if tokens.ndim != 1 or tokens.is_floating_point() or not len(tokens):
                raise ValueError(
                    f"the prompt is a tensor of the shape {tuple(tokens.shape)} and type {tokens.dtype}; tokens of one "
                    "prompt are integers [pos] or [1, pos]"
                )
            return EncodedPrompt(tokens.long(), {})
        raise TypeError(
            f"the prompt is {prompt!r:.60}, a {type(prompt).__name__}; it must be a text, an EncodedPrompt, token ids, "
            "or a list of messages with 'role' and 'content'"
        )

    def encode_response(self, prompt: EncodedPrompt, response: str) -> Int[Tensor, "response"]:
        """Tokenise a response as the continuation of a prompt. Without a chat template, the response follows a space.

        The prompt and the response are tokenised as one text. The result is therefore the tokens that the model would
        have generated, even if the tokenizer merges the space with neighbouring characters. If the joint text changes
        the tokens of the prompt, the response is tokenised alone.
        """
        continuation = response if self.chat else " " + response.lstrip()
        ids, _ = self._tokenize(prompt.text + continuation, prompt.literal)
        length = len(prompt.tokens)
        if ids[:length] != prompt.tokens.tolist():
            ids = prompt.tokens.tolist() + self.tokenizer(continuation, add_special_tokens=False)["input_ids"]
        return torch.tensor(ids[length:], dtype=torch.long)

    def texts(self, prompt: EncodedPrompt) -> list[str]:
        """Text of each token of a prompt.

        The text of a special token without characters in the prompt, such as BOS, is the token's name in the
        vocabulary. If several tokens make up one character, the text of the first token is the character, and the texts
        of the other tokens are empty. Apart from special tokens, the concatenated texts equal the prompt's text. If the
        prompt's text is unknown, or its tokenisation differs from ``prompt.tokens``, each token is decoded separately.
        """
        ids = prompt.tokens.tolist()
        retokenised, offsets = self._tokenize(prompt.text, prompt.literal) if prompt.text else ([], [])
        if retokenised != ids:
            return [str(self.tokenizer.decode([token])) for token in ids]
        texts: list[str] = []
        reached = 0
        for token, (start, end) in zip(ids, offsets, strict=True):
            if start == end == 0 or end <= start:
                texts.append(str(self.tokenizer.convert_ids_to_tokens(token)) if token in self._special else "")
                continue
            # White space that no token covers is added to the text of the next token.
            texts.append(prompt.text[reached:end])
            reached = max(reached, end)
        return texts

    def response_texts(self, prompt: EncodedPrompt, tokens: Int[Tensor, "response"]) -> list[str]:
        """Text of each response token, including the space before the response."""
        ids, last = tokens.tolist(), prompt.tokens.tolist()[-1:]
        texts: list[str] = []
        before = str(self.tokenizer.decode(last))
        for n in range(1, len(ids) + 1):
            text = str(self.tokenizer.decode([*last, *ids[:n]]))
            # If several tokens make up one character, the text of the last token is the character. The last token of a
            # response that ends inside a character keeps the replacement character.
            unfinished = text.endswith("\ufffd") and n < len(ids)
            texts.append("" if unfinished else text[len(before) :])
            before = before if unfinished else text
        return texts

    @property
    def _special(self) -> set[int]:
        return set(self.tokenizer.all_special_ids)
