"""Checkpoints that ``focuslens export`` wrote: a plain model, and vectors that its own code adds to rotated queries.

TransformerLens computes attention with its own code and would leave the vectors out. Such a checkpoint is therefore
opened as the plain model, and the vectors are added at ``hook_rot_q``, before all hooks there. The result is compared
with what the checkpoint's own code computes, like every checkpoint.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.hooks import hook_name

__all__ = ["add_to_queries", "base_of", "is_exported", "plain_config", "taken_out"]

_TYPE, _CLASS = "steered_", "Steered"


def is_exported(config: Any) -> bool:
    """Whether a configuration belongs to a checkpoint that ``focuslens export`` wrote."""
    return str(config.model_type).startswith(_TYPE) and hasattr(config, "focus_layers")


def base_of(name: str) -> str | None:
    """Name of the model that a local checkpoint was exported from; ``None`` if it was not exported by FocusLens."""
    try:
        exported = str(_json(name, "config.json")["model_type"]).startswith(_TYPE)
        return str(_json(name, "focuslens.json")["base"]) if exported else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _json(directory: str, file: str) -> Any:
    return json.loads((Path(directory) / file).read_text(encoding="utf-8"))


def taken_out(plain: Any) -> dict[int, Float[Tensor, "head d_head"]]:
    """Turn an exported Hugging Face model into a plain one, in place, and return the vectors of each steered layer."""
    layers = plain.config.focus_layers
    vectors = {layer: _taken_out_of(plain.model.layers[layer]) for layer in layers}
    plain_config(plain.config)
    return vectors


def _taken_out_of(block: Any) -> Float[Tensor, "head d_head"]:
    attention = block.self_attn
    (block.self_attn,) = attention.unsteered
    # The plain attention layer shares the table of buffers with the steered one.
    return attention._buffers.pop("focus_query").detach()[:, 0]


def plain_config(config: Any) -> Any:
    """Turn the configuration of an exported checkpoint into that of its base, in place, and return it."""
    config.architectures = [name.removeprefix(_CLASS) for name in config.architectures]
    config.__class__ = type(config).__mro__[1]
    for entry in ("focus_layers", "focus_biases", "auto_map"):
        vars(config).pop(entry, None)
    return config


def add_to_queries(hooked: Any, vectors: Mapping[int, Float[Tensor, "head d_head"]]) -> None:
    """Add vectors to the rotated queries of a TransformerLens model, in every pass and before all hooks.

    The vectors become parameters of the hook points, so that they move with the model and count in the digest of its
    weights. ``reset_hooks`` does not remove them, because the hooks that add them are PyTorch's.
    """
    points = hooked.hook_dict
    for layer, added in vectors.items():
        point = points[hook_name(layer, "hook_rot_q")]
        point.focus_query = torch.nn.Parameter(added.to(hooked.cfg.dtype), requires_grad=False)
        point.register_forward_hook(_add)


def _add(point: Any, arguments: Any, queries: Tensor) -> Tensor:
    # TransformerLens converts tensors for its own hooks alone. Here, a bridge has queries [batch head row d_head].
    conversion = getattr(point, "hook_conversion", None)
    added = point.focus_query.to(queries)
    return queries + (added if conversion is None else added[:, None])
