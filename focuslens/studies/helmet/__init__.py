"""Evaluation of FocusLens models on HELMET, with HELMET's code for prompts, metrics and result files."""
