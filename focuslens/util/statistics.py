"""Bootstrap confidence intervals, and an exact test that compares two settings on the same samples."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass

import numpy as np
import numpy.typing as npt

__all__ = ["Interval", "McNemar", "bootstrap_mean", "mcnemar_exact", "percentile_interval", "resampled_means"]

_CHUNK = 500_000
"""Maximum number of random draws in memory. Each draw takes 8 bytes for its index and 8 bytes for its value."""


class Interval(float):
    """A mean with its confidence interval. Comparisons and arithmetic use the mean.

    Prints as ``0.590 [0.560, 0.620]``. Two intervals are equal if all four of their numbers are equal.

    Attributes:
        low: Lower end of the interval.
        high: Upper end of the interval.
        confidence: Confidence level, between 0 and 1.
    """

    low: float
    high: float
    confidence: float

    def __new__(cls, mean: float, low: float, high: float, confidence: float) -> Interval:
        """Create the mean together with its interval."""
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
        return not self == other  # float's own != would ignore the ends of the interval

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
    """Comparison of two settings on the same samples. Prints as ``p = 0.0225 (12 only first, 3 only second)``.

    Args:
        only_first: Number of samples that only the first setting gets right.
        only_second: Number of samples that only the second setting gets right.
        p_value: Two-sided p-value.
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

    Samples of the same question are not independent. A question with the gold document at five positions gives hardly
    more evidence than the same question with the document at one position. With ``groups``, whole groups are drawn with
    replacement (the cluster bootstrap). The mean of a resample is then the mean of all values in its groups. A single
    value or a single group carries no information about the spread, so its interval has width zero.

    Args:
        values: One number per sample; booleans count as 0 and 1.
        groups: Group of each value, such as its ``question_id``. With ``None``, each value is a group of its own.
        confidence: Confidence level, between 0 and 1.
        resamples: Number of resamples.
        seed: Seed of the draws; the same seed gives the same interval.

    Raises:
        ValueError: If there are no values, a value is not finite, or an argument is out of range or has the wrong
            length.
    """
    numbers = _checked(values)
    _require_confidence(confidence)
    _require_resamples(resamples)
    sums, counts = _grouped(numbers, groups)
    mean = float(numbers.mean())
    if numbers.min() == numbers.max():  # equal values need no draws, and their means would differ by rounding
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
    """Bootstrap means of several quantities, for intervals of statistics that depend on these means.

    Some statistics are not means themselves, such as the number of heads whose mean score exceeds a threshold. To get
    the interval of such a statistic ``f``, compute it on each resample:
    ``percentile_interval(f(values.mean(axis=0)), [f(row) for row in means])``.

    For an average over tasks, average the means of the tasks resample by resample. Give each task its own ``seed``,
    such as ``(seed, 3)``. With a common seed, tasks of equal size would get the same draws.

    Args:
        values: Numbers ``[sample column]``, such as one column per head; or numbers ``[sample]``.
        groups: Group of each sample; whole groups are drawn, as in :func:`bootstrap_mean`.
        resamples: Number of resamples.
        seed: Seed of the draws. All columns share the same draws.

    Returns:
        Means ``[resample column]``; for one-dimensional values, means ``[resample]``.

    Raises:
        ValueError: If there are no values, a value is not finite, or an argument is out of range or has the wrong
            length.
    """
    _require_resamples(resamples)
    numbers, rng = np.asarray(values, dtype=np.float64), np.random.default_rng(seed)
    if numbers.ndim == 1:
        return np.concatenate(list(_resampled(*_grouped(_checked(numbers), groups), resamples, rng)))
    if numbers.ndim != 2 or not numbers.size:
        raise ValueError(f"values have the shape {numbers.shape}; they must be [sample column], and not empty")
    if not np.isfinite(numbers).all():
        row, column = np.argwhere(~np.isfinite(numbers))[0].tolist()
        raise ValueError(f"value {column} of sample {row} is {numbers[row, column]}; all must be finite")
    codes = _codes(groups, len(numbers))
    sizes = np.bincount(codes).astype(np.float64)
    sums = np.zeros((sizes.size, numbers.shape[1]))
    np.add.at(sums, codes, numbers)
    means: list[npt.NDArray[np.float64]] = []
    for draws in _draws(sizes.size, resamples, rng):
        offsets = np.arange(len(draws))[:, None] * sizes.size
        counts = np.bincount((draws + offsets).ravel(), minlength=draws.size).reshape(draws.shape).astype(np.float64)
        means.append(counts @ sums / (counts @ sizes)[:, None])
    return np.concatenate(means)


def percentile_interval(estimate: float, drawn: npt.ArrayLike, *, confidence: float = 0.95) -> Interval:
    """An estimate with the percentile interval of the estimates from resamples (Efron, 1979).

    Resampling biases some statistics to one side, such as ranks and counts above a threshold. An interval that would
    not contain the estimate is extended to the estimate.

    Args:
        estimate: Value of the statistic on all samples.
        drawn: Value of the statistic on each resample.
        confidence: Confidence level, between 0 and 1.

    Raises:
        ValueError: If there are no resamples, a number is not finite, or ``confidence`` is out of range.
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
    """Sum and number of the values in each group."""
    if groups is None:
        return numbers, np.ones_like(numbers)
    codes = _codes(groups, numbers.size)
    sums = np.bincount(codes, weights=numbers).astype(np.float64)
    return sums, np.bincount(codes).astype(np.float64)


