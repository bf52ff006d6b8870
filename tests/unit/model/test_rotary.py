"""Rotary embedding against complex numbers, and the backends' rotary tables."""

from __future__ import annotations

import math
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from focuslens import FocusModel
from focuslens.model.backends import BridgeBackend, backend_for
from focuslens.model.rotary import Rotary, rotate
from tests.support.versions import needs_hooked

BASE = 10_000.0


def tables(n_pos: int, rotary_dim: int, *, adjacent_pairs: bool = False) -> tuple[torch.Tensor, torch.Tensor]:
    """Cosines and sines [pos rotary] in float64 of the angles ``position * base ** (-2 pair / rotary_dim)``."""
    pairs = rotary_dim // 2
    angles = torch.tensor(
        [[pos * BASE ** (-2 * pair / rotary_dim) for pair in range(pairs)] for pos in range(n_pos)],
        dtype=torch.float64,
    )
    angles = angles.repeat_interleave(2, dim=1) if adjacent_pairs else torch.cat((angles, angles), dim=1)
    return angles.cos(), angles.sin()


@pytest.mark.parametrize("adjacent_pairs", [False, True])
def test_pairs_turn_like_complex_numbers_and_the_rest_passes(adjacent_pairs: bool) -> None:
    x = torch.randn(5, 2, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    turned = rotate(x, *tables(5, 6, adjacent_pairs=adjacent_pairs), adjacent_pairs=adjacent_pairs)
    for pos in range(5):
        for head in range(2):
            for pair in range(3):
                real, imaginary = (2 * pair, 2 * pair + 1) if adjacent_pairs else (pair, pair + 3)
                angle = pos * BASE ** (-2 * pair / 6)
                z = complex(x[pos, head, real], x[pos, head, imaginary]) * complex(math.cos(angle), math.sin(angle))
                assert float(turned[pos, head, real]) == pytest.approx(z.real, abs=1e-12)
                assert float(turned[pos, head, imaginary]) == pytest.approx(z.imag, abs=1e-12)
    assert torch.equal(turned[..., 6:], x[..., 6:])
    assert torch.equal(turned[0], x[0])
    assert not torch.allclose(turned[1], x[1])


def test_products_depend_on_relative_position_alone() -> None:
    q, k = torch.randn(2, 1, 1, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    cos, sin = tables(30, 8)

    def product(i: int, j: int) -> float:
        return float((rotate(q, cos[[i]], sin[[i]]) * rotate(k, cos[[j]], sin[[j]])).sum())

    assert product(9, 4) == pytest.approx(product(29, 24))
    assert product(9, 4) != pytest.approx(product(9, 5), abs=1e-3)


def test_norms_come_first_each_its_own() -> None:
    cos, sin = (table.float() for table in tables(10, 4))
    rotary = Rotary(cos, sin, False, query_norm=lambda x: 2 * x, key_norm=lambda x: x + 1)
    x = torch.randn(3, 1, 4, generator=torch.Generator().manual_seed(2))
    positions = torch.tensor([7, 2, 9])
    torch.testing.assert_close(rotary.query(x, positions), rotate(2 * x, cos[positions], sin[positions]))
    torch.testing.assert_close(rotary.key(x, positions), rotate(x + 1, cos[positions], sin[positions]))
    plain = Rotary(cos, sin, False, query_norm=None, key_norm=None)
    torch.testing.assert_close(plain.key(x, positions), rotate(x, cos[positions], sin[positions]))


@pytest.mark.parametrize("name", ["llama", "llama_rope", "qwen2", "qwen3", "mistral_window"])
def test_it_is_the_step_between_the_two_sites_of_the_model(name: str, backend: str, load_model: Any) -> None:
    model: FocusModel = load_model(name, backend)
    tokens = torch.arange(3, 203)
    seen: dict[str, torch.Tensor] = {}

    def keep(point: str) -> Any:
        def observe(activation: torch.Tensor, hook: Any) -> None:
            seen[point] = activation[0].clone()

        return observe

    points = ("hook_q", "hook_k", "hook_rot_q", "hook_rot_k")
    model.observe(tokens, [(f"blocks.1.attn.{point}", keep(point)) for point in points])
    q, k, rot_q, rot_k = (seen[point] for point in points)
    positions = torch.arange(200)
    rotary = model.backend.rotary(1, 200)
    torch.testing.assert_close(rotary.query(q, positions), rot_q, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(rotary.key(k, positions), rot_k, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(q, rot_q, atol=0.1)
    # Without the prompt's rows, response rows are still rotated by their positions in the whole sequence.
    torch.testing.assert_close(rotary.query(q[150:], positions[150:]), rot_q[150:], rtol=1e-4, atol=1e-4)


@needs_hooked
def test_a_model_without_rotary_embedding_has_no_rotary_site() -> None:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    cfg = HookedTransformerConfig(
        n_layers=1, d_model=8, n_ctx=16, d_head=4, n_heads=2, d_vocab=10, act_fn="relu", device="cpu"
    )
    with pytest.raises(ValueError, match="positional embedding is 'standard', not 'rotary'"):
        backend_for(HookedTransformer(cfg)).rotary(0, 4)


def bridge_of(model: Any, attention: Any) -> BridgeBackend:
    """A backend with only the attributes that the tests read."""
    backend = BridgeBackend.__new__(BridgeBackend)
    block = SimpleNamespace(attn=SimpleNamespace(original_component=attention))
    backend.hooked = SimpleNamespace(original_model=model, blocks=[block])
    return backend


def test_a_bridge_whose_rotary_embedding_cannot_be_read_is_refused() -> None:
    backend = bridge_of(SimpleNamespace(base_model=SimpleNamespace()), SimpleNamespace())
    with pytest.raises(ValueError, match="rotated ones of SimpleNamespace cannot be differentiated here"):
        backend.rotary(0, 4)


@pytest.mark.parametrize(
    ("attention", "config", "expected"),
    [
        ({"sliding_window": None}, {"sliding_window": 7}, None),
        ({"sliding_window": 5}, {"sliding_window": 7}, 5),
        ({"sliding_window": 5, "is_sliding": True}, {"sliding_window": 7}, 5),
        ({"sliding_window": 5, "is_sliding": False}, {"sliding_window": 7}, None),
        # Only some classes read the window from the configuration, whatever else the configuration says.
        ({}, {"sliding_window": 7}, None),
        ("MistralAttention", {"sliding_window": 7}, 7),
        ("MistralAttention", {"sliding_window": 7, "use_sliding_window": False}, 7),
        ("MistralAttention", {}, None),
        ("LlamaAttention", {"sliding_window": 7, "layer_types": ["sliding_attention"]}, None),
    ],
)
def test_a_window_is_the_one_that_the_attention_class_reads(
    attention: dict[str, Any] | str, config: dict[str, Any], expected: int | None
) -> None:
    model = SimpleNamespace(config=SimpleNamespace(**config))
    layer = type(attention, (), {})() if isinstance(attention, str) else SimpleNamespace(**attention)
    assert bridge_of(model, layer).window(0) == expected
