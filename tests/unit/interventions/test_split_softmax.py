"""Split-softmax: the pure function against a loop with 50-digit decimals, and the hooks on synthetic patterns."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Callable
from decimal import Decimal, localcontext
from typing import Any, cast

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from focuslens import Cursor, EncodedPrompt, FocusModel, Intervention, PromptBatch, SplitSoftmax, split_softmax

TAUS = (0.0, 0.1, 0.6, 1.0, 1.5, 1000.0)
SPAN = (1, 3)

# Mass of each row on the span: zero, one, and values between, including extremes. The span is keys 1 and 2 of 5.
MASSES = (0.0, 1.0, 0.5, 0.02, 0.9, 1e-30, 1e-6, 1 - 1e-6, 1 - 2**-40)
SHARES_INSIDE, SHARES_OUTSIDE = (0.75, 0.25), (0.5, 0.25, 0.25)


def rows_of_mass(*masses: float) -> torch.Tensor:
    """Float64 rows [row key] of 5 keys. The mass on keys 1 and 2 is given."""
    rows: list[list[float]] = []
    for p in masses:
        inside, outside = [p * share for share in SHARES_INSIDE], [(1 - p) * share for share in SHARES_OUTSIDE]
        rows.append([outside[0], *inside, *outside[1:]])
    return torch.tensor(rows, dtype=torch.float64)


def by_hand(pattern: torch.Tensor, inside: torch.Tensor, tau: float) -> torch.Tensor:
    """Equation 3 for each weight, on rows scaled to sum to exactly one."""
    result = torch.empty(pattern.shape, dtype=torch.float64)
    with localcontext() as context:
        context.prec = 50
        for i, row in enumerate(pattern.tolist()):
            weights = [Decimal(weight) for weight in row]
            total = sum(weights)
            p = sum((w for w, member in zip(weights, inside[i], strict=True) if member), Decimal(0)) / total
            for j, weight in enumerate(weights):
                if p in (0, 1):
                    new = weight
                elif inside[i][j]:
                    new = p ** Decimal(tau) / p * weight
                else:
                    new = (1 - p ** Decimal(tau)) / (1 - p) * weight
                result[i, j] = float(new)
    return result


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize(
    ("dtype", "tolerance"),
    # float32 represents p with an error of 6e-8, which p ** tau multiplies by tau.
    [(torch.float64, lambda tau: 1e-15 * max(tau, 10)), (torch.float32, lambda tau: 1e-7 * max(tau, 2))],
)
def test_agrees_with_the_equation_written_out(
    tau: float, dtype: torch.dtype, tolerance: Callable[[float], float]
) -> None:
    pattern = rows_of_mass(*MASSES)
    inside = torch.tensor([[False, True, True, False, False]] * len(MASSES))
    expected = by_hand(pattern, inside, tau)
    result = split_softmax(pattern.to(dtype), SPAN, tau)
    assert result.dtype == dtype
    torch.testing.assert_close(result.double(), expected, rtol=1e-5, atol=tolerance(tau))
    torch.testing.assert_close(result.double().sum(dim=-1), torch.ones(len(MASSES)).double(), rtol=0, atol=1e-6)
    if tau != 1:
        assert (result[2] - pattern[2].to(dtype)).abs().max() > 0.05


def test_a_case_worked_out_by_hand() -> None:
    # For p = 0.25 and tau = 0.5, p ** tau is 0.5. The span is doubled, and the rest is multiplied by 0.5 / 0.75.
    row = torch.tensor([0.25, 0.15, 0.1, 0.3, 0.2])
    expected = torch.tensor([0.25 * 2 / 3, 0.3, 0.2, 0.2, 0.2 * 2 / 3])
    torch.testing.assert_close(split_softmax(row, (1, 3), 0.5), expected)
    # For tau = 2, p ** tau is 0.0625.
    expected = torch.tensor([0.25 * 1.25, 0.15 / 4, 0.1 / 4, 0.3 * 1.25, 0.2 * 1.25])
    torch.testing.assert_close(split_softmax(row, (1, 3), 2.0), expected)


@pytest.mark.parametrize("tau", TAUS)
def test_rows_with_nothing_or_everything_on_the_span_stay_as_they_are(tau: float) -> None:
    pattern = rows_of_mass(0.0, 1.0).float()
    assert torch.equal(split_softmax(pattern, SPAN, tau), pattern)


def test_no_attention_at_all_stays_none() -> None:
    # Rows of padding tokens see no key, and TransformerLens sets them to zero.
    assert torch.equal(split_softmax(torch.zeros(2, 5), SPAN, 0.3), torch.zeros(2, 5))


def test_tau_zero_puts_all_attention_on_the_span_and_a_huge_tau_takes_it_away() -> None:
    pattern = rows_of_mass(0.02, 0.5, 1e-30)
    on_span = split_softmax(pattern, SPAN, 0.0)
    torch.testing.assert_close(on_span, torch.tensor([[0.0, 0.75, 0.25, 0.0, 0.0]] * 3, dtype=torch.float64))
    off_span = split_softmax(pattern, SPAN, 1000.0)
    torch.testing.assert_close(off_span, torch.tensor([[0.5, 0.0, 0.0, 0.25, 0.25]] * 3, dtype=torch.float64))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.float16, torch.bfloat16])
def test_identity_at_tau_one_is_exact_and_a_copy(dtype: torch.dtype) -> None:
    pattern = rows_of_mass(*MASSES).to(dtype)
    result = split_softmax(pattern, SPAN, 1.0)
    assert torch.equal(result, pattern)
    assert result.data_ptr() != pattern.data_ptr()


@pytest.mark.parametrize("tau", TAUS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_rows_still_sum_to_one(dtype: torch.dtype, tau: float) -> None:
    # Rounded rows do not sum to one, so 1 - p is not the mass outside the span.
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(4000, 40, generator=generator) * 2
    logits[:, 5:9] += torch.linspace(-10, 14, 4000)[:, None]
    pattern = logits.softmax(dim=-1).to(dtype)
    result = split_softmax(pattern, (5, 9), tau)
    assert result.dtype == dtype
    spread = float((pattern.double().sum(dim=-1) - 1).abs().max())
    assert 0 < spread < 4e-3
    assert float((result.double().sum(dim=-1) - 1).abs().max()) < spread + 4e-3
    assert float(result.min()) >= 0


def random_rows(seed: int, keys: int = 7) -> torch.Tensor:
    return (torch.randn(3, keys, generator=torch.Generator().manual_seed(seed)).double() * 3).softmax(dim=-1)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(0, 20), st.floats(0, 20))
def test_more_tau_is_less_attention_on_the_span(seed: int, one: float, other: float) -> None:
    low, high = sorted((one, other))
    rows = random_rows(seed)
    at_low, at_high = (split_softmax(rows, (2, 5), tau)[:, 2:5].sum(dim=-1) for tau in (low, high))
    assert (at_low >= at_high - 1e-12).all()
    if high - low > 1e-3 and high < 5:
        assert (at_low > at_high).all()


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(0, 20))
def test_rows_sum_to_one_and_each_side_keeps_its_proportions(seed: int, tau: float) -> None:
    rows = random_rows(seed)
    result = split_softmax(rows, (2, 5), tau)
    torch.testing.assert_close(result.sum(dim=-1), torch.ones(3).double(), rtol=0, atol=1e-12)
    for keys in ([2, 3, 4], [0, 1, 5, 6]):
        before, after = rows[:, keys], result[:, keys]
        torch.testing.assert_close(after * before.sum(-1, keepdim=True), before * after.sum(-1, keepdim=True))
    p = rows[:, 2:5].sum(dim=-1)
    torch.testing.assert_close(result[:, 2:5].sum(dim=-1), p**tau)


@settings(max_examples=40)
@given(st.integers(0, 10_000), st.floats(0.1, 3), st.floats(0.1, 3))
def test_two_taus_in_a_row_are_their_product(seed: int, first: float, second: float) -> None:
    rows = random_rows(seed)
    twice = split_softmax(split_softmax(rows, (0, 3), first), (0, 3), second)
    torch.testing.assert_close(twice, split_softmax(rows, (0, 3), first * second), rtol=1e-6, atol=1e-9)


def test_a_mask_and_a_range_are_the_same_and_a_mask_may_differ_by_row() -> None:
    rows = random_rows(1)
    mask = torch.zeros(7, dtype=torch.bool)
    mask[2:5] = True
    assert torch.equal(split_softmax(rows, mask, 0.3), split_softmax(rows, (2, 5), 0.3))
    by_row = torch.stack([mask, ~mask, torch.zeros(7, dtype=torch.bool)])
    result = split_softmax(rows, by_row, 0.3)
    torch.testing.assert_close(result, by_hand(rows, by_row, 0.3))
    assert torch.equal(result[2], rows[2])
    batched = rows.reshape(1, 3, 1, 7).expand(2, 3, 4, 7)
    per_batch = torch.stack([mask, ~mask]).reshape(2, 1, 1, 7)
    result = split_softmax(batched, per_batch, 0.3)
    assert torch.equal(result[0, 1, 3], split_softmax(rows[1], (2, 5), 0.3))
    torch.testing.assert_close(result[1, 2, 0], by_hand(rows[2:], ~mask[None], 0.3)[0])


@pytest.mark.parametrize("tau", [0.0, 0.3, 2.0])
def test_gradients_are_those_of_finite_differences_and_finite_at_the_ends(tau: float) -> None:
    rows = random_rows(3)[:1].requires_grad_()
    weight = torch.arange(7).double()
    ((split_softmax(rows, (2, 5), tau) * weight).sum()).backward()
    assert rows.grad is not None
    for key in range(7):
        values: list[float] = []
        for step in (-1e-6, 1e-6):
            moved = rows.detach().clone()
            # Attention moves from key 0 to another key, so that the row's sum is constant.
            moved[0, key] += step
            moved[0, 0] -= step
            values.append(float((split_softmax(moved, (2, 5), tau) * weight).sum()))
        slope = (values[1] - values[0]) / 2e-6
        assert float(rows.grad[0, key] - rows.grad[0, 0]) == pytest.approx(slope, abs=1e-5)
    ends = rows_of_mass(0.0, 1.0).requires_grad_()
    split_softmax(ends, SPAN, tau).sum().backward()
    assert ends.grad is not None
    assert torch.equal(ends.grad, torch.ones_like(ends))


@pytest.mark.parametrize("tau", [-0.1, math.nan, math.inf])
def test_a_tau_that_makes_no_sense_is_refused(tau: float) -> None:
    with pytest.raises(ValueError, match=f"tau is {tau}"):
        split_softmax(torch.ones(1, 1), (0, 1), tau)
    with pytest.raises(ValueError, match=f"tau is {tau}"):
        SplitSoftmax([(0, 0)], tau)


@pytest.mark.parametrize("span", [(0, 6), (2, 2), (3, 2), (-1, 3)])
def test_a_span_outside_the_rows_is_refused(span: tuple[int, int]) -> None:
    for tau in (0.3, 1.0):
        with pytest.raises(ValueError, match=rf"span \({span[0]}, {span[1]}\) does not lie in rows of 5 keys"):
            split_softmax(torch.full((2, 5), 0.2), span, tau)


# --- hooks ---

PROMPT = EncodedPrompt(torch.arange(6), {"relevant": ((1, 3),), "other": ((4, 5),), "nothing": ()})
SHORT = EncodedPrompt(torch.arange(4), {"relevant": ((0, 1), (2, 3))})


@pytest.fixture(params=[10**9, -1], ids=["edits all heads", "edits chosen heads"])
def model(load_model: Any, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> FocusModel:
    """A model whose other heads are multiplied by one, or left out of the edit. Both give the same numbers."""
    module = sys.modules["focuslens.interventions.split_softmax"]  # the package re-exports a function of this name
    monkeypatch.setattr(module, "_WORTH_CHOOSING", request.param)
    return load_model("llama")


def causal(batch: int, n_rows: int, n_keys: int) -> torch.Tensor:
    logits = torch.randn(batch, 4, n_rows, n_keys, generator=torch.Generator().manual_seed(5))
    visible = torch.arange(n_keys) <= torch.arange(n_keys - n_rows, n_keys)[:, None]
    return logits.masked_fill(~visible, -torch.inf).softmax(dim=-1)


def expected_rows(pattern: torch.Tensor, columns: dict[int, set[int]], heads: set[int], first: int) -> torch.Tensor:
    """The pattern after equation 3 has edited the rows of ``heads`` from ``first`` on.

    ``columns`` maps a sample to its span.
    """
    result = pattern.clone().double()
    n_keys = pattern.shape[-1]
    for sample, span in columns.items():
        inside = torch.tensor([[key in span for key in range(n_keys)]])
        for head in heads:
            for row in range(first, pattern.shape[-2]):
                result[sample, head, row] = by_hand(pattern[sample, head, row][None], inside, 0.3)[0]
    return result


@pytest.mark.parametrize(
    ("n_rows", "n_keys", "first"),
    [
        (6, 6, 5),  # prompt alone: its last row
        (9, 9, 5),  # prompt and response in one pass
        (1, 9, 0),  # one response row, with a cache
        (3, 7, 1),  # end of the prompt and first response token, with a cache
        (3, 1006, 0),
    ],
)
def test_only_chosen_heads_change_and_only_on_response_rows(
    model: FocusModel, n_rows: int, n_keys: int, first: int
) -> None:
    (name, hook), (other_name, _) = SplitSoftmax([(2, 3), (0, 1), (2, 0)], 0.3).hooks(model, PROMPT)[::-1]
    assert (name, other_name) == ("blocks.2.attn.hook_pattern", "blocks.0.attn.hook_pattern")
    pattern = causal(1, n_rows, n_keys)
    before = pattern.clone()
    result = hook(pattern, None)
    assert result is not None
    assert torch.equal(pattern, before)
    torch.testing.assert_close(result.double(), expected_rows(pattern, {0: {1, 2}}, {0, 3}, first), rtol=0, atol=1e-6)
    assert torch.equal(result[:, [1, 2]], pattern[:, [1, 2]])
    assert torch.equal(result[:, :, :first], pattern[:, :, :first])
    assert not torch.allclose(result[:, [0, 3], first:], pattern[:, [0, 3], first:], atol=1e-2)


def test_rows_of_the_prompt_alone_are_left_to_the_model(model: FocusModel) -> None:
    # The chunk ends before the prompt's last token. A caller that runs a prompt in chunks passes each chunk's start.
    ((_, hook),) = SplitSoftmax([(1, 0)], 0.3).hooks(model, PROMPT, cursor=Cursor(2))
    assert hook(causal(1, 3, 5), None) is None


def test_spans_move_with_the_padding_of_a_batch(model: FocusModel) -> None:
    ((_, hook),) = SplitSoftmax([(1, 2)], 0.3).hooks(model, PromptBatch.of([PROMPT, SHORT]))
    pattern = causal(2, 2, 8)
    result = hook(pattern, None)
    assert result is not None
    # SHORT is left-padded by two tokens, so its tokens 0 and 2 are columns 2 and 4.
    expected = expected_rows(pattern, {0: {1, 2}, 1: {2, 4}}, {2}, 0)
    torch.testing.assert_close(result.double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize(("span", "columns"), [("other", {4}), ((0, 5), {0, 1, 2, 3, 4})])
def test_any_part_or_range_can_be_the_span(model: FocusModel, span: Any, columns: set[int]) -> None:
    ((_, hook),) = SplitSoftmax([(1, 2)], 0.3, span).hooks(model, PROMPT)
    pattern = causal(1, 1, 8)
    result = hook(pattern, None)
    assert result is not None
    torch.testing.assert_close(result.double(), expected_rows(pattern, {0: columns}, {2}, 0), rtol=0, atol=1e-6)


def test_a_part_that_is_empty_in_this_prompt_changes_nothing(model: FocusModel) -> None:
    ((_, hook),) = SplitSoftmax([(1, 2)], 0.3, "nothing").hooks(model, PROMPT)
    assert hook(causal(1, 2, 7), None) is None


def test_tau_one_changes_nothing(model: FocusModel) -> None:
    ((_, hook),) = SplitSoftmax([(1, 2)], 1.0).hooks(model, PROMPT)
    pattern = causal(1, 1, 8)
    result = hook(pattern, None)
    assert result is not None
    assert torch.equal(result, pattern)


def test_half_precision_stays_half_precision(model: FocusModel) -> None:
    ((_, hook),) = SplitSoftmax([(1, 2)], 0.3).hooks(model, PROMPT)
    result = hook(causal(1, 1, 8).bfloat16(), None)
    assert result is not None
    assert result.dtype == torch.bfloat16


def test_what_hooks_need_and_refuse(model: FocusModel) -> None:
    with pytest.raises(ValueError, match=r"split-softmax needs the prompt: intervention.hooks\(model, prompt\)"):
        SplitSoftmax([(0, 0)], 0.3).hooks(model)
    with pytest.raises(ValueError, match=r"head \(3, 0\) does not exist"):
        SplitSoftmax([(3, 0)], 0.3).hooks(model, PROMPT)
    with pytest.raises(ValueError, match="more than once"):
        SplitSoftmax([(0, 0), (0, 0)], 0.3).hooks(model, PROMPT)
    with pytest.raises(KeyError, match="no span 'gold'"):
        SplitSoftmax([(0, 0)], 0.3, "gold").hooks(model, PROMPT)
    with pytest.raises(ValueError, match="does not lie in a prompt of 6 tokens"):
        SplitSoftmax([(0, 0)], 0.3, (2, 7)).hooks(model, PROMPT)
    for span in ((2, 2), (3, 1), (-1, 2)):
        with pytest.raises(ValueError, match="0 <= start < end"):
            SplitSoftmax([(0, 0)], 0.3, span)


def test_it_is_a_frozen_value() -> None:
    one = SplitSoftmax([(1, 2), (0, 3)], 0.3, (4, 6))
    assert isinstance(one, Intervention)
    assert one == SplitSoftmax(((1, 2), (0, 3)), 0.3, (4, 6))
    assert one != SplitSoftmax(one.heads, 0.4, (4, 6))
    assert hash(one) == hash(SplitSoftmax(one.heads, 0.3, (4, 6)))
    assert one.changes_prompt is False
    with pytest.raises(AttributeError):
        one.tau = 1.0  # pyright: ignore[reportAttributeAccessIssue]
    expected = {"kind": "split_softmax", "tau": 0.3, "span": [4, 6], "heads": [[1, 2], [0, 3]]}
    assert json.loads(json.dumps(one.describe())) == expected


@pytest.mark.usefixtures("unchecked")
def test_heads_of_numpy_are_heads() -> None:
    heads = cast("Any", np.argwhere(np.eye(2, dtype=bool)))
    described = SplitSoftmax(heads, 0.3).describe()
    assert json.loads(json.dumps(described))["heads"] == [[0, 0], [1, 1]]


def test_a_cache_of_the_windows_keys_alone_is_refused_on_a_bridge(load_model, backend):
    """A bridge's cache drops keys outside the window, so the hook raises an error. HookedTransformer keeps all keys."""
    model = load_model("mistral_window", backend)
    window = model.backend.window(0)
    ((_, hook),) = SplitSoftmax([(0, 1)], tau=0.5, span=(0, 1)).hooks(model, model.encode("a b"))
    pattern = torch.full((1, model.shape.n_heads, 1, window), 1 / window)
    assert model.cache_window(0) == (window if backend == "bridge" else None)
    if backend == "bridge":
        with pytest.raises(ValueError, match=f"layer 0 has a sliding window of {window} keys"):
            hook(pattern, None)
    else:
        edited = hook(pattern, None)
        assert edited is not None
        assert edited.shape == pattern.shape
