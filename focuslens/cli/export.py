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
        help="site of the directions (default rotary); with projection, the command does what focuslens fold does",
    )
    fold.add_options(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the checkpoint and the code that it needs, and print how to load the checkpoint."""
    if args.site == "projection":
        return fold.run(args)
    from focuslens.directions.checkpoints import export

    applied = fold.steering(args)
    exported = export(args.model, applied, args.out, revision=args.revision)
    fold.print_left_out(exported.left_out, exported.training)
    print(
        f"exported {len(applied.heads)} heads at alpha = {args.alpha:g}; wrote {exported.directory}, "
        "to be loaded with trust_remote_code=True"
    )
    return fold.checkpoint_document(args.command, exported.directory, exported.left_out)


COMMAND = Command(
    name="export",
    help="a checkpoint that includes the few lines of code that steer it",
    description="Write a Hugging Face checkpoint with directions of the rotary site (Llama, Mistral, Qwen2, Qwen3).\n"
    "It is loaded with trust_remote_code=True, and steered under every attention implementation.",
    example="focuslens export --site rotary --model PATH --directions runs/directions --alpha 0.3 --out steered",
    add_options=_add_options,
    run=run,
)
