"""Keys that a query head reads."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float, Int
from torch import Tensor

from focuslens.util.frames import long_frame

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["HeadKeys"]


@dataclass(frozen=True, eq=False)
class HeadKeys:
    """Keys that a query head reads, taken before the rotary embedding.

    Attributes:
        contents: Keys before the rotary embedding. If the model has a key norm, the keys are normalised.
        token_ids: Token id of each key.
        positions: Absolute position of each key.
    """

    contents: Float[Tensor, "key d_head"]
    token_ids: Int[Tensor, "key"]
    positions: Int[Tensor, "key"]

    def to_frame(self) -> pd.DataFrame:
        """Data frame with one row per key and dimension."""
        n_keys, d_head = self.contents.shape
        values = {"value": self.contents.float().cpu()}
        frame = long_frame({"key": range(n_keys), "dimension": range(d_head)}, values, {"value": "key activation"})
        for name, column in (("position", self.positions), ("token_id", self.token_ids)):
            frame.insert(1, name, column.cpu().repeat_interleave(d_head).numpy())
        return frame
