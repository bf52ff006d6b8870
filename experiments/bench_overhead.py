"""Contestants of ``bench.py`` for the price of a decoded token, where calls take longer than arithmetic.

The model has 28 layers of d_model 64, so that a pass over one row is almost nothing but calls. All contestants run one
thread, a prompt of 256 tokens and 32 new tokens. nnsight and TransformerLens do the same work as peers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from bench_contestants import split_softmax_grid
from bench_model import Bench, Contestant, Shape, plain_generation
from torch import Tensor

import focuslens as fl

__all__ = ["OVERHEAD", "OVERHEAD_TITLES", "SHORT_ROUNDS", "overhead_bench"]

HEADS, TAU, ALPHA = 20, 0.3, 0.3
SHORT_ROUNDS = 3
"""Factor on ``--rounds``: these tasks take about half a second, so that noise disturbs them more."""
FLOOR = "Hugging Face, fused"
QUESTION = "What was it that the first of the people saw in the old house?"
"""Question of about 16 tokens, whose rows choose in self-focus."""


def overhead_bench(directory: Path, device: str, dtype: str) -> Bench:
    """Model, prompt and number of tokens of these tasks."""
    return Bench(directory, 256, device, dtype, 32, Shape(layers=28, d_model=64, d_mlp=176, heads=8, kv_heads=4))


def _heads(n_layers: int) -> list[fl.Head]:
    """Heads to edit, in as many layers."""
    return [fl.Head(layer, layer % 8) for layer in range(min(HEADS, n_layers))]


def _vectors(d_head: int) -> tuple[Tensor, Tensor]:
    """Directions to add to queries and keys."""
    query = torch.randn(HEADS, d_head, generator=torch.Generator().manual_seed(0))
    return query, query.flip(0)


def _focus(
    backend: str, work: Callable[[fl.FocusModel, Bench], Callable[[], Any]], *, compile: bool = False
) -> Contestant:
    return Contestant(lambda bench: work(bench.focus(backend, compile=compile), bench), on_gpu=compile)


# --- FocusLens ---


def _generating(model: fl.FocusModel, bench: Bench, *interventions: fl.Intervention) -> Callable[[], Any]:
    prompt = bench.encoded()
    return lambda: model.generate(prompt, interventions, max_new_tokens=bench.new_tokens)


def _scoring(model: fl.FocusModel, bench: Bench) -> Callable[[], Any]:
    return lambda: fl.contextual_scores(model, [bench.sample], max_new_tokens=bench.new_tokens)


def _splitting(model: fl.FocusModel, bench: Bench) -> Callable[[], Any]:
    return _generating(model, bench, fl.SplitSoftmax(_heads(model.shape.n_layers), TAU))


def _self_focusing(model: fl.FocusModel, bench: Bench) -> Callable[[], Any]:
    return _generating(model, bench, fl.SelfFocus(_heads(model.shape.n_layers), TAU, rows="tail"))


def _steering(model: fl.FocusModel, bench: Bench) -> Callable[[], Any]:
    query, key = _vectors(model.shape.d_head)
    directions = fl.FocusDirections(heads=_heads(model.shape.n_layers), query=query, key=key, site="projection")
    return _generating(model, bench, fl.FocusSteering(directions, ALPHA))


def _sweeping(model: fl.FocusModel, bench: Bench) -> Callable[[], Any]:
    settings = split_softmax_grid(model)
    return lambda: fl.run_sweep(model, [bench.sample], settings, max_new_tokens=bench.new_tokens)


# --- TransformerLens ---


def _lens(edit: Callable[[fl.FocusModel, fl.EncodedPrompt], list[Any]]) -> Contestant:
    """Generation of a ``HookedTransformer`` under hooks."""

    def prepare(bench: Bench) -> Callable[[], Tensor]:
        model, prompt = bench.focus("hooked"), bench.encoded()
        tokens, hooks = prompt.tokens[None].to(bench.device), edit(model, prompt)

        def run() -> Tensor:
            with torch.no_grad(), model.hooked.hooks(fwd_hooks=hooks):
                settings = {"do_sample": False, "stop_at_eos": False, "verbose": False}
                return model.hooked.generate(tokens, max_new_tokens=bench.new_tokens, **settings)

        return run

    return Contestant(prepare)


def _no_hooks(model: fl.FocusModel, prompt: fl.EncodedPrompt) -> list[Any]:
    return []


def _recording(model: fl.FocusModel, prompt: fl.EncodedPrompt) -> list[Any]:
    """Hooks that read the attention to the relevant document in each response row of all heads."""
    ((start, end),) = prompt.spans["relevant"]
    masses: list[Tensor] = []

    def read(pattern: Tensor, hook: Any) -> None:
        masses.append(pattern[:, :, -1, start:end].sum(dim=-1))

    return [(f"blocks.{layer}.attn.hook_pattern", read) for layer in range(model.shape.n_layers)]


def _split_hooks(model: fl.FocusModel, prompt: fl.EncodedPrompt) -> list[Any]:
    """Hooks on one head of each of 20 layers, written as a user of TransformerLens alone would."""
    ((start, end),) = prompt.spans["relevant"]

    def edit(head: int) -> Callable[..., Tensor]:
        def rescale(pattern: Tensor, hook: Any) -> Tensor:
            pattern[:, head, -1] = fl.split_softmax(pattern[:, head, -1], (start, end), TAU)
            return pattern

        return rescale

    return [(f"blocks.{head.layer}.attn.hook_pattern", edit(head.head)) for head in _heads(model.shape.n_layers)]


def _steering_hooks(model: fl.FocusModel, prompt: fl.EncodedPrompt) -> list[Any]:
    queries, keys = _vectors(model.shape.d_head)
    groups = model.shape.n_heads // model.shape.n_key_value_heads

    def add(head: int, vector: Tensor) -> Callable[..., Tensor]:
        def edit(x: Tensor, hook: Any) -> Tensor:
            x[:, :, head] += vector
            return x

        return edit

    hooks: list[Any] = []
    for head, query, key in zip(_heads(model.shape.n_layers), queries, keys, strict=True):
        hooks.append((f"blocks.{head.layer}.attn.hook_q", add(head.head, ALPHA * query)))
        hooks.append((f"blocks.{head.layer}.attn.hook_k", add(head.head // groups, ALPHA * key)))
    return hooks


# --- nnsight ---


def _nnsight(attention: str, edit: Callable[..., None] | None) -> Contestant:
    """Generation of nnsight's model; ``edit(layers, prompt, masses)`` is traced in every pass."""

    def prepare(bench: Bench) -> Callable[[], Any]:
        import nnsight

        prompt, plain = bench.encoded(), bench.hugging_face(attention)
        model: Any = nnsight.TransformersModel(plain, tokenizer=bench.focus("bridge").tokenizer, task="text-generation")
        tokens, n = prompt.tokens[None].to(bench.device), bench.new_tokens
        settings = {"max_new_tokens": n, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

        def run() -> Any:
            with torch.no_grad(), model.generate(tokens, **settings) as tracer:
                masses: Any = nnsight.save([])
                if edit is not None:
                    for _ in tracer.iter[0:n]:
                        edit(model.model.layers, prompt, masses)
                whole = tracer.result.save()
            return whole, masses

        return run

    return Contestant(prepare)


def _nnsight_reading(layers: Any, prompt: fl.EncodedPrompt, masses: list[Tensor]) -> None:
    ((start, end),) = prompt.spans["relevant"]
    for layer in layers:
        pattern = layer.self_attn.source.attention_interface_1.output[1]
        masses.append(pattern[:, :, -1, start:end].sum(dim=-1))


def _nnsight_splitting(layers: Any, prompt: fl.EncodedPrompt, masses: list[Tensor]) -> None:
    ((start, end),) = prompt.spans["relevant"]
    for head in _heads(len(layers)):
        eager = layers[head.layer].self_attn.source.attention_interface_1.source
        pattern = eager.nn_functional_dropout_0.output
        pattern[:, head.head, -1] = fl.split_softmax(pattern[:, head.head, -1], (start, end), TAU)


def _nnsight_steering(layers: Any, prompt: fl.EncodedPrompt, masses: list[Tensor]) -> None:
    d_head, groups = 8, 2
    for head, query, key in zip(_heads(len(layers)), *_vectors(d_head), strict=True):
        attention, kv = layers[head.layer].self_attn, head.head // groups
        attention.q_proj.output[..., head.head * d_head : (head.head + 1) * d_head] += ALPHA * query
        attention.k_proj.output[..., kv * d_head : (kv + 1) * d_head] += ALPHA * key


def _focuslens(work: Callable[[fl.FocusModel, Bench], Callable[[], Any]]) -> dict[str, Contestant]:
    return {
        FLOOR: Contestant(plain_generation, part="a plain generation"),
        "FocusLens, HookedTransformer": _focus("hooked", work),
        "FocusLens, TransformerBridge": _focus("bridge", work),
        "FocusLens, HookedTransformer, compile=True": _focus("hooked", work, compile=True),
    }


def _self_focus(backend: str, name: str) -> dict[str, Contestant]:
    """Plain generation and self-focus on one kind of model, on a prompt with :data:`QUESTION`."""

    def contestant(work: Callable[[fl.FocusModel, Bench], Callable[[], Any]]) -> Contestant:
        return Contestant(lambda bench: work(bench.focus(backend), replace(bench, question=QUESTION)))

    return {f"{name}, plain": contestant(_generating), f"{name}, self-focus": contestant(_self_focusing)}


OVERHEAD_TITLES = {
    "overhead_plain": "Generate 32 tokens",
    "overhead_scored": "Generate 32 tokens and score all heads",
    "overhead_split": "Generate 32 tokens with split-softmax on 20 heads",
    "overhead_steered": "Generate 32 tokens with 20 heads steered",
    "overhead_focus": "Generate 32 tokens with a HookedTransformer, plain or with self-focus by 20 heads",
    "overhead_focus_bridge": "Generate 32 tokens with a TransformerBridge, plain or with self-focus by 20 heads",
    "overhead_sweep": "Run 78 split-softmax settings on one sample of 32 tokens",
}
"""Tasks of this file, and the headings of their tables."""
OVERHEAD: dict[str, dict[str, Contestant]] = {
    "overhead_plain": {
        **_focuslens(_generating),
        "nnsight": _nnsight("sdpa", None),
        "TransformerLens": _lens(_no_hooks),
    },
    "overhead_scored": {
        **_focuslens(_scoring),
        "nnsight": _nnsight("eager", _nnsight_reading),
        "TransformerLens": _lens(_recording),
    },
    "overhead_split": {
        **_focuslens(_splitting),
        "nnsight": _nnsight("eager", _nnsight_splitting),
        "TransformerLens": _lens(_split_hooks),
    },
    "overhead_steered": {
        **_focuslens(_steering),
        "nnsight": _nnsight("sdpa", _nnsight_steering),
        "TransformerLens": _lens(_steering_hooks),
    },
    "overhead_focus": _self_focus("hooked", "HookedTransformer"),
    "overhead_focus_bridge": _self_focus("bridge", "TransformerBridge"),
    "overhead_sweep": _focuslens(_sweeping),
}
"""Contestants of each task, by name."""
