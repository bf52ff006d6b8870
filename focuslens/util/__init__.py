"""Model-independent utilities: files, progress bars, HTML fragments and statistics."""
