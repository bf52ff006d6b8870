"""Prompts in a tokenizer's chat template, with the positions of their texts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

from jinja2 import TemplateError

from focuslens.prompts.prompt import Conversation, Prompt, Span

__all__ = ["MARK", "ChatTemplate", "RenderedChat"]

MARK = "\ue000"
"""Placeholder for a prompt: a character from Unicode's private use area, which chat templates do not contain."""

_FIRST_MARK = 0xE100
"""Code of the second character of the placeholder for an earlier message."""


@dataclass(frozen=True)
class RenderedChat:
    """Text of a prompt in a chat template.

    Attributes:
        text: The text to tokenise.
        start: Index of the prompt's first character in the text. If the template strips white space from the prompt,
            it is the index that the first character would have.
        contents: Ranges of the contents of the messages.
        unlocated: Contents of earlier messages that the template changes, so that their ranges are unknown.
    """

    text: str
    start: int = 0
    contents: tuple[Span, ...] = ()
    unlocated: tuple[str, ...] = ()


def _described(messages: Sequence[Any]) -> str:
    return "a single message of the user" if len(messages) == 1 else f"these {len(messages)} messages"


@dataclass(frozen=True)
class ChatTemplate:
    """Chat template of a tokenizer.

    Attributes:
        tokenizer: The tokenizer.
        arguments: Additional arguments for the template.
    """

    tokenizer: Any
    arguments: Mapping[str, Any] = field(default_factory=dict[str, Any])

    def fill(
        self, messages: Sequence[Any], arguments: Mapping[str, Any] | None = None, *, beginning: bool = True
    ) -> str:
        """The chat template with messages, and with the beginning of a response.

        Raises:
            ValueError: If the template refuses the messages.
        """
        try:
            return self.tokenizer.apply_chat_template(
                list(messages),
                tokenize=False,
                add_generation_prompt=beginning,
                **{**self.arguments, **(arguments or {})},
            )
        except TemplateError as error:
            raise ValueError(
                f"the chat template refuses {_described(messages)} ({error}); use chat=False, or arguments with "
                "which the template accepts it (chat_template_kwargs)"
            ) from error

    def render(self, content: str, conversation: Conversation | None = None, *, beginning: bool = True) -> str:
        """The chat template with a message of the user, after the messages of a conversation."""
        around = Conversation() if conversation is None else conversation
        messages = [self._message(message) for message in (*around.messages, {"role": "user", "content": content})]
        return self.fill(messages, around.arguments, beginning=beginning) + (around.prefix if beginning else "")

    def _message(self, message: Mapping[str, Any]) -> dict[str, Any]:
        """A message in the form that the template reads."""
        if not self._wants_parts or message.get("content") is None:
            return dict(message)
        return {**message, "content": [{"type": "text", "text": message["content"]}]}

    @cached_property
    def _wants_parts(self) -> bool:
        """Whether the template reads a message as a list of parts, like the templates of vision-language models."""
        if MARK in self.fill([{"role": "user", "content": MARK}]):
            return False
        try:
            return MARK in self.fill([{"role": "user", "content": [{"type": "text", "text": MARK}]}])
        except Exception:  # a template may do anything with a value that it does not expect
            return False

    def rendered(self, prompt: str) -> RenderedChat:
        """The prompt as the user's last message in the template, with the positions of its text.

        Raises:
            ValueError: If the template refuses the messages, writes nothing of the prompt, or changes its text in such
                a way that spans cannot be located.
        """
        conversation = prompt.conversation if isinstance(prompt, Prompt) else Conversation()
        text = self.render(str(prompt), conversation)
        # The prompt starts at the index of the placeholder in a second rendering of the template. A search for the
        # prompt itself could match a word of the template, such as "user".
        marked = self.render(MARK, conversation)
        start = marked.find(MARK)
        if marked.count(MARK) > 1 and getattr(prompt, "spans", None):
            raise ValueError(
                "the chat template writes a user's message more than once, so a span would cover one of its copies "
                "only; use chat=False, or a tokenizer with another template"
            )
        earlier = self._contents(str(prompt), conversation, text)
        unlocated = _contents_of(conversation) if earlier is None else ()
        known = earlier or ()
        if start >= 0 and text.startswith(str(prompt), start):
            return RenderedChat(text, start, (*known, (start, start + len(prompt))), unlocated)
        # Llama 3's template strips white space from both ends of the prompt. Spans without this white space can still
        # be located.
        stripped, ranges = prompt.strip(), getattr(prompt, "spans", {}).values()
        before = len(prompt) - len(prompt.lstrip())
        inside = all(before <= a and b <= before + len(stripped) for span in ranges for a, b in span)
        if start < 0:
            raise ValueError(
                "the chat template writes nothing of a user's message, so the model would never see the prompt; use "
                "chat=False, or a tokenizer with another template"
            )
        if not text.startswith(stripped, start) or not inside:
            raise ValueError(
                "the chat template changes the prompt's text (it may strip white space at its ends), so the "
                "positions of its spans are unknown; give the prompt as the template leaves it"
            )
        return RenderedChat(text, start - before, (*known, (start, start + len(stripped))), unlocated)

    def _contents(self, content: str, conversation: Conversation, text: str) -> tuple[Span, ...] | None:
        """Ranges of the contents of earlier messages in the text.

        The result is ``None`` if the template does not write each of them once and as it is.
        """
        contents = _contents_of(conversation)
        marks = [f"{MARK}{chr(_FIRST_MARK + i)}" for i in range(len(contents))]
        messages = [
            {**message, "content": mark} if written else dict(message)
            for message, mark, written in zip(conversation.messages, marks, contents, strict=True)
        ]
        skeleton = self.render(content, Conversation(tuple(messages), conversation.prefix, conversation.arguments))
        places = sorted((skeleton.find(mark), i) for i, mark in enumerate(marks) if contents[i])
        if any(place < 0 or skeleton.count(marks[i]) > 1 for place, i in places):
            return None
        spans: list[Span] = []
        reached, position = 0, 0
        for n, (place, i) in enumerate(places):
            position += place - reached
            reached = place + len(marks[i])
            rest = skeleton[reached : places[n + 1][0] if n + 1 < len(places) else len(skeleton)]
            forms = (contents[i], contents[i].strip(), contents[i].lstrip(), contents[i].rstrip())
            form = next((form for form in forms if text.startswith(form + rest, position)), None)
            if form is None:
                return None
            spans.append((position, position + len(form)))
            position += len(form)
        return tuple(spans)


def _contents_of(conversation: Conversation) -> tuple[str, ...]:
    return tuple(str(message.get("content") or "") for message in conversation.messages)
