"""``focuslens fold``: a steered checkpoint that needs no hooks."""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focuslens.cli import options, paths
from focuslens.cli.command import Command
from focuslens.cli.output import document

if TYPE_CHECKING:
    from focuslens.directions.checkpoints.biases import SharedKeys
    from focuslens.interventions import FocusSteering

__all__ = [
    "COMMAND",
    "add_options",
    "checkpoint_document",
    "keys_document",
    "print_left_out",
    "print_shared",
    "run",
    "steering",
]


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options that ``focuslens fold`` and ``focuslens export`` share."""
    parser.add_argument(
        "--model",
        required=True,
        help="directory, hub name or GGUF file of a checkpoint, or a name that focuslens models lists",
    )
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    options.add_directions(parser, required=True)
    parser.add_argument("--alpha", type=float, required=True, help="strength; write --alpha=-0.2 for a negative one")
    parser.add_argument(
        "--top-k",
        type=options.positive,
        help="number of heads to steer, best first; default: 20, or all if there are fewer",
    )
    options.add_file(
        parser,
        "--heads",
        check=paths.ranking,
        help="ranking of heads: heads.json of focuslens heads; default: the directions' order",
    )
    options.add_out_directory(parser, required=True, help="directory of the new checkpoint; new or empty")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the checkpoint, and print which files were left out and which unsteered heads a key vector acts on.

    A key vector acts on all query heads that share its key-value head, including heads that are not steered.
    """
    from focuslens.directions.checkpoints import fold

    applied = steering(args)
    folded = fold(args.model, applied, args.out, revision=args.revision)
    print_shared(folded.shared)
    print_left_out(folded.left_out, folded.training)
    print(f"folded {len(applied.heads)} heads at alpha = {args.alpha:g}; wrote {folded.directory}")
    return checkpoint_document(args.command, folded.directory, folded.left_out, **keys_document(folded.shared))


def steering(args: argparse.Namespace) -> FocusSteering:
    """Steering that the options describe: directions, strength, and heads to steer."""
    from focuslens.cli.rankings import count_heads
    from focuslens.heads import load_ranking
    from focuslens.interventions import FocusSteering
    from focuslens.interventions.directions import open_directions

    directions = open_directions(args.directions)
    ranking = load_ranking(args.heads) if args.heads else list(directions.heads)
    heads = [head for head in ranking if head in set(directions.heads)]
    return FocusSteering(directions, args.alpha, heads[: count_heads("--top-k", args.top_k, len(heads))])


def checkpoint_document(command: str, directory: Path, left_out: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """Content of the checkpoint's ``focuslens.json``, with the facts that the command printed."""
    record = json.loads((directory / "focuslens.json").read_text())
    return document({"command": command, **record, **more, "left_out": list(left_out)}, directory)


def print_shared(shared: Sequence[SharedKeys]) -> None:
    """Print the unsteered query heads on which a key vector acts."""
    for keys in shared:
        print(f"layer {keys.layer}: {keys}")


def keys_document(shared: Sequence[SharedKeys]) -> dict[str, Any]:
    """The facts of :func:`print_shared` for ``--json``."""
    return {
        "shared_keys": [
            {"layer": keys.layer, "key_value_head": keys.key_value_head, "others": keys.others} for keys in shared
        ]
    }


def print_left_out(weights: tuple[str, ...], training: tuple[str, ...]) -> None:
    """Print the files of the base checkpoint that were left out of the new checkpoint."""
    if weights:
        print(f"left out (unsteered copies of the weights): {', '.join(weights)}")
    if training:
        print(f"left out (training states of the base model): {', '.join(training)}")


COMMAND = Command(
    name="fold",
    help="a checkpoint that is steered without any hook",
    description="Write a Hugging Face checkpoint with directions of the projection site as biases of its projections\n"
    "(Llama, Qwen, Gemma, Granite, OLMo and other families). Weights are copied file by file, never loaded.",
    example="focuslens fold --model Qwen/Qwen2.5-7B-Instruct --directions runs/projection --alpha 0.3 --out steered",
    add_options=add_options,
    run=run,
)
