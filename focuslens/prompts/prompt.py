"""Multi-document prompts with the character ranges of their spans.

The wording is that of the lost-in-the-middle benchmark (Liu et al., 2024). The wording is part of the experiment, and
"Focus Directions" (arXiv 2503.23306) uses it unchanged. This module assembles each prompt from its parts. The exact
character ranges of the instruction, the documents and the question are therefore known without a search.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from html import escape
from typing import Literal, TypeAlias, get_args

from focuslens.util.html import Markup, card, details, shorten, table

__all__ = ["Case", "Document", "MultiDocSample", "Prompt", "Span", "prompts_digest"]

Span: TypeAlias = tuple[int, int]
"""Half-open range ``[start, end)`` of characters or of tokens."""

Case: TypeAlias = Literal["long", "gold", "negative"]
"""Documents in a prompt: all documents (``long``), only the gold document (``gold``), or only the irrelevant documents
(``negative``)."""

_INSTRUCTION = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant)."
)


class Prompt(str):
    """Text of a prompt, with the character ranges of named spans.

    A ``Prompt`` is a ``str`` that can be used like any other string. ``spans`` maps the name of each span to half-open
    character ranges. Prompts of :class:`MultiDocSample` have the spans ``instruction``, ``question``, ``document`` (all
    documents, in order), ``relevant`` (the gold document) and ``irrelevant`` (all other documents). If a prompt does
    not contain the gold document, ``relevant`` has no ranges. Other prompts may use any span names. Interventions and
    scores refer to spans by name.
    """

    spans: Mapping[str, tuple[Span, ...]]

    def __new__(cls, text: str, spans: Mapping[str, Iterable[Span]] | None = None) -> Prompt:
        """Create a prompt with named spans.

        Args:
            text: The text of the prompt.
            spans: Half-open character ranges of ``text``, by span name.

        Raises:
            ValueError: If a range is empty, reversed, or not inside the text.
        """
        prompt = super().__new__(cls, text)
        prompt.spans = {name: tuple((int(a), int(b)) for a, b in ranges) for name, ranges in (spans or {}).items()}
        for name, ranges in prompt.spans.items():
            for start, end in ranges:
                if not 0 <= start < end <= len(text):
                    raise ValueError(
                        f"span {name!r} = ({start}, {end}) does not lie in a text of {len(text)} characters; "
                        "a span is a half-open range with 0 <= start < end <= length"
                    )
        return prompt

    def __getnewargs__(self) -> tuple[str, Mapping[str, tuple[Span, ...]]]:  # type: ignore[override]
        return (str(self), self.spans)

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


@dataclass(frozen=True)
class Document:
    """Document in a prompt: the title and the text of one search result."""

    title: str
    text: str

    def __str__(self) -> str:
        return f"(Title: {self.title}) {self.text}"


@dataclass(frozen=True)
class MultiDocSample:
    """A question, its accepted answers, and the documents in the prompt.

    Args:
        question: The question, as written in the prompt.
        answers: The accepted answers. A response is correct if it contains at least one accepted answer.
        documents: The documents, in prompt order.
        gold_index: Index of the document that answers the question, counted from 0; ``None`` if no document answers
            the question.
        question_id: Identifier of the question. All samples of one question have the same ``question_id``, so that
            splits keep these samples together. The default is a digest of the question's text.
        name: Name that distinguishes this sample from other samples of the same question. If ``name`` is empty,
            ``gold_index`` is used instead.

    Raises:
        TypeError: If ``answers`` is a string.
        ValueError: If there are no answers or no documents, or if ``gold_index`` is out of range.
    """

    question: str
    answers: tuple[str, ...]
    documents: tuple[Document, ...]
    gold_index: int | None
    question_id: str = ""
    name: str = ""

    def __post_init__(self) -> None:
        if isinstance(self.answers, str):
            raise TypeError(f"answers is the string {self.answers!r}; it must be a tuple of strings")
        object.__setattr__(self, "answers", tuple(self.answers))
        object.__setattr__(self, "documents", tuple(self.documents))
        if not self.answers:
            raise ValueError(f"the question {self.question!r} has no answers; give at least one")
        if not self.documents:
            raise ValueError(f"the question {self.question!r} has no documents; give at least one")
        if not self.question_id:
            object.__setattr__(self, "question_id", hashlib.sha256(self.question.encode()).hexdigest()[:16])
        if self.gold_index is not None and not 0 <= self.gold_index < len(self.documents):
            raise ValueError(
                f"gold_index is {self.gold_index}, but there are {len(self.documents)} documents: "
                f"it must be 0 to {len(self.documents) - 1}, or None"
            )

    def __repr__(self) -> str:
        return (
            f"MultiDocSample(question={self.question!r}, answers={self.answers!r}, {len(self.documents)} documents, "
            f"gold_index={self.gold_index}, id={self.id!r})"
        )

    def _repr_html_(self) -> str:
        rows = [
            (i + 1, "★" if i == self.gold_index else "", document.title, shorten(document.text, 240))
            for i, document in enumerate(self.documents)
        ]
        where = "no relevant document" if self.gold_index is None else f"document {self.gold_index + 1} is relevant"
        answers = f"<div>accepted: {escape('; '.join(self.answers))}</div>"
        shown = table(("", "relevant", "title", "text"), rows)
        return card(self.question, Markup(answers), details(f"{len(self.documents)} documents, {where}", shown))

    @property
    def id(self) -> str:
        """Id, unique within a file: ``question_id@name``, or ``question_id@gold_index`` if ``name`` is empty."""
        return f"{self.question_id}@{self.name or self.gold_index}"

    def prompt(self, case: Case = "long") -> Prompt:
        """Create the prompt for one case. Each document keeps its number from the long prompt.

        Raises:
            ValueError: If ``case`` is unknown, if ``case`` is ``gold`` or ``negative`` and the sample has no gold
                document, or if ``case`` is ``negative`` and the gold document is the only document.
        """
        return _assemble(self, self._shown(case))

    def _shown(self, case: Case) -> list[int]:
        if case not in get_args(Case):
            raise ValueError(f"case is {case!r}; it must be one of {', '.join(get_args(Case))}")
        indices = range(len(self.documents))
        if case == "long":
            return list(indices)
        if self.gold_index is None:
            raise ValueError(f"the question {self.question!r} has no gold document, so it has no {case!r} prompt")
        shown = [i for i in indices if (i == self.gold_index) == (case == "gold")]
        if not shown:
            raise ValueError("the gold document is the only one, so nothing is left for the 'negative' prompt")
        return shown


def prompts_digest(samples: Iterable[MultiDocSample], case: Case = "long") -> str:
    """SHA-256 digest of the samples' ids, answers and prompts, which identifies the samples in result files."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(json.dumps([sample.id, sample.answers, str(sample.prompt(case))]).encode())
    return digest.hexdigest()


def _assemble(sample: MultiDocSample, shown: list[int]) -> Prompt:
    pieces: list[str] = []
    spans: dict[str, list[Span]] = {"instruction": [], "document": [], "relevant": [], "irrelevant": [], "question": []}

    def add(text: str, *names: str) -> None:
        start = sum(map(len, pieces))
        pieces.append(text)
        for name in names:
            spans[name].append((start, start + len(text)))

    add(_INSTRUCTION, "instruction")
    add("\n\n")
    for place, index in enumerate(shown):
        add(f"{'' if place == 0 else chr(10)}Document [{index + 1}]")
        add(str(sample.documents[index]), "document", "relevant" if index == sample.gold_index else "irrelevant")
    add("\n\nQuestion: ")
    add(sample.question, "question")
    add("\nAnswer:")
    return Prompt("".join(pieces), spans)
