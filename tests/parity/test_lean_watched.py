"""Layers run from their weights only where nothing is lost by it: hooks, edits and modes that need the modules act."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import focuslens as fl
from focuslens.hooks import RowHook
from focuslens.model import lean_attention
from focuslens.model.decoding_settings import DecodingSettings
from tests.parity.test_lean import HEADS, INTERVENTIONS, MODELS, TOLERANCE, ran, traced
from tests.support.versions import needs_hooked

__all__ = ["ran"]


def logits_of(model: fl.FocusModel, prompts: Any, monkeypatch: Any, lean: bool, n: int = 4) -> Tensor:
    with monkeypatch.context() as patched:
        patched.setattr(model, "lean", lean)
        return traced(model, prompts, [fl.SplitSoftmax(HEADS, 0.2)], monkeypatch, n=n)[1]


def answer(model: fl.FocusModel, prompt: Any, n: int) -> fl.Generation:
    """Response of exactly ``n`` tokens."""
    return model.decode(model.prefill(prompt), max_new_tokens=n, decoding=DecodingSettings((-1,)))[0]


@pytest.mark.parametrize("name", MODELS)
def test_prompts_beside_the_buffers_and_full_buffers_give_what_the_engine_gives(
    name: str, load_model: Any, backend: str, samples: Any, monkeypatch: Any, ran: list[int]
) -> None:
    model, prompts = load_model(name, backend), [sample.prompt() for sample in samples[:2]]
    monkeypatch.setattr(lean_attention, "_BLOCK", 4)
    monkeypatch.setattr(lean_attention, "_SMALL", 0)
    found = logits_of(model, prompts, monkeypatch, True, n=11)
    assert ran
    torch.testing.assert_close(found, logits_of(model, prompts, monkeypatch, False, n=11), atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("backend", [pytest.param("hooked", marks=needs_hooked)])
def test_rotary_tables_of_one_layer_can_be_edited(
    load_model: Any, backend: str, samples: Any, monkeypatch: Any, ran: list[int]
) -> None:
    model, prompts = load_model("llama", backend), [samples[0].prompt()]
    before = logits_of(model, prompts, monkeypatch, True)
    attention = model.hooked.blocks[1].attn
    cos, sin = attention.rotary_cos.clone(), attention.rotary_sin.clone()
    try:
        attention.rotary_cos.fill_(1)
        attention.rotary_sin.zero_()
        ran.clear()
        found, expected = (logits_of(model, prompts, monkeypatch, lean) for lean in (True, False))
        assert ran
    finally:
        attention.rotary_cos.copy_(cos)
        attention.rotary_sin.copy_(sin)
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert float((found - before).abs().max()) > 0.01


@pytest.mark.parametrize("backend", [pytest.param("hooked", marks=needs_hooked)])
def test_a_method_of_one_attention_can_be_replaced(
    load_model: Any, backend: str, samples: Any, monkeypatch: Any
) -> None:
    model, prompts = load_model("llama", backend), [samples[0].prompt()]
    before, attention = logits_of(model, prompts, monkeypatch, True), model.hooked.blocks[1].attn
    monkeypatch.setattr(attention, "apply_rotary", lambda x, *_: x, raising=False)
    found, expected = (logits_of(model, prompts, monkeypatch, lean) for lean in (True, False))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert float((found - before).abs().max()) > 0.01


@contextmanager
def hook_added_on_the_way(model: fl.FocusModel, n_rows: int | None = None) -> Generator[None]:
    """A hook on layer 0 adds one on layer 2, in a pass over ``n_rows`` rows or in the first one. Both are removed."""
    first, later = ("hook_in", "hook_out") if model.backend.is_bridge else ("hook_resid_pre", "hook_resid_post")
    handles: list[Any] = []

    def adding(x: Tensor, hook: Any) -> None:
        if n_rows in (None, x.shape[1]) and not handles:
            point = model.hooked.hook_dict[f"blocks.2.{later}"]
            handles.append(point.register_forward_hook(lambda module, args, out: 0 * out))

    try:
        with model.hooked.hooks(fwd_hooks=[(f"blocks.0.{first}", adding)]):
            yield
    finally:
        handles[0].remove()


def test_a_hook_that_is_added_during_a_response_is_not_lost(tiny_model: fl.FocusModel, samples: Any) -> None:
    with (
        hook_added_on_the_way(tiny_model, 1),
        pytest.raises(RuntimeError, match=r"hooks were added to layers \[2\] during a response"),
    ):
        answer(tiny_model, samples[0].prompt(), 4)
    assert len(answer(tiny_model, samples[0].prompt(), 4).tokens) == 4


def test_a_hook_that_is_added_during_a_prompt_is_not_lost(tiny_model: fl.FocusModel, samples: Any) -> None:
    with (
        hook_added_on_the_way(tiny_model),
        pytest.raises(RuntimeError, match=r"hooks were added to layers \[2\] during the prompts"),
    ):
        tiny_model.prefill(samples[0].prompt())
    logits = tiny_model.prefill(samples[0].prompt()).logits
    assert logits is not None
    assert float(logits.std()) > 0.1


def test_hooks_of_pytorch_on_all_modules_are_called(tiny_model: fl.FocusModel, samples: Any, ran: list[int]) -> None:
    prompt = samples[0].prompt()
    tiny_model.generate(prompt, max_new_tokens=1)
    mlp, calls = tiny_model.hooked.blocks[1].mlp, list[int]()
    ran.clear()
    handle = torch.nn.modules.module.register_module_forward_hook(
        lambda module, args, out: calls.append(1) if module is mlp else None
    )
    try:
        answer(tiny_model, prompt, 3)
    finally:
        handle.remove()
    assert len(calls) >= 3
    assert not ran


@pytest.mark.parametrize("kind", ["none", "split-softmax"])
def test_hooks_on_modules_do_not_see_test_tokens(kind: str, tiny_model: fl.FocusModel, samples: Any) -> None:
    """Neither those of the comparison of both paths nor those of the trial of hook points."""
    model, prompt, seen = fl.FocusModel(tiny_model.hooked, tiny_model.tokenizer), samples[0].prompt(), list[int]()
    interventions = INTERVENTIONS[kind](model.shape.d_head)
    mlp = model.hooked.blocks[1].mlp
    handles = [
        mlp.register_forward_hook(lambda module, args, out: seen.append(args[0].shape[1])),
        mlp.register_forward_pre_hook(lambda module, args: None),
    ]
    try:
        prefix = model.prefill(prompt, interventions)
        model.decode(prefix, interventions, max_new_tokens=3, decoding=DecodingSettings((-1,)))
        assert len(mlp._forward_hooks) == len(mlp._forward_pre_hooks) == 1
    finally:
        for handle in handles:
            handle.remove()
    assert model._lean_agrees
    assert sum(seen) == len(model.encode(prompt).tokens) + 2


def test_under_autocast_layers_run_as_before(
    tiny_model: fl.FocusModel, samples: Any, ran: list[int], monkeypatch: Any
) -> None:
    prompts = [samples[0].prompt()]
    logits_of(tiny_model, prompts, monkeypatch, True)
    ran.clear()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found, expected = (logits_of(tiny_model, prompts, monkeypatch, lean) for lean in (True, False))
    assert not ran
    torch.testing.assert_close(found, expected, atol=0, rtol=0)


@pytest.mark.parametrize("lean", [True, False])
def test_functions_on_rows_get_weights_before_rounding_on_both_paths(
    lean: bool, load_model: Any, backend: str, samples: Any, monkeypatch: Any, ran: list[int]
) -> None:
    """In half precision, hooks of TransformerLens get rounded patterns. The package's own do not."""
    model = load_model("llama", backend, dtype=torch.bfloat16)
    model.generate(samples[0].prompt(), max_new_tokens=1)
    monkeypatch.setattr(model, "lean", lean)
    seen: list[torch.dtype] = []

    def read(pattern: Tensor) -> None:
        seen.append(pattern.dtype)

    hook = RowHook(lambda pattern, hook: read(pattern), read, reads=True)
    ran.clear()
    prefix = model.prefill(samples[0].prompt(), hold_last=True)
    model.decode(prefix, max_new_tokens=3, observers=[("blocks.1.attn.hook_pattern", hook)])
    assert bool(ran) == lean
    assert set(seen) == {torch.float32}


