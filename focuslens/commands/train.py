"""``focuslens train``: focus directions from training samples."""

from __future__ import annotations

import argparse
from pathlib import Path

from focuslens.commands.common import get_ranking, open_model, open_samples, require_figures
from focuslens.training import train_focus_directions

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Train, and write the directions and their loss curves to ``--out``."""
    out = Path(args.out or "runs/train")
    args.out = str(out)
    require_figures(args)
    model = open_model(args)
    ranking, _ = get_ranking(args, model, evaluated=False)
    heads = ranking if args.top_k is None else ranking[: args.top_k]
    data = open_samples(args, model, "train")
    directions = train_focus_directions(
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
        batch_tokens=args.batch_tokens,
        data=data.description,
        progress=True,
    )
    directions.save(out)
    (out / "checkpoint.pt").unlink(missing_ok=True)
    losses = directions.losses
    if losses is not None:
        from focuslens.viz import loss_curves, save_figure

        save_figure(loss_curves(losses.numpy(), [str(head) for head in directions.heads]), out / "losses.png")
        first, last = -losses[0], -losses[-1]
        print("relevant contextual score of each head in the first and last epoch of training")
        for head, before, after in zip(directions.heads[:20], first[:20], last[:20], strict=True):
            print(f"  {head!s:8} {before:.3f} -> {after:.3f}")
    print(f"\nwrote {len(directions)} directions at the {directions.site} site to {out}")
