"""Export of steered models as Hugging Face checkpoints, for common serving tools."""

from focuslens.directions.checkpoints.export import ExportedCheckpoint, export, is_foldable
from focuslens.directions.checkpoints.fold import FoldedCheckpoint, fold

__all__ = ["ExportedCheckpoint", "FoldedCheckpoint", "export", "fold", "is_foldable"]
