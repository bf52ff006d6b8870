"""Hugging Face reference models of the tiny checkpoints, and tolerances that the parity tests share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest
import torch

from focuslens.model import lean, lean_rows
from focuslens.model.passes import PassRunner

if TYPE_CHECKING:
    from tests.support.reference import ReferenceModel


class References(Protocol):
    """The Hugging Face reference of a tiny checkpoint, opened once per session."""

    def __call__(self, name: str, dtype: torch.dtype = ...) -> ReferenceModel: ...


@pytest.fixture(scope="session")
def reference(checkpoint) -> References:
    from tests.support.reference import ReferenceModel

    opened: dict[tuple[str, torch.dtype], ReferenceModel] = {}

    def open_reference(name: str, dtype: torch.dtype = torch.float32) -> ReferenceModel:
        if (name, dtype) not in opened:
            directory: Path = checkpoint(name)
            opened[name, dtype] = ReferenceModel(directory, dtype)
        return opened[name, dtype]

    return open_reference


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    """Run the tests of models on both paths: layers from their weights, and every layer on the attention engine."""
    if "backend" in metafunc.fixturenames and not metafunc.definition.path.name.startswith("test_lean"):
        metafunc.parametrize("path", ["lean", pytest.param("engine", marks=pytest.mark.slow)], indirect=True)


@pytest.fixture(autouse=True)
def path(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """Path that the layers of a model take. On the path ``engine``, a layer that runs from its weights is an error."""
    chosen = getattr(request, "param", "lean")
    if chosen == "engine":
        monkeypatch.setattr(PassRunner, "lean", False)
        for name in ("run_layer", "keys_and_values"):
            monkeypatch.setattr(lean, name, lambda *_: pytest.fail("a layer ran from its weights"))
        monkeypatch.setattr(lean_rows, "run_layer", lambda *_: pytest.fail("a layer ran from its weights"))
    return chosen


@pytest.fixture(scope="session")
def logit_tolerance() -> dict[str, float]:
    """Largest difference between logits that counts as rounding, per backend.

    Logits have a standard deviation of about 1.6. The bridge runs Hugging Face's modules in the same order. Its logits
    equal the reference, or differ by a few units in the last place where matrix products have different shapes (2.5e-5
    measured with a cache). ``HookedTransformer`` computes its rotary tables differently and multiplies in a different
    order. Its single-precision angles are off by 1e-5 at positions up to 300, and a difference of 1e-4 in the logits
    was measured. On another machine, last-bit errors in the attention logits of three layers may make this difference
    ten times larger.
    """
    return {"bridge": 1e-4, "hooked": 1e-3}
