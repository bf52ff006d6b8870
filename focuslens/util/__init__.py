"""Files, progress bars, HTML fragments and statistics; nothing here depends on a model."""
