"""Backend that runs a ``HookedTransformer`` (TransformerLens 3.x) on the attention engine.

TransformerLens allocates several tensors ``[batch head row key]`` per layer. It caches keys before their rotation, and
rotates all cached keys again for every new token. The engine avoids both costs. Hooks and results are the same.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext, suppress
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

from focuslens.heads import HeadKind
from focuslens.model.attention import LayerCache
from focuslens.model.backends.base import forgetting_of, shape_of
from focuslens.model.backends.lean_weights import hooked_layer
from focuslens.model.backends.rotary_keys import RotaryKeys
from focuslens.model.engine import (
    CacheEntry,
    Filled,
    KeyValueCache,
    Pass,
    attend,
    is_hooked,
    replaced_forwards,
    stop_layer,
    under_hook,
)
from focuslens.model.lean_layer import LeanLayer, Turn
from focuslens.model.rotary import Rotary

__all__ = ["HookedBackend"]


class HookedBackend:
    """Backend for a ``HookedTransformer`` (TransformerLens 3.x).

    The backend changes the strides of the weights, so that TransformerLens can multiply by them without a copy. The
    values and shapes of the weights do not change.
    """

    is_bridge = False

    def __init__(self, hooked: Any, config: Any = None) -> None:
        self.hooked = hooked
        self._config = config
        self._rotary_keys = RotaryKeys(hooked)
        _lay_out(hooked)
        self.shape = shape_of(hooked.cfg)

    @property
    def device(self) -> torch.device:
        return next(self.hooked.parameters()).device

    def require_supported(self) -> None:
        cfg = self.hooked.cfg
        if cfg.attention_dir != "causal":
            raise ValueError(
                f"the model's attention is {cfg.attention_dir!r}; it must be 'causal' for the model to generate "
                "responses"
            )
        if getattr(cfg, "ungroup_grouped_query_attention", False) and self.shape.n_key_value_heads < self.shape.n_heads:
            raise ValueError(
                "the model's grouped keys and values are ungrouped, so hook_k has one head per query head; call "
                "hooked.set_ungroup_grouped_query_attention(False)"
            )

    def new_cache(self, batch: int, n_prompt: int = 0) -> Any:
        self.require_supported()
        if _can_fuse(self.hooked):
            forgetting = forgetting_of(self._config, self.shape, n_prompt)
            return KeyValueCache.empty(self.shape, batch, self.device, forgetting)
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(self.hooked.cfg, self.device, batch)

    def fork(self, cache: Any, copies: int = 1) -> Any:
        if isinstance(cache, KeyValueCache):
            return cache.shared(copies)
        # A cache grows by creating new tensors. Tensors that two caches share therefore never change.
        entries = [
            dataclasses.replace(
                entry, past_keys=_copies(entry.past_keys, copies), past_values=_copies(entry.past_values, copies)
            )
            for entry in cache.entries
        ]
        mask = _copies(cache.previous_attention_mask, copies)
        return dataclasses.replace(cache, entries=entries, previous_attention_mask=mask)

    def forward(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch key"], cache: Any | None, *, last_only: bool
    ) -> Float[Tensor, "batch row d_vocab"]:
        hooked = self.hooked
        new = mask[:, -tokens.shape[1] :].to(self.device)
        arguments: dict[str, Any] = {"attention_mask": new}
        if cache is not None:
            arguments["past_kv_cache"] = cache
        fuse = isinstance(cache, KeyValueCache) if cache is not None else _can_fuse(self.hooked)
        with self._fused(Pass(tokens.shape[1], mask.cpu()), cache) if fuse else nullcontext():
            if not last_only:
                return hooked(tokens, return_type="logits", **arguments)
            # For a long prompt, the logits of all rows would need more memory than the pass itself. The unembedding
            # therefore runs on the last row only.
            residual = hooked(tokens, stop_at_layer=self.shape.n_layers, **arguments)[:, -1:]
        return self.unembed(residual)

    def unembed(self, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        hooked = self.hooked
        if hooked.cfg.normalization_type is not None:
            residual = hooked.ln_final(residual)
        logits = hooked.unembed(residual)
        cap = hooked.cfg.output_logits_soft_cap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def embed(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        hooked = self.hooked
        tokens = hooked.hook_tokens(tokens) if hooked.cfg.use_hook_tokens else tokens
        return hooked.hook_embed(hooked.embed(tokens))

    def lean_layers(self) -> list[LeanLayer | None]:
        if not _can_fuse(self.hooked) or getattr(self.hooked.cfg, "post_embedding_ln", False):
            return [None] * self.shape.n_layers
        return [
            hooked_layer(block, self.scale(layer), self.window(layer), key)
            for layer, (block, key) in enumerate(zip(self.hooked.blocks, self._rotary_keys.current(), strict=True))
        ]

    def turns(
        self, plan: Sequence[LeanLayer | None], mask: Int[Tensor, "batch key"], n_rows: int, like: Tensor, held: int = 0
    ) -> dict[object, Turn]:
        positions = (mask.cumsum(dim=1) - 1).clamp(min=0)[:, -n_rows:].flatten().to(like.device)
        turns: dict[object, Turn] = {}
        for block, layer in zip(self.hooked.blocks, plan, strict=True):
            if layer is not None and layer.rotary not in turns:
                attention = block.attn
                if mask.shape[1] > len(attention.rotary_cos):
                    attention._extend_rotary_embeddings(min(self.shape.n_ctx, 2 * mask.shape[1]))
                cos, sin = (table[positions].to(like) for table in (attention.rotary_cos, attention.rotary_sin))
                turns[layer.rotary] = Turn.of(cos, sin, layer.adjacent_pairs)
        return turns

    def fill(self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch key"], cache: Any) -> None:
        new, n_layers = mask[:, -tokens.shape[1] :].to(self.device), self.shape.n_layers
        fused = isinstance(cache, KeyValueCache)
        rows = Pass(tokens.shape[1], mask.cpu())
        with self._fused(rows, cache, last=n_layers - 1) if fused else nullcontext(), suppress(Filled):
            self.hooked(tokens, stop_at_layer=n_layers, attention_mask=new, past_kv_cache=cache)

    def outgrown(self, mask: Int[Tensor, "batch key"], n_rows: int) -> bool:
        return False

    def run_to(self, layer: int, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch key"]) -> None:
        rows = Pass(tokens.shape[1], mask.cpu())
        with self._fused(rows, None, last=layer) if _can_fuse(self.hooked) else nullcontext(), suppress(Filled):
            self.hooked(tokens, stop_at_layer=layer + 1, attention_mask=mask.to(self.device))

    def run_layers(
        self,
        layers: range,
        residual: Float[Tensor, "batch pos d_model"],
        mask: Int[Tensor, "batch key"],
        cache: Any,
        *,
        to_keys: bool = False,
        held: int = 0,
    ) -> Float[Tensor, "batch pos d_model"]:
        columns = mask.to(self.device)
        rows, last = Pass(residual.shape[1], mask.cpu()), layers.stop - 1 if to_keys else None
        with self._fused(rows, cache, last=last), suppress(Filled):
            residual = self.hooked(
                residual,
                start_at_layer=layers.start,
                stop_at_layer=layers.stop,
                attention_mask=columns,
                past_kv_cache=cache,
            )
        return residual

    def _fused(
        self, rows: Pass, cache: KeyValueCache | None, *, last: int | None = None
    ) -> AbstractContextManager[None]:
        """Context manager in which one pass runs on the engine.

        If ``last`` is given, the pass may end once
        the keys and values of layer ``last`` are complete.
        """
        attentions = [block.attn for block in self.hooked.blocks]
        stop = stop_layer(self.hooked.blocks, last, _EARLY)
        windows = [self.window(layer) for layer in range(self.shape.n_layers)]
        if cache is not None:
            windows = [cache.window(layer, window, rows) for layer, window in enumerate(windows)]
        forwards = [
            partial(_forward, attention, rows, windows[layer], self.scale(layer), layer == stop)
            for layer, attention in enumerate(attentions)
        ]
        return replaced_forwards(attentions, forwards)

    def _attention(self, layer: int) -> Any:
        return self.hooked.blocks[layer].attn

    def unusual_attention(self) -> str | None:
        cfg = self.hooked.cfg
        if cfg.attn_scores_soft_cap > 0:
            return "attn_scores_soft_cap"
        return next((name for name in ("use_attention_sinks", "use_logn_attn") if getattr(cfg, name, False)), None)

    sink_layers: frozenset[int] = frozenset()
    is_measured = False

    def head_kind(self, layer: int) -> HeadKind:
        return HeadKind(self.window(layer))

    def slow_attention(self) -> str | None:
        return None if _can_fuse(self.hooked) else "its attention is none that the attention engine computes"

    def residual_point(self, layer: int) -> Any:
        return self.hooked.blocks[layer].hook_resid_pre

    def rotary(self, layer: int, length: int) -> Rotary:
        attention, cfg = self._attention(layer), self.hooked.cfg
        if cfg.positional_embedding_type != "rotary":
            raise ValueError(
                f"the model's positional embedding is {cfg.positional_embedding_type!r}, not 'rotary', so it has no "
                "rotary site"
            )
        sin, cos = attention.calculate_sin_cos_rotary(
            cfg.rotary_dim, length, base=attention._rotary_base(), dtype=cfg.dtype
        )
        return Rotary(
            cos=cos.to(self.device),
            sin=sin.to(self.device),
            adjacent_pairs=cfg.rotary_adjacent_pairs,
            query_norm=_RmsNorm.of(attention.q_norm),
            key_norm=_RmsNorm.of(attention.k_norm),
        )

    def scale(self, layer: int) -> float:
        return 1 / float(self._attention(layer).attn_scale)

    def window(self, layer: int) -> int | None:
        return self.hooked.cfg.window_size if self._attention(layer).attn_type == "local" else None


_LAYOUTS = {
    **dict.fromkeys(("W_Q", "W_K", "W_V", "_W_K", "_W_V"), "head d_model d_head -> head d_head d_model"),
    "W_O": "head d_head d_model -> d_model head d_head",
    **dict.fromkeys(("W_gate", "W_in", "W_out", "W_U"), "inner outer -> outer inner"),
}
"""Memory layout from which ``F.linear`` can read a weight without a copy, by name of the weight."""


def _lay_out(hooked: Any) -> None:
    """Store weights in the memory layout that ``F.linear`` reads. Shapes and values do not change.

    TransformerLens stores the transpose of the matrix that ``F.linear`` reads. It therefore copies every matrix in
    every pass. For one new token, the copies take longer than the matrix products. With transposed strides, no copy is
    needed.
    """
    attentions = [block.attn for block in hooked.blocks]
    # Only gated MLPs use F.linear. All other MLPs multiply by their weights without a transpose.
    mlps = [block.mlp for block in hooked.blocks if hasattr(getattr(block, "mlp", None), "W_gate")]
    weights = [
        (weight, _LAYOUTS[name])
        for module in (*attentions, *mlps, hooked.unembed)
        for name, weight in module.named_parameters(recurse=False)
        if name in _LAYOUTS
    ]
    owners = Counter(weight.untyped_storage().data_ptr() for weight in hooked.parameters())
    for weight, layout in weights:
        shape, memory = layout.split(" -> ")
        # Weights that share memory (tied embeddings) and quantised weights (packed) keep their layout.
        plain = weight.is_floating_point() and weight.is_contiguous() and weight.ndim == len(shape.split())
        if plain and owners[weight.untyped_storage().data_ptr()] == 1:
            weight.data = rearrange(rearrange(weight.data, layout).contiguous(), f"{memory} -> {shape}")


def _copies(tensor: Tensor, copies: int) -> Tensor:
    return tensor if copies == 1 else tensor.repeat_interleave(copies, dim=0)


@dataclasses.dataclass(frozen=True, eq=False)
class _RmsNorm:
    """TransformerLens's ``RMSNorm`` without hooks and without rounding to the model's dtype."""

    weight: Tensor
    eps: float

    @classmethod
    def of(cls, norm: Any | None) -> _RmsNorm | None:
        return None if norm is None else cls(norm.w, norm.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(dim=-1, keepdim=True) + self.eps).sqrt() * self.weight.to(x.dtype)


_EARLY = (
    "hook_resid_pre",
    "ln1",
    *(f"attn.{name}" for name in ("hook_q", "hook_k", "hook_v", "q_norm", "k_norm", "hook_rot_q", "hook_rot_k")),
)
"""Modules of a block that have run by the time the keys and values of the block are complete."""


def _can_fuse(hooked: Any) -> bool:
    """Whether every layer computes ``softmax(Q K^T * scale) V`` over rotary queries and keys.

    The result is ``False`` if a layer's ``forward`` was replaced.
    """
    cfg = hooked.cfg
    return (
        cfg.positional_embedding_type == "rotary"
        and cfg.attn_scores_soft_cap <= 0
        and not any(getattr(cfg, name, False) for name in _UNUSUAL)
        and str(cfg.original_architecture) not in ("OlmoeForCausalLM", "Olmo2ForCausalLM", "Olmo3ForCausalLM")
        # The engine does not override a layer's forward that another library, such as accelerate, has replaced.
        and not any("forward" in vars(block.attn) for block in hooked.blocks)
    )


_UNUSUAL = (
    "use_attention_sinks",
    "use_logn_attn",
    "use_dynamic_ntk_rope",
    "load_in_4bit",
    "use_attn_result",
    "clip_qkv",
)


def _forward(
    layer: Any,
    rows: Pass,
    window: int | None,
    scale: float,
    stop: bool,
    query_input: Float[Tensor, "batch row *heads d_model"],
    key_input: Float[Tensor, "batch row *kv_heads d_model"],
    value_input: Float[Tensor, "batch row *kv_heads d_model"],
    past_kv_cache_entry: CacheEntry | None = None,
    additive_attention_mask: Tensor | None = None,
    attention_mask: Int[Tensor, "batch key"] | None = None,
    position_bias: Tensor | None = None,
) -> Float[Tensor, "batch row d_model"]:
    """Replacement for ``AbstractAttention.forward`` that runs on the engine with the same hooks."""
    cache = LayerCache() if past_kv_cache_entry is None else past_kv_cache_entry.layer
    rows.require(query_input, cache)
    q, k, v = layer.calculate_qkv_matrices(query_input, key_input, value_input)
    start, padding = cache.columns, attention_mask if rows.padded else None
    q = layer.hook_rot_q(layer.apply_rotary(q, start, padding))
    cache.append(layer.apply_rotary(k, start, padding), v)
    segments = cache.segments
    if is_hooked(layer.hook_rot_k):
        segments = (under_hook(layer.hook_rot_k, segments),)
    if stop:
        raise Filled
    z = layer.hook_z(attend(layer, rows, q, segments, window, scale))
    weight = rearrange(layer.W_O, "head d_head d_model -> d_model (head d_head)")
    return F.linear(rearrange(z, "batch row head d_head -> batch row (head d_head)"), weight, layer.b_O)
