"""Values of options: lists of numbers and of names, and ``NAME=VALUE``; and an option that several commands have."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable
from typing import Any, NoReturn, TypeVar

__all__ = ["Parser", "add_device_map", "integers", "names", "numbers", "pair"]


_T = TypeVar("_T")


class Parser(argparse.ArgumentParser):
    """A parser that says what is wrong in one line; the options are what ``--help`` is for."""

    def error(self, message: str) -> NoReturn:
        """Say what is wrong with the command line, and stop with status 2."""
        print(f"{self.prog}: {message}; {self.prog} --help lists the options", file=sys.stderr)
        sys.exit(2)


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


def add_device_map(group: Any) -> None:
    """``--device-map``, to an argument group."""
    group.add_argument(
        "--device-map", help="in place of --device, for a model that does not fit one: auto, balanced, sequential"
    )
