"""The document that each response came from, according to the attention of its tokens."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from focuslens.heads import Head
from focuslens.util.frames import SHARE, rows_frame
from focuslens.util.html import bar, card, shorten, table

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["AnswerSources"]

_N_SHOWN = 20
"""Number of responses in the notebook display."""


@dataclass(frozen=True, eq=False)
class AnswerSources:
    """Document that each response came from, by the attention of the response's tokens.

    No gold document and no accepted answer is needed. A share is the attention to a document, divided by the attention
    to all documents. Shares of a sample sum to 1. Long documents receive more attention than short ones, so a share is
    evidence beside the others and no probability.

    Attributes:
        scores: Attention to each document of each sample, ``[document]`` in prompt order, averaged over the response's
            tokens and over :attr:`heads`. All scores of a sample with an empty response are NaN.
        heads: The heads.
        sample_ids: ``MultiDocSample.id`` of each sample.
        responses: The response of each sample.
    """

    scores: tuple[Float[Tensor, "_"], ...]
    heads: tuple[Head, ...]
    sample_ids: tuple[str, ...]
    responses: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.scores)

    def __repr__(self) -> str:
        return f"AnswerSources({len(self)} samples, by {len(self.heads)} heads)"

    def _repr_html_(self) -> str:
        rows = [
            (name, shorten(response, 120), "-" if top is None else top + 1, bar(share), margin)
            for name, response, top, share, margin in zip(
                self.sample_ids, self.responses, self.top, self.top_shares, self.margins, strict=True
            )
        ]
        columns = ("sample", "response", "document", "share", "margin")
        shown = f"the first {_N_SHOWN} of " if len(self) > _N_SHOWN else ""
        title = f"Documents that {shown}{len(self)} responses came from, by {len(self.heads)} heads"
        return card(title, table(columns, rows[:_N_SHOWN], "Documents are counted from 1, as in the prompt"))

    @property
    def shares(self) -> tuple[Float[Tensor, "_"], ...]:
        """Share of each document in the attention to all documents of the sample, which sums to 1."""
        return tuple(scores.double() / scores.double().sum() for scores in self.scores)

    @property
    def top(self) -> tuple[int | None, ...]:
        """Index of the document with the largest share, the first of equal ones; ``None`` for an empty response."""
        return tuple(None if bool(shares.isnan().any()) else int(shares.argmax()) for shares in self.shares)

    @property
    def top_shares(self) -> tuple[float, ...]:
        """Share of the top document of each sample; NaN for an empty response."""
        return tuple(float(shares.max()) for shares in self.shares)

    @property
    def margins(self) -> tuple[float, ...]:
        """Share of the top document minus the share of the next one; 1 for a single document.

        The margin of an empty response is NaN.
        """
        return tuple(_margin(shares) for shares in self.shares)

    def to_frame(self) -> pd.DataFrame:
        """Data frame with one row per sample and document: ``score``, ``share``, and whether it is the top document.

        The column ``margin`` is that of the sample.
        """
        rows = [
            {
                "sample_id": name,
                "document": document,
                "score": score,
                "share": share,
                "is_top": document == top,
                "margin": margin,
            }
            for name, scores, shares, top, margin in zip(
                self.sample_ids, self.scores, self.shares, self.top, self.margins, strict=True
            )
            for document, (score, share) in enumerate(zip(scores.tolist(), shares.tolist(), strict=True))
        ]
        of_documents = "share of the attention to all documents, 0 to 1"
        units = {"score": SHARE, "share": of_documents, "margin": of_documents}
        return rows_frame(rows, units, ("sample_id", "document", "score", "share", "is_top", "margin"))


def _margin(shares: Float[Tensor, "_"]) -> float:
    if bool(shares.isnan().any()):
        return math.nan
    ordered = shares.sort(descending=True).values.tolist()
    return ordered[0] - (ordered[1] if len(ordered) > 1 else 0.0)
