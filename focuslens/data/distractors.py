"""Replacement of the distractors of samples by the passages that are most similar to the questions."""

from __future__ import annotations

import logging
import random
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace

from focuslens.data._distractors import Draw, Passages, Query, draw_similar, text_of
from focuslens.prompts.answers import list_samples, require_comparable_answers
from focuslens.prompts.sample import Document, MultiDocSample
from focuslens.util.checks import checked_integer, items_of
from focuslens.util.progress import track

__all__ = ["with_distractors"]

_LOG = logging.getLogger(__name__)


def with_distractors(
    samples: Iterable[MultiDocSample], passages: Iterable[Document], n: int, seed: int = 42
) -> list[MultiDocSample]:
    """Replace the distractors of samples by the ``n`` passages that are most similar to the question.

    The similarity is the BM25 score, and the same passages are left out as in :func:`load_multidoc` with
    ``distractors="bm25"``: passages that contain an accepted answer, near-duplicates of the gold document, and
    duplicates of other distractors. The gold documents keep their positions. All samples with the same ``question_id``
    have the same distractors: those of the first sample's question, without the accepted answers and the gold documents
    of any of these samples. The order of the distractors depends on the seed, the ``question_id`` and the gold
    position. Without a gold document, all documents of a sample are replaced.

    The logger ``focuslens`` reports at level INFO how many passages were left out.

    Args:
        samples: The samples.
        passages: Passages that can be distractors. Passages with equal scores are taken in this order.
        n: Number of distractors per sample. A sample with a gold document then has ``n + 1`` documents.
        seed: Random seed for the order of the distractors.

    Returns:
        The samples with new documents, in the given order.

    Raises:
        TypeError: If an argument has another type, for example passages that are strings.
        ValueError: If ``n`` is less than 1, if a gold document is not among the first ``n + 1`` documents, if an
            accepted answer normalises to the empty string, or if there are fewer than ``n`` usable passages for a
            question.
    """
    chosen, n, seed = list_samples(samples), checked_integer(n, "n"), checked_integer(seed, "seed")
    candidates = items_of(passages, Document, "passages", 'fl.Document(title="Ferries", text="...")')
    if n < 1:
        raise ValueError(f"n is {n}; it must be at least 1 distractor per sample")
    require_comparable_answers(chosen)
    _require_places(chosen, n)
    distractors = _by_question(chosen, candidates, n)
    return [_replaced(sample, [candidates[i] for i in distractors[sample.question_id]], seed) for sample in chosen]


def _require_places(samples: Sequence[MultiDocSample], n: int) -> None:
    for sample in samples:
        place = max(sample.gold_indices, default=0)
        least = place + 1 - len(sample.gold_indices)
        if least > n:
            raise ValueError(
                f"the gold document of sample {sample.id!r} is at {place}, but with n={n} there are "
                f"{n + len(sample.gold_indices)} documents, from 0; give n={least} or more"
            )


def _by_question(samples: Sequence[MultiDocSample], candidates: Sequence[Document], n: int) -> dict[str, Sequence[int]]:
    """Indices of the distractors of each question, by ``question_id``."""
    groups: dict[str, list[MultiDocSample]] = {}
    for sample in samples:
        groups.setdefault(sample.question_id, []).append(sample)
    names = list(groups)
    passages = Passages(candidates.__getitem__, len(candidates))
    tracked = track(names, "choosing distractors", unit="question")
    draws = list(_checked(draw_similar(passages, (_query(groups[name]) for name in tracked), n), names, n))
    _LOG.info(
        "left out as distractors of %d questions: %d passages with an accepted answer, %d gold passages or "
        "near-duplicates",
        len(draws),
        sum(draw.with_answer for draw in draws),
        sum(draw.near_duplicates for draw in draws),
    )
    return {name: draw.passages for name, draw in zip(names, draws, strict=True)}


def _query(samples: Sequence[MultiDocSample]) -> Query:
    answers = tuple(dict.fromkeys(answer for sample in samples for answer in sample.answers))
    gold = [sample.documents[index] for sample in samples for index in sample.gold_indices]
    return Query(samples[0].question, answers, tuple(dict.fromkeys(map(text_of, gold))))


def _checked(draws: Iterable[Draw], names: Sequence[str], n: int) -> Iterator[Draw]:
    for draw, name in zip(draws, names, strict=True):
        if len(draw.passages) < n:
            raise ValueError(
                f"there are {len(draw.passages)} distractors for question {name!r}, but n is {n}: {draw.with_answer} "
                f"other passages contain an accepted answer, and {draw.near_duplicates} repeat the gold document; give "
                "more passages, or a smaller n"
            )
        yield draw


def _replaced(sample: MultiDocSample, distractors: list[Document], seed: int) -> MultiDocSample:
    # The key is that of ``load_multidoc``. The same passages therefore give the same order.
    key = sample.name or "+".join(map(str, sample.gold_indices)) or None
    random.Random(f"{seed}/{sample.question_id}/{key}").shuffle(distractors)
    for place in sorted(sample.gold_indices):
        distractors.insert(place, sample.documents[place])
    return replace(sample, documents=tuple(distractors))
