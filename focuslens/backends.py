"""The two TransformerLens models that can carry a FocusModel, behind one small interface.

``HookedTransformer`` (TransformerLens 3.x) and ``TransformerBridge`` (3.x and 4.x) carry the same hook names. What
differs, and is settled here: the key-value cache, attention masks, and how logits of the last row alone are asked for.
"""

from __future__ import annotations

import copy
import dataclasses
import hashlib
import inspect
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, Protocol, cast, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from focuslens.attention import LayerCache
from focuslens.engine import KeyValueCache, Pass, can_fuse, fused_attention
from focuslens.rotary import Rotary

__all__ = ["Backend", "BridgeBackend", "HookedBackend", "ModelShape", "backend_for", "describe"]


@dataclass(frozen=True)
class ModelShape:
    """The sizes that interventions and scores depend on."""

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_model: int
    d_vocab: int
    n_ctx: int

    def key_value_head(self, head: int) -> int:
        """The key-value head whose keys and values query head ``head`` reads."""
        return head // (self.n_heads // self.n_key_value_heads)


@runtime_checkable
class Backend(Protocol):
    """What a FocusModel needs of a TransformerLens model."""

    hooked: Any
    shape: ModelShape

    @property
    def device(self) -> torch.device: ...

    def require_supported(self) -> None:
        """Check that the model is in a state that interventions understand.

        Raises:
            ValueError: If it is not; the message says what to change.
        """
        ...

    def new_cache(self, batch: int) -> Any:
        """An empty key-value cache."""
        ...

    def fork(self, cache: Any, copies: int = 1) -> Any:
        """A cache that can be extended without changing the given one, for every row ``copies`` times in a row.

        Keys and values are shared, not copied, where the backend's attention can read shared ones.
        """
        ...

    def forward(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch key"], cache: Any | None, *, last_only: bool
    ) -> Float[Tensor, "batch row d_vocab"]:
        """Logits of the given tokens (or the last of them), extending ``cache`` in place where there is one."""
        ...

    def rotary(self, layer: int, length: int) -> Rotary:
        """The step from ``hook_q``, ``hook_k`` to ``hook_rot_q``, ``hook_rot_k`` for positions below ``length``."""
        ...

    def scale(self, layer: int) -> float:
        """What query-key products are multiplied by."""
        ...

    def window(self, layer: int) -> int | None:
        """How many keys, its own included, a row sees at most; ``None`` for all."""
        ...


def _shape(cfg: Any) -> ModelShape:
    return ModelShape(
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_key_value_heads=getattr(cfg, "n_key_value_heads", None) or cfg.n_heads,
        d_head=cfg.d_head,
        d_model=cfg.d_model,
        d_vocab=cfg.d_vocab,
        n_ctx=cfg.n_ctx,
    )


class HookedBackend:
    """A ``HookedTransformer`` (TransformerLens 3.x)."""

    def __init__(self, hooked: Any) -> None:
        self.hooked = hooked
        self.shape = _shape(hooked.cfg)

    @property
    def device(self) -> torch.device:
        return next(self.hooked.parameters()).device

    def require_supported(self) -> None:
        cfg = self.hooked.cfg
        if getattr(cfg, "ungroup_grouped_query_attention", False) and self.shape.n_key_value_heads < self.shape.n_heads:
            raise ValueError(
                "the model's grouped keys and values are ungrouped, so hook_k has one head a query head; call "
                "hooked.set_ungroup_grouped_query_attention(False)"
            )

    def new_cache(self, batch: int) -> Any:
        self.require_supported()
        if can_fuse(self.hooked):
            mask = torch.zeros(batch, 0, dtype=torch.long, device=self.device)
            heads = (self.shape.n_key_value_heads, self.shape.d_head)
            return KeyValueCache([LayerCache() for _ in range(self.shape.n_layers)], mask, heads)
        from transformer_lens.cache.key_value_cache import TransformerLensKeyValueCache

        return TransformerLensKeyValueCache.init_cache(self.hooked.cfg, self.device, batch)

    def fork(self, cache: Any, copies: int = 1) -> Any:
        if isinstance(cache, KeyValueCache):
            return cache.shared(copies)
        # Appending concatenates into new tensors, so entries that share tensors never see each other's growth.
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
        fuse = isinstance(cache, KeyValueCache) if cache is not None else can_fuse(hooked)
        with fused_attention(hooked, Pass(tokens.shape[1], mask.cpu())) if fuse else nullcontext():
            if not last_only:
                return hooked(tokens, return_type="logits", **arguments)
            # Unembedding a long prompt costs more memory than running it, and only its last row is wanted.
            residual = hooked(tokens, stop_at_layer=self.shape.n_layers, **arguments)[:, -1:]
        if hooked.cfg.normalization_type is not None:
            residual = hooked.ln_final(residual)
        logits = hooked.unembed(residual)
        cap = hooked.cfg.output_logits_soft_cap
        return cap * torch.tanh(logits / cap) if cap > 0 else logits

    def _attention(self, layer: int) -> Any:
        return self.hooked.blocks[layer].attn

    def rotary(self, layer: int, length: int) -> Rotary:
        attention, cfg = self._attention(layer), self.hooked.cfg
        if cfg.positional_embedding_type != "rotary":
            raise ValueError(
                f"positions are embedded as {cfg.positional_embedding_type!r}, not rotary: it has no rotary site"
            )
        sin, cos = attention.calculate_sin_cos_rotary(
            cfg.rotary_dim, length, base=attention._rotary_base(), dtype=cfg.dtype
        )
        return Rotary(
            cos=cos.to(self.device),
            sin=sin.to(self.device),
            adjacent_pairs=cfg.rotary_adjacent_pairs,
            query_norm=_rms_norm(attention.q_norm),
            key_norm=_rms_norm(attention.k_norm),
        )

    def scale(self, layer: int) -> float:
        return 1 / float(self._attention(layer).attn_scale)

    def window(self, layer: int) -> int | None:
        return self.hooked.cfg.window_size if self._attention(layer).attn_type == "local" else None


