"""Bootstrap confidence intervals, rank correlation, and exact tests of paired samples."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

__all__ = [
    "Interval",
    "McNemar",
    "bootstrap_mean",
    "mcnemar_exact",
    "percentile_interval",
    "rank_correlation",
    "resampled_means",
    "sign_flip_exact",
]

_CHUNK = 500_000
"""Maximum number of random draws in memory at once. A draw takes 8 bytes for its index and 8 bytes for its value."""


class Interval(float):
    """Mean with its confidence interval, printed as ``0.590 [0.560, 0.620]``.

    Arithmetic and comparisons use the mean. There is one exception: two intervals are equal only if their means, ends
    and confidence levels are all equal.

    Attributes:
        low: Lower end of the interval.
        high: Upper end of the interval.
        confidence: Confidence level, between 0 and 1.
    """

    low: float
    high: float
    confidence: float

    def __new__(cls, mean: float, low: float, high: float, confidence: float) -> Interval:
        """Create a mean with its interval."""
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
        return not self == other  # float.__ne__ would ignore the ends of the interval

    __hash__ = float.__hash__

    def __str__(self) -> str:
        return f"{self.mean:.3f} [{self.low:.3f}, {self.high:.3f}]"

    def __repr__(self) -> str:
        return f"Interval(mean={self.mean!r}, low={self.low!r}, high={self.high!r}, confidence={self.confidence!r})"

    def to_dict(self) -> dict[str, float]:
        """Mean, ends and confidence level by name, for a result file."""
        return {"mean": self.mean, "low": self.low, "high": self.high, "confidence": self.confidence}


@dataclass(frozen=True)
class McNemar:
    """Comparison of two settings, such as two interventions, on the same samples.

    The comparison is printed as ``p = 0.0352 (12 only first, 3 only second)``.

    Args:
        only_first: Number of samples that only the first setting answers correctly.
        only_second: Number of samples that only the second setting answers correctly.
        p_value: Two-sided p-value.
    """

    only_first: int
    only_second: int
    p_value: float

    def __str__(self) -> str:
        return f"p = {self.p_value:.3g} ({self.only_first} only first, {self.only_second} only second)"

    def to_dict(self) -> dict[str, int | float]:
        """Both counts and the p-value by name, for a result file."""
        return asdict(self)


def bootstrap_mean(
    values: npt.ArrayLike,
    *,
    groups: Iterable[Hashable] | None = None,
    confidence: float = 0.95,
    resamples: int = 10_000,
    seed: int = 0,
) -> Interval:
    """Mean of the values and its percentile bootstrap interval (Efron, 1979).

    Samples of the same question are not independent. A question with the gold document at five positions provides
    hardly more evidence than the same question with the gold document at one position. If ``groups`` is given, whole
    groups are drawn with replacement (the cluster bootstrap). The mean of a resample is then the mean of all values in
    the drawn groups. A single value or a single group contains no information about the spread. Its interval therefore
    has width zero.

    Args:
        values: One number per sample; booleans count as 0 and 1.
        groups: Group of each value, such as the sample's ``question_id``. If ``None``, each value is its own group.
        confidence: Confidence level, between 0 and 1.
        resamples: Number of resamples.
        seed: Seed of the draws. The same seed always produces the same interval.

    Raises:
        ValueError: If there are no values, a value is not finite, or an argument is out of range or has the wrong
            length.
    """
    numbers = _checked(values)
    _require_confidence(confidence)
    _require_resamples(resamples)
    sums, counts = _grouped(numbers, groups)
    mean = float(numbers.mean())
    if numbers.min() == numbers.max():  # resamples of equal values would differ only by rounding errors
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

    Some statistics, such as the number of heads whose mean score exceeds a threshold, are not means themselves. To
    compute the interval of such a statistic ``f``, apply ``f`` to each row of ``means``, the result of this function:
    ``percentile_interval(f(values.mean(axis=0)), [f(row) for row in means])``.

    For a mean over tasks, call this function once per task, and average the results row by row. Use a new ``seed`` for
    each task, such as ``(seed, 3)`` for task 3. With the same seed, tasks of equal size would get the same draws.

    Args:
        values: Numbers ``[sample column]``, for example with one column per head, or numbers ``[sample]``.
        groups: Group of each sample. Whole groups are drawn, as in :func:`bootstrap_mean`.
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
    """Estimate with its percentile interval from bootstrap resamples (Efron, 1979).

    Resampling shifts some statistics, such as ranks and counts above a threshold, in one direction. If the interval
    would not contain the estimate, the interval is extended to the estimate.

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
    """Sum and count of the values in each group."""
    if groups is None:
        return numbers, np.ones_like(numbers)
    codes = _codes(groups, numbers.size)
    sums = np.bincount(codes, weights=numbers).astype(np.float64)
    return sums, np.bincount(codes).astype(np.float64)


