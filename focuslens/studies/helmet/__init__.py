"""Evaluation on HELMET with HELMET's own prompts, metrics and files, and with FocusLens as the model."""
