"""The paper's settings: no intervention, and directions at each strength on each number of heads."""

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
    """The baseline and, given directions, every strength on every number of heads, named ``HEADS_ALPHA``.

    Raises:
        ValueError: If there are too few heads, a number occurs twice, or the directions do not fit the model.
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
            (setting,) = steering_settings(directions, heads, [alpha], [k])
            settings.append(replace(setting, name=f"{k}_{alpha:g}"))
    return settings


def ranked_heads(directions: FocusDirections, ranking: Sequence[Head] | None) -> list[Head]:
    """Heads with a direction, best first.

    Raises:
        ValueError: If the directions are not in the order of a ranking and no ranking is given, or the ranking and the
            directions share no head.
    """
    if ranking is None:
        if str(directions.provenance.get("source", "")).startswith(_PUBLISHED):
            raise ValueError(
                "published directions are of all heads, in no order of rank: name a ranking with --ranking, such as "
                "contextual_heads_scores_full_seq/MODEL/relevant_heads.json beside them, or focuslens heads' heads.json"
            )
        return list(directions.heads)
    steerable = set(directions.heads)
    ranked = [head for head in ranking if head in steerable]
    if not ranked:
        raise ValueError(f"the ranking and the directions share no head; the directions have {directions.heads[:5]}...")
    return ranked


def sink_heads(
    model: FocusModel | Executor, heads: Sequence[Head], ranking: Sequence[Head] | None, n: int
) -> list[Head]:
    """The best heads, for the sink scores of the paper's tables. If a ranking is given, they need no direction.

    Args:
        model: The model.
        heads: Heads with a direction, best first.
        ranking: All heads, best first, or ``None``.
        n: Largest number of heads.

    Raises:
        ValueError: If ``n`` is negative, or the ranking names a head that the model does not have.
    """
    if n < 0:
        raise ValueError(f"--sink-heads is {n}; it must be 0 or more")
    best = check_heads(heads if ranking is None else ranking, model.shape.n_layers, model.shape.n_heads)
    return list(best[:n])


def require_named(directions: FocusDirections, model: FocusModel | Executor, named: str | None) -> None:
    """Refuse directions of another model, unless the user names that model.

    Raises:
        ValueError: If the directions belong neither to ``model`` nor to the model ``named``.
    """
    source, recorded = str(directions.provenance.get("source", "")), directions.provenance.get("model")
    published, origin = source.startswith(_PUBLISHED), directions.origin
    if origin is None:
        return
    # Equal names suffice: the same weights have different digests in other dtypes and other kinds of TransformerLens
    # model. The owner on the hub is not compared, because the authors' folders may name a different one.
    same = _last(origin) == _last(model.name) if published else origin == model.name
    if same or (not published and recorded.get("weights") == model.description["weights"]):  # pyright: ignore[reportOptionalMemberAccess, reportUnknownMemberType]
        return
    if named is not None and _last(origin) == _last(named):
        return
    hint = f"--directions-of names {named!r}" if named else f"to use them all the same, give --directions-of {origin}"
    raise ValueError(f"the directions belong to the model {origin}, and the model of this run is {model.name}; {hint}")


def _last(name: str) -> str:
    """A model's name without its owner or folder."""
    return Path(name).name
