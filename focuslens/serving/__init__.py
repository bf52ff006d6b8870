"""Steered models as ordinary checkpoints, for the tools that people serve models with."""

from focuslens.serving.export import ExportedCheckpoint, export
from focuslens.serving.fold import FoldedCheckpoint, fold

__all__ = ["ExportedCheckpoint", "FoldedCheckpoint", "export", "fold"]
