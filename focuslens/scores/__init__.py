"""Contextual scores, document scores and retrieval scores of attention heads, and attention of single responses."""
