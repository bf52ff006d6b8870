"""Samples of a user's own table: a file, a ``datasets.Dataset``, a data frame or a list."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from focuslens.data._columns import Columns, Names
from focuslens.data._forms import FormName, checked_form
from focuslens.data._own_source import OwnForm, OwnSource
from focuslens.data._views import SampleViews
from focuslens.prompts.sample import MultiDocSample
from focuslens.prompts.template import PromptTemplate, described_template
from focuslens.util.checks import checked_integer
from focuslens.util.html import card, table

__all__ = ["OwnData", "OwnForm", "load_samples", "open_own"]


def load_samples(
    source: Any,
    columns: Names | None = None,
    *,
    form: FormName | None = None,
    template: PromptTemplate | None = None,
    limit: int | None = None,
    num_documents: int | None = None,
    seed: int = 42,
) -> OwnData:
    """Load samples from your own table, one sample per row.

    ``columns`` names the columns of the parts of a sample:

    * ``question``: The question.
    * ``documents``: A list of texts, of dicts, or of pairs of title and text; one text; or an object with lists of
      titles and texts. In a CSV file, the list is in JSON. Documents can also be in several columns, one document each:
      ``["doc1", "doc2"]``, or ``"doc1+doc2"``. An empty cell of several is no document.
    * ``text``, ``title``, ``document_id``: Fields of documents that are dicts. They are needed only if a dict has
      several fields, or none, with a usual name such as ``text`` or ``content``.
    * ``titles``: Titles of the documents, if they are in a column of their own.
    * ``answers``: The accepted answers, a text or a list. Without answers, attention can be measured, but not accuracy.
    * ``relevant``: The documents that are needed for the answer: an index from 0, an id, a title or a text, a list of
      them, or one boolean per document; also the name of such a boolean in the documents' dicts. Empty, or without the
      column, no relevant document is known. If a value can mean two documents, name the part ``relevant_index``,
      ``relevant_flag``, ``relevant_id``, ``relevant_title`` or ``relevant_text`` instead, or call the column so.
    * ``id``: Id of the question. Rows with the same id are samples of one question.
    * ``messages``: Earlier messages of a chat.

    A part that is not named is in a column with a usual name, such as ``query``, ``contexts`` or ``answer``. ``None``
    as a name leaves the part unread. A name with dots, such as ``answers.text`` or ``metadata.title``, leads into
    objects.

    The forms of these data sets are recognised by their fields and the shapes of these, or named with ``form``. Rows
    whose fields have other shapes, or that have a column of relevant documents, are read by columns:

    * ``hotpotqa``: ``context`` and ``supporting_facts``, in the original form or that of the Hugging Face hub.
    * ``squad``: The original articles with ``paragraphs``, or rows with one text, ``context``, and ``answers`` with
      ``text`` and ``answer_start``. Each sample has one document; :func:`with_distractors` gives it others. A question
      without answers has no relevant document.
    * ``kilt``: ``input`` and ``output``, a list of objects. Documents are passages in a column of their own, such as
      ``ctxs``, or the texts in the provenance. Passages of the pages that the provenance names are relevant.
    * ``rgb``: ``query``, ``answer``, and the lists ``positive`` and ``negative``. The documents are in a random order
      that depends on the seed and the row. A response to a question with several facts counts if it states one of them.
      ``positive_wrong`` is not read.

    All rows are checked once. A row is read again when its sample is accessed, and files in JSON lines are not kept in
    memory. An accepted answer that is empty after normalisation is dropped with a warning, if the question has others.

    Args:
        source: Path of a file (``.jsonl``, ``.json``, ``.csv``, ``.tsv``, all also with ``.gz``, or ``.parquet``), a
            ``datasets.Dataset``, a data frame of pandas, or a list of dicts.
        columns: Names of columns, by part; ``None`` for a part that is not read.
        form: ``"columns"``, or the form of a known data set; ``None`` to recognise it. With ``columns``, the default is
            ``"columns"``.
        template: Wording of the prompts; ``None`` for that of the lost-in-the-middle benchmark.
        limit: Maximum number of rows; ``None`` for all.
        num_documents: Maximum number of documents per sample: the relevant ones and the first others, in their order;
            ``None`` for all.
        seed: Random seed of the order of documents, in the form ``rgb``.

    Raises:
        FileNotFoundError: If the file does not exist.
        ImportError: If the library that reads the file is missing.
        TypeError: If an argument has another type.
        ValueError: If an argument is out of range, a column does not exist, or a row is invalid. For a row, the message
            names the file and the line.
    """
    limit, num_documents = _count(limit, "limit"), _count(num_documents, "num_documents")
    own = OwnForm(checked_form(form), Columns.of(columns), num_documents, checked_integer(seed, "seed"))
    return open_own(source, own, template, limit)


def open_own(source: Any, own: OwnForm, template: PromptTemplate | None = None, limit: int | None = None) -> OwnData:
    """Load samples whose form is known; see :func:`load_samples`."""
    source = Path(source) if isinstance(source, str | os.PathLike) else source
    opened = OwnSource(source, own, template, limit)
    return OwnData(opened, range(opened.rows.count))


def _count(value: int | None, name: str) -> int | None:
    if value is not None and checked_integer(value, name) < 1:
        raise ValueError(f"{name} is {value}; it must be at least 1, or None for all")
    return None if value is None else checked_integer(value, name)


class OwnData(SampleViews):
    """Sequence of samples from a user's table, as returned by :func:`load_samples`.

    The samples are in the order of the rows. Slices, :meth:`split` and :meth:`sample` return views of the same table.
    """

    def __init__(self, source: OwnSource, picks: Sequence[int], selection: tuple[Mapping[str, Any], ...] = ()) -> None:
        super().__init__(picks, selection)
        self._source = source

    def _read(self, pick: int) -> MultiDocSample:
        return self._source.sample(pick)

    def _question(self, pick: int) -> int:
        return self._source.first_rows[pick]

    def _row(self, pick: int) -> Mapping[str, Any]:
        return self._source.rows.read(pick)

    def _place(self, pick: int) -> str:
        return self._source.rows.where(pick)

    @property
    def path(self) -> Path | None:
        """Path of the file; ``None`` for a table of Python."""
        return self._source.rows.path

    def _with(self, picks: Sequence[int], selection: tuple[Mapping[str, Any], ...]) -> OwnData:
        return OwnData(self._source, picks, selection)

    def __repr__(self) -> str:
        rows = self._source.rows
        name = repr(rows.path.name) if rows.path is not None else rows.name
        return f"OwnData({name}: {len(self)} samples of {self.questions} questions, form {self._source.form.name!r})"

    def _repr_html_(self) -> str:
        rows = [
            (sample.id, sample.question, "; ".join(sample.answers) or "-", len(sample.documents), _gold(sample))
            for sample in (self[i] for i in range(min(3, len(self))))
        ]
        return card(repr(self), table(("id", "question", "accepted", "documents", "gold"), rows, "The first samples"))

    @property
    def form(self) -> OwnForm:
        """Form of the table: recognised or named, with its columns."""
        return self._source.own

    @property
    def description(self) -> dict[str, object]:
        """JSON-serialisable description of the samples for result files. Equal descriptions mean equal samples.

        ``sha256`` is the digest of the whole file, or of the rows of another source. ``selection`` lists the slices,
        splits and draws that produced this view, in order, and ``rows`` is the number of rows of the whole table.
        :meth:`SampleSelection.reopen` accepts the description of a file.
        """
        source = self._source
        path = source.rows.path
        return {
            "file": source.rows.name if path is None else path.name,
            **({"in_memory": True} if path is None else {}),
            "sha256": source.sha256,
            **source.own.describe(),
            "seed": source.own.seed,
            "limit": source.limit,
            **described_template(source.template),
            "dropped_answers": len(source.dropped),
            "selection": [dict(step) for step in self._selection],
            "rows": source.rows.count,
            "questions": self.questions,
            "samples": len(self),
        }


def _gold(sample: MultiDocSample) -> str:
    return ", ".join(map(str, sample.gold_indices)) or "-"
