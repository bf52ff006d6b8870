"""A command of ``focuslens``: its name, its help, its options, and the function that runs it."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NoReturn

from focuslens.cli import output

__all__ = ["Command", "Parser"]


class Parser(argparse.ArgumentParser):
    """A parser whose errors are one line; ``--help`` lists the options."""

    def error(self, message: str) -> NoReturn:
        """Print the error, and exit with status 2."""
        print(f"{self.prog}: {message}; {self.prog} --help lists the options", file=sys.stderr)
        sys.exit(2)


@dataclass(frozen=True)
class Command:
    """A command, defined at the end of its own module.

    Such a module is imported for ``focuslens --help``, so it imports torch, pandas and the like inside functions only.

    Attributes:
        name: The word after ``focuslens``.
        help: Line in the list of commands.
        description: Head of the command's own help.
        example: Complete command line, at the foot of the help.
        add_options: Adds the command's options to a parser.
        run: Runs the command, and returns the content of its result files; see :func:`output.document`.
    """

    name: str
    help: str
    description: str
    example: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], dict[str, Any]]

    def add_to(self, commands: argparse._SubParsersAction[Parser]) -> None:  # pyright: ignore[reportPrivateUsage]
        """Add the command's parser."""
        parser = commands.add_parser(
            self.name,
            help=self.help,
            description=self.description,
            epilog=f"example: {self.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_options(parser)
        output.add_options(parser)
