"""What `mkdocs build` does to pages beyond Markdown: links out of the site, references in docstrings, measured figures."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
CARD = ROOT / "focuslens" / "assets" / "demo" / "README.md"

_COMMENT = re.compile(r"^<!--(?!.*measured on the embedded model).*?-->\n?", flags=re.DOTALL | re.MULTILINE)
_MEASURED = "<!-- measured on the embedded model -->"
_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<path>\.\./[^)#]+)(#[^)]*)?\)")
_ROLE = re.compile(r":(?:func|class|meth|data|attr|mod):<code>~?\.?(?P<name>[\w.]+)</code>")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Fill in measured figures, drop comments (they are for the tests), and name files that the site does not hold."""
    folder = Path(page.file.abs_src_path).parent
    markdown = markdown.replace(_MEASURED, measured())
    return _LINK.sub(lambda link: _plain(link, folder, Path(config["docs_dir"])), _COMMENT.sub("", markdown))


def on_page_content(html: str, **_: Any) -> str:
    """Make Sphinx's roles in docstrings (``:func:`name```) links into the reference."""
    return _ROLE.sub(_reference, html)


def measured(card: Path = CARD) -> str:
    """What the embedded model's card says under "Measured": it is written by the script that measures."""
    found = re.search(r"^## Measured\n+(.*?)(?=^## |\Z)", card.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    if found is None:
        raise ValueError(f"{card} has no part called 'Measured'; experiments/measure_demo_model.py writes it")
    return found.group(1).strip()


def _plain(link: re.Match[str], folder: Path, docs: Path) -> str:
    """A link to a file of the repository as its path; one that leads nowhere stays, for mkdocs to complain of."""
    target = (folder / link["path"]).resolve()
    if target.is_relative_to(docs) or not target.exists():
        return link[0]
    path = target.relative_to(ROOT).as_posix()
    return link["text"] if path in link["text"] else f"{link['text']} (`{path}`)"


def _reference(role: re.Match[str]) -> str:
    name = role["name"]
    shown, full = name.rsplit(".", 1)[-1], name if name.startswith("focuslens.") else f"focuslens.{name}"
    return f'<autoref optional identifier="{full}"><code>{shown}</code></autoref>'
