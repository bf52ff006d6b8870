"""One layer of a decoder over one new row per prompt, computed straight from the weights.

TransformerLens calls about forty modules and hook points per layer and token. For one row, these calls take longer than
the arithmetic. Functions here call one kernel after another instead. Movement of axes is written with ``view`` and
``permute``, because reading an einops pattern takes as long as a kernel on one row.

Hooks that have a function for rows (:class:`focuslens.hooks.RowHook`) are applied where their hook points would be.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Float
from torch import Tensor

from focuslens.model.lean_attention import EXACT, Edits

__all__ = ["Gated", "LeanLayer", "Linear", "Norm", "Turn", "keys_and_values", "run_layer"]


@dataclass(frozen=True, eq=False)
class Norm:
    """Root mean square norm. In half precision the weight multiplies the rounded result, as in Hugging Face's norms."""

    weight: Tensor | None
    eps: float

    def __call__(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """The normed rows."""
        size, weight = x.shape[-1:], self.weight
        if x.dtype not in EXACT:
            normed = F.rms_norm(x, size, None, self.eps)
            return normed if weight is None else normed * weight
        if weight is None or x.ndim != 2 or len(x) > _FEW or x.device.type != "cpu":
            return F.rms_norm(x, size, weight, self.eps)
        # On a CPU, PyTorch has no kernel for this norm. For a few rows, the calls that it makes instead take longer.
        share, eps = _norm_constants(size[0], self.eps, x.dtype)
        return (x * weight).mul_(torch.addmm(eps, x * x, share).rsqrt_())


_FEW = 128
"""Number of rows up to which a norm is computed by a product with a constant column."""


@lru_cache(maxsize=64)
def _norm_constants(d: int, eps: float, dtype: torch.dtype) -> tuple[Float[Tensor, "d 1"], Float[Tensor, "1"]]:
    """Column of ``1 / d``, whose product with the squares of a row is their mean, and ``eps``."""
    with torch.inference_mode(False):
        return torch.full((d, 1), 1 / d, dtype=dtype), torch.tensor([eps], dtype=dtype)


class Linear(NamedTuple):
    """Weight ``[out in]`` and bias of a linear map."""

    weight: Tensor
    bias: Tensor | None = None

    def added_to(self, sum: Float[Tensor, "row out"], x: Float[Tensor, "row in"]) -> Float[Tensor, "row out"]:
        """The map of ``x`` plus ``sum``, in one kernel where this rounds as two do."""
        if self.bias is None and x.dtype in EXACT:
            return torch.addmm(sum, x, self.weight.T)
        return sum + F.linear(x, self.weight, self.bias)


@dataclass(frozen=True, eq=False)
class Gated:
    """Gated MLP: ``down(act(gate(x)) * up(x) + bias)``."""

    gate: Linear
    up: Linear
    down: Linear
    act: Callable[[Tensor], Tensor]
    bias: Tensor | None = None

    def added_to(self, sum: Float[Tensor, "row d_model"], x: Float[Tensor, "row d_model"]) -> Tensor:
        """The MLP's output for ``x`` plus ``sum``."""
        # In place, and with no name for the gate: for whole prompts, these are the largest tensors.
        inner = self.act(F.linear(x, *self.gate))
        inner.mul_(F.linear(x, *self.up))
        return self.down.added_to(sum, inner if self.bias is None else inner + self.bias)


@dataclass(frozen=True, eq=False)
class LeanLayer:
    """Weights and settings of a layer: norm, attention, addition, norm, gated MLP, addition.

    Attributes:
        rotary: Key of the layer's rotary tables among those of the model.
        adjacent_pairs: Whether the dimension pairs (0, 1), (2, 3), ... are rotated, in place of (i, i + rotary / 2).
        window: Maximum number of keys that a row attends to, including the row's own key; ``None`` for no limit.
    """

    input_norm: Norm
    q: Linear
    k: Linear
    v: Linear
    q_norm: Norm | None
    k_norm: Norm | None
    o: Linear
    mlp_norm: Norm
    mlp: Gated
    d_head: int
    scale: float
    window: int | None
    rotary: object
    adjacent_pairs: bool = False


@dataclass(frozen=True, eq=False)
class Turn:
    """Rotary tables of the new rows, which layers of one kind share.

    Attributes:
        cos: Cosines ``[row 1 rotary]``.
        sin: Sines ``[row 1 rotary]``; negative for the first dimension of a pair.
        adjacent_pairs: See :class:`LeanLayer`.
    """

    cos: Float[Tensor, "row 1 rotary"]
    sin: Float[Tensor, "row 1 rotary"]
    adjacent_pairs: bool

    @classmethod
    def of(cls, cos: Float[Tensor, "row rotary"], sin: Float[Tensor, "row rotary"], adjacent_pairs: bool) -> Turn:
        """Tables with the signs of the quarter turn in the sines."""
        signed = sin.clone()
        if adjacent_pairs:
            signed[:, 0::2].neg_()
        else:
            signed[:, : sin.shape[1] // 2].neg_()
        return cls(cos[:, None], signed[:, None], adjacent_pairs)

    def copied(self) -> Turn:
        """Tables of their own."""
        return Turn(self.cos.clone(), self.sin.clone(), self.adjacent_pairs)

    def copy_(self, other: Turn) -> None:
        """Take the numbers of other tables."""
        self.cos.copy_(other.cos)
        self.sin.copy_(other.sin)

    def __call__(self, x: Float[Tensor, "row head d_head"]) -> Float[Tensor, "row head d_head"]:
        """Queries or keys of the new rows, rotated."""
        n = self.cos.shape[-1]
        if n == x.shape[-1]:
            return self._rotate(x)
        return torch.cat((self._rotate(x[..., :n]), x[..., n:]), dim=-1)

    def _rotate(self, x: Tensor) -> Tensor:
        partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if self.adjacent_pairs else x.roll(x.shape[-1] // 2, -1)
        # In half precision each product is rounded, as in the models' own code.
        return (x * self.cos).addcmul_(partner, self.sin) if x.dtype in EXACT else x * self.cos + partner * self.sin


Attend: TypeAlias = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Function from rotated queries, rotated keys and values, each ``[row head d_head]``, to outputs of heads."""


def run_layer(
    layer: LeanLayer,
    x: Float[Tensor, "row d_model"],
    n_rows: int,
    turn: Turn,
    attend: Attend,
    edits: Edits,
) -> Float[Tensor, "row d_model"]:
    """Output of a layer for ``n_rows`` new rows per prompt.

    Args:
        layer: Weights and settings.
        x: Input of the layer: the rows of the first prompt, then those of the next.
        n_rows: Number of rows per prompt.
        turn: Rotary tables of the new rows.
        attend: Attention over the new columns and earlier ones.
        edits: Functions of hooks.
    """
    # Queries, keys and values of a whole prompt are gone before the MLP runs.
    x = _attended(layer, x, n_rows, turn, attend, edits)
    return layer.mlp.added_to(x, layer.mlp_norm(x))


def _attended(
    layer: LeanLayer, x: Float[Tensor, "row d_model"], n_rows: int, turn: Turn, attend: Attend, edits: Edits
) -> Float[Tensor, "row d_model"]:
    """Input of a layer plus the output of its attention."""
    q, k, v = _turned(layer, x, n_rows, turn, edits)
    if edits:
        q = _edited(edits, "hook_rot_q", q, n_rows)
    z = attend(q, k, v)
    if edits:
        z = _edited(edits, "hook_z", z, n_rows)
    return layer.o.added_to(x, z.reshape(len(x), -1))


def keys_and_values(
    layer: LeanLayer, x: Float[Tensor, "row d_model"], n_rows: int, turn: Turn, edits: Edits
) -> tuple[Float[Tensor, "row kv d_head"], Float[Tensor, "row kv d_head"]]:
    """Rotated keys and values of a layer, whose output is not needed."""
    _, k, v = _turned(layer, x, n_rows, turn, edits)
    return k, v


def _turned(
    layer: LeanLayer, x: Float[Tensor, "row d_model"], n_rows: int, turn: Turn, edits: Edits
) -> tuple[Float[Tensor, "row head d_head"], Float[Tensor, "row kv d_head"], Float[Tensor, "row kv d_head"]]:
    """Rotated queries and keys, and values."""
    inner, size = layer.input_norm(x), (len(x), -1, layer.d_head)
    q, k, v = F.linear(inner, *layer.q), F.linear(inner, *layer.k), F.linear(inner, *layer.v)
    q, k, v = q.view(size), k.view(size), v.view(size)
    if edits:
        q, k = _edited(edits, "hook_q", q, n_rows), _edited(edits, "hook_k", k, n_rows)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = layer.q_norm(q), layer.k_norm(k)
    if n_rows > 1:
        return turn(q), turn(k), v
    # One rotation of both takes less time for a few rows, and more memory for whole prompts.
    q, k = turn(torch.cat((q, k), dim=1)).split((q.shape[1], k.shape[1]), dim=1)
    return q, k, v


def _edited(edits: Edits, point: str, tensor: Float[Tensor, "row head d"], n_rows: int) -> Float[Tensor, "row head d"]:
    """Result of the functions on a hook point, which get the tensor with one axis for prompts and one for rows."""
    for edit in edits.get(point, ()):
        changed = edit(tensor.unflatten(0, (-1, n_rows)))
        tensor = tensor if changed is None else changed.flatten(0, 1)
    return tensor
