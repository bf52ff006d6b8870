"""Models with focus directions, which are vectors added to the queries of some heads after the rotary embedding.

The models compute ``softmax((Q + alpha d_Q) K^T / sqrt(d_head))`` (equation 5 of arXiv 2503.23306) with any attention
implementation of transformers. Each steered attention layer has a buffer ``focus_query``, which contains ``alpha d_Q``
of every head (zero for heads without steering). A steered layer looks up its attention function under a new name. The
function with this name adds the vectors and then calls the original attention function. The configuration entry
``focus_layers`` lists the steered layers.

This file is part of a checkpoint written by focuslens. It depends only on PyTorch and transformers. Loading the
checkpoint requires ``trust_remote_code=True``.
"""

from __future__ import annotations

import copy
import sys
from typing import Any

import torch
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

PREFIX = "focus_directions|"


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
    """Mixin that adds steering to the layers in ``focus_layers`` of a causal language model."""

    def __init__(self, config: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(config, *args, **kwargs)  # type: ignore[call-arg]
        for layer in config.focus_layers:
            _steer(self.model.layers[layer].self_attn, config.num_attention_heads)  # type: ignore[attr-defined]


class SteeredLlamaConfig(LlamaConfig):
    """Configuration of Llama with focus directions. The entry ``focus_layers`` lists the steered layers."""

    model_type = "steered_llama"


class SteeredLlamaForCausalLM(_Steered, LlamaForCausalLM):
    """Llama with focus directions."""

    config_class = SteeredLlamaConfig


class SteeredMistralConfig(MistralConfig):
    """Configuration of Mistral with focus directions. The entry ``focus_layers`` lists the steered layers."""

    model_type = "steered_mistral"


class SteeredMistralForCausalLM(_Steered, MistralForCausalLM):
    """Mistral with focus directions."""

    config_class = SteeredMistralConfig


class SteeredQwen2Config(Qwen2Config):
    """Configuration of Qwen2 with focus directions. The entry ``focus_layers`` lists the steered layers."""

    model_type = "steered_qwen2"


class SteeredQwen2ForCausalLM(_Steered, Qwen2ForCausalLM):
    """Qwen2 with focus directions."""

    config_class = SteeredQwen2Config


class SteeredQwen3Config(Qwen3Config):
    """Configuration of Qwen3 with focus directions. The entry ``focus_layers`` lists the steered layers."""

    model_type = "steered_qwen3"


class SteeredQwen3ForCausalLM(_Steered, Qwen3ForCausalLM):
    """Qwen3 with focus directions."""

    config_class = SteeredQwen3Config
