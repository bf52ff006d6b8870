"""One layer of a decoder over one new row per prompt, computed straight from the weights.

TransformerLens calls about forty modules and hook points per layer and token. For one row, these calls take longer than
the arithmetic. Functions here call one kernel after another instead. Movement of axes is written with ``view`` and
``permute``, because reading an einops pattern takes as long as a kernel on one row.

Hooks that have a function for rows (:class:`focuslens.hooks.RowHook`) are applied where their hook points would be.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import torch
import torch.nn.functional as F
from jaxtyping import Bool, Float
from torch import Tensor

from focuslens.model.attention import Segment

__all__ = [
    "Edits",
    "Gated",
    "LeanLayer",
    "Linear",
    "Norm",
    "Tail",
    "Turn",
    "keys_and_values",
    "run_layer",
]

Edits: TypeAlias = Mapping[str, Sequence[Callable[[Tensor], Tensor | None]]]
"""Functions on rows, by hook point (``hook_q``, ``hook_k``, ``hook_rot_q``, ``hook_attn_scores``, ``hook_pattern`` or
``hook_z``), in the order in which hooks would run."""

_BLOCK = 256
"""Maximum number of columns of a tail's buffer."""


@dataclass(frozen=True, eq=False)
class Norm:
    """Root mean square norm. In half precision the weight multiplies the rounded result, as in Hugging Face's norms."""

    weight: Tensor | None
    eps: float

    def __call__(self, x: Float[Tensor, "*rows d"]) -> Float[Tensor, "*rows d"]:
        """The normed rows."""
        size = x.shape[-1:]
        if self.weight is None or x.dtype in (torch.float32, torch.float64):
            return F.rms_norm(x, size, self.weight, self.eps)
        return F.rms_norm(x, size, None, self.eps) * self.weight


