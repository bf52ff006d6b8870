"""Naming, ranking and sampling attention heads."""

from __future__ import annotations

import json
import operator
import random
from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, SupportsIndex, overload

from jaxtyping import Float
from torch import Tensor

from focuslens.util.html import Markup, card, details, table

__all__ = [
    "Head",
    "HeadList",
    "ModelShape",
    "Sparsity",
    "as_heads",
    "check_heads",
    "heads_by_layer",
    "load_ranking",
    "random_heads",
    "rank_heads",
    "sparsity",
    "top_heads",
]


class Head(NamedTuple):
    """Layer of a query head and its index within the layer, both counted from 0. A head equals the plain tuple."""

    layer: int
    head: int

    def __str__(self) -> str:
        return f"L{self.layer}H{self.head}"


@dataclass(frozen=True)
class ModelShape:
    """Sizes of a model on which interventions and scores depend."""

    n_layers: int
    n_heads: int
    n_key_value_heads: int
    d_head: int
    d_model: int
    d_vocab: int
    n_ctx: int

    def key_value_head(self, head: int) -> int:
        """Index of the key-value head that the query head ``head`` reads."""
        return head // (self.n_heads // self.n_key_value_heads)


class HeadList(list[Head]):
    """List of heads, such as a ranking, with a readable representation. A slice of it is a ``HeadList`` too."""

    @overload
    def __getitem__(self, index: SupportsIndex) -> Head: ...
    @overload
    def __getitem__(self, index: slice) -> HeadList: ...
    def __getitem__(self, index: SupportsIndex | slice) -> Head | HeadList:
        selection = super().__getitem__(index)
        return HeadList(selection) if isinstance(selection, list) else selection

    def __repr__(self) -> str:
        names = [str(head) for head in self[:_SHOWN]]
        rest = f", ... {len(self)} heads" if len(self) > _SHOWN else ""
        return f"[{', '.join(names)}{rest}]"

    def _repr_html_(self) -> str:
        layers = heads_by_layer(self)
        rows = [(layer, ", ".join(f"H{head}" for head in sorted(indices))) for layer, indices in layers.items()]
        order = " ".join(f"{i}. {head}" for i, head in enumerate(self[:_SHOWN], start=1))
        rest = f" ... {len(self)}" if len(self) > _SHOWN else ""
        ranking = Markup(f"<div>{order}{rest}</div>")
        return card(f"{len(self)} heads", ranking, details("By layer", table(("layer", "heads"), rows)))


_SHOWN = 40
"""Maximum number of heads in the representation of a ``HeadList``."""


