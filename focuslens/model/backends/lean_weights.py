"""Weights of a TransformerLens model as lean layers: views of the model's own tensors, made when a response begins.

A layer without a lean form is ``None``. Only modules whose arithmetic is known are read: the classes of Llama, Mistral,
Qwen2 and Qwen3, and of TransformerLens where its configuration names nothing else.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from focuslens.model.lean_layer import Gated, LeanLayer, Linear, Norm

__all__ = ["bridge_layer", "hooked_layer"]


def _is_patched(module: Any) -> bool:
    """Whether a module has a function of its own in place of a method of its class."""
    return any(callable(value) and hasattr(type(module), name) for name, value in vars(module).items())


def hooked_layer(block: Any, scale: float, window: int | None, rotary: object) -> LeanLayer | None:
    """Lean form of a ``TransformerBlock`` of TransformerLens 3.

    Args:
        block: The block.
        scale: Factor that multiplies the query-key products.
        window: Maximum number of keys that a row attends to; ``None`` for no limit.
        rotary: Key of the block's rotary tables.
    """
    attention: Any = block.attn
    mlp: Any = getattr(block, "mlp", None)
    norms: list[Any] = [getattr(block, name, None) for name in ("ln1", "ln2")]
    heads: list[Any] = [norm for norm in (attention.q_norm, attention.k_norm) if norm is not None]
    plain = (
        type(block).__name__ == "TransformerBlock"
        and type(attention).__name__ in ("Attention", "GroupedQueryAttention")
        and type(mlp).__name__ == "GatedMLP"
        and all(type(norm).__name__ in ("RMSNorm", "RMSNormPre") for norm in norms)
        and all(type(norm).__name__ == "RMSNorm" for norm in heads)
        and not any(getattr(block.cfg, name, False) for name in _OTHER_ARITHMETIC)
        and not block.cfg.is_layer_norm_activation()
    )
    if not plain or any(map(_is_patched, (block, attention, mlp, *norms, *heads))):
        return None
    prefix = "_" if type(attention).__name__ == "GroupedQueryAttention" else ""
    projections = [("W_Q", "b_Q"), (f"{prefix}W_K", f"{prefix}b_K"), (f"{prefix}W_V", f"{prefix}b_V")]
    weights = [getattr(attention, weight).transpose(1, 2) for weight, _ in projections]
    weights += [attention.W_O.permute(2, 0, 1), mlp.W_gate.T, mlp.W_in.T, mlp.W_out.T]
    if not all(weight.is_contiguous() for weight in weights):
        return None  # a product with such a weight would copy it
    q, k, v = (
        _linear(weight.flatten(0, 1), getattr(attention, bias))
        for weight, (_, bias) in zip(weights, projections, strict=False)
    )
    gate, up, down = Linear(weights[4]), Linear(weights[5]), _linear(weights[6], mlp.b_out)
    first, second = (Norm(getattr(norm, "w", None), norm.eps) for norm in norms)
    per_head = [None if norm is None else Norm(norm.w, norm.eps) for norm in (attention.q_norm, attention.k_norm)]
    bias = mlp.b_in if bool(mlp.b_in.any()) else None
    return LeanLayer(
        input_norm=first,
        q=q,
        k=k,
        v=v,
        q_norm=per_head[0],
        k_norm=per_head[1],
        o=_linear(weights[3].flatten(1), attention.b_O),
        mlp_norm=second,
        mlp=Gated(gate, up, down, _kernel_of(mlp.act_fn), bias),
        d_head=block.cfg.d_head,
        scale=scale,
        window=window,
        rotary=rotary,
        adjacent_pairs=bool(block.cfg.rotary_adjacent_pairs),
    )


_OTHER_ARITHMETIC = (
    *("parallel_attn_mlp", "attn_only", "use_attn_in", "use_split_qkv_input", "load_in_4bit", "use_attn_result"),
    *("use_normalization_before_and_after", "ungroup_grouped_query_attention", "use_dynamic_ntk_rope"),
)


def _linear(weight: Tensor, bias: Tensor) -> Linear:
    """Linear map. TransformerLens has biases of zeros where a model has none."""
    return Linear(weight, bias.flatten() if bool(bias.any()) else None)


def _kernel_of(act: Any) -> Any:
    """Function of an activation, without the call of a module."""
    return F.silu if type(act).__name__ in ("SiLUActivation", "SiLU") or act is F.silu else act


def bridge_layer(block: Any, scale: float, window: int | None) -> LeanLayer | None:
    """Lean form of a block of a bridge, whose modules wrap those of Hugging Face."""
    layer, attention, mlp = _own(block), _own(block.attn), _own(getattr(block, "mlp", None))
    norms = [_own(getattr(block, name, None)) for name in ("ln1", "ln2")]
    if type(layer).__name__ not in _LAYERS or type(mlp).__name__ not in _MLPS:
        return None
    names = ("q_proj", "k_proj", "v_proj", "o_proj")
    linears = [_own(getattr(attention, name)) for name in names]
    linears += [_own(getattr(mlp, name)) for name in ("gate_proj", "up_proj", "down_proj")]
    per_head = [_own(getattr(attention, name, None)) for name in ("q_norm", "k_norm")]
    modules = (layer, mlp, *norms, *linears, *(norm for norm in per_head if norm is not None))
    plain = (
        all(type(linear) is torch.nn.Linear for linear in linears)
        and all(type(norm).__name__ in _NORMS for norm in (*norms, *per_head) if norm is not None)
        and all(type(module).__module__.startswith(("transformers.models.", "torch.nn.")) for module in modules)
        and not any(map(_is_patched, (*modules, block, block.mlp)))
        and _is_run(block, layer, attention, mlp, norms)
    )
    if not plain:
        return None
    q, k, v, o, gate, up, down = (Linear(linear.weight, linear.bias) for linear in linears)
    first, second, query, key = (
        None if norm is None else Norm(norm.weight, norm.variance_epsilon) for norm in (*norms, *per_head)
    )
    if first is None or second is None:
        return None
    return LeanLayer(
        input_norm=first,
        q=q,
        k=k,
        v=v,
        q_norm=query,
        k_norm=key,
        o=o,
        mlp_norm=second,
        mlp=Gated(gate, up, down, _kernel_of(mlp.act_fn)),
        d_head=attention.head_dim,
        scale=scale,
        window=window,
        rotary="all",
    )


def _is_run(block: Any, layer: Any, attention: Any, mlp: Any, norms: list[Any]) -> bool:
    """Whether the modules of a block are those that its forward pass calls.

    A module that replaces another one in the layer of Hugging Face, or through the bridge, is not registered in both.
    """
    called = [_own(getattr(layer, name, None)) for name in ("self_attn", "mlp", "input_layernorm")]
    called.append(_own(getattr(layer, "post_attention_layernorm", None)))
    registered = [attention, mlp, *norms]
    called += [_own(getattr(block.attn, name, None)) for name in ("q", "k", "v", "o")]
    registered += [_own(getattr(attention, name)) for name in ("q_proj", "k_proj", "v_proj", "o_proj")]
    return all(one is other for one, other in zip(called, registered, strict=True))


_LAYERS = ("LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer")
_MLPS = ("LlamaMLP", "MistralMLP", "Qwen2MLP", "Qwen3MLP")
_NORMS = ("LlamaRMSNorm", "MistralRMSNorm", "Qwen2RMSNorm", "Qwen3RMSNorm")


def _own(module: Any) -> Any:
    """Module of Hugging Face that a component of a bridge wraps."""
    return getattr(module, "original_component", module)
