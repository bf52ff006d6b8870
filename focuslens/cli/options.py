"""Options that several commands share, and the types of their values. Light to import, as the help needs them."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any, TypeVar

from focuslens.cli.completion import complete_paths
from focuslens.model.batching import BATCH_TOKENS

__all__ = [
    "add_counts",
    "add_device",
    "add_device_map",
    "add_directions",
    "add_directory",
    "add_file",
    "add_model",
    "add_out",
    "add_positions",
    "add_ranking",
    "add_run",
    "add_samples",
    "add_seed",
    "integers",
    "names",
    "numbers",
    "pair",
]


_T = TypeVar("_T")


# Types of values


def numbers(text: str) -> list[float]:
    """``-0.2,0.2``.

    Raises:
        argparse.ArgumentTypeError: If it is no list of numbers.
    """
    return _listed(text, float, "numbers separated by commas, such as -0.2,0.2")


def integers(text: str) -> list[int]:
    """``10,20``.

    Raises:
        argparse.ArgumentTypeError: If it is no list of whole numbers.
    """
    return _listed(text, int, "whole numbers separated by commas, such as 10,20")


def _listed(text: str, kind: Callable[[str], _T], expected: str) -> list[_T]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}") from None


def names(text: str) -> list[str]:
    """``json_kv,kilt_nq``."""
    return [part.strip() for part in text.split(",") if part.strip()]


def pair(text: str) -> tuple[str, str]:
    """``NAME=VALUE``.

    Raises:
        argparse.ArgumentTypeError: If there is no ``=``.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


# Paths, which the shell completes


def add_file(group: Any, *flags: str, **settings: Any) -> None:
    """An option whose value is a file."""
    complete_paths(group.add_argument(*flags, **settings), "FILE")


def add_directory(group: Any, *flags: str, **settings: Any) -> None:
    """An option whose value is a directory."""
    complete_paths(group.add_argument(*flags, **settings), "DIRECTORY")


# Options of commands that run a model on samples


def add_model(parser: argparse.ArgumentParser) -> None:
    """Options of the model and of its prompts' format."""
    group = parser.add_argument_group("model")
    group.add_argument("--model", default="demo", help="hub name, directory, or 'demo', the embedded one (default)")
    add_device(group)
    add_device_map(group)
    group.add_argument("--dtype", default="float32", help="of the weights: float32 (default), bfloat16, float16")
    group.add_argument("--n-ctx", type=int, help="context length in tokens; default: the checkpoint's")
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, help="use the chat template; default: if the tokenizer has one"
    )
    group.add_argument(
        "--chat-template-arg",
        type=pair,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of the chat template, e.g. date_string='26 Jul 2024' (Llama 3 puts today's date in otherwise)",
    )


def add_device(group: Any) -> None:
    """``--backend`` and ``--device``."""
    group.add_argument(
        "--backend", choices=("hooked", "bridge"), help="TransformerLens model; default: hooked where it can be had"
    )
    group.add_argument("--device", help="cpu, cuda, ...; default: cuda where there is one")


def add_device_map(group: Any) -> None:
    """``--device-map``."""
    group.add_argument(
        "--device-map", help="in place of --device, for a model that does not fit one: auto, balanced, sequential"
    )


def add_samples(parser: argparse.ArgumentParser, *, fixed_documents: bool = False) -> Any:
    """Options of the samples; gives their group.

    Args:
        parser: The command's.
        fixed_documents: 20 documents by default, for a command without a model whose context limits their number.
    """
    group = parser.add_argument_group("data")
    add_file(group, "--data", default="synthetic", help="a lost-in-the-middle file, or 'synthetic' (default)")
    group.add_argument("--gold-positions", type=integers, help="from 0; default: five, 0,4,9,14,19 of 20 documents")
    group.add_argument("--samples", type=int, default=100, help="questions, one sample each (default 100)")
    group.add_argument("--split", choices=("train", "test", "all"), help="half of the data; default: the command's own")
    if fixed_documents:
        group.add_argument("--documents", type=int, default=20, help="documents per prompt (default 20)")
    else:
        group.add_argument(
            "--documents", type=int, help="documents per prompt; default: 20, or as many as fit the context"
        )
    return group


def add_run(parser: argparse.ArgumentParser) -> None:
    """Options of the run: seed, results, lengths."""
    group = parser.add_argument_group("run")
    add_seed(group)
    add_out(group)
    group.add_argument("--max-new-tokens", type=int, default=100, help="of a response (default 100)")
    group.add_argument(
        "--batch-tokens", type=int, default=BATCH_TOKENS, help="prompt tokens of a batch (default %(default)s)"
    )


def add_seed(group: Any) -> None:
    """``--seed``."""
    group.add_argument("--seed", type=int, default=42, help="of every random choice (default 42)")


def add_out(group: Any) -> None:
    """``--out``."""
    add_directory(
        group, "--out", help="directory for results; default: none, and results are printed only, except where stated"
    )


# Options of interventions


def add_ranking(group: Any) -> None:
    """``--heads``, a ranking."""
    add_file(group, "--heads", help="ranking of heads: heads.json of focuslens heads; default: score training samples")


def add_directions(group: Any, *, required: bool = False) -> None:
    """``--directions``."""
    add_directory(
        group,
        "--directions",
        required=required,
        help="directory of focuslens train, the authors' files, or USER/NAME on the hub",
    )


def add_counts(group: Any) -> None:
    """``--k``, the numbers of heads of a sweep."""
    group.add_argument("--k", type=integers, default=[1, 5, 10, 20], help="heads to change (default 1,5,10,20)")


def add_positions(group: Any) -> None:
    """``--positions``, the rows that directions act on."""
    group.add_argument("--positions", choices=("all", "response"), default="all", help="rows that are steered")
