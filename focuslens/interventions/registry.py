"""Reconstruction of interventions from their descriptions in result files."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from focuslens.hooks import Intervention
from focuslens.interventions.ablation import HeadAblation
from focuslens.interventions.directions import FocusDirections
from focuslens.interventions.self_focus import SelfFocus
from focuslens.interventions.split_softmax import SplitSoftmax
from focuslens.interventions.steering import FocusSteering
from focuslens.prompts.batch import SpanLike

__all__ = ["intervention_from"]


def intervention_from(description: Mapping[str, Any], directions: Iterable[FocusDirections] = ()) -> Intervention:
    """Rebuild an intervention from the description that its ``describe()`` returned.

    Args:
        description: A description from a result file.
        directions: Candidate directions for focus steering. The candidate with the digest in the description is used.

    Raises:
        ValueError: If no candidate has the digest in the description, or if this kind of intervention cannot be rebuilt
            from a description.
    """
    kind, heads = description.get("kind"), [(layer, head) for layer, head in description.get("heads", ())]
    if kind == "split_softmax":
        return SplitSoftmax(heads, description["tau"], _span(description["span"]))
    if kind == "self_focus":
        settings = {name: value for name, value in description.items() if name not in ("kind", "heads", "tau")}
        focused = [(layer, head) for layer, head in settings.pop("focused")]
        return SelfFocus(heads, description["tau"], focused=focused, **settings)
    if kind == "focus_steering":
        digest = description["directions_sha256"]
        for candidate in directions:
            if set(heads) <= set(candidate.heads) and candidate.select(heads).digest == digest:
                return FocusSteering(candidate, description["alpha"], heads, description["positions"])
        raise ValueError(f"the directions with the digest {digest[:16]}... are missing")
    if kind == "head_ablation" and description["mode"] != "mean":
        span = None if description["span"] is None else _span(description["span"])
        return HeadAblation(heads, description["mode"], span=span, positions=description["positions"])
    raise ValueError(f"an intervention of the kind {kind!r} cannot be made from its description")


def _span(span: Any) -> SpanLike:
    return span if isinstance(span, str) else (int(span[0]), int(span[1]))
