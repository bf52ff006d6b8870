"""How sure a figure is: bootstrap intervals, and an exact test between two settings on the same samples."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Interval", "McNemar", "bootstrap_mean", "mcnemar_exact", "percentile_interval", "resampled_means"]

# Draws held at once: 8 bytes each for the index and for what it picks.
_CHUNK = 500_000


class Interval(float):
    """A mean with its confidence interval: the number itself, so it compares and computes as one.

    Prints as ``0.590 [0.560, 0.620]``. Two intervals are equal if all four numbers are.

    Attributes:
        low: Lower end.
        high: Upper end.
        confidence: Between 0 and 1.
    """

    low: float
    high: float
    confidence: float

    def __new__(cls, mean: float, low: float, high: float, confidence: float) -> Interval:
        """Keep the ends with the mean."""
        interval = super().__new__(cls, mean)
        interval.low, interval.high, interval.confidence = low, high, confidence
        return interval

    def __getnewargs__(self) -> tuple[float, float, float, float]:  # pyright: ignore[reportIncompatibleMethodOverride]
        return (float(self), self.low, self.high, self.confidence)

    @property
    def mean(self) -> float:
        """The mean as a plain number."""
        return float(self)

    def __eq__(self, other: object) -> bool:
        if isinstance(other, Interval):
            return self.to_dict() == other.to_dict()
        return super().__eq__(other)

    def __ne__(self, other: object) -> bool:
        return not self == other  # float has one of its own, which would not look at the ends

    __hash__ = float.__hash__

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def __repr__(self) -> str:
        return f"Interval(mean={self.mean!r}, low={self.low!r}, high={self.high!r}, confidence={self.confidence!r})"

    def to_dict(self) -> dict[str, float]:
        """The four numbers by name, for a result file."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "confidence": self.confidence}


@dataclass(frozen=True)
class McNemar:
    """How two settings differ on the same samples; prints as ``p = 0.0225 (12 only first, 3 only second)``.

    Args:
        only_first: Samples that only the first setting gets right.
        only_second: Samples that only the second gets right.
        p_value: Two-sided.
    """

    only_first: int
    only_second: int
    p_value: float

    def __str__(self) -> str:
        return f"p = {self.p_value:.3g} ({self.only_first} only first, {self.only_second} only second)"

    def to_dict(self) -> dict[str, int | float]:
        """The three numbers by name, for a result file."""
        return asdict(self)


