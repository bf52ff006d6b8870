"""Ablations: replacement of head outputs, and attention that cannot reach a span."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch

from focuslens import (
    Cursor,
    EncodedPrompt,
    FocusModel,
    HeadAblation,
    Intervention,
    MultiDocSample,
    PromptBatch,
    mean_head_outputs,
)

HEADS = [(2, 3), (0, 1), (2, 0)]
MEAN = torch.arange(3)[:, None] + torch.arange(16) / 16.0 + 1
PROMPT = EncodedPrompt(torch.arange(6), {"relevant": ((1, 3),), "all": ((0, 6),)})
SHORT = EncodedPrompt(torch.arange(4), {"relevant": ((0, 1), (2, 3)), "all": ((0, 4),)})
NONE = -torch.inf


@pytest.fixture(scope="module")
def model(load_model: Any) -> FocusModel:
    return load_model("llama")


def outputs(n_rows: int, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, n_rows, 4, 16, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("mode", ["zero", "mean"])
def test_outputs_of_chosen_heads_are_replaced(model: FocusModel, mode: Any) -> None:
    hooks = HeadAblation(HEADS, mode, mean=MEAN if mode == "mean" else None).hooks(model)
    assert [name for name, _ in hooks] == ["blocks.0.attn.hook_z", "blocks.2.attn.hook_z"]
    before = outputs(5, batch=2)
    copy = before.clone()
    for (_, hook), chosen in zip(hooks, ({1: 1}, {3: 0, 0: 2}), strict=True):
        after = hook(before, None)
        assert after is not None
        assert torch.equal(before, copy)
        for head in range(4):
            if head not in chosen:
                assert torch.equal(after[:, :, head], before[:, :, head])
            else:
                expected = MEAN[chosen[head]] if mode == "mean" else torch.zeros(16)
                assert torch.equal(after[:, :, head], expected.expand(2, 5, 16))


@pytest.mark.parametrize(("start", "n_rows", "first"), [(None, 6, 5), (None, 1, 0), (3, 3, 2), (0, 4, 4), (7, 2, 0)])
def test_outputs_are_replaced_on_response_rows_where_asked(
    model: FocusModel, start: int | None, n_rows: int, first: int
) -> None:
    cursor = None if start is None else Cursor(start)
    ablation = HeadAblation([(1, 2)], "zero", positions="response")
    ((_, hook),) = ablation.hooks(model, PromptBatch.of([PROMPT, SHORT]), cursor=cursor)
    before = outputs(n_rows, batch=2)
    after = hook(before, None)
    assert after is not None
    assert torch.equal(after[:, :first], before[:, :first])
    assert not after[:, first:, 2].any()
    assert torch.equal(after[:, :, [0, 1, 3]], before[:, :, [0, 1, 3]])


def test_the_mean_does_not_follow_the_tensor_it_was_given_as(model: FocusModel) -> None:
    mean = torch.ones(1, 16)
    ablation = HeadAblation([(1, 2)], "mean", mean=mean)
    mean.zero_()
    ((_, hook),) = ablation.hooks(model)
    after = hook(outputs(1), None)
    assert after is not None
    assert torch.equal(after[0, 0, 2], torch.ones(16))


def test_half_precision_stays_half_precision(model: FocusModel) -> None:
    ((_, hook),) = HeadAblation([(1, 2)], "mean", mean=MEAN[:1]).hooks(model)
    after = hook(outputs(2).bfloat16(), None)
    assert after is not None
    assert after.dtype == torch.bfloat16


# --- knockout ---


def scores(n_rows: int, n_keys: int, batch: int = 1, masked: float = NONE) -> torch.Tensor:
    values = torch.randn(batch, 4, n_rows, n_keys, generator=torch.Generator().manual_seed(0))
    visible = torch.arange(n_keys) <= torch.arange(n_keys - n_rows, n_keys)[:, None]
    return values.masked_fill(~visible, masked)


@pytest.mark.parametrize("masked", [NONE, torch.finfo(torch.float32).min])
@pytest.mark.parametrize(("n_rows", "n_keys", "first"), [(6, 6, 5), (8, 8, 5), (1, 9, 0), (3, 7, 1), (2, 507, 0)])
def test_scores_on_the_span_become_minus_infinity(
    model: FocusModel, n_rows: int, n_keys: int, first: int, masked: float
) -> None:
    ((name, hook),) = HeadAblation([(1, 2), (1, 0)], "knockout", span="relevant").hooks(model, PROMPT)
    assert name == "blocks.1.attn.hook_attn_scores"
    before = scores(n_rows, n_keys, masked=masked)
    copy = before.clone()
    after = hook(before, None)
    assert after is not None
    assert torch.equal(before, copy)
    expected = before.clone()
    for head in (0, 2):
        for row in range(first, n_rows):
            expected[0, head, row, 1:3] = NONE
    assert torch.equal(after, expected)


def test_spans_move_with_the_padding_of_a_batch(model: FocusModel) -> None:
    batch = PromptBatch.of([PROMPT, SHORT])
    ((_, hook),) = HeadAblation([(1, 2)], "knockout", span="relevant").hooks(model, batch)
    after = hook(scores(1, 8, batch=2), None)
    assert after is not None
    assert after[0, 2, 0].isinf().nonzero().flatten().tolist() == [1, 2]
    assert after[1, 2, 0].isinf().nonzero().flatten().tolist() == [2, 4]


@pytest.mark.parametrize("masked", [NONE, torch.finfo(torch.float32).min])
def test_rows_that_would_see_nothing_stay_as_they_are(model: FocusModel, masked: float) -> None:
    ablation = HeadAblation([(1, 2)], "knockout", span=(0, 3), positions="all")
    assert ablation.changes_prompt
    ((_, hook),) = ablation.hooks(model, PROMPT)
    before = scores(6, 6, masked=masked)
    after = hook(before, None)
    assert after is not None
    # Rows 0 to 2 see only keys of the span.
    assert torch.equal(after[:, :, :3], before[:, :, :3])
    for row in (3, 4, 5):
        assert (after[0, 2, row, :3] == NONE).all()
        assert torch.equal(after[0, 2, row, 3:], before[0, 2, row, 3:])
    assert torch.isfinite(after.softmax(dim=-1)).all()


def test_rows_before_the_response_are_left_to_the_model(model: FocusModel) -> None:
    # The chunk ends before the prompt's last token. A caller that runs a prompt in chunks passes each chunk's start.
    ((_, hook),) = HeadAblation([(1, 2)], "knockout", span="relevant").hooks(model, PROMPT, cursor=Cursor(2))
    assert hook(scores(3, 5), None) is None


def test_attention_to_the_span_is_gone_and_the_rest_keeps_its_proportions(load_model: Any, backend: str) -> None:
    model: FocusModel = load_model("llama", backend)
    prompt = EncodedPrompt(torch.arange(5, 25), {"relevant": ((3, 9),)})
    ablation = HeadAblation([(1, 2)], "knockout", span="relevant", positions="all")
    patterns: list[torch.Tensor] = []
    observers: list[Any] = [("blocks.1.attn.hook_pattern", lambda w, hook: patterns.append(w[0].clone()))]
    for interventions in ([], [ablation]):
        with model.intervened(interventions, prompt):
            model.observe(prompt.tokens, observers)
    plain, cut = patterns
    assert float(plain[2, 9:, 3:9].sum(dim=-1).min()) > 0
    assert not cut[2, 9:, 3:9].any()
    left = torch.ones(20)
    left[3:9] = 0
    expected = plain[2, 9:] * left
    torch.testing.assert_close(cut[2, 9:], expected / expected.sum(dim=-1, keepdim=True), rtol=1e-4, atol=1e-5)
    assert torch.equal(cut[[0, 1, 3]], plain[[0, 1, 3]])


# --- means ---


def test_means_are_over_every_token_of_every_prompt(
    load_model: Any, backend: str, samples: list[MultiDocSample]
) -> None:
    model: FocusModel = load_model("llama", backend)
    prompts = [samples[0].prompt("gold"), "A short one.", samples[1].prompt("gold")]
    seen: dict[int, list[torch.Tensor]] = {0: [], 2: []}
    for prompt in prompts:
        observers: list[Any] = [
            (f"blocks.{layer}.attn.hook_z", lambda z, hook, layer=layer: seen[layer].append(z[0].double().clone()))
            for layer in seen
        ]
        model.observe(model.encode(prompt).tokens, observers)
    means = mean_head_outputs(model, iter(prompts), HEADS)
    assert means.dtype == torch.float32
    for vector, (layer, head) in zip(means, HEADS, strict=True):
        expected = torch.cat([z[:, head] for z in seen[layer]]).mean(dim=0)
        torch.testing.assert_close(vector.double(), expected, rtol=1e-5, atol=1e-6)
    assert not torch.allclose(means[0], means[2], atol=1e-3)


def test_means_of_nothing_are_refused(model: FocusModel) -> None:
    with pytest.raises(ValueError, match="prompts is empty"):
        mean_head_outputs(model, [], HEADS)
    with pytest.raises(ValueError, match="does not exist"):
        mean_head_outputs(model, ["text"], [(0, 4)])


# --- arguments ---


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"mode": "random"}, "mode is 'random'; it must be one of zero, mean, knockout"),
        ({"mode": "mean"}, "mean is needed with mode='mean'"),
        ({"mode": "zero", "mean": MEAN}, "mean has no use with mode='zero'"),
        ({"mode": "knockout"}, "span is needed with mode='knockout'"),
        ({"mode": "zero", "span": "relevant"}, "span has no use with mode='zero'"),
        ({"mode": "mean", "mean": MEAN[:2]}, r"mean has shape \(2, 16\); for 3 heads it must be \(3, d_head\)"),
        ({"mode": "mean", "mean": MEAN[0]}, r"mean has shape \(16,\)"),
        ({"mode": "knockout", "span": (3, 3)}, "0 <= start < end"),
        ({"mode": "zero", "positions": "prompt"}, "positions is 'prompt'"),
    ],
)
def test_arguments_that_do_not_fit_the_mode_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        HeadAblation(HEADS, **arguments)


def test_what_hooks_need_and_refuse(model: FocusModel) -> None:
    with pytest.raises(ValueError, match="this ablation needs the prompt"):
        HeadAblation(HEADS, "knockout", span="relevant").hooks(model)
    with pytest.raises(ValueError, match="this ablation needs the prompt"):
        HeadAblation(HEADS, positions="response").hooks(model)
    with pytest.raises(KeyError, match="no span 'gold'"):
        HeadAblation(HEADS, "knockout", span="gold").hooks(model, PROMPT)
    with pytest.raises(ValueError, match=r"head \(0, 4\) does not exist"):
        HeadAblation([(0, 4)]).hooks(model)
    with pytest.raises(ValueError, match="mean has vectors of 8 numbers, the model has d_head = 16"):
        HeadAblation(HEADS, "mean", mean=torch.zeros(3, 8)).hooks(model)


def test_it_describes_itself_as_json() -> None:
    knockout = HeadAblation(HEADS, "knockout", span=(1, 4))
    assert isinstance(knockout, Intervention)
    described = json.loads(json.dumps(knockout.describe()))
    assert described.items() >= {"kind": "head_ablation", "mode": "knockout", "span": [1, 4]}.items()
    assert described["heads"] == [[2, 3], [0, 1], [2, 0]]
    assert (knockout.positions, knockout.changes_prompt) == ("response", False)
    zero = HeadAblation(HEADS)
    assert (zero.mode, zero.positions, zero.changes_prompt) == ("zero", "all", True)
    with pytest.raises(AttributeError):
        zero.mode = "mean"  # pyright: ignore[reportAttributeAccessIssue]


def test_different_means_are_described_differently() -> None:
    # A run may resume only if the descriptions in its result file match.
    one, other = (HeadAblation(HEADS, "mean", mean=mean).describe() for mean in (MEAN, -MEAN))
    json.dumps([one, other])
    assert one != other
    assert HeadAblation(HEADS, "mean", mean=MEAN.clone()).describe() == one
