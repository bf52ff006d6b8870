"""Wording of multi-document prompts, and the character ranges of their spans.

The default wording is that of the lost-in-the-middle benchmark (Liu et al., 2024). The wording is part of the
experiment, and "Focus Directions" (arXiv 2503.23306) uses it unchanged. This module assembles each prompt from its
parts. The exact character ranges of the instruction, the documents and the question are therefore known without a
search.
"""

from __future__ import annotations

import re
import string
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal, TypeAlias, get_args

import yaml

from focuslens.prompts.prompt import Conversation, Prompt, Span, checked_arguments, checked_messages
from focuslens.util.checks import checked_text

__all__ = ["DEFAULT_TEMPLATE", "PromptTemplate", "QuestionPlace", "described_template", "document_text"]

_INSTRUCTION = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant)."
)

QuestionPlace: TypeAlias = Literal["after", "before", "both"]
"""Place of the question: after the documents, before them, or both."""

_PLACEHOLDERS: Mapping[str, tuple[frozenset[str], frozenset[str]]] = {
    "heading": (frozenset({"number", "title"}), frozenset()),
    "document": (frozenset({"number", "title", "text"}), frozenset({"text"})),
    "untitled": (frozenset({"number", "text"}), frozenset({"text"})),
    "footer": (frozenset({"number", "title"}), frozenset()),
    "question": (frozenset({"question"}), frozenset({"question"})),
}
"""Placeholders that a format may contain, and those that it must contain."""

_TEXTS = ("instruction", "separator", "gap", "cue", "prefix")


class _Writer:
    """Text in parts, with the ranges of its spans."""

    def __init__(self) -> None:
        self.pieces: list[str] = []
        self.length = 0
        names = ("instruction", "document", "relevant", "irrelevant", "question")
        self.spans: dict[str, list[Span]] = {name: [] for name in names}

    def add(self, text: str, *names: str) -> None:
        """Write a text that belongs to the named spans."""
        for name in names:
            self.spans[name].append((self.length, self.length + len(text)))
        self.pieces.append(text)
        self.length += len(text)


def _filled(pattern: str, values: Mapping[str, str]) -> str:
    """A format with values."""
    return "".join([part if name is None else part + values[name] for part, name in _parsed(pattern)])


