"""HTML fragments for notebooks: tables, bars and maps, legible on light and dark backgrounds, without scripts."""

from __future__ import annotations

import math
import struct
import zlib
from base64 import b64encode
from collections.abc import Sequence
from html import escape
from typing import TypeAlias

__all__ = ["Cell", "Markup", "bar", "card", "details", "map_image", "shorten", "table"]

_LINE = "1px solid rgba(128,128,128,.35)"
_CELL = f"padding:2px 8px;border:0;border-bottom:{_LINE};text-align:"
_BLUE, _ORANGE = "rgba(0,114,178,.75)", "rgba(213,94,0,.9)"
# Dark, middle and light colours of a map, similar to matplotlib's cividis, and the colour of missing values.
_DARK, _MIDDLE, _LIGHT, _MISSING = (0, 34, 78), (124, 123, 120), (254, 232, 56), (187, 187, 187)


class Markup(str):
    """String of HTML that is inserted unchanged. Plain strings are escaped."""


Cell: TypeAlias = str | int | float
"""Content of a table cell: text or a number. Columns of numbers are right-aligned."""


def _html(cell: Cell) -> str:
    if isinstance(cell, Markup):
        return str(cell)
    if isinstance(cell, float):
        return "-" if math.isnan(cell) else f"{cell:.3f}"
    return escape(str(cell))


def shorten(text: str, max_length: int = 100) -> str:
    """Text on one line, cut to at most ``max_length`` characters."""
    line = " ".join(text.split())
    return line if len(line) <= max_length else line[: max_length - 1] + "…"


def card(title: str, *parts: Markup) -> str:
    """HTML display of an object in a notebook: a bold title above the parts."""
    return f'<div style="font-size:13px;line-height:1.45"><div><b>{escape(title)}</b></div>{"".join(parts)}</div>'


def details(summary: str, *parts: Markup) -> Markup:
    """HTML parts that stay hidden until the summary is clicked."""
    inside = "".join(parts)
    return Markup(f'<details><summary style="cursor:pointer">{escape(summary)}</summary>{inside}</details>')


def table(columns: Sequence[str], rows: Sequence[Sequence[Cell]], caption: str = "") -> Markup:
    """HTML table. Columns of numbers are right-aligned. Floats have three decimals. :class:`Markup` is not escaped."""

    def line(tag: str, cells: Sequence[Cell]) -> str:
        parts: list[str] = []
        for column, cell in enumerate(cells):
            numeric = rows and all(isinstance(row[column], int | float) for row in rows)
            parts.append(f'<{tag} style="{_CELL}{"right" if numeric else "left"}">{_html(cell)}</{tag}>')
        return f"<tr>{''.join(parts)}</tr>"

    head = f'<caption style="text-align:left;opacity:.75">{escape(caption)}</caption>' if caption else ""
    body = "".join(line("td", row) for row in rows)
    style = "border-collapse:collapse;font-variant-numeric:tabular-nums;margin:4px 0"
    return Markup(f'<table style="{style}">{head}<thead>{line("th", columns)}</thead><tbody>{body}</tbody></table>')


def bar(value: float, low: float | None = None, high: float | None = None, *, full: float = 1.0) -> Markup:
    """Horizontal bar with its number beside it. A thin line over the bar shows the number's interval, if there is one.

    Args:
        value: Number that the bar shows.
        low: Lower end of the number's interval.
        high: Upper end of the number's interval.
        full: Number at which the bar is full.
    """
    if math.isnan(value):
        return Markup("-")

    def share(number: float) -> float:
        return 100 * min(1.0, max(0.0, number / full)) if full > 0 else 0.0

    interval, line = "", ""
    if low is not None and high is not None:
        interval = f" [{low:.3f}, {high:.3f}]"
        ends = f"left:{share(low):.1f}%;width:{max(0.5, share(high) - share(low)):.1f}%"
        line = f'<span style="position:absolute;top:5px;height:2px;{ends};background:{_ORANGE}"></span>'
    track = "display:inline-block;position:relative;width:90px;height:12px;margin-right:6px;vertical-align:middle"
    filled = f"position:absolute;left:0;top:0;height:12px;width:{share(value):.1f}%;background:{_BLUE}"
    return Markup(
        f'<span style="{track};background:rgba(128,128,128,.18)"><span style="{filled}"></span>{line}</span>'
        f"{value:.3f}{interval}"
    )


def map_image(values: Sequence[Sequence[float]], alt: str, *, size: int = 12) -> Markup:
    """Image with one square per number: dark for 0, light for the largest number, grey for a missing number.

    Args:
        values: Numbers in each row of the image, top row first.
        alt: Description of the image for screen readers.
        size: Width of a square in pixels. Large maps get smaller squares.
    """
    finite_values = [value for row in values for value in row if math.isfinite(value)]
    top = max(finite_values, default=0.0) or 1.0
    pixels = b"".join(b"\0" + b"".join(bytes(_colour(value / top)) for value in row) for row in values)
    width, height = len(values[0]), len(values)

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    head = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    png = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", head) + chunk(b"IDAT", zlib.compress(pixels, 9)) + chunk(b"IEND", b"")
    square = max(4, min(size, 480 // max(width, height)))
    style = f"width:{square * width}px;height:{square * height}px;image-rendering:pixelated;margin:4px 0"
    data = b64encode(png).decode()
    return Markup(f'<img alt="{escape(alt)}" style="{style}" src="data:image/png;base64,{data}">')


def _colour(share: float) -> tuple[int, int, int]:
    if not math.isfinite(share):
        return _MISSING
    share = min(1.0, max(0.0, share))
    low, high, at = (_DARK, _MIDDLE, 2 * share) if share < 0.5 else (_MIDDLE, _LIGHT, 2 * share - 1)
    red, green, blue = (round(a + (b - a) * at) for a, b in zip(low, high, strict=True))
    return red, green, blue
