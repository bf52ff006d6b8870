"""Sequences of samples with views: slices, splits by question, and draws of one sample per question."""

from __future__ import annotations

import math
import random
from abc import abstractmethod
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, TypeVar, cast, overload

from focuslens.prompts.sample import MultiDocSample

__all__ = ["KnownPart", "SampleViews", "checked_parts", "counted_parts", "listed_parts"]

KnownPart: TypeAlias = Literal["answers", "relevant"]
"""Part that a sample of a user's table may lack: accepted answers, or a relevant document."""

_KNOWN_PARTS = {"answers": "accepted answers", "relevant": "a relevant document"}

if TYPE_CHECKING:
    _Views = TypeVar("_Views", bound="SampleViews")
else:  # checks at run time would resolve the bound anew in every call
    _Views = TypeVar("_Views")


class SampleViews(Sequence[MultiDocSample]):
    """Samples that are read on access, by their numbers.

    Args:
        picks: Numbers of the samples, in order.
        selection: The slices, splits and draws that produced this view, in order.
    """

    def __init__(self, picks: Sequence[int], selection: tuple[Mapping[str, Any], ...] = ()) -> None:
        self._picks, self._selection = picks, selection

    @abstractmethod
    def _read(self, pick: int) -> MultiDocSample:
        """The sample of a number."""

    @abstractmethod
    def _question(self, pick: int) -> int:
        """Number of the question of a sample. Samples of one question have the same number."""

    @abstractmethod
    def _row(self, pick: int) -> Mapping[str, Any]:
        """Row of the source that a sample was loaded from."""

    @abstractmethod
    def _place(self, pick: int) -> str:
        """Place of the row of a sample in messages."""

    @property
    @abstractmethod
    def path(self) -> Path | None:
        """Path of the file that the samples are from; ``None`` for samples of no file."""

    def _slot(self, pick: int) -> int:
        """Number of a sample among those of its question. Draws are balanced over these numbers."""
        return 0

    @abstractmethod
    def _with(self: _Views, picks: Sequence[int], selection: tuple[Mapping[str, Any], ...]) -> _Views:
        """Another view of the same samples."""

    def __len__(self) -> int:
        return len(self._picks)

    @overload
    def __getitem__(self, index: int) -> MultiDocSample: ...
    @overload
    def __getitem__(self: _Views, index: slice) -> _Views: ...
    def __getitem__(self: _Views, index: int | slice) -> MultiDocSample | _Views:
        if isinstance(index, slice):
            start, stop, by = index.indices(len(self))
            # For a backward slice that ends with sample 0, ``indices`` returns the stop -1. In a slice that is rebuilt
            # from the description, -1 would mean the last sample.
            step = {"step": "slice", "start": start, "stop": None if stop < 0 else stop, "by": by}
            return self._view(self._picks[index], step)
        try:
            pick = self._picks[index]
        except IndexError:
            raise IndexError(f"there is no sample {index}: there are {len(self)}, from 0") from None
        return self._read(pick)

    def __iter__(self) -> Iterator[MultiDocSample]:
        return map(self._read, self._picks)

    def row(self, index: int) -> Mapping[str, Any]:
        """Row of the file that a sample was loaded from, with all its columns."""
        return self._row(self._picks[index])

    def where(self, index: int) -> str:
        """Place of a sample's row in messages, such as ``my.csv, line 3``."""
        return self._place(self._picks[index])

    @property
    def questions(self) -> int:
        """Number of distinct questions in this view."""
        return len(self._by_question())

    def split(self: _Views, fraction: float = 0.5, seed: int = 42) -> tuple[_Views, _Views]:
        """Split the samples by question into a training part and a test part.

        All samples of a question are in the same part. The method is that of "Focus Directions" (arXiv 2503.23306).
        ``random.Random(seed)`` shuffles the ``n`` questions, and the first ``floor(fraction * n)`` questions form the
        training part. Both parts keep the shuffled order. On a whole file of the paper, the default arguments give the
        paper's questions in the paper's order.

        Raises:
            ValueError: If the training or the test part would be empty.
        """
        groups = list(self._by_question().values())
        random.Random(seed).shuffle(groups)
        # Adding 1e-9 compensates for floating-point error: 0.29 * 100 is 28.999999999999996.
        cut = math.floor(len(groups) * fraction + 1e-9) if 0 < fraction < 1 else 0
        if not 0 < cut < len(groups):
            raise ValueError(
                f"fraction {fraction} of {len(groups)} question(s) leaves one part empty; "
                "it must lie between 0 and 1 and give each part at least one question"
            )
        step = {"step": "split", "fraction": fraction, "seed": seed}
        train, test = ([pick for group in side for pick in group] for side in (groups[:cut], groups[cut:]))
        return self._view(train, {**step, "side": 0}), self._view(test, {**step, "side": 1})

    def sample(self: _Views, n: int, seed: int = 42, *, per_question: bool = True) -> _Views:
        """Draw one sample from each of ``n`` random questions, balanced over the gold positions.

        With the same seed, the samples of a smaller draw are the first samples of a larger draw.

        Args:
            n: Number of samples.
            seed: Random seed of the draw.
            per_question: Whether a question gives one sample. Otherwise, it gives all its samples, one after the other,
                until there are ``n``.

        Raises:
            ValueError: If ``n`` is less than 1 or greater than the number of questions, or of samples if a question
                gives all.
        """
        groups = list(self._by_question().values())
        if not per_question:
            if not 1 <= n <= len(self):
                raise ValueError(f"n is {n}; it must be 1 to {len(self)}, the number of samples")
            random.Random(seed).shuffle(groups)
            step = {"step": "sample", "n": n, "seed": seed, "per_question": False}
            return self._view([pick for group in groups for pick in group][:n], step)
        if not 1 <= n <= len(groups):
            raise ValueError(f"n is {n}; it must be 1 to {len(groups)}, the number of questions")
        rng = random.Random(seed)
        rng.shuffle(groups)
        used: Counter[int] = Counter()
        picks: list[int] = []
        for group in groups[:n]:
            # Pick the question's sample whose gold position has been used least so far. Ties are broken at random.
            pick = min(group, key=lambda pick: (used[self._slot(pick)], rng.random()))
            used[self._slot(pick)] += 1
            picks.append(pick)
        return self._view(picks, {"step": "sample", "n": n, "seed": seed})

    def in_order(self: _Views) -> _Views:
        """The samples in the order of the source."""
        return self._view(sorted(self._picks), {"step": "order"})

    def having(self: _Views, *parts: KnownPart) -> _Views:
        """The samples that have all of these parts. An evaluation needs ``answers``, split-softmax ``relevant``.

        Raises:
            ValueError: If a part is unknown.
        """
        checked_parts(parts)
        picks = [pick for pick in self._picks if _has(self._read(pick), parts)]
        return self._view(picks, {"step": "having", "parts": list(parts)})

    def _view(self: _Views, picks: Sequence[int], step: Mapping[str, Any]) -> _Views:
        return self._with(picks, (*self._selection, step))

    def _by_question(self) -> dict[int, list[int]]:
        groups: dict[int, list[int]] = {}
        for pick in self._picks:
            groups.setdefault(self._question(pick), []).append(pick)
        return groups


