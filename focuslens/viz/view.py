"""Attention views as single HTML pages."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from focuslens.util.files import write_atomically
from focuslens.viz.page import inner_page

__all__ = ["AttentionView", "visible"]

_LONGEST_TOKEN = 24
_SIGNS = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})


@dataclass(frozen=True)
class AttentionView:
    """Attention view as one HTML page that loads nothing from the network.

    A notebook displays the view if it is the last expression of a cell. :meth:`save` writes the page to a file.

    Args:
        html: The complete page.
        title: Description of the content, as plain text.
        height: Height of the view inside another page, in CSS pixels.
    """

    html: str
    title: str = "Attention"
    height: int = 900

    def __repr__(self) -> str:
        return f"AttentionView({self.title!r}, {len(self.html):,} characters of HTML)"

    def _repr_html_(self) -> str:
        return inner_page(self.html, title=self.title, height=self.height)

    def save(self, path: str | Path) -> Path:
        """Write the page to a file atomically, and return its path."""
        path = Path(path)
        write_atomically(path, self.html.encode())
        return path


def visible(token: str) -> str:
    """Token as one short line of text. Symbols replace line breaks and tabs, and a long token is truncated."""
    text = token.translate(_SIGNS)
    return text if len(text) <= _LONGEST_TOKEN else text[: _LONGEST_TOKEN - 1] + "…"