def changed_norm(module: Any) -> Any:
    """A norm of another class with the same weight, which gives twice what the norm gave."""
    kind = type(module)
    other = type("Doubled", (kind,), {"forward": lambda self, x, *more: 2 * kind.forward(self, x, *more)})
    made = other.__new__(other)
    made.__dict__.update(module.__dict__)
    return made


@pytest.mark.parametrize("norm", ["q_norm", "k_norm"])
def test_norms_of_heads_can_be_replaced_or_patched(
    norm: str, load_model: Any, backend: str, samples: Any, monkeypatch: Any
) -> None:
    model, prompts = load_model("qwen3", backend), [samples[0].prompt()]
    before, attention = logits_of(model, prompts, monkeypatch, True), model.hooked.blocks[1].attn
    own, modules = getattr(attention, norm), attention._modules
    original = own.forward
    for change in ("replaced", "patched"):
        if change == "replaced":
            monkeypatch.setitem(modules, norm, changed_norm(own))
        else:
            monkeypatch.setitem(modules, norm, own)
            monkeypatch.setitem(vars(own), "forward", lambda x, *more: 2 * original(x, *more))
        found, expected = (logits_of(model, prompts, monkeypatch, lean) for lean in (True, False))
        torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
        assert float((found - before).abs().max()) > 0.01


