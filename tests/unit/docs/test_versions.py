"""The versions that were tried: in pyproject.toml, in the documentation, and in constraints.txt."""

from __future__ import annotations

import re

from packaging.requirements import Requirement
from packaging.version import Version

from tests.support.paths import ROOT

TRIED = re.compile(r'^    "([a-z0-9-]+)([<>=][^"]*)", # (\S+) to ([0-9.]+)(?:;.*)?$', flags=re.MULTILINE)
ROW = re.compile(r"^\| ([a-z0-9-]+) \| `(.*)` \| (.*) \| (.*) \| (.*) \|$", flags=re.MULTILINE)
PYTHON = {"python_full_version": "3.13.0", "python_version": "3.13"}


def table() -> list[tuple[str, ...]]:
    """Rows of the table: package, range, and the lowest, the pinned and the newest version."""
    return ROW.findall((ROOT / "docs" / "quickstart.md").read_text().split("## Versions")[1])


def pinned() -> dict[str, str]:
    lines = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if not line.startswith("#")]
    pins = [pin for pin in map(Requirement, lines) if pin.marker is None or pin.marker.evaluate(PYTHON)]
    return {pin.name: str(pin.specifier).removeprefix("==") for pin in pins}


def test_every_dependency_says_what_was_tried():
    content = (ROOT / "pyproject.toml").read_text()
    dependencies = content.split("\ndependencies = [\n")[1].split("\n]\n")[0].splitlines()
    assert len(TRIED.findall("\n".join(dependencies))) == len(dependencies) > 10


def test_the_table_lists_the_ranges_and_the_versions_that_were_tried():
    tried = TRIED.findall((ROOT / "pyproject.toml").read_text())
    assert [(name, span, lowest, newest) for name, span, lowest, _, newest in table()] == tried
    assert {name: pin for name, _, _, pin, _ in table()} == {name: pinned()[name] for name, *_ in tried}


def test_every_version_that_was_tried_is_in_its_range():
    for name, span, lowest, pin, newest in table():
        specifier = Requirement(name + span).specifier
        assert all(specifier.contains(one) for one in (lowest, pin, newest)), name
        assert Version(lowest) <= Version(pin) <= Version(newest), name
        if name != "torch":  # the lower bound of TransformerLens
            assert Version(span.split(",")[0].removeprefix(">=")) == Version(lowest), name
