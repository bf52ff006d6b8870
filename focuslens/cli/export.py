"""``focuslens export``: a steered checkpoint that includes the code that steers it."""

from __future__ import annotations

import argparse
from typing import Any

from focuslens.cli import fold
from focuslens.cli.command import Command

__all__ = ["COMMAND"]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--site",
        choices=("rotary", "projection"),
        default="rotary",
        help="site of the directions (default rotary); with projection, the command does what focuslens fold does, and "
        "writes code only for families whose projections have no biases",
    )
    fold.add_options(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the checkpoint and the code that it needs, and print how to load the checkpoint."""
    from focuslens.directions.checkpoints import export, is_foldable

    applied = fold.steering(args)
    if args.site != applied.directions.site:
        raise ValueError(
            f"the directions act at the {applied.directions.site} site, and --site is {args.site}; give "
            f"--site {applied.directions.site}"
        )
    if args.site == "projection" and is_foldable(args.model, args.revision):
        return fold.run(args)
    exported = export(args.model, applied, args.out, revision=args.revision)
    fold.print_shared(exported.shared)
    fold.print_left_out(exported.left_out, exported.training)
    print(
        f"exported {len(applied.heads)} heads at alpha = {args.alpha:g}; wrote {exported.directory}, "
        "to be loaded with trust_remote_code=True"
    )
    keys = fold.keys_document(exported.shared) if args.site == "projection" else {}
    return fold.checkpoint_document(args.command, exported.directory, exported.left_out, **keys)


COMMAND = Command(
    name="export",
    help="a checkpoint that includes the few lines of code that steer it",
    description="Write a Hugging Face checkpoint with directions of the rotary site, or with those of the projection\n"
    "site if the family's projections have no biases (Mistral with a window, Phi-3). It is loaded with\n"
    "trust_remote_code=True, and steered under every attention implementation.",
    example="focuslens export --site rotary --model PATH --directions runs/directions --alpha 0.3 --out steered",
    add_options=_add_options,
    run=run,
)
