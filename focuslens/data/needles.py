"""Needle-in-a-haystack prompts: a sentence that answers a question, hidden in a long text about other subjects.

The task, the wording of the prompts and the files are those of "Retrieval Head Mechanistically Explains Long-Context
Factuality" (Wu et al., 2024, arXiv 2404.15574; code: nightdessert/Retrieval_Head). This module assembles each prompt
from its parts. The exact character range of the needle is therefore known. The authors' code instead searches the
prompt's tokens for a window that contains most of the needle's tokens.
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
from focuslens.prompts.prompt import Prompt, Span
from focuslens.prompts.sample import MultiDocSample

__all__ = ["Needle", "NeedleSample", "load_haystack", "load_needles", "needle_samples", "synthetic_needles"]

_SENTENCE_END = re.compile(r"[.!?][\"')\]]*(?=\s|$)")


@dataclass(frozen=True)
class Needle:
    """A sentence to hide in a haystack, and the question that it answers.

    Args:
        question: The question that the sentence answers.
        text: The sentence, exactly as it is inserted into the haystack.
        answer: The reference answer that responses are compared with, usually a part of the sentence.

    Raises:
        ValueError: If the question, the sentence or the answer is empty.
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
        """Character range of ``answer`` in ``text``, ignoring case; ``None`` if ``answer`` is not in ``text``."""
        match = re.search(re.escape(self.answer), self.text, re.IGNORECASE)
        return match.span() if match else None


@dataclass(frozen=True)
class NeedleSample:
    """One prompt of a needle-in-a-haystack test.

    Args:
        prompt: The prompt. It must have the span ``needle``, the text that contains the answer. The other spans of the
            prompt, such as ``question`` and ``answer``, are optional.
        reference: The reference answer that the response is compared with.
        length: Length of the context: the number of tokens in the haystack and the needle or, for a synthetic prompt,
            the number of documents.
        depth: Requested depth of the needle in the context, from 0 (start) to 1 (end).
        id: Unique name of the sample.

    Raises:
        ValueError: If the prompt does not have the span ``needle``.
    """

    prompt: Prompt
    reference: str
    length: int
    depth: float
    id: str

    def __post_init__(self) -> None:
        if not self.prompt.spans.get("needle"):
            raise ValueError(
                f"the prompt of sample {self.id!r} has no span 'needle'; it has {sorted(self.prompt.spans) or 'none'}. "
                "Give the needle's character range in Prompt(text, spans)"
            )


