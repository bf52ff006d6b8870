"""The picture on the architecture page shows the imports of the package."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).parents[3]
sys.path.insert(0, str(ROOT / "experiments"))

floors: Any = pytest.importorskip("draw_floors", reason="the experiments are not here")


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package of three subpackages with an import cycle.

    ``top`` imports ``middle`` and ``low``, ``middle`` imports ``low``, and ``low`` imports ``top``.
    """
    sources = {
        "__init__.py": "from focuslens.top import a\n",
        "top/__init__.py": "import focuslens.middle.b\nfrom focuslens.top.a import name\n",
        "top/a.py": "from focuslens import low\nimport torch\n",
        "middle/__init__.py": "def late():\n    from focuslens.low import name\n",
        "low.py": "if TYPE_CHECKING:\n    from focuslens.top.a import name\n",
    }
    for name, source in sources.items():
        path = tmp_path / "focuslens" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(source)
    return tmp_path / "focuslens"


def test_the_committed_picture_is_drawn_from_the_package_as_it_is() -> None:
    assert floors.PICTURE.read_text() == floors.svg(ROOT / "focuslens"), "run `make floors` and commit docs/floors.svg"


def test_every_room_has_a_paragraph_on_the_page() -> None:
    page = (ROOT / "docs" / "architecture.md").read_text()
    for room in floors.rooms(ROOT / "focuslens"):
        assert f"\n**`{room}`**" in page, room


def test_imports_of_every_kind_count_and_those_within_a_room_do_not(package: Path) -> None:
    assert floors.rooms(package) == {"top", "middle", "low"}
    assert floors.imports(package) == {("top", "middle"), ("top", "low"), ("middle", "low"), ("low", "top")}


def test_arrows_that_follow_from_others_are_left_out() -> None:
    chain = {("a", "b"), ("b", "c"), ("c", "d")}
    assert floors.without_implied(chain | {("a", "c"), ("a", "d"), ("b", "d")}) == chain
    diamond = {("a", "b"), ("a", "c"), ("b", "d"), ("c", "d")}
    assert floors.without_implied(diamond | {("a", "d")}) == diamond


def test_an_upward_arrow_shows(package: Path) -> None:
    picture = floors.svg(package, (("top",), ("middle",), ("low",)))
    assert picture.count('class="arrow"') == 2
    assert picture.count('class="arrow upward"') == 1


def test_a_room_without_a_floor_is_refused(package: Path) -> None:
    with pytest.raises(ValueError, match="rooms and FLOORS differ in middle; change FLOORS"):
        floors.svg(package, (("top",), ("low",)))
