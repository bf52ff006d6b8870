"""Fused attention: plain TransformerLens's numbers and hooks, without its patterns, and only where nobody looks."""

from __future__ import annotations

from importlib.metadata import version

import pytest
import torch
from torch import nn

from focuslens.attention import fused_attention, visible_keys

pytestmark = pytest.mark.skipif(
    int(version("transformer-lens").split(".")[0]) >= 4, reason="TransformerLens 4 has no HookedTransformer"
)

# Another order of summation in float32: a few units in the last place of logits of size 10.
TOLERANCE = 1e-4
MODELS = ("llama", "qwen2", "qwen3", "mistral_window")


def _counted(monkeypatch):
    """How often the fused kernel ran."""
    calls = []
    original = nn.functional.scaled_dot_product_attention

    def count(*args, **kwargs):
        calls.append(kwargs)
        return original(*args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", count)
    return calls


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_plain_transformer_lens(name, load_model, samples, monkeypatch):
    model = load_model(name, "hooked")
    calls = _counted(monkeypatch)
    tokens = model.to_tokens(samples[0].prompt())
    plain = model.hooked(tokens)
    assert calls == []
    with fused_attention(model.hooked):
        fused = model.hooked(tokens)
    assert len(calls) == model.shape.n_layers
    torch.testing.assert_close(fused, plain, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_a_padded_batch_with_a_cache_gives_the_logits_of_each_prompt_alone(name, load_model, samples):
    model = load_model(name, "hooked")
    prompts = [sample.prompt() for sample in samples]
    new = torch.arange(5, 11).repeat(len(prompts), 1)
    logits, _ = model.extend(model.prefill(prompts), new)
    for i, prompt in enumerate(prompts):
        alone = model.hooked(torch.cat((model.to_tokens(prompt), new[:1]), dim=1))[0, -6:]
        torch.testing.assert_close(logits[i], alone, atol=TOLERANCE, rtol=0)


def test_every_hook_but_scores_and_pattern_fires_with_the_same_value(load_model, samples):
    model = load_model("llama", "hooked")
    tokens = model.to_tokens(samples[0].prompt())
    points = ("hook_q", "hook_k", "hook_v", "hook_rot_q", "hook_rot_k", "hook_z")
    names = [f"blocks.1.attn.{point}" for point in points] + ["blocks.1.hook_resid_post"]
    _, plain = model.hooked.run_with_cache(tokens, names_filter=names)
    with fused_attention(model.hooked):
        _, fused = model.hooked.run_with_cache(tokens, names_filter=names)
    for name in names:
        torch.testing.assert_close(fused[name], plain[name], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("point", ["hook_pattern", "hook_attn_scores"])
def test_a_layer_that_somebody_looks_at_is_computed_in_full(point, load_model, samples, monkeypatch):
    model = load_model("llama", "hooked")
    calls = _counted(monkeypatch)
    seen = []
    hook = (f"blocks.1.attn.{point}", lambda tensor, hook: seen.append(tuple(tensor.shape)))
    tokens = model.to_tokens(samples[0].prompt())
    with model.hooked.hooks(fwd_hooks=[hook]), fused_attention(model.hooked):
        model.hooked(tokens)
    assert seen == [(1, model.shape.n_heads, tokens.shape[1], tokens.shape[1])]
    assert len(calls) == model.shape.n_layers - 1


def test_nothing_is_left_behind_by_an_exception(load_model, samples):
    model = load_model("llama", "hooked")
    forwards = [block.attn.forward for block in model.hooked.blocks]
    with pytest.raises(RuntimeError, match="stop"), fused_attention(model.hooked):
        raise RuntimeError("stop")
    assert [block.attn.forward for block in model.hooked.blocks] == forwards


def test_what_is_not_plain_attention_is_left_to_transformer_lens(load_model, samples, monkeypatch):
    model = load_model("llama", "hooked")
    calls = _counted(monkeypatch)
    monkeypatch.setattr(model.hooked.cfg, "attn_scores_soft_cap", 30.0)
    with fused_attention(model.hooked):
        model.hooked(model.to_tokens(samples[0].prompt()))
    assert calls == []


def test_visible_keys_by_hand():
    device = torch.device("cpu")
    mask = torch.tensor([[0, 1, 1, 1]])
    padded = visible_keys(4, 4, mask, None, device)[0, 0].int().tolist()
    assert padded == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    last_two = visible_keys(2, 4, None, 2, device)[0, 0].int().tolist()
    assert last_two == [[0, 1, 1, 0], [0, 0, 1, 1]]
