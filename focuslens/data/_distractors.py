"""Distractors for the questions in an oracle file, drawn from the gold passages of the file's other questions."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator
from functools import lru_cache

from focuslens.data._records import Record
from focuslens.prompts.answers import normalize_answer

__all__ = ["draw_distractors"]

# The cache takes about 4 MB at most, because a normalised record takes about 1 kB. All records of nq-open-oracle fit.
_CACHED_RECORDS = 4096


def draw_distractors(
    read: Callable[[int], Record], lines: int, questions: int, count: int, seed: int
) -> Iterator[array[int]]:
    """Draw ``count`` distractors per question, and yield the line numbers of the distractors, one array per question.

    The distractor on a line is the line's gold passage. Lines are counted from 0. The draw is uniform and depends on
    the seed and on the question's line number, but not on the number of questions. The draw skips the question's gold
    passage, duplicate passages, and passages that contain an accepted answer to the question. For these comparisons,
    a passage includes its title, and passages and answers are normalised.

    Some answers exclude too many passages. For example, one answer in NQ-Open is "S", a letter that every passage
    contains. In such a case, a second round also accepts passages that contain an answer only as part of a longer
    word. If an array is still shorter than ``count``, the file has no further usable passages for the question.

    Args:
        read: Function that returns the record on a line, given the line number.
        lines: Number of lines in the file.
        questions: Number of questions to draw distractors for, starting at the first line.
        count: Number of distractors per question.
        seed: Random seed.
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
    """Random permutation of ``range(size)``, computed lazily with the Fisher-Yates shuffle."""
    moved: dict[int, int] = {}
    for i in range(size):
        j = rng.randrange(i, size)
        yield moved.get(j, j)
        moved[j] = moved.get(i, i)
