"""Products of the rows of one pass with keys and values, which are written to where they are needed.

Tensors of scores are the largest ones of a pass: for 78 settings of a sweep and 3,000 keys, each has 78 times as many
numbers as the keys of its heads. Products over keys that settings share come in another order than the rows. On a CPU,
products are therefore written to their places in memory that all layers use, and are read from there. A copy of such a
tensor, or new memory for it, takes longer than the product.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from itertools import product
from typing import NamedTuple

import torch
from jaxtyping import Float
from torch import Tensor

__all__ = ["Part", "Scratch", "in_type_of", "mixed", "products", "written_mixture", "written_products"]

_NARROW = 16
"""On a CPU, a product with fewer columns than this takes up to four times as long as its transpose. They are the
dimensions of a head."""

_CALLS = 16
"""Maximum number of products into which one is divided so that it can be written to its place."""


class Part(NamedTuple):
    """Keys and values of successive columns, with one matrix for each prompt and key-value head.

    Attributes:
        prompts: Number of prompts.
        copies: Number of successive rows that share the columns of a prompt.
    """

    keys: Float[Tensor, "matrix d_head column"]
    values: Float[Tensor, "matrix column d_head"]
    prompts: int
    copies: int

    @property
    def columns(self) -> int:
        """Number of columns."""
        return self.values.shape[1]


class Scratch:
    """Memory for the scores of one layer, which the layers of a decoder use one after the other."""

    def __init__(self) -> None:
        self._memory = torch.empty(0)

    def take(self, like: Tensor, shape: Sequence[int]) -> Tensor:
        """A tensor with any numbers, whose memory the next one overwrites."""
        n = math.prod(shape)
        if self._memory.numel() < n or (self._memory.dtype, self._memory.device) != (like.dtype, like.device):
            self._memory = torch.empty(0)  # the memory of the last one can then be used for the next one
            self._memory = like.new_empty(n + n // 16)  # each pass has more columns
        return self._memory[:n].view(*shape)


# --- products in the order of rows, in memory that is used again ---


def written_products(
    scratch: Scratch, grouped: Float[Tensor, "matrix group d_head"], parts: Sequence[Part], kv: int
) -> Float[Tensor, "row head 1 key"]:
    """Query-key products over all columns, in memory that the next call overwrites.

    Args:
        scratch: The memory.
        grouped: Queries of each row and key-value head.
        parts: Keys of the columns, in order.
        kv: Number of key-value heads.
    """
    grouped = grouped.contiguous()  # a hook can return queries in any order of memory
    matrices, group, _ = grouped.shape
    n = sum(part.columns for part in parts)
    scores, first = scratch.take(grouped, (matrices // kv, kv, group, n)), 0
    for part in parts:
        here = scores[..., first : first + part.columns]
        first += part.columns
        keys = in_type_of(grouped, part.keys)
        if part.copies == 1:
            # Many small products are written one by one to places of other strides, which takes longer than this copy.
            here.flatten(0, 1).copy_(torch.bmm(grouped, keys))
        elif _is_divided(part, kv, group):
            queries = grouped.view(-1, kv, group, grouped.shape[-1])
            for rows, matrix in _divided(part, kv, group):
                torch.bmm(rows(queries), keys[matrix], out=rows(here))
        else:
            shared = products(grouped, part, kv)
            here.view(*shared.shape[:2], kv, group, -1).copy_(shared)
    return scores.view(matrices // kv, kv * group, 1, n)


def written_mixture(
    weights: Float[Tensor, "matrix group key"], parts: Sequence[Part], kv: int
) -> Float[Tensor, "matrix group d_head"]:
    """Sums of the values of all columns, weighted by ``weights``.

    The arguments are those of :func:`written_products`.
    """
    matrices, group, n = weights.shape
    z = weights.new_empty(matrices, group, parts[0].values.shape[-1])
    by_head, by_row = weights.view(-1, kv, group, n), z.view(-1, kv, group, z.shape[-1])
    first = 0
    for part in parts:
        end, beta = first + part.columns, int(first > 0)  # the first product does not read what is in the memory
        values, here = in_type_of(weights, part.values), by_head[..., first:end]
        first = end
        if part.copies == 1:
            z.baddbmm_(here.flatten(0, 1), values, beta=beta)
        elif _is_divided(part, kv, group):
            for rows, matrix in _divided(part, kv, group):
                _add_product(rows(by_row), rows(here), values[matrix], beta)
        else:
            shared = mixed(weights[..., end - part.columns : end], part, kv)
            z = z.add_(shared) if beta else shared
            by_row = z.view(-1, kv, group, z.shape[-1])
    return z


def _add_product(z: Tensor, weights: Tensor, values: Tensor, beta: int) -> None:
    if values.shape[-1] < _NARROW:
        z.mT.baddbmm_(values.mT, weights.mT, beta=beta)
    elif beta:
        z.add_(torch.bmm(weights, values))
    else:  # the result is small, and a product in new memory runs on all threads
        z.copy_(torch.bmm(weights, values))


def _is_divided(part: Part, kv: int, group: int) -> bool:
    return part.prompts * (1 if kv == 1 else group) <= _CALLS


class _Rows(NamedTuple):
    """Rows of one prompt, and of one query head of each key-value head; of all query heads if there is one key head."""

    prompt: int
    copies: int
    head: int | None

    def __call__(self, x: Float[Tensor, "row kv group n"]) -> Float[Tensor, "kv chosen n"]:
        rows = x[self.prompt * self.copies : (self.prompt + 1) * self.copies]
        return rows.view(1, -1, rows.shape[-1]) if self.head is None else rows[:, :, self.head].transpose(0, 1)


def _divided(part: Part, kv: int, group: int) -> Iterator[tuple[_Rows, slice]]:
    """Rows whose products can be written with one call, and the places of their matrices."""
    for prompt, head in product(range(part.prompts), [None] if kv == 1 else range(group)):
        yield _Rows(prompt, part.copies, head), slice(prompt * kv, (prompt + 1) * kv)


# --- products in new memory ---


def products(
    grouped: Float[Tensor, "matrix group d_head"], part: Part, kv: int
) -> Float[Tensor, "prompt copy kv group key"]:
    """Query-key products. Those over shared keys are strided, so that they are copied only where they are joined."""
    keys, copies, prompts = in_type_of(grouped, part.keys), part.copies, part.prompts
    _, group, d_head = grouped.shape
    if copies == 1:
        return torch.bmm(grouped, keys).view(prompts, 1, kv, group, -1)
    by_prompt = grouped.view(prompts, copies, kv, group, d_head).transpose(1, 2).reshape(prompts * kv, -1, d_head)
    return torch.bmm(by_prompt, keys).view(prompts, kv, copies, group, -1).transpose(1, 2)


def mixed(
    weights: Float[Tensor, "matrix group key"],
    part: Part,
    kv: int,
    earlier: Float[Tensor, "matrix group d"] | None = None,
) -> Float[Tensor, "matrix group d"]:
    """Sums of the values, weighted by ``weights``, added to those of earlier parts."""
    values, copies, prompts = in_type_of(weights, part.values), part.copies, part.prompts
    if copies == 1:
        return torch.bmm(weights, values) if earlier is None else torch.baddbmm(earlier, weights, values)
    matrices, group, n = weights.shape
    by_prompt = weights.view(prompts, copies, kv, group, n).transpose(1, 2).reshape(prompts * kv, -1, n)
    narrow = values.shape[-1] < _NARROW
    sums = torch.bmm(values.mT, by_prompt.mT).mT if narrow else torch.bmm(by_prompt, values)
    sums = sums.view(prompts, kv, copies, group, -1).transpose(1, 2).reshape(matrices, group, -1)
    return sums if earlier is None else earlier + sums


def in_type_of(like: Tensor, x: Tensor) -> Tensor:
    """``x`` in the type of ``like``."""
    return x if x.dtype == like.dtype else x.to(like.dtype)
