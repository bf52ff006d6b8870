"""Needle-in-a-haystack prompts: a sentence that answers a question, somewhere in a long text about other things.

Task, wording and files are those of "Retrieval Head Mechanistically Explains Long-Context Factuality" (Wu et al., 2024,
arXiv 2404.15574; code: nightdessert/Retrieval_Head). Because the prompt is assembled here, the character range of the
needle is known exactly; their code searches the prompt's tokens for a window that holds most of the needle's.
"""

from __future__ import annotations

import operator
import os
import re
from bisect import bisect_right
from collections.abc import Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focuslens.data._records import parse_object
from focuslens.data.synthetic import Split, load_synthetic
from focuslens.prompts.prompt import MultiDocSample, Prompt, Span

__all__ = ["Needle", "NeedleSample", "load_haystack", "load_needles", "needle_samples", "synthetic_needles"]

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")


@dataclass(frozen=True)
class Needle:
    """A sentence to hide, and what to ask for.

    Args:
        question: The question that it answers.
        text: The sentence, as it is put into the haystack.
        answer: The reference that responses are compared with; usually the part of the sentence that answers.

    Raises:
        ValueError: If one of them is empty.
    """

    question: str
    text: str
    answer: str

    def __post_init__(self) -> None:
        for name in ("question", "text", "answer"):
            if not getattr(self, name).strip():
                raise ValueError(f"the needle's {name} is empty; it must be text")

    @property
    def answer_span(self) -> Span | None:
        """Where the answer stands in the sentence, upper and lower case aside; ``None`` where it is not part of it."""
        found = re.search(re.escape(self.answer), self.text, re.IGNORECASE)
        return found.span() if found else None


@dataclass(frozen=True)
class NeedleSample:
    """One prompt of a needle-in-a-haystack test.

    Args:
        prompt: With the parts ``needle`` (what holds the answer) and ``question``; where the answer is known to be a
            part of the needle, also ``answer``.
        reference: What a right response says.
        length: How long the context is: tokens of haystack and needle, or documents.
        depth: How deep in it the needle was wanted, from 0 (first) to 1 (last).
        id: Tells the sample from others.

    Raises:
        ValueError: If the prompt does not say where its needle is.
    """

    prompt: Prompt
    reference: str
    length: int
    depth: float
    id: str

    def __post_init__(self) -> None:
        if not self.prompt.spans.get("needle"):
            raise ValueError(
                f"the prompt of sample {self.id!r} has no part 'needle'; it has {sorted(self.prompt.spans) or 'none'}. "
                "Give the needle's character range in Prompt(text, spans)"
            )


