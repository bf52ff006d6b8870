"""``focuslens demo``: a study of the embedded model or of a real one, from contextual heads to a report."""

from __future__ import annotations

import argparse
import itertools
import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focuslens.cli import options, paths
from focuslens.cli.command import Command
from focuslens.cli.common import (
    ModelOptions,
    RunSettings,
    SampleOptions,
    Samples,
    open_samples,
    print_sweep,
    print_table,
    run_description,
)
from focuslens.cli.figures import can_draw, note_figures
from focuslens.cli.output import document
from focuslens.cli.rankings import chance_entries, score_intervals
from focuslens.cli.sweeps import controls, sweep_to
from focuslens.model.batching import BATCH_TOKENS

if TYPE_CHECKING:
    from focuslens.data.selection import DistractorChoice
    from focuslens.evaluation import Setting, Sweep
    from focuslens.heads import Head
    from focuslens.interventions.directions import FocusDirections
    from focuslens.model.focus_model import FocusModel
    from focuslens.scores.contextual_scores import ContextualScores

__all__ = ["COMMAND", "DemoSettings", "run"]

_LOG = logging.getLogger(__name__)

_RANDOM_TAU = 0.3


@dataclass(frozen=True)
class DemoSettings:
    """Data and sizes of the demo. By default, the demo takes about a minute, with enough samples for intervals.

    Without training samples (``trained`` is 0), the demo ends after split-softmax.
    """

    file: str = "synthetic"
    documents: int = 20
    distractors: DistractorChoice = "random"
    # First and fifth of 20 documents. The embedded model is distracted most when the relevant document comes early.
    gold_positions: tuple[int, ...] | None = (0, 4)
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
    # The paper's learning rate of 1e-3 is for thousands of steps. The demo trains for only a few hundred steps.
    learning_rate: float = 0.005
    max_new_tokens: int = 24


REAL = DemoSettings(
    file="passages",
    documents=10,
    distractors="bm25",
    gold_positions=None,
    scored=24,
    trained=0,
    tested=40,
    taus=(0.3, 1000),
    ks=(5, 20, 40),
    max_new_tokens=40,
)
"""Data and sizes for a real model: about eight minutes for 135 million weights on two cores."""


