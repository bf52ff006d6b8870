"""The paper's settings: no intervention, and directions of each strength on each number of heads."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from focuslens.evaluation import Setting, steering_settings
from focuslens.heads import Head, check_heads
from focuslens.interventions.directions import FocusDirections
from focuslens.studies.helmet.tables import BASELINE

if TYPE_CHECKING:
    from focuslens.model.execution import Executor
    from focuslens.model.focus_model import FocusModel

__all__ = ["paper_settings", "ranked_heads", "require_named", "sink_heads"]

_PUBLISHED = "published files, "


def paper_settings(
    model: FocusModel | Executor,
    directions: FocusDirections | None,
    heads: Sequence[Head],
    ks: Sequence[int],
    alphas: Sequence[float],
) -> list[Setting]:
    """The baseline and, where there are directions, every strength on every number of heads, named ``HEADS_ALPHA``.

    Raises:
        ValueError: If there are not so many heads, a number occurs twice, or the directions do not fit the model.
    """
    settings = [Setting(BASELINE)]
    if directions is None:
        return settings
    directions.require_shape(model.shape)
    for option, values in (("heads", ks), ("alpha", alphas)):
        if len(set(values)) < len(values):
            raise ValueError(f"--{option} has a number twice: {','.join(f'{value:g}' for value in values)}")
    for k in ks:
        for alpha in alphas:
            (one,) = steering_settings(directions, heads, [alpha], [k])
            settings.append(replace(one, name=f"{k}_{alpha:g}"))
    return settings


def ranked_heads(directions: FocusDirections, ranking: Sequence[Head] | None) -> list[Head]:
    """Heads that have a direction, best first.

    Raises:
        ValueError: If the directions are in no order of rank and there is no ranking, or it shares no head with them.
    """
    if ranking is None:
        if str(directions.provenance.get("source", "")).startswith(_PUBLISHED):
            raise ValueError(
                "published directions are of all heads, in no order of rank: name a ranking with --ranking, such as "
                "contextual_heads_scores_full_seq/MODEL/relevant_heads.json beside them, or focuslens heads' heads.json"
            )
        return list(directions.heads)
    steerable = set(directions.heads)
    found = [head for head in ranking if head in steerable]
    if not found:
        raise ValueError(f"the ranking and the directions share no head; the directions have {directions.heads[:5]}...")
    return found


def sink_heads(
    model: FocusModel | Executor, heads: Sequence[Head], ranking: Sequence[Head] | None, n: int
) -> list[Head]:
    """The best heads, of which the paper's tables of sink scores are: with a ranking, whether steerable or not.

    Args:
        model: The model.
        heads: Those that can be steered, best first.
        ranking: All heads, best first, where there is one.
        n: How many, at most.

    Raises:
        ValueError: If ``n`` is negative, or the ranking names a head that the model does not have.
    """
    if n < 0:
        raise ValueError(f"--sink-heads is {n}; it must be 0 or more")
    best = check_heads(heads if ranking is None else ranking, model.shape.n_layers, model.shape.n_heads)
    return list(best[:n])


def require_named(directions: FocusDirections, model: FocusModel | Executor, named: str | None) -> None:
    """Refuse directions of another model, unless that model is named: then they may act on this one.

    Raises:
        ValueError: If they are of another model than the one at hand and the one that is named.
    """
    source, recorded = str(directions.provenance.get("source", "")), directions.provenance.get("model")
    published, origin = source.startswith(_PUBLISHED), directions.origin
    if origin is None:
        return
    # The same weights have another digest in another dtype or kind of TransformerLens model, so a name does as well.
    # The authors' folders are called after models whose owner or folder may be another here.
    same = _last(origin) == _last(model.name) if published else origin == model.name
    if same or (not published and recorded.get("weights") == model.description["weights"]):  # pyright: ignore[reportOptionalMemberAccess, reportUnknownMemberType]
        return
    if named is not None and _last(origin) == _last(named):
        return
    asked = f"--directions-of names {named!r}" if named else f"to let them act on it, name it: --directions-of {origin}"
    raise ValueError(f"the directions are of {origin}, and the model is {model.name}, which is another; {asked}")


def _last(name: str) -> str:
    """A model's name without its owner or folder."""
    return Path(name).name
