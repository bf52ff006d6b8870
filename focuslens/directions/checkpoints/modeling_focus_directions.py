"""Models with focus directions, which are vectors added to the queries or keys of some heads.

**After the rotary embedding** (the configuration's entry ``focus_layers`` lists the layers), the models compute
``softmax((Q + alpha d_Q) K^T / sqrt(d_head))`` (equation 5 of arXiv 2503.23306) with any attention implementation of
transformers. Each steered attention layer has a buffer ``focus_query``, which contains ``alpha d_Q`` of every head
(zero for heads without steering). A steered layer looks up its attention function under a new name. The function with
this name adds the vectors and then calls the original attention function.

**At the projections** (the entry ``focus_biases`` lists them), ``alpha d`` is a bias of the projection. The models add
this bias to projections that have none in their family.

This file is part of a checkpoint written by focuslens. It depends only on PyTorch and transformers. Loading the
checkpoint requires ``trust_remote_code=True``.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
import transformers
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "focus_directions|"

CONFIGS = {
    "Llama": "Llama",
    "Mistral": "Mistral",
    "Qwen2": "Qwen2",
    "Qwen3": "Qwen3",
    "Gemma": "Gemma",
    "Gemma2": "Gemma2",
    "Gemma3": "Gemma3Text",
    "Olmo": "Olmo",
    "Olmo2": "Olmo2",
    "Olmo3": "Olmo3",
    "Granite": "Granite",
    "SmolLM3": "SmolLM3",
    "Glm": "Glm",
    "Glm4": "Glm4",
    "SeedOss": "SeedOss",
    "Arcee": "Arcee",
    "Apertus": "Apertus",
    "Exaone4": "Exaone4",
    "GptOss": "GptOss",
    "Llama4": "Llama4Text",
    "Nemotron": "Nemotron",
    "Starcoder2": "Starcoder2",
    "Ernie4_5": "Ernie4_5",
    "Ministral3": "Ministral3",
    "StableLm": "StableLm",
    "Phi3": "Phi3",
}
"""Prefix of a family's configuration, by the prefix of its causal language model."""


class _Renamed:
    """Configuration of a steered layer: the model's configuration, with a different name for the attention function."""

    def __init__(self, config: Any) -> None:
        self.config = config

    def __getattr__(self, name: str) -> Any:
        if name == "config":  # a new copy has no config yet, so self.config below would recurse without end
            raise AttributeError(name)
        return getattr(self.config, name)

    @property
    def _attn_implementation(self) -> str:
        name = PREFIX + str(self.config._attn_implementation)
        if name not in ALL_ATTENTION_FUNCTIONS:
            ALL_ATTENTION_FUNCTIONS.register(name, _attend)
        return name


def _attend(module: Any, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
    """Add the vectors to ``query`` [batch, head, row, d_head], and call the model's configured attention function."""
    (plain,) = module.unsteered
    name = str(plain.config._attn_implementation)
    if name not in ALL_ATTENTION_FUNCTIONS:
        name = name.removeprefix("paged|")
    if name in ALL_ATTENTION_FUNCTIONS:
        attend = ALL_ATTENTION_FUNCTIONS[name]
    else:  # each architecture defines eager attention in its own module
        attend = sys.modules[type(plain).__module__].eager_attention_forward  # type: ignore[attr-defined]
    return attend(plain, query + module.focus_query.to(query.dtype), key, value, *args, **kwargs)


def _steer(attention: Any, n_heads: int) -> None:
    # The shallow copy shares the layer's weights and keeps the original configuration, which some attention functions
    # read. The copy is in a tuple, because PyTorch would otherwise register it as a submodule of the layer.
    attention.unsteered = (copy.copy(attention),)
    attention.register_buffer("focus_query", torch.zeros(n_heads, 1, attention.head_dim))
    attention.config = _Renamed(attention.config)


class _Steered:
    """Mixin that adds steering to a causal language model: ``focus_layers`` and ``focus_biases`` say where."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        for layer in config.focus_layers:
            _steer(self.model.layers[layer].self_attn, config.num_attention_heads)  # type: ignore[attr-defined]
        for name in getattr(config, "focus_biases", None) or ():
            projection: Any = self.get_submodule(name)  # type: ignore[attr-defined]
            projection.bias = torch.nn.Parameter(torch.zeros(projection.out_features))


def __getattr__(name: str) -> Any:
    """The class ``Steered...Config`` or ``Steered...ForCausalLM`` of a family, which is made when it is asked for."""
    for family, config in CONFIGS.items():
        if name == f"Steered{config}Config":
            base: Any = getattr(transformers, f"{config}Config")
            doc = f"Configuration of {family} with focus directions: see ``focus_layers`` and ``focus_biases``."
            entries = {"model_type": f"steered_{base.model_type}", "__module__": __name__, "__doc__": doc}
            return globals().setdefault(name, type(name, (base,), entries))
        if name == f"Steered{family}ForCausalLM":
            base = getattr(transformers, f"{family}ForCausalLM")
            entries = {
                "config_class": __getattr__(f"Steered{config}Config"),
                "__module__": __name__,
                "__doc__": f"{family} with focus directions.",
            }
            return globals().setdefault(name, type(name, (_Steered, base), entries))
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
