"""Training objective of focus directions (equation 4): the contextual scores of the response rows."""

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
    """Properties of a model's layers that the computation of differentiable scores needs.

    A model's backend has these properties, and so does :class:`RecordedAttention`.
    """

    def rotary(self, layer: int, length: int) -> Rotary:
        """Rotation from ``hook_q``, ``hook_k`` to ``hook_rot_q``, ``hook_rot_k``, for positions below ``length``."""
        ...

    def scale(self, layer: int) -> float:
        """Factor of the query-key products."""
        ...

    def window(self, layer: int) -> int | None:
        """Maximum number of keys that a row attends to, including its own key; ``None`` for no limit."""
        ...


@dataclass(frozen=True)
class RecordedAttention:
    """A record of a model's :class:`Attention`, for use without the model.

    Attributes:
        scales: Factor of the query-key products by layer.
        windows: Sliding window by layer; ``None`` for a layer without one.
        rotaries: Rotation by layer; empty for training at the rotary site.
    """

    scales: Mapping[int, float]
    windows: Mapping[int, int | None]
    rotaries: Mapping[int, Rotary]

    def rotary(self, layer: int, length: int) -> Rotary:
        """The layer's rotation tables, which have at least ``length`` positions."""
        return self.rotaries[layer]

    def scale(self, layer: int) -> float:
        """Factor of the layer's query-key products."""
        return self.scales[layer]

    def window(self, layer: int) -> int | None:
        """Sliding window of the layer, or ``None``."""
        return self.windows[layer]


@torch.no_grad()
def record_attention(model: FocusModel, layers: Sequence[int], lengths: Sequence[int], site: Site) -> RecordedAttention:
    """Record a model's attention, for training on the given layers and sequence lengths.

    Raises:
        ValueError: If the rotation depends on the sequence length: the rotary tables of the shortest sequence are not
            the beginning of the tables of the longest sequence.
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
    """Loss ``-S_C`` on one sample, per chosen head (equation 4).

    Args:
        attention: The model's rotation, scale and windows: its ``backend``, or a record of it.
        query: ``d_Q`` of each head.
        key: ``d_K`` of each key-value head that a chosen head reads, layer by layer; only at the projection site.
        groups: The heads, grouped by layer.
        sample: Queries and keys of these heads on the sample.
        site: Site of the directions.
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
    """Refuse a model whose attention is not the softmax over rotated queries and keys that training assumes.

    Without this check, a soft cap, a learned sink or an unusual mask would give plausible but meaningless directions.

    Args:
        model: The model.
        prompt: A prompt.
        response: Tokens of the response to it.
        groups: The heads to train, grouped by layer.
        rows: Queries and keys of these heads on the prompt and response.
        site: Site of the directions.

    Raises:
        ValueError: If the backend declares an unusual kind of attention, or the computed contextual scores differ from
            the scores of the model's own attention patterns.
    """
    # The measurement below misses a soft cap far above the model's scores. The backend's declaration catches it.
    if (declared := model.backend.unusual_attention()) is not None:
        raise ValueError(f"{model.name!r} has {declared}; directions cannot be trained on such attention")
    n, d_head = sum(len(group.heads) for group in groups), model.shape.d_head
    zeros = torch.zeros(n, d_head, device=model.backend.device)
    n_keys = sum(len(group.key_value_heads) for group in groups)
    key = zeros.new_zeros(n_keys, d_head) if site == "projection" else None
    computed = -direction_losses(model.backend, zeros, key, groups, rows, site).cpu()
    measured = measured_scores(model, prompt, response, groups)
    for group in groups:
        gap = float((computed[list(group.places)] - measured[group.layer].cpu()).abs().max())
        # Half-precision models round every weight of a row. A wrong mask or scale gives a far larger difference.
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
    # The query and key norms of Hugging Face models may return the model's dtype.
    return rotary.query(q, sample.rows).float(), rotary.key(k, positions).float()
