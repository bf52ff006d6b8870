"""Public names are imported on first use and equal those of a plain import."""

from __future__ import annotations

import ast
import importlib
import subprocess
import sys
from pathlib import Path

import pytest

import focuslens as fl


def _homes():
    stub = Path(fl.__file__).with_suffix(".pyi").read_text()
    found = [node for node in ast.parse(stub).body if isinstance(node, ast.ImportFrom) and node.module]
    return {alias.name: f"focuslens.{node.module}" for node in found for alias in node.names}


def test_every_public_name_is_that_of_its_module():
    homes = _homes()
    assert set(fl.__all__) == set(homes)
    assert len(homes) > 80
    for name, home in homes.items():
        assert getattr(fl, name) is getattr(importlib.import_module(home), name)


def test_the_names_that_type_checkers_see_are_those_that_there_are():
    stub = Path(fl.__file__).with_suffix(".pyi").read_text()
    (listed,) = [
        ast.literal_eval(node.value)
        for node in ast.parse(stub).body
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name) and node.targets[0].id == "__all__"
    ]
    assert listed == sorted(fl.__all__)
    assert set(fl.__all__) <= set(dir(fl))


def test_modules_need_no_import_of_their_own_and_other_names_are_refused():
    code = (
        "import sys, focuslens as fl\n"
        "assert 'torch' not in sys.modules\n"
        "assert fl.heads.Head is fl.Head\n"
        # A module with the name of a function does not hide the function, even if the module is imported first.
        "import focuslens.scores.response_attention\n"
        "assert callable(fl.response_attention)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="module 'focuslens' has no attribute 'nothing'"):
        _ = fl.nothing  # pyright: ignore[reportAttributeAccessIssue]
