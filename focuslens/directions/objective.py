"""Training loss of focus directions (equation 4): the negative contextual score of the response rows, per head."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from torch import Tensor

from focuslens.directions.activations import LayerHeads, RowActivations, measured_scores, row_scores
from focuslens.interventions.directions import Site
from focuslens.interventions.low_rank import LowRank
from focuslens.model.rotary import Rotary
from focuslens.prompts.batch import EncodedPrompt

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel

__all__ = ["Attention", "RecordedAttention", "direction_losses", "record_attention", "require_same_attention"]


@runtime_checkable
class Attention(Protocol):
    """Interface to the attention properties that the training loss needs: rotation, scale and window of each layer.

    A model's backend and :class:`RecordedAttention` implement this interface.
    """

    def rotary(self, layer: int, length: int) -> Rotary:
        """Rotary tables for positions below ``length``, with the query and key norms if the model has them."""
        ...

    def scale(self, layer: int) -> float:
        """Factor that multiplies the query-key products."""
        ...

    def window(self, layer: int) -> int | None:
        """Maximum number of keys that a row attends to, including the row's own key; ``None`` for no limit."""
        ...


@dataclass(frozen=True)
class RecordedAttention:
    """Copy of a model's attention properties, for training in a process that does not have the model.

    Attributes:
        scales: Factor that multiplies the query-key products, by layer.
        windows: Length of the sliding window, by layer; ``None`` for a layer without a sliding window.
        rotaries: Rotary tables with query and key norms, by layer; empty for training at the rotary site.
    """

    scales: Mapping[int, float]
    windows: Mapping[int, int | None]
    rotaries: Mapping[int, Rotary]

    def rotary(self, layer: int, length: int) -> Rotary:
        """Rotary tables of the layer. ``length`` is ignored, because the tables cover the longest training sequence."""
        return self.rotaries[layer]

    def scale(self, layer: int) -> float:
        """Factor that multiplies the query-key products of the layer."""
        return self.scales[layer]

    def window(self, layer: int) -> int | None:
        """Length of the layer's sliding window; ``None`` if the layer has no sliding window."""
        return self.windows[layer]


@torch.no_grad()
def record_attention(model: FocusModel, layers: Sequence[int], lengths: Sequence[int], site: Site) -> RecordedAttention:
    """Record the attention properties of some layers, for training sequences of the given lengths.

    Raises:
        ValueError: If the site is ``projection`` and the rotary tables depend on the sequence length. In this case, the
            tables of the shortest sequence are not the beginning of the tables of the longest sequence.
    """
    backend = model.backend
    rotaries = {layer: backend.rotary(layer, max(lengths)) for layer in layers} if site == "projection" else {}
    for layer, whole in rotaries.items():
        short = backend.rotary(layer, min(lengths))
        n = len(short.cos)
        if not torch.equal(short.cos, whole.cos[:n]) or not torch.equal(short.sin, whole.sin[:n]):
            raise ValueError(
                f"the rotary embedding of {model.name!r} depends on how long a sequence is, so directions at the "
                "projection site cannot be trained in another process; train with the model itself, or site='rotary'"
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
    product: LowRank | None = None,
) -> Float[Tensor, "n"]:
    """Loss ``-S_C`` per head on one sample (equation 4).

    Args:
        attention: Attention properties of each layer: the model's ``backend``, or a :class:`RecordedAttention`.
        query: ``d_Q`` of each head.
        key: ``d_K`` of each key-value head in ``groups``, layer by layer. It is used only at the projection site.
        groups: Heads to train, grouped by layer.
        sample: Activations of these heads on the sample.
        site: Site of the directions.
        product: ``U`` and ``V`` of each head, if ``d_Q`` depends on the query.
    """
    losses = torch.zeros(len(query), device=query.device)
    first_key = 0
    for group in groups:
        plain, places = sample.queries[group.layer].float(), list(group.places)
        q = plain + query[places]
        if product is not None:
            q = q + LowRank(product.u[places], product.v[places])(plain)
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
    """Check that the model's attention is a plain softmax over scaled products of rotated queries and keys.

    The training loss assumes this form. Without the check, training on a model with a soft cap, a learned sink or an
    unusual mask would give plausible but meaningless directions.

    Args:
        model: The model.
        prompt: Prompt on which the attention is checked.
        response: Tokens of the response to the prompt.
        groups: Heads to train, grouped by layer.
        rows: Activations of these heads on the prompt and the response.
        site: Site of the directions.

    Raises:
        ValueError: If the backend reports an unusual kind of attention, or if the contextual scores computed from
            ``rows`` differ from the scores of the model's attention patterns.
    """
    # The comparison of scores below does not detect a soft cap far above the attention scores. The backend reports such
    # a cap.
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
        # In half precision, every attention weight is rounded. The tolerance is therefore larger. A wrong mask or scale
        # would change the scores by much more.
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
    # Query and key norms of Hugging Face models may return tensors in the model's dtype. The scores need float32.
    return rotary.query(q, sample.rows).float(), rotary.key(k, positions).float()