def as_heads(pairs: Iterable[tuple[int, int]]) -> tuple[Head, ...]:
    """Convert ``(layer, head)`` pairs to heads. Integers of NumPy and other libraries become Python integers.

    Raises:
        TypeError: If ``pairs`` does not consist of pairs of integers.
    """
    if isinstance(pairs, str) or not isinstance(pairs, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(f"heads is {pairs!r}; {_PAIRS}")
    return tuple(_as_head(pair) for pair in pairs)


_PAIRS = "heads are (layer, head) pairs, both counted from 0, such as [(12, 3), (14, 0)]"


def _as_head(pair: Any) -> Head:
    try:
        layer, head = pair
        return Head(operator.index(layer), operator.index(head))
    except (TypeError, ValueError) as error:
        raise TypeError(f"{pair!r} is not a head; {_PAIRS}") from error


def rank_heads(scores: Float[Tensor, "layer head"]) -> HeadList:
    """All heads, highest score first; ties are broken by layer, then head.

    Raises:
        ValueError: If a score is NaN, because no sample had a response to score.
    """
    if scores.isnan().any():
        raise ValueError("scores hold NaN: at least one head was never scored, so there is no ranking")
    order = scores.flatten().argsort(descending=True, stable=True).tolist()
    return HeadList(Head(*divmod(index, scores.shape[1])) for index in order)


def top_heads(scores: Float[Tensor, "layer head"], k: int) -> HeadList:
    """The ``k`` heads with the highest score, best first, in the order of :func:`rank_heads`.

    Raises:
        ValueError: If the model does not have ``k`` heads, or a score is NaN.
    """
    ranking = rank_heads(scores)
    if not 0 <= k <= len(ranking):
        raise ValueError(f"k is {k}; the model has {len(ranking)} heads")
    return ranking[:k]


def random_heads(
    n_layers: int, n_heads: int, k: int, *, exclude: Iterable[tuple[int, int]] = (), seed: int = 0
) -> HeadList:
    """Draw ``k`` different heads uniformly from all heads that are not excluded, as a control for contextual heads.

    With the same seed and exclusions, a smaller draw is the beginning of a larger draw.

    Raises:
        ValueError: If fewer than ``k`` heads are left after the exclusions.
    """
    excluded = set(as_heads(exclude))
    pool = [Head(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    pool = [head for head in pool if head not in excluded]
    if not 0 <= k <= len(pool):
        raise ValueError(f"cannot draw {k} random heads: {len(pool)} are left of {n_layers * n_heads}")
    random.Random(seed).shuffle(pool)
    return HeadList(pool[:k])


def heads_by_layer(heads: Iterable[tuple[int, int]]) -> dict[int, list[int]]:
    """Head indices by layer: layers in ascending order, indices in the order of ``heads``."""
    grouped: defaultdict[int, list[int]] = defaultdict(list)
    for layer, head in heads:
        grouped[layer].append(head)
    return dict(sorted(grouped.items()))


def check_heads(heads: Iterable[tuple[int, int]], n_layers: int, n_heads: int) -> tuple[Head, ...]:
    """Convert heads to a tuple of :class:`Head`, and check that a model of these sizes has them.

    Raises:
        ValueError: If a head is named twice or does not exist in the model.
    """
    checked = as_heads(heads)
    for layer, head in checked:
        if not (0 <= layer < n_layers and 0 <= head < n_heads):
            raise ValueError(
                f"head ({layer}, {head}) does not exist: the model has layers 0 to {n_layers - 1} "
                f"with heads 0 to {n_heads - 1}"
            )
    if len(set(checked)) < len(checked):
        duplicates = sorted({head for head in checked if checked.count(head) > 1})
        raise ValueError(f"heads named more than once: {', '.join(map(str, duplicates))}")
    return checked


@dataclass(frozen=True)
class Sparsity:
    """Number of heads that score above a threshold, and the layers of these heads (section 2.2 of the paper).

    Attributes:
        threshold: Threshold that the relevant contextual score of each counted head exceeds.
        count: Number of heads above the threshold.
        fraction: ``count`` divided by the number of all heads.
        layers: First and last layer with a counted head; ``None`` if no head is counted.
    """

    threshold: float
    count: int
    fraction: float
    layers: tuple[int, int] | None

    def __str__(self) -> str:
        where = f"layers {self.layers[0]} to {self.layers[1]}" if self.layers else "no layer"
        return f"> {self.threshold:g}: {self.count} heads ({self.fraction:.1%}), {where}"


def sparsity(
    scores: Float[Tensor, "layer head"], thresholds: Sequence[float] = (0.2, 0.1, 0.05)
) -> tuple[Sparsity, ...]:
    """Number of heads that score strictly above each threshold, and their layers."""
    rows: list[Sparsity] = []
    for threshold in thresholds:
        above = scores > threshold
        layers = above.any(dim=1).nonzero().flatten().tolist()
        count = int(above.sum())
        rows.append(Sparsity(threshold, count, count / above.numel(), (layers[0], layers[-1]) if layers else None))
    return tuple(rows)


def load_ranking(path: str | Path) -> HeadList:
    """Read a ranking of heads, best first, from a JSON file.

    The file holds a list ``[[layer, head], ...]``, as the paper's authors publish it, or an object with such a list
    under ``"heads"``, as ``focuslens heads`` writes it.

    Raises:
        ValueError: If the file has neither format.
    """
    try:
        entries = json.loads(Path(path).read_text())
    except ValueError as error:
        raise ValueError(f"{path} is not a ranking of heads: it is not JSON ({error})") from error
    if isinstance(entries, dict):
        entries = entries.get("heads")
    if not isinstance(entries, list) or not all(
        isinstance(entry, list) and len(entry) == 2 and all(isinstance(number, int) for number in entry)  # pyright: ignore[reportUnknownArgumentType, reportUnknownVariableType]
        for entry in entries  # pyright: ignore[reportUnknownVariableType]
    ):
        raise ValueError(f"{path} is not a ranking of heads: expected JSON [[layer, head], ...], best first")
    return HeadList(Head(layer, head) for layer, head in entries)  # pyright: ignore[reportUnknownVariableType, reportUnknownArgumentType]
