"""Focus steering: the vectors that hooks add, and the heads and rows that they change, on synthetic tensors."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch

from focuslens import Cursor, EncodedPrompt, FocusDirections, FocusModel, FocusSteering, Intervention, PromptBatch

HEADS = [(2, 3), (0, 1), (2, 0), (2, 2)]  # heads of 3 layers with 4 query heads and 2 key-value heads
QUERY = torch.arange(4)[:, None] + torch.arange(16) / 16.0 + 1
KEY = -QUERY
PROMPT = EncodedPrompt(torch.arange(6), {})
SHORT = EncodedPrompt(torch.arange(4), {})


@pytest.fixture(scope="module")
def model(load_model: Any) -> FocusModel:
    return load_model("llama")


def directions(site: Any = "rotary", *, key: bool = True) -> FocusDirections:
    return FocusDirections(HEADS, QUERY, KEY if key else None, site)


def activation(n_rows: int, n_heads: int = 4, batch: int = 1) -> torch.Tensor:
    return torch.randn(batch, n_rows, n_heads, 16, generator=torch.Generator().manual_seed(0))


def changes(hook: Any, before: torch.Tensor) -> torch.Tensor:
    """Tensor that a hook adds to its input. The hook must not modify the input."""
    copy = before.clone()
    after = hook(before, None)
    assert torch.equal(before, copy)
    return torch.zeros_like(before) if after is None else after - before


def test_at_the_rotary_site_queries_alone_are_steered(model: FocusModel) -> None:
    hooks = FocusSteering(directions("rotary"), 2.0).hooks(model)
    assert [name for name, _ in hooks] == ["blocks.0.attn.hook_rot_q", "blocks.2.attn.hook_rot_q"]
    added = changes(hooks[1][1], activation(5))
    expected = torch.zeros(1, 5, 4, 16)
    for head, place in ((3, 0), (0, 2), (2, 3)):
        expected[:, :, head] = 2 * QUERY[place]
    torch.testing.assert_close(added, expected, rtol=0, atol=1e-5)
    added = changes(hooks[0][1], activation(5))
    assert added[:, :, [0, 2, 3]].abs().max() == 0
    torch.testing.assert_close(added[0, 3, 1], 2 * QUERY[1], rtol=0, atol=1e-5)


def test_at_the_projection_site_keys_are_steered_too(model: FocusModel) -> None:
    hooks = dict(FocusSteering(directions("projection"), -0.5).hooks(model))
    assert list(hooks) == [f"blocks.{layer}.attn.{point}" for point in ("hook_q", "hook_k") for layer in (0, 2)]
    queries = changes(hooks["blocks.2.attn.hook_q"], activation(5))
    torch.testing.assert_close(queries[0, 4, 2], -0.5 * QUERY[3], rtol=0, atol=1e-5)
    # Head 0 uses key-value head 0. Heads 2 and 3 share key-value head 1, whose vector is the mean of theirs.
    keys = changes(hooks["blocks.2.attn.hook_k"], activation(5, n_heads=2))
    expected = torch.stack([-0.5 * KEY[2], -0.5 * (KEY[0] + KEY[3]) / 2])
    torch.testing.assert_close(keys, expected.expand(1, 5, 2, 16), rtol=0, atol=1e-5)
    keys = changes(hooks["blocks.0.attn.hook_k"], activation(5, n_heads=2))
    torch.testing.assert_close(keys[0, 0], torch.stack([-0.5 * KEY[1], torch.zeros(16)]), rtol=0, atol=1e-5)


def test_without_key_vectors_queries_alone_are_steered(model: FocusModel) -> None:
    hooks = FocusSteering(directions("projection", key=False), 1.0).hooks(model)
    assert [name for name, _ in hooks] == ["blocks.0.attn.hook_q", "blocks.2.attn.hook_q"]


def test_some_heads_are_steered_in_the_order_given(model: FocusModel) -> None:
    steering = FocusSteering(directions(), 1.0, heads=[(2, 2), (2, 3)])
    assert steering.heads == ((2, 2), (2, 3))
    ((name, hook),) = steering.hooks(model)
    assert name == "blocks.2.attn.hook_rot_q"
    added = changes(hook, activation(2))
    torch.testing.assert_close(added[0, 1, 2], QUERY[3], rtol=0, atol=1e-5)
    torch.testing.assert_close(added[0, 1, 3], QUERY[0], rtol=0, atol=1e-5)
    assert added[:, :, :2].abs().max() == 0


@pytest.mark.parametrize(
    ("start", "n_rows", "first"),
    [
        (None, 6, 5),  # whole prompt: its last row
        (None, 9, 5),
        (None, 1, 0),  # one response row, with a cache
        (0, 6, 5),
        (3, 3, 2),  # end of a prompt that is run in chunks
        (0, 4, 4),  # beginning of this prompt: no row
        (6, 2, 0),
    ],
)
def test_only_rows_that_produce_the_response_change_where_asked(
    model: FocusModel, start: int | None, n_rows: int, first: int
) -> None:
    steering = FocusSteering(directions(), 1.0, positions="response")
    cursor = None if start is None else Cursor(start)
    for _, hook in steering.hooks(model, PromptBatch.of([PROMPT, SHORT]), cursor=cursor):
        added = changes(hook, activation(n_rows, batch=2))
        assert added[:, :first].abs().max() == 0 if first else True
        if first < n_rows:
            assert (added[:, first:].abs().amax(dim=(2, 3)) > 0.9).all()
    for _, hook in FocusSteering(directions(), 1.0).hooks(model, PROMPT, cursor=cursor):
        assert (changes(hook, activation(n_rows)).abs().amax(dim=(2, 3)) > 0.9).all()


def test_the_cursor_is_read_when_the_hook_runs(model: FocusModel) -> None:
    cursor = Cursor(0)
    ((_, hook), _) = FocusSteering(directions(), 1.0, positions="response").hooks(model, PROMPT, cursor=cursor)
    assert changes(hook, activation(2)).abs().max() == 0
    cursor.start = 6
    assert changes(hook, activation(2)).abs().max() > 0.9


def test_strength_zero_changes_nothing_and_strengths_are_proportional(model: FocusModel) -> None:
    before = activation(3)
    for (_, nothing), (_, once), (_, thrice) in zip(
        *(FocusSteering(directions("projection", key=False), alpha).hooks(model) for alpha in (0.0, 1.0, -3.0)),
        strict=True,
    ):
        assert torch.equal(nothing(before, None), before)
        torch.testing.assert_close(changes(thrice, before), -3 * changes(once, before), rtol=0, atol=1e-5)


def test_half_precision_stays_half_precision(model: FocusModel) -> None:
    ((_, hook), _) = FocusSteering(directions(), 0.3).hooks(model)
    before = activation(2).bfloat16()
    after = hook(before, None)
    assert after is not None
    assert after.dtype == torch.bfloat16
    torch.testing.assert_close(after[0, 0, 1], before[0, 0, 1] + (0.3 * QUERY[1]).bfloat16())


@pytest.mark.parametrize("alpha", [math.nan, math.inf, -math.inf])
def test_a_strength_that_is_not_finite_is_refused(alpha: float) -> None:
    with pytest.raises(ValueError, match=f"alpha is {alpha}; it must be a finite number"):
        FocusSteering(directions(), alpha)


@pytest.mark.usefixtures("unchecked")
def test_unknown_positions_are_refused() -> None:
    with pytest.raises(ValueError, match="positions is 'prompt'; it must be one of all, response"):
        FocusSteering(directions(), 1.0, positions="prompt")  # pyright: ignore[reportArgumentType]


def test_what_hooks_need_and_refuse(model: FocusModel) -> None:
    with pytest.raises(ValueError, match=r'positions="response" needs the prompt: intervention.hooks\(model, prompt\)'):
        FocusSteering(directions(), 1.0, positions="response").hooks(model)
    with pytest.raises(ValueError, match="no direction for L1H1"):
        FocusSteering(directions(), 1.0, heads=[(1, 1)])
    with pytest.raises(ValueError, match="d_head = 8, the model has 16"):
        FocusSteering(FocusDirections([(0, 0)], torch.zeros(1, 8)), 1.0).hooks(model)
    with pytest.raises(ValueError, match=r"head \(3, 0\) does not exist"):
        FocusSteering(FocusDirections([(3, 0)], torch.zeros(1, 16)), 1.0).hooks(model)


def test_it_describes_itself_as_json() -> None:
    steering = FocusSteering(directions("projection"), 1, heads=HEADS[:2], positions="response")
    assert isinstance(steering, Intervention)
    assert json.loads(json.dumps(steering.describe())) == {
        "kind": "focus_steering",
        "alpha": 1.0,
        "site": "projection",
        "positions": "response",
        "directions_sha256": directions("projection").select(HEADS[:2]).digest,
        "heads": [[2, 3], [0, 1]],
    }
    assert steering.changes_prompt is False
    assert FocusSteering(directions(), 1).changes_prompt is True
    with pytest.raises(AttributeError):
        steering.alpha = 2.0  # pyright: ignore[reportAttributeAccessIssue]


@pytest.mark.parametrize("site", ["rotary", "projection"])
def test_the_model_attends_otherwise_on_steered_heads_alone(load_model: Any, backend: str, site: Any) -> None:
    """Steering changes the pattern of steered heads only.

    At the rotary site, a query vector in the direction of a key increases attention to that key.
    """
    model: FocusModel = load_model("llama", backend)
    tokens = torch.arange(5, 25)
    point = "hook_rot_k" if site == "rotary" else "hook_k"
    keys: list[torch.Tensor] = []
    model.observe(tokens, [(f"blocks.1.attn.{point}", lambda k, hook: keys.append(k[0, 4, 1].clone()))])
    direction = keys[0] / keys[0].norm()
    patterns: list[torch.Tensor] = []
    for alpha in (-4.0, 0.0, 4.0):
        steering = FocusSteering(FocusDirections([(1, 2)], direction[None], site=site), alpha)
        hooks = steering.hooks(model)
        with model.hooked.hooks(fwd_hooks=hooks):
            model.observe(tokens, [("blocks.1.attn.hook_pattern", lambda w, hook: patterns.append(w[0].clone()))])
    less, plain, more = (pattern[2, 4:, 4].mean() for pattern in patterns)
    if site == "rotary":
        assert less < plain < more
    assert not torch.allclose(patterns[0][2], patterns[1][2], atol=1e-2)
    assert torch.equal(patterns[0][[0, 1, 3]], patterns[2][[0, 1, 3]])
