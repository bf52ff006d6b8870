"""Shell completion of commands, options and paths, by shtab.

shtab takes longer to import than the rest of the help. It is imported only to print a script.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from typing import Any

__all__ = ["SHELLS", "PrintCompletion", "complete_paths"]

SHELLS = ("bash", "zsh", "tcsh", "fish", "powershell")
"""Shells that shtab writes scripts for."""


def complete_paths(option: argparse.Action, kind: str) -> None:
    """Mark an option whose value the shell completes: ``kind`` is ``FILE`` or ``DIRECTORY``, a name in shtab."""
    option.complete = kind  # pyright: ignore[reportAttributeAccessIssue]


class PrintCompletion(argparse.Action):
    """Option that prints the completion script of its parser for a shell, and stops."""

    def __init__(self, option_strings: Sequence[str], dest: str, **settings: Any) -> None:
        super().__init__(option_strings, argparse.SUPPRESS, default=argparse.SUPPRESS, choices=SHELLS, **settings)

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: Any, option_string: Any = None
    ) -> None:
        """Print the script, and exit with status 0."""
        import shtab

        for action in _actions(parser):
            kind = getattr(action, "complete", None)
            if kind is not None:
                action.complete = getattr(shtab, kind)  # pyright: ignore[reportAttributeAccessIssue]
        print(shtab.complete(parser, values))
        parser.exit(0)


def _actions(parser: argparse.ArgumentParser) -> list[argparse.Action]:
    """The options of a parser and of its subcommands' parsers."""
    actions = list(parser._actions)
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):  # pyright: ignore[reportPrivateUsage]
            actions += [inner for subparser in action.choices.values() for inner in _actions(subparser)]
    return actions
