"""What a FocusModel needs of a TransformerLens model, whichever of the two kinds it is."""

from __future__ import annotations

import hashlib
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from focuslens.heads import ModelShape
from focuslens.model.rotary import Rotary

__all__ = ["Backend", "describe", "shape_of"]


@runtime_checkable
class Backend(Protocol):
    """What a FocusModel needs of a TransformerLens model."""

    hooked: Any
    shape: ModelShape
    is_bridge: bool
    """Whether the model is a ``TransformerBridge``, whose own cache keeps no more keys of a layer than its window."""

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

    def fill(self, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch key"], cache: Any) -> None:
        """Extend a cache by the given tokens' keys and values, which need nothing of the last layer beyond them."""
        ...

    def run_to(self, layer: int, tokens: Int[Tensor, "batch pos"], mask: Int[Tensor, "batch key"]) -> None:
        """Run prompts for what hooks see, as far as anybody looks at the given layer; later layers may not run."""
        ...

    def run_from(
        self, layer: int, residual: Float[Tensor, "batch pos d_model"], mask: Int[Tensor, "batch key"], cache: Any
    ) -> None:
        """Fill the cache of a layer and of those above, given that layer's input; only with the engine's caches."""
        ...

    def unusual_attention(self) -> str | None:
        """A setting by which attention is more than the softmax of scaled products of queries and keys, if any."""
        ...

    def residual_point(self, layer: int) -> Any:
        """The hook point that a layer's input goes through."""
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


def shape_of(cfg: Any) -> ModelShape:
    """The sizes that a TransformerLens configuration declares."""
    return ModelShape(
        n_layers=cfg.n_layers,
        n_heads=cfg.n_heads,
        n_key_value_heads=getattr(cfg, "n_key_value_heads", None) or cfg.n_heads,
        d_head=cfg.d_head,
        d_model=cfg.d_model,
        d_vocab=cfg.d_vocab,
        n_ctx=cfg.n_ctx,
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
