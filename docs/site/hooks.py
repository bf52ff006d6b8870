"""Steps of `mkdocs build` beyond Markdown: links out of the site, references in docstrings, the model's card."""

from __future__ import annotations

import base64
import re
from functools import cache
from importlib import resources
from io import BytesIO
from itertools import chain
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
CARD = ROOT / "focuslens" / "assets" / "demo" / "README.md"

_COMMENT = re.compile(r"^<!--(?! the embedded model's card).*?-->\n?", flags=re.DOTALL | re.MULTILINE)
_CARD_HERE = "<!-- the embedded model's card -->"
_CHARACTERS = (
    range(0x20, 0x7F),
    range(0x391, 0x3CA),  # Greek
    range(0x2032, 0x2034),  # primes
    range(0x2200, 0x22FF),  # operators
    range(0x1D434, 0x1D468),  # italic letters
    [0x210E],  # italic h
    range(0x1D6E2, 0x1D71C),  # italic Greek
)
_LINK = re.compile(r"\[(?P<text>[^\]]*)\]\((?P<path>\.\./[^)#]+)(#[^)]*)?\)")
_ROLE = re.compile(r":(?:func|class|meth|data|attr|mod):<code>~?\.?(?P<name>[\w.]+)</code>")


def on_page_markdown(markdown: str, *, page: Any, config: Any, **_: Any) -> str:
    """Insert the model's card, drop comments (which the tests read), and replace links to files outside the site."""
    folder = Path(page.file.abs_src_path).parent
    markdown = markdown.replace(_CARD_HERE, card())
    return _LINK.sub(lambda link: _plain(link, folder, Path(config["docs_dir"])), _COMMENT.sub("", markdown))


def on_page_content(html: str, **_: Any) -> str:
    """Turn Sphinx's roles in docstrings (``:func:`name```) into links to the reference."""
    return _ROLE.sub(_reference, html)


def card(path: Path = CARD) -> str:
    """The text of the embedded model's card, with headings one level lower, so that a page can contain it."""
    _, _, text = path.read_text(encoding="utf-8").partition("\n# ")
    if not text:
        raise ValueError(f"{path} is not a model card: it has no title")
    return re.sub("^#", "##", text.partition("\n")[2].strip(), flags=re.MULTILINE)


def on_post_build(*, config: Any, **_: Any) -> None:
    """Write the font of equations into a style sheet, because a reader's fonts may lack glyphs for MathML."""
    rule = f'@font-face {{ font-family: "Mathematics"; src: url(data:font/woff;base64,{font()}) }}\n'
    Path(config["site_dir"], "site", "mathematics.css").write_text(rule, encoding="utf-8")


def font() -> str:
    """A font with the characters of STIX Two Math that equations use, as WOFF in base64.

    The font has the SIL Open Font License and comes with ziamath.
    """
    from fontTools.subset import Options, Subsetter
    from fontTools.ttLib import TTFont

    math_font = TTFont(str(resources.files("ziamath") / "fonts" / "STIXTwoMath-Regular.ttf"))
    subsetter = Subsetter(Options(layout_features=["*"], notdef_outline=True))
    subsetter.populate(unicodes=chain(*_CHARACTERS))
    subsetter.subset(math_font)
    math_font.flavor = "woff"
    content = BytesIO()
    math_font.save(content)
    return base64.b64encode(content.getvalue()).decode()


def _plain(link: re.Match[str], folder: Path, docs: Path) -> str:
    """Replace a link to a file outside the site with the path of that file; mkdocs reports links to missing files."""
    target = (folder / link["path"]).resolve()
    if target.is_relative_to(docs) or not target.exists():
        return link[0]
    path = target.relative_to(ROOT).as_posix()
    return link["text"] if path in link["text"] else f"{link['text']} (`{path}`)"


def _reference(role: re.Match[str]) -> str:
    name = role["name"].rpartition(".")[2]
    path = _documented().get(name)
    code = f"<code>{name}</code>"
    return code if path is None else f'<autoref identifier="{path}">{code}</autoref>'


@cache
def _documented() -> dict[str, str]:
    """Full path of every name in the reference; a function named like its module has the name in its path twice."""
    pages = (page.read_text(encoding="utf-8") for page in (ROOT / "docs" / "reference").glob("*.md"))
    paths = (path for page in pages for path in re.findall(r"^::: (\S+)$", page, flags=re.MULTILINE))
    return {path.rpartition(".")[2]: path for path in paths}
