"""Measurement of a bridge's attention: what each layer hands to the attention interface, and what its mask shows.

One pass over a few tokens runs with an attention function and a mask function that only note their arguments. Mask
functions of transformers tell for any row and key whether the row sees the key, so that windows and chunks of any
length are read without a long pass. The engine is used if it then gives the numbers of TransformerLens's own passes.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface

from focuslens.heads import ModelShape
from focuslens.model.attention import Steps
from focuslens.model.backends.base import Backend
from focuslens.model.backends.interfaced import (
    Call,
    LayerForm,
    configs_of,
    implemented,
    is_of_transformers,
    own_module,
    parameters_of,
    replacing,
    running_layer,
    split_projection,
    through_interface,
)
from focuslens.model.engine import KeyValueCache
from focuslens.util.memory import is_out_of_memory

__all__ = ["NotInterfaced", "difference_of", "measured_forms", "require_unchanged"]

_MEASURED = "focuslens_measured"
"""Name of the attention and of the mask during a measurement."""


class NotInterfaced(Exception):
    """Reason why the engine cannot compute the attention of a model."""


def _measured_attention(
    module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, **arguments: Any
) -> tuple[Tensor, None]:
    """Attention function that notes what it receives, and returns zeros."""
    calls = running_layer.get(None)
    if not isinstance(calls, list):
        raise RuntimeError("the attention function 'focuslens_measured' runs inside a measurement only")
    shapes = tuple(query.shape), tuple(key.shape), tuple(value.shape)
    calls.append(Call(query, shapes, attention_mask, arguments))
    batch, heads, rows, _ = query.shape
    return query.new_zeros(batch, rows, heads, value.shape[-1]), None


def _measured_mask(*_: Any, mask_function: Any = None, device: Any = None, **arguments: Any) -> Int[Tensor, "1 1 1 3"]:
    """Mask function that returns the extent of a mask instead of the mask: known, window and chunk, or 0 for none."""
    try:
        extent = _extent(mask_function, torch.device(device or "cpu"))
    except _UNREADABLE:
        extent = None
    known, (window, chunk) = extent is not None, extent or (None, None)
    return torch.tensor([[[[int(known), window or 0, chunk or 0]]]])


_UNREADABLE = (TypeError, ValueError, RuntimeError, IndexError, AttributeError)

_FAR = 2**20 - 1
"""Row whose visible keys tell the window or the chunk of a mask. A larger window is no limit."""


def _extent(mask_function: Any, device: torch.device) -> tuple[int | None, int | None] | None:
    """Window and chunk of a mask function; ``None`` if its keys are neither all, nor a window, nor a chunk."""
    columns, zero = torch.arange(_FAR + 1, device=device), torch.zeros((), dtype=torch.long, device=device)

    def visible(row: int) -> Bool[Tensor, "key"]:
        mask = mask_function(zero, zero, torch.tensor(row, device=device), columns)
        return torch.as_tensor(mask, dtype=torch.bool, device=device).expand(columns.shape)

    n_last = int(visible(_FAR).sum())
    first = _FAR + 1 - n_last
    window = chunk = None
    if first > 0:
        # The row before has as many keys in a window, and one key less in a chunk.
        is_window = int(visible(_FAR - 1).sum()) == n_last
        window, chunk = (n_last, None) if is_window else (None, int(visible(first - 1).sum()))
    rows = {0, 1, 2, max(0, first - 1), first, _FAR // 2, _FAR - 1, _FAR}
    for row in rows:
        start = 0 if window is None else max(0, row - window + 1)
        start = start if not chunk else row // chunk * chunk
        if not torch.equal(visible(row), (columns >= start) & (columns <= row)):
            return None
    return window, chunk


AttentionInterface.register(_MEASURED, _measured_attention)
AttentionMaskInterface.register(_MEASURED, _measured_mask)


def measured_forms(hooked: Any, shape: ModelShape) -> tuple[LayerForm, ...]:
    """Form of every layer's attention, from one pass over a few tokens.

    Raises:
        NotInterfaced: If the engine cannot compute the attention of a layer. The message is the reason.
    """
    _require_known(hooked)
    require_unchanged(hooked)
    attentions, calls, turned = [block.attn for block in hooked.blocks], list[Call](), list[Call]()
    tokens = torch.arange(1, _TOKENS + 1)[None] % shape.d_vocab
    forwards = [partial(_measured_layer, attention, calls, turned) for attention in attentions]
    replaced = replacing(dict(zip(attentions, forwards, strict=True)))
    try:
        with torch.no_grad(), implemented(configs_of(hooked), _MEASURED), replaced:
            device = next(hooked.original_model.parameters()).device
            hooked(tokens.to(device), return_type="logits", use_cache=False)
    except Exception as error:  # an architecture can fail here in any way, and then stays on the other path
        if is_out_of_memory(error):
            raise
        reason = (str(error).splitlines() or [""])[0]
        raise NotInterfaced(f"its attention cannot be measured ({type(error).__name__}: {reason})") from error
    if not len(calls) == len(turned) == len(attentions):
        raise NotInterfaced(f"{len(attentions)} layers call the attention interface {len(calls)} times")
    return tuple(
        _form(call, shape, own_module(attention), rotary=not torch.equal(call.query, other.query))
        for call, other, attention in zip(calls, turned, attentions, strict=True)
    )


_TOKENS = 5


def _measured_layer(bridge: Any, calls: list[Call], turned: list[Call], *arguments: Any, **named: Any) -> Any:
    """Run a layer, and before that with other rotary tables, which change nothing in a layer that does not rotate."""
    tables = named.get("position_embeddings")
    others = tuple(-table for table in tables) if isinstance(tables, tuple) else None if tables is None else -tables
    through_interface(bridge, turned, None, *arguments, **{**named, "position_embeddings": others})
    return through_interface(bridge, calls, None, *arguments, **named)


def require_unchanged(hooked: Any) -> None:
    """Check what can change after a measurement.

    Raises:
        NotInterfaced: If a setting of the bridge or another library changes what a layer computes.
    """
    settings = [name for name in _SETTINGS if getattr(hooked.cfg, name, False)]
    if settings:
        raise NotInterfaced(f"the setting {settings[0]} of the bridge changes attention")
    attentions = [getattr(block, "attn", None) for block in hooked.blocks]
    replaced = next((i for i, layer in enumerate(attentions) if layer is not None and "forward" in vars(layer)), None)
    if replaced is not None:
        raise NotInterfaced(f"another library has replaced the forward of layer {replaced}'s attention")


def _require_known(hooked: Any) -> None:
    """Raise :class:`NotInterfaced` if a layer does not look like the attention of a rotary decoder of transformers."""
    if not is_of_transformers(hooked.original_model):
        raise NotInterfaced("the checkpoint has code of its own")
    for block in hooked.blocks:
        attention = getattr(block, "attn", None)
        own = None if attention is None else own_module(attention)
        if own is None or own is attention:
            raise NotInterfaced("a layer has no attention")
        name = type(own).__name__
        if not is_of_transformers(own):
            raise NotInterfaced(f"{name} is none of transformers' classes")
        code = inspect.unwrap(type(own).forward).__code__
        if "ALL_ATTENTION_FUNCTIONS" not in code.co_names:
            raise NotInterfaced(f"{name} does not call transformers' attention interface")
        if "position_embeddings" not in parameters_of(type(own)):
            raise NotInterfaced(f"{name} does not rotate queries and keys")
        for fused in split_projection(attention):
            _require_split(attention, fused, name)


_SETTINGS = ("use_split_qkv_input", "use_attn_in", "use_attn_result", "gated_q_proj")


def _require_split(bridge: Any, fused: Any, name: str) -> None:
    """Raise :class:`NotInterfaced` unless the split projections, one after the other, are the fused one."""
    parts: list[Any] = [getattr(own_module(getattr(bridge, part, None)), "weight", None) for part in ("q", "k", "v")]
    weight = getattr(own_module(fused), "weight", None)
    if weight is None or any(part is None for part in parts) or not torch.equal(torch.cat(parts), weight):
        raise NotInterfaced(f"the fused projection of {name} does not hold queries, keys and values in succession")


def _form(call: Call, shape: ModelShape, own: Any, *, rotary: bool) -> LayerForm:
    name, arguments = type(own).__name__, call.arguments
    heads, kv = (1, shape.n_heads, _TOKENS, shape.d_head), (1, shape.n_key_value_heads, _TOKENS, shape.d_head)
    if call.shapes != (heads, kv, kv):
        raise NotInterfaced(f"queries, keys and values of {name} have the shapes {call.shapes}, not {(heads, kv, kv)}")
    unknown = sorted(key for key, value in arguments.items() if value is not None and key not in _KNOWN)
    if unknown:
        raise NotInterfaced(f"{name} calls the attention interface with the unknown argument {unknown[0]}")
    if not isinstance(call.mask, Tensor) or call.mask.shape != (1, 1, 1, 3):
        raise NotInterfaced(f"{name} receives a mask that transformers' mask functions did not make")
    known, window, chunk = call.mask.flatten().tolist()
    if not known or arguments.get("is_causal") is False:
        raise NotInterfaced(f"the mask of {name} is neither causal, nor a window, nor chunks")
    scaling, sinks = arguments.get("scaling"), arguments.get("s_aux")
    if sinks is not None and sinks.shape != (shape.n_heads,):
        raise NotInterfaced(f"{name} has sinks of the shape {tuple(sinks.shape)}")
    scale = shape.d_head**-0.5 if scaling is None else float(scaling)
    return LayerForm(scale, window or None, Steps(arguments.get("softcap"), chunk or None, sinks), rotary)


_KNOWN = {
    *("scaling", "dropout", "softcap", "s_aux", "sliding_window", "is_causal"),  # of the attention
    *("position_ids", "use_cache", "cache_position", "past_key_values", "cache", "position_embeddings"),  # of the pass
    *("output_attentions", "output_hidden_states", "output_router_logits", "return_dict", "logits_to_keep"),
}
"""Arguments whose meaning is known. Those of the pass change nothing in the attention function."""


@torch.no_grad()
def difference_of(backend: Backend) -> str | None:
    """Difference between passes of a backend on the engine and TransformerLens's own passes; ``None`` if they agree."""
    try:
        return _difference(backend)
    except Exception as error:  # an architecture can fail here in any way, and then stays on the other path
        if is_out_of_memory(error):
            raise
        return f"{type(error).__name__}: {(str(error).splitlines() or [''])[0]}"


