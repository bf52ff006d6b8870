"""Text of a prompt, with the character ranges of named spans."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias, cast

from focuslens.util.checks import checked_text, is_range

__all__ = ["Conversation", "Prompt", "Span", "checked_arguments", "checked_messages"]

Span: TypeAlias = tuple[int, int]
"""Half-open range ``[start, end)`` of characters or of tokens."""


def _ranges(name: Any, ranges: Any) -> tuple[Span, ...]:
    """The ranges of a span as pairs of Python's integers."""
    wanted = "it must be a list of ranges (start, end) of characters, such as [(0, 4)]"
    if not isinstance(name, str):
        raise TypeError(f"spans has the name {name!r}, a {type(name).__name__}; a name is a string")
    if is_range(ranges):
        raise TypeError(f"the span {name!r} is one range, {ranges!r}; {wanted}: {{{name!r}: [{ranges!r}]}}")
    if isinstance(ranges, str) or not isinstance(ranges, Iterable):
        raise TypeError(f"the span {name!r} is {ranges!r}; {wanted}")
    listed = list(cast("Iterable[Any]", ranges))
    for i, pair in enumerate(listed):
        if not is_range(pair):
            raise TypeError(f"the span {name!r} has {pair!r} at index {i}; {wanted}")
    return tuple((operator.index(start), operator.index(end)) for start, end in listed)


def checked_messages(values: Any, name: str) -> tuple[dict[str, Any], ...]:
    """Messages of a chat, in the form of Hugging Face's chat templates.

    Raises:
        TypeError: If ``values`` is not a list of messages, or a message has no ``role``, or a ``content`` that is not a
            text.
        ValueError: If a text cannot be encoded.
    """
    wanted = "messages are a list, such as [{'role': 'user', 'content': 'Hello'}]"
    if isinstance(values, str | Mapping) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is {values!r:.80}; {wanted}")
    messages = tuple(cast("Iterable[Any]", values))
    for i, message in enumerate(messages):
        if not isinstance(message, Mapping) or not isinstance(cast("Mapping[str, Any]", message).get("role"), str):
            raise TypeError(f"{name}[{i}] is {message!r:.80}, without a 'role'; {wanted}")
        content = cast("Mapping[str, Any]", message).get("content")
        if content is not None or "tool_calls" not in message:  # a call of a tool has no content
            checked_text(content, f"{name}[{i}]['content']")
    return tuple(dict(cast("Mapping[str, Any]", message)) for message in messages)


_OWN_ARGUMENTS = {
    "messages": "the messages before the prompt are system and turns of a PromptTemplate",
    "conversation": "the messages before the prompt are system and turns of a PromptTemplate",
    "tokenize": "the text is tokenised afterwards, with the positions of its spans",
    "add_generation_prompt": "every prompt ends where the response begins",
    "continue_final_message": "the beginning of a response is prefix of a PromptTemplate",
    **dict.fromkeys(
        ("return_dict", "return_tensors", "return_assistant_tokens_mask", "padding", "truncation", "max_length"),
        "the template only returns a text",
    ),
}
"""Arguments of ``apply_chat_template`` that the encoder sets itself, and what stands for them."""


def checked_arguments(values: Any, name: str) -> dict[str, Any]:
    """Arguments of a chat template.

    Raises:
        TypeError: If ``values`` does not map names to values.
        ValueError: If an argument is one that the encoder sets itself.
    """
    if not isinstance(values, Mapping) or not all(isinstance(key, str) for key in cast("Mapping[Any, Any]", values)):
        raise TypeError(f"{name} is {values!r:.80}; it must map names to values, such as {{'enable_thinking': False}}")
    arguments = dict(cast("Mapping[str, Any]", values))
    for key in arguments:
        if key in _OWN_ARGUMENTS:
            raise ValueError(
                f"{name} has {key!r}, which FocusLens sets itself: {_OWN_ARGUMENTS[key]}; leave it out, and give only "
                "what the template reads, such as 'tools' or 'enable_thinking'"
            )
    return arguments


