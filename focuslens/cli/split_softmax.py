"""``focuslens split-softmax``: accuracy when attention to the relevant document is raised or lowered."""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from focuslens.cli import cluster, options
from focuslens.cli.command import Command
from focuslens.cli.common import RunSettings, open_executor, open_samples
from focuslens.cli.figures import note_figures
from focuslens.cli.rankings import get_ranking
from focuslens.cli.sweeps import controls, finish, first_heads, possible_counts, sweep_to

if TYPE_CHECKING:
    from focuslens.evaluation import Sweep
    from focuslens.model.execution import Executor

__all__ = ["COMMAND"]


def _add_options(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_samples(parser)
    options.add_run(parser)
    parser.add_argument(
        "--tau",
        type=options.numbers,
        default=[0.1, 0.3, 0.6, 1.5, 1000],
        help="exponents (default 0.1,0.3,0.6,1.5,1000)",
    )
    parser.add_argument("--random-tau", type=float, default=0.3, help="exponent for random heads (default 0.3)")
    parser.add_argument(
        "--exclude-top",
        type=int,
        default=20,
        help="number of best heads that are never drawn as random heads (default 20)",
    )
    options.add_counts(parser)
    cluster.add_options(parser)
    options.add_ranking(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run a split-softmax sweep: ``tau`` and ``k`` on contextual heads and, as a control, ``k`` on random heads."""
    settings = RunSettings.of(args)
    settings = replace(settings, samples=settings.samples.requiring("test", "answers", "relevant"))
    note_figures(settings.out)
    with open_executor(args, settings.model) as model:
        return _sweep(settings.fitted(model), model, args)


def _sweep(settings: RunSettings, model: Executor, args: argparse.Namespace) -> dict[str, Any]:
    from focuslens.evaluation import BASELINES, split_softmax_settings

    data = open_samples(settings.samples, "test")
    ranking, source = get_ranking(args.heads, settings, model)
    ks = possible_counts(args.k, len(ranking))
    random = controls(model, ranking, ks, tau=args.random_tau, exclude=args.exclude_top, seed=settings.seed)
    grid = [*BASELINES, *split_softmax_settings(ranking, args.tau, ks), *random]
    out = None if settings.out is None else settings.out / "split_softmax.jsonl"
    sweep = sweep_to(settings, model, data, grid, out)
    entries = {"heads": first_heads(ranking, ks), "ranking": source}
    return finish(settings, model, data, sweep, "split_softmax", lambda: _figure(sweep), entries)


def _figure(sweep: Sweep) -> Any:
    from focuslens.viz import curves, split_softmax_curves

    lines = [line for heads in ("contextual", "random") for line in curves(sweep, "tau", heads=heads)]
    return split_softmax_curves(lines, {name: sweep[name].em for name in ("baseline", "gold", "negative")})


COMMAND = Command(
    name="split-softmax",
    help="turn attention to the relevant document up or down",
    description="Accuracy under split-softmax (equations 2 and 3) on the top k heads, for a grid of tau and k, with\n"
    "random heads as a control. A killed run with --out resumes.",
    example="focuslens split-softmax --tau 0.1,0.3,1000 --k 1,4,8 --heads runs/heads/heads.json",
    add_options=_add_options,
    run=run,
    resumes="with --out",
)
