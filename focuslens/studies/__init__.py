"""Reproductions of "Focus Directions" (arXiv 2503.23306): its figures and tables, and its evaluation on HELMET."""
