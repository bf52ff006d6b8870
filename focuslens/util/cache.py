"""Folder in which FocusLens keeps what can be made again."""

from __future__ import annotations

import os
from pathlib import Path

from platformdirs import user_cache_dir

__all__ = ["cache_folder"]


def cache_folder() -> Path:
    """``$FOCUSLENS_CACHE`` if it is set, else the platform's folder for caches. The folder may not exist yet."""
    return Path(os.environ.get("FOCUSLENS_CACHE") or user_cache_dir("focuslens", appauthor=False))
