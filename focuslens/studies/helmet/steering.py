"""Settings of the paper's HELMET tables: the baseline, and each strength of the directions on each number of heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

from focuslens.evaluation import Setting, steering_settings
from focuslens.heads import Head, check_heads
from focuslens.interventions.directions import FocusDirections
from focuslens.studies.helmet.by_task import require_task_names, value_of
from focuslens.studies.helmet.tables import BASELINE
from focuslens.studies.helmet.tasks import Task

if TYPE_CHECKING:
    from focuslens.model.execution import Executor
    from focuslens.model.focus_model import FocusModel

__all__ = ["paper_settings", "ranked_heads", "require_named", "sink_heads", "task_steering"]

_PUBLISHED = "published files, "


def paper_settings(
    model: FocusModel | Executor,
    directions: FocusDirections | None,
    heads: Sequence[Head],
    ks: Sequence[int],
    alphas: Sequence[float],
) -> list[Setting]:
    """The baseline and, if there are directions, one setting ``HEADS_ALPHA`` per number of heads and strength.

    Args:
        model: The model.
        directions: The directions, or ``None`` for only the baseline.
        heads: Heads with a direction, best first.
        ks: Numbers of heads to steer.
        alphas: Strengths of the directions.

    Raises:
        ValueError: If there are too few heads, a number occurs twice in ``ks`` or ``alphas``, or the directions do not
            fit the model.
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


def task_steering(
    model: FocusModel | Executor,
    directions: FocusDirections,
    heads: Sequence[Head],
    ks: Sequence[int],
    alphas: Mapping[str, float],
    task: Task,
) -> list[Setting]:
    """The baseline, and one setting ``HEADS_by-task`` per number of heads, with the strength of one task.

    Args:
        model: The model.
        directions: The directions.
        heads: Heads with a direction, best first.
        ks: Numbers of heads to steer.
        alphas: Strengths by task or category; see :func:`~focuslens.studies.helmet.by_task.value_of`.
        task: The task.

    Raises:
        ValueError: If there is no strength for the task, or as for :func:`paper_settings`.
    """
    require_task_names(alphas)
    baseline, *settings = paper_settings(model, directions, heads, ks, [value_of(alphas, task)])
    return [baseline, *(replace(setting, name=f"{k}_by-task") for k, setting in zip(ks, settings, strict=True))]


def ranked_heads(directions: FocusDirections, ranking: Sequence[Head] | None) -> list[Head]:
    """Heads with a direction, in the order of ``ranking`` or, without a ranking, in the order of the directions.

    Raises:
        ValueError: If ``ranking`` is ``None`` and the directions are not in the order of a ranking, or the ranking and
            the directions have no head in common.
    """
    if ranking is None:
        if str(directions.provenance.get("source", "")).startswith(_PUBLISHED):
            raise ValueError(
                "published directions cover all heads and are not ranked: name a ranking with --ranking, such as "
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
    """The ``n`` best heads, for the sink scores in the paper's tables. A head in ``ranking`` needs no direction.

    Args:
        model: The model.
        heads: Heads with a direction, best first. They are used if ``ranking`` is ``None``.
        ranking: All heads, best first, or ``None``.
        n: Maximum number of heads.

    Raises:
        ValueError: If ``n`` is negative, or the ranking names a head that the model does not have.
    """
    if n < 0:
        raise ValueError(f"--sink-heads is {n}; it must be 0 or more")
    best = check_heads(heads if ranking is None else ranking, model.shape.n_layers, model.shape.n_heads)
    return list(best[:n])


def require_named(directions: FocusDirections, model: FocusModel | Executor, named: str | None) -> None:
    """Refuse directions of another model, unless the user names that model.

    Directions that record no model are accepted.

    Args:
        directions: The directions.
        model: The model of the run.
        named: Name of the other model whose directions the user allows, or ``None``.

    Raises:
        ValueError: If the directions belong neither to ``model`` nor to the model in ``named``.
    """
    source, recorded = str(directions.provenance.get("source", "")), directions.provenance.get("model")
    published, origin = source.startswith(_PUBLISHED), directions.origin
    if origin is None:
        return
    # Equal names suffice, because the digest of the weights depends on the dtype and on the kind of TransformerLens
    # model. For the authors' files, the owner on the hub is not compared, because the folders may name another owner.
    same = _last(origin) == _last(model.name) if published else origin == model.name
    if same and "/" not in origin and isinstance(recorded, Mapping):
        # The last component of a directory, such as checkpoint-100, is the name of many models.
        kind, described = cast("Mapping[str, Any]", recorded), model.description
        same = kind.get("weights") == described["weights"] or any(
            kind.get(key) != described[key] for key in ("backend", "dtype")
        )
    if same or (not published and recorded.get("weights") == model.description["weights"]):  # pyright: ignore[reportOptionalMemberAccess, reportUnknownMemberType]
        return
    if named is not None and _last(origin) == _last(named):
        return
    hint = f"--directions-of names {named!r}" if named else f"to use them all the same, give --directions-of {origin}"
    raise ValueError(f"the directions belong to the model {origin}, and the model of this run is {model.name}; {hint}")


def _last(name: str) -> str:
    """Name of a model without its owner or folder."""
    return Path(name).name
