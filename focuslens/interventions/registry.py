"""Reconstruction of interventions from their descriptions in result files."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

from focuslens.hooks import Intervention
from focuslens.interventions.ablation import HeadAblation
from focuslens.interventions.directions import FocusDirections
from focuslens.interventions.logit_bias import LogitBias
from focuslens.interventions.pasta import Pasta
from focuslens.interventions.position_calibration import PositionCalibration
from focuslens.interventions.random_focus import RandomFocus
from focuslens.interventions.self_focus import SelfFocus
from focuslens.interventions.split_softmax import SplitSoftmax
from focuslens.interventions.spotlight import SpotLight
from focuslens.interventions.steering import FocusSteering
from focuslens.interventions.targets import TargetedSplitSoftmax, TargetedSteering
from focuslens.interventions.votes import HeadVotes
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
    kind, heads = description.get("kind"), [(layer, head) for layer, head in description.get("heads") or ()]
    if kind == "split_softmax":
        return SplitSoftmax(heads, description["tau"], _span(description["span"]))
    if kind == "random_focus":
        return RandomFocus(heads, description["tau"], seed=description["seed"], parts=description["parts"])
    if kind == "self_focus":
        return _self_focus(description, directions)
    if kind == "targeted_split_softmax":
        return TargetedSplitSoftmax(heads, description["mass"], _span(description["span"]))
    if kind in _OF_SPANS:
        some = None if description["heads"] is None else heads
        return _OF_SPANS[str(kind)](
            heads=some,
            span=_span(description["span"]),
            **{name: value for name, value in description.items() if name not in ("kind", "heads", "span")},
        )
    if kind == "position_calibration":
        return PositionCalibration(**{name: value for name, value in description.items() if name != "kind"})
    if kind == "focus_steering":
        found = _directions_of(description, heads, directions)
        return FocusSteering(found, description["alpha"], heads, description["positions"])
    if kind == "targeted_steering":
        found = _directions_of(description, heads, directions)
        settings = {name: description[name] for name in ("alphas", "positions")}
        return TargetedSteering(found, description["mass"], heads, part=_span(description["part"]), **settings)
    if kind == "head_ablation" and description["mode"] != "mean":
        span = None if description["span"] is None else _span(description["span"])
        return HeadAblation(heads, description["mode"], span=span, positions=description["positions"])
    raise ValueError(f"an intervention of the kind {kind!r} cannot be made from its description")


def _self_focus(description: Mapping[str, Any], directions: Iterable[FocusDirections]) -> SelfFocus:
    settings = {
        name: value for name, value in description.items() if name not in ("kind", "by", "heads", "tau", "edit")
    }
    by, edit = description["by"], description["edit"]
    choosing = HeadVotes.of(by) if isinstance(by, Mapping) else [(layer, head) for layer, head in by]
    if edit is not None:
        return SelfFocus(choosing, edit=intervention_from(edit, directions), **settings)
    focused = [(layer, head) for layer, head in description["heads"]]
    return SelfFocus(choosing, description["tau"], focused=focused, **settings)


def _directions_of(
    description: Mapping[str, Any], heads: Sequence[tuple[int, int]], directions: Iterable[FocusDirections]
) -> FocusDirections:
    """The candidate whose selection of the heads has the digest in the description."""
    digest = description["directions_sha256"]
    for candidate in directions:
        if set(heads) <= set(candidate.heads) and candidate.select(heads).digest == digest:
            return candidate
    raise ValueError(f"the directions with the digest {digest[:16]}... are missing")


_OF_SPANS: Mapping[str, Callable[..., Intervention]] = {
    "logit_bias": LogitBias,
    "pasta": Pasta,
    "spotlight": SpotLight,
}
"""Interventions on some or all heads and a span, whose descriptions contain the other arguments by name."""


def _span(span: Any) -> SpanLike:
    return span if isinstance(span, str) else (int(span[0]), int(span[1]))
