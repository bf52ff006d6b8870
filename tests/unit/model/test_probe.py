"""An intervention that an architecture would ignore raises an error, in FocusLens and in plain hooks."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPTNeoXConfig,
    OPTConfig,
    Phi3Config,
)

import focuslens as fl
from tests.support.checkpoints import build_checkpoint

SIZES: dict[str, Any] = {
    "vocab_size": 500, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "pad_token_id": 2,
    "bos_token_id": 0, "eos_token_id": 1, "max_position_embeddings": 512, "initializer_range": 0.2,
}  # fmt: skip
CONFIGS = {
    "phi3": Phi3Config(**SIZES, num_key_value_heads=2, intermediate_size=48),
    "neox": GPTNeoXConfig(**SIZES, intermediate_size=48),
    "opt": OPTConfig(**{k: v for k, v in SIZES.items() if k != "initializer_range"}, ffn_dim=48, init_std=0.2),
}
PROMPT = fl.EncodedPrompt(torch.arange(5, 25), {"relevant": ((3, 9),)})
QUERY = torch.ones(1, 8)


@pytest.fixture(scope="module")
def other(tmp_path_factory):
    """Bridges of architectures whose attention is partly or entirely computed outside TransformerLens."""

    def load(name: str) -> fl.FocusModel:
        directory = build_checkpoint("llama", tmp_path_factory.mktemp(name))
        for file in directory.glob("*.safetensors"):
            file.unlink()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(3)
            AutoModelForCausalLM.from_config(CONFIGS[name]).save_pretrained(directory)
        return fl.FocusModel.from_pretrained(str(directory), backend="bridge", device="cpu", chat=False)

    return load


def _moves(model: fl.FocusModel, intervention: fl.Intervention) -> float:
    tokens = PROMPT.tokens
    changed = model.logits(tokens, [intervention], prompt=PROMPT)
    return float((changed - model.logits(tokens)).abs().max())


@pytest.mark.parametrize("name", list(CONFIGS))
def test_whatever_is_not_refused_acts(name, other):
    model = other(name)
    directions = {site: fl.FocusDirections([(0, 1)], QUERY, site=site) for site in ("rotary", "projection")}
    interventions = {
        "split": fl.SplitSoftmax([(0, 1)], 0.0),
        "knockout": fl.HeadAblation([(0, 1)], "knockout", span="relevant"),
        "zero": fl.HeadAblation([(0, 1)]),
        "rotary": fl.FocusSteering(directions["rotary"], 5.0),
        "projection": fl.FocusSteering(directions["projection"], 5.0),
    }
    refused: set[str] = set()
    for kind, intervention in interventions.items():
        try:
            assert _moves(model, intervention) > 1e-4, kind
        except ValueError:
            refused.add(kind)
            # Plain hooks raise an error too. Otherwise a user would not notice that they have no effect.
            with pytest.raises(ValueError, match=r"would have no effect|never fires|would be ignored"):
                intervention.hooks(model, PROMPT)
    # GPT-NeoX rotates inside Hugging Face's code, and OPT has no rotary embedding. Phi-3 rotates there too, but runs on
    # the attention engine, so that only plain hooks are refused.
    assert ("rotary" in refused) == (name != "phi3")
    assert len(refused) < len(interventions)
    with pytest.raises(ValueError, match=r"would have no effect|never fires|would be ignored"):
        interventions["rotary"].hooks(model, PROMPT)


def test_training_says_that_a_site_cannot_be_seen(other, samples):
    model = other("neox")
    with pytest.raises(ValueError, match=r"hook_rot_. of this TransformerBridge \(GPTNeoXForCausalLM\) never fires"):
        fl.train_focus_directions(model, samples[3:], [(0, 1)], site="rotary", max_new_tokens=2)


def test_the_probe_leaves_no_hook_and_no_random_state(load_model, backend):
    model = fl.FocusModel(load_model("llama", backend).hooked, load_model("llama", backend).tokenizer)
    state, before = torch.random.get_rng_state(), model.logits(PROMPT)
    model.points.require_acting(["blocks.0.attn.hook_pattern", "blocks.2.attn.hook_rot_q"])
    assert torch.equal(torch.random.get_rng_state(), state)
    assert all(not point.fwd_hooks for point in model.hooked.hook_dict.values())
    assert torch.equal(model.logits(PROMPT), before)


def test_hooks_made_inside_a_users_own_hooks_are_possible(load_model, backend, samples):
    """Hooks can be created inside a ``hooks()`` context.

    The probe runs a pass of four tokens, on which the outer hooks for a longer prompt would raise an error.
    """
    loaded = load_model("llama", backend)
    model, prompt = fl.FocusModel(loaded.hooked, loaded.tokenizer), samples[0].prompt()
    one, other_one = fl.SplitSoftmax([(1, 1)], 0.1), fl.HeadAblation([(2, 0)])
    tokens = model.to_tokens(prompt)
    with model.hooked.hooks(fwd_hooks=one.hooks(model, prompt)):
        nested = model.hooked.run_with_hooks(tokens, fwd_hooks=other_one.hooks(model, prompt))
    both = [*one.hooks(model, prompt), *other_one.hooks(model, prompt)]
    torch.testing.assert_close(nested, model.hooked.run_with_hooks(tokens, fwd_hooks=both))


def test_the_probe_is_none_of_a_users_hooks_business(load_model, backend, samples):
    """A user's hooks do not see the passes of the probe, and are unchanged afterwards."""
    loaded, prompt = load_model("llama", backend), samples[0].prompt()
    tokens, seen = loaded.to_tokens(prompt), []
    user = [("blocks.1.attn.hook_z", lambda z, hook: seen.append(z.shape[1]))]
    first = fl.SplitSoftmax([(1, 1)], 0.1)
    with loaded.hooked.hooks(fwd_hooks=[*user, *first.hooks(loaded, prompt)]):
        another = fl.FocusModel(loaded.hooked, loaded.tokenizer)
        hooks = fl.SplitSoftmax([(2, 0)], 0.1).hooks(another, prompt)
        assert seen == []
        inside = loaded.hooked(tokens)
        assert seen == [tokens.shape[1]]
    assert hooks
    torch.testing.assert_close(
        inside, loaded.hooked.run_with_hooks(tokens, fwd_hooks=first.hooks(loaded, prompt)), atol=1e-5, rtol=0
    )


