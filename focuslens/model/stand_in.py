"""Tiny random models with the architecture and the kinds of layer of a checkpoint's configuration.

A checkpoint's windows and rotary tables reach over thousands of tokens, and its weights may have few digits. A stand-in
has short windows, short tables and float32 weights, so that a difference shows on a few tokens.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Generator
from typing import Any

import torch
from transformers import AutoModelForCausalLM

from focuslens.util.memory import is_out_of_memory

__all__ = ["stand_in"]

_LOG = logging.getLogger(__name__)

_WINDOW = 6
"""Sliding window of a stand-in, in tokens: shorter than every sequence that is compared."""

_LIMIT = 11
"""Length at which length-dependent rotary tables of a stand-in change: inside a sequence that is compared."""

_MOST_LAYERS = 12
_MOST_PARAMETERS = 2e8
"""A stand-in whose width could not be reduced has at most this many parameters, about one gigabyte."""

_SMALL = {
    "vocab_size": 96,
    "intermediate_size": 48,
    "ffn_dim": 48,
    "n_inner": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "intermediate_size_mlp": 48,
    "num_local_experts": 4,
    "num_experts": 4,
    "n_routed_experts": 4,
    "moe_num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_group": 1,
    "topk_group": 1,
    "n_shared_experts": 1,
}
"""Sizes that do not depend on the attention heads, with their largest values in a stand-in."""

_DEPTHS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")


def stand_in(config: Any, *, trust_remote_code: bool = False) -> Any | None:
    """A random float32 model on the CPU; ``None`` if none can be made from this configuration."""
    code = {"trust_remote_code": trust_remote_code}
    for variant in _variants(config, code):
        try:
            with torch.random.fork_rng():
                torch.manual_seed(0)
                model: Any = AutoModelForCausalLM.from_config(
                    variant, attn_implementation="eager", dtype=torch.float32, **code
                )
                _randomise(model)
                model.eval()(torch.arange(1, 4)[None], use_cache=False)
        except Exception as error:  # sizes of an architecture can depend on each other in any way
            if is_out_of_memory(error):
                raise
            _LOG.debug("no stand-in of %s with these sizes: %s", type(config).__name__, error)
            continue
        return model
    return None


def _variants(config: Any, code: dict[str, bool]) -> Generator[Any]:
    """Yield smaller configurations, the smallest first."""
    for narrow in (True, False):
        whole = copy.deepcopy(config)
        # Models of text and images have a configuration of the text model inside.
        variant = whole.get_text_config()
        for name, size in _SMALL.items():
            value = getattr(variant, name, None)
            if isinstance(value, int) and value > size:
                setattr(variant, name, size)
        for name in ("pad_token_id", "bos_token_id", "eos_token_id"):
            if getattr(variant, name, None) is not None:
                setattr(variant, name, 0)
        _shorten(variant)
        if narrow:
            _narrow(variant)
        if _n_parameters(whole, code) <= _MOST_PARAMETERS:
            yield whole


def _shorten(config: Any) -> None:
    """Give a configuration few layers, one of each kind at least, short windows and short rotary tables."""
    depth_name = next((name for name in _DEPTHS if isinstance(getattr(config, name, None), int)), None)
    if depth_name is not None:
        depth = getattr(config, depth_name)
        per_layer = {
            name: values for name, values in vars(config).items() if isinstance(values, list) and len(values) == depth
        }
        layers = _one_of_each_kind(per_layer, depth)
        setattr(config, depth_name, len(layers))
        for name, values in per_layer.items():
            setattr(config, name, [values[layer] for layer in layers])
    for name in ("sliding_window", "attention_chunk_size", "window_size"):
        if isinstance(getattr(config, name, None), int):
            setattr(config, name, _WINDOW)
    _shorten_tables(config)


def _one_of_each_kind(per_layer: dict[str, list[Any]], depth: int) -> list[int]:
    """Layers to keep: the first two, and the first of each kind that the lists of a configuration distinguish."""
    layers = {0, min(1, depth - 1)}
    for values in per_layer.values():
        texts = [str(value) for value in values]
        layers |= {texts.index(text) for text in set(texts)}
    return sorted(layers)[:_MOST_LAYERS]


def _shorten_tables(config: Any) -> None:
    """Move the lengths at which rotary tables change to the sequences that are compared. Their ratios stay."""
    parameters: Any = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return
    # Models with several kinds of layer have one set of parameters per kind.
    entries: list[dict[str, Any]] = [parameters, *(value for value in parameters.values() if isinstance(value, dict))]
    for entry in entries:
        kind, original = entry.get("rope_type"), entry.get("original_max_position_embeddings")
        if kind == "longrope" and original:
            ratio = config.max_position_embeddings / original
            entry["original_max_position_embeddings"] = _LIMIT
            if hasattr(config, "original_max_position_embeddings"):
                config.original_max_position_embeddings = _LIMIT
            config.max_position_embeddings = max(int(ratio * _LIMIT), 2 * _LIMIT)
        elif kind == "dynamic":
            config.max_position_embeddings = _LIMIT


def _narrow(config: Any) -> None:
    """Give a configuration few attention heads of the same size, and a width that matches them."""
    heads_name = next(
        (name for name in ("num_attention_heads", "n_head", "n_heads", "num_heads") if hasattr(config, name)), ""
    )
    width_name = next((name for name in ("hidden_size", "n_embd", "d_model") if hasattr(config, name)), "")
    heads, width = getattr(config, heads_name, None), getattr(config, width_name, None)
    if not isinstance(heads, int) or not isinstance(width, int) or heads <= 4:
        return
    groups = getattr(config, "num_key_value_heads", None)
    if isinstance(groups, int):
        per_group = max(1, heads // groups)
        few_groups = min(groups, 2)
        few = few_groups * min(per_group, 2)
        config.num_key_value_heads = few_groups
    else:
        few = 4
    setattr(config, heads_name, few)
    setattr(config, width_name, few * (width // heads))


def _n_parameters(config: Any, code: dict[str, bool]) -> float:
    """Number of parameters of a configuration, without memory for them; infinite if it cannot be built."""
    try:
        with torch.device("meta"):
            model: Any = AutoModelForCausalLM.from_config(config, **code)
    except Exception:
        return float("inf")
    return sum(parameter.numel() for parameter in model.parameters())


def _randomise(model: Any) -> None:
    """Draw weights with which attention is far from even, norms differ from one, and biases differ from zero."""
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.ndim >= 2:
                parameter.normal_(0, 1.2 / parameter.shape[-1] ** 0.5)
            elif "bias" in name.rsplit(".", 1)[-1] or "sink" in name:
                parameter.normal_(0, 0.3)
            else:
                parameter.add_(0.2 * torch.randn_like(parameter))
