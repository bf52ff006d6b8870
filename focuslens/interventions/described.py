"""Interventions from what result files say of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from focuslens.hooks import Intervention
from focuslens.interventions.ablation import HeadAblation
from focuslens.interventions.directions import FocusDirections
from focuslens.interventions.focus import FocusSteering
from focuslens.interventions.split_softmax import SplitSoftmax
from focuslens.prompts.batch import SpanLike

__all__ = ["intervention_from"]


def intervention_from(description: Mapping[str, Any], directions: Iterable[FocusDirections] = ()) -> Intervention:
    """The intervention whose ``describe()`` gave a description.

    Args:
        description: As it stands in a result file.
        directions: Where steering may find its own: those with the digest that the description has, or of which the
            heads described have it.

    Raises:
        ValueError: If the description lacks what made the intervention: vectors, which it names by their digest only.
    """
    kind, heads = description.get("kind"), [(layer, head) for layer, head in description.get("heads", ())]
    if kind == "split_softmax":
        return SplitSoftmax(heads, description["tau"], _span(description["span"]))
    if kind == "focus_steering":
        wanted = description["directions_sha256"]
        for one in directions:
            if set(heads) <= set(one.heads) and one.select(heads).digest == wanted:
                return FocusSteering(one, description["alpha"], heads, description["positions"])
        raise ValueError(f"the directions with the digest {wanted[:16]}... are not here")
    if kind == "head_ablation" and description["mode"] != "mean":
        span = None if description["span"] is None else _span(description["span"])
        return HeadAblation(heads, description["mode"], span=span, positions=description["positions"])
    raise ValueError(f"an intervention of the kind {kind!r} cannot be made from its description")


def _span(span: Any) -> SpanLike:
    return span if isinstance(span, str) else (int(span[0]), int(span[1]))
