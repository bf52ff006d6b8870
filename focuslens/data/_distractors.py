"""Choice of distractors for a file that has only gold passages: the gold passages of other questions in the file."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator
from functools import lru_cache

from focuslens.data._records import Record
from focuslens.prompts.answers import normalize_answer

__all__ = ["draw_distractors"]

# A normalised record takes about 1 kB. All of nq-open-oracle fits into the cache, which takes a few megabytes at most.
_CACHED_RECORDS = 4096


def draw_distractors(
    read: Callable[[int], Record], lines: int, questions: int, count: int, seed: int
) -> Iterator[array[int]]:
    """Draw ``count`` distractors for each question, as the numbers of the lines that have them as gold passages.

    The draw is uniform. It depends on the seed and on the question's line, not on the number of questions. It skips
    the question's own passage, repeated passages, and passages that contain an accepted answer of the question. For
    this comparison, titles belong to passages, and passages and answers are normalised.

    Some answers leave too few passages: one answer in NQ-Open is "S", a letter that every passage contains. A second
    round then adds passages in which the answer is only a part of a word, never a whole word. If an array is still
    shorter than ``count``, the file has no more usable passages for that question.

    Args:
        read: Function that reads the record on a line, given the line's number.
        lines: Number of lines in the file.
        questions: Number of questions that need distractors, from the first line on.
        count: Number of distractors per question.
        seed: Seed of the draw.
    """

    @lru_cache(maxsize=_CACHED_RECORDS)
    def normalised(line: int) -> tuple[str, tuple[str, ...]]:
        record = read(line)
        passage = normalize_answer(f"{record.gold.title} {record.gold.text}")
        return f" {passage} ", tuple(map(normalize_answer, record.answers))

    for question in range(questions):
        own, answers = normalised(question)
        taken = {own: question}
        for forbidden in (answers, [f" {answer} " for answer in answers]):
            for line in _permutation(lines, random.Random(f"{seed}/{question}")):
                if len(taken) > count:
                    break
                passage, _ = normalised(line)
                if not any(part in passage for part in forbidden):
                    taken.setdefault(passage, line)
        yield array("I", list(taken.values())[1:])


def _permutation(size: int, rng: random.Random) -> Iterator[int]:
    """A uniform permutation of ``range(size)``, computed lazily (Fisher and Yates)."""
    moved: dict[int, int] = {}
    for i in range(size):
        j = rng.randrange(i, size)
        yield moved.get(j, j)
        moved[j] = moved.get(i, i)
