"""HELMET, by HELMET: its prompts, its metrics and its files, with FocusLens as the model."""
