"""``focuslens helmet``: HELMET's tasks under the paper's settings, and generated data for HELMET's recall tasks."""

from __future__ import annotations

import argparse
import json
import logging
from collections.abc import Mapping, Sequence
from contextlib import suppress
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focuslens.cli import cluster, output, paths
from focuslens.cli.command import Command
from focuslens.cli.options import (
    add_checkpoint,
    add_directions,
    add_directory,
    add_file,
    add_out_directory,
    chat_argument,
    integers,
    names,
    numbers,
    pair,
    path,
    positive,
)
from focuslens.cli.stops import add_stops
from focuslens.model.batching import BATCH_TOKENS

if TYPE_CHECKING:
    from focuslens.cli.common import ModelOptions
    from focuslens.evaluation import Setting
    from focuslens.heads import Head
    from focuslens.interventions.directions import FocusDirections
    from focuslens.model.execution import Executor
    from focuslens.studies.helmet.checkout import Checkout
    from focuslens.studies.helmet.plan import Plan
    from focuslens.studies.helmet.results import TaskScores
    from focuslens.studies.helmet.run import HelmetRun

__all__ = ["COMMAND"]

_LOG = logging.getLogger(__name__)

_ALPHAS = (-0.2, 0.2)
"""Strengths of the focus directions in the paper."""

_ABOUT_RECALL = (
    "Write recall sets of the given lengths, in tokens of any model: needles with word keys, needles with UUID keys,\n"
    "several values of one key, and JSON pairs. HELMET's loaders read them; configs/recall.yaml in --out runs them."
)