@dataclass(frozen=True)
class PromptTemplate:
    r"""Wording of multi-document prompts. The default is the wording of the lost-in-the-middle benchmark.

    The text of a prompt has these parts, in this order: ``instruction``, ``gap``, the documents with ``separator``
    between them, ``gap``, the question, ``cue``. Without an instruction, the first gap is left out. A document is its
    ``heading``, its text in the format ``document`` (or ``untitled``, if it has no title), and its ``footer``.

    The spans of the prompt are known by construction. The span of a document is its text in the format ``document`` or
    ``untitled``, without white space at the ends of the format. ``heading`` and ``footer`` are outside of it. The span
    of the question is the text of the question alone.

    The formats contain placeholders. ``heading`` and ``footer`` may contain ``{number}`` and ``{title}``, ``document``
    must contain ``{text}`` and may contain ``{title}`` and ``{number}``, ``untitled`` must contain ``{text}``, and
    ``question`` must contain ``{question}``. ``{number}`` counts from 1. A brace of the text itself is doubled:
    ``{{``. Titles are left out of the prompt if no format contains ``{title}``. The other texts are written as they
    are, so that placeholders are refused in them.

    The other fields are for models with a chat template. The text of the prompt is then the content of the user's last
    message. Texts that look like control tokens, such as ``<|im_end|>``, are text in documents, in the question, in
    ``system`` and in ``turns``; in ``prefix``, they are control tokens.

    Args:
        instruction: Instruction at the beginning of the prompt; may be empty.
        heading: Text before each document, outside of the document's span.
        document: Format of a document with a title.
        untitled: Format of a document without a title.
        footer: Text after each document, outside of the document's span.
        separator: Text between documents.
        gap: Text after the instruction, and between the documents and the question.
        question: Format of the question.
        cue: Text at the end of the prompt, before the response.
        question_place: Place of the question: ``after`` the documents, ``before`` them, or ``both``.
        system: System prompt; ``None`` for none.
        turns: Earlier messages of the chat, each with ``role`` and ``content``, in the form of Hugging Face's chat
            templates.
        prefix: Beginning of the response, which the model continues.
        chat_arguments: Arguments of the chat template, such as ``{"enable_thinking": False}`` or ``{"tools": [...]}``.
            They come on top of the arguments that the model was opened with.

    Raises:
        TypeError: If a field has another type.
        ValueError: If a format lacks a placeholder, or contains an unknown one, if another text contains one, or if an
            argument of the chat template is one that FocusLens sets itself.
    """

    instruction: str = _INSTRUCTION
    heading: str = "Document [{number}]"
    document: str = "(Title: {title}) {text}"
    untitled: str = " {text}"
    footer: str = ""
    separator: str = "\n"
    gap: str = "\n\n"
    question: str = "Question: {question}"
    cue: str = "\nAnswer:"
    question_place: QuestionPlace = "after"
    system: str | None = None
    turns: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)
    prefix: str = ""
    chat_arguments: Mapping[str, Any] = field(default_factory=dict[str, Any], hash=False)

    def __post_init__(self) -> None:
        for name in _TEXTS:
            checked_text(getattr(self, name), name)
        for name, (allowed, required) in _PLACEHOLDERS.items():
            _check_format(name, checked_text(getattr(self, name), name), allowed, required)
        if self.system is not None:
            checked_text(self.system, "system", may_be_empty=False)
        if self.question_place not in get_args(QuestionPlace):
            raise ValueError(
                f"question_place is {self.question_place!r}; it must be one of {', '.join(get_args(QuestionPlace))}"
            )
        object.__setattr__(self, "turns", checked_messages(self.turns, "turns"))
        object.__setattr__(self, "chat_arguments", checked_arguments(self.chat_arguments, "chat_arguments"))
        for name in (*_TEXTS, "system"):
            _check_plain(name, getattr(self, name) or "")
        for i, turn in enumerate(self.turns):
            _check_plain(f"turns[{i}]['content']", str(turn.get("content") or ""))

    @classmethod
    def load(cls, path: str | Path) -> PromptTemplate:
        """Read a template from a YAML file. The names of its entries are those of the fields.

        Raises:
            FileNotFoundError: If the file does not exist.
            ValueError: If the file is not YAML, is not a mapping, or an entry is unknown or invalid. The message names
                the file.
        """
        try:
            content = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
            return cls.of({} if content is None else content)
        except (yaml.YAMLError, UnicodeDecodeError, TypeError, ValueError) as error:
            raise ValueError(f"{path} is no prompt template: {error}") from error

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> PromptTemplate:
        """Make a template from some of its fields, such as those of :meth:`describe`.

        Raises:
            TypeError: If a field has another type.
            ValueError: If a field is unknown or invalid.
        """
        names = [entry.name for entry in fields(cls)]
        if not isinstance(description, Mapping):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"the template is {description!r:.60}; it must map names of fields to values")
        unknown = [name for name in description if name not in names]
        if unknown:
            raise ValueError(f"a template has no field {unknown[0]!r}; there are {', '.join(names)}")
        values: dict[str, Any] = {**description, "turns": checked_messages(description.get("turns") or (), "turns")}
        return cls(**values)

    def describe(self) -> dict[str, Any]:
        """Fields that differ from the default, as JSON values for result files. :meth:`of` rebuilds the template."""
        values = {entry.name: getattr(self, entry.name) for entry in fields(self)}
        plain = {**values, "turns": [dict(turn) for turn in self.turns]}
        default = {**{entry.name: entry.default for entry in fields(self)}, "turns": [], "chat_arguments": {}}
        return {name: value for name, value in plain.items() if value != default[name]}

    def prompt(
        self,
        question: str,
        documents: Mapping[int, tuple[str, str]],
        gold_indices: Collection[int] = (),
        messages: Iterable[Mapping[str, Any]] = (),
    ) -> Prompt:
        """Create a prompt with an instruction, documents and a question.

        Args:
            question: The question.
            documents: Title and text of each document, by the document's index, counted from 0. The mapping is in
                prompt order.
            gold_indices: Indices of the documents with the span ``relevant``.
            messages: Earlier messages of the chat, after those of the template.

        Raises:
            ValueError: If a document has no text and the template leaves out its title, or if there are two system
                prompts.
        """
        writer = _Writer()
        if self.instruction:
            writer.add(self.instruction, "instruction")
            writer.add(self.gap)
        if self.question_place != "after":
            self._ask(writer, question)
            writer.add(self.gap)
        for place, (index, (title, text)) in enumerate(documents.items()):
            writer.add("" if place == 0 else self.separator)
            start = writer.length
            self._show(writer, index, title, text, "relevant" if index in gold_indices else "irrelevant")
            if self._frames_documents:
                writer.spans.setdefault("entry", []).append((start, writer.length))
        if self.question_place != "before":
            writer.add(self.gap)
            self._ask(writer, question)
        writer.add(self.cue)
        return Prompt("".join(writer.pieces), writer.spans, self._conversation(messages))

    @property
    def _frames_documents(self) -> bool:
        """Whether documents stand in a text that is not a heading of the default's form."""
        return (self.heading, self.footer) != (DEFAULT_TEMPLATE.heading, DEFAULT_TEMPLATE.footer)

    def _ask(self, writer: _Writer, question: str) -> None:
        for literal, placeholder in _parsed(self.question):
            writer.add(literal)
            if placeholder is not None:
                writer.add(question, "question")

    def _show(self, writer: _Writer, index: int, title: str, text: str, relevance: str) -> None:
        values = {"number": str(index + 1), "title": title, "text": text}
        pattern = self.document if title.strip() else self.untitled
        inner = pattern.strip()
        before, after = pattern.split(inner)
        shown = _filled(inner, values)
        if not shown:
            raise ValueError(
                f"document {index} has a title and no text, and the template leaves titles out, so nothing of it is "
                "left; write {title} into the format 'document'"
            )
        writer.add(_filled(self.heading, values) + before)
        writer.add(shown, "document", relevance)
        writer.add(after + _filled(self.footer, values))

    def _conversation(self, messages: Iterable[Mapping[str, Any]]) -> Conversation:
        own = [] if self.system is None else [{"role": "system", "content": self.system}]
        before = (*own, *self.turns, *messages)
        if any(message["role"] == "system" for message in before[1:]):
            raise ValueError(
                "a system message stands after other messages; give one system prompt, at the beginning: of the "
                "template (system), or of the messages"
            )
        return Conversation(before, self.prefix, self.chat_arguments)