@pytest.mark.parametrize("place", ["mlp", "attn.q", "ln2", "hook_out", "act_fn"])
def test_modules_around_those_of_hugging_face_can_be_patched(
    place: str, load_model: Any, backend: str, samples: Any, monkeypatch: Any
) -> None:
    """On a bridge, components of TransformerLens wrap modules; both may get another ``forward``."""
    model, prompts = load_model("llama", backend), [samples[0].prompt()]
    before, block = logits_of(model, prompts, monkeypatch, True), model.hooked.blocks[1]
    if model.backend.is_bridge:
        module = block.mlp.original_component.act_fn if place == "act_fn" else block.get_submodule(place)
    else:
        names = {"attn.q": "attn", "hook_out": "hook_resid_post", "act_fn": "mlp.hook_pre"}
        module = block.get_submodule(names.get(place, place))
    original, calls = module.forward, list[int]()

    def patched(*given: Any, **named: Any) -> Any:
        calls.append(1)
        out = original(*given, **named)
        return 1.5 * out if isinstance(out, torch.Tensor) else out

    monkeypatch.setitem(vars(module), "forward", patched)
    found, expected = (logits_of(model, prompts, monkeypatch, lean) for lean in (True, False))
    assert calls
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert place == "attn.q" or float((found - before).abs().max()) > 0.01


@pytest.mark.parametrize("change", ["a hook point", "a class"])
def test_hook_points_and_classes_can_be_replaced(
    change: str, tiny_model: fl.FocusModel, samples: Any, monkeypatch: Any
) -> None:
    model, prompts = tiny_model, [samples[0].prompt()]
    before, block = logits_of(model, prompts, monkeypatch, True), model.hooked.blocks[1]
    if change == "a hook point":
        name = "hook_out" if model.backend.is_bridge else "hook_resid_post"
        monkeypatch.setitem(block._modules, name, torch.nn.ReLU())
    else:
        kind = type(block.mlp.original_component if model.backend.is_bridge else block.mlp)
        original = kind.forward
        monkeypatch.setattr(kind, "forward", lambda self, x: original(self, x) / 2)
    found, expected = (logits_of(model, prompts, monkeypatch, lean) for lean in (True, False))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert float((found - before).abs().max()) > 0.01


def own(module: Any) -> Any:
    """Module of Hugging Face that a component of a bridge wraps."""
    return getattr(module, "original_component", module)


@pytest.mark.parametrize("name", ["mlp", "input_layernorm", "post_attention_layernorm", "self_attn.q_proj"])
def test_modules_that_replace_those_of_hugging_face_run_as_in_other_layers(
    name: str, load_model: Any, samples: Any, monkeypatch: Any
) -> None:
    """A bridge registers its own components, and its forward pass calls those in the layer of Hugging Face."""
    model, prompts = load_model("llama", "bridge"), [samples[0].prompt()]
    before = logits_of(model, prompts, monkeypatch, True)
    *parents, last = name.split(".")
    owner = own(model.hooked.original_model.model.layers[1])
    for parent in parents:
        owner = own(getattr(owner, parent))
    new = copy.deepcopy(own(owner._modules[last]))
    for weight in new.parameters():
        weight.data.mul_(2)
    monkeypatch.setitem(owner._modules, last, new)
    found, expected = (logits_of(model, prompts, monkeypatch, lean) for lean in (True, False))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    # A projection in the attention of Hugging Face is not the one that a bridge calls.
    assert (float((found - before).abs().max()) > 0.01) == (name != "self_attn.q_proj")


def test_classes_of_the_whole_model_can_be_patched(load_model: Any, samples: Any, monkeypatch: Any) -> None:
    model, prompts = load_model("llama", "bridge"), [samples[0].prompt()]
    before = logits_of(model, prompts, monkeypatch, True)
    kind = type(model.hooked.original_model.model)
    original = kind.forward

    def scaled(self: Any, *given: Any, **named: Any) -> Any:
        out = original(self, *given, **named)
        out.last_hidden_state = out.last_hidden_state * torch.linspace(0.1, 2, out.last_hidden_state.shape[-1])
        return out

    monkeypatch.setattr(kind, "forward", scaled)
    found, expected = (logits_of(model, prompts, monkeypatch, lean) for lean in (True, False))
    torch.testing.assert_close(found, expected, atol=TOLERANCE, rtol=0)
    assert float((found - before).abs().max()) > 0.01
