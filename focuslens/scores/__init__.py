"""Scores of attention heads: contextual, retrieval, per document, and the attention of a response."""
