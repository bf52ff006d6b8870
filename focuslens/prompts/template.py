"""Wording of multi-document prompts, and the character ranges of their spans.

The wording is that of the lost-in-the-middle benchmark (Liu et al., 2024). The wording is part of the experiment, and
"Focus Directions" (arXiv 2503.23306) uses it unchanged. This module assembles each prompt from its parts. The exact
character ranges of the instruction, the documents and the question are therefore known without a search.
"""

from __future__ import annotations

from collections.abc import Mapping

from focuslens.prompts.prompt import Prompt, Span

__all__ = ["document_text", "multidoc_prompt"]

_INSTRUCTION = (
    "Write a high-quality answer for the given question using only the provided search results "
    "(some of which might be irrelevant)."
)


def document_text(title: str, text: str) -> str:
    """Title and text of a document, in the format that follows the document's number in a prompt."""
    return f"(Title: {title}) {text}"


def multidoc_prompt(question: str, documents: Mapping[int, str], gold_index: int | None) -> Prompt:
    """Create a prompt with an instruction, documents and a question.

    Args:
        question: The question.
        documents: Text of each document, by the document's index, counted from 0. The mapping is in prompt order.
        gold_index: Index of the document with the span ``relevant``; ``None`` for no such document.
    """
    pieces: list[str] = []
    spans: dict[str, list[Span]] = {"instruction": [], "document": [], "relevant": [], "irrelevant": [], "question": []}

    def add(text: str, *names: str) -> None:
        start = sum(map(len, pieces))
        pieces.append(text)
        for name in names:
            spans[name].append((start, start + len(text)))

    add(_INSTRUCTION, "instruction")
    add("\n\n")
    for place, (index, text) in enumerate(documents.items()):
        add(f"{'' if place == 0 else chr(10)}Document [{index + 1}]")
        add(text, "document", "relevant" if index == gold_index else "irrelevant")
    add("\n\nQuestion: ")
    add(question, "question")
    add("\nAnswer:")
    return Prompt("".join(pieces), spans)
