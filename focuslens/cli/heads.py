"""``focuslens heads``: contextual scores, ranking and sparsity of all heads."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from focuslens.cli import cluster, options
from focuslens.cli.command import Command
from focuslens.cli.common import RunSettings, open_executor, open_samples, print_table, run_description
from focuslens.cli.figures import note_figures, save_drawn
from focuslens.cli.output import document
from focuslens.cli.rankings import count_heads, remove_scores, score_intervals, score_samples

if TYPE_CHECKING:
    from focuslens.model.execution import Executor
    from focuslens.scores.contextual_scores import ContextualScores

__all__ = ["COMMAND"]


def _add_options(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_samples(parser)
    options.add_run(parser)
    parser.add_argument(
        "--case",
        choices=("long", "gold", "negative", "correct", "wrong"),
        default="long",
        help="prompts to score: all documents (long, default), the gold one, or the others; or long prompts that are "
        "answered correctly or wrongly",
    )
    parser.add_argument(
        "--top", type=options.positive, help="number of heads to print; default: 20, or all if there are fewer"
    )
    cluster.add_options(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Score all heads, print the scores and, with ``--out``, write ``heads.json`` and ``head_map.png``."""
    settings = RunSettings.of(args)
    note_figures(settings.out)
    with open_executor(args, settings.model) as model:
        top = count_heads("--top", args.top, model.shape.n_layers * model.shape.n_heads)
        return _score(settings, model, args.case, top)


def _score(settings: RunSettings, model: Executor, case: str, top: int) -> dict[str, Any]:
    from focuslens.util.files import write_json

    settings = settings.fitted(model)
    data = open_samples(settings.samples, "train")
    scores = score_samples(settings, model, data, case)
    _print(model.name, scores, case, top)
    result = {
        **run_description(settings, model, data),
        "case": case,
        "samples": list(scores.sample_ids),
        "correct": sum(scores.correct),
        "heads": [list(head) for head in scores.ranking()],
        "intervals": score_intervals(scores, data.samples, scores.ranking(), settings.seed),
        "scores": scores.to_frame().to_dict(orient="records"),
        "sparsity": [{"threshold": s.threshold, "count": s.count, "fraction": s.fraction} for s in scores.sparsity()],
    }
    if settings.out is None:
        return document(result)
    table = settings.out / "heads.json"
    write_json(table, result)
    figures = save_drawn(lambda: _head_map(scores, top), settings.out / "head_map.png")
    remove_scores(settings)
    print(f"\nwrote {' and '.join(str(path) for path in (table, *figures))}")
    return document(result, table, *figures)


def _head_map(scores: ContextualScores, top: int) -> Any:
    from focuslens.viz import head_map

    return head_map(scores.mean().numpy(), heads=scores.top_heads(min(top, 10)))


def _print(name: str, scores: ContextualScores, case: str, top: int) -> None:
    print(f"{name}: {len(scores)} {case} prompts, {sum(scores.correct)} answered correctly")
    print(f"\nTop {top} heads by relevant contextual score")
    print_table(scores.to_frame(), most=top)
    print("\nHeads with a relevant contextual score")
    for row in scores.sparsity():
        print(f"  {row}")


COMMAND = Command(
    name="heads",
    help="find contextual heads",
    description="Score every head by the response's attention to the relevant document, to irrelevant documents and\n"
    "to the attention sink (equation 1 of arXiv 2503.23306). Rank the heads, and count those above thresholds.\n"
    "A killed run with --out resumes.",
    example="focuslens heads --model meta-llama/Llama-3.2-3B-Instruct --dtype bfloat16 --data nq-open-oracle.jsonl.gz",
    add_options=_add_options,
    run=run,
    resumes="with --out",
)