def load_needles(path: str | os.PathLike[str]) -> list[Needle]:
    """Read needles from a JSON Lines file with the fields ``needle``, ``question`` and ``real_needle`` (the answer).

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is empty, or if a line is invalid. For an invalid line, the message names the file and
            the line number.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(
            f"there is no file {str(path)!r}; needles.jsonl is in https://github.com/nightdessert/Retrieval_Head "
            "(haystack_for_detect)"
        )
    needles: list[Needle] = []
    for number, line in enumerate(Path(path).read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            fields = parse_object(line)
            needles.append(Needle(*(_text(fields, name) for name in ("question", "needle", "real_needle"))))
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from error
    if not needles:
        raise ValueError(f"{path} is empty; it must hold one JSON object per line")
    return needles


def _text(fields: Mapping[str, object], name: str) -> str:
    if name not in fields:
        raise ValueError(f"the field {name!r} is missing; there are {', '.join(map(repr, fields)) or 'none'}")
    value = fields[name]
    if not isinstance(value, str) or not value.strip():
        raise ValueError(f"the field {name!r} is {value!r}; it must be a string that is not empty")
    return value.strip()


def load_haystack(directory: str | os.PathLike[str]) -> str:
    """Join the ``*.txt`` files of a directory, sorted by file name, into one text. Blank lines separate the files.

    Raises:
        FileNotFoundError: If the directory does not contain any ``*.txt`` files.
        ValueError: If all files are empty, or if a file is not valid UTF-8.
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
    """Create one sample per combination of needle, length and depth.

    The wording of the prompts is that of Wu et al. (2024) for chat models. The haystack is truncated so that haystack
    and needle together have ``length`` tokens. At each boundary between haystack and needle, the tokenizer may produce
    one token more or less. A length does not include the question, the instructions and the chat template. Wu et al.
    reserve 200 tokens for these parts of the prompt. A length of 5,000 in their paper therefore corresponds to 4,800
    here.

    A depth is a fraction of the truncated haystack's tokens. The needle is inserted after the last sentence that ends
    within this fraction. At depth 0, the needle is before the haystack. At depth 1, the needle is after the haystack,
    even if the haystack is truncated inside a sentence.

    Each prompt has the spans ``needle`` (the sentence) and ``question``. If the sentence contains the needle's answer
    word for word (ignoring case), the prompt also has the span ``answer``.

    Args:
        tokenizer: Fast Hugging Face tokenizer, or an object that has a fast tokenizer as its attribute ``tokenizer``,
            such as a :class:`FocusModel` or its encoder.
        haystack: The text in which the needles are hidden. It must be long enough for all lengths.
        needles: The needles. Each sample contains one needle.
        lengths: Lengths of the context: numbers of tokens in haystack and needle together.
        depths: Depths of the needle, from 0 (start) to 1 (end).

    Raises:
        ValueError: If the tokenizer is not fast, an argument is empty or repeats a value, a depth is out of range, a
            needle does not fit into a length, or the haystack is too short for a length.
    """
    distinct_needles = _distinct("needles", list(needles))
    distinct_lengths = _distinct("lengths", [operator.index(length) for length in lengths])
    distinct_depths = _distinct("depths", [float(depth) for depth in depths])
    for depth in distinct_depths:
        if not 0 <= depth <= 1:
            raise ValueError(f"depth {depth:g} is not a share of the haystack; it must be from 0 (first) to 1 (last)")
    text = _Haystack(tokenizer, haystack)
    return [
        NeedleSample(prompt, needle.answer, length, depth, f"needle-{number}@{length}/{depth:g}")
        for number, needle in enumerate(distinct_needles)
        for length in distinct_lengths
        for depth, prompt in zip(distinct_depths, text.prompts(needle, length, distinct_depths), strict=True)
    ]


def _distinct(name: str, values: list[Any]) -> list[Any]:
    """Check that a list is not empty and has no duplicates, and return the list.

    Duplicates would make sample ids ambiguous.
    """
    if not values:
        raise ValueError(f"there are no {name}; give at least one")
    repeated: list[Hashable] = [value for i, value in enumerate(values) if value in values[:i]]
    if repeated:
        raise ValueError(f"{name} repeats {repeated[0]!r}; give each once")
    return values


