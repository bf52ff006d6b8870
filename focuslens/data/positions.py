"""Positions of the gold document among the documents of a prompt, counted from 0."""

from __future__ import annotations

from collections.abc import Sequence

from focuslens.util.checks import integers

__all__ = ["checked_positions", "require_positions", "spread_positions"]


def spread_positions(num_documents: int) -> tuple[int, ...]:
    """Five gold positions, evenly spaced from the first document to the last.

    For 20 documents, the positions are 0, 4, 9, 14 and 19, as in "Lost in the Middle" (Liu et al., 2024). For fewer
    than five documents, every position is included once.
    """
    return tuple(sorted({place * (num_documents - 1) // 4 for place in range(5)}))


def require_positions(
    positions: Sequence[int], num_documents: int, names: tuple[str, str] = ("gold_positions", "num_documents")
) -> None:
    """Check that every gold position is one of the documents. ``names`` are the user's names of the two arguments.

    Raises:
        ValueError: If a position is not.
    """
    outside = [position for position in positions if not 0 <= position < num_documents]
    if outside:
        listed, spread = (",".join(map(str, values)) for values in (outside, spread_positions(num_documents)))
        raise ValueError(
            f"{names[0]} {listed} is outside of the documents: with {names[1]} {num_documents}, positions are 0 to "
            f"{num_documents - 1}; leave {names[0]} out for {spread}"
        )


def checked_positions(positions: Sequence[int], num_documents: int) -> tuple[int, ...]:
    """The argument ``gold_positions`` as a tuple of Python's integers.

    Raises:
        TypeError: If it is not a sequence of integers.
        ValueError: If it is empty, or if a position is not one of the documents.
    """
    checked = tuple(integers(positions, "gold_positions"))
    if not checked:
        raise ValueError("gold_positions is empty; give at least one position, or leave gold_positions out")
    require_positions(checked, num_documents)
    return checked
