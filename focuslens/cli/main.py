"""The ``focuslens`` command."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import Any

import shtab

from focuslens.cli import cluster, fold, helmet, output, paper, report
from focuslens.cli.options import Parser, add_device_map, integers, numbers, pair
from focuslens.model.batching import BATCH_TOKENS, is_out_of_memory

__all__ = ["main"]

_LOG = logging.getLogger("focuslens.cli.main")

_EXAMPLES = {
    "demo": "focuslens demo --out runs/demo",
    "heads": "focuslens heads --model meta-llama/Llama-3.2-3B-Instruct --dtype bfloat16 --data nq-open-oracle.jsonl.gz",
    "split-softmax": "focuslens split-softmax --tau 0.1,0.3,1000 --k 1,4,8 --heads runs/heads/heads.json",
    "train": "focuslens train --site rotary --top-k 20 --samples 200 --out runs/directions",
    "steer": "focuslens steer --directions runs/directions --alpha=-0.2,0.2,0.5 --k 5,20",
    "fold": "focuslens fold --model Qwen/Qwen2.5-7B-Instruct --directions runs/projection --alpha 0.3 --out steered",
    "export": "focuslens export --site rotary --model PATH --directions runs/directions --alpha 0.3 --out steered",
    "harness": "focuslens harness --model steered --data nq-open-oracle.jsonl.gz --out runs/task",
    "paper": "focuslens paper --model demo --out runs/paper/demo",
    "helmet": "focuslens helmet --helmet HELMET --config demo",
    "published": "focuslens published focus_direction --out runs/published",
    "report": "focuslens report runs/demo",
    "generate": "focuslens generate --sample 3 --tau 0.3 --top-k 4",
}


def _common(demo: bool = False) -> Parser:
    """Options of every command; the demo has those that mean something for the embedded model and corpus."""
    parser = Parser(add_help=False)
    model, data, run = (parser.add_argument_group(name) for name in ("model", "data", "run"))
    if not demo:
        model.add_argument("--model", default="demo", help="hub name, directory, or 'demo', the embedded one (default)")
    model.add_argument("--backend", choices=("hooked", "bridge"), help="TransformerLens model; default: what fits")
    model.add_argument("--device", help="cpu, cuda, ...; default: cuda where there is one")
    model.add_argument("--dtype", default="float32", help="of the weights: float32 (default), bfloat16, float16")
    run.add_argument("--seed", type=int, default=42, help="of every random choice (default 42)")
    run.add_argument("--out", help="directory for results; default: print only, except where said")
    if demo:
        parser.set_defaults(
            **dict.fromkeys(("device_map", "n_ctx", "revision", "chat", "gold_positions", "max_new_tokens")),
            model="demo",
            data="synthetic",
            chat_template_arg=[],
        )
        return parser
    add_device_map(model)
    model.add_argument("--n-ctx", type=int, help="context length in tokens; default: what the checkpoint declares")
    model.add_argument("--revision", help="branch, tag or commit on the hub")
    model.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, help="use the chat template; default: if the tokenizer has one"
    )
    model.add_argument(
        "--chat-template-arg",
        type=pair,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of the chat template, e.g. date_string='26 Jul 2024' (Llama 3 puts today's date in otherwise)",
    )
    _data_options(data)
    data.add_argument("--documents", type=int, help="documents a prompt; default: 20, or as many as fit the context")
    run.add_argument("--max-new-tokens", type=int, default=100, help="of a response (default 100)")
    run.add_argument(
        "--batch-tokens", type=int, default=BATCH_TOKENS, help="prompt tokens run together (default %(default)s)"
    )
    return parser


def _data_options(group: argparse._ArgumentGroup) -> None:  # pyright: ignore[reportPrivateUsage]
    group.add_argument("--data", default="synthetic", help="a lost-in-the-middle file, or 'synthetic' (default)")
    group.add_argument("--gold-positions", type=integers, help="from 0; default: five, 0,4,9,14,19 of 20 documents")
    group.add_argument("--samples", type=int, default=100, help="questions to use, one sample each (default 100)")
    group.add_argument(
        "--split", choices=("train", "test", "all"), help="half to use; default: what the command is for"
    )


def _heads_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--case", choices=("long", "gold", "negative", "correct", "wrong"), default="long")
    parser.add_argument("--top", type=int, help="heads to print, best first; default: 20, or all where there are fewer")


def _split_softmax_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--tau", type=numbers, default=[0.1, 0.3, 0.6, 1.5, 1000], help="default 0.1,0.3,0.6,1.5,1000")
    parser.add_argument("--random-tau", type=float, default=0.3, help="tau of the random heads (default 0.3)")
    parser.add_argument("--exclude-top", type=int, default=20, help="contextual heads not drawn as random (default 20)")


def _train_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--site", choices=("rotary", "projection"), default="rotary", help="default rotary, as the paper"
    )
    parser.add_argument("--prompts", choices=("long", "gold"), default="long", help="long (the authors' code) or gold")
    parser.add_argument("--top-k", type=int, help="train the best k heads; default: all (of --heads, if it is given)")
    parser.add_argument("--epochs", type=int, default=10, help="passes over the samples (default 10)")
    parser.add_argument("--learning-rate", type=float, default=1e-3, help="of AdamW (default 0.001)")
    parser.add_argument(
        "--memory-gb", type=float, default=4.0, help="activations kept between epochs, in gigabytes (default 4)"
    )


def _steer_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--directions", required=True, help="directory of focuslens train, the authors' files, or the hub"
    )
    parser.add_argument(
        "--alpha", type=numbers, default=[-0.2, 0.2, 0.4], help="default -0.2,0.2,0.4; write --alpha=-0.2,..."
    )


def _harness_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--model",
        default="demo",
        help="directory or hub name, for the command that is printed; default 'demo', the embedded one",
    )
    data = parser.add_argument_group("data")
    _data_options(data)
    data.add_argument("--documents", type=int, default=20, help="documents a prompt (default 20)")
    data.add_argument("--case", choices=("long", "gold", "negative"), default="long")
    parser.add_argument("--name", default="focuslens_multidoc", help="of the task (default %(default)s)")
    parser.add_argument("--max-new-tokens", type=int, default=100, help="of a response (default 100)")
    parser.add_argument("--seed", type=int, default=42, help="of the choice of samples (default 42)")
    parser.add_argument("--out", required=True, help="directory for the task's files")


def _generate_options(parser: argparse.ArgumentParser) -> None:
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--prompt", help="the text, or @FILE")
    source.add_argument("--sample", type=int, help="a sample of the data, from 0")
    parser.add_argument("--case", choices=("long", "gold", "negative"), default="long", help="prompt of the sample")
    parser.add_argument("--tau", type=float, help="split-softmax to the relevant document")
    parser.add_argument("--directions", help="as in focuslens steer")
    parser.add_argument("--alpha", type=float, help="strength of the directions (default 0.2)")
    parser.add_argument("--top-k", type=int, help="heads to change; default: 20, or all where there are fewer")


def _published_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("directory", metavar="DIR", help="holds head_features and contextual_heads_scores_full_seq")
    parser.add_argument("--out", help="directory for tables, figures and index.html; default: print only")
    parser.add_argument("--top", type=int, default=20, help="heads that count as contextual (default %(default)s)")


_COMMANDS: dict[str, tuple[str, str, Callable[[argparse.ArgumentParser], None] | None]] = {
    "demo": (
        "everything, on the embedded model and corpus",
        "Contextual heads, a split-softmax sweep, focus directions, steered answers, figures and a report,\n"
        "on the embedded model and its synthetic corpus. Writes to runs/demo unless --out says otherwise.",
        None,
    ),
    "heads": (
        "find contextual heads",
        "Score every head by attention from the response to the relevant document, the irrelevant ones and the\n"
        "attention sink (equation 1 of arXiv 2503.23306), rank them, and count how many exceed a threshold.",
        _heads_options,
    ),
    "split-softmax": (
        "turn attention to the relevant document up or down",
        "Accuracy under split-softmax (equations 2 and 3) on the top k heads, for a grid of tau and k, with\n"
        "random heads as a control. A killed run with --out resumes.",
        _split_softmax_options,
    ),
    "train": (
        "train focus directions",
        "Train one direction a head (equation 4) on prompts whose response is that of the model with the gold\n"
        "document alone. Writes directions to --out (default runs/train); a killed run resumes.",
        _train_options,
    ),
    "steer": (
        "accuracy under focus directions",
        "Accuracy when directions of strength alpha are added to the top k heads (equation 5).\n"
        "A killed run with --out resumes.",
        _steer_options,
    ),
    "generate": (
        "one response, with and without an intervention",
        "Answer a prompt, or a sample of the data, without and with split-softmax (--tau) or\n"
        "steering (--directions). With --out, generate.json holds the responses and what made them.",
        _generate_options,
    ),
    "fold": (
        "a checkpoint that is steered without any hook",
        "Write a Hugging Face checkpoint with directions of the projection site as biases of its projections\n"
        "(Llama, Qwen2, Qwen3, Mistral without a window). Weights are copied file by file, never loaded.",
        fold.add_options,
    ),
    "export": (
        "a checkpoint that is steered by a few lines of code that it brings",
        "A Hugging Face checkpoint with directions of the rotary site (Llama, Mistral, Qwen2, Qwen3), to be loaded\n"
        "with trust_remote_code=True; it is steered under every attention implementation.",
        fold.add_export_options,
    ),
    "harness": (
        "samples as a task of lm-evaluation-harness",
        "A task of prompts, greedy responses and exact match, which lm-eval runs on any model, a steered checkpoint\n"
        "or what a server answers; the samples are those of focuslens steer with the same options.",
        _harness_options,
    ),
    "paper": (
        "every table and figure of the paper, for one model",
        "Figures 2 to 9 and Tables 1 and 3 of arXiv 2503.23306 and what they leave open, from one YAML file a model,\n"
        "with index.html over all of them. A killed run goes on; what is finished is not done again.",
        paper.add_options,
    ),
    "helmet": (
        "HELMET's tasks under the paper's settings, by HELMET's own code",
        "Tables 2 and 4 to 13 of arXiv 2503.23306: sixteen tasks of HELMET, without directions and with each strength\n"
        "on each number of heads. HELMET, a checkout, makes prompts and metrics. Its own result files are written,\n"
        "and tables with the paper's beside them. A killed run goes on.",
        helmet.add_options,
    ),
    "report": (
        "a run's results on one offline page",
        "Gather what a command wrote into one HTML page that needs no network: what was run, findings with their\n"
        "intervals, figures and their data, tables that sort, and attention before and after for samples that became\n"
        "right or wrong. What the run's files lack is said on the page.",
        report.add_options,
    ),
    "published": (
        "look into the directions that the paper's authors publish",
        "Norms, rotary frequencies and head rankings of the authors' files, model by model; needs no model's weights.",
        _published_options,
    ),
}
"""What each command is for, in a line and in full, and what adds the options of its own."""

_FILES, _DIRECTORIES = ("data", "heads", "ranking", "config"), ("out", "directions", "directory", "helmet", "haystack")
"""Options whose values the shell completes as paths."""

_ON_THEIR_OWN = ("fold", "export", "harness", "helmet", "paper", "published", "report")
"""Commands that have none of the options of models, data and runs."""


_RUNS = {
    "demo": "demo:run",
    "heads": "heads:run",
    "split-softmax": "sweeps:run_split_softmax",
    "train": "train:run",
    "steer": "sweeps:run_steer",
    "generate": "generate:run",
    "fold": "fold:run",
    "export": "fold:run_export",
    "harness": "harness:run",
    "paper": "paper:run",
    "helmet": "helmet:run",
    "report": "report:run",
    "published": "published:run",
}
"""The function that each command runs, in focuslens.cli; imported when it is known which."""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="focuslens",
        description="Find the attention heads that read the context, prove what they do, and steer them.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    shtab.add_argument_to(parser, "--print-completion", help="print what completes commands and options, and stop")
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    commands: dict[str, argparse.ArgumentParser] = {}
    for name, (text, description, add_options) in _COMMANDS.items():
        commands[name] = subparsers.add_parser(
            name,
            parents=[] if name in _ON_THEIR_OWN else [_common(demo=name == "demo")],
            help=text,
            description=description,
            epilog=f"example: {_EXAMPLES[name]}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        if add_options is not None:
            add_options(commands[name])
    for name in ("split-softmax", "steer"):
        commands[name].add_argument(
            "--k", type=integers, default=[1, 5, 10, 20], help="heads to change (default 1,5,10,20)"
        )
    for name in ("steer", "generate"):
        commands[name].add_argument(
            "--positions", choices=("all", "response"), default="all", help="rows that are steered"
        )
    for name in ("heads", "split-softmax", "train", "steer"):
        cluster.add_options(commands[name])
    for name in ("split-softmax", "train", "steer", "generate"):
        commands[name].add_argument(
            "--heads", help="ranking to use: heads.json of focuslens heads; default: score training samples"
        )
    for command in commands.values():
        output.add_options(command)
        _complete_paths(command)
    return parser


def _complete_paths(parser: argparse.ArgumentParser) -> None:
    """Let the shell complete files and directories where an option names some."""
    for action in parser._actions:  # pyright: ignore[reportPrivateUsage]
        if action.dest in _FILES or action.dest in _DIRECTORIES:
            setattr(action, "complete", shtab.FILE if action.dest in _FILES else shtab.DIRECTORY)  # noqa: B010


def _run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the command; what its result files hold."""
    module, _, function = _RUNS[args.command].partition(":")
    _LOG.debug("importing what focuslens %s needs", args.command)
    return getattr(import_module(f"focuslens.cli.{module}"), function)(args)


