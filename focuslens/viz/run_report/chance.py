"""Parts of a report's section on heads that show the chance level: the score of even attention."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from jaxtyping import Float

from focuslens.heads import Head

__all__ = ["ABOVE", "ABOVE_CAPTION", "DOTS", "chance_cells", "chance_findings"]

ABOVE = ("chance", "excess", "document_excess")
"""Columns that a file with the chance level has beside the scores."""

ABOVE_CAPTION = (
    ". Chance is the relevant score of even attention. Excess is the relevant score minus chance. Document excess is "
    "the relevant score minus the score of an even spread over the documents"
)
"""Explanation of the columns, for the caption of a table."""

DOTS = " Dots mark scores above chance, which is the score of even attention."
"""Explanation of the dots, for the caption of a map."""


def chance_cells(row: Mapping[str, Any], columns: Sequence[str]) -> tuple[float | str, ...]:
    """Cells of a row. A case without the chance level has a dash, because its file is of an earlier version."""
    return tuple(float(row[name]) if name in row else "-" for name in columns)


def chance_findings(
    header: Mapping[str, Any],
    case: str,
    scores: Float[np.ndarray, "layer head"],
    chance: Float[np.ndarray, "layer head"] | None,
) -> tuple[str, ...]:
    """Finding on the excess of scores over the score of even attention; empty without the chance level.

    Args:
        header: Content of the file with the scores, which can have intervals of the excess.
        case: Case of the prompts, such as ``long``.
        scores: Relevant score of each head.
        chance: Relevant score of even attention.
    """
    if chance is None or not np.isfinite(scores - chance).any():
        return ()
    excess, tenth = scores - chance, scores > 0.1
    layer, head = np.unravel_index(int(np.nanargmax(excess)), excess.shape)
    best = Head(int(layer), int(head))
    ends = header.get("excess_intervals", {}).get(f"{best.layer}/{best.head}")
    interval = f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""
    return (
        f"Even attention would give {np.nanmean(chance):.3f} to the relevant document, by its share of the tokens of "
        f"{case} prompts (chance). Of the {int(tenth.sum())} heads above a tenth, {int((tenth & (excess > 0)).sum())} "
        f"are above chance. {int((excess > 0.1).sum())} heads exceed chance by more than a tenth. {best} exceeds it "
        f"most, by {excess[best]:.3f}{interval}.",
    )
