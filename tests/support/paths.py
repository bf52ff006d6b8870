"""Paths of the repository's root and of third-party data next to it, which may be missing."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["PAPER", "ROOT", "SHARED_DATA"]

ROOT = Path(__file__).parents[2]

SHARED_DATA = Path(os.environ.get("FOCUSLENS_DATA") or ROOT.parent / "shared" / "data")
"""The authors' published files, haystacks and question files. ``FOCUSLENS_DATA`` names another folder."""

PAPER = ROOT.parent / "shared" / "paper" / "focus_directions.txt"
"""Text of the paper."""
