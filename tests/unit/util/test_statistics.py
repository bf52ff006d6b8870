"""Bootstrap intervals against analytic standard errors, and McNemar's test against sums of fractions."""

from __future__ import annotations

import copy
import json
import math
import pickle
from fractions import Fraction
from itertools import product
from statistics import NormalDist

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from focuslens.util.statistics import (
    Interval,
    McNemar,
    _resampled,
    bootstrap_mean,
    mcnemar_exact,
    percentile_interval,
    rank_correlation,
    resampled_means,
    sign_flip_exact,
)

Z95 = NormalDist().inv_cdf(0.975)


# --- Interval ---------------------------------------------------------------------------------------------------------


def test_interval_prints_and_serialises() -> None:
    interval = Interval(0.59, 0.56, 0.6199, 0.95)
    assert str(interval) == "0.590 [0.560, 0.620]"
    assert json.loads(json.dumps(interval.to_dict())) == {"mean": 0.59, "low": 0.56, "high": 0.6199, "confidence": 0.95}
    with pytest.raises(AttributeError):
        interval.mean = 0.0  # type: ignore[misc]


def test_an_interval_is_its_mean_with_ends_that_survive_copying() -> None:
    interval = Interval(0.59, 0.56, 0.62, 0.95)
    assert interval == 0.59
    assert 0.5 < interval < 0.6
    assert f"{interval:.2f} and {interval}" == "0.59 and 0.590 [0.560, 0.620]"
    assert pickle.loads(pickle.dumps(interval)) == interval
    assert interval != Interval(0.59, 0.56, 0.63, 0.95)
    assert copy.deepcopy(interval).high == 0.62


# --- bootstrap --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("confidence", [0.5, 0.8, 0.95, 0.99])
def test_width_is_that_of_the_normal_approximation(confidence: float) -> None:
    values = np.random.default_rng(1).gamma(2.0, size=2000)
    interval = bootstrap_mean(values, confidence=confidence, resamples=8_000)
    half = NormalDist().inv_cdf((1 + confidence) / 2) * values.std() / math.sqrt(values.size)
    assert interval.mean == pytest.approx(values.sum() / 2000)
    assert interval.low == pytest.approx(values.mean() - half, abs=0.06 * half)
    assert interval.high == pytest.approx(values.mean() + half, abs=0.06 * half)
    assert interval.confidence == confidence


def test_booleans_have_the_binomial_interval() -> None:
    # A resample's count is Binomial(100, 0.6), with quantiles 50 and 69. The interval may end one beside them.
    interval = bootstrap_mean([True] * 60 + [False] * 40, resamples=20_000)
    cumulative = np.cumsum([math.comb(100, k) * 0.6**k * 0.4 ** (100 - k) for k in range(101)])
    assert interval.mean == pytest.approx(0.6)
    assert interval.low == pytest.approx(np.searchsorted(cumulative, 0.025) / 100, abs=0.0101)
    assert interval.high == pytest.approx(np.searchsorted(cumulative, 0.975) / 100, abs=0.0101)


def test_the_interval_covers_the_true_mean_about_as_often_as_it_says() -> None:
    rng = np.random.default_rng(2)
    hits = 0
    for seed in range(300):
        interval = bootstrap_mean(rng.normal(3.0, 1.0, size=60), confidence=0.9, resamples=500, seed=seed)
        hits += interval.low <= 3.0 <= interval.high
    assert 0.84 <= hits / 300 <= 0.95  # 0.9, within three standard errors of 0.017 and a small bootstrap bias at n = 60


def test_clusters_widen_the_interval_by_the_square_root_of_their_size() -> None:
    base = np.random.default_rng(3).random(400) < 0.6
    values, groups = np.repeat(base, 5), np.repeat([f"q{i}" for i in range(400)], 5)
    naive, clustered = bootstrap_mean(values), bootstrap_mean(values, groups=list(groups))
    alone = bootstrap_mean(base)
    assert clustered.mean == naive.mean
    ratio = (clustered.high - clustered.low) / (naive.high - naive.low)
    assert ratio == pytest.approx(math.sqrt(5), rel=0.08)
    assert clustered.low == pytest.approx(alone.low, abs=0.005)
    assert clustered.high == pytest.approx(alone.high, abs=0.005)


