"""``focuslens fold``: a checkpoint that is steered without any hook."""

from __future__ import annotations

import argparse

__all__ = ["add_options", "run"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options of the command."""
    parser.add_argument("--model", required=True, help="directory or hub name of a checkpoint in safetensors")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--directions", required=True, help="directory of focuslens train --site projection, or the hub"
    )
    parser.add_argument("--alpha", type=float, required=True, help="strength; write --alpha=-0.2 for one below 0")
    parser.add_argument(
        "--top-k", type=int, help="heads to steer, best first; default: 20, or all where there are fewer"
    )
    parser.add_argument(
        "--heads", help="ranking to use: heads.json of focuslens heads; default: that of the directions"
    )
    parser.add_argument("--out", required=True, help="directory of the new checkpoint; new or empty")


def run(args: argparse.Namespace) -> None:
    """Write the checkpoint, and say what else its key vectors act on and what was left behind."""
    from focuslens.commands.common import count_heads, open_directions
    from focuslens.heads import load_ranking
    from focuslens.interventions import FocusSteering
    from focuslens.serving import fold

    directions = open_directions(args.directions)
    ranked = load_ranking(args.heads) if args.heads else list(directions.heads)
    heads = [head for head in ranked if head in set(directions.heads)]
    k = count_heads("--top-k", args.top_k, len(heads))
    done = fold(args.model, FocusSteering(directions, args.alpha, heads[:k]), args.out, revision=args.revision)
    for one in done.shared:
        print(f"layer {one.layer}: {one}")
    if done.left_out:
        print(f"left behind, being other copies of the weights: {', '.join(done.left_out)}")
    print(f"folded {k} heads at alpha = {args.alpha:g}; wrote {done.directory}")
