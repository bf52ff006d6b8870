"""Files, progress bars, HTML fragments and statistics, which know nothing of models."""
