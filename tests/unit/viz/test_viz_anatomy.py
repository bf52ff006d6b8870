"""Figures of directions: drawn data, and invalid input."""

from __future__ import annotations

from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pytest

from focuslens import viz


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def names(ax: Any) -> list[str]:
    return [text.get_text() for text in ax.get_legend().get_texts()]


def test_norms_are_drawn_by_rank_with_the_noise_they_began_as(unchecked: None):
    query, key = np.array([20.0, 30.0, 25.0]), np.array([0.2, 0.1, 4.0])
    ax: Any = viz.norms_by_rank(query, key, noise=0.113, top=2, title="Model")
    first, second, noise, top = ax.lines
    for line, norms in ((first, query), (second, key)):
        assert list(line.get_xdata()) == [1, 2, 3]
        np.testing.assert_array_equal(line.get_ydata(), norms)
    assert set(noise.get_ydata()) == {0.113}
    assert set(top.get_xdata()) == {2.5}
    assert names(ax) == ["$d_Q$", "$d_K$", "initial noise (0.11)", "top 2"]
    assert (ax.get_xscale(), ax.get_yscale(), ax.get_title(loc="left")) == ("log", "log", "Model")
    assert len(viz.norms_by_rank(query, key).lines) == 2
    with pytest.raises(ValueError, match="3 norms of d_Q and 2 of d_K"):
        viz.norms_by_rank(query, key[:2])
    with pytest.raises(ValueError, match="not positive"):
        viz.norms_by_rank(query, np.zeros(3))


@pytest.mark.parametrize("draw", [viz.frequency_profiles, viz.depth_profiles])
def test_profiles_are_densities_that_an_even_spread_makes_one(draw: Any):
    ax: Any = draw({"a": np.full(4, 0.25), "b": np.array([0.6, 0.4])})
    first, second = (patch.get_data() for patch in ax.patches)
    np.testing.assert_allclose(first.values, 1)
    np.testing.assert_allclose(first.edges, [0, 0.25, 0.5, 0.75, 1])
    np.testing.assert_allclose(second.values, [1.2, 0.8])
    assert names(ax) == ["a", "b"]
    with pytest.raises(ValueError, match="nothing to draw"):
        draw({})


def test_a_bias_is_drawn_less_its_level(unchecked: None):
    positions = np.array([0, 5, 10])
    ax: Any = viz.position_biases(positions, {"L0H1": np.array([11.0, 12.0, 13.0])})
    assert (list(ax.lines[0].get_xdata()), list(ax.lines[0].get_ydata())) == ([0, 5, 10], [-1, 0, 1])
    assert names(ax) == ["L0H1"]
    with pytest.raises(ValueError, match="'a' has 2 values for 3 positions"):
        viz.position_biases(positions, {"a": np.zeros(2)})
    with pytest.raises(ValueError, match="nothing to draw"):
        viz.position_biases(positions, {})


def test_parts_of_a_variance_fill_the_bar(unchecked: None):
    content, position, rest = np.array([3.0, 0.0]), np.array([1.0, 0.0]), np.array([4.0, 0.0])
    ax: Any = viz.variance_parts(["L0H0", "L1H1"], content, position, rest)
    bars = [[(bar.get_x(), bar.get_width()) for bar in group] for group in ax.containers]
    # A head with a constant bias has an empty bar.
    assert bars == [[(0, 0.375), (0, 0)], [(0.375, 0.125), (0, 0)], [(0.5, 0.5), (0, 0)]]
    assert names(ax) == ["content", "position", "interaction"]
    assert [label.get_text() for label in ax.get_yticklabels()] == ["L0H0", "L1H1"]
    with pytest.raises(ValueError, match=r"'labels': 1, 'content': 2"):
        viz.variance_parts(["L0H0"], content, position, rest)
    with pytest.raises(ValueError, match="not 0"):
        viz.variance_parts([], content[:0], position[:0], rest[:0])


def test_they_draw_on_given_axes_and_leave_the_settings_alone():
    before = dict(plt.rcParams)
    _, axes = plt.subplots(1, 5)
    one = np.ones(2)
    assert viz.norms_by_rank(one, one, ax=axes[0]) is axes[0]
    assert viz.frequency_profiles({"a": one / 2}, ax=axes[1]) is axes[1]
    assert viz.depth_profiles({"a": one / 2}, ax=axes[2]) is axes[2]
    assert viz.position_biases(np.arange(2), {"a": one}, ax=axes[3]) is axes[3]
    assert viz.variance_parts(["a", "b"], one, one, one, ax=axes[4]) is axes[4]
    assert len(plt.get_fignums()) == 1
    assert dict(plt.rcParams) == before
