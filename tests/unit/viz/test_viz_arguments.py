"""Figures and views take arrays and tensors, and name what they cannot draw."""

from __future__ import annotations

from collections.abc import Callable

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
import torch

import focuslens as fl
from focuslens import viz

# pyright: reportArgumentType=false

pytestmark = pytest.mark.usefixtures("unchecked")

MAP = torch.rand(3, 4)
PARTS = torch.rand(1, 3, 4, 4)
SCORES = fl.ContextualScores(
    PARTS[0, :1], PARTS[0, :1], PARTS[0, :1], PARTS[0, :1], "long", ("a",), ("x",), (True,)
)  # fmt: skip
EVALUATION = fl.Evaluation(("a",), ("a",), ("x",), (True,), fl.Interval(1, 1, 1, 0.95))


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (
            lambda: viz.head_map(SCORES),
            r"scores is a ContextualScores; it must be an array or a tensor of numbers \[lay",
        ),
        (lambda: viz.head_map("scores"), "scores is a str; it must be an array or a tensor"),
        (lambda: viz.head_map([[1, 2], [3]]), "scores is a list; it must be an array or a tensor"),
        (lambda: viz.head_groups(None, ["a"]), "groups is a NoneType; it must be an array or a tensor"),
        (lambda: viz.table_heat_map(MAP), r"table is a Tensor; it must be a DataFrame: pd.DataFrame\(...\)"),
        (lambda: viz.table_heat_map(pd.DataFrame(MAP), low=MAP, high=MAP), "lower end is a Tensor; it must be a DataF"),
        (
            lambda: viz.loss_curves(None, ["a"]),
            r"losses is a NoneType; it must be an array or a tensor of numbers \[epo",
        ),
        (lambda: viz.sweep_curves(EVALUATION, x_label="k"), r"curves is a Evaluation; it must be a Sequence: \[Curve"),
        (
            lambda: viz.sweep_curves([EVALUATION], x_label="k"),
            r"curves\[0\] is a Evaluation; it must be a Curve: Curve",
        ),
        (lambda: viz.curves(EVALUATION, "tau"), r"sweep is a Evaluation; it must be a Sweep: fl.run_sweep"),
        (lambda: viz.norms_by_rank(MAP[0], "b"), r"key is a str; it must be an array or a tensor of numbers \[rank\]"),
        (lambda: viz.frequency_profiles(MAP), r"shares is a Tensor; it must be a Mapping: \{'name': \[pair\]\}"),
        (lambda: viz.depth_profiles({"a": None}), r"shares\['a'\] is a NoneType; it must be an array or a tensor"),
        (lambda: viz.position_biases([0, 1], [1, 2]), "biases is a list; it must be a Mapping"),
        (lambda: viz.variance_parts(["a"], MAP[0, :1], None, MAP[0, :1]), r"parts\['position'\] is a NoneType"),
        (lambda: viz.budget_shares(MAP), r"shares is a Tensor; it must be a Mapping: \{'baseline': budget.intervals"),
        (lambda: viz.budget_shares({"a": MAP}), r"shares\['a'\] is a Tensor; it must be a Mapping: budget.intervals"),
        (
            lambda: viz.attention_view(["a"], SCORES, ["L0H0"]),
            "pattern is a ContextualScores; it must be an array or a",
        ),
        (lambda: viz.token_view(MAP), "window is a Tensor; it must be a WindowAttention: fl.window_attention"),
        (
            lambda: viz.document_view(MAP),
            "attention is a Tensor; it must be a ResponseAttention or UnitAttention: fl.r",
        ),
        (lambda: viz.text_view(MAP), "attention is a Tensor; it must be a ResponseAttention: fl.response_attention"),
        (lambda: viz.compare_view(MAP, MAP), "before is a Tensor; it must be a ResponseAttention"),
        (lambda: viz.pool_attention(MAP.numpy(), [(0, 1)]), "rows is a ndarray; it must be a Tensor: a tensor"),
    ],
)
def test_what_cannot_be_drawn_is_named(work: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        work()


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (
            lambda: viz.head_map(PARTS[0]),
            r"scores has the shape \(3, 4, 4\); it must be .* \[layer head\], such as the",
        ),
        (lambda: viz.head_map(MAP[0].numpy()), r"scores has the shape \(4,\); it must be"),
        (lambda: viz.head_groups(torch.zeros(3), ["a"]), r"groups has the shape \(3,\); it must be"),
        (
            lambda: viz.loss_curves(MAP[0], ["a"]),
            r"losses has the shape \(4,\); it must be .* \[epoch n\], such as dir",
        ),
        (lambda: viz.norms_by_rank(MAP, MAP), r"query has the shape \(3, 4\); it must be"),
        (lambda: viz.attention_view(["a"], MAP, ["L0H0"]), r"pattern has the shape \(3, 4\); .* \[head query key\]"),
    ],
)
def test_an_array_of_another_shape_is_named(work: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        work()


def test_tensors_and_lists_are_drawn_as_arrays_are() -> None:
    wanted = viz.head_map(MAP.numpy()).images[0].get_array()
    for given in (MAP, MAP.clone().requires_grad_(), MAP.tolist()):
        assert np.array_equal(wanted, viz.head_map(given).images[0].get_array())
    assert viz.head_map(MAP.bfloat16()).images[0].get_array() is not None
    assert viz.head_groups(torch.zeros(3, 4, dtype=torch.long), ["a"]).images
    assert viz.loss_curves(MAP, list("abcd")).lines
    assert viz.position_biases([0, 1], {"a": torch.zeros(2)}).lines
    assert viz.variance_parts(["a"], *(MAP[0, :1] for _ in range(3))).patches
