"""Options for the texts and tokens that end a response: ``--stop``, ``--no-stop`` and ``--stop-token``.

``focuslens --help`` imports this module. The module therefore imports no slow libraries.
"""

from __future__ import annotations

import argparse
import re
from typing import Any

__all__ = ["add_stop_tokens", "add_stops", "stop_string", "stop_token"]

_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


def stop_string(text: str) -> str:
    r"""Parse a stop string, in which ``\n``, ``\t`` and ``\\`` stand for a new line, a tab and a backslash.

    Raises:
        argparse.ArgumentTypeError: If the text is empty, or a backslash is followed by something else.
    """
    if not text:
        raise argparse.ArgumentTypeError("the stop string is empty; give --no-stop for no stop strings")
    return re.sub(r"\\(.?)", _unescaped, text, flags=re.DOTALL)


def _unescaped(escape: re.Match[str]) -> str:
    if escape[1] not in _ESCAPES:
        raise argparse.ArgumentTypeError(f"{escape.string!r} has {escape[0]!r}, which is none of \\n, \\t and \\\\")
    return _ESCAPES[escape[1]]


def stop_token(text: str) -> int | str:
    """Parse a stop token: the id of a token, or a token of the vocabulary, such as ``<|im_end|>``.

    Raises:
        argparse.ArgumentTypeError: If the text is empty.
    """
    if not text:
        raise argparse.ArgumentTypeError("the stop token is empty; give an id, or a token such as '<|im_end|>'")
    return int(text) if text.isdecimal() else text


def add_stops(group: Any, default: str) -> None:
    """Add ``--stop`` and ``--no-stop``. ``default`` describes the stop strings without these options."""
    group.add_argument(
        "--stop",
        type=stop_string,
        action="append",
        metavar="TEXT",
        help=f"text that ends a response, such as '\\n'; repeatable; default: {default}",
    )
    group.add_argument("--no-stop", dest="stop", action="store_const", const=[], help="no text ends a response")


def add_stop_tokens(group: Any) -> None:
    """Add ``--stop-token``."""
    group.add_argument(
        "--stop-token",
        type=stop_token,
        action="append",
        metavar="TOKEN",
        help="token that ends a response: an id, or a token of the vocabulary that is no number; repeatable; "
        "default: those of the checkpoint's generation config, or the tokenizer's end of text",
    )
