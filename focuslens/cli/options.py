"""Options that several commands share, and the types of the options' values.

``focuslens --help`` imports this module. The module therefore imports no slow libraries.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeVar

from focuslens.cli import paths
from focuslens.cli.completion import complete_paths
from focuslens.cli.own_data import add_own_data
from focuslens.cli.paths import Check
from focuslens.cli.stops import add_stop_tokens, add_stops
from focuslens.model.batching import BATCH_TOKENS

__all__ = [
    "add_checkpoint",
    "add_counts",
    "add_device",
    "add_device_map",
    "add_directions",
    "add_directory",
    "add_file",
    "add_model",
    "add_out",
    "add_out_directory",
    "add_positions",
    "add_ranking",
    "add_run",
    "add_samples",
    "add_seed",
    "chat_argument",
    "count",
    "dtype",
    "integers",
    "names",
    "numbers",
    "pair",
    "path",
    "path_text",
    "positive",
    "positives",
    "require_positions",
]


_T = TypeVar("_T")


# Types of values


def numbers(text: str) -> list[float]:
    """Parse numbers separated by commas, such as ``-0.2,0.2``.

    Raises:
        argparse.ArgumentTypeError: If the text is not a list of numbers.
    """
    return _listed(text, float, "numbers separated by commas, such as -0.2,0.2")


def integers(text: str) -> list[int]:
    """Parse whole numbers separated by commas, such as ``10,20``.

    Raises:
        argparse.ArgumentTypeError: If the text is not a list of whole numbers.
    """
    return _listed(text, int, "whole numbers separated by commas, such as 10,20")


def _listed(text: str, kind: Callable[[str], _T], expected: str) -> list[_T]:
    try:
        return [kind(part) for part in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not {expected}") from None


def positive(text: str) -> int:
    """Parse a whole number of 1 or more.

    Raises:
        argparse.ArgumentTypeError: If the text is not such a number.
    """
    return _at_least(text, 1)


def count(text: str) -> int:
    """Parse a whole number of 0 or more.

    Raises:
        argparse.ArgumentTypeError: If the text is not such a number.
    """
    return _at_least(text, 0)


def positives(text: str) -> list[int]:
    """Parse whole numbers of 1 or more, separated by commas.

    Raises:
        argparse.ArgumentTypeError: If the text is not a list of such numbers.
    """
    values = integers(text)
    for value in values:
        _at_least(str(value), 1)
    return values


def _at_least(text: str, least: int) -> int:
    try:
        value = int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number") from None
    if value < least:
        raise argparse.ArgumentTypeError(f"{text} is less than {least}")
    return value


def dtype(text: str) -> str:
    """Check the name of a floating-point type without torch, and return it.

    Another name raises ``argparse.ArgumentTypeError``.
    """
    if text not in _DTYPES:
        raise argparse.ArgumentTypeError(f"{text!r} is not one of {', '.join(_DTYPES)}")
    return text


_DTYPES = ("float32", "bfloat16", "float16", "float64")


def names(text: str) -> list[str]:
    """Parse names separated by commas, such as ``json_kv,kilt_nq``."""
    return [part.strip() for part in text.split(",") if part.strip()]


def pair(text: str) -> tuple[str, str]:
    """Parse text of the form ``NAME=VALUE`` into name and value.

    Raises:
        argparse.ArgumentTypeError: If the text has no ``=``.
    """
    name, equals, value = text.partition("=")
    if not equals:
        raise argparse.ArgumentTypeError(f"{text!r} is not NAME=VALUE")
    return name, value


def chat_argument(text: str) -> tuple[str, Any]:
    """Parse ``NAME=VALUE``, where a value in JSON, such as ``false``, is that value, and any other one is text.

    Raises:
        argparse.ArgumentTypeError: If the text has no ``=``.
    """
    name, value = pair(text)
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


# Options whose values are paths, which the shell completes


def path_text(text: str) -> str:
    """Check that a path is not empty, and return it. An empty path raises ``argparse.ArgumentTypeError``."""
    if not text:
        raise argparse.ArgumentTypeError("the path is empty; name one, or leave the option out")
    return text


def path(text: str) -> Path:
    """A path that is not empty. pathlib would take an empty path for the current directory."""
    return Path(path_text(text))


def add_file(group: Any, *flags: str, check: Check | None = paths.input_file, **settings: Any) -> None:
    """Add an option whose value is the path of a file, and a check of this path before the command's work."""
    _add_path(group, "FILE", flags, check, settings)


def add_directory(group: Any, *flags: str, check: Check | None = paths.input_directory, **settings: Any) -> None:
    """Add an option whose value is the path of a directory, and a check of this path before the command's work."""
    _add_path(group, "DIRECTORY", flags, check, settings)


def _add_path(group: Any, kind: str, flags: Sequence[str], check: Check | None, settings: dict[str, Any]) -> None:
    action = group.add_argument(*flags, **{"type": path_text, **settings})
    complete_paths(action, kind)
    if check is not None:
        paths.remember(group, action, check)


def add_out_directory(group: Any, **settings: Any) -> None:
    """Add ``--out`` for a directory, and a check that the directory can be written to."""
    add_directory(group, "--out", check=paths.output_directory, **settings)


# Options of commands that run a model on samples


def add_model(parser: argparse.ArgumentParser) -> None:
    """Add the options of the model and of its prompt format."""
    group = parser.add_argument_group("model")
    add_checkpoint(group)
    group.add_argument(
        "--dtype", type=dtype, default="float32", help="dtype of the weights: float32 (default), bfloat16, float16"
    )
    group.add_argument(
        "--chat", action=argparse.BooleanOptionalAction, help="use the chat template; default: if the tokenizer has one"
    )
    group.add_argument(
        "--chat-template-arg",
        type=chat_argument,
        action="append",
        default=[],
        metavar="NAME=VALUE",
        help="argument of the chat template, as text or JSON, e.g. enable_thinking=false or date_string='26 Jul 2024' "
        "(Llama 3 otherwise uses today's date)",
    )
    add_stops(
        group,
        "those of the checkpoint's generation config; without any, '\\n' and 'Question:' if there is no chat template",
    )
    add_stop_tokens(group)