def test_clusters_of_unequal_size_have_the_standard_error_of_a_ratio() -> None:
    rng = np.random.default_rng(4)
    sizes = rng.integers(1, 9, size=600)
    groups = np.repeat(np.arange(600), sizes)
    values = rng.normal(size=600)[groups] + rng.normal(size=groups.size) + 3 + 0.1 * sizes[groups]
    order = rng.permutation(groups.size)  # groups need not be contiguous
    interval = bootstrap_mean(values[order], groups=groups[order].tolist(), resamples=8_000)
    mean = values.mean()
    residuals = [values[groups == g].sum() - mean * sizes[g] for g in range(600)]
    error = math.sqrt(sum(r * r for r in residuals)) / sizes.sum()  # the delta method
    assert interval.mean == pytest.approx(mean)
    assert interval.low == pytest.approx(mean - Z95 * error, abs=0.1 * error)
    assert interval.high == pytest.approx(mean + Z95 * error, abs=0.1 * error)


def test_a_group_of_one_each_changes_nothing() -> None:
    values = np.random.default_rng(5).random(50)
    assert bootstrap_mean(values, groups=range(50)) == bootstrap_mean(values)


def test_many_values_have_the_standard_error_too() -> None:
    values = np.random.default_rng(6).random(15_000)
    interval = bootstrap_mean(values, resamples=1_000)
    assert (interval.high - interval.low) / 2 == pytest.approx(Z95 * values.std() / math.sqrt(15_000), rel=0.15)


def test_chunks_are_small_and_add_up() -> None:
    chunks = list(_resampled(np.ones(15_000), np.ones(15_000), 1_001, np.random.default_rng(0)))
    assert sum(chunk.size for chunk in chunks) == 1_001
    assert max(chunk.size for chunk in chunks) * 15_000 <= 1_000_000


def test_chunks_are_independent_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    values = np.random.default_rng(7).random(100)
    whole = bootstrap_mean(values, resamples=4_000)
    monkeypatch.setattr("focuslens.util.statistics._CHUNK", 250)
    chunked = bootstrap_mean(values, resamples=4_000)
    width = whole.high - whole.low
    assert chunked.low == pytest.approx(whole.low, abs=0.1 * width)
    assert chunked.high == pytest.approx(whole.high, abs=0.1 * width)


def test_the_seed_decides() -> None:
    values = np.random.default_rng(8).random(40)
    assert bootstrap_mean(values, seed=1) == bootstrap_mean(values, seed=1)
    assert bootstrap_mean(values, seed=1) != bootstrap_mean(values, seed=2)


@pytest.mark.parametrize("values", [[0.1], [0.1] * 7, [True] * 3, [0.1] * 1000])
def test_equal_values_have_an_interval_without_width(values: list[float]) -> None:
    expected = float(values[0])
    assert bootstrap_mean(values, groups=[0, 1, 1][: len(values)] if len(values) == 3 else None) == Interval(
        expected, expected, expected, 0.95
    )


def test_a_single_group_has_an_interval_without_width() -> None:
    interval = bootstrap_mean([0.0, 1.0, 1.0, 0.0], groups=["q"] * 4)
    assert (interval.mean, interval.low, interval.high) == (0.5, 0.5, 0.5)


@given(st.lists(st.floats(-1e6, 1e6), min_size=1, max_size=30), st.floats(0.01, 0.99))
def test_the_interval_lies_within_the_values(values: list[float], confidence: float) -> None:
    interval = bootstrap_mean(values, confidence=confidence, resamples=200)
    slack = 1e-9 * (1 + max(map(abs, values)))
    assert min(values) - slack <= interval.low <= interval.high <= max(values) + slack
    assert interval.mean == pytest.approx(math.fsum(values) / len(values), abs=slack)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": []}, "no values"),
        ({"values": [0.0, float("nan")]}, "value 1 is nan"),
        ({"values": [float("inf"), 0.0]}, "value 0 is inf"),
        ({"values": [[0.0, 1.0]]}, r"\(1, 2\)"),
        ({"values": [0.0, 1.0], "confidence": 0.0}, "confidence is 0.0"),
        ({"values": [0.0, 1.0], "confidence": 95.0}, "confidence is 95.0"),
        ({"values": [0.0, 1.0], "resamples": 0}, "resamples is 0"),
        ({"values": [0.0, 1.0], "groups": ["q"]}, "1 groups for 2 values"),
        ({"values": [0.0], "groups": ["q", "r"]}, "2 groups for 1 values"),
    ],
)
def test_bootstrap_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        bootstrap_mean(**arguments)  # type: ignore[arg-type]