def _add_options(parser: argparse.ArgumentParser) -> None:
    _benchmark_options(parser.add_argument_group("benchmark"))
    _steering_options(parser.add_argument_group("steering"))
    _model_options(parser.add_argument_group("model"))
    cluster.add_options(parser)
    add_out_directory(
        parser, type=path, help="directory for results (default runs/helmet/MODEL); a killed run resumes there"
    )
    actions = parser.add_subparsers(dest="action", metavar="make-recall", title="instead of running")
    recall = actions.add_parser(
        "make-recall",
        help="write the recall sets at any length, for any tokenizer",
        description=_ABOUT_RECALL,
        epilog="example: focuslens helmet make-recall --lengths 8192,16384 --tokenizer Qwen/Qwen2.5-7B --out recall",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    _recall_options(recall)
    output.add_options(recall)


def _benchmark_options(group: Any) -> None:
    # The plan of the run checks these three before the model is opened, and says where HELMET's files come from.
    add_directory(
        group,
        "--helmet",
        check=None,
        metavar="DIR",
        help="a checkout of princeton-nlp/HELMET, which is not changed",
    )
    add_file(
        group,
        "--config",
        check=None,
        nargs="+",
        default=[],
        help="HELMET's YAML files, here or in the checkout; or 'demo', for a set from the synthetic corpus",
    )
    add_directory(
        group,
        "--data",
        check=None,
        type=path,
        metavar="DIR",
        help="folder with the data/ of HELMET (default: the checkout)",
    )
    group.add_argument("--tasks", type=names, default=[], help="tasks to run, e.g. json_kv,kilt_nq; default: all")
    group.add_argument("--lengths", type=integers, default=[], help="lengths to run, e.g. 8192,16384; default: all")
    group.add_argument("--max-test-samples", type=positive, help="samples per task (default: as in the configurations)")
    group.add_argument("--use-chat-template", choices=("True", "False"), help="HELMET's option; False for base models")
    group.add_argument("--tag", default="v1", help="part of the names of HELMET's result files (default v1)")
    group.add_argument("--seed", type=int, default=42, help="seed of HELMET and of the intervals (default 42)")
    group.add_argument(
        "--helmet-arg",
        type=pair,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="any other option of HELMET's eval.py, e.g. shots=0",
    )


def _steering_options(group: Any) -> None:
    add_directions(group)
    group.add_argument(
        "--directions-of", metavar="MODEL", help="allow directions of this other model of the same shape"
    )
    add_file(
        group,
        "--ranking",
        check=paths.ranking,
        help="heads.json of focuslens heads, or the authors' file; default: the directions' order",
    )
    group.add_argument("--heads", type=integers, help="numbers of best heads to steer (default 10,20)")
    group.add_argument(
        "--alpha",
        type=_alphas,
        help="strengths of the directions (default -0.2,0.2), or one per task or category, e.g. recall=0.5,other=1",
    )
    add_file(
        group,
        "--settings",
        check=paths.input_file,
        type=path,
        metavar="FILE",
        help="YAML list of further settings, such as {name: self-focus, kind: self_focus, heads: 8, tau: 0.1}",
    )
    group.add_argument("--sink-heads", type=int, default=5, help="number of heads with recorded sink score (default 5)")


def _alphas(text: str) -> list[float] | dict[str, float]:
    """Parse strengths, or one strength per task."""
    if "=" not in text:
        return numbers(text)
    return {name: value for name, (value,) in ((name, numbers(value)) for name, value in map(pair, text.split(",")))}


def _model_options(group: Any) -> None:
    add_checkpoint(group)
    group.add_argument("--dtype", help="dtype of the weights (default bfloat16, as in HELMET; float32 for 'demo')")
    group.add_argument(
        "--repetition-penalty",
        type=float,
        help="repetition penalty of responses; 1 for none (default: the checkpoint's own, as in HELMET)",
    )
    add_stops(group, "none, as in HELMET, whose own options set stop tokens")
    group.add_argument(
        "--chat-template-arg",
        type=chat_argument,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of the chat template, as text or JSON, e.g. date_string='26 Jul 2024' (HELMET gives none; "
        "Llama 3 then uses today's date)",
    )
    group.add_argument(
        "--batch-tokens", type=positive, default=BATCH_TOKENS, help="prompt tokens per batch (default %(default)s)"
    )


def _recall_options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lengths", type=integers, required=True, help="tokens of prompt and response together, e.g. 8192,16384"
    )
    parser.add_argument("--tokenizer", required=True, help="hub name, directory, or 'demo'")
    add_out_directory(parser, type=path, required=True, help="folder that gets data/ and configs/recall.yaml")
    parser.add_argument("--samples", type=positive, default=100, help="samples per set (default 100)")
    parser.add_argument("--seed", type=int, default=42, help="seed of every random choice (default 42)")
    add_directory(parser, "--haystack", help="directory of *.txt files with the text around values; default: synthetic")
    parser.add_argument("--needle", help="the needles' sentence, with {key}, {kind} and {value}")
    parser.add_argument("--reserve", type=positive, help="tokens reserved for HELMET's wording; default: measured")


def run(args: argparse.Namespace) -> dict[str, Any]:
    """Run HELMET's tasks or, with ``make-recall``, write recall sets."""
    return (_make_recall if args.action else _run_tasks)(args)


def _make_recall(args: argparse.Namespace) -> dict[str, Any]:
    from focuslens.data.needles import load_haystack
    from focuslens.data.synthetic import build_tokenizer
    from focuslens.model.loading import load_tokenizer
    from focuslens.model.sources.names import EMBEDDED, checkpoint_path
    from focuslens.studies.helmet.recall import NEEDLE, make_recall

    recall = make_recall(
        build_tokenizer() if args.tokenizer == EMBEDDED else load_tokenizer(checkpoint_path(args.tokenizer)),
        args.out,
        args.lengths,
        samples=args.samples,
        seed=args.seed,
        haystack=load_haystack(args.haystack) if args.haystack else None,
        needle=args.needle or NEEDLE,
        reserve=args.reserve,
    )
    for file, tokens in recall.files.items():
        print(f"{file}: {args.samples} samples, contexts of up to {tokens:,} tokens")
    print(f"\nfocuslens helmet --helmet DIR --config {recall.config} --data {args.out} --model NAME")
    record = args.out / "recall.json"
    files = (args.out / file for file in recall.files)
    content = {"command": "helmet make-recall", **json.loads(record.read_text()), "tokens": dict(recall.files)}
    return output.document(content, record, recall.config, *files)


def _run_tasks(args: argparse.Namespace) -> dict[str, Any]:
    if args.helmet is None or not args.config:
        raise ValueError(
            "name a checkout of princeton-nlp/HELMET with --helmet and HELMET's configurations with --config, such as "
            "configs/recall_short.yaml; or write data with focuslens helmet make-recall"
        )
    import focuslens.viz  # noqa: F401  # pyright: ignore[reportUnusedImport]  (a missing library fails before any work)
    from focuslens.cli.common import open_executor, print_table

    out = args.out or paths.default_out(Path("runs") / "helmet" / Path(args.model).name)
    plan, checkout = _plan(args, out)
    if plan.left_out:
        _LOG.warning("left out, since the paper does not use them: %s", ", ".join(plan.left_out))
    directions, ranking = _directions(args)
    with open_executor(args, _model(args)) as executor:
        helmet = _helmet_run(args, executor, plan, checkout, directions, ranking, out)
        _without_bars_of_datasets()
        for scores in helmet.scores():
            _print_scores(scores)
        frame = helmet.write(_facts(args, directions))
    print()
    print_table(frame)
    print(f"\n{out / 'index.html'}; HELMET's own files are in {out / 'output'}")
    record = json.loads((out / "helmet.json").read_text())
    written = ("helmet.json", "index.html", "tables.md", "tables", "output", "records")
    return output.document({"command": args.command, **record}, *(out / name for name in written))


def _model(args: argparse.Namespace) -> ModelOptions:
    from focuslens.cli.common import ModelOptions

    return ModelOptions(
        args.model,
        device=args.device,
        device_map=args.device_map,
        dtype=args.dtype or ("float32" if args.model == "demo" else "bfloat16"),
        backend=args.backend,
        n_ctx=args.n_ctx,
        revision=args.revision,
        trust_remote_code=args.trust_remote_code,
        chat=False,  # HELMET itself applies the chat template
        chat_template_kwargs=dict(args.chat_template_arg),
        stop_strings=tuple(args.stop or ()),
    )


def _helmet_run(
    args: argparse.Namespace,
    executor: Executor,
    plan: Plan,
    checkout: Checkout,
    directions: FocusDirections | None,
    ranking: Sequence[Head] | None,
    out: Path,
) -> HelmetRun:
    from focuslens.studies.helmet.answering import declared_penalty
    from focuslens.studies.helmet.run import HelmetRun

    settings, heads = _settings(args, executor, plan, directions, ranking)
    return HelmetRun(
        executor,
        checkout,
        plan.entries,
        settings,
        tuple(heads),
        out,
        batch_tokens=args.batch_tokens,
        template_kwargs=dict(args.chat_template_arg),
        repetition_penalty=declared_penalty(executor) if args.repetition_penalty is None else args.repetition_penalty,
        seed=args.seed,
    )


def _without_bars_of_datasets() -> None:
    """Hide the progress bars of ``datasets``, the library that HELMET uses to load and filter data."""
    with suppress(ImportError):
        datasets: Any = import_module("datasets")
        datasets.disable_progress_bars()


def _plan(args: argparse.Namespace, out: Path) -> tuple[Plan, Checkout]:
    from focuslens.studies.helmet.checkout import open_checkout
    from focuslens.studies.helmet.demo import DEMO_LENGTHS, make_demo
    from focuslens.studies.helmet.plan import read_plan

    checkout, configs = open_checkout(args.helmet), list(args.config)
    root = checkout.root if args.data is None else args.data.resolve()
    if "demo" in configs:
        if len(configs) > 1 or args.data is not None:
            raise ValueError("--config demo generates its data; run it alone, without --data")
        root = (out / "made").resolve()
        configs = [str(make_demo(root, args.lengths or DEMO_LENGTHS, seed=args.seed).config)]
    options = ["--model_name_or_path", args.model, "--output_dir", str(out / "output"), "--tag", args.tag]
    options += ["--seed", str(args.seed)]
    for name in ("max_test_samples", "use_chat_template"):
        value = getattr(args, name)
        options += [] if value is None else [f"--{name}", str(value)]
    options += [f"--{name}={value}" for name, value in args.helmet_arg]
    return read_plan(checkout, configs, options, root=root, tasks=args.tasks, lengths=args.lengths), checkout


def _directions(args: argparse.Namespace) -> tuple[FocusDirections | None, list[Head] | None]:
    from focuslens.heads import load_ranking
    from focuslens.interventions.directions import open_directions

    if args.directions is None:
        for option in ("directions_of", "heads", "alpha"):
            if getattr(args, option) is not None:
                raise ValueError(f"--{option.replace('_', '-')} is an option of --directions, which is not given")
    directions = None if args.directions is None else open_directions(args.directions)
    return directions, None if args.ranking is None else load_ranking(args.ranking)


def _settings(
    args: argparse.Namespace,
    model: Executor,
    plan: Plan,
    directions: FocusDirections | None,
    ranking: Sequence[Head] | None,
) -> tuple[Mapping[str, tuple[Setting, ...]], Sequence[Head]]:
    """Settings of each task by the task's name, and the heads whose attention to the sink is recorded."""
    from focuslens.studies.helmet.declared import declared_settings
    from focuslens.studies.helmet.steering import paper_settings, ranked_heads, require_named, sink_heads, task_steering

    heads: list[Head] = []
    tasks = list(dict.fromkeys(entry.task for entry in plan.entries))
    if directions is None:
        steering = {task: paper_settings(model, None, [], [], []) for task in tasks}
    else:
        require_named(directions, model, args.directions_of)
        heads = ranked_heads(directions, ranking)
        ks = args.heads or [k for k in (10, 20) if k <= len(heads)] or [len(heads)]
        alphas = args.alpha or _ALPHAS
        steering = {
            task: task_steering(model, directions, heads, ks, alphas, task)
            if isinstance(alphas, dict)
            else paper_settings(model, directions, heads, ks, alphas)
            for task in tasks
        }
    settings = declared_settings(args.settings, steering, ranking or heads or None)
    return settings, sink_heads(model, heads, ranking, args.sink_heads)


def _facts(args: argparse.Namespace, directions: FocusDirections | None) -> dict[str, str]:
    return {
        "benchmark": f"HELMET, the checkout in {args.helmet}; {', '.join(args.config)}",
        "directions": "none" if directions is None else f"{args.directions} ({directions.site} site)",
    }


def _print_scores(scores: TaskScores) -> None:
    means = ", ".join(f"{name} {sum(values) / len(values):.2f}" for name, values in scores.values.items())
    cut = f"; HELMET cut {scores.truncated} contexts" if scores.truncated else ""
    print(f"{scores.task.name} under {scores.length:,} tokens, {len(scores.questions)} samples{cut}: {means}")


COMMAND = Command(
    name="helmet",
    help="HELMET's tasks under the paper's settings, by HELMET's own code",
    description="Tables 2 and 4 to 13 of arXiv 2503.23306: sixteen tasks of HELMET, without directions and with each\n"
    "strength on each number of heads. The code of a HELMET checkout makes the prompts and the metrics. HELMET's own\n"
    "result files are written, and tables with the paper's numbers beside the measured ones. A killed run resumes.",
    example="focuslens helmet --helmet HELMET --config demo",
    add_options=_add_options,
    run=run,
    resumes="always",
)
