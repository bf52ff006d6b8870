"""Layers of a ``HookedTransformer`` that share the numbers of their rotary tables."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

__all__ = ["RotaryKeys"]


class RotaryKeys:
    """Key of each layer's rotary tables. Layers with equal tables have the same key.

    TransformerLens has tables in every layer, and a user may edit those of one layer, for example to ablate its
    positions. The tables are compared when one of them has changed since the last comparison.

    Args:
        hooked: The ``HookedTransformer``.
    """

    def __init__(self, hooked: Any) -> None:
        self._hooked = hooked
        self._versions: list[object] = []
        self._keys: list[int] = []

    def current(self) -> list[int]:
        """Key of each layer: the first layer with the same tables."""
        tables = [(block.attn.rotary_cos, block.attn.rotary_sin) for block in self._hooked.blocks]
        versions = [_version(table) for pair in tables for table in pair]
        if None in versions or versions != self._versions:
            keys: list[int] = []
            for layer, pair in enumerate(tables):
                firsts = sorted(set(keys))
                keys.append(next((first for first in firsts if _are_same(tables[first], pair)), layer))
            self._versions, self._keys = versions, keys
        return self._keys


def _version(table: Tensor) -> object:
    """Value that is another one after an edit of the table; ``None`` if PyTorch does not count edits."""
    return None if table.is_inference() else (table.data_ptr(), table._version, table.shape)


def _are_same(one: tuple[Tensor, Tensor], other: tuple[Tensor, Tensor]) -> bool:
    """Whether tables are equal as far as both go. Longer ones were extended when they were needed."""
    n = min(len(one[0]), len(other[0]))
    return all(a[:n].shape == b[:n].shape and torch.equal(a[:n], b[:n]) for a, b in zip(one, other, strict=True))
