"""Confidence intervals over questions, for synthetic attention shares."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from focuslens.evaluation import BUDGET_PARTS, AttentionBudget


def budget() -> AttentionBudget:
    """Shares of three questions with two samples each, and of an empty response.

    Head 0 puts all attention on part 0 or 1, and head 1 on part 5.
    """
    shares = torch.zeros(7, 1, 2, 6)
    for sample, part in enumerate((0, 0, 1, 1, 0, 1)):
        shares[sample, 0, 0, part] = 1.0
        shares[sample, 0, 1, 5] = 1.0
    shares[6] = math.nan
    ids = tuple(map(str, range(7)))
    return AttentionBudget(shares, ids, ids, (True,) * 7, ("a", "a", "b", "b", "c", "c", "d"))


def test_intervals_draw_whole_questions():
    found = budget().intervals([(0, 0)], seed=3)
    assert tuple(found) == BUDGET_PARTS
    # The sink's share is 1 in question a, 0 in b and 1/2 in c. The loop lists all means of three draws with
    # replacement.
    values = np.array([1.0, 0.0, 0.5])
    means = sorted(values[[i, j, k]].mean() for i in range(3) for j in range(3) for k in range(3))
    assert found["sink"].mean == pytest.approx(0.5)
    assert (found["sink"].low, found["sink"].high) == pytest.approx((means[0], means[-1]))
    assert (found["response"].low, found["response"].mean, found["response"].high) == (0, 0, 0)


def test_intervals_are_of_the_mean_of_some_heads():
    found = budget().intervals([(0, 0), (0, 1)])
    assert found["response"].mean == found["response"].low == 0.5
    assert {part: one.mean for part, one in found.items()} == pytest.approx(budget().mean([(0, 0), (0, 1)]))


def test_intervals_of_nothing_are_refused():
    with pytest.raises(ValueError, match="no heads to average over"):
        budget().intervals([])
    silent = AttentionBudget(torch.full((1, 1, 1, 6), math.nan), ("a",), ("",), (False,))
    with pytest.raises(ValueError, match="none of the 1 samples has a response"):
        silent.intervals([(0, 0)])
