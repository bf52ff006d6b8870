"""Self-contained HTML: a page that loads nothing from elsewhere, and a page inside another page."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib import resources
from typing import Any

__all__ = ["asset", "data_block", "inner_page", "page"]

# With this policy the browser blocks everything that is not in the file. A page looks the same with and without a
# network. Markup in a token cannot send data anywhere.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


@cache
def asset(name: str) -> str:
    """Text of one of this package's style sheets or scripts, by file name."""
    return (resources.files("focuslens.viz") / "assets" / name).read_text(encoding="utf-8")


def page(title: str, body: str, *, css: str = "", scripts: Sequence[str] = ()) -> str:
    """A complete HTML document, with a content security policy that blocks everything outside the file.

    Args:
        title: Title as plain text, which this function escapes.
        body: Content as HTML, in which the caller has escaped all text.
        css: Text of the page's style sheet.
        scripts: Source code of the scripts that run after the body.
    """
    code = "".join(f"<script>{source}</script>\n" for source in scripts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n{body}\n{code}</body>\n</html>\n"
    )


def data_block(content: Any) -> str:
    """An element with data for the page's own script. No text in the data can end the element.

    Raises:
        ValueError: If a number is NaN or infinite, which JSON does not have.
    """
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="data">{text}</script>'


def inner_page(document: str, *, title: str, height: int) -> str:
    """An ``iframe`` with a whole document, whose scripts and styles stay separate from those of the page around it.

    The document has an origin of its own, so it can neither read nor change the page around it.

    Args:
        document: HTML of a complete page.
        title: Description of the content, for screen readers.
        height: Height in CSS pixels. The browser limits it to nine tenths of the screen.
    """
    return (
        f'<iframe title="{escape(title)}" sandbox="allow-scripts" '
        f'style="width:100%;height:min({height}px,90vh);border:0;border-radius:8px" '
        f'srcdoc="{escape(document)}"></iframe>'
    )
