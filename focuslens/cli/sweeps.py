"""``focuslens split-softmax`` and ``focuslens steer``: accuracy over a grid of settings."""

from __future__ import annotations

import argparse
import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from focuslens.cli.common import (
    Samples,
    get_ranking,
    open_executor,
    open_samples,
    print_table,
    require_figures,
    run_description,
    sweep_table,
)
from focuslens.cli.output import document
from focuslens.evaluation import (
    BASELINES,
    Setting,
    Sweep,
    run_sweep,
    split_softmax_settings,
    steering_settings,
)
from focuslens.heads import Head, random_heads
from focuslens.interventions.directions import FocusDirections, open_directions
from focuslens.model.execution import Executor
from focuslens.model.focus_model import FocusModel
from focuslens.util.files import write_json

__all__ = ["controls", "run_split_softmax", "run_steer", "sweep_to"]

_LOG = logging.getLogger(__name__)


def run_split_softmax(args: argparse.Namespace) -> dict[str, Any]:
    """Sweep ``tau`` and ``k`` on contextual heads, and ``k`` on as many random others."""
    require_figures(args)
    with open_executor(args) as model:
        return _split_softmax(args, model)


def _split_softmax(args: argparse.Namespace, model: Executor) -> dict[str, Any]:
    data = open_samples(args, model, "test")  # before the ranking, which then has as many documents a prompt
    ranking, source = get_ranking(args, model)
    ks = _possible(args.k, len(ranking))
    settings = [*BASELINES, *split_softmax_settings(ranking, args.tau, ks), *controls(model, ranking, args, ks)]
    sweep = sweep_to(args, model, data, settings, _records(args, "split_softmax"))

    def draw() -> Any:
        from focuslens.viz import curves, split_softmax_curves

        lines = curves(sweep, "tau", heads="contextual") + curves(sweep, "tau", heads="random")
        return split_softmax_curves(lines, {name: sweep[name].em for name in ("baseline", "gold", "negative")})

    return _finish(args, model, data, sweep, "split_softmax", draw, {"heads": _listed(ranking, ks), "ranking": source})


def controls(
    model: FocusModel | Executor, ranking: Sequence[Head], args: argparse.Namespace, ks: Sequence[int]
) -> list[Setting]:
    """Split-softmax at ``--random-tau`` on random heads that are in no set of contextual heads of the sweep."""
    n = model.shape.n_layers * model.shape.n_heads
    contextual = ranking[: max(min(args.exclude_top, n // 2), *ks)]
    left = [k for k in ks if k > n - len(contextual)]
    if left:
        _LOG.warning(
            "no random heads for --k %s: %d heads are left beside the %d best",
            ",".join(map(str, left)),
            n - len(contextual),
            len(contextual),
        )
    ks = [k for k in ks if k not in left]
    if args.random_tau is None or not ks:
        return []
    drawn = random_heads(model.shape.n_layers, model.shape.n_heads, max(ks), exclude=contextual, seed=args.seed)
    return split_softmax_settings(drawn, [args.random_tau], ks, label="random")


def run_steer(args: argparse.Namespace) -> dict[str, Any]:
    """Sweep ``alpha`` and ``k`` of focus directions."""
    require_figures(args)
    directions = open_directions(args.directions)
    with open_executor(args) as model:
        return _steer(args, model, directions)


def _steer(args: argparse.Namespace, model: Executor, directions: FocusDirections) -> dict[str, Any]:
    directions.require_shape(model.shape)
    data = open_samples(args, model, "test")  # before the ranking, as above
    ranking, source = get_ranking(args, model)
    steerable = set(directions.heads)
    heads = [head for head in ranking if head in steerable]
    if not heads:
        raise ValueError(
            f"{args.directions} has directions of {len(directions)} heads, none of which the ranking names; rank all "
            "heads (leave --heads away), or name the ranking that the directions were trained with"
        )
    ks = _possible(args.k, len(heads))
    settings = [Setting("baseline"), *steering_settings(directions, heads, args.alpha, ks, positions=args.positions)]
    sweep = sweep_to(args, model, data, settings, _records(args, "steering"))

    def draw() -> Any:
        from focuslens.viz import curves, direction_curves

        return direction_curves(curves(sweep, "alpha"), {"baseline": sweep["baseline"].em})

    return _finish(
        args,
        model,
        data,
        sweep,
        "steering",
        draw,
        {"heads": _listed(heads, ks), "ranking": source, "directions": directions.digest},
    )


def _possible(ks: Sequence[int], n: int) -> list[int]:
    """The numbers of heads that there are, saying which are left out.

    Raises:
        ValueError: If none is left.
    """
    possible = [k for k in ks if 1 <= k <= n]
    if not possible:
        raise ValueError(
            f"--k {','.join(map(str, ks))}: there are {n} heads to choose from; give numbers from 1 to {n}"
        )
    if len(possible) < len(ks):
        _LOG.warning(
            "left out of --k, since there are %d heads: %s", n, ", ".join(str(k) for k in ks if k not in possible)
        )
    return possible


def _listed(heads: Sequence[Head], ks: Sequence[int]) -> list[list[int]]:
    return [list(head) for head in heads[: max(ks, default=0)]]


def sweep_to(
    args: argparse.Namespace,
    model: FocusModel | Executor,
    data: Samples,
    settings: Sequence[Setting],
    out: Path | None,
) -> Sweep:
    """Run a sweep under the options, with its records in a file that a killed run continues."""
    return run_sweep(
        model,
        data.samples,
        settings,
        max_new_tokens=args.max_new_tokens,
        batch_tokens=args.batch_tokens,
        out=out,
        data=data.description,
        seed=args.seed,
    )


def _records(args: argparse.Namespace, name: str) -> Path | None:
    return None if args.out is None else Path(args.out) / f"{name}.jsonl"


def _finish(
    args: argparse.Namespace,
    model: Executor,
    data: Samples,
    sweep: Sweep,
    name: str,
    draw: Callable[[], Any],
    entries: dict[str, Any],
) -> dict[str, Any]:
    """Print the table, write it and its figure, and give what is written."""
    _LOG.info("intervals and tests of %d settings", len(sweep.settings))
    print_table(sweep_table(sweep))
    result = {**run_description(args, model, data), **entries, "settings": sweep.rows()}
    if args.out is None:
        return document(result)
    out = Path(args.out)
    write_json(out / f"{name}.json", result)
    from focuslens.viz import save_figure

    save_figure(draw(), out / f"{name}.png")
    print(f"\nwrote {name}.jsonl, {name}.json and {name}.png to {out}")
    return document(result, *(out / f"{name}{end}" for end in (".jsonl", ".json", ".png")))
