"""HTML that stands alone: the frame of a page that cannot load anything, and of a page within a page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib import resources
from typing import Any

__all__ = ["asset", "data_block", "inner_page", "page"]

# The browser itself refuses whatever is not in the file: a page opens the same with and without a network, and a token
# that happens to hold markup can reach no one.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


@cache
def asset(name: str) -> str:
    """A style sheet or script of this package, by its file name."""
    return (resources.files("focuslens.viz") / "assets" / name).read_text(encoding="utf-8")


def page(title: str, body: str, *, css: str = "", scripts: Sequence[str] = ()) -> str:
    """A complete HTML document, under a content security policy that allows nothing from outside the file.

    Args:
        title: Plain text; escaped here.
        body: HTML; whatever text it was made of must have been escaped already.
        css: The page's style sheet.
        scripts: Sources of scripts that run when the body is there.
    """
    code = "".join(f"<script>{source}</script>\n" for source in scripts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n{body}\n{code}</body>\n</html>\n"
    )


def data_block(content: Any) -> str:
    """An element that holds data for the page's own script; no text in it can end it.

    Raises:
        ValueError: If a number is NaN or infinite, which JSON does not have.
    """
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="data">{text}</script>'


def inner_page(document: str, *, title: str, height: int) -> str:
    """An ``iframe`` that holds a whole document, so that its scripts and styles and those around it stay apart.

    What is inside has an origin of its own: it can neither read nor change the page around it.

    Args:
        document: HTML of a complete page.
        title: What the frame shows, for those who cannot see it.
        height: In CSS pixels; on a lower screen nine tenths of it.
    """
    return (
        f'<iframe title="{escape(title)}" sandbox="allow-scripts" '
        f'style="width:100%;height:min({height}px,90vh);border:0;border-radius:8px" '
        f'srcdoc="{escape(document)}"></iframe>'
    )
