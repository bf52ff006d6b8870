"""HTML that stands alone: the frame of a page that cannot load anything, and of a page within a page."""

from __future__ import annotations

from html import escape

__all__ = ["inner_page", "page"]

# The browser itself refuses whatever is not in the file: a page opens the same with and without a network, and a token
# that happens to hold markup can reach no one.
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data:"


def page(title: str, body: str, *, css: str = "") -> str:
    """A complete HTML document, under a content security policy that allows nothing from outside the file.

    Args:
        title: Plain text; escaped here.
        body: HTML; whatever text it was made of must have been escaped already.
        css: The page's style sheet.
    """
    return (
        '<!DOCTYPE html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        f'<meta http-equiv="Content-Security-Policy" content="{_POLICY}">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{escape(title)}</title>\n<style>{css}</style>\n</head>\n<body>\n{body}\n</body>\n</html>\n"
    )


def inner_page(document: str, *, title: str, height: int) -> str:
    """An ``iframe`` that holds a whole document, so that its scripts and styles and those around it stay apart.

    Args:
        document: HTML of a complete page.
        title: What the frame shows, for those who cannot see it.
        height: In CSS pixels; on a lower screen nine tenths of it.
    """
    return (
        f'<iframe title="{escape(title)}" '
        f'style="width:100%;height:min({height}px,90vh);border:0;border-radius:8px;background:#fff" '
        f'srcdoc="{escape(document)}"></iframe>'
    )
