"""Changes of a prompt's text that move the character ranges of its spans along."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from itertools import pairwise
from typing import NamedTuple

from focuslens.prompts.batch import EncodedPrompt, disjoint
from focuslens.prompts.prompt import Span

__all__ = ["Edit", "removed_documents", "rewritten_text"]

_HEADING = re.compile(r"[^\W\d_]+ ?[\[(]?\d+[\])]?[:.]? ?\Z")
"""Heading of a document: a word and a number before the document's range, such as ``Document [3]``."""


class Edit(NamedTuple):
    """Replacement of a range of characters by a text. A range without characters is an insertion.

    Attributes:
        start: First character of the range.
        end: Character after the range.
        text: Text to write in place of the range.
        closes: Whether an insertion belongs to the ranges that end at it, and not to the ranges that begin at it.
    """

    start: int
    end: int
    text: str = ""
    closes: bool = False

    def moved(self, position: int) -> int:
        """Position of a boundary of a range after the replacement."""
        if position < self.start or (position == self.start and not self.closes):
            return position
        return self.start if position < self.end else position + len(self.text) - (self.end - self.start)

    def cuts(self, start: int, end: int) -> bool:
        """Whether a range begins or ends inside the range that is replaced by a text."""
        return bool(self.text) and any(self.start < position < self.end for position in (start, end))


def rewritten_text(
    text: str, characters: Mapping[str, Sequence[Span]], edits: Sequence[Edit]
) -> tuple[str, dict[str, tuple[Span, ...]]]:
    """The text after all edits, and the ranges in it.

    Ranges of which no character is left are dropped, and so are ranges that begin or end inside a text that another one
    replaces.

    Raises:
        ValueError: If two edits change the same characters.
    """
    ordered = sorted(edits, key=lambda edit: (edit.start, edit.end))
    for first, second in pairwise(ordered):
        if second.start < first.end:
            raise ValueError(f"two edits change the same characters: {first[:2]} and {second[:2]}")
    ranges = {name: list(spans) for name, spans in characters.items()}
    for edit in reversed(ordered):
        text = text[: edit.start] + edit.text + text[edit.end :]
        ranges = {
            name: [(edit.moved(a), edit.moved(b)) for a, b in spans if not edit.cuts(a, b)]
            for name, spans in ranges.items()
        }
    return text, {name: tuple((a, b) for a, b in spans if a < b) for name, spans in ranges.items()}


def removed_documents(prompt: EncodedPrompt, kept: Collection[int] = ()) -> list[Edit]:
    """Edits that remove the documents of a prompt, with their headings and the white space between them.

    A heading is a word and a number directly before a document, such as ``Document [3]``. If the prompt has a span
    ``entry``, its ranges are the documents with their headings and footers. The documents that are left keep their
    order and their headings.

    Args:
        prompt: The prompt, with its text and the characters of its documents.
        kept: Indices of the documents to keep, in the order of the span ``document``.

    Raises:
        ValueError: If the text or the characters of the documents are unknown, or if two documents overlap.
    """
    if not prompt.text or "document" not in prompt.characters:
        raise ValueError(
            "the prompt has no text with a span 'document', so its documents cannot be removed; give sample.prompt(), "
            "or fl.Prompt(text, spans={'document': [(start, end), ...]}) with character positions"
        )
    text, documents = prompt.text, sorted((span, i in kept) for i, span in enumerate(prompt.characters["document"]))
    if sum(end - start for (start, end), _ in documents) != sum(b - a for a, b in disjoint([d for d, _ in documents])):
        raise ValueError("documents of the prompt overlap, so none of them can be removed alone")
    framed = sorted(prompt.characters.get("entry", ()))
    entries = (
        [(*span, keep) for span, (_, keep) in zip(framed, documents, strict=True)]
        if framed
        else [
            (_beginning(text, start, documents[i - 1][0][1] if i else 0), end, keep)
            for i, ((start, end), keep) in enumerate(documents)
        ]
    )
    edits = [Edit(start, end) for start, end, keep in entries if not keep]
    for i, (start, _, keep) in enumerate(entries[1:], start=1):
        before, separates = entries[i - 1][1], keep and any(keep for _, _, keep in entries[:i])
        if not separates and (framed or not text[before:start].strip()):
            edits.append(Edit(before, start))
    if entries and not any(keep for _, _, keep in entries):
        end = entries[-1][1]
        edits.append(Edit(end, len(text) - len(text[end:].lstrip())))
    return [edit for edit in edits if edit.start < edit.end]


def _beginning(text: str, start: int, after: int) -> int:
    """First character of a document's heading, or of the document if it has none."""
    heading = _HEADING.search(text, after, start)
    return start if heading is None else heading.start()
