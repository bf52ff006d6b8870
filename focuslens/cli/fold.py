"""``focuslens fold`` and ``focuslens export``: checkpoints that are steered without any hook."""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focuslens.cli.output import document

if TYPE_CHECKING:
    from focuslens.interventions import FocusSteering

__all__ = ["add_export_options", "add_options", "run", "run_export"]


def add_options(parser: argparse.ArgumentParser) -> None:
    """The options that both commands have."""
    parser.add_argument("--model", required=True, help="directory or hub name of a checkpoint in safetensors")
    parser.add_argument("--revision", help="branch, tag or commit on the hub")
    parser.add_argument(
        "--directions", required=True, help="directory of focuslens train, the authors' files, or the hub"
    )
    parser.add_argument("--alpha", type=float, required=True, help="strength; write --alpha=-0.2 for one below 0")
    parser.add_argument(
        "--top-k", type=int, help="heads to steer, best first; default: 20, or all where there are fewer"
    )
    parser.add_argument(
        "--heads", help="ranking to use: heads.json of focuslens heads; default: that of the directions"
    )
    parser.add_argument("--out", required=True, help="directory of the new checkpoint; new or empty")


def add_export_options(parser: argparse.ArgumentParser) -> None:
    """The options of ``focuslens export``."""
    parser.add_argument(
        "--site",
        choices=("rotary", "projection"),
        default="rotary",
        help="where the directions act (default rotary); projection is focuslens fold",
    )
    add_options(parser)


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the checkpoint, and say what else its key vectors act on and what was left behind."""
    from focuslens.directions.checkpoints import fold

    steering = _steering(args)
    done = fold(args.model, steering, args.out, revision=args.revision)
    for one in done.shared:
        print(f"layer {one.layer}: {one}")
    _say_left_out(done.left_out, done.training)
    print(f"folded {len(steering.heads)} heads at alpha = {args.alpha:g}; wrote {done.directory}")
    shared = [{"layer": one.layer, "key_value_head": one.key_value_head, "others": one.others} for one in done.shared]
    return _document(args, done.directory, done.left_out, shared_keys=shared)


def run_export(args: argparse.Namespace) -> dict[str, Any]:
    """Write the checkpoint with the code that it needs, and say how it is loaded."""
    if args.site == "projection":
        return run(args)
    from focuslens.directions.checkpoints import export

    steering = _steering(args)
    done = export(args.model, steering, args.out, revision=args.revision)
    _say_left_out(done.left_out, done.training)
    print(
        f"exported {len(steering.heads)} heads at alpha = {args.alpha:g}; wrote {done.directory}, "
        "to be loaded with trust_remote_code=True"
    )
    return _document(args, done.directory, done.left_out)


def _document(args: argparse.Namespace, directory: Path, left_out: tuple[str, ...], **more: Any) -> dict[str, Any]:
    """What the checkpoint's own record says, and what was said of it here."""
    record = json.loads((directory / "focuslens.json").read_text())
    return document({"command": args.command, **record, **more, "left_out": list(left_out)}, directory)


def _steering(args: argparse.Namespace) -> FocusSteering:
    from focuslens.cli.common import count_heads
    from focuslens.heads import load_ranking
    from focuslens.interventions import FocusSteering
    from focuslens.interventions.directions import open_directions

    directions = open_directions(args.directions)
    ranked = load_ranking(args.heads) if args.heads else list(directions.heads)
    heads = [head for head in ranked if head in set(directions.heads)]
    return FocusSteering(directions, args.alpha, heads[: count_heads("--top-k", args.top_k, len(heads))])


def _say_left_out(weights: tuple[str, ...], training: tuple[str, ...]) -> None:
    if weights:
        print(f"left behind, being other copies of the weights, which would not be steered: {', '.join(weights)}")
    if training:
        print(f"left behind, being what a training of the base goes on from: {', '.join(training)}")
