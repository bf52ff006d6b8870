"""Steered models as ordinary checkpoints, for the tools that people serve models with."""

from focuslens.serving.fold import FoldedCheckpoint, fold

__all__ = ["FoldedCheckpoint", "fold"]
