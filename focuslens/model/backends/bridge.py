"""Backend that runs a ``TransformerBridge`` (TransformerLens 3.x and 4.x) on the attention engine."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Generator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any, cast

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

from focuslens.heads import HeadKind
from focuslens.model.attention import LayerCache
from focuslens.model.backends.base import forgetting_of, shape_of
from focuslens.model.backends.block_ranges import block_input, run_blocks
from focuslens.model.backends.interfaced import (
    ENGINE,
    LayerForm,
    LayerPass,
    configs_of,
    engine_forward,
    implemented,
    is_of_transformers,
)
from focuslens.model.backends.lean_weights import bridge_layer
from focuslens.model.backends.length_tables import LengthTables
from focuslens.model.backends.measuring import NotInterfaced, difference_of, measured_forms, require_unchanged
from focuslens.model.backends.unread_caches import reading_cache
from focuslens.model.engine import (
    Filled,
    KeyValueCache,
    Pass,
    attend,
    replaced_forwards,
    stop_layer,
    without_dropout,
    without_hooks,
)
from focuslens.model.lean_layer import LeanLayer, Turn
from focuslens.model.rotary import Rotary

__all__ = ["BridgeBackend"]


class BridgeBackend:
    """Backend for a ``TransformerBridge`` (TransformerLens 3.x and 4.x): a Hugging Face model with hook points."""

    is_bridge = True
    _measured: tuple[LayerForm, ...] | str | None = None

    def __init__(self, hooked: Any) -> None:
        self.hooked = hooked
        self.shape = shape_of(hooked.cfg)
        self._config = getattr(hooked.original_model, "config", None)
        self._tables = LengthTables.of(hooked.original_model)

    @property
    def device(self) -> torch.device:
        return next(self.hooked.original_model.parameters()).device

    def require_supported(self) -> None:
        pass

    def head_kind(self, layer: int) -> HeadKind:
        sink, forms = layer in self.sink_layers, self._forms()
        if forms is None:
            return HeadKind(self.window(layer), sink=sink)
        form = forms[layer]
        return HeadKind(form.window, form.steps.chunk, sink=sink, rotary=form.rotary)

    def slow_attention(self) -> str | None:
        if _can_fuse(self.hooked):
            return None
        try:
            require_unchanged(self.hooked)
        except NotInterfaced as error:
            return str(error)
        if self._measured is None:
            self._measured = self._measure()
        return self._measured if isinstance(self._measured, str) else None

    @property
    def is_measured(self) -> bool:
        return self._forms() is not None

    def _forms(self) -> tuple[LayerForm, ...] | None:
        """Form of each layer's attention if it was measured; ``None`` for the families of :data:`_PLAIN`."""
        return self._measured if isinstance(self._measured, tuple) and not _can_fuse(self.hooked) else None

    def _measure(self) -> tuple[LayerForm, ...] | str:
        """Forms of the layers, or the reason why the engine cannot compute them."""
        with without_hooks(self.hooked), without_dropout(self.hooked):
            try:
                self._measured = forms = measured_forms(self.hooked, self.shape)
                difference = difference_of(self)
            except NotInterfaced as error:
                return str(error)
            finally:
                self._measured = None
        return forms if difference is None else f"the attention engine gives {difference}"

    def new_cache(self, batch: int, n_prompt: int = 0) -> Any:
        if self.slow_attention() is None:
            forgetting = forgetting_of(self._config, self.shape, n_prompt)
            return KeyValueCache.empty(self.shape, batch, self.device, forgetting)
        # Hooks need absolute key columns. If no config is passed, the cache keeps every key, even in layers with a
        # sliding window.
        return DynamicCache()

    def fork(self, cache: Any, copies: int = 1) -> Any:
        if isinstance(cache, KeyValueCache):
            return cache.shared(copies)
        fork = copy.copy(cache)
        fork.layers = [copy.copy(layer) for layer in cache.layers]
        if copies > 1:
            fork.batch_repeat_interleave(copies)
        return fork

    def forward(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch key"], cache: Any | None, *, last_only: bool
    ) -> Float[Tensor, "batch row d_vocab"]:
        return self._forward(tokens, mask, cache, **({"logits_to_keep": 1} if last_only else {}))

    def _forward(self, tokens: Tensor, mask: Tensor, cache: Any | None, *, held: int = 0, **arguments: Any) -> Tensor:
        """Run one pass. Each prompt has ``held`` further tokens, which a later pass runs."""
        if isinstance(cache, KeyValueCache) or (cache is None and self.slow_attention() is None):
            return self._fused_forward(tokens, mask, cache, held=held, **arguments)
        if cache is not None:
            arguments["past_key_values"] = cache
        attentions = [getattr(block, "attn", None) for block in self.hooked.blocks]
        with self._length_tables(mask, tokens.shape[1], held), reading_cache(attentions, cache):
            arguments.update(attention_mask=mask.to(self.device), use_cache=cache is not None)
            return self.hooked(tokens, return_type="logits", **arguments)

    def fill(self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch key"], cache: Any) -> None:
        last = {"last": self.shape.n_layers - 1} if isinstance(cache, KeyValueCache) else {}
        with suppress(Filled):
            self._forward(tokens, mask, cache, held=1, logits_to_keep=1, **last)

    def outgrown(self, mask: Int[Tensor, "batch key"], n_rows: int) -> bool:
        return self._tables is not None and self._tables.outgrown(mask, n_rows)

    def run_to(self, layer: int, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch key"]) -> None:
        last = {"last": layer} if self.slow_attention() is None else {}
        with suppress(Filled):
            self._forward(tokens, mask, None, logits_to_keep=1, **last)

    def _fused_forward(
        self,
        tokens: Tensor,
        mask: Tensor,
        cache: KeyValueCache | None,
        *,
        held: int,
        last: int | None = None,
        **arguments: Any,
    ) -> Tensor:
        """Run one pass on the attention engine. A :class:`Pass` provides the attention masks of the layers."""
        n_rows = tokens.shape[1]
        cache = KeyValueCache.empty(self.shape, len(tokens), self.device) if cache is None else cache
        cache.append_attention_mask(mask[:, -n_rows:])
        arguments.update(position_ids=self._positions(mask, n_rows), use_cache=False)
        with self._length_tables(mask, n_rows, held), self._fused(Pass(n_rows, mask.cpu()), cache, last=last):
            return self.hooked(tokens, return_type="logits", **arguments)

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
        n_rows, base = residual.shape[1], self.hooked.original_model.base_model
        positions, last = self._positions(mask, n_rows), layers.stop - 1 if to_keys else None
        if self._forms() is not None:
            with self._length_tables(mask, n_rows, held), self._fused(Pass(n_rows, mask.cpu()), cache, last=last):
                return run_blocks(self.hooked, layers, residual, positions)
        with self._length_tables(mask, n_rows, held):
            embeddings = base.rotary_emb(residual, positions.to(residual.device))
        with self._fused(Pass(n_rows, mask.cpu()), cache, last=last), suppress(Filled):
            for block in base.layers[layers.start : layers.stop]:
                residual = block(residual, position_ids=positions, position_embeddings=embeddings, use_cache=False)
        return residual

    def embed(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        if self._forms() is not None:
            return block_input(self.hooked, tokens)
        return self.hooked.original_model.base_model.embed_tokens(tokens)

    def unembed(self, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        model = self.hooked.original_model
        return model.lm_head(model.base_model.norm(residual))

    def lean_layers(self) -> list[LeanLayer | None]:
        if not _can_fuse(self.hooked):
            return [None] * self.shape.n_layers
        return [
            bridge_layer(block, self.scale(layer), self.window(layer)) for layer, block in enumerate(self.hooked.blocks)
        ]

    def turns(
        self, plan: Sequence[LeanLayer | None], mask: Int[Tensor, "batch key"], n_rows: int, like: Tensor, held: int = 0
    ) -> dict[object, Turn]:
        positions = self._positions(mask, n_rows)
        with self._length_tables(mask, n_rows, held):
            tables = self.hooked.original_model.base_model.rotary_emb(like, positions.to(like.device))
        # Without padding, Hugging Face has one table for all prompts.
        cos, sin = (table.expand(len(mask), -1, -1).flatten(0, 1).to(like) for table in tables)
        return {"all": Turn.of(cos, sin, adjacent_pairs=False)}

    def _length_tables(self, mask: Tensor, n_rows: int, held: int) -> AbstractContextManager[None]:
        """Let each row of a pass use the rotary table of its own length.

        A prompt has the table of its whole length, its ``held`` tokens included. A token after the prompt has the table
        of the length up to that token.
        """
        if self._tables is None:
            return nullcontext()
        lengths = mask.long().cumsum(dim=1).clamp(min=1)
        if n_rows == mask.shape[1]:
            lengths = (lengths[:, -1:] + held).expand_as(lengths)
        return self._tables.fixed(lengths[:, -n_rows:])

    def _fused(self, rows: Pass, cache: KeyValueCache, *, last: int | None) -> AbstractContextManager[None]:
        """Context manager in which one pass runs on the engine.

        If ``last`` is given, the pass may end once the keys and values of layer ``last`` are complete.
        """
        attentions = [block.attn for block in self.hooked.blocks]
        windows = [cache.window(layer, self.window(layer), rows) for layer in range(self.shape.n_layers)]
        if (forms := self._forms()) is not None:
            # Some architectures norm after attention, so that a hook on a norm may need the whole layer.
            stop = stop_layer(self.hooked.blocks, last, [name for name in _EARLY if name != "ln1"])
            passes = [
                LayerPass(attention, rows, entries, replace(form, window=window), layer == stop)
                for layer, (attention, entries, form, window) in enumerate(
                    zip(attentions, cache.layers, forms, windows, strict=True)
                )
            ]
            measured = [partial(engine_forward, layer) for layer in passes]
            return _on_the_engine(attentions, measured, configs_of(self.hooked))
        stop = stop_layer(self.hooked.blocks, last, _EARLY)
        forwards = [
            partial(_forward, attention, rows, entries, windows[layer], self.scale(layer), layer == stop)
            for layer, (attention, entries) in enumerate(zip(attentions, cache.layers, strict=True))
        ]
        return _on_the_engine(attentions, forwards, [self.hooked.original_model.config])

    def _positions(self, mask: Tensor, n_rows: int) -> Tensor:
        """Token positions ``[batch row]`` of the last ``n_rows`` columns. Positions do not count padding columns."""
        return (mask.long().cumsum(dim=1) - 1).clamp(min=0)[:, -n_rows:].to(self.device)

    def _attention(self, layer: int) -> Any:
        return self.hooked.blocks[layer].attn.original_component

    def unusual_attention(self) -> str | None:
        if getattr(self.hooked.original_model.config, "attn_logit_softcapping", None):
            return "attn_logit_softcapping"
        return "sinks" if self.sink_layers else None

    @property
    def sink_layers(self) -> frozenset[int]:
        attentions = [getattr(getattr(block, "attn", None), "original_component", None) for block in self.hooked.blocks]
        return frozenset(i for i, layer in enumerate(attentions) if getattr(layer, "sinks", None) is not None)

    def residual_point(self, layer: int) -> Any:
        return self.hooked.blocks[layer].hook_in

    def rotary(self, layer: int, length: int) -> Rotary:
        model = self.hooked.original_model
        embedding = getattr(model.base_model, "rotary_emb", None)
        # A bridge can wrap the embedding in a component that takes any arguments.
        own: Any = getattr(embedding, "original_component", None) or embedding
        # :class:`Rotary` does not support two variants: a separate rotary table for each kind of layer (Gemma 3), and a
        # norm over all heads of a projection (OLMo 2).
        attention = self._attention(layer)
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        per_head = all(norm is None or norm.weight.shape == (self.shape.d_head,) for norm in norms)
        if embedding is None or "layer_type" in inspect.signature(own.forward).parameters or not per_head:
            raise ValueError(
                f"the step from queries and keys to rotated ones of {type(model).__name__} cannot be differentiated "
                "here, so directions cannot be trained at the projection site"
            )
        positions = torch.arange(length, device=self.device)[None]
        example = torch.zeros(1, dtype=self.hooked.cfg.dtype, device=self.device)
        # The tables have the example's dtype and device.
        with torch.no_grad(), self._length_tables(torch.ones(1, length), length, held=0):
            cos, sin = embedding(example, positions)
        query_norm, key_norm = (_on(self.device, norm) for norm in norms)
        return Rotary(cos=cos[0], sin=sin[0], adjacent_pairs=False, query_norm=query_norm, key_norm=key_norm)

    def scale(self, layer: int) -> float:
        if (forms := self._forms()) is not None:
            return forms[layer].scale
        attention = self._attention(layer)
        if not hasattr(attention, "scaling"):
            raise ValueError(f"{type(attention).__name__} does not tell by what it scales attention scores")
        return float(attention.scaling)

    def window(self, layer: int) -> int | None:
        if (forms := self._forms()) is not None:
            return forms[layer].window
        attention, config = self._attention(layer), self.hooked.original_model.config
        if hasattr(attention, "sliding_window"):
            return cast("int | None", attention.sliding_window if getattr(attention, "is_sliding", True) else None)
        # Other classes read the window from the configuration, or have none, even if the configuration has the key.
        reads_it = type(attention).__name__ in _WINDOW_IN_CONFIG
        return cast("int | None", getattr(config, "sliding_window", None)) if reads_it else None


def _on(device: torch.device, norm: Any | None) -> Any | None:
    """The norm itself, or a copy on ``device`` if a device map has put the norm on another device."""
    return norm if norm is None or norm.weight.device == device else copy.deepcopy(norm).to(device)


_EARLY = (
    "hook_in",
    "ln1",
    *(f"attn.{name}" for name in ("hook_in", "q", "k", "v", "q_norm", "k_norm", "hook_q_normed", "hook_k_normed")),
    *(f"attn.{name}" for name in ("hook_cos", "hook_sin", "hook_rot_q", "hook_rot_k")),
)
"""Modules of a block that have run by the time the keys and values of the block are complete."""

_WINDOW_IN_CONFIG = (
    *("MistralAttention", "MixtralAttention", "Ministral3Attention", "Starcoder2Attention"),
    *("Phi3Attention", "PhimoeAttention", "OlmoeAttention", "MiniMaxAttention"),
)
"""Hugging Face classes of attention that read the sliding window of all layers from the configuration."""

_PLAIN = ("LlamaAttention", "MistralAttention", "Qwen2Attention", "Qwen3Attention")
"""Hugging Face classes whose attention is ``softmax(Q K^T * scale) V`` over rotary queries and keys, with or without
per-head norms."""


def _can_fuse(hooked: Any) -> bool:
    """Whether :func:`_forward` can compute every layer's attention, and every layer has its original ``forward``."""
    unusual = ("use_split_qkv_input", "use_attn_in", "use_attn_result", "gated_q_proj")
    # A checkpoint's own code can have classes of the same names, and build other masks.
    return (
        not any(getattr(hooked.cfg, name, False) for name in unusual)
        and is_of_transformers(hooked.original_model)
        and all(
            type(block.attn).__name__ == "PositionEmbeddingsAttentionBridge"
            and type(block.attn.original_component).__name__ in _PLAIN
            and is_of_transformers(block.attn.original_component)
            and not block.attn.original_component._forward_pre_hooks
            and "forward" not in vars(block.attn)
            for block in hooked.blocks
        )
    )


@contextmanager
def _on_the_engine(attentions: Sequence[Any], forwards: Sequence[Any], configs: Sequence[Any]) -> Generator[None]:
    """Replace the ``forward`` of attention layers, and prevent Hugging Face from building a full attention mask."""
    with implemented(configs, ENGINE), replaced_forwards(attentions, forwards):
        yield


def _forward(
    layer: Any,
    rows: Pass,
    cache: LayerCache,
    window: int | None,
    scale: float,
    stop: bool,
    /,  # Hugging Face passes its arguments by name, and has one named "cache" since version 5.24
    hidden_states: Float[Tensor, "batch row d_model"],
    *,
    position_embeddings: tuple[Tensor, Tensor],
    **_: Any,
) -> tuple[Float[Tensor, "batch row d_model"], None]:
    """Replacement for ``PositionEmbeddingsAttentionBridge.forward`` that runs on the engine with the same hooks."""
    rows.require(hidden_states, cache)
    hidden_states, d_head = layer.hook_in(hidden_states), layer.original_component.head_dim
    q, k, v = (
        rearrange(project(hidden_states), "batch row (head d) -> batch head row d", d=d_head)
        for project in (layer.q, layer.k, layer.v)
    )
    if "q_norm" in layer.submodules:
        q, k = layer.hook_q_normed(layer.q_norm(q)), layer.hook_k_normed(layer.k_norm(k))
    q, k = apply_rotary_pos_emb(q, k, *layer._apply_position_embedding_hooks(position_embeddings))
    q, k = layer.hook_rot_q(q), layer.hook_rot_k(k)
    cache.append(*(rearrange(x, "batch kv row d -> batch row kv d") for x in (k, v)))
    if stop:
        raise Filled
    q = rearrange(q, "batch head row d -> batch row head d")
    z = attend(layer, rows, q, cache.segments, window, scale)
    return layer.hook_out(layer.o(rearrange(z, "batch row head d -> batch row (head d)"))), None
