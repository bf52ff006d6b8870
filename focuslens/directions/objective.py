"""What focus directions are trained for: the contextual scores of rows to which they are added (equation 4)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from focuslens.directions.activations import LayerHeads, RowActivations, measured_scores, row_scores
from focuslens.interventions.directions import Site
from focuslens.model.rotary import Rotary
from focuslens.prompts.batch import EncodedPrompt

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel

__all__ = ["Attention", "RecordedAttention", "direction_losses", "record_attention", "require_same_attention"]


@runtime_checkable
class Attention(Protocol):
    """What differentiating scores needs of a model's layers: what a backend says, or a record of it."""

    def rotary(self, layer: int, length: int) -> Rotary:
        """The step from ``hook_q``, ``hook_k`` to ``hook_rot_q``, ``hook_rot_k`` for positions below ``length``."""
        ...

    def scale(self, layer: int) -> float:
        """What query-key products are multiplied by."""
        ...

    def window(self, layer: int) -> int | None:
        """How many keys, its own included, a row sees at most; ``None`` for all."""
        ...


@dataclass(frozen=True)
class RecordedAttention:
    """An :class:`Attention` without its model.

    Attributes:
        scales: By layer.
        windows: By layer.
        rotaries: By layer; none for training at the rotary site.
    """

    scales: Mapping[int, float]
    windows: Mapping[int, int | None]
    rotaries: Mapping[int, Rotary]

    def rotary(self, layer: int, length: int) -> Rotary:
        """The layer's tables, which go at least so far."""
        return self.rotaries[layer]

    def scale(self, layer: int) -> float:
        """The layer's scale."""
        return self.scales[layer]

    def window(self, layer: int) -> int | None:
        """The layer's window."""
        return self.windows[layer]


@torch.no_grad()
def record_attention(model: FocusModel, layers: Sequence[int], lengths: Sequence[int], site: Site) -> RecordedAttention:
    """What training on these layers, and on sequences of these lengths, needs of a model.

    Raises:
        ValueError: If the tables of the shortest sequence are not the beginning of those of the longest: then there is
            no one record for all.
    """
    backend = model.backend
    rotaries = {layer: backend.rotary(layer, max(lengths)) for layer in layers} if site == "projection" else {}
    for layer, whole in rotaries.items():
        short = backend.rotary(layer, min(lengths))
        n = len(short.cos)
        if not torch.equal(short.cos, whole.cos[:n]) or not torch.equal(short.sin, whole.sin[:n]):
            raise ValueError(
                f"the rotary embedding of {model.name!r} depends on how long a sequence is, so directions at the "
                "projection site cannot be trained away from the model; train with the model itself, or site='rotary'"
            )
    return RecordedAttention(
        {layer: backend.scale(layer) for layer in layers}, {layer: backend.window(layer) for layer in layers}, rotaries
    )


def direction_losses(
    attention: Attention,
    query: Float[Tensor, "n d_head"],
    key: Float[Tensor, "m d_head"] | None,
    groups: Sequence[LayerHeads],
    sample: RowActivations,
    site: Site,
) -> Float[Tensor, "n"]:
    """``-S_C`` of every chosen head on one sample.

    Args:
        attention: The model's rotation, scale and windows: its ``backend``, or a record of it.
        query: ``d_Q`` of each head.
        key: ``d_K`` of each key-value head that a chosen head reads, layer by layer; at the projection site alone.
        groups: The heads.
        sample: Their queries and keys.
        site: Where the directions are added.
    """
    losses = torch.zeros(len(query), device=query.device)
    first_key = 0
    for group in groups:
        q = sample.queries[group.layer].float() + query[list(group.places)]
        k = sample.keys[group.layer].float()
        if site == "projection" and key is not None:
            k = k + key[first_key : first_key + len(group.key_value_heads)]
            first_key += len(group.key_value_heads)
            q, k = _to_rotary_site(attention, group.layer, q, k, sample)
        scores = row_scores(
            q,
            k[:, list(group.reads)],
            sample.rows,
            sample.relevant,
            attention.scale(group.layer),
            attention.window(group.layer),
        )
        losses = losses.index_put((torch.tensor(group.places, device=losses.device),), -scores)
    return losses


@torch.no_grad()
def require_same_attention(
    model: FocusModel,
    prompt: EncodedPrompt,
    response: Int[Tensor, "response"],
    groups: Sequence[LayerHeads],
    rows: RowActivations,
    site: Site,
) -> None:
    """Refuse a model whose attention is not the softmax of rotated queries and keys that training differentiates.

    A soft cap, a learned sink or another mask would otherwise give plausible directions for no model at all.

    Args:
        model: The model.
        prompt: A prompt.
        response: What follows it.
        groups: The heads to be trained.
        rows: Their queries and keys on that prompt and response.
        site: Where the directions will be added.

    Raises:
        ValueError: If the model says that its attention is another, or scores of the response's rows are not those of
            the model's own patterns.
    """
    # A soft cap far above a model's scores hides in rounding: what is declared need not be measured.
    if (declared := model.backend.unusual_attention()) is not None:
        raise ValueError(f"{model.name!r} has {declared}; directions cannot be trained on such attention")
    n, d_head = sum(len(group.heads) for group in groups), model.shape.d_head
    zeros = torch.zeros(n, d_head, device=model.backend.device)
    n_keys = sum(len(group.key_value_heads) for group in groups)
    key = zeros.new_zeros(n_keys, d_head) if site == "projection" else None
    ours = -direction_losses(model.backend, zeros, key, groups, rows, site).cpu()
    measured = measured_scores(model, prompt, response, groups)
    for group in groups:
        gap = float((ours[list(group.places)] - measured[group.layer].cpu()).abs().max())
        # Half-precision models round every weight of a row; a wrong mask or scale is off by far more.
        if gap > (1e-3 if rows.queries[group.layer].dtype in (torch.float32, torch.float64) else 2e-2):
            raise ValueError(
                f"layer {group.layer} of {model.name!r} does not attend as softmax(Q K^T * scale) over visible keys: "
                f"contextual scores differ by {gap:.3g}; directions cannot be trained on this architecture"
            )


def _to_rotary_site(
    attention: Attention, layer: int, q: Tensor, k: Tensor, sample: RowActivations
) -> tuple[Float[Tensor, "row head d_head"], Float[Tensor, "key kv_head d_head"]]:
    positions = torch.arange(len(k), device=k.device)
    rotary = attention.rotary(layer, len(k))
    # Hugging Face's query and key norms may give the model's own dtype back.
    return rotary.query(q, sample.rows).float(), rotary.key(k, positions).float()
