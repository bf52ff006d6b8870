"""Part of a focus direction that depends on the question: ``U V^T q``, where ``q`` is the query of the steered row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from einops import einsum, rearrange, repeat
from jaxtyping import Float
from torch import Tensor

__all__ = ["LowRank", "check_matrices"]


@dataclass(frozen=True, eq=False)
class LowRank:
    """Two matrices per head, whose product ``U V^T`` maps the head's query to a vector.

    The leading axes of the matrices are broadcast against those of the queries.

    Attributes:
        u: ``U`` of each head.
        v: ``V`` of each head.
    """

    u: Float[Tensor, "*lead head d_head rank"]
    v: Float[Tensor, "*lead head d_head rank"]

    def __call__(self, queries: Float[Tensor, "*rows head d_head"]) -> Float[Tensor, "*rows head d_head"]:
        """``U V^T q`` of each query."""
        read = einsum(queries, self.v, "... head d_head, ... head d_head rank -> ... head rank")
        return einsum(read, self.u, "... head rank, ... head d_head rank -> ... head d_head")

    def to(self, device: torch.device, dtype: torch.dtype) -> LowRank:
        """The matrices on a device, in a dtype."""
        return LowRank(self.u.to(device, dtype), self.v.to(device, dtype))

    def by_row(self) -> LowRank:
        """The matrices of each prompt, with an axis for the prompt's rows."""
        u, v = (rearrange(x, "... head d_head rank -> ... 1 head d_head rank") for x in (self.u, self.v))
        return LowRank(u, v)

    @staticmethod
    def of_lanes(lanes: Mapping[int, LowRank], copies: int, prompts: int) -> LowRank:
        """Matrices for ``copies`` consecutive rows per prompt, of which each can have its own or none.

        Missing matrices and missing ranks are zero.
        """
        rank = max(lane.u.shape[-1] for lane in lanes.values())
        u, v = (torch.zeros(copies, *next(iter(lanes.values())).u.shape[:-1], rank) for _ in range(2))
        for place, lane in lanes.items():
            u[place, ..., : lane.u.shape[-1]], v[place, ..., : lane.v.shape[-1]] = lane.u, lane.v
        u, v = (repeat(x, "copy head d rank -> (prompt copy) head d rank", prompt=prompts) for x in (u, v))
        return LowRank(u, v)


def check_matrices(query: Tensor, u: Any, v: Any) -> None:
    """Check the matrices of directions whose query vectors are ``query [n, d_head]``.

    Raises:
        TypeError: If one of them is no tensor.
        ValueError: If one of them is missing, has another shape than the other, or is not finite.
    """
    if (u is None) != (v is None):
        raise ValueError(f"{'v' if u is None else 'u'} is given without {'u' if u is None else 'v'}; give both")
    for name, matrices in () if u is None else (("u", u), ("v", v)):
        if not isinstance(matrices, Tensor):
            raise TypeError(f"{name} is a {type(matrices).__name__}; it must be a tensor [n, d_head, rank]")
        n, d_head = query.shape
        if matrices.ndim != 3 or matrices.shape[:2] != query.shape or not 1 <= matrices.shape[2] <= d_head:
            raise ValueError(
                f"{name} has shape {tuple(matrices.shape)}; it must be ({n}, {d_head}, rank) with a rank from 1 to "
                f"{d_head} (leave u and v out for rank 0)"
            )
        if not matrices.isfinite().all():
            raise ValueError(f"{name} holds values that are not finite")
    if u is not None and u.shape != v.shape:
        raise ValueError(f"u is {tuple(u.shape)} and v {tuple(v.shape)}; they must have the same shape")