@dataclass(frozen=True)
class Conversation:
    """Parts of a chat around the text of a prompt, which is the content of the user's last message.

    Attributes:
        messages: Messages before the user's last one: the system prompt and earlier turns.
        prefix: Beginning of the response.
        arguments: Arguments of the chat template, on top of those of the encoder.
    """

    messages: tuple[Mapping[str, Any], ...] = ()
    prefix: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def __post_init__(self) -> None:
        checked_arguments(self.arguments, "arguments")

    def describe(self) -> dict[str, Any]:
        """Parts that are not empty, as JSON values."""
        parts = {
            "messages": [dict(message) for message in self.messages],
            "prefix": self.prefix,
            "arguments": dict(self.arguments),
        }
        return {name: part for name, part in parts.items() if part}


class Prompt(str):
    """Text of a prompt, with the character ranges of named spans.

    A ``Prompt`` is a ``str`` that can be used like any other string. ``spans`` maps the name of each span to half-open
    character ranges. Prompts of :class:`MultiDocSample` have the spans ``instruction``, ``question``, ``document`` (all
    documents, in order), ``relevant`` (the gold documents) and ``irrelevant`` (all other documents). If a prompt does
    not contain a gold document, ``relevant`` has no ranges. Other prompts may use any span names. Interventions and
    scores refer to spans by name.

    If the encoder uses a chat template, the text is the content of the user's last message. ``conversation`` contains
    the messages before it, the beginning of the response, and arguments of the chat template.

    Text that looks like a control token of the tokenizer, such as ``<|im_end|>``, is text in a prompt that is put into
    a chat template, and in the spans ``instruction``, ``document``, ``relevant``, ``irrelevant`` and ``question`` of
    any other prompt. In a plain ``str``, and elsewhere in a prompt without a chat template, it is the control token.
    """

    spans: Mapping[str, tuple[Span, ...]]
    conversation: Conversation

    def __new__(
        cls,
        text: str,
        spans: Mapping[str, Iterable[Span]] | None = None,
        conversation: Conversation | None = None,
    ) -> Prompt:
        """Create a prompt with named spans.

        Args:
            text: The text of the prompt.
            spans: Half-open character ranges of ``text``, by span name.
            conversation: Parts of a chat around the text; by default none.

        Raises:
            TypeError: If ``text`` is no string, or ``spans`` is no mapping from names to lists of ranges.
            ValueError: If a range is empty, reversed, or not inside the text.
        """
        prompt = super().__new__(cls, checked_text(text, "text"))
        if not isinstance(spans, Mapping | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"spans is {spans!r:.80}; it must map names to lists of ranges: {{'relevant': [(0, 4)]}}")
        prompt.spans = {name: _ranges(name, ranges) for name, ranges in (spans or {}).items()}
        prompt.conversation = Conversation() if conversation is None else conversation
        for name, ranges in prompt.spans.items():
            for start, end in ranges:
                if not 0 <= start < end <= len(text):
                    raise ValueError(
                        f"span {name!r} = ({start}, {end}) does not lie in a text of {len(text)} characters; "
                        "a span is a half-open range with 0 <= start < end <= length"
                    )
        return prompt

    def __getnewargs__(self) -> tuple[str, Mapping[str, tuple[Span, ...]], Conversation]:  # type: ignore[override]
        return (str(self), self.spans, self.conversation)

    @property
    def text(self) -> str:
        """The prompt as a plain ``str``."""
        return str(self)

    def __str__(self) -> str:
        return str.__str__(self)

    def part(self, name: str) -> tuple[str, ...]:
        """Text of each range of the span ``name``.

        Raises:
            KeyError: If the prompt does not have a span with this name.
        """
        if name not in self.spans:
            raise KeyError(f"this prompt has no span {name!r}; it has {sorted(self.spans)}")
        return tuple(self[start:end] for start, end in self.spans[name])
