"""``focuslens train``: training of focus directions on samples."""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focuslens.cli import cluster, options, paths
from focuslens.cli.command import Command
from focuslens.cli.common import RunSettings, Samples, open_executor, open_samples
from focuslens.cli.figures import note_figures, save_drawn
from focuslens.cli.output import document
from focuslens.cli.rankings import count_heads, get_ranking, remove_scores

if TYPE_CHECKING:
    from focuslens.heads import Head
    from focuslens.interventions.directions import FocusDirections
    from focuslens.model.execution import Executor

__all__ = ["COMMAND"]

_OUT = Path("runs/train")
_PRINTED = 20


def _add_options(parser: argparse.ArgumentParser) -> None:
    options.add_model(parser)
    options.add_samples(parser)
    options.add_run(parser)
    parser.add_argument(
        "--site",
        choices=("rotary", "projection"),
        default="rotary",
        help="site of the directions (default rotary, as in the paper)",
    )
    parser.add_argument(
        "--prompts",
        choices=("long", "gold"),
        default="long",
        help="prompts to train on (default long, as in the authors' code)",
    )
    parser.add_argument(
        "--top-k", type=options.positive, help="train the best k heads; default: all (of --heads, if it is given)"
    )
    parser.add_argument(
        "--rank",
        type=options.count,
        default=0,
        help="rank of the part of d_Q that depends on the question; default 0: one vector for every question",
    )
    parser.add_argument(
        "--objective",
        choices=("score", "answer"),
        default="score",
        help="loss: the paper's contextual score of each head (default), or the log-likelihood of the response",
    )
    parser.add_argument("--epochs", type=options.positive, default=10, help="passes over the samples (default 10)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="learning rate of AdamW (default 0.001)")
    parser.add_argument(
        "--memory-gb", type=float, default=4.0, help="activations kept between epochs, in gigabytes (default 4)"
    )
    cluster.add_options(parser)
    options.add_ranking(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train focus directions, and write the directions and their loss curves to ``--out``."""
    from focuslens.directions.gold_responses import responses_path

    given = RunSettings.of(args)
    out = given.out or paths.default_out(_OUT)
    given, checkpoint = replace(given, out=out), out / "checkpoint.pt"
    note_figures(out)
    with open_executor(args, given.model) as model:
        settings = given.fitted(model, and_train=not args.heads)
        data = open_samples(settings.samples, "train")
        heads, source = _chosen_heads(args, settings, model)
        directions = _train(args, settings, model, data, heads, checkpoint)
    provenance = {**directions.provenance, "ranking": source}
    replace(directions, provenance=provenance).save(out)
    for unfinished in (checkpoint, responses_path(checkpoint)):
        unfinished.unlink(missing_ok=True)
    remove_scores(given)
    figures = _show_losses(directions, out)
    print(f"\nwrote {len(directions)} directions at the {directions.site} site to {out}")
    record = json.loads((out / "directions.json").read_text())
    files = (out / f"directions.{end}" for end in ("safetensors", "json"))
    return document({"command": args.command, **record}, *files, *figures)


def _chosen_heads(
    args: argparse.Namespace, settings: RunSettings, model: Executor
) -> tuple[list[Head], dict[str, Any]]:
    """Heads to train, and their ranking's source. With neither ``--heads`` nor ``--top-k``, all heads are trained."""
    from focuslens.heads import Head

    everything = [Head(layer, head) for layer in range(model.shape.n_layers) for head in range(model.shape.n_heads)]
    if args.top_k is None and not args.heads:
        return everything, {"all_heads": len(everything)}
    count_heads("--top-k", args.top_k, len(everything))  # rejects an invalid number before the heads are scored
    ranking, source = get_ranking(args.heads, settings, model, evaluated=False)
    return ranking[: count_heads("--top-k", args.top_k, len(ranking), default=len(ranking))], source


def _train(
    args: argparse.Namespace,
    settings: RunSettings,
    model: Executor,
    data: Samples,
    heads: list[Head],
    checkpoint: Path,
) -> FocusDirections:
    from focuslens.directions.training import train_focus_directions

    return train_focus_directions(
        model,
        data.samples,
        heads,
        site=args.site,
        prompts=args.prompts,
        rank=args.rank,
        objective=args.objective,
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        max_new_tokens=settings.max_new_tokens,
        seed=settings.seed,
        checkpoint=checkpoint,
        memory_gb=args.memory_gb,
        batch_tokens=settings.batch_tokens,
        data=data.description,
    )


def _show_losses(directions: FocusDirections, out: Path) -> list[Path]:
    """Draw the loss curves, print scores of the heads that are best in the last epoch, and return the figure."""
    losses = directions.losses
    if losses is None:
        by_epoch = directions.provenance["answer_losses"]
        print(
            f"loss per response token in the first and last epoch of training: {by_epoch[0]:.3f} -> {by_epoch[-1]:.3f}"
        )
        return []
    figures = save_drawn(lambda: _loss_curves(directions), out / "losses.png")
    best = losses[-1].argsort(stable=True)[:_PRINTED].tolist()
    print(f"relevant contextual score in the first and last epoch of training: the {len(best)} heads best in the last")
    for i in best:
        print(f"  {directions.heads[i]!s:8} {-losses[0, i]:.3f} -> {-losses[-1, i]:.3f}")
    return figures


def _loss_curves(directions: FocusDirections) -> Any:
    from focuslens.viz import loss_curves

    losses = directions.losses
    return None if losses is None else loss_curves(losses.numpy(), [str(head) for head in directions.heads])


COMMAND = Command(
    name="train",
    help="train focus directions",
    description="Train one direction per head (equation 4). The response in training is the model's response to the\n"
    "prompt with the gold document alone. Directions go to --out (default runs/train). A killed run resumes.",
    example="focuslens train --site rotary --top-k 20 --samples 200 --out runs/directions",
    add_options=_add_options,
    run=run,
    resumes="always",
)
