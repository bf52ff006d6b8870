"""Distractors for a file that has none: gold passages of other questions."""

from __future__ import annotations

import random
from array import array
from collections.abc import Callable, Iterator
from functools import lru_cache

from focuslens.data._records import Record
from focuslens.prompts.answers import normalize_answer

__all__ = ["draw_distractors"]

# Normalised, about 1 kB each: all of nq-open-oracle fits, and a file of any length stays at a few megabytes.
_CACHED_RECORDS = 4096


def draw_distractors(
    read: Callable[[int], Record], lines: int, questions: int, count: int, seed: int
) -> Iterator[array[int]]:
    """For each of the first ``questions`` lines, the numbers of ``count`` other lines whose gold passages it can have.

    The draw is uniform and depends on the seed and on the question's line, not on how many questions are drawn for.
    A passage that contains an accepted answer of the question (title included, both normalised) is not drawn, nor are
    the question's own passage and two passages that are the same. Only where that leaves too few (one answer in
    NQ-Open is "S", which every passage contains) may the answer be a part of a word in the passages that make up the
    number; a whole word it never is. An array that is shorter than ``count`` holds all the passages there are.
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
    """A uniform permutation of ``range(size)``, made only as far as it is asked for (Fisher and Yates)."""
    moved: dict[int, int] = {}
    for i in range(size):
        j = rng.randrange(i, size)
        yield moved.get(j, j)
        moved[j] = moved.get(i, i)
