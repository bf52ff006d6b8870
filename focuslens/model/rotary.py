"""The step from the projection site to the rotary site: query or key norm, then rotary embedding.

For a head's projected query ``q`` at position ``i``, the model attends with ``R_i norm(q)``. A vector that is added at
the projection site passes through this step. Training at that site therefore needs a differentiable function for it.
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
    """Quarter turn of the dimension pairs (i, i + rotary / 2)."""
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rotate_pairs(x: Float[Tensor, "... rotary"]) -> Float[Tensor, "... rotary"]:
    """Quarter turn of the dimension pairs (0, 1), (2, 3), ..."""
    pairs = rearrange(x, "... (pair two) -> ... pair two", two=2)
    return rearrange(torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1), "... pair two -> ... (pair two)")


def rotate(
    x: Float[Tensor, "pos head d_head"],
    cos: Float[Tensor, "pos rotary"],
    sin: Float[Tensor, "pos rotary"],
    *,
    adjacent_pairs: bool = False,
) -> Float[Tensor, "pos head d_head"]:
    """Rotary embedding (Su et al., 2021) of the first ``rotary`` dimensions; the other dimensions stay unchanged.

    With ``adjacent_pairs`` the dimensions (0, 1), (2, 3), ... rotate together, as in GPT-J. Otherwise the dimensions
    (i, i + rotary / 2) do, as in Llama.
    """
    rotary_dim = cos.shape[-1]
    x, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    quarter_turn = _rotate_pairs(x) if adjacent_pairs else _rotate_half(x)
    cos, sin = (rearrange(table, "pos rotary -> pos 1 rotary") for table in (cos, sin))
    return torch.cat((x * cos + quarter_turn * sin, rest), dim=-1)


@dataclass(frozen=True, eq=False)
class Rotary:
    """Rotary tables of one layer, by position, and the layer's per-head query and key norms, if the model has them."""

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
