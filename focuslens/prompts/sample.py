"""Samples of multi-document question answering: a question, its accepted answers, and the documents in the prompt."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from html import escape
from typing import Any, Literal, TypeAlias, cast, get_args

from focuslens.prompts.gold import Gold
from focuslens.prompts.prompt import Prompt, checked_messages
from focuslens.prompts.template import DEFAULT_TEMPLATE, PromptTemplate, document_text
from focuslens.util.checks import checked_integer, checked_text, integers
from focuslens.util.html import Markup, card, details, shorten, table

__all__ = ["Case", "Document", "MultiDocSample", "prompts_digest"]

Case: TypeAlias = Literal["long", "gold", "negative"]
"""Documents in a prompt: all documents (``long``), only the gold documents (``gold``), or only the irrelevant documents
(``negative``)."""


class _GoldIndices(tuple[int, ...]):
    """Indices of the gold documents of a sample.

    The type tells ``dataclasses.replace``, which passes all fields on, from a user that names them.
    """

    __slots__ = ()


@dataclass(frozen=True)
class Document:
    """A document in a prompt: the title and the text of one search result.

    The prompt has no title for a document whose title is empty or only white space: ``Document [1] text``.

    Raises:
        TypeError: If the title or the text is not a string.
        ValueError: If both are empty or only white space, or if one of them cannot be encoded.
    """

    title: str
    text: str

    def __post_init__(self) -> None:
        checked_text(self.title, "title")
        checked_text(self.text, "text")
        if not (self.title.strip() or self.text.strip()):
            raise ValueError("a document has neither a title nor a text; give at least one of them")

    def __str__(self) -> str:
        return document_text(self.title, self.text)


@dataclass(frozen=True)
class MultiDocSample:
    """A question, its accepted answers, and the documents in the prompt.

    A subclass can override :meth:`prompt`, for prompts that no :class:`PromptTemplate` describes.

    Args:
        question: The question, as written in the prompt.
        answers: The accepted answers. A response is correct if it contains at least one accepted answer. Without
            answers, ``()``, attention can be measured, but not accuracy.
        documents: The documents, in prompt order.
        gold_index: Index of the document that answers the question, counted from 0; ``None`` if no document answers
            the question, or none is known. If several documents are needed, it is the first of ``gold_indices``.
        question_id: Identifier of the question. All samples of one question have the same ``question_id``, so that
            splits keep these samples together. The default is a digest of the question's text.
        name: Name that distinguishes this sample from other samples of the same question. If ``name`` is empty,
            ``gold_index`` is used instead.
        gold_indices: Indices of all documents that are needed for the answer, such as two for a multi-hop question.
            The span ``relevant`` covers all of them. By default, ``gold_index`` alone.
        template: Wording of the prompt; ``None`` for that of the lost-in-the-middle benchmark.
        messages: Earlier messages of the chat, each with ``role`` and ``content``, after those of the template.

    Raises:
        TypeError: If a field has another type, for example because a table has no value for it.
        ValueError: If there are no documents, if the question is empty, if a text cannot be encoded, if an index is out
            of range or occurs twice, or if ``gold_index`` is not the first of ``gold_indices``.
    """

    question: str
    answers: tuple[str, ...]
    documents: tuple[Document, ...]
    gold_index: int | None
    question_id: str = ""
    name: str = ""
    gold_indices: tuple[int, ...] = ()
    template: PromptTemplate | None = None
    messages: tuple[Mapping[str, Any], ...] = field(default=(), hash=False)

    def __post_init__(self) -> None:
        checked_text(self.question, "question", may_be_empty=False)
        checked_text(self.question_id, "question_id")
        checked_text(self.name, "name")
        for name in ("answers", "documents"):
            object.__setattr__(self, name, _sequence(getattr(self, name), name))
        for i, answer in enumerate(self.answers):
            checked_text(answer, f"answers[{i}]")
        for i, document in enumerate(self.documents):
            if not isinstance(cast("Any", document), Document):
                raise TypeError(
                    f"documents[{i}] is a {type(document).__name__}; it must be a Document: Document(title, text)"
                )
        if self.gold_index is not None:
            wanted = "an integer, the position of one document from 0, or None"
            object.__setattr__(self, "gold_index", checked_integer(self.gold_index, "gold_index", wanted))
        if not self.documents:
            raise ValueError(f"the question {self.question!r} has no documents; give at least one")
        if not self.question_id:
            object.__setattr__(self, "question_id", hashlib.sha256(self.question.encode()).hexdigest()[:16])
        self._check_gold("gold_index", [] if self.gold_index is None else [self.gold_index])
        self._set_gold_indices()
        if not isinstance(cast("Any", self.template), PromptTemplate | None):
            raise TypeError(
                f"template is {self.template!r:.60}, a {type(self.template).__name__}; it must be a PromptTemplate, or "
                "None"
            )
        object.__setattr__(self, "messages", checked_messages(self.messages, "messages"))

    @property
    def gold(self) -> Gold:
        """Index of the gold document, indices of several, or ``None``: the form in which results keep them."""
        return tuple(self.gold_indices) if len(self.gold_indices) > 1 else self.gold_index

    def _set_gold_indices(self) -> None:
        first = () if self.gold_index is None else (self.gold_index,)
        given = self.gold_indices
        # ``replace(sample, gold_index=3)`` passes the indices on that belong to the old index.
        if not isinstance(given, _GoldIndices):
            given = tuple(integers(given, "gold_indices"))
            self._check_gold("gold_indices", given)
            if given and first and given[0] != self.gold_index:
                raise ValueError(
                    f"gold_index is {self.gold_index}, but the first of gold_indices {given} is {given[0]}; give "
                    "gold_index=None, or the first of them"
                )
            object.__setattr__(self, "gold_index", (given or first or (None,))[0])
        elif given[:1] != first:
            given = first
        object.__setattr__(self, "gold_indices", _GoldIndices(given or first))

    def _check_gold(self, name: str, indices: Sequence[int]) -> None:
        outside = [index for index in indices if not 0 <= index < len(self.documents)]
        if outside:
            raise ValueError(
                f"{name} is {outside[0]}, but there are {len(self.documents)} documents: "
                f"it must be 0 to {len(self.documents) - 1}, or None"
            )
        if len(set(indices)) < len(indices):
            raise ValueError(f"{name} is {tuple(indices)}, which names a document twice")

    def __repr__(self) -> str:
        return (
            f"MultiDocSample(question={self.question!r}, answers={self.answers!r}, {len(self.documents)} documents, "
            f"{self._gold_text()}, id={self.id!r})"
        )

    def _gold_text(self) -> str:
        several = len(self.gold_indices) > 1
        return f"gold_indices={tuple(self.gold_indices)}" if several else f"gold_index={self.gold_index}"

    def _repr_html_(self) -> str:
        rows = [
            (i + 1, "★" if i in self.gold_indices else "", document.title, shorten(document.text, 240))
            for i, document in enumerate(self.documents)
        ]
        relevant = " and ".join(str(index + 1) for index in self.gold_indices)
        verb = "documents {} are" if len(self.gold_indices) > 1 else "document {} is"
        where = f"{verb.format(relevant)} relevant" if relevant else "no relevant document"
        answers = f"<div>accepted: {escape('; '.join(self.answers) or '-')}</div>"
        shown = table(("", "relevant", "title", "text"), rows)
        return card(self.question, Markup(answers), details(f"{len(self.documents)} documents, {where}", shown))

    @property
    def id(self) -> str:
        """Id, unique within a file: ``question_id@name``, or ``question_id@gold_index`` if ``name`` is empty.

        The indices of several gold documents are joined: ``question_id@2+5``.
        """
        return f"{self.question_id}@{self.name or '+'.join(map(str, self.gold_indices)) or None}"

    def with_template(self, template: PromptTemplate | None) -> MultiDocSample:
        """The sample with another wording of its prompt; ``None`` for that of the lost-in-the-middle benchmark."""
        return replace(self, template=template)

    def prompt(self, case: Case = "long") -> Prompt:
        """Create the prompt for one case. Each document keeps its number from the long prompt.

        Raises:
            ValueError: If ``case`` is unknown, if ``case`` is ``gold`` or ``negative`` and the sample has no gold
                document, or if ``case`` is ``negative`` and all documents are gold documents.
        """
        documents = {index: (self.documents[index].title, self.documents[index].text) for index in self._shown(case)}
        template = DEFAULT_TEMPLATE if self.template is None else self.template
        return template.prompt(self.question, documents, self.gold_indices, self.messages)

    def _shown(self, case: Case) -> list[int]:
        if case not in get_args(Case):
            raise ValueError(f"case is {case!r}; it must be one of {', '.join(get_args(Case))}")
        indices = range(len(self.documents))
        if case == "long":
            return list(indices)
        if not self.gold_indices:
            raise ValueError(f"the question {self.question!r} has no gold document, so it has no {case!r} prompt")
        shown = [i for i in indices if (i in self.gold_indices) == (case == "gold")]
        if not shown:
            only = "documents are all there are" if len(self.gold_indices) > 1 else "document is the only one"
            raise ValueError(f"the gold {only}, so nothing is left for the 'negative' prompt")
        return shown


def _sequence(values: Any, name: str) -> tuple[Any, ...]:
    """Values as a tuple. A string is refused, because its characters would be taken for values."""
    if isinstance(values, str | bytes | Mapping) or not isinstance(values, Iterable):
        raise TypeError(f"{name} is the {type(values).__name__} {values!r}; it must be a sequence, such as a list")
    return tuple(cast("Iterable[Any]", values))


def prompts_digest(samples: Iterable[MultiDocSample], case: Case = "long") -> str:
    """SHA-256 digest of the samples' ids, answers, prompts and relevant documents, which identifies the samples."""
    digest = hashlib.sha256()
    for sample in samples:
        prompt = sample.prompt(case)
        # The id of a sample without a name contains the indices of the relevant documents.
        relevant = [sample.gold_index, *sample.gold_indices[1:]] if sample.name else []
        conversation = getattr(prompt, "conversation", None)  # a subclass can return a plain text
        chat = [conversation.describe()] if conversation is not None and conversation.describe() else []
        digest.update(json.dumps([sample.id, sample.answers, str(prompt), *relevant, *chat]).encode())
    return digest.hexdigest()
