"""Real models, whose downloads last from run to run."""

from __future__ import annotations

import os
import shutil
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
def real_model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RealModel]:
    """``real_model(name)`` converts a known model, and downloads it if no earlier run has done so.

    Downloads are in the cache folder that ``FOCUSLENS_REAL_MODELS`` names. Everything else in the cache folder is made
    anew for each test file, so that the code of today converts and opens the model.
    """
    from focuslens.model.sources.gguf_conversion import converted_gguf
    from focuslens.model.sources.known_models import KNOWN_MODELS, fetched_gguf

    def files(name: str) -> tuple[Path, Path]:
        model: KnownModel = KNOWN_MODELS[name]
        path = fetched_gguf(model)
        return path, converted_gguf(path)

    downloads, cache = Path(os.environ["FOCUSLENS_REAL_MODELS"]).absolute() / "models", tmp_path_factory.mktemp("cache")
    downloads.mkdir(parents=True, exist_ok=True)
    (cache / "models").symlink_to(downloads)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("FOCUSLENS_CACHE", str(cache))
        yield files
    shutil.rmtree(cache)  # of 0.5 to 1.1 GB