def _add_options(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    group = parser.add_argument_group("run")
    options.add_file(
        group,
        "--data",
        check=paths.data_file,
        help="with --model: an oracle file such as nq-open-oracle.jsonl.gz; default: the package's own passages",
    )
    options.add_seed(group)
    options.add_out_directory(
        group, type=options.path, help="directory for results (default runs/demo, or runs/demo-MODEL)"
    )


def run(args: argparse.Namespace, sizes: DemoSettings | None = None) -> dict[str, Any]:
    """Run the demo, write ``results.json`` and ``report.html`` to ``--out``, and return the results."""
    sizes = _sizes(args) if sizes is None else sizes
    settings = run_settings(args, sizes)
    note_figures(settings.out)
    model = settings.model.open()
    print(f"{_prompts(sizes)}\n")
    return _Demo(settings, sizes, _out(args), model).run()


def _sizes(args: argparse.Namespace) -> DemoSettings:
    if args.model == "demo":
        if args.data is not None:
            raise ValueError("--data needs --model: the embedded model knows the synthetic corpus only")
        return DemoSettings()
    return REAL if args.data is None else replace(REAL, file=args.data)


def _prompts(sizes: DemoSettings) -> str:
    """A sentence on the prompts of the demo."""
    if sizes.gold_positions is None:
        how = "the passages most like the question" if sizes.distractors == "bm25" else "passages"
        return f"{sizes.documents} documents per question: the relevant one, and {how} of other questions"
    where = " or ".join(str(position + 1) for position in sizes.gold_positions)
    return (
        f"{sizes.documents} documents per question, the relevant one at position {where}: there the model is "
        "distracted most"
    )


def _out(args: argparse.Namespace) -> Path:
    name = "demo" if args.model == "demo" else f"demo-{Path(args.model).stem}"
    return Path(args.out or paths.default_out(Path("runs") / name))


def run_settings(args: argparse.Namespace, sizes: DemoSettings) -> RunSettings:
    """Settings of the demo in the format that all commands share."""
    model = ModelOptions.of(args)
    return RunSettings(
        command=args.command,
        model=model,
        samples=SampleOptions(
            sizes.file,
            sizes.gold_positions,
            documents=sizes.documents,
            seed=args.seed,
            distractors=sizes.distractors,
        ),
        seed=args.seed,
        out=_out(args),
        max_new_tokens=sizes.max_new_tokens,
        batch_tokens=BATCH_TOKENS,
    )


@dataclass(frozen=True)
class _Demo:
    """Steps of the demo. All steps share a model, settings and an output directory."""

    settings: RunSettings
    sizes: DemoSettings
    out: Path
    model: FocusModel

    def run(self) -> dict[str, Any]:
        steps = 4 if self.sizes.trained else 2
        print(f"1/{steps}  contextual heads")
        scored = open_samples(self.settings.samples, "train", self.sizes.scored)
        cases = self.score(scored)
        ranking = cases["long"].ranking()
        print(f"\n2/{steps}  split-softmax on the relevant document, on held-out questions")
        test = open_samples(self.settings.samples, "test", self.sizes.tested)
        split = self.split_softmax(ranking, test)
        results = {
            **run_description(self.settings, self.model, test),
            "demo": asdict(self.sizes),
            **self.scores_entries(cases, scored),
            "split_softmax": split.rows(),
        }
        if self.sizes.trained:
            return self.write({**results, **self.directions(ranking, test)}, ("steering_validation", "steering"))
        _print_repaired(split, test)
        return self.write(results)

    def directions(self, ranking: Sequence[Head], test: Samples) -> dict[str, Any]:
        """Train directions, steer with them, and return the entries of the result file."""
        print("\n3/4  training focus directions")
        directions = self.train(ranking[: self.sizes.trained_heads])
        print("\n4/4  steering: alpha and k chosen on validation questions, then measured on held-out ones")
        validation, steering, best = self.steer(self.steering_grid(directions, ranking), test)
        print_sweep(steering)
        print(
            f"\nbest on validation: {best}; on held-out questions {steering[best].em}, "
            f"baseline {steering['baseline'].em}"
        )
        return {
            "steering": steering.rows(),
            "steering_validation": validation.rows(),
            "chosen_on_validation": best,
        }

    def score(self, data: Samples) -> dict[str, ContextualScores]:
        """Score every head in each case (long, gold, correct, wrong), and print the best heads of the case ``long``."""
        from focuslens.scores.contextual_scores import contextual_scores_by_case

        cases = contextual_scores_by_case(self.model, data.samples, max_new_tokens=self.sizes.max_new_tokens)
        sizes = ", ".join(f"{len(scores)} {name}" for name, scores in cases.items())
        print(f"prompts: {sizes}")
        print_table(cases["long"].to_frame(), most=8)
        for row in cases["long"].sparsity():
            print(f"  {row}")
        return cases

    def scores_entries(self, cases: Mapping[str, ContextualScores], data: Samples) -> dict[str, Any]:
        """Entries of the result file about heads: ranking, scores, intervals, and the number of prompts per case."""
        ranking = cases["long"].ranking()
        return {
            "heads": [list(head) for head in ranking],
            "scores": {
                name: scores.to_frame().to_dict(orient="records") for name, scores in cases.items() if len(scores)
            },
            "case_sizes": {name: len(scores) for name, scores in cases.items()},
            "intervals": score_intervals(cases["long"], data.samples, ranking, self.settings.seed),
            **chance_entries(cases["long"], data.samples, ranking, self.settings.seed),
        }

    def split_softmax(self, ranking: Sequence[Head], test: Samples) -> Sweep:
        """Run and print a sweep of split-softmax: over tau and k on contextual heads, and over k on random heads."""
        from focuslens.evaluation import BASELINES, split_softmax_settings

        ks = self.sizes.ks
        contextual = split_softmax_settings(ranking, self.sizes.taus, ks)
        random = controls(self.model, ranking, ks, tau=_RANDOM_TAU, exclude=max(ks), seed=self.settings.seed)
        sweep = self.sweep(test, [*BASELINES, *contextual, *random], "split_softmax")
        print_sweep(sweep)
        return sweep

    def train(self, heads: Sequence[Head]) -> FocusDirections:
        """Train focus directions for the best heads, and save the directions."""
        from focuslens.directions.training import train_focus_directions

        data = open_samples(self.settings.samples, "train", self.sizes.trained)
        directions = train_focus_directions(
            self.model,
            data.samples,
            heads,
            epochs=self.sizes.epochs,
            learning_rate=self.sizes.learning_rate,
            max_new_tokens=self.sizes.max_new_tokens,
            seed=self.settings.seed,
            data=data.description,
        )
        directions.save(self.out / "directions")
        return directions

    def steering_grid(self, directions: FocusDirections, ranking: Sequence[Head]) -> list[Setting]:
        from focuslens.evaluation import steering_settings

        return steering_settings(directions, ranking, self.sizes.alphas, self.sizes.steered)

    def steer(self, grid: Sequence[Setting], test: Samples) -> tuple[Sweep, Sweep, str]:
        """Run the grid on validation and test questions, and select the setting with the best validation accuracy."""
        from focuslens.evaluation import Setting, best_setting

        validation = open_samples(self.settings.samples, "validation", self.sizes.chosen)
        steered = [Setting("baseline"), *grid]
        chosen_on = self.sweep(validation, steered, "steering_validation")
        return chosen_on, self.sweep(test, steered, "steering"), best_setting(chosen_on, grid).name

    def sweep(self, data: Samples, grid: Sequence[Setting], name: str) -> Sweep:
        """Run a sweep, or resume it from its records.

        If the records belong to a run with a different seed, model or version, the file of records is renamed and the
        sweep starts from the beginning.
        """
        from focuslens.evaluation import OtherResultsError
        from focuslens.util.record_file import unfinished_path

        records = self.out / f"{name}.jsonl"
        try:
            return sweep_to(self.settings, self.model, data, grid, records)
        except OtherResultsError:
            paths = (records.with_name(f"{records.stem}.{i}.jsonl") for i in itertools.count(1))
            aside = next(path for path in paths if not path.exists())
            unfinished_path(records).unlink(missing_ok=True)  # less than a minute of work
            if records.exists():
                records.rename(aside)
            _LOG.warning("%s belongs to a different run; it is renamed to %s", records.name, aside.name)
            return sweep_to(self.settings, self.model, data, grid, records)

    def write(self, results: dict[str, Any], sweeps: Sequence[str] = ()) -> dict[str, Any]:
        """Write the results and the report, and return the content of the result file."""
        from focuslens.util.files import write_json

        write_json(self.out / "results.json", results)
        pages = self.write_report() if can_draw() else []
        directions = [self.out / "directions"] if sweeps else []
        print(
            f"\nwrote results.json, {'directions, ' if sweeps else ''}records"
            f"{f' and {pages[0]}' if pages else f' to {self.out}'}"
        )
        records = (self.out / f"{name}.jsonl" for name in ("split_softmax", *sweeps))
        return document(results, self.out / "results.json", *directions, *records, *pages)

    def write_report(self) -> list[Path]:
        """Write the report, and return its path."""
        from focuslens.viz.run_report import Sources, write_run_report

        name = "the embedded model" if self.settings.model.name == "demo" else self.model.name
        title = f"FocusLens: where {name} looks, and what changes it"
        return [write_run_report(self.out, sources=Sources(model=self.model), title=title)[0]]


def _print_repaired(split: Sweep, test: Samples) -> None:
    """Print a question whose answer becomes right under the most accurate setting."""
    raised = [setting.name for setting in split.settings if setting.parameters.get("tau", 1) < 1]
    best = max(raised, key=lambda name: split[name].em.mean)
    before, after = split["baseline"], split[best]
    by_id = {sample.id: sample for sample in test.samples}
    for place, (was, now) in enumerate(zip(before.correct, after.correct, strict=True)):
        if now and not was:
            sample = by_id[before.sample_ids[place]]
            print(f"\none of the answers that {best} repairs:\n  {sample.question}")
            print(f"  before: {before.responses[place]}\n  after:  {after.responses[place]}")
            return


COMMAND = Command(
    name="demo",
    help="everything, on the embedded model and corpus, or on a real model",
    description="Contextual heads, a split-softmax sweep, focus directions, steered answers, figures and a report,\n"
    "on the embedded model and its synthetic corpus. With --model, heads, split-softmax and a report of a real\n"
    "model on real passages, in about 8 minutes for smollm2-135m-instruct on two cores.",
    example="focuslens demo --model smollm2-135m-instruct",
    add_options=_add_options,
    run=run,
    resumes="always",
)