def load_needles(path: str | os.PathLike[str]) -> list[Needle]:
    """Needles from a file of JSON lines with the fields ``needle``, ``question`` and ``real_needle`` (the answer).

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it has no line, or, with file and line number, if a line cannot be used.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no file {str(path)!r}; needles.jsonl is in https://github.com/nightdessert/Retrieval_Head "
            "(haystack_for_detect)"
        )
    needles: list[Needle] = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        try:
            fields = parse_object(line)
            needles.append(Needle(*(_text(fields, name) for name in ("question", "needle", "real_needle"))))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not needles:
        raise ValueError(f"{path} is empty; it must hold one JSON object a line")
    return needles


def _text(fields: Mapping[str, object], name: str) -> str:
    if name not in fields:
        raise ValueError(f"the field {name!r} is missing; there are {', '.join(map(repr, fields)) or 'none'}")
    value = fields[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the field {name!r} is {value!r}; it must be a string that is not empty")
    return value.strip()


def load_haystack(directory: str | os.PathLike[str]) -> str:
    """All ``*.txt`` files of a directory as one text, by name, an empty line between one and the next.

    Raises:
        FileNotFoundError: If the directory has no such file.
        ValueError: If the files hold nothing but white space, or one of them is not UTF-8.
    """
    paths = sorted(Path(directory).glob("*.txt"))
    if not paths:
        raise FileNotFoundError(f"there are no *.txt files in {str(directory)!r}; the haystack is made of them")
    texts: list[str] = []
    for path in paths:
        try:
            texts.append(path.read_text(encoding="utf-8").strip())
        except UnicodeDecodeError as error:
            raise ValueError(f"{path} is not a text in UTF-8 ({error})") from error
    haystack = "\n\n".join(text for text in texts if text)
    if not haystack:
        raise ValueError(f"the *.txt files in {str(directory)!r} are empty; the haystack is made of them")
    return haystack


def needle_samples(
    tokenizer: Any, haystack: str, needles: Iterable[Needle], lengths: Sequence[int], depths: Sequence[float]
) -> list[NeedleSample]:
    """One sample for every needle, length and depth, in the wording that Wu et al. use for chat models.

    The haystack is cut so that it and the needle have ``length`` tokens together (where the two meet, a tokenizer may
    make one more or less). The needle follows the last sentence that ends within the first ``depth`` of the cut
    haystack's tokens: at 0 it comes first, at 1 it comes last, even where the cut falls into a sentence. Lengths do not
    count question, wording and chat template; those of Wu et al. do, with 200 tokens, so their 5,000 is 4,800 here.

    The prompt's parts are ``needle`` (the sentence), ``question``, and ``answer`` where the sentence holds the needle's
    answer word for word.

    Args:
        tokenizer: A fast Hugging Face tokenizer, or what has one: a :class:`FocusModel` or its encoder.
        haystack: The text, at least as long as the longest length.
        needles: What is hidden, one at a time.
        lengths: Tokens of haystack and needle, swept.
        depths: Where the needle goes, 0 to 1, swept.

    Raises:
        ValueError: If there is nothing to sweep, a value repeats or is out of range, a needle does not fit into a
            length, or the haystack is too short for one.
    """
    hidden = _distinct("needles", list(needles))
    sizes = _distinct("lengths", [operator.index(length) for length in lengths])
    shares = _distinct("depths", [float(depth) for depth in depths])
    for depth in shares:
        if not 0 <= depth <= 1:
            raise ValueError(f"depth {depth:g} is not a share of the haystack; it must be from 0 (first) to 1 (last)")
    text = _Haystack(tokenizer, haystack)
    return [
        NeedleSample(prompt, needle.answer, length, depth, f"needle-{number}@{length}/{depth:g}")
        for number, needle in enumerate(hidden)
        for length in sizes
        for depth, prompt in zip(shares, text.prompts(needle, length, shares), strict=True)
    ]


def _distinct(name: str, values: list[Any]) -> list[Any]:
    """The values, if there are any and none repeats: samples are told apart by them."""
    if not values:
        raise ValueError(f"there are no {name}; give at least one")
    twice: list[Hashable] = [value for i, value in enumerate(values) if value in values[:i]]
    if twice:
        raise ValueError(f"{name} repeats {twice[0]!r}; give each once")
    return values


class _Haystack:
    """A text with the ends of its tokens and of its sentences."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if not getattr(self._tokenizer, "is_fast", False):
            raise ValueError(f"{type(self._tokenizer).__name__} is no fast tokenizer; offsets of tokens need one")
        self._text = text
        self._token_ends = self._ends_of_tokens(text)
        self._sentence_ends = [found.end() for found in _SENTENCE_END.finditer(text)]

    def _ends_of_tokens(self, text: str) -> list[int]:
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [end for _, end in encoding["offset_mapping"]]

    def prompts(self, needle: Needle, length: int, depths: Sequence[float]) -> list[Prompt]:
        """Prompts with a needle at each depth of so much haystack that both have ``length`` tokens."""
        taken, there = len(self._ends_of_tokens(" " + needle.text)), len(self._token_ends)
        kept = length - taken
        if kept < 1:
            raise ValueError(
                f"length {length} leaves no room for a haystack around a needle of {taken} tokens ({needle.text!r}); "
                f"it must be at least {taken + 1}"
            )
        if kept > there:
            raise ValueError(
                f"length {length} needs a haystack of {kept:,} tokens beside the needle's {taken}, and this one has "
                f"{there:,}; give more text, or lengths of at most {there + taken:,}"
            )
        cut = self._token_ends[kept - 1]
        return [_assemble(self._text[:cut], self._place(kept, depth), needle) for depth in depths]

    def _place(self, kept: int, depth: float) -> int:
        """The character before which the needle goes, among the first ``kept`` tokens."""
        before = kept if depth == 1 else int(kept * depth)
        limit = self._token_ends[before - 1] if before else 0
        if depth == 1:
            return limit
        sentences = bisect_right(self._sentence_ends, limit)
        return self._sentence_ends[sentences - 1] if sentences else 0