def _codes(groups: Iterable[Hashable] | None, n: int) -> npt.NDArray[np.intp]:
    """Index of each value's group. Groups are numbered in the order in which they first occur."""
    if groups is None:
        return np.arange(n)
    # Elements of a tensor are hashed by identity, so that each would be a group of its own.
    tolist: Any = getattr(groups, "tolist", None)
    labels: Iterable[Hashable] = groups if tolist is None else tolist()
    indices: dict[Hashable, int] = {}
    codes = np.array([indices.setdefault(label, len(indices)) for label in labels], dtype=np.intp)
    if codes.size != n:
        raise ValueError(f"there are {codes.size} groups for {n} values; give one group per value")
    return codes


def _draws(n: int, resamples: int, rng: np.random.Generator) -> Iterator[npt.NDArray[np.int64]]:
    """Group indices ``[resample draw]``, in chunks of resamples. Each resample draws ``n`` groups with replacement."""
    rows = max(1, _CHUNK // n)
    for start in range(0, resamples, rows):
        yield rng.integers(n, size=(min(rows, resamples - start), n))


def _resampled(
    sums: npt.NDArray[np.float64], counts: npt.NDArray[np.float64], resamples: int, rng: np.random.Generator
) -> Iterator[npt.NDArray[np.float64]]:
    """Means of the resamples, in chunks, computed from the sum and the count of the values in each group."""
    equal_sizes = bool((counts == counts[0]).all())
    for draws in _draws(sums.size, resamples, rng):
        sizes = counts[0] * sums.size if equal_sizes else counts[draws].sum(axis=1)
        yield sums[draws].sum(axis=1) / sizes


def mcnemar_exact(first: npt.ArrayLike, second: npt.ArrayLike, *, groups: Iterable[Hashable] | None = None) -> McNemar:
    """Test whether two settings are correct equally often, with McNemar's exact binomial test (1947).

    The test uses only the samples on which exactly one setting is correct. If the settings were equally good, each of
    these samples would favour either setting with probability 1/2. The p-value is twice the probability of the smaller
    tail, and at most 1. If there are no such samples, the p-value is 1.

    Samples of the same question are not independent. If ``groups`` is given, the test is the sign-flip permutation test
    (Fisher, 1935). The net gain of a group is the number of samples that only the first setting answers correctly,
    minus the number of samples that only the second setting answers correctly. If the settings were equally good, each
    net gain would have either sign with probability 1/2. The p-value is the exact probability that the sum of the net
    gains is at least as far from zero as the observed sum. If every group has one sample, this is McNemar's test.

    Args:
        first: Whether the first setting is correct on each sample: booleans, or 0 and 1.
        second: Whether the second setting is correct on each sample, in the same order.
        groups: Group of each sample, such as its ``question_id``. If ``None``, each sample is its own group.

    Raises:
        ValueError: If the arguments differ in length, or a value is neither a boolean nor 0 or 1.
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


def sign_flip_exact(values: npt.ArrayLike, *, groups: Iterable[Hashable] | None = None) -> float:
    """Two-sided p-value of the exact sign-flip permutation test (Fisher, 1935): are values symmetric about zero?

    If they are, the sum of each group has either sign with probability 1/2. The p-value is the exact probability that
    the total is at least as far from zero as the observed total.

    Args:
        values: Integers, one per sample.
        groups: Group of each sample, such as its ``question_id``. If ``None``, each sample is its own group.

    Raises:
        ValueError: If there are no values, a value is not an integer, or the number of groups differs.
    """
    numbers = _checked(values)
    if (numbers != np.round(numbers)).any():
        raise ValueError(f"values contain {numbers[numbers != np.round(numbers)][0]}; all must be integers")
    return _sign_flips(_grouped(numbers, groups)[0])


def rank_correlation(first: npt.ArrayLike, second: npt.ArrayLike) -> float:
    """Spearman's rank correlation. Equal values get the mean of their ranks. NaN if all values of a side are equal.

    Raises:
        ValueError: If there are no values, a value is not finite, or the lengths differ.
    """
    a, b = (_centred_ranks(_checked(values)) for values in (first, second))
    if a.size != b.size:
        raise ValueError(f"first has {a.size} values, second {b.size}; they must be pairs")
    scale = np.sqrt((a @ a) * (b @ b))
    return float(a @ b / scale) if scale else float("nan")


def _centred_ranks(values: npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """Rank of each value minus the mean rank. Half the difference of the counts below and above is exact."""
    return (np.sign(values[:, None] - values).sum(axis=1)) / 2


def _sign_flips(gains: npt.NDArray[np.float64]) -> float:
    """Probability that the sum of the gains, with random signs, is at least as far from zero as the observed sum."""
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
    """Two-sided p-value of an exact binomial test with success probability 1/2."""
    n = successes + failures
    term = tail = 1  # binomial coefficient and tail sum are exact integers; only the final division rounds
    for i in range(min(successes, failures)):
        term = term * (n - i) // (i + 1)
        tail += term
    return min(1.0, 2 * tail / 2**n)
