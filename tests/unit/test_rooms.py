"""The package's layout: few top-level entries, one layer per entry, short files, and short functions.

``make lint`` checks the direction of imports. These tests check the limits that import-linter does not support.
"""

from __future__ import annotations

import ast
import re
import statistics
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.support.paths import ROOT

sys.path.insert(0, str(ROOT / "experiments"))
floors: Any = pytest.importorskip("draw_floors", reason="the experiments are not here")
tomllib: Any = pytest.importorskip("tomllib", reason="Python 3.10 reads no TOML")

PACKAGE = ROOT / "focuslens"


def layers(contract: str) -> list[list[str]]:
    """Entries per layer of an import-linter contract, from the top layer down."""
    content = tomllib.loads((ROOT / "pyproject.toml").read_text())
    (wanted,) = [entry for entry in content["tool"]["importlinter"]["contracts"] if entry["id"] == contract]
    return [re.split(r" [|:] ", layer) for layer in wanted["layers"]]


def functions() -> Iterator[tuple[Path, ast.FunctionDef | ast.AsyncFunctionDef]]:
    for path in sorted(PACKAGE.rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
                yield path, node


def test_the_package_has_at_most_fourteen_entries_besides_its_own_files():
    entries = {path.name for path in PACKAGE.iterdir() if path.name not in ("__pycache__", "py.typed", "assets")}
    rooms = {name for name in entries if not name.startswith("__init__.")}
    assert len(rooms) <= 14, sorted(rooms)


def test_the_picture_and_the_contract_have_the_same_floors():
    contract = [sorted(set(names) - {"__main__"}) for names in layers("floors")]
    assert contract == [sorted(names) for names in floors.FLOORS]
    assert len(contract) <= 9


def test_the_contracts_have_no_exceptions():
    assert "ignore_imports" not in (ROOT / "pyproject.toml").read_text()


def test_no_file_is_longer_than_400_lines():
    lengths = {path: len(path.read_text().splitlines()) for path in PACKAGE.rglob("*.py")}
    assert {str(path): n for path, n in lengths.items() if n > 400} == {}


def test_the_median_function_has_at_most_eight_lines():
    lengths = [node.end_lineno - node.lineno + 1 for _, node in functions() if node.end_lineno]
    assert len(lengths) > 1000
    assert statistics.median(lengths) <= 8