class _Haystack:
    """Text of a haystack, with the character offsets at which its tokens and its sentences end."""

    def __init__(self, tokenizer: Any, text: str) -> None:
        self._tokenizer = getattr(tokenizer, "tokenizer", tokenizer)
        if not getattr(self._tokenizer, "is_fast", False):
            raise ValueError(f"{type(self._tokenizer).__name__} is not a fast tokenizer; offsets of tokens need one")
        self._text = text
        self._token_ends = self._ends_of_tokens(text)
        self._sentence_ends = [match.end() for match in _SENTENCE_END.finditer(text)]

    def _ends_of_tokens(self, text: str) -> list[int]:
        encoding = self._tokenizer(text, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        return [end for _, end in encoding["offset_mapping"]]

    def prompts(self, needle: Needle, length: int, depths: Sequence[float]) -> list[Prompt]:
        """One prompt per depth. Haystack and needle together have ``length`` tokens."""
        n_needle, n_available = len(self._ends_of_tokens(" " + needle.text)), len(self._token_ends)
        n_haystack = length - n_needle
        if n_haystack < 1:
            raise ValueError(
                f"length {length} leaves no room for a haystack around a needle of {n_needle} tokens "
                f"({needle.text!r}); it must be at least {n_needle + 1}"
            )
        if n_haystack > n_available:
            raise ValueError(
                f"length {length} needs a haystack of {n_haystack:,} tokens in addition to the needle's {n_needle}; "
                f"this haystack has {n_available:,}; give more text, or lengths of at most {n_available + n_needle:,}"
            )
        cut = self._token_ends[n_haystack - 1]
        return [_assemble(self._text[:cut], self._place(n_haystack, depth), needle) for depth in depths]

    def _place(self, n_tokens: int, depth: float) -> int:
        """Character offset at which to insert the needle into the first ``n_tokens`` tokens of the text."""
        before = n_tokens if depth == 1 else int(n_tokens * depth)
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
    lead = "Based on the content of the book, Question: "
    question = end + len(tail) + len(lead)
    spans: dict[str, list[Span]] = {
        "needle": [(start, end)],
        "question": [(question, question + len(needle.question))],
    }
    if needle.answer_span is not None:
        first, last = needle.answer_span
        spans["answer"] = [(start + first, start + last)]
    return Prompt(f"{head}{needle.text}{tail}{lead}{needle.question}\nAnswer:", spans)


def synthetic_needles(
    num_documents: int | Sequence[int] = 20,
    gold_positions: Sequence[int] | None = None,
    n: int = 100,
    split: Split = "test",
    seed: int = 42,
) -> list[NeedleSample]:
    """Create needle samples from the synthetic corpus, for the demo model, which is trained only on this corpus.

    The prompts are the long prompts of the samples that :func:`load_synthetic` returns. The span ``needle`` is added to
    each prompt. This span is the gold document's sentence with the answer. If no sentence or more than one
    sentence contains the answer, ``needle`` is the whole text of the gold document. The reference is the answer.

    Args:
        num_documents: Number of documents per prompt, or a sequence of such numbers.
        gold_positions: Positions of the gold document, counted from 0. The default is five positions, from first to
            last.
        n: Number of samples per number of documents.
        split: Split of the corpus that the samples come from.
        seed: Random seed of the corpus.

    Raises:
        ValueError: If an argument is out of range.
    """
    counts = [num_documents] if isinstance(num_documents, int) else list(num_documents)
    samples = [
        load_synthetic(n, num_documents=count, gold_positions=gold_positions, split=split, seed=seed)
        for count in _distinct("num_documents", counts)
    ]
    return [_planted(sample) for group in samples for sample in group]


def _planted(sample: MultiDocSample) -> NeedleSample:
    if sample.gold_index is None:
        raise ValueError(f"the question {sample.question!r} has no gold document, so nothing could be copied from it")
    prompt, (answer,) = sample.prompt("long"), sample.answers
    text, last = sample.documents[sample.gold_index].text, len(sample.documents) - 1
    ((_, end),) = prompt.spans["relevant"]
    start = end - len(text)  # the span of a document ends with the document's text
    first, past = _sentence_with(answer, text)
    planted = Prompt(prompt.text, {**prompt.spans, "needle": [(start + first, start + past)]}, prompt.conversation)
    return NeedleSample(planted, answer, last + 1, sample.gold_index / max(1, last), sample.id)


def _sentence_with(answer: str, text: str) -> Span:
    """Character range of the sentence that contains the answer as whole words.

    If no sentence or more than one sentence contains the answer, the range is the whole text.
    """
    ends = [match.end() for match in _SENTENCE_END.finditer(text)]
    # A sentence starts after the white space that follows the previous sentence.
    starts = [0, *(end + len(text[end:]) - len(text[end:].lstrip()) for end in ends[:-1])]
    word = re.compile(rf"\b{re.escape(answer)}\b")
    holding = [(start, end) for start, end in zip(starts, ends, strict=False) if word.search(text, start, end)]
    return holding[0] if len(holding) == 1 else (0, len(text))