@lru_cache(maxsize=256)
def _parsed(pattern: str) -> tuple[tuple[str, str | None], ...]:
    """Texts and placeholders of a format, in order."""
    return tuple((literal, name) for literal, name, _, _ in string.Formatter().parse(pattern))


def _check_format(name: str, pattern: str, allowed: Collection[str], required: Collection[str]) -> None:
    """Raise ``ValueError`` unless a format has the required placeholders, and no others than the allowed ones."""
    listed = ", ".join(f"{{{placeholder}}}" for placeholder in sorted(allowed))
    try:
        parts = list(string.Formatter().parse(pattern))
    except ValueError as error:
        raise ValueError(
            f"{name} is {pattern!r}, which is no format ({error}); placeholders are {listed}, and a brace of the text "
            "is doubled: {{"
        ) from error
    placeholders = [placeholder for _, placeholder, _, _ in parts if placeholder is not None]
    unusual = [placeholder for _, placeholder, form, change in parts if placeholder and (form or change)]
    unknown = [placeholder for placeholder in placeholders if placeholder not in allowed] + unusual
    if unknown:
        raise ValueError(
            f"{name} is {pattern!r} with the placeholder {{{unknown[0]}}}; it may contain {listed}, and a brace of the "
            "text is doubled: {{"
        )
    for placeholder in required:
        if placeholders.count(placeholder) != 1:
            raise ValueError(f"{name} is {pattern!r}; it must contain {{{placeholder}}} once")


_PLACEHOLDER = re.compile("|".join(sorted({f"{{{one}}}" for allowed, _ in _PLACEHOLDERS.values() for one in allowed})))


def _check_plain(name: str, text: str) -> None:
    """Raise ``ValueError`` if a text that is written as it is contains a placeholder."""
    found = _PLACEHOLDER.search(text)
    if found is None:
        return
    fields_with = [field for field, (allowed, _) in _PLACEHOLDERS.items() if found[0][1:-1] in allowed]
    place = "; question_place='both' also asks before the documents" if found[0] == "{question}" else ""
    raise ValueError(
        f"{name} is {text!r:.80} with the placeholder {found[0]}, which would stay in the prompt as it is: {name} is a "
        f"plain text. It may stand in {' and '.join(fields_with)}{place}"
    )


DEFAULT_TEMPLATE = PromptTemplate()
"""Wording of the lost-in-the-middle benchmark."""


def document_text(title: str, text: str) -> str:
    """Title and text of a document, in the format that follows the document's number in a prompt.

    A document whose title is empty or only white space is its text alone.
    """
    return f"(Title: {title}) {text}" if title.strip() else text


def described_template(template: PromptTemplate | None) -> dict[str, Any]:
    """Entry of a template in the description of samples; empty for the default wording."""
    changes = {} if template is None else template.describe()
    return {"template": changes} if changes else {}