# --- bootstrap of several means ---------------------------------------------------------------------------------------


def test_resamples_are_every_draw_of_whole_groups_equally_often() -> None:
    values, groups = [[1.0, 10.0], [2.0, 0.0], [6.0, 4.0], [0.0, 7.0]], ["a", "b", "b", "c"]
    members = {"a": [0], "b": [1, 2], "c": [3]}
    expected: dict[tuple[float, float], int] = {}
    for drawn in product("abc", repeat=3):
        rows = [values[i] for group in drawn for i in members[group]]
        mean = (round(sum(row[0] for row in rows) / len(rows), 9), round(sum(row[1] for row in rows) / len(rows), 9))
        expected[mean] = expected.get(mean, 0) + 1
    means = resampled_means(values, groups=groups, resamples=54_000)
    found, times = np.unique(means.round(9), axis=0, return_counts=True)
    assert {(row[0], row[1]) for row in found.tolist()} == set(expected)
    for row, n in zip(found.tolist(), times.tolist(), strict=True):
        assert n == pytest.approx(2_000 * expected[row[0], row[1]], rel=0.1)


def test_each_column_has_the_interval_of_its_mean() -> None:
    values, groups = np.random.default_rng(9).random((60, 3)), [i // 4 for i in range(60)]
    means = resampled_means(values, groups=groups, seed=3)
    for column, drawn in zip(values.T, means.T, strict=True):
        alone = bootstrap_mean(column, groups=groups, seed=3)
        made = percentile_interval(float(column.mean()), drawn)
        assert (made.mean, made.low, made.high) == pytest.approx((alone.mean, alone.low, alone.high))


def test_the_interval_of_a_count_by_hand() -> None:
    # The second column is above 0.5 in every resample. The first is above 0.5 if at least two of
    # three draws are sample 0.
    means = resampled_means([[1.0, 1.0], [0.0, 1.0], [0.0, 1.0]], resamples=20_000)
    counts = (means > 0.5).sum(axis=1)
    assert counts.mean() == pytest.approx(1 + 3 * (1 / 9) * (2 / 3) + 1 / 27, abs=0.01)
    found = percentile_interval(1, counts)
    assert (found.mean, found.low, found.high, found.confidence) == (1.0, 1.0, 2.0, 0.95)


def test_an_interval_of_resamples_reaches_to_its_estimate() -> None:
    drawn = np.arange(101.0)
    inside = percentile_interval(50.0, drawn, confidence=0.9)
    assert (inside.mean, inside.low, inside.high, inside.confidence) == pytest.approx((50.0, 5.0, 95.0, 0.9))
    assert (percentile_interval(99.0, drawn).high, percentile_interval(-3.0, drawn).low) == (99.0, -3.0)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"values": [[[0.0]]]}, r"the shape \(1, 1, 1\); they must be \[sample column\]"),
        ({"values": [[]]}, r"the shape \(1, 0\)"),
        ({"values": [[0.0, 1.0], [0.0, float("nan")]]}, "value 1 of sample 1 is nan"),
        ({"values": [[0.0]], "resamples": 0}, "resamples is 0"),
        ({"values": [[0.0], [1.0]], "groups": ["q"]}, "1 groups for 2 values"),
    ],
)
def test_resampling_refuses(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        resampled_means(**arguments)  # type: ignore[arg-type]


def test_a_percentile_interval_refuses() -> None:
    with pytest.raises(ValueError, match="confidence is 2"):
        percentile_interval(0.0, [0.0], confidence=2)
    with pytest.raises(ValueError, match="no values"):
        percentile_interval(0.0, [])
    with pytest.raises(ValueError, match="value 0 is nan"):
        percentile_interval(float("nan"), [0.0])


# --- McNemar ----------------------------------------------------------------------------------------------------------


def brute_force(b: int, c: int) -> float:
    """Probability of a split at least as uneven as ``b`` to ``c``, as a sum of fractions."""
    n = b + c
    uneven = [k for k in range(n + 1) if abs(2 * k - n) >= abs(b - c)]
    return float(sum(Fraction(math.comb(n, k), 2**n) for k in uneven))


def answers(both: int, only_first: int, only_second: int, neither: int) -> tuple[list[bool], list[bool]]:
    pairs = [(True, True)] * both + [(True, False)] * only_first
    pairs += [(False, True)] * only_second + [(False, False)] * neither
    order = np.random.default_rng(0).permutation(len(pairs))
    return [pairs[i][0] for i in order], [pairs[i][1] for i in order]


@given(st.integers(0, 40), st.integers(0, 40), st.integers(0, 5), st.integers(0, 5))
def test_mcnemar_against_the_sum_of_fractions(b: int, c: int, both: int, neither: int) -> None:
    result = mcnemar_exact(*answers(both, b, c, neither))
    assert (result.only_first, result.only_second) == (b, c)
    assert result.p_value == pytest.approx(brute_force(b, c), rel=1e-12)
    assert 0 < result.p_value <= 1


def test_mcnemar_by_hand() -> None:
    # For 1 against 5, p is 2 * (1 + 6) / 64.
    assert mcnemar_exact(*answers(3, 1, 5, 2)) == McNemar(1, 5, 14 / 64)


@pytest.mark.parametrize(("b", "c"), [(5000, 5000), (4900, 5100), (4800, 5200), (5300, 4700), (10_000, 0), (0, 1000)])
def test_mcnemar_of_ten_thousand_differences(b: int, c: int) -> None:
    result = mcnemar_exact(np.repeat([True, False], [b, c]), np.repeat([False, True], [b, c]))
    logs = [math.lgamma(b + c + 1) - math.lgamma(k + 1) - math.lgamma(b + c - k + 1) for k in range(min(b, c) + 1)]
    expected = min(1.0, 2 * math.fsum(math.exp(log - (b + c) * math.log(2)) for log in logs))
    assert result.p_value == pytest.approx(expected, rel=1e-8, abs=1e-300)


def test_mcnemar_of_equal_settings_is_one() -> None:
    assert mcnemar_exact([True, False, True], [True, False, True]) == McNemar(0, 0, 1.0)
    assert mcnemar_exact([True, False], [False, True]) == McNemar(1, 1, 1.0)
    assert mcnemar_exact([], []) == McNemar(0, 0, 1.0)


def test_mcnemar_takes_ones_and_zeros_and_swaps() -> None:
    first, second = [1, 1, 1, 0], np.array([0.0, 0.0, 1.0, 1.0])
    assert mcnemar_exact(first, second) == McNemar(2, 1, 1.0)
    assert mcnemar_exact(second, first) == McNemar(1, 2, 1.0)


def test_mcnemar_prints_and_serialises() -> None:
    result = McNemar(12, 3, 0.03515625)
    assert str(result) == "p = 0.0352 (12 only first, 3 only second)"
    assert json.loads(json.dumps(result.to_dict())) == {"only_first": 12, "only_second": 3, "p_value": 0.03515625}


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        ([True], [True, False], "first has 1 samples, second 2"),
        ([True, 0.5], [True, False], "0.5"),
        ([True, False], [True, float("nan")], "second contains nan"),
        ([[True]], [[False]], r"first has the shape \(1, 1\)"),
        (["1", "0"], [True, False], "'1'"),
    ],
)
def test_mcnemar_refuses(first: list[object], second: list[object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        mcnemar_exact(first, second)  # type: ignore[arg-type]


@given(st.lists(st.tuples(st.booleans(), st.booleans(), st.integers(0, 4)), min_size=1, max_size=14))
def test_groups_fall_to_a_side_together(drawn: list[tuple[bool, bool, int]]) -> None:
    first, second, groups = ([one[i] for one in drawn] for i in range(3))
    gains = [sum(a - b for a, b, of in drawn if of == group) for group in set(groups)]
    sums = [
        abs(sum(sign * gain for sign, gain in zip(signs, gains, strict=True)))
        for signs in product((1, -1), repeat=len(gains))
    ]
    expected = sum(one >= abs(sum(gains)) for one in sums) / len(sums)
    result = mcnemar_exact(first, second, groups=groups)
    assert result.p_value == pytest.approx(expected, rel=1e-12)
    assert (result.only_first, result.only_second) == (
        sum(a and not b for a, b, _ in drawn),
        sum(b and not a for a, b, _ in drawn),
    )


@given(st.lists(st.tuples(st.booleans(), st.booleans()), min_size=1, max_size=20))
def test_groups_of_one_are_mcnemars(drawn: list[tuple[bool, bool]]) -> None:
    first, second = [a for a, _ in drawn], [b for _, b in drawn]
    assert mcnemar_exact(first, second, groups=range(len(drawn))) == mcnemar_exact(first, second)


def test_copies_of_a_question_are_no_further_evidence() -> None:
    first, second = answers(3, 1, 8, 2)
    alone = mcnemar_exact(first, second)
    copied = mcnemar_exact(np.repeat(first, 5), np.repeat(second, 5), groups=np.repeat(range(len(first)), 5).tolist())
    assert copied.only_second == 40
    assert copied.p_value == pytest.approx(alone.p_value, rel=1e-12)
    assert mcnemar_exact(np.repeat(first, 5), np.repeat(second, 5)).p_value < 1e-4


def test_many_groups_are_quick_and_keep_their_digits() -> None:
    gains = [True] * 1300 + [False] * 1300
    p = mcnemar_exact(gains, [not one for one in gains], groups=[i // 2 for i in range(2600)]).p_value
    assert p == pytest.approx(1.0)


def test_groups_can_be_a_tensor_or_an_array():
    values, groups = [1.0, 1, 1, 1, 0, 0, 0, 0], [0] * 4 + [1] * 4
    expected = bootstrap_mean(values, groups=groups)
    assert (expected.low, expected.high) == (0, 1)
    for labels in (torch.tensor(groups), np.array(groups), (str(group) for group in groups)):
        assert bootstrap_mean(values, groups=labels) == expected  # pyright: ignore[reportArgumentType]
    assert mcnemar_exact([1] * 6, [0] * 6, groups=torch.tensor([0] * 6)).p_value == 1  # pyright: ignore[reportArgumentType]


@given(st.lists(st.integers(-4, 4), min_size=1, max_size=9))
def test_sign_flips_against_every_pattern_of_signs(values: list[int]) -> None:
    totals = [
        sum(sign * value for sign, value in zip(s, values, strict=True)) for s in product((-1, 1), repeat=len(values))
    ]
    share = Fraction(sum(abs(total) >= abs(sum(values)) for total in totals), len(totals))
    assert sign_flip_exact(values) == pytest.approx(float(share), rel=1e-12)


def test_sign_flips_of_groups_and_of_other_numbers() -> None:
    assert sign_flip_exact([3, 3, 3, 3]) == 2 / 16
    assert sign_flip_exact([3, 3, 3, 3], groups="aabb") == 2 / 4
    with pytest.raises(ValueError, match=r"values contain 0\.5; all must be integers"):
        sign_flip_exact([1, 0.5])
    with pytest.raises(ValueError, match="there are no values"):
        sign_flip_exact([])


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation([1, 2, 3], [10, 20, 15]) == pytest.approx(0.5)  # 1 - 6 * 2 / (3 * 8)
    assert rank_correlation([1, 2, 3, 4], [-1, -2, -30, -31]) == pytest.approx(-1)
    assert rank_correlation([1, 1, 2], [1, 2, 3]) == pytest.approx(1.5 / math.sqrt(1.5 * 2))
    assert math.isnan(rank_correlation([1, 1, 1], [1, 2, 3]))
    with pytest.raises(ValueError, match="first has 2 values, second 3"):
        rank_correlation([1, 2], [1, 2, 3])


@given(st.permutations(range(8)))
def test_rank_correlation_without_ties_is_spearmans_formula(order: list[int]) -> None:
    squares = sum((i - place) ** 2 for i, place in enumerate(order))
    assert rank_correlation(range(8), order) == pytest.approx(1 - 6 * squares / (8 * 63))
