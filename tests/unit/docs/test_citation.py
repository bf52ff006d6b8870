"""CITATION.cff contains this version of the software, and the paper."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml

import focuslens as fl

ROOT = Path(__file__).parents[3]


def test_the_citation_has_the_version_of_the_package_and_the_paper() -> None:
    citation: dict[str, Any] = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert citation["cff-version"] == "1.2.0"
    assert citation["version"] == fl.__version__
    assert citation["license"] == "MIT"
    (paper,) = citation["references"]
    readme = " ".join((ROOT / "README.md").read_text().split())
    assert paper["title"] in readme
    assert all(f"{author['given-names']} {author['family-names']}" in readme for author in paper["authors"])
    assert paper["url"] in readme
