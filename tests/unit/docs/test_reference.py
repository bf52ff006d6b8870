"""Every public name is in the reference exactly once, and every page is linked."""

from __future__ import annotations

import pkgutil
import re
from collections import Counter
from pathlib import Path
from types import ModuleType

import pytest

import focuslens as fl
from tests.support.paths import ROOT
from tests.support.processor_time import shared_work

REFERENCE = ROOT / "docs" / "reference"


def names_on(page: Path) -> list[str]:
    """Names that a page documents. A function that shares its name with a module is listed by its full path."""
    return re.findall(r"^::: (\S+)$", page.read_text(), flags=re.MULTILINE)


def test_every_public_name_is_in_the_reference_once() -> None:
    pytest.importorskip("matplotlib")
    with shared_work():  # the first import of the whole package
        assert all(hasattr(fl, name) for name in fl.__all__)
        assert fl.viz.__all__
    documented = [pkgutil.resolve_name(name) for page in REFERENCE.glob("*.md") for name in names_on(page)]
    public = [getattr(fl, name) for name in fl.__all__] + [getattr(fl.viz, name) for name in fl.viz.__all__]
    assert Counter(map(id, documented)) == Counter(map(id, public))
    assert not any(isinstance(one, ModuleType) for one in documented)


def test_the_list_of_the_reference_names_every_name_on_its_page() -> None:
    index = (REFERENCE / "index.md").read_text()
    rows = dict(re.findall(r"^\| \[[^\]]+\]\((\w+\.md)\) \| (.*) \|$", index, flags=re.MULTILINE))
    assert set(rows) | {"index.md"} == {page.name for page in REFERENCE.glob("*.md")}
    for page, row in rows.items():
        if page != "views.md":
            found = [name.rpartition(".")[2] for name in names_on(REFERENCE / page)]
            assert re.findall(r"`(\w+)`", row) == found, page


@pytest.mark.parametrize("name", ["errors", "gotchas"])
def test_every_error_and_gotcha_is_in_the_table_of_its_page(name: str) -> None:
    head, *sections = re.split(
        r'^<a id="([\w-]+)"></a>\n\n## (.+)\n', (ROOT / "docs" / f"{name}.md").read_text(), flags=re.M
    )
    anchors, titles, texts = (sections[start::3] for start in range(3))
    rows = re.findall(r"^\| \[(.+?)\]\(#([\w-]+)\) \|(.*)\|$", head, flags=re.MULTILINE)
    assert [(title, anchor) for title, anchor, _ in rows] == list(zip(titles, anchors, strict=True))
    assert len(set(anchors)) == len(anchors) >= 10
    assert not re.search(r"^## ", "".join(texts), flags=re.MULTILINE), "a section without an anchor"
    for title, text, (_, _, cell) in zip(titles, texts, rows, strict=True):
        message = re.search(r'```text title="\w+Error"\n(.*)\n', text)
        if name == "errors" and message:
            assert cell.strip() == f"`{message[1]}`", title