def _codes(groups: Iterable[Hashable] | None, n: int) -> npt.NDArray[np.intp]:
    """Index of each value's group; groups are numbered in the order in which they appear."""
    if groups is None:
        return np.arange(n)
    indices: dict[Hashable, int] = {}
    codes = np.array([indices.setdefault(group, len(indices)) for group in groups], dtype=np.intp)
    if codes.size != n:
        raise ValueError(f"there are {codes.size} groups for {n} values; give one group per value")
    return codes


def _draws(n: int, resamples: int, rng: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
    """Draw ``n`` of ``n`` groups with replacement for each resample. Yields chunks of resamples."""
    rows = max(1, _CHUNK // n)
    for start in range(0, resamples, rows):
        yield rng.integers(n, size=(min(rows, resamples - start), n))


def _resampled(
    sums: npt.NDArray[np.float64], counts: npt.NDArray[np.float64], resamples: int, rng: np.random.Generator
) -> Iterator[npt.NDArray[np.float64]]:
    """Means of the resamples, in chunks, computed from the sum and the number of the values in each group."""
    equal_sizes = bool((counts == counts[0]).all())
    for draws in _draws(sums.size, resamples, rng):
        sizes = counts[0] * sums.size if equal_sizes else counts[draws].sum(axis=1)
        yield sums[draws].sum(axis=1) / sizes


def mcnemar_exact(first: npt.ArrayLike, second: npt.ArrayLike, *, groups: Iterable[Hashable] | None = None) -> McNemar:
    """Test whether two settings are right equally often, with McNemar's exact binomial test (1947).

    Only samples on which the settings disagree count. If the settings were equally good, each of these samples would
    favour either setting with probability 1/2. The p-value is twice the probability of the smaller tail, and at most 1.
    It is 1 if the settings never disagree.

    Samples of the same question are not independent. With ``groups``, the test is the sign-flip permutation test
    (Fisher, 1935). If the settings were equally good, the net gain of each group would have either sign with
    probability 1/2. The p-value is the exact probability that the sum of the gains is at least as far from zero as the
    actual sum. If every group has one sample, this is McNemar's test.

    Args:
        first: Whether the first setting is right on each sample: booleans, or 0 and 1.
        second: Whether the second setting is right on each sample, in the same order.
        groups: Group of each sample, such as its ``question_id``. With ``None``, each sample is a group of its own.

    Raises:
        ValueError: If the lengths differ, or a value is not a boolean.
    """
    first_right, second_right = _booleans(first, "first"), _booleans(second, "second")
    if first_right.size != second_right.size:
        raise ValueError(
            f"first has {first_right.size} samples, second {second_right.size}; they must be the same samples"
        )
    only_first, only_second = int((first_right & ~second_right).sum()), int((second_right & ~first_right).sum())
    gains, sizes = _grouped(first_right.astype(np.float64) - second_right, groups)
    is_ungrouped = bool((sizes == 1).all())
    p_value = _two_sided(only_first, only_second) if is_ungrouped else _sign_flips(gains)
    return McNemar(only_first, only_second, p_value)


def _booleans(values: npt.ArrayLike, name: str) -> npt.NDArray[np.bool_]:
    array = np.asarray(values)
    if array.ndim != 1:
        raise ValueError(f"{name} has the shape {array.shape}; it must be a list of booleans")
    is_wrong = ~np.isin(array, (0, 1)) if array.dtype.kind in "biuf" else np.ones(array.shape, dtype=np.bool_)
    if is_wrong.any():
        raise ValueError(f"{name} contains {array[is_wrong].tolist()[0]!r}; all values must be booleans, or 0 and 1")
    return array.astype(np.bool_)


def _sign_flips(gains: npt.NDArray[np.float64]) -> float:
    """Probability that the gains, with random signs, have a sum at least as far from zero as their actual sum."""
    steps = np.abs(gains).astype(np.intp)
    steps = steps[steps > 0]
    probabilities = np.ones(1)  # the probability of each possible sum, smallest sum first
    for step in steps:
        wider = np.zeros(probabilities.size + 2 * step)
        wider[: probabilities.size] += probabilities / 2
        wider[2 * step :] += probabilities / 2
        probabilities = wider
    sums = np.arange(probabilities.size) - int(steps.sum())
    return min(1.0, float(probabilities[np.abs(sums) >= abs(int(gains.sum()))].sum()))


def _two_sided(successes: int, failures: int) -> float:
    """Two-sided p-value of a binomial test with probability 1/2."""
    n = successes + failures
    term = tail = 1  # binomial coefficient and running sum, as exact integers: only the last division rounds
    for i in range(min(successes, failures)):
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)