def _difference(backend: Backend) -> str | None:
    tokens = (torch.arange(1, 8, device=backend.device) % backend.shape.d_vocab)[None]
    mask, n = torch.ones(1, 7, dtype=torch.long), backend.shape.n_layers
    expected = backend.hooked(tokens, return_type="logits", attention_mask=mask.to(backend.device), use_cache=False)
    cache, *others = (KeyValueCache.empty(backend.shape, 1, backend.device) for _ in range(3))
    parts = [
        backend.forward(tokens[:, :4], mask[:, :4], cache, last_only=False),
        backend.forward(tokens[:, 4:], mask, cache, last_only=False),
    ]
    if not _agree(torch.cat(parts, dim=1), expected):
        return "other logits of a few tokens"
    residuals: list[Tensor] = []
    for other, ranges in zip(others, ([range(n)], [range(n // 2), range(n // 2, n)]), strict=True):
        other.append_attention_mask(mask)
        residual = backend.embed(tokens)
        for layers in ranges:
            residual = backend.run_layers(layers, residual, mask, other) if layers else residual
        residuals.append(residual)
    return None if _agree(residuals[1], residuals[0]) else "another output of a part of the layers"


def _agree(ours: Float[Tensor, "batch pos value"], theirs: Float[Tensor, "batch pos value"]) -> bool:
    """Whether rows are equal up to rounding. With few digits, rounding can send single rows to another expert."""
    rows = (ours - theirs).abs().amax(dim=-1).float() / theirs.abs().max().float().clamp(min=1e-30)
    exact = ours.dtype in (torch.float32, torch.float64)
    return bool(rows.max() <= 1e-4) if exact else bool(rows.median() <= 0.05)
