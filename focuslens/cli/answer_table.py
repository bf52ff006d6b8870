"""Table of the documents that answers came from, for ``focuslens attribute``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

from focuslens.cli.common import print_table

if TYPE_CHECKING:
    from focuslens.prompts.sample import MultiDocSample
    from focuslens.scores.answer_sources import AnswerSources

__all__ = ["COLUMNS", "Rows", "answer_entry", "answer_rows", "print_answers"]

_N_PRINTED = 20
"""Number of samples in the printed table."""

Rows: TypeAlias = "list[tuple[str | int | float, ...]]"
"""Rows of the table on one sample: one per document."""


def answer_rows(
    sources: AnswerSources, samples: Sequence[MultiDocSample], lengths: Sequence[Sequence[int]]
) -> list[Rows]:
    """Rows of the table on each sample. Documents are counted from 1, as in the prompt."""
    rows: list[Rows] = []
    for i, sample in enumerate(samples):
        top, shares, scores = sources.top[i], sources.shares[i].tolist(), sources.scores[i].tolist()
        texts = (sample.id, sample.question, sources.responses[i])
        own: Rows = []
        for place, content in enumerate(sample.documents):
            numbers = (scores[place], shares[place], lengths[i][place] / sum(lengths[i]), sources.margins[i])
            shown = ("" if number != number else number for number in numbers)  # NaN differs from itself
            own.append((*texts, place + 1, content.title, *shown, int(place == top)))
        rows.append(own)
    return rows


COLUMNS = (
    "sample_id",
    "question",
    "response",
    "document",
    "title",
    "attention",
    "share",
    "share_of_tokens",
    "margin",
    "is_source",
)


_OF_DOCUMENTS = ("document", "title", "attention", "share", "share_of_tokens")
"""Columns whose values differ between the documents of a sample."""


def answer_entry(sources: AnswerSources, sample: MultiDocSample, place: int, rows: Rows) -> dict[str, Any]:
    """Entry of a sample in the result file. Documents are counted from 1, as in the prompt."""
    top = sources.top[place]
    return {
        "id": sample.id,
        "question": sample.question,
        "response": sources.responses[place],
        "document": None if top is None else top + 1,
        "title": None if top is None else sample.documents[top].title,
        "share": None if top is None else sources.top_shares[place],
        "margin": None if top is None else sources.margins[place],
        "documents": [
            {name: None if row[name] == "" else row[name] for name in _OF_DOCUMENTS}
            for row in (dict(zip(COLUMNS, row, strict=True)) for row in rows)
        ],
    }


def print_answers(sources: AnswerSources, samples: Sequence[MultiDocSample]) -> None:
    """Print the source of each of the first answers."""
    import pandas as pd

    from focuslens.util.html import shorten

    rows = [
        {
            "question": shorten(sample.question, 40),
            "answer": shorten(response, 40),
            "document": "-" if top is None else f"{top + 1}: {shorten(_name(sample, top), 30)}",
            "share": share,
            "margin": margin,
        }
        for sample, response, top, share, margin in zip(
            samples, sources.responses, sources.top, sources.top_shares, sources.margins, strict=True
        )
    ]
    print_table(pd.DataFrame(rows), most=_N_PRINTED)
    if len(rows) > _N_PRINTED:
        print(f"... and {len(rows) - _N_PRINTED} more samples")


def _name(sample: MultiDocSample, place: int) -> str:
    return sample.documents[place].title.strip() or sample.documents[place].text
