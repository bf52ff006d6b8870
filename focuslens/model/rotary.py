"""Computation between the projection site and the rotary site: query or key norm, then rotary embedding.

If ``q`` is a head's projected query at position ``i``, the model computes attention scores with ``R_i norm(q)``. A
vector that is added at the projection site also passes through the norm and the rotation ``R_i``. Training at the
projection site therefore needs both as differentiable functions.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor

__all__ = ["Rotary", "rotate"]


def _rotate_half(x: Float[Tensor, "... rotary"]) -> Float[Tensor, "... rotary"]:
    """Rotate the dimension pairs (i, i + rotary / 2) by 90 degrees."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rotate_pairs(x: Float[Tensor, "... rotary"]) -> Float[Tensor, "... rotary"]:
    """Rotate the dimension pairs (0, 1), (2, 3), ... by 90 degrees."""
    pairs = rearrange(x, "... (pair two) -> ... pair two", two=2)
    return rearrange(torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1), "... pair two -> ... (pair two)")


def rotate(
    x: Float[Tensor, "pos head d_head"],
    cos: Float[Tensor, "pos rotary"],
    sin: Float[Tensor, "pos rotary"],
    *,
    adjacent_pairs: bool = False,
) -> Float[Tensor, "pos head d_head"]:
    """Apply rotary embedding (Su et al., 2021) to the first ``rotary`` dimensions. The rest of ``x`` does not change.

    If ``adjacent_pairs`` is true, the dimension pairs (0, 1), (2, 3), ... are rotated (GPT-J). Otherwise the dimension
    pairs (i, i + rotary / 2) are rotated (Llama).
    """
    rotary_dim = cos.shape[-1]
    x, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    quarter_turn = _rotate_pairs(x) if adjacent_pairs else _rotate_half(x)
    cos, sin = (rearrange(table, "pos rotary -> pos 1 rotary") for table in (cos, sin))
    return torch.cat((x * cos + quarter_turn * sin, rest), dim=-1)


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary tables of one layer, indexed by position, and the layer's per-head query and key norms, if any."""

    cos: Float[Tensor, "n_ctx rotary"]
    sin: Float[Tensor, "n_ctx rotary"]
    adjacent_pairs: bool
    query_norm: Callable[[Tensor], Tensor] | None
    key_norm: Callable[[Tensor], Tensor] | None

    def query(
        self, q: Float[Tensor, "pos head d_head"], positions: Int[Tensor, "pos"]
    ) -> Float[Tensor, "pos head d_head"]:
        """Activations at ``hook_rot_q``, computed from the activations at ``hook_q``."""
        return self._apply(q, positions, self.query_norm)

    def key(
        self, k: Float[Tensor, "pos head d_head"], positions: Int[Tensor, "pos"]
    ) -> Float[Tensor, "pos head d_head"]:
        """Activations at ``hook_rot_k``, computed from the activations at ``hook_k``."""
        return self._apply(k, positions, self.key_norm)

    def _apply(self, x: Tensor, positions: Tensor, norm: Callable[[Tensor], Tensor] | None) -> Tensor:
        if norm is not None:
            x = norm(x)
        return rotate(x, self.cos[positions], self.sin[positions], adjacent_pairs=self.adjacent_pairs)
