"""Parts of a prompt that heads chose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from focuslens.interventions.mixed_split import WeightedParts
from focuslens.prompts.prompt import Span
from focuslens.util.frames import rows_frame

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["Choice"]


@dataclass(frozen=True)
class Choice:
    """Parts of one prompt that heads chose.

    Attributes:
        parts: Token ranges of all parts.
        shares: Share of the attention to the parts, per part. Negative attention, after calibration, counts as none.
        chosen: Indices of the chosen parts, the most attended first; empty if the gate left the prompt alone.
        sink: Mean attention to the first two tokens.
    """

    parts: tuple[Span, ...]
    shares: tuple[float, ...]
    chosen: tuple[int, ...]
    sink: float

    @property
    def weighted(self) -> WeightedParts:
        """The parts, weighted by their shares among the chosen ones. A token of two parts counts for the first."""
        total = sum(self.shares[i] for i in self.chosen)
        weighted: list[tuple[Span, float]] = []
        reached = 0
        for i in sorted(range(len(self.parts)), key=lambda i: self.parts[i]):
            start, end = max(self.parts[i][0], reached), self.parts[i][1]
            if start < end:
                weighted.append(((start, end), self.shares[i] / total if i in self.chosen else 0.0))
                reached = end
        return WeightedParts(tuple(part for part, _ in weighted), tuple(weight for _, weight in weighted))

    def to_frame(self) -> pd.DataFrame:
        """Data frame with one row per part: its token range, its share, and whether it was chosen."""
        rows = [
            {"part": i, "start": start, "end": end, "share": share, "is_chosen": i in self.chosen}
            for i, ((start, end), share) in enumerate(zip(self.parts, self.shares, strict=True))
        ]
        units = {"share": "share of the attention to all parts, 0 to 1"}
        return rows_frame(rows, units, ("part", "start", "end", "share", "is_chosen"))
