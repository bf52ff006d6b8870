"""Values of options: lists of numbers and of names, and ``NAME=VALUE``; and an option that several commands have."""

from __future__ import annotations

import argparse
from typing import Any

__all__ = ["add_device_map", "integers", "names", "numbers", "pair"]


def numbers(text: str) -> list[float]:
    """``-0.2,0.2``."""
    return [float(part) for part in text.split(",")]


def integers(text: str) -> list[int]:
    """``10,20``."""
    return [int(part) for part in text.split(",")]


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
