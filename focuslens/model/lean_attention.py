"""Attention of one new row per prompt over the columns so far, in buffers that are allocated ahead.

:func:`focuslens.model.attention.attend_explicitly` does the same for any number of rows. Functions here call as few
kernels as possible, and convert nothing that has the right type: for one row, a call takes longer than its arithmetic.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeAlias

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from focuslens.model.attention import Segment
from focuslens.model.lean_products import Part, Scratch, in_type_of, mixed, products, written_mixture, written_products

__all__ = ["EXACT", "Edits", "Tail"]

Edits: TypeAlias = Mapping[str, Sequence[Callable[[Tensor], Tensor | None]]]
"""Functions on rows, by hook point (``hook_q``, ``hook_k``, ``hook_rot_q``, ``hook_attn_scores``, ``hook_pattern`` or
``hook_z``), in the order in which hooks would run."""

EXACT = (torch.float32, torch.float64)
"""Types in which attention is computed as it is. Half precision is converted to float32."""

_BLOCK = 256
"""Maximum number of columns for later rows in one buffer."""

_SMALL = 2**20
"""Keys of all prompts of a batch up to this number of bytes are copied into the buffer of later rows, which saves three
calls per row. For more keys, reading them takes longer than the calls."""


class Tail:
    """Keys and values of one layer: those of the prompt, which are shared, and those of later rows.

    Later rows are written into buffers of up to 256 columns, which are allocated ahead. A short prompt that belongs to
    one row only is copied to the beginning of the first buffer.

    Args:
        segments: Keys (rotated) and values of the columns so far. They are not changed.
        limit: Number of rows that will follow.
        scale: Factor that multiplies the query-key products.
        edits: Functions on scores and patterns.
        recorded: Whether passes will be recorded, which begins with :meth:`reserve`.
        scratch: Memory for scores, which the tails of other layers can use too.

    Attributes:
        hidden: Keys that the rows of the current pass do not attend to, ``[#row 1 1 key]``; ``None`` if they attend to
            all. The caller sets it before each pass.
        edits: Functions on scores and patterns.
    """

    def __init__(
        self,
        segments: Sequence[Segment],
        limit: int,
        scale: float,
        edits: Edits,
        *,
        recorded: bool = False,
        scratch: Scratch | None = None,
    ) -> None:
        self._limit, self._scale, self.edits = limit, scale, edits
        self._scratch = Scratch() if scratch is None else scratch
        self._n, self._size = 0, 0
        self._keys = self._values = torch.empty(0)
        self._parts: list[Part] = []
        self._slot: Tensor | None = None
        self.hidden: Bool[Tensor, "#row 1 1 key"] | None = None
        if not recorded and _is_small(segments):
            self._copy(segments)
        else:
            self._parts += [
                Part(part.keys.flatten(0, 1).mT, part.values.flatten(0, 1), len(part.keys), part.copies)
                for part in segments
            ]

    # --- recorded passes ---

    @property
    def filled(self) -> int:
        """Number of columns in the newest buffer."""
        return self._n

    @property
    def columns(self) -> int:
        """Number of all columns so far."""
        return self._n + sum(part.values.shape[1] for part in self._parts)

    @property
    def capacity(self) -> int:
        """Number of columns that recorded passes attend to, hidden ones included."""
        return self._size + sum(part.values.shape[1] for part in self._parts)

    @property
    def is_full(self) -> bool:
        """Whether the next column needs a new buffer."""
        return self._n == self._size

    def reserve(self, rows: int, like: Float[Tensor, "out in"], kv: int, slot: Int[Tensor, "1"]) -> None:
        """Make a buffer for recorded passes.

        They write the new column to the place that ``slot`` contains, and attend to the whole buffer. The caller hides
        the columns after the new one, and calls :meth:`advance` after each pass.

        Args:
            rows: Number of rows in a pass.
            like: Weight that the keys are computed with, whose type and device they have.
            kv: Number of key-value heads.
            slot: Place in the buffer. The caller sets it before each pass.
        """
        self._slot = slot
        if self.is_full:
            self._renew(like.new_empty(rows, kv, len(like) // kv))
        # A weight of zero times an uninitialised number can be NaN.
        self._keys[:, :, self._n :], self._values[:, :, self._n :] = 0, 0

    def advance(self) -> None:
        """Count the column of a recorded pass."""
        self._n += 1

    def release(self) -> None:
        """Go on with passes that are not recorded."""
        self._slot = None

    # --- passes ---

    def attend(
        self,
        q: Float[Tensor, "row head d_head"],
        keys: Float[Tensor, "row kv d_head"],
        values: Float[Tensor, "row kv d_head"],
    ) -> Float[Tensor, "row head d_head"]:
        """Append the column of one new row per prompt, and return the outputs of heads.

        They are computed in float32 if ``q`` has half precision.

        Args:
            q: Rotated queries.
            keys: Rotated keys of the new column.
            values: Values of the new column.
        """
        rows, heads, d_head = q.shape
        kv = keys.shape[1]
        newest = self._append(keys, values)
        grouped = ((q if q.dtype in EXACT else q.float()) * self._scale).reshape(rows * kv, heads // kv, d_head)
        parts = (*self._parts, newest)
        # What is recorded must stay in its own memory.
        is_written = len(parts) > 1 and self._slot is None and q.device.type == "cpu"
        if is_written:
            scores = written_products(self._scratch, grouped, parts, kv)
        elif len(parts) > 1:
            scores = _joined([products(grouped, part, kv) for part in parts]).view(rows, heads, 1, -1)
        else:
            scores = torch.bmm(grouped, in_type_of(grouped, newest.keys)).view(rows, heads, 1, -1)
        if self.hidden is not None:
            scores.masked_fill_(self.hidden, -torch.inf)
        pattern = _pattern(scores, self.edits, is_written) if self.edits else _softmax(scores, is_written)
        weights = pattern.view(rows * kv, heads // kv, -1)
        z = written_mixture(weights, parts, kv) if is_written else _mixture(weights, parts, kv)
        z = z.view(rows, heads, d_head)
        return z if q.dtype in EXACT else z.to(q.dtype)

    def _append(self, keys: Float[Tensor, "row kv d_head"], values: Float[Tensor, "row kv d_head"]) -> Part:
        """Append a column, and return the part of all columns in its buffer."""
        if self._slot is not None:
            self._keys.index_copy_(2, self._slot, keys.unsqueeze(2))
            self._values.index_copy_(2, self._slot, values.unsqueeze(2))
            return Part(self._key_matrices, self._value_matrices, len(keys), 1)
        if self.is_full:
            self._renew(keys)
        n = self._n
        self._keys.select(2, n).copy_(keys)
        self._values.select(2, n).copy_(values)
        self._n = n = n + 1
        return Part(self._key_matrices[:, :, :n], self._value_matrices[:, :n], len(keys), 1)

    def _renew(self, like: Float[Tensor, "row kv d_head"]) -> None:
        """Keep a full buffer, and make the next one."""
        if self._n:
            self._parts.append(Part(self._key_matrices, self._value_matrices, len(like), 1))
        self._n = 0
        self._allocate(like, 0)

    def _allocate(self, like: Float[Tensor, "row kv ..."], columns: int) -> None:
        """New buffers, for ``columns`` columns of the prompt and the next ones."""
        later = max(1, min(_BLOCK, self._limit))
        self._limit -= later
        self._size = columns + later
        shape = (*like.shape[:2], self._size, like.shape[-1])
        self._keys, self._values = like.new_empty(shape), like.new_empty(shape)
        self._key_matrices, self._value_matrices = self._keys.flatten(0, 1).mT, self._values.flatten(0, 1)

    def _copy(self, segments: Sequence[Segment]) -> None:
        """Begin the buffers with the columns of segments."""
        self._n = sum(segment.columns for segment in segments)
        self._allocate(segments[0].keys, self._n)
        torch.cat([segment.keys for segment in segments], dim=2, out=self._keys[:, :, : self._n])
        torch.cat([segment.values for segment in segments], dim=2, out=self._values[:, :, : self._n])


def _is_small(segments: Sequence[Segment]) -> bool:
    size = sum(segment.keys.numel() * segment.keys.element_size() for segment in segments)
    return 0 < size <= _SMALL and all(segment.copies == 1 for segment in segments)


def _softmax(scores: Float[Tensor, "row head 1 key"], in_place: bool) -> Float[Tensor, "row head 1 key"]:
    # The kernel reads a row before it writes it, so that the result can take the place of the scores.
    return torch.softmax(scores, dim=-1, out=scores) if in_place else scores.softmax(dim=-1)


def _pattern(scores: Float[Tensor, "row head 1 key"], edits: Edits, in_place: bool) -> Float[Tensor, "row head 1 key"]:
    """Softmax of scores, with the functions on scores and pattern."""
    given, dtype, on_scores = scores, scores.dtype, edits.get("hook_attn_scores", ())
    for edit in on_scores:
        changed = edit(scores)
        scores = scores if changed is None else changed.to(dtype)
    pattern = _softmax(scores, in_place and scores is given)
    if on_scores:  # If a hook masks every key of a row, the softmax of that row is NaN. Its output is set to zero.
        pattern = torch.where(pattern.isnan(), 0, pattern)
    for edit in edits.get("hook_pattern", ()):
        changed = edit(pattern)
        pattern = pattern if changed is None else changed.to(dtype)
    return pattern.contiguous()


def _joined(products: Sequence[Tensor]) -> Tensor:
    """Products of all columns, in the order of axes of the most shared ones."""
    prompts = min(len(product) for product in products)
    return torch.cat([product.reshape(prompts, -1, *product.shape[2:]) for product in products], dim=-1)


def _mixture(weights: Float[Tensor, "matrix group key"], parts: Sequence[Part], kv: int) -> Tensor:
    """Sums of all values, weighted by the pattern."""
    first, sums = 0, None
    for part in parts:
        sums, first = mixed(weights[..., first : first + part.columns], part, kv, sums), first + part.columns
    assert sums is not None
    return sums
