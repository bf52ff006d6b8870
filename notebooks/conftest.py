"""Notebooks that need a download are left out where the cache folder does not hold their model."""

from __future__ import annotations

from pathlib import Path

NEEDED = {"06_a_real_model.ipynb": "smollm2-135m-instruct"}


def pytest_ignore_collect(collection_path: Path) -> bool | None:
    """Leave a notebook out if its model would have to be downloaded."""
    name = NEEDED.get(collection_path.name)
    if name is None:
        return None
    from focuslens.model.sources.known_models import KNOWN_MODELS

    return None if KNOWN_MODELS[name].path.is_file() else True
