"""Entry point of the ``focuslens`` command: the list of subcommands, and the dispatch to one subcommand."""

from __future__ import annotations

import argparse
import logging
import re
import sys
from collections.abc import Sequence
from typing import Any

from focuslens.cli import (
    attribute,
    cache,
    demo,
    export,
    focus,
    fold,
    generate,
    harness,
    heads,
    helmet,
    models,
    output,
    paper,
    paths,
    published,
    report,
    rerank,
    split_softmax,
    steer,
    train,
    watch,
)
from focuslens.cli.command import Parser
from focuslens.cli.completion import PrintCompletion
from focuslens.cli.next_steps import note_next
from focuslens.util.estimates import results_in
from focuslens.util.memory import is_out_of_memory

__all__ = ["COMMANDS", "main"]

_LOG = logging.getLogger(__name__)

COMMANDS = {
    module.COMMAND.name: module.COMMAND
    for module in (
        demo,
        heads,
        split_softmax,
        train,
        steer,
        generate,
        rerank,
        attribute,
        focus,
        fold,
        export,
        harness,
        paper,
        helmet,
        report,
        watch,
        published,
        models,
        cache,
    )
}
"""All subcommands by name, in the order in which ``focuslens --help`` lists them."""


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        prog="focuslens",
        description="Find the attention heads that read the context, prove what they do, and steer them.",
    )
    parser.add_argument("--version", action="store_true", help="print the version and stop")
    parser.add_argument(
        "--print-completion", action=PrintCompletion, help="print a shell's completion of commands and options"
    )
    subparsers = parser.add_subparsers(dest="command", metavar="COMMAND")
    for command in COMMANDS.values():
        command.add_to(subparsers)
    return parser


def _run(args: argparse.Namespace) -> dict[str, Any]:
    """Run the command, name the next one, and return the content of the command's result files."""
    _LOG.debug("importing the libraries of focuslens %s", args.command)
    with results_in(getattr(args, "out", None)):
        content = COMMANDS[args.command].run(args)
    note_next(args.words, args, content, COMMANDS)
    return content


def _joined(argv: Sequence[str]) -> list[str]:
    """Command-line arguments, with each negative value joined to its option, as in ``--alpha=-0.2,0.2``.

    argparse would otherwise parse a value such as ``-0.2,0.2`` as an option, because the value begins with a dash.
    """
    joined: list[str] = []
    for text in argv:
        if re.fullmatch(r"-[0-9.][-0-9.e,]*", text) and joined and re.fullmatch(r"--[a-z-]+", joined[-1]):
            joined[-1] += f"={text}"
        else:
            joined.append(text)
    return joined


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line, and return the exit status.

    The status is 0 for success, 1 for an error while the command runs, 2 if no command is given, and 130 for a keyboard
    interrupt. It is 141 if whoever reads the output has closed it, as in ``focuslens heads | head -1``.

    Raises:
        SystemExit: With status 2 if the arguments are invalid, and with status 0 after ``--help`` and
            ``--print-completion``.
    """
    try:
        return _flushed(argv)
    except BrokenPipeError:
        if not output.discard_unread():
            raise
        return 141  # the status that a shell gives a process which the signal SIGPIPE ended


def _flushed(argv: Sequence[str] | None) -> int:
    try:
        return _parsed(argv)
    finally:
        if sys.stdout:  # there is none if the shell closed it
            sys.stdout.flush()  # a closed pipe is noticed here, and not when Python ends


def _parsed(argv: Sequence[str] | None) -> int:
    parser = _parser()
    words = _joined(sys.argv[1:] if argv is None else argv)
    args, unknown = parser.parse_known_args(words)
    if unknown:  # the message names the command, because the options are listed in the command's help
        Parser(prog=f"focuslens {args.command or ''}".strip()).error(f"unrecognized arguments: {' '.join(unknown)}")
    if args.version:
        from importlib.metadata import version

        print(f"focuslens {version('focuslens')}")
        return 0
    if args.command is None:
        parser.print_help()
        return 2
    args.words = words
    return _status(args)


def _status(args: argparse.Namespace) -> int:
    """Run the command, and return the exit status. An error that the user can correct is printed as one line."""
    try:
        paths.check_paths(args)
        output.carry_out(args, _run)
    except BrokenPipeError as error:
        if output.has_readers():  # another pipe broke, such as one to a worker
            return _failed(args, f"a connection to another process broke ({error})")
        raise
    except (ValueError, KeyError, OSError, ImportError) as error:
        message = " ".join(str(error.args[0] if isinstance(error, KeyError) else error).split())
        return _failed(args, message)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        message = " ".join(str(error).split()) or "memory ran out"
        return _failed(args, f"{message}; shorter prompts and --dtype bfloat16 need less")
    except KeyboardInterrupt:
        print(f"\nfocuslens {args.command}: {COMMANDS[args.command].interrupted(args)}", file=sys.stderr)
        return 130
    return 0


def _failed(args: argparse.Namespace, message: str) -> int:
    print(f"focuslens {args.command}: {message}", file=sys.stderr)
    return 1
