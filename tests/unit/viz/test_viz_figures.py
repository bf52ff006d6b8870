"""Figures: drawn data, and no side effects."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest

import focuslens as fl
from focuslens import viz


@dataclass
class Interval:
    mean: float
    low: float
    high: float


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


def test_head_map_puts_layers_down_and_heads_across():
    scores = np.random.default_rng(0).random((3, 5))
    scores[1, 2] = np.nan
    ax: Any = viz.head_map(scores, heads=[(2, 4), (0, 1)], title="Scores")
    np.testing.assert_array_equal(ax.images[0].get_array().filled(np.nan), scores)
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title(loc="left")) == ("head", "layer", "Scores (2 outlined)")
    assert [box.get_xy() for box in ax.patches] == [(3.5, 1.5), (0.5, -0.5)]
    assert ax.images[0].colorbar.ax.get_ylabel() == "contextual score\n(share of attention)"
    assert ax.images[0].norm.vmin == 0


def test_a_head_map_marks_scores_above_chance():
    scores = np.array([[0.3, 0.1, 0.2], [0.05, np.nan, 0.4]])
    chance = np.array([[0.2, 0.2, 0.2], [0.01, 0.01, 0.5]])
    ax: Any = viz.head_map(scores, chance=chance, title="Scores")
    (dots,) = ax.collections
    assert sorted(map(tuple, dots.get_offsets().tolist())) == [(0.0, 0.0), (0.0, 1.0)]  # (head, layer)
    assert ax.get_title(loc="left") == "Scores\ndots: 2 heads above chance"
    assert not viz.head_map(scores).collections


@pytest.mark.usefixtures("unchecked")
def test_chance_of_other_heads_is_refused():
    with pytest.raises(ValueError, match=r"chance has the shape \(1, 3\), and scores have \(2, 3\)"):
        viz.head_map(np.zeros((2, 3)), chance=np.zeros((1, 3)))


def test_a_map_of_excess_diverges_from_zero():
    ax: Any = viz.head_map(np.array([[0.3, -0.1], [0.0, np.nan]]), center=0.0)
    norm = ax.images[0].norm
    assert (norm.vmin, norm.vmax) == pytest.approx((-0.3, 0.3))
    assert ax.images[0].cmap.name == "PuOr_r"


@pytest.mark.parametrize("head", [(3, 0), (0, 5), (-1, 0)])
def test_head_map_refuses_heads_that_do_not_exist(head: tuple[int, int]):
    with pytest.raises(ValueError, match=re.escape(f"head {head} is not in scores of 3 layers with 5 heads")):
        viz.head_map(np.zeros((3, 5)), heads=[head])


CURVES = [
    viz.Curve("τ = 0.1", (20, 1, 600), (0.9, 0.6, 0.7), (0.8, 0.5, 0.6), (1.0, 0.7, 0.8)),
    viz.Curve("τ = 2", (1, 50), (0.5, 0.4), (0.45, 0.35), (0.55, 0.45)),
]


@pytest.mark.parametrize("draw", [viz.split_softmax_curves, viz.direction_curves])
def test_curves_are_drawn_in_order_of_heads_with_bands_and_baselines(draw):
    ax: Any = draw(CURVES, {"baseline": Interval(0.594, 0.57, 0.62)})
    baseline, first, second = ax.lines
    assert set(baseline.get_ydata()) == {0.594}
    assert (list(first.get_xdata()), list(first.get_ydata())) == ([0, 1, 3], [0.6, 0.9, 0.7])
    assert (list(second.get_xdata()), list(second.get_ydata())) == ([0, 2], [0.5, 0.4])
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["1", "20", "50", "600"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["baseline", "τ = 0.1", "τ = 2"]
    assert "heads" in ax.get_xlabel()
    assert "exact match" in ax.get_ylabel()
    corners = {tuple(np.round(corner, 6)) for corner in ax.collections[0].get_paths()[0].vertices}
    assert {(0, 0.5), (1, 0.8), (3, 0.6), (0, 0.7), (1, 1.0), (3, 0.8)} <= corners
    (band,) = ax.patches
    assert (band.get_y(), band.get_height()) == (0.57, pytest.approx(0.05))


def test_sweeps_over_numbers_keep_their_distances():
    ax: Any = viz.sweep_curves(CURVES, x_label="strength", x_scale="log", y_label="accuracy")
    assert list(ax.lines[0].get_xdata()) == [1, 20, 600]
    assert ax.get_xscale() == "log"
    assert (ax.get_xlabel(), ax.get_ylabel()) == ("strength", "accuracy")


def test_sweeps_refuse_nothing_and_logarithms_of_nothing():
    with pytest.raises(ValueError, match="no curves"):
        viz.sweep_curves([], x_label="k")
    with pytest.raises(ValueError, match=r"x = -0\.2 has no place on a logarithmic scale"):
        viz.sweep_curves([viz.Curve("a", (-0.2,), (0.5,), (0.4,), (0.6,))], x_label="strength", x_scale="log")


def test_no_two_of_many_lines_look_alike():
    curves = [viz.Curve(str(i), (1.0, 2.0), (0.5, 0.5), (0.4, 0.4), (0.6, 0.6)) for i in range(50)]
    ax: Any = viz.sweep_curves(curves, x_label="k")
    assert len({(line.get_color(), line.get_marker(), line.get_linestyle()) for line in ax.lines}) == 50


def test_a_curve_is_checked():
    with pytest.raises(ValueError, match=r"'a' has lengths .*'low': 2"):
        viz.Curve("a", (1.0,), (0.5,), (0.4, 0.4), (0.6,))
    with pytest.raises(ValueError, match="not 0"):
        viz.Curve("a", (), (), (), ())
    with pytest.raises(ValueError, match=r"x = 2: the estimate 0.7 lies outside its interval \[0.4, 0.6\]"):
        viz.Curve("a", (1.0, 2.0), (0.5, 0.7), (0.4, 0.4), (0.6, 0.6))


def test_a_curve_from_intervals():
    curve = viz.Curve.from_intervals("a", [(5, Interval(0.5, 0.4, 0.6)), (1, Interval(0.2, 0.1, 0.3))])
    assert curve == viz.Curve("a", (5.0, 1.0), (0.5, 0.2), (0.4, 0.1), (0.6, 0.3))


def test_curves_of_a_sweep_go_over_any_of_its_parameters():
    grid = {(alpha, k): (10 * k + alpha) / 100 for alpha in (-1.0, 2.0) for k in (4, 8)}
    settings = [fl.Setting("baseline")]
    settings += [fl.Setting(f"{alpha} {k}", parameters={"alpha": alpha, "k": k, "site": "x"}) for alpha, k in grid]
    values = {"baseline": 0.5, **{f"{alpha} {k}": value for (alpha, k), value in grid.items()}}
    levels = {name: fl.Interval(x, x, x, 0.95) for name, x in values.items()}
    results = {name: fl.Evaluation(("s",), ("q",), ("r",), (True,), level) for name, level in levels.items()}
    sweep = fl.Sweep(tuple(settings), results, {})
    by_alpha = [(one.label, one.x, one.estimate) for one in viz.curves(sweep, "alpha")]
    assert by_alpha == [("alpha = -1", (4, 8), (0.39, 0.79)), ("alpha = 2", (4, 8), (0.42, 0.82))]
    by_k = [(one.label, one.x, one.estimate) for one in viz.curves(sweep, "k", over="alpha", site="x")]
    assert by_k == [("k = 4", (-1.0, 2.0), (0.39, 0.42)), ("k = 8", (-1.0, 2.0), (0.79, 0.82))]
    assert viz.curves(sweep, "k", over="tau") == []


def test_loss_curves_name_few_heads_and_summarise_many():
    few: Any = viz.loss_curves(np.array([[-0.1, -0.2], [-0.3, -0.4]]), ["L0H0", "L0H1"])
    assert [text.get_text() for text in few.get_legend().get_texts()] == ["L0H0", "L0H1"]
    assert (list(few.lines[1].get_xdata()), list(few.lines[1].get_ydata())) == ([1, 2], [-0.2, -0.4])
    losses = np.random.default_rng(0).random((3, 9))
    many: Any = viz.loss_curves(losses, [str(i) for i in range(9)])
    assert [text.get_text() for text in many.get_legend().get_texts()] == [
        "middle half of the heads",
        "median of 9 heads",
    ]
    np.testing.assert_array_equal(many.lines[-1].get_ydata(), np.median(losses, axis=1))
    corners = many.collections[0].get_paths()[0].vertices
    ordered = np.sort(losses[1])  # the third and seventh of nine values
    assert {tuple(corner) for corner in corners} >= {(2.0, ordered[2]), (2.0, ordered[6])}


def frame() -> pd.DataFrame:
    return pd.DataFrame(
        [[0.25, np.nan], [0.75, 1.0]],
        index=pd.Index(["8k", "16k"], name="length"),
        columns=pd.Index(["RAG", "Recall"], name="task"),
    )


def test_a_table_is_drawn_with_its_numbers_and_intervals():
    table = frame()
    ax: Any = viz.table_heat_map(table, low=table - 0.05, high=table + 0.05, label="exact match", title="HELMET")
    np.testing.assert_array_equal(ax.images[0].get_array().filled(np.nan), table.to_numpy())
    assert [text.get_text() for text in ax.texts] == [
        "0.25\n[0.20, 0.30]", "-", "0.75\n[0.70, 0.80]", "1.00\n[0.95, 1.05]",
    ]  # fmt: skip
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title(loc="left")) == ("task", "length", "HELMET")
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["RAG", "Recall"]
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["8k", "16k"]
    assert ax.images[0].colorbar.ax.get_ylabel() == "exact match"
    assert (ax.images[0].norm.vmin, ax.images[0].norm.vmax) == (0.25, 1.0)
    # Text must be readable: white on dark cells, black on light and missing cells.
    assert [text.get_color() for text in ax.texts] == ["white", "black", "black", "black"]


def test_a_table_of_changes_parts_where_nothing_changed():
    table = pd.DataFrame([[-0.1, 0.3]], columns=pd.MultiIndex.from_tuples([("a", 1), ("b", 2)]))
    ax: Any = viz.table_heat_map(table, center=0, digits=1, y_label="model")
    assert (ax.images[0].norm.vmin, ax.images[0].norm.vmax) == (-0.3, 0.3)
    assert [text.get_text() for text in ax.texts] == ["-0.1", "0.3"]
    assert [tick.get_text() for tick in ax.get_xticklabels()] == ["a / 1", "b / 2"]
    assert ax.get_ylabel() == "model"
    whole: Any = viz.table_heat_map(pd.DataFrame([[1, 1]]), limits=(0, 2))
    assert (whole.images[0].norm.vmin, whole.images[0].norm.vmax) == (0, 2)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"table": pd.DataFrame()}, r"shape \(0, 0\); there is nothing to draw"),
        ({"table": pd.DataFrame([["x"]])}, "holds cells that are not numbers"),
        ({"table": frame(), "low": frame()}, "both ends of the intervals"),
        ({"table": frame(), "low": frame(), "high": frame().iloc[:1]}, r"high \(1, 2\); the table has \(2, 2\)"),
    ],
)
def test_tables_that_cannot_be_drawn_are_refused(arguments: dict[str, Any], message: str):
    with pytest.raises(ValueError, match=message):
        viz.table_heat_map(**arguments)


def test_a_budget_is_drawn_with_its_intervals():
    before = {"sink": Interval(0.5, 0.4, 0.6), "relevant": Interval(0.1, 0.05, 0.15)}
    ax: Any = viz.budget_shares({"baseline": before, "steered": {"relevant": 0.3, "sink": 0.4}}, title="Budget")
    first, *whiskers, second = ax.lines
    assert list(first.get_xdata()) == [0.5, 0.1]
    assert list(second.get_xdata()) == [0.4, 0.3]
    assert [list(line.get_xdata()) for line in whiskers] == [[0.4, 0.6], [0.05, 0.15]]
    assert [list(line.get_ydata()) for line in whiskers] == [[y, y] for y in first.get_ydata()]
    assert all(a < b for a, b in zip(first.get_ydata(), second.get_ydata(), strict=True))
    assert [tick.get_text() for tick in ax.get_yticklabels()] == ["sink", "relevant"]
    assert [text.get_text() for text in ax.get_legend().get_texts()] == ["baseline", "steered"]
    assert (first.get_marker(), first.get_color()) != (second.get_marker(), second.get_color())
    assert "share" in ax.get_xlabel()
    with pytest.raises(ValueError, match="no shares to draw"):
        viz.budget_shares({})
    with pytest.raises(ValueError, match=r"'b' has the parts \['x'\]"):
        viz.budget_shares({"a": {"sink": 1.0}, "b": {"x": 1.0}})


def test_every_figure_is_at_hand_in_one_place():
    from focuslens.viz import figures

    curves = ("split_softmax_curves", "direction_curves", "loss_curves")
    anatomy = ("variance_parts", "norms_by_rank", "position_biases", "frequency_profiles", "depth_profiles")
    asked_for = ("head_map", *curves, "budget_shares", *anatomy, "table_heat_map")
    for name in asked_for:
        assert getattr(figures, name) is getattr(viz, name)
        assert name in figures.__all__


def luminance(colour: Any) -> float:
    from matplotlib.colors import to_rgb

    return float(np.dot(to_rgb(colour), (0.299, 0.587, 0.114)))


def test_lines_can_be_told_apart_in_grey():
    curves = [viz.Curve(str(i), (1.0, 2.0), (0.5, 0.5), (0.4, 0.4), (0.6, 0.6)) for i in range(6)]
    ax: Any = viz.sweep_curves(curves, x_label="k")
    assert len({line.get_marker() for line in ax.lines}) == 6
    maps = viz.head_map(np.eye(2)).images[0].cmap
    greys = [luminance(maps(x)) for x in np.linspace(0, 1, 32)]
    assert greys == sorted(greys)


@pytest.mark.parametrize(("shape", "n_labels"), [((2, 3), 2), ((0, 3), 3), ((2, 0), 0)])
def test_loss_curves_refuse_what_does_not_fit(shape: tuple[int, int], n_labels: int):
    with pytest.raises(ValueError, match=re.escape(f"losses have shape {shape} [epoch n] and there are {n_labels}")):
        viz.loss_curves(np.zeros(shape), ["x"] * n_labels)


def test_figures_draw_on_given_axes_and_leave_the_settings_alone():
    before = dict(plt.rcParams)
    _, axes = plt.subplots(1, 6)
    assert viz.head_map(np.zeros((2, 2)), ax=axes[0]) is axes[0]
    assert viz.split_softmax_curves(CURVES, ax=axes[1]) is axes[1]
    assert viz.direction_curves(CURVES, ax=axes[2]) is axes[2]
    assert viz.loss_curves(np.zeros((2, 1)), ["x"], ax=axes[3]) is axes[3]
    assert viz.table_heat_map(frame(), ax=axes[4]) is axes[4]
    assert viz.budget_shares({"a": {"sink": 1.0}}, ax=axes[5]) is axes[5]
    assert len(plt.get_fignums()) == 1
    assert dict(plt.rcParams) == before


@pytest.mark.slow
def test_a_backend_that_the_first_figure_loads_stays_interactive(tmp_path: Path):
    # The backend becomes interactive, as in a notebook. If restoring the style undid this, only the first figure would
    # show.
    (tmp_path / "shows_at_once.py").write_text(
        "import matplotlib\nfrom matplotlib.backends.backend_agg import *\nmatplotlib.interactive(True)\n"
    )
    code = (
        "import numpy as np, matplotlib.pyplot as plt\nfrom focuslens import viz\n"
        "viz.head_map(np.eye(2))\nprint(plt.get_backend(), plt.isinteractive())"
    )
    path = os.pathsep.join([str(tmp_path), *sys.path])
    settings = {**os.environ, "MPLBACKEND": "module://shows_at_once", "PYTHONPATH": path}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, env=settings)
    assert done.stdout.split() == ["module://shows_at_once", "True"]


def test_save_figure_writes_the_same_png_twice(tmp_path: Path):
    first = viz.save_figure(viz.head_map(np.eye(4)), tmp_path / "new" / "a.png")
    ax: Any = viz.head_map(np.eye(4))
    second = viz.save_figure(ax.figure, tmp_path / "new" / "b.png")
    assert first.read_bytes() == second.read_bytes()
    assert first.read_bytes().startswith(b"\x89PNG")
    assert b"Software" not in first.read_bytes()
    assert sorted(file.name for file in first.parent.iterdir()) == ["a.png", "b.png"]
    with pytest.raises(ValueError, match=r"'a.pdf' does not end in \.png"):
        viz.save_figure(ax, tmp_path / "a.pdf")


def test_groups_of_heads_are_told_apart_and_counted():
    groups = np.array([[0, 1, 1], [3, 2, 0]])
    ax = viz.head_groups(groups, ("none", "a", "b", "both"), title="Which")
    (image,) = cast("Any", ax.get_images())
    drawn = image.cmap(image.norm(groups))[..., :3]
    # All kinds have different colours, also in greyscale.
    for kinds in (drawn.reshape(-1, 3), drawn.reshape(-1, 3) @ [[0.299], [0.587], [0.114]]):
        of_kind = {int(kind): tuple(colour) for kind, colour in zip(groups.ravel(), kinds.round(2), strict=True)}
        assert len(set(of_kind.values())) == 4
    legend = ax.get_legend()
    assert legend is not None
    assert [text.get_text() for text in legend.get_texts()] == ["none (2)", "a (2)", "b (1)", "both (1)"]
    for patch, kind in zip(legend.get_patches(), range(4), strict=True):
        assert patch.get_facecolor() == image.cmap(image.norm(kind))
    assert (ax.get_xlabel(), ax.get_ylabel(), ax.get_title(loc="left")) == ("head", "layer", "Which")


@pytest.mark.parametrize(
    ("groups", "names", "message"),
    [
        ([[0, 2]], ("a", "b"), "kinds go from 0 to 2, and there are 2 names"),
        ([[-1, 0]], ("a", "b"), "kinds go from -1 to 0"),
        ([[0]], tuple("abcde"), "there are 5 kinds of heads and 4 colours"),
    ],
)
def test_groups_without_a_name_or_colour_are_refused(groups: list[list[int]], names: tuple[str, ...], message: str):
    with pytest.raises(ValueError, match=message):
        viz.head_groups(np.array(groups), names)


def test_a_head_map_hatches_layers():
    axes = viz.head_map(np.zeros((3, 4)), hatched=[0, 2])
    bands: list[Any] = [patch for patch in axes.patches if patch.get_hatch()]
    assert [round(band.get_y() + 0.5) for band in bands] == [0, 2]
    assert all(band.get_width() == 4 for band in bands)
    assert "2 layers hatched" in axes.get_title(loc="left")
    with pytest.raises(ValueError, match="layer 3 is not in scores of 3 layers"):
        viz.head_map(np.zeros((3, 4)), hatched=[3])
