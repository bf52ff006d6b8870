"""Configurations of GGUF files, complete or refused.

transformers reads some entries of a GGUF file and passes over the others, such as the scale of rotary embeddings. A
model without them gives plausible numbers and is another model.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, cast

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.model.sources.gguf_file import GgufFile

__all__ = ["ROTARY_FACTORS", "complete_config"]

ROTARY_FACTORS = "rope_freqs.weight"
"""Tensor with the factors by which Llama 3 slows down its rotary frequencies. It is no parameter of a model."""

_LENGTHS = {
    "context_length": "max_position_embeddings",
    "embedding_length": "hidden_size",
    "block_count": "num_hidden_layers",
    "feed_forward_length": "intermediate_size",
    "attention.head_count": "num_attention_heads",
    "attention.head_count_kv": "num_key_value_heads",
    "attention.key_length": "head_dim",
    "attention.sliding_window": "sliding_window",
    "vocab_size": "vocab_size",
    "attn_logit_softcapping": "attn_logit_softcapping",
    "final_logit_softcapping": "final_logit_softcapping",
    "expert_used_count": "num_experts_per_tok",
    "expert_feed_forward_length": "moe_intermediate_size",
    "logit_scale": "logits_scaling",
    "attention.scale": "attention_multiplier",
    "embedding_scale": "embedding_multiplier",
    "residual_scale": "residual_multiplier",
}
"""Attributes of Hugging Face configurations, by the name of the entry."""

_LLAMA3: Mapping[str, Any] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}

_EPSILONS = ("rms_norm_eps", "layer_norm_epsilon", "layer_norm_eps", "norm_eps", "norm_epsilon")
_EXPERTS = ("num_experts", "num_local_experts")
_NEUTRAL: Mapping[str, Any] = {
    "attention.causal": True,
    "use_parallel_residual": None,
    "rope.scaling.type": "none",
    "rope.scaling.factor": 1.0,
    "rope.scaling.finetuned": None,
    "rope.scaling.attn_factor": 1.0,
    "expert_count": 0,
    "expert_used_count": 0,
}
"""Entries that change nothing at these values. ``None`` stands for every value."""


def complete_config(config: Any, gguf: GgufFile) -> Any:
    """Set every entry of a GGUF file in the configuration that transformers made of the file.

    Args:
        config: The configuration, which is changed.
        gguf: The file.

    Raises:
        ValueError: If the file has an entry or a tensor that the configuration cannot express.
    """
    settings = gguf.settings
    _set_heads(config, settings)
    if hasattr(config, "attention_bias"):
        config.attention_bias = "blk.0.attn_q.bias" in gguf.elements
    left = {key: value for key, value in settings.items() if not _is_set(config, key, value)}
    left = _without_rotary(config, gguf, left)
    left = {key: value for key, value in left.items() if key not in _NEUTRAL or not _neutral(key, value)}
    if left:
        entries = ", ".join(f"{gguf.architecture}.{key}={value!r}" for key, value in sorted(left.items()))
        raise ValueError(
            f"{gguf.path.name} has {entries}, which a {type(config).__name__} of this version of transformers does not "
            "express, so another model would be computed. Open the model in Hugging Face's format instead"
        )
    return config


def _neutral(key: str, value: Any) -> bool:
    return _NEUTRAL[key] is None or _NEUTRAL[key] == value


def _set_heads(config: Any, settings: Mapping[str, Any]) -> None:
    """Set ``head_dim`` if the file leaves it out. It then follows from the width and the number of heads."""
    heads, width = settings.get("attention.head_count"), settings.get("embedding_length")
    if "attention.key_length" not in settings and isinstance(heads, int) and width and hasattr(config, "head_dim"):
        config.head_dim = width // heads


def _is_set(config: Any, key: str, value: Any) -> bool:
    """Set an entry in the configuration, if it has an attribute for it. Returns whether it has one."""
    if key in ("attention.layer_norm_rms_epsilon", "attention.layer_norm_epsilon"):
        names: tuple[str, ...] = _EPSILONS
        value = _decimal(value)
    elif key == "expert_count":
        names = _EXPERTS
    elif key == "attention.value_length":
        return value == getattr(config, "head_dim", None) or _per_head(config) == value
    else:
        names = (_LENGTHS[key],) if key in _LENGTHS else ()
    names = tuple(name for name in names if hasattr(config, name))
    if isinstance(value, list):  # one value per layer
        values = set(cast("list[Any]", value))
        if len(values) > 1:
            return all(getattr(config, name, None) == value for name in names) and bool(names)
        value = next(iter(values))
    if key == "attention.key_length" and not names:
        return _per_head(config) == value
    for name in names:
        if getattr(config, name) != value:
            setattr(config, name, value)
    return bool(names)


def _per_head(config: Any) -> int:
    return int(config.hidden_size) // int(config.num_attention_heads)


def _decimal(value: float) -> float:
    """The shortest decimal number that float32 rounds to the same value: files hold 1e-05 as 9.9999997e-06."""
    for digits in range(1, 9):
        rounded = float(f"{value:.{digits}g}")
        if torch.tensor(rounded, dtype=torch.float32) == torch.tensor(value, dtype=torch.float32):
            return rounded
    return value


def _without_rotary(config: Any, gguf: GgufFile, left: dict[str, Any]) -> dict[str, Any]:
    """Set the rotary embeddings, and return the entries without those that were set.

    Raises:
        ValueError: If the file has a scale of frequencies that is not one of Llama 3's.
    """
    parameters = getattr(config, "rope_parameters", None)
    if not isinstance(parameters, dict):
        return left
    left, parameters = dict(left), cast("dict[str, Any]", parameters)
    # Models with two kinds of layers have one set of parameters for each. A file has the entries of full attention.
    full = parameters.get("full_attention", parameters)
    if "rope.freq_base" in left:
        full["rope_theta"] = float(left.pop("rope.freq_base"))
    if "rope.freq_base_swa" in left and "sliding_attention" in parameters:
        parameters["sliding_attention"]["rope_theta"] = float(left.pop("rope.freq_base_swa"))
    width = int(getattr(config, "head_dim", None) or _per_head(config))
    rotated = left.get("rope.dimension_count")
    if rotated is not None and rotated == round(width * float(full.get("partial_rotary_factor", 1.0))):
        left.pop("rope.dimension_count")
    if left.get("rope.scaling.type") == "linear" and "rope.scaling.factor" in left:
        full.update(rope_type="linear", factor=float(left.pop("rope.scaling.factor")))
        left.pop("rope.scaling.type")
    if ROTARY_FACTORS in gguf.elements:
        full.update(_llama3(gguf, width))
        left.pop("rope.scaling.original_context_length", None)
    return left


def _llama3(gguf: GgufFile, width: int) -> dict[str, Any]:
    """Rotary parameters of Llama 3.1 and later, out of the factors that the file holds in their place.

    The reference implementation of Llama 3.1 has 1 and 4 as its frequency factors. The context length of the first
    training follows from the factors between 1 and the largest.
    """
    factors = torch.tensor(gguf.tensor(ROTARY_FACTORS), dtype=torch.float64).flatten()
    waves, largest = _waves(float(gguf.settings.get("rope.freq_base", 10_000.0)), width), float(factors.max())
    found: dict[str, Any] = {"rope_type": "llama3", "factor": largest, **_LLAMA3}
    if len(factors) == len(waves):
        between = (factors > 1 + 1e-4) & (factors < largest - 1e-4)
        share = (1 / factors[between] - 1 / largest) / (1 - 1 / largest)
        low, high = _LLAMA3["low_freq_factor"], _LLAMA3["high_freq_factor"]
        lengths = waves[between] * (share * (high - low) + low)
        if len(lengths):
            found["original_max_position_embeddings"] = round(float(lengths.median()))
        if torch.allclose(factors, _llama3_factors(waves, found), rtol=1e-3):
            return found
    raise ValueError(
        f"{gguf.path.name} scales its rotary frequencies by factors ({ROTARY_FACTORS}) that are not those of Llama 3.1 "
        "and later, so another model would be computed. Open the model in Hugging Face's format instead"
    )


def _waves(base: float, width: int) -> Float[Tensor, "half"]:
    """Lengths in tokens after which each rotated pair of dimensions comes back."""
    return 2 * math.pi * base ** (torch.arange(0, width, 2, dtype=torch.float64) / width)


def _llama3_factors(waves: Float[Tensor, "half"], parameters: Mapping[str, Any]) -> Float[Tensor, "half"]:
    """Factors by which the rotary frequencies of Llama 3.1 are divided.

    They are 1 for short waves and ``factor`` for long ones. Between them, the frequency is a mean of both frequencies.
    """
    low, high = parameters["low_freq_factor"], parameters["high_freq_factor"]
    share = ((parameters["original_max_position_embeddings"] / waves - low) / (high - low)).clamp(0, 1)
    return 1 / (share + (1 - share) / parameters["factor"])
