"""Rotary tables that depend on the length of a sequence: longrope and dynamic NTK.

Hugging Face selects such a table by the longest sequence of a pass, and dynamic NTK also remembers the longest sequence
of earlier passes. The numbers of a prompt would therefore depend on the other prompts of the batch, and on earlier
prompts. This module gives each row of a batch the table that its prompt has alone in a fresh model.
"""

from __future__ import annotations

from collections.abc import Generator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from einops import rearrange
from jaxtyping import Int
from torch import Tensor

__all__ = ["LengthTables"]

_RESTARTING = ("Phi3", "Phimoe", "Phi4Multimodal")
"""Hugging Face's model classes whose ``generate`` runs the sequence again when it outgrows the table of short
sequences. In all other classes the keys before that length keep the short table."""


@dataclass(frozen=True)
class LengthTables:
    """Rotary embeddings of a Hugging Face model whose tables depend on the length of the sequence.

    Attributes:
        embeddings: The modules that compute the tables.
        limits: Largest lengths, in tokens, with the table of short sequences.
        restarts: Whether keys from before a limit are computed again once a response grows past the limit.
    """

    embeddings: tuple[Any, ...]
    limits: tuple[int, ...]
    restarts: bool

    @classmethod
    def of(cls, model: Any) -> LengthTables | None:
        """The embeddings of a Hugging Face model whose tables depend on the length; ``None`` if there are none."""
        found = {module: limits for module in model.modules() if (limits := _limits(module))}
        if not found:
            return None
        every = sorted({limit for limits in found.values() for limit in limits})
        restarts = type(model).__name__.startswith(_RESTARTING)
        return cls(tuple(found), tuple(every), restarts)

    def outgrown(self, mask: Int[Tensor, "batch key"], n_rows: int) -> bool:
        """Whether the keys before the last ``n_rows`` columns must be computed again, because a sequence got longer."""
        after = mask.sum(dim=1)
        before = mask[:, :-n_rows].sum(dim=1)
        return self.restarts and any(bool(((before <= limit) & (limit < after)).any()) for limit in self.limits)

    @contextmanager
    def fixed(self, lengths: Int[Tensor, "batch row"]) -> Generator[None]:
        """Let each row of a pass use the table of its own length, in tokens, inside a ``with`` block."""
        # Another library, such as accelerate, may have replaced this method for good.
        earlier = [embedding.forward for embedding in self.embeddings]
        replaced = ["forward" in vars(embedding) for embedding in self.embeddings]
        try:
            for embedding, forward in zip(self.embeddings, earlier, strict=True):
                vars(embedding)["forward"] = _RowTables(embedding, forward, lengths)
            yield
        finally:
            for embedding, forward, was_replaced in zip(self.embeddings, earlier, replaced, strict=True):
                vars(embedding).pop("forward", None)
                if was_replaced:
                    vars(embedding)["forward"] = forward
                _forget(embedding)


def _limits(module: Any) -> tuple[int, ...]:
    """Limits of the length-dependent tables of a module; empty if the module has no such table."""
    kinds = getattr(module, "rope_type", None)
    # TransformerLens wraps the module, and the wrapper has the attributes of what it wraps.
    if kinds is None or not hasattr(module, "config") or hasattr(type(module), "set_original_component"):
        return ()
    parameters = module.config.rope_parameters
    # Models with several kinds of layer have one type and one set of parameters per kind.
    by_layer = kinds if isinstance(kinds, Mapping) else {None: kinds}
    limits: list[int] = []
    for layer, kind in by_layer.items():
        if kind == "longrope":
            limits.append((parameters if layer is None else parameters[layer])["original_max_position_embeddings"])
        elif "dynamic" in str(kind):
            limits.append(module.original_max_seq_len)
    return tuple(limits)


def _forget(embedding: Any) -> None:
    """Undo what an embedding remembers of the longest sequence that it has seen."""
    for name in [name for name in vars(embedding) if name.endswith("max_seq_len_cached")]:
        setattr(embedding, name, embedding.original_max_seq_len)
        prefix = name.removesuffix("max_seq_len_cached")
        original = getattr(embedding, f"{prefix}original_inv_freq", None)
        if original is not None:
            inv_freq = getattr(embedding, f"{prefix}inv_freq")
            embedding.register_buffer(f"{prefix}inv_freq", original.clone().to(inv_freq.device), persistent=False)


@dataclass(frozen=True, eq=False)
class _RowTables:
    """``forward`` of a rotary embedding that computes every row with the table of the row's length."""

    embedding: Any
    original: Any
    lengths: Int[Tensor, "batch row"]

    def __call__(self, x: Tensor, position_ids: Int[Tensor, "batch row"], *layer: Any, **kinds: Any) -> Any:
        lengths = self.lengths.to(position_ids.device)
        positions = position_ids.expand(len(lengths), -1)
        tables: tuple[Tensor, Tensor] | None = None
        for length in lengths.unique().tolist():
            _forget(self.embedding)
            # Hugging Face takes the length from the largest position of the pass, so one position is added.
            last = torch.full_like(positions[:, :1], length - 1)
            inside = torch.cat((positions.clamp(max=length - 1), last), dim=1)
            computed = self.original(x, inside, *layer, **kinds)
            cos, sin = (table[:, :-1] for table in computed)
            if tables is None:
                tables = cos, sin
            else:
                chosen = rearrange(lengths == length, "batch row -> batch row 1")
                tables = torch.where(chosen, cos, tables[0]), torch.where(chosen, sin, tables[1])
        return tables
