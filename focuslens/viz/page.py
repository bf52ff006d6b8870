"""HTML pages that load no other files, and pages embedded in other pages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from functools import cache
from html import escape
from importlib import resources
from typing import Any

__all__ = ["POLICY", "asset", "data_block", "inner_page", "page"]

POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"
"""Content security policy of pages.

It makes the browser block everything outside the file. A page therefore looks the same with and without a network, and
markup in a token cannot send data anywhere.
"""


@cache
def asset(name: str) -> str:
    """Text of a style sheet or script in the folder ``assets`` of this package, by file name."""
    return (resources.files("focuslens.viz") / "assets" / name).read_text(encoding="utf-8")


def page(title: str, body: str, *, css: str = "", scripts: Sequence[str] = ()) -> str:
    """HTML document with a content security policy that blocks everything outside the file.

    Args:
        title: Title as plain text. This function escapes it.
        body: Content as HTML. The caller must escape all text in it.
        css: Text of the page's style sheet.
        scripts: Source code of each script. The scripts come after the body.
    """
    code = "".join(f"<script>{source}</script>\n" for source in scripts)
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n{body}\n{code}</body>\n</html>\n"
    )


def data_block(content: Any) -> str:
    """HTML element that contains data as JSON for the page's script. No text in the data can close the element.

    Raises:
        ValueError: If a number is NaN or infinite, which JSON cannot represent.
    """
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":")).replace("<", "\\u003c")
    return f'<script type="application/json" id="data">{text}</script>'


def inner_page(document: str, *, title: str, height: int) -> str:
    """HTML of an ``iframe`` that embeds a complete document in another page.

    The document's scripts and styles are separate from those of the outer page. The ``iframe`` is sandboxed, so that
    the document can neither read nor change the outer page.

    Args:
        document: HTML of a complete page.
        title: Description of the content, for screen readers.
        height: Height in CSS pixels, limited to nine tenths of the height of the browser window.
    """
    return (
        f'<iframe title="{escape(title)}" sandbox="allow-scripts" '
        f'style="width:100%;height:min({height}px,90vh);border:0;border-radius:8px" '
        f'srcdoc="{escape(document)}"></iframe>'
    )