@dataclass(frozen=True, eq=False)
class Linear:
    """Weight ``[out in]`` and bias of a linear map."""

    weight: Tensor
    bias: Tensor | None = None

    def __call__(self, x: Float[Tensor, "row in"]) -> Float[Tensor, "row out"]:
        """The map of ``x``."""
        return F.linear(x, self.weight, self.bias)

    def added_to(self, sum: Float[Tensor, "row out"], x: Float[Tensor, "row in"]) -> Float[Tensor, "row out"]:
        """The map of ``x`` plus ``sum``, in one kernel where this rounds as two do."""
        if self.bias is None and x.dtype in (torch.float32, torch.float64):
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
        inner = self.act(self.gate(x)) * self.up(x)
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

    def __call__(self, x: Float[Tensor, "row head d_head"]) -> Float[Tensor, "row head d_head"]:
        """Queries or keys of the new rows, rotated."""
        n = self.cos.shape[-1]
        if n == x.shape[-1]:
            return self._rotate(x)
        return torch.cat((self._rotate(x[..., :n]), x[..., n:]), dim=-1)

    def _rotate(self, x: Tensor) -> Tensor:
        partner = x.unflatten(-1, (-1, 2)).flip(-1).flatten(-2) if self.adjacent_pairs else x.roll(x.shape[-1] // 2, -1)
        # In half precision each product is rounded, as in the models' own code.
        return (x * self.cos).addcmul_(partner, self.sin) if x.dtype in _EXACT else x * self.cos + partner * self.sin


_EXACT = (torch.float32, torch.float64)


class _Part(NamedTuple):
    """Keys and values of a segment, with one matrix for each prompt and key-value head."""

    keys: Float[Tensor, "matrix d_head column"]
    values: Float[Tensor, "matrix column d_head"]
    prompts: int
    copies: int


class Tail:
    """Keys and values of one layer: those of the prompt, which are shared, and those of later rows.

    Later rows are written into buffers of up to 256 columns, which are allocated ahead.

    Args:
        segments: Keys (rotated) and values of the columns so far. They are not changed.
        limit: Number of rows that will follow.
    """

    def __init__(self, segments: Sequence[Segment], limit: int) -> None:
        self._parts = [
            _Part(part.keys.flatten(0, 1).mT, part.values.flatten(0, 1), len(part.keys), part.copies)
            for part in segments
        ]
        self._limit, self._n, self._size = limit, 0, 0
        self._keys = self._values = torch.empty(0)

    def attend(
        self,
        q: Float[Tensor, "row head d_head"],
        keys: Float[Tensor, "row kv d_head"],
        values: Float[Tensor, "row kv d_head"],
        *,
        hidden: Bool[Tensor, "#row 1 1 key"] | None,
        scale: float,
        edits: Edits,
    ) -> Float[Tensor, "row head d_head"]:
        """Append the column of one new row per prompt, and return the outputs of heads.

        Args:
            q: Rotated queries.
            keys: Rotated keys of the new column.
            values: Values of the new column.
            hidden: Keys that each row does not attend to; ``None`` if it attends to all.
            scale: Factor that multiplies the query-key products.
            edits: Functions on scores and patterns.
        """
        return _attend_row(q, self._append(keys, values), keys.shape[1], hidden, scale, edits)

    def _append(self, keys: Float[Tensor, "row kv d_head"], values: Float[Tensor, "row kv d_head"]) -> list[_Part]:
        """Append a column, and return the parts of all columns."""
        rows, kv, d_head = keys.shape
        if self._n == self._size:
            if self._size:
                self._parts.append(_Part(self._keys.mT, self._values, rows, 1))
                self._limit -= self._size
            self._size, self._n = max(1, min(_BLOCK, self._limit)), 0
            self._keys, self._values = (x.new_empty(rows * kv, self._size, d_head) for x in (keys, values))
        self._keys.select(1, self._n).copy_(keys.flatten(0, 1))
        self._values.select(1, self._n).copy_(values.flatten(0, 1))
        self._n += 1
        newest = _Part(self._keys[:, : self._n].mT, self._values[:, : self._n], rows, 1)
        return [*self._parts, newest]


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
    qk, v = _projected(layer, layer.input_norm(x), n_rows, edits)
    qk, n_heads = turn(qk), qk.shape[1] - v.shape[1]
    q = qk[:, :n_heads]
    if edits:
        q = _edited(edits, "hook_rot_q", q, n_rows)
    z = attend(q, qk[:, n_heads:], v)
    if edits:
        z = _edited(edits, "hook_z", z, n_rows)
    x = layer.o.added_to(x, z.reshape(len(x), -1))
    return layer.mlp.added_to(x, layer.mlp_norm(x))


def keys_and_values(
    layer: LeanLayer, x: Float[Tensor, "row d_model"], n_rows: int, turn: Turn, edits: Edits
) -> tuple[Float[Tensor, "row kv d_head"], Float[Tensor, "row kv d_head"]]:
    """Rotated keys and values of a layer, whose output is not needed."""
    qk, v = _projected(layer, layer.input_norm(x), n_rows, edits)
    return turn(qk)[:, qk.shape[1] - v.shape[1] :], v


def _projected(
    layer: LeanLayer, inner: Float[Tensor, "row d_model"], n_rows: int, edits: Edits
) -> tuple[Float[Tensor, "row heads d_head"], Float[Tensor, "row kv d_head"]]:
    """Queries and keys in one tensor, before their rotation, and values."""
    rows, d_head = len(inner), layer.d_head
    q, k, v = (project(inner).view(rows, -1, d_head) for project in (layer.q, layer.k, layer.v))
    if edits:
        q, k = _edited(edits, "hook_q", q, n_rows), _edited(edits, "hook_k", k, n_rows)
    if layer.q_norm is not None and layer.k_norm is not None:
        q, k = layer.q_norm(q), layer.k_norm(k)
    return torch.cat((q, k), dim=1), v


def _edited(edits: Edits, point: str, tensor: Float[Tensor, "row head d"], n_rows: int) -> Float[Tensor, "row head d"]:
    """Result of the functions on a hook point, which get the tensor with one axis for prompts and one for rows."""
    for edit in edits.get(point, ()):
        changed = edit(tensor.unflatten(0, (-1, n_rows)))
        tensor = tensor if changed is None else changed.flatten(0, 1)
    return tensor


def _attend_row(
    q: Float[Tensor, "row head d_head"],
    parts: Sequence[_Part],
    kv: int,
    hidden: Bool[Tensor, "#row 1 1 key"] | None,
    scale: float,
    edits: Edits,
) -> Float[Tensor, "row head d_head"]:
    """Attention outputs of one new row per prompt, computed in float32 if ``q`` has half precision.

    :func:`focuslens.model.attention.attend_explicitly` does the same for any number of rows.
    """
    rows, heads, d_head = q.shape
    exact = (q if q.dtype in _EXACT else q.float()) * scale
    grouped = exact.reshape(rows * kv, -1, d_head)
    scores = _joined([_products(grouped, part, kv) for part in parts]).view(rows, heads, 1, -1)
    if hidden is not None:
        scores.masked_fill_(hidden, -torch.inf)
    pattern = _pattern(scores, edits) if edits else scores.softmax(dim=-1)
    weights, first, z = pattern.view(rows * kv, heads // kv, -1), 0, grouped
    for i, part in enumerate(parts):
        end = first + part.values.shape[1]
        z = _mixture(weights[..., first:end], part, kv, None if i == 0 else z)
        first = end
    return z.view(rows, heads, d_head).to(q.dtype)


def _pattern(scores: Float[Tensor, "row head 1 key"], edits: Edits) -> Float[Tensor, "row head 1 key"]:
    """Softmax of scores, with the functions on scores and pattern."""
    dtype, on_scores = scores.dtype, edits.get("hook_attn_scores", ())
    for edit in on_scores:
        changed = edit(scores)
        scores = scores if changed is None else changed.to(dtype)
    pattern = scores.softmax(dim=-1)
    if on_scores:  # If a hook masks every key of a row, the softmax of that row is NaN. Its output is set to zero.
        pattern = torch.where(pattern.isnan(), 0, pattern)
    for edit in edits.get("hook_pattern", ()):
        changed = edit(pattern)
        pattern = pattern if changed is None else changed.to(dtype)
    return pattern.contiguous()


def _products(
    grouped: Float[Tensor, "matrix group d_head"], part: _Part, kv: int
) -> Float[Tensor, "prompt copy kv group key"]:
    """Query-key products. Those over shared keys are strided, so that they are copied only where they are joined."""
    keys, copies, prompts = part.keys.to(grouped.dtype), part.copies, part.prompts
    _, group, d_head = grouped.shape
    if copies == 1:
        return torch.bmm(grouped, keys).view(prompts, 1, kv, group, -1)
    by_prompt = grouped.view(prompts, copies, kv, group, d_head).transpose(1, 2).reshape(prompts * kv, -1, d_head)
    return torch.bmm(by_prompt, keys).view(prompts, kv, copies, group, -1).transpose(1, 2)


def _joined(products: Sequence[Tensor]) -> Tensor:
    """Products of all columns, in the order of axes of the most shared ones."""
    prompts = min(len(product) for product in products)
    return torch.cat([product.reshape(prompts, -1, *product.shape[2:]) for product in products], dim=-1)


def _mixture(
    weights: Float[Tensor, "matrix group key"], part: _Part, kv: int, earlier: Float[Tensor, "matrix group d"] | None
) -> Float[Tensor, "matrix group d"]:
    """Sums of the values, weighted by the pattern, added to those of earlier parts."""
    values, copies, prompts = part.values.to(weights.dtype), part.copies, part.prompts
    if copies == 1:
        return torch.bmm(weights, values) if earlier is None else torch.baddbmm(earlier, weights, values)
    matrices, group, n = weights.shape
    by_prompt = weights.view(prompts, copies, kv, group, n).transpose(1, 2).reshape(prompts * kv, -1, n)
    mixed = torch.bmm(by_prompt, values).view(prompts, kv, copies, group, -1).transpose(1, 2)
    mixed = mixed.reshape(matrices, group, -1)
    return mixed if earlier is None else earlier + mixed
