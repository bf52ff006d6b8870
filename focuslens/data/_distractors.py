"""Choice of distractors among passages: at random, or by their similarity to the question."""

from __future__ import annotations

import random
from array import array
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache, partial
from typing import Literal, TypeAlias, get_args

from focuslens.data._bm25 import PassageIndex
from focuslens.prompts.answers import normalize_answer
from focuslens.prompts.sample import Document

__all__ = ["Draw", "Passages", "Query", "checked_choice", "draw_at_random", "draw_similar"]

DistractorChoice: TypeAlias = Literal["random", "bm25"]
"""Choice of distractors from an oracle file: uniformly at random, or the passages most similar to the question."""

# The cache takes about 4 MB at most, because a normalised passage takes about 1 kB. All of nq-open-oracle fit.
_CACHED_PASSAGES = 4096

_GRAM = 5
"""Number of words in a word n-gram."""


def checked_choice(value: DistractorChoice) -> DistractorChoice:
    """The argument ``distractors``. Any other value raises ``ValueError``."""
    if value not in get_args(DistractorChoice):
        raise ValueError(f"distractors is {value!r}; it must be one of {', '.join(get_args(DistractorChoice))}")
    return value


@dataclass(frozen=True)
class Query:
    """A question, its accepted answers, and the passages that answer it.

    Attributes:
        question: The question.
        answers: The accepted answers.
        gold: Texts of the gold passages, with their titles.
        lines: Indices of passages that are gold passages of the question.
    """

    question: str
    answers: tuple[str, ...]
    gold: tuple[str, ...]
    lines: frozenset[int] = frozenset()


@dataclass(frozen=True)
class Draw:
    """Distractors of one question.

    Attributes:
        passages: Indices of the distractors.
        with_answer: Number of passages that precede the last distractor in the order of the choice, but were left out
            because they contain an accepted answer.
        near_duplicates: Number of such passages that were left out because they repeat a gold passage.
    """

    passages: array[int]
    with_answer: int
    near_duplicates: int


class Passages:
    """Passages that can serve as distractors.

    Args:
        read: Function that returns a passage, given its index.
        count: Number of passages.
    """

    def __init__(self, read: Callable[[int], Document], count: int) -> None:
        self._read, self.count = read, count
        self.normalised: Callable[[int], str] = lru_cache(maxsize=_CACHED_PASSAGES)(self._normalised)

    def __iter__(self) -> Iterator[str]:
        """Text of each passage, with its title."""
        return (text_of(self._read(index)) for index in range(self.count))

    def _normalised(self, index: int) -> str:
        return normalised_text(text_of(self._read(index)))


def text_of(document: Document) -> str:
    """Title and text of a passage."""
    return f"{document.title} {document.text}"


def normalised_text(text: str) -> str:
    """Normalised text between two spaces, so that every word of the text is between spaces."""
    return f" {normalize_answer(text)} "


def draw_at_random(passages: Passages, queries: Iterable[Query], count: int, seed: int) -> Iterator[Draw]:
    """Draw ``count`` distractors per question, uniformly at random.

    The draw depends on the seed and on the place of the question among the questions, but not on the number of
    questions. :func:`_choose` lists the passages that are left out. A gold passage is left out with its duplicates.

    Args:
        passages: The passages.
        queries: The questions.
        count: Number of distractors per question.
        seed: Random seed.
    """
    for place, query in enumerate(queries):
        gold = {normalised_text(text) for text in query.gold}
        order = partial(_permutation, passages.count, f"{seed}/{place}")
        yield _choose(passages, query, order, gold.__contains__, count)


def draw_similar(passages: Passages, queries: Iterable[Query], count: int) -> Iterator[Draw]:
    """Choose the ``count`` passages that are most similar to each question according to BM25, best first.

    :func:`_choose` lists the passages that are left out. A gold passage is left out with its near-duplicates: passages
    that share more than half of the word 5-grams of the shorter one of the two. The 2,655 gold passages of
    ``nq-open-oracle`` set this limit. All pairs above it are excerpts or versions of the same paragraph, also where one
    is much shorter than the other. Below it, from a half down to a quarter, pairs are different passages with the same
    wording, such as two seasons of a series. These are good distractors. One paragraph, at 0.4, is the exception.

    Args:
        passages: The passages.
        queries: The questions.
        count: Number of distractors per question.
    """
    index = PassageIndex(passages)
    for query in queries:
        order = partial(iter, index.ranking(query.question).tolist())
        gold = [_grams(normalised_text(text)) for text in query.gold]
        yield _choose(passages, query, order, partial(_is_near, gold), count)


def _choose(
    passages: Passages,
    query: Query,
    order: Callable[[], Iterable[int]],
    is_gold: Callable[[str], bool],
    count: int,
) -> Draw:
    """Choose the first ``count`` passages in an order that are usable.

    The choice skips gold passages, duplicate passages, and passages that contain an accepted answer to the question.
    For these comparisons, a passage includes its title, and passages and answers are normalised.

    Some answers exclude too many passages. For example, one answer in NQ-Open is "S", a letter that every passage
    contains. In such a case, a second round also accepts passages that contain an answer only as part of a longer
    word. If there are still fewer than ``count``, there are no further usable passages for the question.
    """
    answers = [normalize_answer(answer) for answer in query.answers]
    taken: dict[str, int] = {}
    left_out: Counter[str] = Counter()
    for forbidden in (answers, [f" {answer} " for answer in answers]):
        if len(taken) >= count:
            break
        left_out.clear()  # the second round meets the passages of the first again
        for index in order():
            passage = passages.normalised(index)
            if index in query.lines or passage in taken:
                continue
            if is_gold(passage):
                left_out["gold"] += 1
            elif any(part in passage for part in forbidden):
                left_out["answer"] += 1
            else:
                taken[passage] = index
                if len(taken) == count:
                    break
    return Draw(array("I", taken.values()), left_out["answer"], left_out["gold"])


def _is_near(gold: Sequence[set[tuple[str, ...]]], passage: str) -> bool:
    """Whether a normalised passage is a near-duplicate of a gold passage, given the n-grams of all gold passages."""
    grams = _grams(passage)
    return any(2 * len(grams & other) > min(len(grams), len(other)) for other in gold)


def _grams(text: str) -> set[tuple[str, ...]]:
    """Word 5-grams of a text. A text of fewer words is one n-gram."""
    words = text.split()
    return set(zip(*(words[i:] for i in range(_GRAM)), strict=False)) or {tuple(words)}


def _permutation(size: int, seed: str) -> Iterator[int]:
    """Random permutation of ``range(size)``, computed lazily with the Fisher-Yates shuffle."""
    rng, moved = random.Random(seed), dict[int, int]()
    for i in range(size):
        j = rng.randrange(i, size)
        yield moved.get(j, j)
        moved[j] = moved.get(i, i)
