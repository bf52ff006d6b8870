"""Definition of a ``focuslens`` command: name, help, options, and the function that runs the command."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from focuslens.cli import output

if TYPE_CHECKING:
    from _typeshed import SupportsWrite

__all__ = ["Command", "Parser"]


class Parser(argparse.ArgumentParser):
    """Argument parser that prints an error as one line. The line refers to ``--help`` for the options."""

    def error(self, message: str) -> NoReturn:
        """Print the error, and exit with status 2."""
        print(f"{self.prog}: {message}; {self.prog} --help lists the options", file=sys.stderr)
        sys.exit(2)

    def _print_message(self, message: str, file: SupportsWrite[str] | None = None) -> None:
        """Print a message. argparse ignores a closed pipe here; ``main`` ends with the status of a closed pipe."""
        stream = file or sys.stderr
        if message and stream:
            stream.write(message)


@dataclass(frozen=True)
class Command:
    """Command of ``focuslens``. Each command is defined at the end of a separate module.

    ``focuslens --help`` imports the modules of all commands. Slow libraries, such as torch and pandas, are therefore
    imported only inside functions.

    Attributes:
        name: Name of the command on the command line, after ``focuslens``.
        help: Short description in the list of all commands.
        description: Text at the top of the page that ``focuslens NAME --help`` prints.
        example: Complete command line, shown at the end of the page that ``focuslens NAME --help`` prints.
        add_options: Function that adds the command's options to a parser.
        run: Function that runs the command and returns the content of its result files; see :func:`output.document`.
        resumes: When an interrupted run continues where it stopped, if the same command is given again: ``always``, for
            commands that always write to a directory, ``with --out`` or ``never``.
    """

    name: str
    help: str
    description: str
    example: str
    add_options: Callable[[argparse.ArgumentParser], None]
    run: Callable[[argparse.Namespace], dict[str, Any]]
    resumes: Literal["never", "with --out", "always"] = "never"

    def interrupted(self, args: argparse.Namespace) -> str:
        """Message after a keyboard interrupt."""
        if self.resumes == "never":
            return "interrupted"
        if self.resumes == "with --out" and not args.out:
            return "interrupted; nothing was written. With --out, an interrupted command can be resumed"
        return "interrupted; the same command resumes here"

    def add_to(self, commands: argparse._SubParsersAction[Parser]) -> None:  # pyright: ignore[reportPrivateUsage]
        """Add the command's parser to ``commands``, the subparsers of ``focuslens``."""
        parser = commands.add_parser(
            self.name,
            help=self.help,
            description=self.description,
            epilog=f"example: {self.example}",
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        self.add_options(parser)
        output.add_options(parser)
