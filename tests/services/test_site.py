"""The site builds without warnings, opens from disk, makes no external requests, and reports measured numbers."""

from __future__ import annotations

import json
import os
import re
import runpy
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import TYPE_CHECKING, Any

import pytest

from tests.support.paths import ROOT

if TYPE_CHECKING:
    from tests.support.browser import Browser

DEMO = ROOT / "focuslens" / "assets" / "demo"


@pytest.fixture(scope="module")
def hooks() -> SimpleNamespace:
    return SimpleNamespace(**runpy.run_path(str(ROOT / "docs" / "site" / "hooks.py")))


@pytest.fixture(scope="module")
def site(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The site built in the way that ``make docs`` builds it. With ``--strict``, a warning fails the build."""
    for package in ("mkdocs", "material", "mkdocstrings_handlers.python", "l2m4m"):
        pytest.importorskip(package, reason="what builds the site is not installed: pip install 'focuslens[docs]'")
    out = tmp_path_factory.mktemp("site")
    command = [sys.executable, "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(out)]
    environment = {**os.environ, "NO_MKDOCS_2_WARNING": "1"}
    built = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)
    assert built.returncode == 0, built.stdout + built.stderr
    assert not built.stdout + built.stderr
    return out


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    from tests.support.browser import chromium

    with chromium() as opened:
        yield opened


def html_of(site: Path, page: str) -> str:
    return (site / page).read_text(encoding="utf-8")


def test_every_page_is_in_the_site_and_nothing_else(site: Path) -> None:
    sources = {page.relative_to(ROOT / "docs").with_suffix(".html") for page in (ROOT / "docs").rglob("*.md")}
    built = {page.relative_to(site) for page in site.rglob("*.html") if page.name != "404.html"}
    assert built == sources
    assert not list(site.rglob("*.py"))


def test_pages_load_nothing_from_elsewhere(site: Path) -> None:
    for page in site.rglob("*.html"):
        loaded = re.findall(r"<(?:script|link|img|iframe)\b[^>]*?(?:src|href)=\"?([^\s\">]+)", page.read_text())
        outside = [address for address in loaded if re.match(r"(?:https?:)?//", address)]
        assert not outside, f"{page}: {outside}"


def test_equations_are_mathematics_without_a_script(site: Path) -> None:
    concepts = html_of(site, "concepts.html")
    source = re.sub(r"```.*?```", "", (ROOT / "docs" / "concepts.md").read_text(), flags=re.DOTALL)
    displayed = len(re.findall(r"^\$\$\n.*?^\$\$", source, flags=re.DOTALL | re.MULTILINE))
    assert concepts.count('<math display="block"') == displayed >= 3
    assert "mathjax" not in concepts.lower()
    assert not re.search(r"\$[A-Za-z\\]", re.sub(r"<(pre|script|code)\b.*?</\1>", "", concepts, flags=re.DOTALL))


def test_comments_for_the_tests_are_not_in_the_pages(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.search(r"<!-- (?:given|not run)", page.read_text()), page


def test_references_in_docstrings_are_links(site: Path) -> None:
    for page in site.rglob("*.html"):
        assert not re.search(r":(?:func|class|meth|data|attr|mod):", page.read_text()), page
    reference = html_of(site, "reference/interventions.html")
    assert re.search(r'see <a [^>]*href="#focuslens\.[\w.]*split_softmax"[^>]*><code>split_softmax</code>', reference)
    assert "doc-symbol-module" not in "".join(page.read_text() for page in site.glob("reference/*.html"))


def test_what_reproduces_has_every_figure_that_was_measured(site: Path) -> None:
    """The page shows the embedded model's accuracies, which the build inserts from the file of measurements."""
    measured: dict[str, Any] = json.loads((DEMO / "measured.json").read_text())
    page = html_of(site, "reproduction.html")
    rows = [row for value in measured.values() for row in (value if isinstance(value, list) else [value])]
    accuracies = [measured["split_softmax"], measured["off"], *measured["baselines"]]
    assert all(row in rows for row in accuracies)
    for row in accuracies:
        assert f"{row['em']:.3f} ({row['em_low']:.3f} to {row['em_high']:.3f})" in page
    source = (ROOT / "docs" / "reproduction.md").read_text()
    assert not re.search(r"\b0\.\d", source), "figures of a run belong in its file, not in the page"


def test_links_to_files_that_the_site_does_not_hold_become_their_paths(hooks: SimpleNamespace, tmp_path: Path) -> None:
    class File:
        abs_src_path = str(ROOT / "docs" / "gpu.md")

    class Page:
        file = File

    def shown(text: str) -> str:
        return hooks.on_page_markdown(text, page=Page, config={"docs_dir": str(ROOT / "docs")})

    assert shown("[the bench](../experiments/bench.py)") == "the bench (`experiments/bench.py`)"
    assert shown("[`experiments/bench.py`](../experiments/bench.py)") == "`experiments/bench.py`"
    assert shown("[gone](../experiments/gone.py)") == "[gone](../experiments/gone.py)"
    assert shown("[x](bench.md)") == "[x](bench.md)"
    assert shown("a\n\n<!-- not run: why -->\n\n```python\n") == "a\n\n\n```python\n"
    card = tmp_path / "README.md"
    card.write_text("no title")
    with pytest.raises(ValueError, match="not a model card"):
        hooks.card(card)


@pytest.mark.parametrize("width", [1200, 390])
@pytest.mark.parametrize("page", ["index", "concepts", "reference/interventions", "errors", "gotchas", "reproduction"])
def test_a_page_opens_from_disk_without_a_request_or_an_error(
    site: Path, browser: Browser, page: str, width: int
) -> None:
    browser.open(site / f"{page}.html", width=width)
    browser.until(lambda: browser.run("return document.querySelector('h1').offsetHeight") > 0)
    assert browser.problems() == []
    assert browser.overflow() == 0


def test_the_search_finds_a_name(site: Path, browser: Browser) -> None:
    browser.open(site / "index.html")
    browser.run("document.querySelector('[data-md-toggle=search]').click()")
    field = browser.one("input.md-search__input")
    browser.until(field.is_displayed)
    field.send_keys("SplitSoftmax")
    browser.until(lambda: len(browser.all(".md-search-result__item")) > 0)
    assert "SplitSoftmax" in browser.text(".md-search-result__list")
    assert browser.problems() == []
