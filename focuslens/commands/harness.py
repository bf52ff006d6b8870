"""``focuslens harness``: samples as a task of lm-evaluation-harness."""

from __future__ import annotations

import argparse
from typing import Any

from focuslens.commands.common import samples_of
from focuslens.commands.output import document
from focuslens.files import versions, write_json
from focuslens.serving.harness import write_harness_task

__all__ = ["run"]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the task, with what made it beside it, and say how it is run."""
    data = samples_of(args, "test")
    path = write_harness_task(data.samples, args.out, args.name, case=args.case, max_new_tokens=args.max_new_tokens)
    result = {
        "command": args.command,
        "task": args.name,
        "case": args.case,
        "data": data.identify(),
        "max_new_tokens": args.max_new_tokens,
        "seed": args.seed,
        "versions": versions(),
    }
    write_json(path.with_suffix(".json"), result)
    print(f"wrote {path}: {len(data.samples)} samples; run it with")
    print(f"lm-eval run --model hf --model_args pretrained=CHECKPOINT --include_path {args.out} --tasks {args.name}")
    files = (path.with_suffix(end) for end in (".jsonl", ".json"))
    return document(result, path, *files, path.with_name(f"{args.name}_score.py"))
