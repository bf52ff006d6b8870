"""Forms of known data sets: HotpotQA, SQuAD, KILT and RGB."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Literal, TypeAlias, cast, get_args

from focuslens.data._cells import text_of_number
from focuslens.data._columns import Columns, Fields, fields_of_row, question_id_of, usual_columns
from focuslens.data._form_shapes import (
    are_articles,
    cell_of,
    check_hotpotqa,
    check_kilt,
    check_rgb,
    check_squad,
    required,
    text_of,
)
from focuslens.data._passages import Passage, answers_of, joined, passages_of
from focuslens.data._rows import Row, Rows
from focuslens.prompts.sample import Document

__all__ = ["Form", "FormName", "checked_form", "expanded", "form_of"]

FormName: TypeAlias = Literal["columns", "hotpotqa", "squad", "kilt", "rgb"]
"""Form of a table: named columns, or the fields of a known data set."""


@dataclass(frozen=True)
class Form:
    """Way to read a row.

    Attributes:
        name: Name of the form.
        read: Function that returns the content of a row, given the row, the columns, and the seed of its order.
        columns: Parts that the user may name columns for; ``None`` for all.
        check: Function that raises ``ValueError`` for a row whose fields have other shapes.
        fields: Fields that a row must have to be recognised.
        telling: Fields of which one must have a content, because an empty value has no shape.
    """

    name: FormName
    read: Callable[[Row, Columns, str], Fields]
    columns: tuple[str, ...] | None = ()
    check: Callable[[Row], None] = lambda row: None
    fields: tuple[str, ...] = ()
    telling: tuple[str, ...] = ()

    def recognises(self, row: Row) -> bool:
        """Whether a row has the fields of a known data set, in their shapes, and no other columns for the same parts.

        A column that says which documents are relevant, for example, would otherwise be left unread.
        """
        if not self.fields or not all(name in row for name in self.fields):
            return False
        # KILT has the passages in a column of the user's own.
        parts = ("relevant",) if "documents" in (self.columns or ()) else ("relevant", "documents")
        if any(name not in self.fields for part in parts for name in usual_columns(row, part)):
            return False
        try:
            self.check(row)
        except ValueError:
            return False
        return any(cell_of(row, name) for name in self.telling)


def checked_form(form: str | None) -> FormName | None:
    """The argument ``form``. Any other value raises ``ValueError``."""
    if form is not None and form not in get_args(FormName):
        raise ValueError(
            f"form is {form!r}; it must be one of {', '.join(get_args(FormName))}, or None to recognise it"
        )
    return cast("FormName | None", form)


def form_of(rows: Rows, name: FormName | None, columns: Columns) -> Form:
    """The form of a table, by its name, or by the fields of its first row. Named columns are no known form.

    Raises:
        ValueError: If the first row cannot be read, or columns are named that the form does not read.
    """
    recognised = name is None and not columns.parts
    if recognised:
        first = rows.read(0)
        # An original file of SQuAD can begin with a question without answers, which tells nothing.
        name = (
            "squad" if rows.nested else next((known for known, form in _FORMS.items() if form.recognises(first)), None)
        )
    form = _FORMS[name or "columns"]
    unread = [part for part in columns.parts if form.columns is not None and part not in form.columns]
    if unread:
        readable = f"only {', '.join(form.columns)}" if form.columns else "no columns"
        raise ValueError(
            f"columns names {unread[0]!r}, but the form {form.name!r} has fields of its own, and takes {readable}; "
            "leave columns out, or give form='columns'"
        )
    return replace(form, read=partial(_read_as, form, "recognised by the first row" if recognised else "named"))


def _read_as(form: Form, known: str, row: Row, columns: Columns, seed: str) -> Fields:
    """Content of a row, whose fields must have the shapes of the form."""
    try:
        form.check(row)
    except ValueError as error:
        raise ValueError(
            f"{error} (the form {form.name!r} was {known}; give form='columns' for columns of your own)"
        ) from error
    return form.read(row, columns, seed)


# HotpotQA


def _hotpotqa(row: Row, columns: Columns, seed: str) -> Fields:
    """Fields of HotpotQA: ``context`` and ``supporting_facts``, in the original form or that of the hub."""
    del columns, seed
    context, facts = cell_of(row, "context"), cell_of(row, "supporting_facts")
    if isinstance(context, Mapping):  # the hub has lists of titles and of sentences
        columned = cast("Mapping[str, Any]", context)
        context = zip(columned["title"], columned["sentences"], strict=True)
    passages = tuple(
        Passage(Document(title, joined(sentences, f"context[{i}]"))) for i, (title, sentences) in enumerate(context)
    )
    titles = facts["title"] if isinstance(facts, Mapping) else [title for title, _ in facts]
    relevant = tuple(i for i, passage in enumerate(passages) if passage.document.title in titles)
    # With paragraphs that were retrieved (the fullwiki setting), some facts are in none of them.
    lacking = not set(titles) <= {passage.document.title for passage in passages}
    return Fields(text_of(row, "question"), _answers(row), passages, relevant, _id(row), lacking=lacking)


# SQuAD


def _squad(row: Row, columns: Columns, seed: str) -> Fields:
    """Fields of SQuAD: one paragraph, the ``context``, which answers the question unless there are no answers."""
    del columns, seed
    title = row.get("title") or ""
    passages = (Passage(Document(str(title).replace("_", " "), text_of(row, "context"))),)
    answers = answers_of(required(row, "answers"))
    return Fields(text_of(row, "question"), answers, passages, (0,) if answers else (), _id(row))


def expanded(rows: Rows) -> Rows:
    """Rows of one question each, for SQuAD's original files, whose rows are articles. Other rows stay as they are."""
    if not are_articles(rows.read(0)):
        return rows
    found = list(_questions(rows))
    if not found:
        raise ValueError(f"{rows.name} has articles with paragraphs, but no questions ('qas')")
    return Rows(rows.name, len(found), lambda i: found[i][0], lambda i: found[i][1], rows.path, nested=True)


