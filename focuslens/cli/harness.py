"""``focuslens harness``: samples as a task for lm-evaluation-harness."""

from __future__ import annotations

import argparse
import json
import shlex
from pathlib import Path
from typing import Any, cast

from focuslens.cli import options
from focuslens.cli.command import Command
from focuslens.cli.common import SampleOptions, open_samples
from focuslens.cli.output import document
from focuslens.cli.stops import add_stops

__all__ = ["COMMAND"]


def _add_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="demo",
        help="directory or hub name of the model in the printed command; default 'demo', the embedded model",
    )
    data = options.add_samples(parser, fixed_documents=True)
    data.add_argument(
        "--case",
        choices=("long", "gold", "negative"),
        default="long",
        help="prompts of the task: all documents (long, default), the gold one, or the others",
    )
    parser.add_argument("--name", default="focuslens_multidoc", help="name of the task (default %(default)s)")
    parser.add_argument(
        "--max-new-tokens", type=options.positive, default=100, help="maximum tokens of a response (default 100)"
    )
    add_stops(parser, "'\\n' and 'Question:' if the model has no chat template; none for 'demo'")
    parser.add_argument("--seed", type=int, default=42, help="seed of the choice of samples (default 42)")
    options.add_out_directory(parser, required=True, help="directory for the task's files")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Write the task and a description of the task, and print the command that runs the task."""
    from focuslens.evaluation.harness import write_harness_task
    from focuslens.util.files import versions, write_json

    data = open_samples(SampleOptions.of(args).requiring("test", "answers"), "test")
    command = _command(args.model, Path(args.out), args.name)
    stops = _default_stops(args.model) if args.stop is None else args.stop
    path = write_harness_task(
        data.samples,
        args.out,
        args.name,
        case=args.case,
        max_new_tokens=args.max_new_tokens,
        stop_strings=stops,
    )
    result = {
        "command": args.command,
        "task": args.name,
        "case": args.case,
        "data": data.identify(),
        "max_new_tokens": args.max_new_tokens,
        "stop_strings": list(stops),
        "seed": args.seed,
        "versions": versions(),
    }
    write_json(path.with_suffix(".json"), result)
    print(f"wrote {path}: {len(data.samples)} samples; run it with")
    print(command)
    files = (path.with_suffix(end) for end in (".jsonl", ".json"))
    return document(result, path, *files, path.with_name(f"{args.name}_score.py"))


def _command(name: str, out: Path, task: str) -> str:
    """Shell command that runs the task on a model. The command works in any directory."""
    from focuslens.model.sources.names import checkpoint_path

    model = checkpoint_path(name)
    # --model_args gets JSON. In the form NAME=VALUE, lm-eval would cut a path at its first comma, and would read a name
    # that consists of digits as a number.
    settings = {"pretrained": model, "dtype": "float32", **({"trust_remote_code": True} if _brings_code(model) else {})}
    words = ["lm-eval", "run", "--model", "hf", "--model_args", json.dumps(settings)]
    words += ["--include_path", str(out.resolve()), "--tasks", task]
    return shlex.join([*words, *(["--apply_chat_template"] if _is_chat(model) else [])])


def _brings_code(model: str) -> bool:
    from transformers import PreTrainedConfig

    return bool(cast("Any", PreTrainedConfig).get_config_dict(model)[0].get("auto_map"))


def _is_chat(model: str) -> bool:
    """Whether the tokenizer has a chat template. FocusLens applies it by default, lm-eval only on request."""
    return bool(_tokenizer(model).chat_template)


def _default_stops(name: str) -> tuple[str, ...]:
    """Stop strings with which FocusLens opens the model, except those of its generation config."""
    from focuslens.model.sources.names import EMBEDDED, checkpoint_path
    from focuslens.model.stop_strings import default_stop_strings

    return () if name == EMBEDDED else default_stop_strings(_tokenizer(checkpoint_path(name)), chat=None)


def _tokenizer(model: str) -> Any:
    from transformers import AutoTokenizer

    return cast("Any", AutoTokenizer).from_pretrained(model, trust_remote_code=False)


COMMAND = Command(
    name="harness",
    help="samples as a task of lm-evaluation-harness",
    description="Write a task of prompts, greedy responses and exact match. lm-eval runs it on any model, on a\n"
    "steered checkpoint or on a server; the samples are those of focuslens steer with the same options.",
    example="focuslens harness --model steered --data nq-open-oracle.jsonl.gz --out runs/task",
    add_options=_add_options,
    run=run,
)