def test_a_layer_that_writes_nothing_is_no_reason_to_refuse_another(checkpoint, backend):
    model = fl.FocusModel.from_pretrained(str(checkpoint("llama")), backend=backend, device="cpu")
    hooks = [("blocks.0.hook_attn_out", lambda out, hook: torch.zeros_like(out))]
    prompt = fl.EncodedPrompt(torch.arange(5, 25), {"relevant": ((3, 9),)})
    with model.hooked.hooks(fwd_hooks=hooks):
        assert fl.SplitSoftmax([(2, 0)], 0.1).hooks(model, prompt)
    with torch.no_grad():
        ends = ("attn.W_O", "o_proj._original_component.weight")
        weights = [p for n, p in model.hooked.named_parameters() if "s.0." in n and n.endswith(ends)]
        assert len(weights) == 1
        for weight in weights:
            weight.zero_()
    fresh = fl.FocusModel(model.hooked, model.tokenizer)
    assert fl.SplitSoftmax([(2, 0)], 0.1).hooks(fresh, prompt)


def test_what_acts_later_is_not_refused_for_what_it_was(load_model, backend, monkeypatch):
    loaded = load_model("llama", backend)
    model = fl.FocusModel(loaded.hooked, loaded.tokenizer)
    names = ["blocks.0.attn.hook_pattern"]
    with monkeypatch.context() as patch:
        patch.setattr("focuslens.model.hook_points._disturb", lambda tensor, hook: None)
        with pytest.raises(ValueError, match="ignores what a hook returns"):
            model.points.require_acting(names)
    model.points.require_acting(names)


def test_what_a_model_has_is_asked_once(checkpoint, backend, monkeypatch):
    model = fl.FocusModel.from_pretrained(str(checkpoint("llama")), backend=backend, device="cpu")
    names = [f"blocks.{layer}.attn.hook_z" for layer in range(model.shape.n_layers)]
    asked, real = [], getattr(type(model.hooked), "hook_dict", None)
    if not isinstance(real, property):
        pytest.skip("only a bridge makes its dictionary anew")
    monkeypatch.setattr(
        type(model.hooked), "hook_dict", property(lambda self: (asked.append(1), real.__get__(self))[1])
    )
    model.points.require_firing(names)
    assert asked
    asked.clear()
    model.points.require_firing(names)
    assert not asked
    with pytest.raises(ValueError, match=r"has no hook point 'blocks\.0\.attn\.hook_nothing'"):
        model.points.require_firing([*names, "blocks.0.attn.hook_nothing"])
