"""Contextual, per-document and retrieval scores of attention heads, and attention rows of single responses."""
