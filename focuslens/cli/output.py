"""Output streams of a command: results, notes, warnings and, with ``--json``, one JSON document.

Results go to standard output. Notes and warnings go to standard error. A command prints human-readable results, and
returns the content of its result files. With ``--json``, the printed results go to standard error, and only the
returned content goes to standard output. An error that the user can correct is one line on standard error, without a
JSON document.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import select
import sys
import warnings
from collections.abc import Callable, Generator
from contextlib import ExitStack, contextmanager, nullcontext, redirect_stdout
from pathlib import Path
from typing import Any, TextIO

from focuslens.util.notes import MinorWarning

__all__ = ["add_options", "carry_out", "discard_unread", "document", "has_readers"]

_LIBRARY = logging.getLogger("focuslens")
_PACKAGE = str(Path(__file__).parents[1])


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--json``, ``--verbose`` and ``--quiet``, which every command has.

    The options have no default value, because a command and its subcommand (such as ``make-recall``) both have the
    options. A default of the subcommand would overwrite the value that is given to the command.
    """
    group = parser.add_argument_group("output")
    group.add_argument(
        "--json",
        action="store_true",
        default=argparse.SUPPRESS,
        help="results as one JSON document on standard output, as in result files, and nothing else there; "
        "errors stay lines on standard error",
    )
    loudness = group.add_mutually_exclusive_group()
    loudness.add_argument(
        "-v", "--verbose", action="store_true", default=argparse.SUPPRESS, help="details of the work, with their source"
    )
    loudness.add_argument(
        "-q",
        "--quiet",
        action="store_true",
        default=argparse.SUPPRESS,
        help="results and warnings alone: no notes, no progress bars",
    )


def document(content: dict[str, Any], *written: Path | str) -> dict[str, Any]:
    """Content of a command's result files, with the paths of all files that the command wrote."""
    return {**content, "written": [str(path) for path in written]}


def carry_out(args: argparse.Namespace, run: Callable[[argparse.Namespace], dict[str, Any]]) -> None:
    """Run a command with the output streams that ``--json``, ``--verbose`` and ``--quiet`` select."""
    as_json, verbose, quiet = (bool(getattr(args, name, False)) for name in ("json", "verbose", "quiet"))
    with ExitStack() as stack:
        stack.enter_context(_notes(logging.DEBUG if verbose else logging.WARNING if quiet else logging.INFO))
        stack.enter_context(_warnings_as_notes())
        stack.enter_context(_silent_libraries(verbose, bars=sys.stderr.isatty() and not quiet))
        if quiet:
            stack.enter_context(_without_bars())
        if as_json:
            stack.enter_context(redirect_stdout(stack.enter_context(_nowhere()) if quiet else sys.stderr))
        content = run(args)
    if as_json:
        print(json.dumps(content, indent=2, allow_nan=False))


def has_readers() -> bool:
    """Whether standard output and standard error still have a reader, as far as the operating system tells."""
    return not any(map(_is_closed, (sys.stdout, sys.stderr)))


def discard_unread() -> bool:
    """Discard what is written to streams that nobody reads any more, so that Python ends without an error about them.

    The result is whether there is such a stream.
    """
    closed = [stream for stream in (sys.stdout, sys.stderr) if _is_closed(stream)]
    with _nowhere() as nowhere:
        for stream in closed:
            os.dup2(nowhere.fileno(), stream.fileno())
    return bool(closed)


def _is_closed(stream: TextIO | None) -> bool:
    """Whether a stream is a pipe whose other end is closed."""
    if stream is None:
        return False
    try:
        poll = select.poll()
        poll.register(stream.fileno(), 0)
        return any(event & select.POLLERR for _, event in poll.poll(0))
    except (AttributeError, OSError, ValueError):  # no poll on Windows; a stream that is no file has no number
        return False


class _Console(logging.Handler):
    """Log handler that prints lines to standard error, above any progress bars."""

    def emit(self, record: logging.LogRecord) -> None:
        from tqdm import tqdm

        tqdm.write(self.format(record), file=sys.stderr)


class _Line(logging.Formatter):
    """Log format: the message alone for a note, and the level before the message for a warning.

    If ``detailed``, every line begins with the time, the level and the name of the logger.
    """

    def __init__(self, detailed: bool) -> None:
        super().__init__("%(asctime)s %(levelname)-7s %(name)s: %(message)s" if detailed else None)
        self._detailed = detailed

    def format(self, record: logging.LogRecord) -> str:
        text = super().format(record)
        return text if self._detailed or record.levelno < logging.WARNING else f"{record.levelname.lower()}: {text}"


@contextmanager
def _notes(level: int) -> Generator[None]:
    """Print the package's log messages at or above a level, inside a ``with`` block."""
    handler, before, propagated = _Console(), _LIBRARY.level, _LIBRARY.propagate
    handler.setFormatter(_Line(detailed=level <= logging.DEBUG))
    _LIBRARY.addHandler(handler)
    _LIBRARY.setLevel(level)
    # Some libraries that commands import (absl, through rouge-score) make the root logger print every line again.
    _LIBRARY.propagate = False
    try:
        yield
    finally:
        _LIBRARY.removeHandler(handler)
        _LIBRARY.setLevel(before)
        _LIBRARY.propagate = propagated


@contextmanager
def _warnings_as_notes() -> Generator[None]:
    """Log Python warnings inside a ``with`` block: this package's at level warning, minor and others at level debug."""

    def show(
        message: Warning | str,
        category: type[Warning],
        filename: str,
        lineno: int,
        file: TextIO | None = None,
        line: str | None = None,
    ) -> None:
        own = filename.startswith(_PACKAGE)
        minor = not own or issubclass(category, MinorWarning)
        _LIBRARY.log(logging.DEBUG if minor else logging.WARNING, "%s", message if own else f"{filename}: {message}")

    with warnings.catch_warnings():
        # No command calls it. With transformers 5.24, the warning concerns every model.
        warnings.filterwarnings("ignore", message="TransformerLens's own generate ")
        warnings.showwarning = show
        yield


@contextmanager
def _silent_libraries(verbose: bool, *, bars: bool) -> Generator[None]:
    """Hide bars of other libraries unless ``bars``, and transformers' messages below level error unless ``verbose``."""
    from transformers.utils import logging as transformers_logging

    from focuslens.util.library_bars import without_library_bars

    level = transformers_logging.get_verbosity()
    if not verbose:
        transformers_logging.set_verbosity_error()
    try:
        with nullcontext() if bars else without_library_bars():
            yield
    finally:
        transformers_logging.set_verbosity(level)


@contextmanager
def _without_bars() -> Generator[None]:
    """Hide all progress bars of this package, inside a ``with`` block."""
    from focuslens.util.progress import disable_progress_bars, enable_progress_bars, progress_bars_disabled

    before = progress_bars_disabled()
    disable_progress_bars()
    try:
        yield
    finally:
        if not before:
            enable_progress_bars()


@contextmanager
def _nowhere() -> Generator[TextIO]:
    with Path(os.devnull).open("w") as file:
        yield file
