"""Gold documents of a sample: none, one, or several, as in a multi-hop question."""

from __future__ import annotations

from typing import TypeAlias

__all__ = ["Gold", "gold_documents"]

Gold: TypeAlias = int | tuple[int, ...] | None
"""Index of the gold document, indices of several, or ``None`` if none is known."""


def gold_documents(gold: Gold) -> tuple[int, ...]:
    """Indices of all gold documents."""
    if gold is None:
        return ()
    return gold if isinstance(gold, tuple) else (gold,)
