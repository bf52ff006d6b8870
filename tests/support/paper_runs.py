"""Small reproductions of the paper: input files, and settings that run in seconds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from focuslens.studies.paper.settings import load_settings
from focuslens.studies.paper.study import Study
from tests.support.multidoc_files import oracle_record, write

__all__ = ["opened", "write_files"]

SETTINGS = """
name: tiny
model: {model}
data: {{file: {file}, documents: 3, gold_positions: [1, 3], every_position: false, train: 3, validation: 2, test: 4}}
max_new_tokens: 3
split_softmax: {{taus: [0.1, 1000], ks: [1, 3, 500], exclude: 4}}
directions: {{heads: 3, epochs: 1}}
steering: {{alphas: [-1, 2], ks: [1, 3, 20]}}
steered_scores: {{few: 2, few_alphas: [1], many: 20, many_alphas: [1]}}
retrieval: {{haystack: {haystack}, lengths: [60], depths: [0.0, 1.0], max_new_tokens: 4, top: 3}}
faithfulness: {{questions: 3, removal: 2, k: 2}}
anatomy: {{heads: 2, samples: 2, alphas: [1], k: 2, tokens: 2}}
focus:
  {{taus: [0.1, 0.5], ks: [2], choosing: [2], penalties: [0.1], margins: [0.1], masses: [0.5], sink: [0.5], biases: [1],
  targets: [0.3], scales: [0.1], temperatures: [0.0005], contrasts: [1], kept: [2], alphas: [1], steered: [2],
  ranks: [1], epochs: 1,
  timed: 1}}
"""


def write_files(folder: Path) -> Path:
    """Write a question file and haystack text."""
    write(folder / "oracle.jsonl", [oracle_record(i) for i in range(24)])
    (folder / "essay.txt").write_text("The river runs to the harbour. A lantern hangs there. " * 40)
    needle = {"question": "where?", "needle": "The queen sleeps in the tower.", "real_needle": "in the tower"}
    (folder / "needles.jsonl").write_text(json.dumps(needle) + "\n")
    return folder


def opened(folder: Path, files: Path, model: Any, out: str = "out") -> Study:
    file = folder / "tiny.yaml"
    file.write_text(SETTINGS.format(model=model, file=files / "oracle.jsonl", haystack=files))
    return Study(load_settings(file), folder / out, progress=False)
