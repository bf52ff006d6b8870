"""The step between the projection site and the rotary site: query/key norm, then rotary embedding.

For a head's projected query ``q`` at position ``i`` the model attends with ``R_i norm(q)``. A vector added at the
projection site has to pass through this step, so training there needs it as a differentiable function.
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
    first, second = x.chunk(2, dim=-1)
    return torch.cat((-second, first), dim=-1)


def _rotate_pairs(x: Float[Tensor, "... rotary"]) -> Float[Tensor, "... rotary"]:
    pairs = rearrange(x, "... (pair two) -> ... pair two", two=2)
    return rearrange(torch.stack((-pairs[..., 1], pairs[..., 0]), dim=-1), "... pair two -> ... (pair two)")


def rotate(
    x: Float[Tensor, "pos head d_head"],
    cos: Float[Tensor, "pos rotary"],
    sin: Float[Tensor, "pos rotary"],
    *,
    adjacent_pairs: bool = False,
) -> Float[Tensor, "pos head d_head"]:
    """Rotary embedding (Su et al., 2021) of the first ``rotary`` dimensions; the others pass unchanged.

    ``adjacent_pairs`` rotates dimensions (0, 1), (2, 3), ... together (GPT-J); otherwise (i, i + rotary / 2) (Llama).
    """
    rotary_dim = cos.shape[-1]
    turned, passed = x[..., :rotary_dim], x[..., rotary_dim:]
    flipped = _rotate_pairs(turned) if adjacent_pairs else _rotate_half(turned)
    cos, sin = (rearrange(table, "pos rotary -> pos 1 rotary") for table in (cos, sin))
    return torch.cat((turned * cos + flipped * sin, passed), dim=-1)


@dataclass(frozen=True, eq=False)
class Rotary:
    """One layer's rotary tables (by position) and, where the model has them, its per-head query and key norms."""

    cos: Float[Tensor, "n_ctx rotary"]
    sin: Float[Tensor, "n_ctx rotary"]
    adjacent_pairs: bool
    query_norm: Callable[[Tensor], Tensor] | None
    key_norm: Callable[[Tensor], Tensor] | None

    def query(
        self, q: Float[Tensor, "pos head d_head"], positions: Int[Tensor, "pos"]
    ) -> Float[Tensor, "pos head d_head"]:
        """``hook_q`` activations turned into ``hook_rot_q`` activations."""
        return self._apply(q, positions, self.query_norm)

    def key(
        self, k: Float[Tensor, "pos head d_head"], positions: Int[Tensor, "pos"]
    ) -> Float[Tensor, "pos head d_head"]:
        """``hook_k`` activations turned into ``hook_rot_k`` activations."""
        return self._apply(k, positions, self.key_norm)

    def _apply(self, x: Tensor, positions: Tensor, norm: Callable[[Tensor], Tensor] | None) -> Tensor:
        if norm is not None:
            x = norm(x)
        return rotate(x, self.cos[positions], self.sin[positions], adjacent_pairs=self.adjacent_pairs)
