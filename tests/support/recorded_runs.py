"""Output of every command on a tiny model, in one folder, with the correctness of some answers edited."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import matplotlib.pyplot as plt

from tests.support.checkpoints import build_checkpoint
from tests.support.multidoc_files import oracle_record, write

__all__ = ["BECAME", "judge", "run_everything"]

BECAME = {0: (False, True), 1: (True, False), 2: (False, True), 3: (True, True)}
"""Sample index to the correctness of the baseline's answer and of the strongest setting's answer."""


def run_everything(folder: Path) -> Path:
    """Write heads, directions, two sweeps and a response below ``out``, with model and data next to ``out``."""
    from focuslens.cli.main import main

    model, data = build_checkpoint("llama", folder / "model"), folder / "oracle.jsonl"
    write(data, [oracle_record(i) for i in range(16)])
    out = folder / "out"
    common = ["--model", str(model), "--data", str(data), "--documents", "3", "--samples", "4", "--max-new-tokens", "4"]
    common += ["--gold-positions", "0,2"]
    heads = ["--heads", str(out / "heads" / "heads.json")]
    commands = {
        "heads": [],
        "train": [*heads, "--top-k", "3", "--epochs", "2"],
        "split-softmax": [*heads, "--tau", "0.1,1000", "--k", "1,2"],
        "steer": [*heads, "--directions", str(out / "train"), "--alpha=-1,2", "--k", "1,3"],
        "generate": [*heads, "--sample", "1", "--tau", "0.1", "--top-k", "2"],
    }
    for command, options in commands.items():
        assert main([command, *options, *common, "--out", str(out / command)]) == 0
    plt.close("all")
    judge(out / "steer" / "steering.jsonl", "steering alpha=2 k=3")
    judge(out / "split-softmax" / "split_softmax.jsonl", "split-softmax contextual tau=0.1 k=2")
    return folder


def judge(records: Path, setting: str, became: Mapping[int, tuple[bool, bool]] = BECAME) -> None:
    """Edit the correctness of the baseline's and one setting's answers. A random model's answers are never correct."""
    header, *lines = records.read_text().splitlines()
    changed = [json.loads(line) for line in lines]
    for place, (before, after) in became.items():
        for name, result in changed[place]["results"].items():
            result["correct"] = after if name == setting else before if name == "baseline" else False
    records.write_text("".join(f"{line}\n" for line in [header, *map(json.dumps, changed)]))
