"""Scores of attention heads: contextual, per document and retrieval scores, and attention rows of single responses."""