def _assemble(haystack: str, place: int, needle: Needle) -> Prompt:
    before, after = haystack[:place], haystack[place:]
    head = "<book>" + before + (" " if before and not before[-1].isspace() else "")
    tail = (" " if after and not after[0].isspace() else "") + after + "</book>\n"
    start, end = len(head), len(head) + len(needle.text)
    asked = "Based on the content of the book, Question: "
    question = end + len(tail) + len(asked)
    spans: dict[str, list[Span]] = {
        "needle": [(start, end)],
        "question": [(question, question + len(needle.question))],
    }
    if needle.answer_span is not None:
        first, last = needle.answer_span
        spans["answer"] = [(start + first, start + last)]
    return Prompt(f"{head}{needle.text}{tail}{asked}{needle.question}\nAnswer:", spans)


def synthetic_needles(
    num_documents: int | Sequence[int] = 20,
    gold_positions: Sequence[int] | None = None,
    n: int = 100,
    split: Split = "test",
    seed: int = 42,
) -> list[NeedleSample]:
    """Needles for the demo model, which knows only its own corpus: the long prompts of :func:`load_synthetic`.

    The part ``needle`` is the sentence of the gold document that holds the answer, or the whole text of the document
    where no single sentence does; the reference is the answer. The prompt's other parts stay.

    Args:
        num_documents: Documents in a prompt; a sequence is swept.
        gold_positions: Where the gold document stands, from 0, swept; from first to last in five steps by default.
        n: Samples for each number of documents.
        split: Of the corpus.
        seed: Of the corpus.

    Raises:
        ValueError: If an argument is out of its range.
    """
    counts = [num_documents] if isinstance(num_documents, int) else list(num_documents)
    samples = [
        load_synthetic(n, num_documents=count, gold_positions=gold_positions, split=split, seed=seed)
        for count in _distinct("num_documents", counts)
    ]
    return [_planted(sample) for some in samples for sample in some]


def _planted(sample: MultiDocSample) -> NeedleSample:
    if sample.gold_index is None:
        raise ValueError(f"the question {sample.question!r} has no gold document, so nothing could be copied from it")
    prompt, (answer,) = sample.prompt("long"), sample.answers
    text, last = sample.documents[sample.gold_index].text, len(sample.documents) - 1
    ((_, end),) = prompt.spans["relevant"]
    start = end - len(text)  # a document's part is its title and then its text
    first, past = _sentence_with(answer, text)
    planted = Prompt(prompt.text, {**prompt.spans, "needle": [(start + first, start + past)]})
    return NeedleSample(planted, answer, last + 1, sample.gold_index / max(1, last), sample.id)


def _sentence_with(answer: str, text: str) -> Span:
    """The range of the one sentence that holds the answer as whole words; of all the text where not just one does."""
    ends = [found.end() for found in _SENTENCE_END.finditer(text)]
    # The white space between two sentences belongs to neither.
    starts = [0, *(end + len(text[end:]) - len(text[end:].lstrip()) for end in ends[:-1])]
    word = re.compile(rf"\b{re.escape(answer)}\b")
    holding = [(start, end) for start, end in zip(starts, ends, strict=False) if word.search(text, start, end)]
    return holding[0] if len(holding) == 1 else (0, len(text))
