"""``focuslens train``: focus directions from training samples."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

from focuslens.cli.common import count_heads, get_ranking, open_executor, open_samples, require_figures
from focuslens.cli.output import document
from focuslens.directions.training import train_focus_directions
from focuslens.heads import Head
from focuslens.interventions.directions import FocusDirections
from focuslens.model.execution import Executor

__all__ = ["run"]

_PRINTED = 20


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Train, and write the directions and their loss curves to ``--out``."""
    out = Path(args.out or "runs/train")
    args.out = str(out)
    require_figures(args)
    with open_executor(args) as model:
        return _run(args, model, out)


def _run(args: argparse.Namespace, model: Executor, out: Path) -> dict[str, Any]:
    data = open_samples(args, model, "train")  # before the ranking, which then has as many documents a prompt
    heads, source = _chosen_heads(args, model)
    trained = train_focus_directions(
        model,
        data.samples,
        heads,
        site=args.site,
        prompts=args.prompts,
        epochs=args.epochs,
        learning_rate=args.learning_rate,
        max_new_tokens=args.max_new_tokens,
        seed=args.seed,
        checkpoint=out / "checkpoint.pt",
        memory_gb=args.memory_gb,
        batch_tokens=args.batch_tokens,
        data=data.description,
    )
    provenance = {**trained.provenance, "ranking": source}
    directions = FocusDirections(trained.heads, trained.query, trained.key, trained.site, provenance)
    directions.save(out)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    figures = _show_losses(directions, out)
    print(f"\nwrote {len(directions)} directions at the {directions.site} site to {out}")
    record = json.loads((out / "directions.json").read_text())
    files = (out / f"directions.{end}" for end in ("safetensors", "json"))
    return document({"command": args.command, **record}, *files, *figures)


def _chosen_heads(args: argparse.Namespace, model: Executor) -> tuple[list[Head], dict[str, Any]]:
    """The heads to train, and what chose them; without a ranking and a number all heads, for which none is scored."""
    everything = [Head(layer, head) for layer in range(model.shape.n_layers) for head in range(model.shape.n_heads)]
    if args.top_k is None and not args.heads:
        return everything, {"all_heads": len(everything)}
    count_heads("--top-k", args.top_k, len(everything))  # before any is scored
    ranking, source = get_ranking(args, model, evaluated=False)
    return ranking[: count_heads("--top-k", args.top_k, len(ranking), default=len(ranking))], source


def _show_losses(directions: FocusDirections, out: Path) -> list[Path]:
    """Draw every head's loss, and print the scores of the heads that ended best; gives the figure."""
    losses = directions.losses
    if losses is None:
        return []
    from focuslens.viz import loss_curves, save_figure

    save_figure(loss_curves(losses.numpy(), [str(head) for head in directions.heads]), out / "losses.png")
    best = losses[-1].argsort(stable=True)[:_PRINTED].tolist()
    print(f"relevant contextual score in the first and last epoch of training: the {len(best)} heads best in the last")
    for i in best:
        print(f"  {directions.heads[i]!s:8} {-losses[0, i]:.3f} -> {-losses[-1, i]:.3f}")
    return [out / "losses.png"]
