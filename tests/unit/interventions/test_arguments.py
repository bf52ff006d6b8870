"""Arguments of another type: errors that name the argument, what was given, and what would be right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

import focuslens as fl

# pyright: reportArgumentType=false

pytestmark = pytest.mark.usefixtures("unchecked")

HEADS = [(0, 0)]
PATTERN = torch.full((2, 4), 0.25)
BATCHED = torch.full((3, 2, 2, 4), 0.25)


def split(pattern: Any = PATTERN, span: Any = (0, 2), tau: Any = 0.5) -> torch.Tensor:
    return fl.split_softmax(pattern, span, tau)


@pytest.mark.parametrize(
    ("work", "message"),
    [
        (lambda: split(PATTERN.numpy()), r"pattern is a ndarray; it must be a torch tensor \[... key\], such as torch"),
        (lambda: split([[0.5, 0.5]]), "pattern is a list; it must be a torch tensor"),
        (
            lambda: split(PATTERN.long()),
            r"pattern is a tensor of torch.int64 with the shape \(2, 4\); it must be float",
        ),
        (lambda: split(torch.tensor(0.5)), r"pattern is a tensor of torch.float32 with the shape \(\); it must be"),
        (lambda: split(span=[(0, 3), (5, 8)]), r"span is \[\(0, 3\), \(5, 8\)\]; it must be one range \(start, end\)"),
        (lambda: split(span="relevant"), "span is 'relevant'; it must be one range"),
        (lambda: split(span=2), "span is 2; it must be one range"),
        (lambda: split(span=(0.0, 2.0)), r"span is \(0.0, 2.0\); it must be one range"),
        (
            lambda: split(span=np.array([True, True, False, False])),
            "span is array.*several ranges are a mask, a torch.b",
        ),
        (
            lambda: split(span=torch.tensor([0, 2])),
            "span is a tensor of torch.int64; it must be one range .* torch.bool",
        ),
        (lambda: split(tau=[0.1, 0.3]), r"tau is \[0.1, 0.3\], a list; it must be one number"),
        (lambda: split(tau="0.3"), "tau is '0.3', a str; it must be one number"),
        (lambda: split(tau=torch.tensor([0.1, 0.3])), "tau is tensor.*; it must be one number"),
        (lambda: fl.SplitSoftmax(HEADS, [0.1]), r"tau is \[0.1\], a list; it must be one number"),
        (lambda: fl.SplitSoftmax(HEADS, None), "tau is None, a NoneType; it must be one number"),
        (lambda: fl.FocusSteering(directions(), "1"), "alpha is '1', a str; it must be one number"),
        (
            lambda: fl.FocusSteering("runs/directions", 1),
            "directions is a str; it must be FocusDirections, such as fl.F",
        ),
        (lambda: fl.FocusDirections(HEADS, np.zeros((1, 4))), r"query is a ndarray; it must be a tensor \[n, d_head\]"),
        (lambda: fl.FocusDirections(HEADS, None), "query is a NoneType; it must be a tensor"),
        (lambda: fl.FocusDirections(HEADS, torch.zeros(1, 4), np.zeros((1, 4))), "key is a ndarray; it must be a ten"),
        (
            lambda: fl.HeadAblation(HEADS, "mean", mean=np.zeros((1, 4))),
            "mean is a ndarray; it must be a tensor, as fl",
        ),
        (lambda: fl.rank_heads(np.zeros((2, 2))), r"scores is a ndarray; it must be a tensor \[layer, head\], such as"),
        (lambda: fl.rank_heads(torch.zeros(3)), r"scores has the shape \(3,\); it must be a tensor \[layer, head\]"),
        (lambda: fl.sparsity(np.zeros((2, 2))), r"scores is a ndarray; it must be a tensor \[layer, head\]"),
        (
            lambda: fl.Prompt("a text", spans={"x": (0, 4)}),
            r"the span 'x' is one range, \(0, 4\); .*: \{'x': \[\(0, 4\)",
        ),
        (
            lambda: fl.Prompt("a text", spans={"x": [0, 4]}),
            r"the span 'x' is one range, \[0, 4\]; it must be a list of",
        ),
        (
            lambda: fl.Prompt("a text", spans={"x": [(0, 4), 5]}),
            "the span 'x' has 5 at index 1; it must be a list of r",
        ),
        (lambda: fl.Prompt("a text", spans={"x": [(0, 4.0)]}), r"the span 'x' has \(0, 4.0\) at index 0; it must be a"),
        (lambda: fl.Prompt("a text", spans={"x": "a t"}), "the span 'x' is 'a t'; it must be a list of ranges"),
        (lambda: fl.Prompt("a text", spans={"x": None}), "the span 'x' is None; it must be a list of ranges"),
        (lambda: fl.Prompt("a text", spans={1: [(0, 1)]}), "spans has the name 1, a int; a name is a string"),
        (lambda: fl.Prompt("a text", spans=[(0, 4)]), r"spans is \[\(0, 4\)\]; it must map names to lists of ranges"),
        (lambda: fl.Prompt(None), "text is None, a NoneType; it must be a string"),
    ],
)
def test_an_argument_of_another_type_is_named(work: Callable[[], object], message: str) -> None:
    with pytest.raises(TypeError, match=message):
        work()


def directions() -> fl.FocusDirections:
    return fl.FocusDirections(HEADS, torch.zeros(1, 4))


def test_masks_of_another_shape_are_named_and_masks_that_fit_act_as_before() -> None:
    mask = torch.tensor([True, True, False, False])
    assert split(span=mask).equal(split(span=(0, 2)))
    assert split(span=np.array([0, 2])).equal(split(span=(0, 2)))
    assert split(BATCHED, mask.expand(3, 1, 1, 4)).equal(split(BATCHED, (0, 2)))
    for shape in ((3,), (1,), (3, 4), (1, 2, 4)):
        with pytest.raises(
            ValueError, match=r"span is a mask of the shape .* does not fit a pattern of the shape \(2, 4"
        ):
            split(span=torch.ones(shape, dtype=torch.bool))


def test_a_range_of_tokens_that_is_none_is_named(load_model) -> None:
    model = load_model("llama")
    encoded = model.encode("Who did it?")
    for span in ([(0, 1), (1, 2)], 3, (0, 1, 2), None, (0.0, 1.0)):
        with pytest.raises(
            TypeError, match=r"span is .*; it must be the name of a span, or one range \(start, end\) of"
        ):
            encoded.resolve(span)
    with pytest.raises(TypeError, match="span is 0; it must be the name of a span, or one range"):
        fl.window_attention(model, "Who did it?", HEADS, (0, 1), response="a")
    with pytest.raises(ValueError, match=r"span is \[\(0, 1\), \(1, 2\)\]; it must be a name or one range"):
        fl.SplitSoftmax(HEADS, 0.5, [(0, 1), (1, 2)])  # pyright: ignore[reportArgumentType]


def test_spans_of_a_prompt_may_be_numpy_integers_and_iterators() -> None:
    prompt = fl.Prompt("a text", spans={"x": iter([(np.int64(0), np.int64(1))]), "y": ()})
    assert prompt.spans == {"x": ((0, 1),), "y": ()}


@pytest.mark.parametrize("span", [range(5, 7), {5: 0, 9: 1}, b"\x05\x09", torch.tensor([False, True]), (True, 4)])
def test_what_only_looks_like_a_range_of_tokens_is_refused(span: Any) -> None:
    with pytest.raises((TypeError, ValueError), match=r"span is .*; it must be"):
        fl.SplitSoftmax([(0, 0)], 0.1, span=span)


def test_a_mask_of_heads_is_no_list_of_heads() -> None:
    with pytest.raises(TypeError, match="is not a head; heads are"):
        fl.SplitSoftmax(torch.tensor([[True, True], [True, False]]), 0.1)  # pyright: ignore[reportArgumentType]
