"""``focuslens steer``: accuracy under focus directions."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from focuslens.cli import cluster, options
from focuslens.cli.command import Command
from focuslens.cli.common import RunSettings, open_executor, open_samples
from focuslens.cli.figures import note_figures
from focuslens.cli.rankings import get_ranking
from focuslens.cli.sweeps import finish, first_heads, possible_counts, sweep_to

if TYPE_CHECKING:
    from focuslens.evaluation import Sweep
    from focuslens.interventions.directions import FocusDirections
    from focuslens.model.execution import Executor

__all__ = ["COMMAND"]


def _add_options(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_samples(parser)
    options.add_run(parser)
    options.add_directions(parser, required=True)
    parser.add_argument(
        "--alpha",
        type=options.numbers,
        default=[-0.2, 0.2, 0.4],
        help="strengths (default -0.2,0.2,0.4); write --alpha=-0.2,...",
    )
    options.add_counts(parser)
    options.add_positions(parser)
    cluster.add_options(parser)
    options.add_ranking(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run a sweep of focus directions over the strength ``alpha`` and the number of heads ``k``."""
    from focuslens.interventions.directions import open_directions

    settings = RunSettings.of(args)
    settings = replace(settings, samples=settings.samples.requiring("test", "answers"))
    note_figures(settings.out)
    directions = open_directions(args.directions)
    with open_executor(args, settings.model) as model:
        directions.require_shape(model.shape)
        return _sweep(settings.fitted(model), model, directions, args)


def _sweep(
    settings: RunSettings, model: Executor, directions: FocusDirections, args: argparse.Namespace
) -> dict[str, Any]:
    from focuslens.evaluation import Setting, steering_settings

    data = open_samples(settings.samples, "test")
    ranking, source = get_ranking(args.heads, settings, model)
    steerable = set(directions.heads)
    heads = [head for head in ranking if head in steerable]
    if not heads:
        raise ValueError(
            f"{args.directions} has directions of {len(directions)} heads, none of which the ranking names; rank all "
            "heads (leave --heads out), or name the ranking that the directions were trained with"
        )
    ks = possible_counts(args.k, len(heads))
    grid = [Setting("baseline"), *steering_settings(directions, heads, args.alpha, ks, positions=args.positions)]
    out = None if settings.out is None else settings.out / "steering.jsonl"
    sweep = sweep_to(settings, model, data, grid, out)
    entries = {"heads": first_heads(heads, ks), "ranking": source, "directions": directions.digest}
    return finish(settings, model, data, sweep, "steering", lambda: _figure(sweep), entries)


def _figure(sweep: Sweep) -> Any:
    from focuslens.viz import curves, direction_curves

    return direction_curves(curves(sweep, "alpha"), {"baseline": sweep["baseline"].em})


COMMAND = Command(
    name="steer",
    help="accuracy under focus directions",
    description="Accuracy when directions of strength alpha are added to the top k heads (equation 5).\n"
    "A killed run with --out resumes.",
    example="focuslens steer --directions runs/directions --alpha=-0.2,0.2,0.5 --k 5,20",
    add_options=_add_options,
    run=run,
    resumes="with --out",
)