def checked_parts(parts: Any) -> None:
    """Raise ``ValueError`` if these are not names of parts that samples can lack."""
    if not isinstance(parts, tuple | list):
        raise ValueError(f"the parts that samples must have are {parts!r}; they must be a list of names")
    for part in cast("Sequence[Any]", parts):
        if part not in list(_KNOWN_PARTS):
            raise ValueError(f"{part!r} is no part that samples lack; the parts are {', '.join(_KNOWN_PARTS)}")


def listed_parts(parts: Sequence[KnownPart]) -> str:
    """Parts of samples for a message."""
    return " or ".join(_KNOWN_PARTS[part] for part in parts)


def counted_parts(samples: Sequence[MultiDocSample], parts: Sequence[KnownPart]) -> str:
    """Parts of samples for a message, with the number of samples that have each if there are several parts."""
    if len(parts) == 1:
        return _KNOWN_PARTS[parts[0]]
    counts = [(sum(_has(sample, [part]) for sample in samples), _KNOWN_PARTS[part]) for part in parts]
    return "both " + " and ".join(f"{name} ({n} have)" for n, name in counts)


def _has(sample: MultiDocSample, parts: Sequence[KnownPart]) -> bool:
    return ("answers" not in parts or bool(sample.answers)) and ("relevant" not in parts or bool(sample.gold_indices))
