"""Interface through which a FocusModel runs a ``HookedTransformer`` or a ``TransformerBridge``."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor
from transformers import DynamicCache

from focuslens.heads import HeadKind, ModelShape
from focuslens.model.engine import Forgetting
from focuslens.model.lean_layer import LeanLayer, Turn
from focuslens.model.rotary import Rotary

__all__ = ["Backend", "describe", "forgetting_of", "shape_of"]


@runtime_checkable
class Backend(Protocol):
    """Interface to a TransformerLens model, with the operations that a FocusModel needs."""

    hooked: Any
    shape: ModelShape
    is_bridge: bool
    """Whether the model is a ``TransformerBridge``. A bridge's cache may keep only the keys in a layer's window."""

    @property
    def device(self) -> torch.device: ...

    def require_supported(self) -> None:
        """Check that interventions support the model and its settings.

        Raises:
            ValueError: If interventions do not support a setting. The message names the setting.
        """
        ...

    def new_cache(self, batch: int, n_prompt: int = 0) -> Any:
        """An empty key-value cache for ``batch`` rows."""
        ...

    def fork(self, cache: Any, copies: int = 1) -> Any:
        """A new cache in which every batch row of ``cache`` occurs ``copies`` times in succession.

        The new cache can grow while ``cache`` stays unchanged. The two caches share keys and values if the backend's
        attention supports shared keys and values.
        """
        ...

    def forward(
        self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch key"], cache: Any | None, *, last_only: bool
    ) -> Float[Tensor, "batch row d_vocab"]:
        """Logits of all rows, or of the last row only. If a cache is given, the pass extends the cache in place."""
        ...

    def fill(self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch key"], cache: Any) -> None:
        """Append the keys and values of tokens to a cache. The pass may end as soon as the cache is complete."""
        ...

    def outgrown(self, mask: Int[Tensor, "batch key"], n_rows: int) -> bool:
        """Whether the keys before the last ``n_rows`` columns must be computed again for a pass of these columns."""
        ...

    def run_to(self, layer: int, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch key"]) -> None:
        """Run prompts, so that all hooks on the layers 0 to ``layer`` are called. Later layers may be skipped."""
        ...

    def unusual_attention(self) -> str | None:
        """Name of the setting that makes attention differ from ``softmax(Q K^T * scale) V``; ``None`` by default."""
        ...

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
        """Output of consecutive layers, whose part of the cache is extended. The mask of the cache does not change.

        The cache must be a cache of the attention engine. If ``to_keys`` is true, the output is not needed, and the
        last of the layers may end once its keys and values are complete. Each prompt has ``held`` further tokens, which
        a later pass runs.
        """
        ...

    def lean_layers(self) -> list[LeanLayer | None]:
        """Weights of each layer for :mod:`focuslens.model.lean_layer`; ``None`` for a layer that has other parts."""
        ...

    def embed(self, tokens: Int[Tensor, "batch pos"]) -> Float[Tensor, "batch pos d_model"]:
        """Input of the first layer. It is used only for models with lean layers."""
        ...

    def unembed(self, residual: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_vocab"]:
        """Logits of the output of the last layer. It is used only for models with lean layers."""
        ...

    def turns(
        self, plan: Sequence[LeanLayer | None], mask: Int[Tensor, "batch key"], n_rows: int, like: Tensor, held: int = 0
    ) -> dict[object, Turn]:
        """Rotary tables of the last ``n_rows`` columns, by the layers' key, in the dtype and on the device of ``like``.

        The rows of the first prompt come first. Each prompt has ``held`` further tokens, which a later pass runs.
        """
        ...

    @property
    def sink_layers(self) -> frozenset[int]:
        """Layers whose heads have a further logit without a value, so that rows of patterns sum to less than one."""
        ...

    @property
    def is_measured(self) -> bool:
        """Whether the engine runs the model through transformers' attention interface.

        Hook points can then act that TransformerLens's own attention ignores.
        """
        ...

    def head_kind(self, layer: int) -> HeadKind:
        """Kind of the attention heads of a layer, as far as it is known."""
        ...

    def slow_attention(self) -> str | None:
        """Reason why passes run on TransformerLens's own attention; ``None`` if they run on the attention engine."""
        ...

    def residual_point(self, layer: int) -> Any:
        """Hook point of a layer's input."""
        ...

    def rotary(self, layer: int, length: int) -> Rotary:
        """Functions from ``hook_q`` to ``hook_rot_q`` and from ``hook_k`` to ``hook_rot_k``, in one layer.

        The functions accept positions below ``length``.

        Raises:
            ValueError: If these functions are not a rotary embedding that :class:`Rotary` can compute.
        """
        ...

    def scale(self, layer: int) -> float:
        """Factor that multiplies the query-key products."""
        ...

    def window(self, layer: int) -> int | None:
        """Maximum number of keys that a row attends to, including the row's own key; ``None`` for no limit."""
        ...


def shape_of(cfg: Any) -> ModelShape:
    """Sizes of a model, from its TransformerLens configuration."""
    return ModelShape(
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_key_value_heads=getattr(cfg, "n_key_value_heads", None) or cfg.n_heads,
        d_head=cfg.d_head,
        d_model=cfg.d_model,
        d_vocab=cfg.d_vocab,
        n_ctx=cfg.n_ctx,
    )


def forgetting_of(config: Any, shape: ModelShape, n_prompt: int) -> Forgetting | None:
    """Keys that Hugging Face's ``generate`` drops, by configuration; ``None`` if it drops none or is unknown."""
    if config is None:
        return None
    windows = tuple(getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers)
    known = len(windows) == shape.n_layers and any(window is not None for window in windows)
    return Forgetting(n_prompt, windows) if known else None


def describe(backend: Backend) -> dict[str, Any]:
    """Description of a backend for result files: class, dtype, device, context length and a digest of the weights."""
    return {
        "backend": type(backend.hooked).__name__,
        "dtype": str(backend.hooked.cfg.dtype).removeprefix("torch."),
        "device": backend.device.type,
        "n_ctx": backend.shape.n_ctx,
        "weights": _weights_digest(backend.hooked),
    }


def _weights_digest(hooked: Any) -> str:
    """Digest of the name, the shape and up to 256 evenly spaced values of every parameter.

    A digest of all values would take minutes for a large model. Different checkpoints have different digests. Further
    training also changes the digest. An edit of a few weights may leave the digest unchanged.
    """
    digest = hashlib.sha256()
    for name, parameter in hooked.named_parameters():
        values = parameter.detach().flatten()
        indices = torch.linspace(0, max(values.numel() - 1, 0), min(values.numel(), 256), dtype=torch.float64).long()
        excerpt = values[indices.to(values.device)].float().cpu().numpy().tobytes()
        digest.update(f"{name}{tuple(parameter.shape)}".encode() + excerpt)
    return digest.hexdigest()[:16]
