"""Inspection of HTML pages without a browser: their elements, their external resources, and their data."""

from __future__ import annotations

import json
import re
from html.parser import HTMLParser
from typing import Any

__all__ = ["Elements", "data_of", "loads", "stands_alone"]


class Elements(HTMLParser):
    """Every element of a page with its attributes, and the text outside scripts and styles."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str | None]]] = []
        self.text = ""
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data: str) -> None:
        if self.cdata_elem is None:
            self.text += data

    def named(self, tag: str) -> list[dict[str, str | None]]:
        return [attributes for name, attributes in self.elements if name == tag]


def loads(html: str) -> list[str]:
    """Every external resource that a page would load, including those of embedded pages."""
    found = re.findall(r"""@import|url\(\s*['"]?(?!data:)[^)]+""", html)
    # Static and dynamic module imports by URL. The bundled library contains neither.
    found += re.findall(r"""(?:\bfrom|\bimport)\s*\(?\s*["'](?:https?:)?//[^"']+""", html)
    for tag, attributes in Elements(html).elements:
        for name in ("src", "href", "data", "poster", "action", "srcset"):
            value = attributes.get(name)
            # A link to a file next to the page is not a load.
            beside = tag == "a" and value and "//" not in value
            if value and not beside and not value.startswith(("data:", "#")):
                found.append(f"{tag} {name}={value}")
        if attributes.get("srcdoc"):
            found += loads(attributes["srcdoc"] or "")
    return found


def stands_alone(html: str) -> bool:
    policy = re.search(r'http-equiv="Content-Security-Policy" content="([^"]+)"', html)
    return bool(policy) and policy.group(1).startswith("default-src 'none'") and not loads(html)


def data_of(html: str) -> dict[str, Any]:
    """Data that the page's script draws."""
    found = re.search(r'<script type="application/json" id="data">(.*?)</script>', html, flags=re.DOTALL)
    assert found, "the page holds no data"
    return json.loads(found.group(1))
