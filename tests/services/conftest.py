"""Real models, in a cache folder that lasts from run to run."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest

if TYPE_CHECKING:
    from focuslens.model.sources.known_models import KnownModel


class RealModel(Protocol):
    """GGUF file of a known model, and the directory of the converted checkpoint."""

    def __call__(self, name: str) -> tuple[Path, Path]: ...


@pytest.fixture(scope="module")
def real_model() -> Iterator[RealModel]:
    """``real_model(name)`` downloads and converts a known model, if no earlier run has done so.

    In a module that uses this fixture, the cache folder is the one that ``FOCUSLENS_REAL_MODELS`` names.
    """
    from focuslens.model.sources.gguf_conversion import converted_gguf
    from focuslens.model.sources.known_models import KNOWN_MODELS, fetched_gguf

    def files(name: str) -> tuple[Path, Path]:
        model: KnownModel = KNOWN_MODELS[name]
        path = fetched_gguf(model)
        return path, converted_gguf(path)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOCUSLENS_CACHE", str(Path(os.environ["FOCUSLENS_REAL_MODELS"]).absolute()))
        yield files
