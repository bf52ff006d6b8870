"""State of a training run: trained vectors, optimizer, losses, and the file from which an interrupted run resumes."""

from __future__ import annotations

import hashlib
import io
import math
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.directions.activations import LayerHeads
from focuslens.heads import Head
from focuslens.interventions.low_rank import LowRank
from focuslens.util.files import write_atomically

__all__ = ["StateFile", "TrainedVectors", "TrainingState", "initial_vectors"]

_CHECKPOINT_SECONDS = 60.0
"""Longest time between two checkpoints, unless a single step takes longer."""


@dataclass(frozen=True, eq=False)
class TrainedVectors:
    """Parameters of a training run.

    Attributes:
        query: ``d_Q`` of each head; its constant part if there is a product.
        key: ``d_K`` of each key-value head in the groups of heads, layer by layer; ``None`` at the rotary site.
        product: ``U`` and ``V`` of each head; ``None`` for rank 0.
    """

    query: Float[Tensor, "n d_head"]
    key: Float[Tensor, "m d_head"] | None = None
    product: LowRank | None = None

    @property
    def tensors(self) -> list[Tensor]:
        """All parameters, in the order of checkpoints."""
        key = [] if self.key is None else [self.key]
        return [self.query, *key, *([] if self.product is None else [self.product.u, self.product.v])]

    def key_by_head(self, groups: Sequence[LayerHeads]) -> Float[Tensor, "n d_head"] | None:
        """Key vector of each query head: the vector of the key-value head that the query head reads."""
        if self.key is None:
            return None
        rows = [0] * len(self.query)
        first = 0
        for group in groups:
            for place, read in zip(group.places, group.reads, strict=True):
                rows[place] = first + read
            first += len(group.key_value_heads)
        return self.key[rows]


def initial_vectors(
    heads: Sequence[Head],
    groups: Sequence[LayerHeads],
    d_head: int,
    device: torch.device,
    *,
    std: float,
    seed: int,
    rank: int,
    keys: bool,
) -> TrainedVectors:
    """Random initial vectors. Those of a head do not depend on which other heads are trained.

    Vectors have the standard deviation ``std``. ``U`` is zero, so that training starts at the initial vectors of rank
    0. ``V`` has the standard deviation ``1 / sqrt(d_head)``, so that ``V^T q`` has the size of the components of ``q``.

    Raises:
        ValueError: If the rank exceeds ``d_head``.
    """
    if rank > d_head:
        raise ValueError(f"rank is {rank}; it must be at most d_head = {d_head}")

    def noise(places: Sequence[tuple[int, int]], kind: int, *size: int) -> Tensor:
        rows: list[Tensor] = []
        for layer, head in places:
            digest = hashlib.sha256(f"{seed}/{kind}/{layer}/{head}".encode()).digest()
            generator = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
            rows.append(torch.randn(*size, generator=generator))
        return torch.stack(rows)

    key_value_heads = [(group.layer, head) for group in groups for head in group.key_value_heads]
    query = (noise(heads, 0, d_head) * std).to(device).requires_grad_()
    key = (noise(key_value_heads, 1, d_head) * std).to(device).requires_grad_() if keys else None
    if not rank:
        return TrainedVectors(query, key)
    v = (noise(heads, 2, d_head, rank) / math.sqrt(d_head)).to(device).requires_grad_()
    return TrainedVectors(query, key, LowRank(torch.zeros_like(v, requires_grad=True), v))


@dataclass(eq=False)
class TrainingState:
    """Mutable state of a training run."""

    vectors: TrainedVectors
    optimizer: torch.optim.Optimizer
    step: int = 0
    losses: list[Float[Tensor, "loss"]] = field(default_factory=list[Tensor])
    running: Float[Tensor, "loss"] | None = None


@dataclass
class StateFile:
    """File from which an interrupted training run resumes. The fingerprint identifies the run that wrote the file."""

    path: Path
    fingerprint: str
    every: int
    saved: float = field(default_factory=time.monotonic)

    def is_due(self, state: TrainingState) -> bool:
        """Whether to save: after ``every`` steps, at the end of an epoch, and a minute after the last time."""
        late = time.monotonic() - self.saved >= _CHECKPOINT_SECONDS
        return late or state.step % self.every == 0 or state.running is None

    def save(self, state: TrainingState) -> None:
        """Write the state to the file."""
        content = io.BytesIO()
        torch.save(
            {
                "fingerprint": self.fingerprint,
                "vectors": [tensor.detach().cpu() for tensor in state.vectors.tensors],
                "step": state.step,
                "optimizer": state.optimizer.state_dict(),
                "losses": state.losses,
                "running": state.running,
            },
            content,
        )
        write_atomically(self.path, content.getvalue())
        self.saved = time.monotonic()

    def load(self, state: TrainingState) -> None:
        """Read the state from the file.

        Raises:
            ValueError: If the file belongs to another run.
        """
        saved = torch.load(self.path, map_location="cpu", weights_only=True)
        if saved["fingerprint"] != self.fingerprint:
            raise ValueError(
                f"{self.path} is a checkpoint of another training (other model, samples, gold responses, heads or "
                "settings); name another file, or delete it"
            )
        with torch.no_grad():
            for tensor, value in zip(state.vectors.tensors, saved["vectors"], strict=True):
                tensor.copy_(value)
        state.optimizer.load_state_dict(saved["optimizer"])
        state.step, state.losses, state.running = saved["step"], saved["losses"], saved["running"]
