"""Steered models as ordinary checkpoints, for the tools that people serve models with."""

from focuslens.serving.export import ExportedCheckpoint, export
from focuslens.serving.fold import FoldedCheckpoint, fold
from focuslens.serving.harness import write_harness_task

__all__ = ["ExportedCheckpoint", "FoldedCheckpoint", "export", "fold", "write_harness_task"]