def bootstrap_mean(
    values: npt.ArrayLike,
    *,
    groups: Iterable[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """The mean and its percentile bootstrap interval (Efron, 1979).

    Samples of one question are not independent: the same question with the gold document at five positions is hardly
    more evidence than at one. With ``groups``, whole groups are drawn with replacement (the cluster bootstrap), and
    the mean of a resample is that of all values in it. A single value, or a single group, gives an interval of width
    zero: nothing is then known about the spread.

    Args:
        values: One number a sample; booleans count as 0 and 1.
        groups: The group of every value, such as its ``question_id``. ``None``: every value is its own.
        confidence: Between 0 and 1.
        resamples: How many means to draw.
        seed: The same seed gives the same interval.

    Raises:
        ValueError: If there are no values, one is not finite, or an argument is out of range or of the wrong length.
    """
    numbers = _checked(values)
    _require_confidence(confidence)
    _require_resamples(resamples)
    sums, counts = _grouped(numbers, groups)
    mean = float(numbers.mean())
    if numbers.min() == numbers.max():  # said exactly: sums of equal numbers differ by rounding
        mean = float(numbers[0])
        return Interval(mean, mean, mean, confidence)
    means = np.concatenate(list(_resampled(sums, counts, resamples, np.random.default_rng(seed))))
    low, high = np.quantile(means, [(1 - confidence) / 2, (1 + confidence) / 2])
    return Interval(mean, float(low), float(high), confidence)


def resampled_means(
    values: npt.ArrayLike,
    *,
    groups: Iterable[Hashable] | None = None,
    resamples: int = 10_000,
    seed: int | Sequence[int] = 0,
) -> npt.NDArray[np.float64]:
    """Bootstrap means, of several quantities at once, for the interval of what is made of them.

    How many heads have a mean score above a threshold, or which are the best, is no mean itself; its spread is seen by
    working it out on every resample: ``percentile_interval(f(values.mean(axis=0)), [f(row) for row in means])``. An
    average over tasks is averaged draw by draw, each task with a ``seed`` of its own (such as ``(seed, 3)``): with the
    same one, tasks of equal size would be resampled alike.

    Args:
        values: ``[sample column]``, such as one score a head; or ``[sample]``.
        groups: As for :func:`bootstrap_mean`: whole groups are drawn.
        resamples: How many times.
        seed: The same seed draws the same samples for every column.

    Returns:
        ``[resample column]``, or ``[resample]``.

    Raises:
        ValueError: If there are no values, one is not finite, or an argument is out of range or of the wrong length.
    """
    _require_resamples(resamples)
    numbers, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    if numbers.ndim == 1:
        return np.concatenate(list(_resampled(*_grouped(_checked(numbers), groups), resamples, rng)))
    if numbers.ndim != 2 or not numbers.size:
        raise ValueError(f"values have the shape {numbers.shape}; they must be [sample column], with at least one each")
    if not np.isfinite(numbers).all():
        row, column = np.argwhere(~np.isfinite(numbers))[0].tolist()
        raise ValueError(f"value {column} of sample {row} is {numbers[row, column]}; all must be finite")
    codes = _codes(groups, len(numbers))
    sizes = np.bincount(codes).astype(np.float64)
    sums = np.zeros((sizes.size, numbers.shape[1]))
    np.add.at(sums, codes, numbers)
    means: list[npt.NDArray[np.float64]] = []
    for drawn in _draws(sizes.size, resamples, rng):
        rows = np.arange(len(drawn))[:, None] * sizes.size
        times = np.bincount((drawn + rows).ravel(), minlength=drawn.size).reshape(drawn.shape).astype(np.float64)
        means.append(times @ sums / (times @ sizes)[:, None])
    return np.concatenate(means)


def percentile_interval(estimate: float, drawn: npt.ArrayLike, *, confidence: float = 0.95) -> Interval:
    """An estimate with the percentile interval of what resamples give in its place (Efron, 1979).

    Counts above a threshold and ranks lean to one side when samples are drawn again; the interval then reaches to the
    estimate, so that it is never left out.

    Args:
        estimate: From all samples.
        drawn: From each resample.
        confidence: Between 0 and 1.

    Raises:
        ValueError: If nothing was drawn, a number is not finite, or ``confidence`` is out of range.
    """
    _require_confidence(confidence)
    low, high = np.quantile(_checked(drawn), [(1 - confidence) / 2, (1 + confidence) / 2])
    (estimate,) = _checked([estimate])
    return Interval(float(estimate), min(float(low), float(estimate)), max(float(high), float(estimate)), confidence)


def _require_confidence(confidence: float) -> None:
    if not 0 < confidence < 1:
        raise ValueError(f"confidence is {confidence}; it must lie between 0 and 1, such as 0.95")


def _require_resamples(resamples: int) -> None:
    if resamples < 1:
        raise ValueError(f"resamples is {resamples}; it must be at least 1, and 10,000 is usual")


def _checked(values: npt.ArrayLike) -> npt.NDArray[np.float64]:
    numbers = np.asarray(values, dtype=np.float64)
    if numbers.ndim != 1:
        raise ValueError(f"values have the shape {numbers.shape}; they must be a list of numbers")
    if not numbers.size:
        raise ValueError("there are no values; a mean needs at least one")
    if not np.isfinite(numbers).all():
        place = int(np.flatnonzero(~np.isfinite(numbers))[0])
        raise ValueError(f"value {place} is {numbers[place]}; all must be finite")
    return numbers


def _grouped(
    numbers: npt.NDArray[np.float64], groups: Iterable[Hashable] | None
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
    """The sum and the number of the values of every group."""
    if groups is None:
        return numbers, np.ones_like(numbers)
    codes = _codes(groups, numbers.size)
    sums = np.bincount(codes, weights=numbers).astype(np.float64)
    return sums, np.bincount(codes).astype(np.float64)


def _codes(groups: Iterable[Hashable] | None, n: int) -> npt.NDArray[np.intp]:
    """The number of each value's group, in the order in which groups appear."""
    if groups is None:
        return np.arange(n)
    numbered: dict[Hashable, int] = {}
    codes = np.array([numbered.setdefault(group, len(numbered)) for group in groups], dtype=np.intp)
    if codes.size != n:
        raise ValueError(f"there are {codes.size} groups for {n} values; give every value its group")
    return codes


def _draws(n: int, resamples: int, rng: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
    """``n`` of ``n`` groups with replacement, as many times as there are resamples, a chunk at a time."""
    rows = max(1, _CHUNK // n)
    for start in range(0, resamples, rows):
        yield rng.integers(n, size=(min(rows, resamples - start), n))


def _resampled(
    sums: npt.NDArray[np.float64], counts: npt.NDArray[np.float64], resamples: int, rng: np.random.Generator
) -> Iterator[npt.NDArray[np.float64]]:
    equal_sizes = bool((counts == counts[0]).all())
    for drawn in _draws(sums.size, resamples, rng):
        sizes = counts[0] * sums.size if equal_sizes else counts[drawn].sum(axis=1)
        yield sums[drawn].sum(axis=1) / sizes


def mcnemar_exact(first: npt.ArrayLike, second: npt.ArrayLike, *, groups: Iterable[Hashable] | None = None) -> McNemar:
    """McNemar's test with its exact binomial distribution (McNemar, 1947): are two settings equally often right?

    Only the samples on which they disagree count; were the settings equal, each of those would fall to either side
    with probability 1/2. The p-value is twice the smaller tail, at most 1, and 1 where they never disagree.

    Samples of one question fall to a side together. With ``groups`` it is whole groups that do: each one's net gain
    has either sign with probability 1/2, and the p-value is the exact chance of a sum as far from zero (the sign-flip
    permutation test; Fisher, 1935). With groups of one sample each it is McNemar's.

    Args:
        first: Whether the first setting is right, one boolean (or 0 and 1) a sample.
        second: The same for the second, in the same order of samples.
        groups: The group of every sample, such as its ``question_id``. ``None``: every sample is its own.

    Raises:
        ValueError: If the lengths differ, or a value is neither true nor false.
    """
    right, other = _booleans(first, "first"), _booleans(second, "second")
    if right.size != other.size:
        raise ValueError(f"first has {right.size} samples, second {other.size}; they must be the same samples")
    only_first, only_second = int((right & ~other).sum()), int((other & ~right).sum())
    gains, sizes = _grouped(right.astype(np.float64) - other, groups)
    alone = bool((sizes == 1).all())
    return McNemar(only_first, only_second, _two_sided(only_first, only_second) if alone else _sign_flips(gains))


def _booleans(values: npt.ArrayLike, name: str) -> npt.NDArray[np.bool_]:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} has the shape {array.shape}; it must be a list of booleans")
    wrong = ~np.isin(array, (0, 1)) if array.dtype.kind in "biuf" else np.ones(array.shape, dtype=np.bool_)
    if wrong.any():
        raise ValueError(f"{name} contains {array[wrong].tolist()[0]!r}; it must hold true and false, or 1 and 0, only")
    return array.astype(np.bool_)


def _sign_flips(gains: npt.NDArray[np.float64]) -> float:
    """The chance that whole numbers with random signs add up to something as far from zero as they do."""
    steps = np.abs(gains).astype(np.intp)
    steps = steps[steps > 0]
    chances = np.ones(1)  # of each sum from -reach to reach
    for step in steps:
        wider = np.zeros(chances.size + 2 * step)
        wider[: chances.size] += chances / 2
        wider[2 * step :] += chances / 2
        chances = wider
    sums = np.arange(chances.size) - int(steps.sum())
    return min(1.0, float(chances[np.abs(sums) >= abs(int(gains.sum()))].sum()))


def _two_sided(successes: int, failures: int) -> float:
    n = successes + failures
    term = tail = 1  # of n choose i: integers are exact, and their quotient is correctly rounded at any size
    for i in range(min(successes, failures)):
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)
