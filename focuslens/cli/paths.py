"""Checks of the paths in a command's options, before any slow library is imported and before any work.

Each check takes an option's value and raises an error that says what is wrong with it. :func:`check_paths` puts the
option in front of the message, as it was typed.
"""

from __future__ import annotations

import argparse
import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, TypeAlias

from focuslens.util.estimates import note_place

__all__ = [
    "Check",
    "check_paths",
    "checkpoint",
    "data_file",
    "default_out",
    "directions",
    "input_directory",
    "input_file",
    "output_directory",
    "output_file",
    "prompt",
    "ranking",
    "remember",
    "settings_file",
    "template",
]

Check: TypeAlias = Callable[[str], None]
"""Check of an option's value. It raises ``ValueError`` or ``OSError`` if the value cannot be used."""

_CHECKS = "checked_paths"


def remember(group: Any, action: argparse.Action, check: Check) -> None:
    """Let :func:`check_paths` check the values of an option. ``group`` is the parser, or the group, of the option."""
    known: Sequence[tuple[argparse.Action, Check]] = group.get_default(_CHECKS) or ()
    group.set_defaults(**{_CHECKS: (*known, (action, check))})


def check_paths(args: argparse.Namespace) -> None:
    """Check every path in the parsed options, and the default values of paths too.

    Raises:
        ValueError: If a path cannot be used. The message names the option, or the argument.
    """
    for action, check in getattr(args, _CHECKS, ()):
        value = getattr(args, action.dest)
        for text in [] if value is None else value if isinstance(value, list) else [value]:
            try:
                # The form of a data file depends on other options.
                check_data(args, str(text)) if check is data_file else check(str(text))
            except (ValueError, OSError) as error:
                raise ValueError(f"{_name(action)}: {_reason(error)}") from error


def _name(action: argparse.Action) -> str:
    return action.option_strings[-1] if action.option_strings else str(action.metavar or action.dest)


def _reason(error: Exception) -> str:
    """Message of an error; for an error of the operating system, its path and its text without a number."""
    if isinstance(error, OSError) and error.strerror:
        return f"{error.filename!r}: {error.strerror}" if error.filename else error.strerror
    return str(error)


# Checks


def output_directory(text: str) -> None:
    """Check that a command can write files into a directory, which may not exist yet."""
    path = Path(text)
    if path.exists() and not path.is_dir():
        raise NotADirectoryError(f"{text!r} is a file; name a directory for the results, new or existing")
    _require_writable(path)


def default_out(path: Path, check: Check = output_directory) -> Path:
    """Check the path that a command writes to if ``--out`` is not given, and return it."""
    try:
        check(str(path))
    except OSError as error:
        raise ValueError(f"without --out, results go to {path}: {_reason(error)}") from error
    note_place(path)
    return path


def output_file(text: str) -> None:
    """Check that a command can write a file, whose directory may not exist yet."""
    if Path(text).is_dir():
        raise IsADirectoryError(f"{text!r} is a directory; name a file")
    _require_writable(Path(text).parent)


def _require_writable(directory: Path) -> None:
    there = next(path for path in (directory, *directory.parents, Path()) if path.exists())
    if not there.is_dir():
        raise NotADirectoryError(f"{str(there)!r} is a file, so there can be no {str(directory)!r}; name another")
    try:
        # Permissions do not tell whether a file system can be written to. A directory that is made at once does.
        with tempfile.TemporaryDirectory(prefix=".focuslens-", dir=there):
            pass
    except OSError as error:
        raise PermissionError(f"{str(there)!r} cannot be written to ({error.strerror}); name another") from error


def input_file(text: str) -> None:
    """Check that a file exists and can be read."""
    path = Path(text)
    if path.is_dir():
        raise IsADirectoryError(f"{text!r} is a directory; name a file in it")
    if not path.exists():
        raise FileNotFoundError(f"there is no file {text!r}")
    if not path.is_file():
        raise ValueError(f"{text!r} is no regular file, and it is read more than once; copy it to a file")
    with path.open("rb") as file:
        file.read(1)


def input_directory(text: str) -> None:
    """Check that a directory exists and can be read."""
    path = Path(text)
    if not path.is_dir():
        raise FileNotFoundError(f"{text!r} is a file; name a directory" if path.exists() else _nowhere(text))
    os.scandir(path).close()


def _nowhere(text: str) -> str:
    return f"there is no directory {text!r}"


def ranking(text: str) -> None:
    """Check that a file contains a ranking of heads, or that the name of one that ships with the package is given."""
    from focuslens.util.rankings import ranking_path, read_ranking

    input_file(str(ranking_path(text)))
    read_ranking(text)


def data_file(text: str) -> None:
    """Check that a value is ``synthetic``, or a lost-in-the-middle file with a valid first line."""
    from focuslens.data.selection import SYNTHETIC, check_first_line

    if text != SYNTHETIC:
        check_first_line(text)


def check_data(args: argparse.Namespace, text: str) -> None:
    """Check the first row of a data file. Commands with ``--columns`` also take tables of other forms."""
    if not hasattr(args, "columns"):
        data_file(text)
        return
    from focuslens.data.selection import own_form

    own_form(text, args.columns, args.form)


def template(text: str) -> None:
    """Check that a file contains the wording of prompts."""
    from focuslens.prompts.template import PromptTemplate

    input_file(text)
    PromptTemplate.load(text)


def checkpoint(text: str) -> None:
    """Check that a model's name is a known model, a GGUF file, a local checkpoint, or possibly a name on the hub."""
    from focuslens.model.sources.names import is_gguf, is_known

    if is_gguf(text):
        from focuslens.model.sources.gguf_file import check_gguf

        check_gguf(Path(text))
    elif not is_known(text):
        from focuslens.model.load_errors import require_checkpoint

        require_checkpoint(text)


def directions(text: str) -> None:
    """Check that directions are a directory, the name of shipped directions, or possibly a name on the hub."""
    from focuslens.util.shipped import shipped_directions, shipped_names

    if shipped_directions(text) is not None:
        return
    if Path(text).is_dir():
        input_directory(text)
    elif Path(text).exists():
        raise NotADirectoryError(f"{text!r} is a file; name the directory that holds it")
    elif text.count("/") != 1 or text.startswith((".", "/", "~")):
        names = ", ".join(shipped_names("directions"))
        raise FileNotFoundError(
            f"{_nowhere(text)}; directions are a directory, USER/NAME on the hub, or the name of those that ship with "
            f"FocusLens ({names})"
        )


def settings_file(text: str) -> None:
    """Check that a YAML file of settings exists. Other names are checked when the package's own settings are known."""
    if Path(text).suffix in (".yaml", ".yml"):
        input_file(text)


def prompt(text: str) -> None:
    """Check that a text after ``@`` is the path of a file that contains text."""
    if text.startswith("@"):
        input_file(text[1:])
        Path(text[1:]).read_text(encoding="utf-8-sig")