def _questions(rows: Rows) -> Iterator[tuple[Row, str]]:
    for index in range(rows.count):
        article = rows.read(index)
        if not are_articles(article):
            raise ValueError(
                f"{rows.where(index)}: the field 'paragraphs' is {article.get('paragraphs')!r:.60}; as in the first "
                "article, it must be a list of objects, each with a list of questions, 'qas'"
            )
        for p, paragraph in enumerate(article["paragraphs"]):
            for q, question in enumerate(paragraph["qas"]):
                place = f"{rows.place(index)}, paragraphs[{p}], qas[{q}]"
                if not isinstance(question, Mapping):
                    raise ValueError(f"{rows.name}, {place} is {question!r:.60}; it must be an object")
                shared = {"title": article.get("title"), "context": paragraph.get("context"), "answers": []}
                yield {**shared, **cast("Mapping[str, Any]", question)}, place


# KILT


def _kilt(row: Row, columns: Columns, seed: str) -> Fields:
    """Fields of KILT: ``input`` and ``output``, whose provenance names the pages with the answer.

    Documents are the passages in another column, such as ``ctxs``, or the texts in the provenance.
    """
    del seed
    outputs = cast("list[Mapping[str, Any]]", cell_of(row, "output"))
    sources = [source for output in outputs for source in output.get("provenance") or ()]
    answers = tuple(dict.fromkeys(a for output in outputs for a in answers_of(output.get("answer"))))
    cells = columns.cells(row, "documents")
    if cells is None:
        passages = tuple(_evidence(sources))
        relevant, lacking = tuple(range(len(passages))), False
    else:
        passages = tuple(passages_of(next(iter(cells.values())), columns.document_fields))
        relevant = tuple(i for i, passage in enumerate(passages) if any(_is_of(passage, page) for page in sources))
        lacking = any(not any(_is_of(passage, page) for passage in passages) for page in sources)
    return Fields(text_of(row, "input"), answers, passages, relevant, question_id_of(row, columns), lacking=lacking)


def _is_of(passage: Passage, source: Mapping[str, Any]) -> bool:
    """Whether a passage is of the page that a provenance names: by the page's id, or by its title."""
    page = text_of_number(source.get("wikipedia_id") or "")
    if page and "wikipedia_id" in passage.fields:
        return text_of_number(passage.fields["wikipedia_id"]) == page
    return page in passage.ids or (bool(source.get("title")) and passage.document.title == source.get("title"))


def _evidence(sources: Sequence[Mapping[str, Any]]) -> list[Passage]:
    """Texts in the provenance, without repetitions."""
    texts: dict[tuple[str, str], None] = {}
    for source in sources:
        meta = cast("Mapping[str, Any]", source.get("meta") or {})
        text = joined(source.get("text") or meta.get("evidence_span") or (), "evidence_span")
        if text:
            texts.setdefault((str(source.get("title") or ""), text))
    if not texts:
        raise ValueError(
            "the provenance names pages and contains no text, so there are no documents; add passages to each row, "
            "and name their column: columns={'documents': 'ctxs'}"
        )
    return [Passage(Document(title, text)) for title, text in texts]


# RGB


def _rgb(row: Row, columns: Columns, seed: str) -> Fields:
    """Fields of RGB: ``positive`` documents, which answer the query, and ``negative`` ones, in a random order."""
    del columns
    positive, negative = (_flat(cell_of(row, name)) for name in ("positive", "negative"))
    passages = [Passage(Document("", text)) for text in (*positive, *negative)]
    if not passages:
        raise ValueError("there are no documents: 'positive' and 'negative' are empty")
    # In file order, the relevant documents would always come first.
    order = list(range(len(passages)))
    random.Random(seed).shuffle(order)
    relevant = tuple(place for place, i in enumerate(order) if i < len(positive))
    return Fields(text_of(row, "query"), _answers(row), tuple(passages[i] for i in order), relevant, _id(row))


def _flat(values: Any) -> list[str]:
    """Texts of a list, in which a question about several facts has a list per fact."""
    texts: list[str] = []
    for value in cast("list[Any]", values or ()):
        texts += _flat(value) if isinstance(value, list) else [value]
    return texts


# Parts


def _answers(row: Row) -> tuple[str, ...]:
    try:
        return answers_of(row.get("answer"))
    except ValueError as error:
        raise ValueError(f"the field 'answer': {error}") from error


def _id(row: Row) -> str:
    value = next((row[name] for name in ("id", "_id") if row.get(name) is not None), "")
    return text_of_number(value)


_FORMS: Mapping[FormName, Form] = {
    "columns": Form("columns", lambda row, columns, seed: fields_of_row(row, columns), None),
    "hotpotqa": Form(
        "hotpotqa",
        _hotpotqa,
        check=check_hotpotqa,
        fields=("question", "context", "supporting_facts"),
        telling=("context",),
    ),
    "squad": Form("squad", _squad, check=check_squad, fields=("question", "context", "answers"), telling=("answers",)),
    "kilt": Form(
        "kilt",
        _kilt,
        ("documents", "id", "text", "title", "document_id"),
        check_kilt,
        fields=("input", "output"),
        telling=("output",),
    ),
    "rgb": Form(
        "rgb",
        _rgb,
        check=check_rgb,
        fields=("query", "answer", "positive", "negative"),
        telling=("positive", "negative"),
    ),
}