def _joined(argv: Sequence[str]) -> list[str]:
    """``--alpha -0.2,0.2`` as ``--alpha=-0.2,0.2``: argparse takes what begins with a dash for an option."""
    joined: list[str] = []
    for text in argv:
        if re.fullmatch(r"-[0-9.][-0-9.e,]*", text) and joined and re.fullmatch(r"--[a-z-]+", joined[-1]):
            joined[-1] += f"={text}"
        else:
            joined.append(text)
    return joined


def main(argv: Sequence[str] | None = None) -> int:
    """Entry point; returns the exit status: 0, 1 for a request that cannot be met, 2 for wrong usage."""
    parser = _parser()
    args, unknown = parser.parse_known_args(_joined(sys.argv[1:] if argv is None else argv))
    if unknown:  # by the command's own parser, whose --help then is the one to look at
        Parser(prog=f"focuslens {args.command}").error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.version:
        from importlib.metadata import version

        print(f"focuslens {version('focuslens')}")
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    try:
        output.carry_out(args, _run)
    except (ValueError, KeyError, OSError, ImportError) as error:
        message = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
        print(f"focuslens {args.command}: {message}", file=sys.stderr)
        return 1
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        said = " ".join(str(error).split()) or "memory ran out"
        print(f"focuslens {args.command}: {said}; shorter prompts and --dtype bfloat16 need less", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print(
            f"\nfocuslens {args.command}: interrupted; with --out, the same command goes on from here", file=sys.stderr
        )
        return 130
    return 0