def _copies(tensor: Tensor, copies: int) -> Tensor:
    return tensor if copies == 1 else tensor.repeat_interleave(copies, dim=0)


def _rms_norm(norm: Any | None) -> Callable[[Tensor], Tensor] | None:
    """TransformerLens's ``RMSNorm``, but not rounded to the model's dtype, and without its hooks."""
    if norm is None:
        return None

    def apply(x: Tensor) -> Tensor:
        return x / (x.pow(2).mean(dim=-1, keepdim=True) + norm.eps).sqrt() * norm.w.to(x.dtype)

    return apply


class BridgeBackend:
    """A ``TransformerBridge`` (TransformerLens 3.x and 4.x): hooks around the Hugging Face model."""

    def __init__(self, hooked: Any) -> None:
        self.hooked = hooked
        self.shape = _shape(hooked.cfg)

    @property
    def device(self) -> torch.device:
        return next(self.hooked.original_model.parameters()).device

    def require_supported(self) -> None:
        pass

    def new_cache(self, batch: int) -> Any:
        # Without a config the cache keeps every key, also in layers with a sliding window: hooks count on
        # key columns being absolute.
        return DynamicCache()

    def fork(self, cache: Any, copies: int = 1) -> Any:
        fork = copy.copy(cache)
        fork.layers = [copy.copy(layer) for layer in cache.layers]
        if copies > 1:
            fork.batch_repeat_interleave(copies)
        return fork

    def forward(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch key"], cache: Any | None, *, last_only: bool
    ) -> Float[Tensor, "batch row d_vocab"]:
        arguments: dict[str, Any] = {"attention_mask": mask.to(self.device)}
        if cache is not None:
            arguments.update(past_key_values=cache, use_cache=True)
        else:
            arguments.update(use_cache=False)
        if last_only:
            arguments["logits_to_keep"] = 1
        return self.hooked(tokens, return_type="logits", **arguments)

    def _attention(self, layer: int) -> Any:
        return self.hooked.blocks[layer].attn.original_component

    def rotary(self, layer: int, length: int) -> Rotary:
        model = self.hooked.original_model
        embedding = getattr(model.base_model, "rotary_emb", None)
        # Gemma 3 has a table for each kind of layer, OLMo 2 norms over all heads of a projection together.
        attention = self._attention(layer)
        norms = [getattr(attention, name, None) for name in ("q_norm", "k_norm")]
        per_head = all(norm is None or norm.weight.shape == (self.shape.d_head,) for norm in norms)
        if embedding is None or "layer_type" in inspect.signature(embedding.forward).parameters or not per_head:
            raise ValueError(
                f"the step from queries and keys to rotated ones of {type(model).__name__} is not one that can be "
                "differentiated here, so directions cannot be trained at the projection site; use site='rotary'"
            )
        positions = torch.arange(length, device=self.device)[None]
        like = torch.zeros(1, dtype=self.hooked.cfg.dtype, device=self.device)
        with torch.no_grad():
            cos, sin = embedding(like, positions)
        return Rotary(cos=cos[0], sin=sin[0], adjacent_pairs=False, query_norm=norms[0], key_norm=norms[1])

    def scale(self, layer: int) -> float:
        return float(self._attention(layer).scaling)

    def window(self, layer: int) -> int | None:
        attention, config = self._attention(layer), self.hooked.original_model.config
        if hasattr(attention, "sliding_window"):
            return cast("int | None", attention.sliding_window)
        # Mistral's attention has no such attribute and reads the configuration itself.
        if getattr(config, "use_sliding_window", True) is False:
            return None
        return cast("int | None", getattr(config, "sliding_window", None))


def backend_for(hooked: Any) -> Backend:
    """The backend that fits a TransformerLens model.

    Raises:
        TypeError: If it is neither a ``HookedTransformer`` nor a ``TransformerBridge``.
    """
    names = {cls.__name__ for cls in type(hooked).__mro__}
    if "TransformerBridge" in names:
        return BridgeBackend(hooked)
    if "HookedTransformer" in names:
        return HookedBackend(hooked)
    raise TypeError(
        f"expected a HookedTransformer or a TransformerBridge, got {type(hooked).__name__}; "
        "to load a checkpoint use FocusModel.from_pretrained"
    )


def describe(backend: Backend) -> dict[str, Any]:
    """Backend, dtype, device, context and a digest of the weights, for result files."""
    return {
        "backend": type(backend.hooked).__name__,
        "dtype": str(backend.hooked.cfg.dtype).removeprefix("torch."),
        "device": backend.device.type,
        "n_ctx": backend.shape.n_ctx,
        "weights": _weights_digest(backend.hooked),
    }


def _weights_digest(hooked: Any) -> str:
    """A digest of every parameter's name and shape and of up to 256 of its values, spread evenly.

    Reading all values of a large model takes minutes. Another checkpoint, or one trained further, differs in these; an
    edit of single weights may not.
    """
    digest = hashlib.sha256()
    for name, parameter in hooked.named_parameters():
        values = parameter.detach().flatten()
        places = torch.linspace(0, max(values.numel() - 1, 0), min(values.numel(), 256), dtype=torch.float64).long()
        sample = values[places.to(values.device)].float().cpu().numpy().tobytes()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + sample)
    return digest.hexdigest()[:16]
