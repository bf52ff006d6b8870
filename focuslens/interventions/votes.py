"""Weighted votes of heads for the parts of a prompt, fitted on questions whose relevant document is known."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import Head, as_heads, check_heads
from focuslens.prompts.gold import Gold, gold_documents
from focuslens.util.checks import checked_number
from focuslens.util.files import write_json
from focuslens.util.frames import rows_frame

if TYPE_CHECKING:
    import pandas as pd

__all__ = ["HeadVotes"]


@dataclass(frozen=True)
class HeadVotes:
    r"""Weights with which heads vote for the parts of a prompt.

    Head :math:`h` pays the attention :math:`a_{hd}` to part :math:`d`. The share of a part is
    :math:`\mathrm{softmax}_d \sum_h w_h \log(\max(a_{hd}, 0) + \epsilon)`: a conditional logit model. A head with a
    negative weight votes against what it attends to, which corrects the others for what every question attends to, such
    as the last document.

    Attributes:
        heads: The heads.
        weights: Weight :math:`w_h` of each head.
        rows: Rows whose attention the weights were fitted on, as in :class:`SelfFocus`.
        floor: The attention :math:`\epsilon` that is added, so that no attention has a logarithm.
    """

    heads: tuple[Head, ...]
    weights: tuple[float, ...]
    rows: str = "tail"
    floor: float = 1e-3

    def __post_init__(self) -> None:
        object.__setattr__(self, "heads", as_heads(self.heads))
        object.__setattr__(self, "weights", tuple(float(checked_number(w, "weights")) for w in self.weights))
        if not self.heads or len(self.heads) != len(self.weights):
            raise ValueError(f"there are {len(self.heads)} heads and {len(self.weights)} weights; each head needs one")
        if not (math.isfinite(self.floor) and self.floor > 0):
            raise ValueError(f"floor is {self.floor}; it must be a positive number")

    def __repr__(self) -> str:
        return f"HeadVotes({len(self.heads)} heads, rows={self.rows!r}, {self.digest})"

    @property
    def digest(self) -> str:
        """Digest of the heads, weights and rows."""
        import hashlib

        return hashlib.sha256(json.dumps(self.describe(), sort_keys=True).encode()).hexdigest()[:16]

    def shares(self, attention: Float[Tensor, "head part"]) -> Float[Tensor, "part"]:
        """Share of each part, from the attention of each head to each part. The shares sum to 1."""
        weights = torch.tensor(self.weights, dtype=torch.float64)
        return (weights @ _features(attention, self.floor)).softmax(dim=-1)

    @classmethod
    def fit(
        cls,
        attention: Sequence[Float[Tensor, "layer head _"]],
        gold: Sequence[Gold],
        heads: Iterable[tuple[int, int]] | None = None,
        *,
        rows: str = "tail",
        penalty: float = 0.1,
        floor: float = 1e-3,
    ) -> HeadVotes:
        r"""Fit weights by maximum likelihood.

        The mean negative log-likelihood of the gold documents, plus ``penalty`` times the sum of the squared weights of
        the features at unit standard deviation, has one minimum.

        Args:
            attention: Attention of each sample to each document, such as ``scores.attention`` of
                :class:`QuestionScores`, or ``scores.scores`` of :class:`DocumentScores` (with ``rows="response"``).
            gold: Index of the gold document per sample, or a tuple of several, such as ``scores.gold``. Of several,
                the mean log-likelihood counts. Samples with ``None``, or with attention that is NaN, are left out.
            heads: Heads that vote; by default all.
            rows: Rows that the attention was measured in.
            penalty: Strength of the penalty, more than 0. Choose it on validation questions.
            floor: The attention that is added before the logarithm.

        Raises:
            ValueError: If no sample has a gold document, or a value is out of range.
        """
        if not (math.isfinite(penalty) and penalty > 0):
            raise ValueError(f"penalty is {penalty}; it must be a positive number")
        if not attention or len(attention) != len(gold):
            raise ValueError(
                f"there is attention for {len(attention)} samples, and gold for {len(gold)}; each needs both"
            )
        n_layers, n_heads = attention[0].shape[:2]
        every = [Head(layer, head) for layer in range(n_layers) for head in range(n_heads)]
        chosen = every if heads is None else check_heads(heads, n_layers, n_heads)
        places = [layer * n_heads + head for layer, head in chosen]
        known = [
            (_features(values.flatten(0, 1)[places], floor), gold_documents(own))
            for values, own in zip(attention, gold, strict=True)
            if gold_documents(own) and not bool(values.isnan().any())
        ]
        if not known:
            raise ValueError("no sample has a gold document (gold_index), so there is nothing to fit")
        scale = torch.cat([features for features, _ in known], dim=1).std(dim=1).clamp(min=1e-12)
        weights = _most_likely([(features / scale[:, None], own) for features, own in known], penalty) / scale
        return cls(tuple(chosen), tuple(weights.tolist()), rows, floor)

    def to_frame(self) -> pd.DataFrame:
        """Data frame with one row per head: ``layer``, ``head`` and ``weight``."""
        rows = [
            {"layer": head.layer, "head": head.head, "weight": weight}
            for head, weight in zip(self.heads, self.weights, strict=True)
        ]
        return rows_frame(rows, {"weight": "logits per unit of log attention"})

    def describe(self) -> dict[str, Any]:
        """The votes as JSON values, from which :meth:`of` makes them again."""
        return {
            "heads": [list(head) for head in self.heads],
            "weights": list(self.weights),
            "rows": self.rows,
            "floor": self.floor,
        }

    @classmethod
    def of(cls, description: Mapping[str, Any]) -> HeadVotes:
        """Votes from their description."""
        heads = tuple(Head(layer, head) for layer, head in description["heads"])
        return cls(heads, tuple(description["weights"]), description["rows"], description["floor"])

    def save(self, path: str | Path, **origin: Any) -> None:
        """Write the votes to a JSON file, with JSON values that say where they come from."""
        write_json(Path(path), {"kind": "head_votes", **self.describe(), "origin": origin})

    @classmethod
    def load(cls, path: str | Path) -> HeadVotes:
        """Read votes from a file that :meth:`save` wrote.

        Raises:
            ValueError: If the file does not contain votes.
        """
        content = json.loads(Path(path).read_text())
        if not isinstance(content, dict) or content.get("kind") != "head_votes":
            raise ValueError(f"{path} does not contain votes of heads; it must be a file from HeadVotes.save")
        return cls.of(content)


def _features(attention: Float[Tensor, "head part"], floor: float) -> Float[Tensor, "head part"]:
    return (attention.double().clamp(min=0) + floor).log()


def _most_likely(
    samples: Sequence[tuple[Float[Tensor, "head _"], Sequence[int]]], penalty: float
) -> Float[Tensor, "head"]:
    """Weights at the minimum of the penalised negative log-likelihood, which is convex."""
    most = max(features.shape[1] for features, _ in samples)
    stacked = torch.zeros(len(samples), len(samples[0][0]), most, dtype=torch.float64)
    missing = torch.zeros(len(samples), most, dtype=torch.float64)
    shares = torch.zeros(len(samples), most, dtype=torch.float64)
    for i, (features, gold) in enumerate(samples):
        stacked[i, :, : features.shape[1]] = features
        missing[i, features.shape[1] :] = -1e300  # times the share zero, infinity would be NaN
        shares[i, list(gold)] = 1 / len(gold)
    one_each = all(len(gold) == 1 for _, gold in samples)
    target = shares.argmax(dim=1) if one_each else shares
    with torch.enable_grad():
        weights = torch.zeros(stacked.shape[1], dtype=torch.float64, requires_grad=True)
        optimizer = torch.optim.LBFGS(
            [weights], max_iter=500, tolerance_grad=1e-9, tolerance_change=1e-14, line_search_fn="strong_wolfe"
        )

        def loss() -> Tensor:
            optimizer.zero_grad()
            logits = torch.einsum("h,nhd->nd", weights, stacked) + missing
            value = torch.nn.functional.cross_entropy(logits, target) + penalty * weights.square().sum()
            value.backward()  # pyright: ignore[reportUnknownMemberType]
            return value

        optimizer.step(loss)  # pyright: ignore[reportUnknownMemberType]
    return weights.detach()
