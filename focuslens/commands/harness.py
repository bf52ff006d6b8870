"""``focuslens harness``: samples as a task of lm-evaluation-harness."""

from __future__ import annotations

import argparse

from focuslens.commands.common import samples_of
from focuslens.files import write_json
from focuslens.serving.harness import write_harness_task

__all__ = ["run"]


def run(args: argparse.Namespace) -> None:
    """Write the task, with what made it beside it, and say how it is run."""
    data = samples_of(args, "test")
    path = write_harness_task(data.samples, args.out, args.name, case=args.case, max_new_tokens=args.max_new_tokens)
    write_json(path.with_suffix(".json"), {"case": args.case, "data": data.identify(), "seed": args.seed})
    print(f"wrote {path}: {len(data.samples)} samples; run it with")
    print(f"lm-eval run --model hf --model_args pretrained=CHECKPOINT --include_path {args.out} --tasks {args.name}")
