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
    """A parser that prints each error as one line, which refers to ``--help`` for the options."""

    def error(self, message: str) -> NoReturn:
        """Print the error, and exit with status 2."""
        print(f"{self.prog}: {message}; {self.prog} --help lists the options", file=sys.stderr)
        sys.exit(2)


@dataclass(frozen=True)
class Command:
    """A command, defined at the end of its own module.

    ``focuslens --help`` imports the modules of all commands. Slow libraries, such as torch and pandas, are therefore
    imported inside functions only.

    Attributes:
        name: The word after ``focuslens``.
        help: Text for the command in the list of all commands.
        description: Text at the top of the command's own help.
        example: Complete command line, shown at the end of the command's own help.
        add_options: Function that adds the command's options to a parser.
        run: Function that runs the command and returns the content of its result files; see :func:`output.document`.
    """

    name: str
    help: str
    description: str
    example: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], dict[str, Any]]

    def add_to(self, commands: argparse._SubParsersAction[Parser]) -> None:  # pyright: ignore[reportPrivateUsage]
        """Add the command's parser to the parsers of all commands."""
        parser = commands.add_parser(
            self.name,
            help=self.help,
            description=self.description,
            epilog=f"example: {self.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_options(parser)
        output.add_options(parser)
