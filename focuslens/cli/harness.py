"""``focuslens harness``: samples as a task of lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any, cast

from focuslens.cli.common import samples_of
from focuslens.cli.output import document
from focuslens.evaluation.harness import write_harness_task
from focuslens.util.files import versions, write_json

__all__ = ["run"]


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the task, with what made it beside it, and say how it is run."""
    command = _command(args)
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
    print(command)
    files = (path.with_suffix(end) for end in (".jsonl", ".json"))
    return document(result, path, *files, path.with_name(f"{args.name}_score.py"))


def _command(args: argparse.Namespace) -> str:
    """What runs the task on ``--model``, for a shell, from whichever directory."""
    from focuslens.model.loading import checkpoint_path

    model = checkpoint_path(args.model)
    # As JSON: what else lm-eval reads takes a comma in a path for the end of it, and a name of digits for a number.
    settings = {"pretrained": model, "dtype": "float32", **({"trust_remote_code": True} if _brings_code(model) else {})}
    words = ["lm-eval", "run", "--model", "hf", "--model_args", json.dumps(settings)]
    words += ["--include_path", str(Path(args.out).resolve()), "--tasks", args.name]
    return shlex.join([*words, *(["--apply_chat_template"] if _is_chat(model) else [])])


def _brings_code(model: str) -> bool:
    from transformers import PreTrainedConfig

    return bool(cast("Any", PreTrainedConfig).get_config_dict(model)[0].get("auto_map"))


def _is_chat(model: str) -> bool:
    """Whether FocusLens would put prompts into a chat template, as it does where there is one."""
    from transformers import AutoTokenizer

    tokenizer = cast("Any", AutoTokenizer).from_pretrained(model, trust_remote_code=False)
    return bool(tokenizer.chat_template)
