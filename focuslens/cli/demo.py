"""``focuslens demo``: the whole story on the embedded model, from documents to a report."""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from focuslens.cli.common import (
    Samples,
    open_model,
    print_table,
    run_description,
    score_intervals,
    sweep_table,
    synthetic_samples,
)
from focuslens.cli.output import document
from focuslens.cli.sweeps import controls, sweep_to
from focuslens.directions.training import train_focus_directions
from focuslens.evaluation import (
    BASELINES,
    OtherResultsError,
    Setting,
    Sweep,
    best_setting,
    split_softmax_settings,
    steering_settings,
)
from focuslens.heads import Head
from focuslens.interventions.directions import FocusDirections
from focuslens.model.batching import BATCH_TOKENS
from focuslens.model.focus_model import FocusModel
from focuslens.scores.contextual import ContextualScores, contextual_scores_by_case
from focuslens.util.files import write_json
from focuslens.viz.run_report import Sources, write_run_report

__all__ = ["DemoSettings", "run"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class DemoSettings:
    """What the demo runs: about a minute, and enough samples for the intervals to mean something."""

    # First and fifth of 20: the embedded model is distracted most where the relevant document stands early.
    gold_positions: tuple[int, ...] = (0, 4)
    scored: int = 40
    trained: int = 30
    chosen: int = 40
    tested: int = 40
    taus: tuple[float, ...] = (0.1, 0.3, 1.5, 1000)
    ks: tuple[int, ...] = (1, 2, 4, 8)
    alphas: tuple[float, ...] = (-1.0, 0.5, 1.0, 2.0, 8.0)
    steered: tuple[int, ...] = (4, 8)
    trained_heads: int = 8
    epochs: int = 10
    # The paper's 1e-3 is for thousands of steps; the demo takes a few hundred.
    learning_rate: float = 0.005
    max_new_tokens: int = 24


def run(args: argparse.Namespace, settings: DemoSettings | None = None) -> dict[str, Any]:
    """Run everything, write ``results.json`` and ``report.html`` to ``--out`` (``runs/demo``), and give the results."""
    settings, out = settings or DemoSettings(), Path(args.out or "runs/demo")
    args.max_new_tokens, args.batch_tokens = settings.max_new_tokens, BATCH_TOKENS
    args.random_tau, args.exclude_top = 0.3, max(settings.ks)
    args.gold_positions = settings.gold_positions
    model = open_model(args)
    where = " or ".join(str(position + 1) for position in settings.gold_positions)
    print(f"20 documents a question, the relevant one at position {where}: there the model is distracted most\n")
    print("1/4  contextual heads")
    scored = synthetic_samples(args, "train", settings.scored)
    cases = _score(model, scored, settings)
    ranking = cases["long"].ranking()
    _print_heads(cases)
    print("\n2/4  split-softmax on the relevant document, on held-out questions")
    test = synthetic_samples(args, "test", settings.tested)
    split_settings = _split_settings(args, model, ranking, settings)
    split = _fresh_sweep(args, model, test, split_settings, out / "split_softmax.jsonl")
    print_table(sweep_table(split))
    print("\n3/4  training focus directions")
    directions = _train(args, model, ranking[: settings.trained_heads], settings, out)
    print("\n4/4  steering: alpha and k chosen on validation questions, then measured on held-out ones")
    grid = steering_settings(directions, ranking, settings.alphas, settings.steered)
    chosen_on, steer, best = _steer(args, model, grid, test, settings, out)
    print_table(sweep_table(steer))
    print(f"\nbest on validation: {best}; on held-out questions {steer[best].em}, baseline {steer['baseline'].em}")
    results = {
        **run_description(args, model, test),
        "demo": asdict(settings),
        "heads": [list(head) for head in ranking],
        "scores": {name: scores.to_frame().to_dict(orient="records") for name, scores in cases.items() if len(scores)},
        "case_sizes": {name: len(scores) for name, scores in cases.items()},
        "intervals": score_intervals(cases["long"], scored.samples, ranking, args.seed),
        "split_softmax": split.rows(),
        "steering": steer.rows(),
        "steering_validation": chosen_on.rows(),
        "chosen_on_validation": best,
    }
    write_json(out / "results.json", results)
    page, _ = write_run_report(out, sources=Sources(model=model), title=_TITLE)
    print(f"\nwrote results.json, directions, records and {page}")
    records = (out / f"{name}.jsonl" for name in ("split_softmax", "steering_validation", "steering"))
    return document(results, out / "results.json", out / "directions", *records, page)


_TITLE = "FocusLens: where the embedded model looks, and what changes it"


def _fresh_sweep(
    args: argparse.Namespace, model: FocusModel, data: Samples, settings: Sequence[Setting], records: Path
) -> Sweep:
    """A sweep that goes on from its own records; those of another run (other seed, model, versions) are set aside."""
    try:
        return sweep_to(args, model, data, settings, records)
    except OtherResultsError:
        free = (records.with_name(f"{records.stem}.{i}.jsonl") for i in itertools.count(1))
        aside = next(path for path in free if not path.exists())
        records.rename(aside)
        _LOG.warning("%s was made otherwise; it is now %s", records.name, aside.name)
        return sweep_to(args, model, data, settings, records)


def _score(model: FocusModel, data: Samples, settings: DemoSettings) -> dict[str, ContextualScores]:
    return contextual_scores_by_case(
        model,
        data.samples,
        max_new_tokens=settings.max_new_tokens,
    )


def _print_heads(cases: dict[str, ContextualScores]) -> None:
    sizes = ", ".join(f"{len(scores)} {name}" for name, scores in cases.items())
    print(f"prompts: {sizes}")
    print_table(cases["long"].to_frame(), most=8)
    for row in cases["long"].sparsity():
        print(f"  {row}")


def _split_settings(
    args: argparse.Namespace, model: FocusModel, ranking: Sequence[Head], settings: DemoSettings
) -> list[Setting]:
    contextual = split_softmax_settings(ranking, settings.taus, settings.ks)
    return [*BASELINES, *contextual, *controls(model, ranking, args, settings.ks)]


def _train(
    args: argparse.Namespace, model: FocusModel, heads: Sequence[Head], settings: DemoSettings, out: Path
) -> FocusDirections:
    data = synthetic_samples(args, "train", settings.trained)
    directions = train_focus_directions(
        model,
        data.samples,
        heads,
        epochs=settings.epochs,
        learning_rate=settings.learning_rate,
        max_new_tokens=settings.max_new_tokens,
        seed=args.seed,
        data=data.description,
    )
    directions.save(out / "directions")
    return directions


def _steer(
    args: argparse.Namespace,
    model: FocusModel,
    grid: Sequence[Setting],
    test: Samples,
    settings: DemoSettings,
    out: Path,
) -> tuple[Sweep, Sweep, str]:
    """The grid on validation questions and on held-out ones, and the setting that does best on validation."""
    validation = synthetic_samples(args, "validation", settings.chosen)
    steered = [Setting("baseline"), *grid]
    chosen_on = _fresh_sweep(args, model, validation, steered, out / "steering_validation.jsonl")
    steer = _fresh_sweep(args, model, test, steered, out / "steering.jsonl")
    return chosen_on, steer, best_setting(chosen_on, grid).name