def add_checkpoint(group: Any) -> None:
    """Add the options that set a checkpoint, its device and its context length."""
    model = group.add_argument(
        "--model",
        type=path_text,
        default="demo",
        help="hub name, directory, GGUF file, a name that focuslens models lists, or 'demo', the embedded model "
        "(default)",
    )
    paths.remember(group, model, paths.checkpoint)
    group.add_argument("--gguf-file", metavar="FILE", help="GGUF file in the directory or on the hub under --model")
    group.add_argument(
        "--original", action="store_true", help="take the original of a model that focuslens models lists from the hub"
    )
    add_device(group)
    add_device_map(group)
    group.add_argument(
        "--compile", action="store_true", help="on a GPU, record the passes over a response's rows and replay them"
    )
    group.add_argument("--n-ctx", type=positive, help="context length in tokens; default: the checkpoint's")
    group.add_argument("--revision", help="branch, tag or commit on the hub")
    group.add_argument(
        "--trust-remote-code", action="store_true", help="run Python code that the checkpoint contains; default: refuse"
    )


def add_device(group: Any) -> None:
    """Add ``--backend`` and ``--device``."""
    group.add_argument(
        "--backend", choices=("hooked", "bridge"), help="kind of TransformerLens model; default: hooked if possible"
    )
    group.add_argument("--device", help="cpu, cuda, ...; default: cuda if there is a GPU")


def add_device_map(group: Any) -> None:
    """Add ``--device-map``."""
    group.add_argument(
        "--device-map", help="in place of --device, if the model needs several: auto, balanced, sequential"
    )


def add_samples(parser: argparse.ArgumentParser, *, fixed_documents: bool = False) -> Any:
    """Add the options that select samples, and return the argument group of these options.

    Args:
        parser: Parser of the command.
        fixed_documents: Whether the default of ``--documents`` is always 20, for a command that opens no model. In
            other commands, the context of the model can lower the default.
    """
    group = parser.add_argument_group("data")
    add_file(
        group,
        "--data",
        check=paths.data_file,
        default="synthetic",
        help="a lost-in-the-middle file, a table of your own, 'synthetic' (default), or 'passages', 144 passages of "
        "this package",
    )
    group.add_argument(
        "--gold-positions",
        type=integers,
        help="positions of the gold document, from 0; default: five, such as 0,4,9,14,19 of 20 documents",
    )
    group.add_argument(
        "--distractors",
        choices=("random", "bm25"),
        default="random",
        help="distractors from an oracle file: random passages (default), or those most like the question by BM25",
    )
    rows = "rows of a table of your own (default 100; attribute: all rows)"
    group.add_argument("--samples", type=positive, default=100, help=f"questions, one sample each, or {rows}")
    group.add_argument("--split", choices=("train", "test", "all"), help="half of the data; default: the command's own")
    fitting = "" if fixed_documents else ", or as many as fit the context"
    group.add_argument(
        "--documents",
        type=positive,
        help=f"documents per prompt; default: 20{fitting}; of a table of your own, at most as many as given",
    )
    add_own_data(group)
    add_file(
        group, "--template", check=paths.template, help="YAML file with the wording of prompts (fl.PromptTemplate)"
    )
    return group


def add_run(parser: argparse.ArgumentParser) -> None:
    """Add the options of a run: seed, output directory, response length, and tokens per batch."""
    group = parser.add_argument_group("run")
    add_seed(group)
    add_out(group)
    group.add_argument(
        "--max-new-tokens", type=positive, default=100, help="maximum tokens of a response (default 100)"
    )
    group.add_argument(
        "--batch-tokens", type=positive, default=BATCH_TOKENS, help="prompt tokens per batch (default %(default)s)"
    )


def add_seed(group: Any) -> None:
    """Add ``--seed``."""
    group.add_argument("--seed", type=int, default=42, help="seed of every random choice (default 42)")


def add_out(group: Any) -> None:
    """Add ``--out``."""
    add_out_directory(group, help="directory for results; by default they are only printed, except where stated")


def require_positions(positions: Sequence[int] | None, documents: int) -> None:
    """Raise ``ValueError`` unless all values of ``--gold-positions`` are positions among ``--documents`` documents."""
    from focuslens.data.positions import require_positions as require

    require(positions or (), documents, ("--gold-positions", "--documents"))


# Options of interventions


def add_ranking(group: Any) -> None:
    """Add ``--heads``, the file with a ranking of heads."""
    add_file(
        group,
        "--heads",
        check=paths.ranking,
        help="ranking of heads: heads.json of focuslens heads, or the name of a small real model; default: score "
        "training samples",
    )


def add_directions(group: Any, *, required: bool = False) -> None:
    """Add ``--directions``."""
    add_directory(
        group,
        "--directions",
        check=paths.directions,
        required=required,
        help="directory of focuslens train, the authors' files, USER/NAME on the hub, or a small real model",
    )


def add_counts(group: Any) -> None:
    """Add ``--k``, the numbers of heads to change in a sweep."""
    group.add_argument(
        "--k", type=positives, default=[1, 5, 10, 20], help="numbers of heads to change (default 1,5,10,20)"
    )


def add_positions(group: Any) -> None:
    """Add ``--positions``, the rows that focus directions act on."""
    group.add_argument("--positions", choices=("all", "response"), default="all", help="rows that are steered")
