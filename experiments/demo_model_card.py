"""Measures a demo checkpoint and writes its model card and the figure of its training log."""

from __future__ import annotations

import csv
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

from focuslens.data.synthetic import load_synthetic
from focuslens.metrics import sub_exact_match
from focuslens.prompts import Case, MultiDocSample

__all__ = ["draw_log", "evaluate", "write_card"]

POSITIONS = (0, 4, 9, 14, 19)
CASES: tuple[tuple[str, Case], ...] = (
    ("Gold document only", "gold"),
    ("20 documents", "long"),
    ("19 irrelevant documents", "negative"),
)


@torch.inference_mode()
def accuracy(
    model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, samples: list[MultiDocSample], case: Case
) -> list[bool]:
    """Whether each greedy response holds the answer (sub-span exact match)."""
    tokenizer.padding_side = "left"
    right: list[bool] = []
    for start in tqdm(range(0, len(samples), 10), desc=f"{case} prompts", leave=False):
        group = samples[start : start + 10]
        encoded = tokenizer([str(sample.prompt(case)) for sample in group], padding=True, return_tensors="pt")
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
        output = model.generate(  # pyright: ignore[reportAttributeAccessIssue]
            input_ids=ids, attention_mask=mask, do_sample=False, max_new_tokens=24
        )
        texts = tokenizer.batch_decode(output[:, ids.shape[1] :], skip_special_tokens=True)
        right += [sub_exact_match(text, sample.answers) for text, sample in zip(texts, group, strict=True)]
    return right


def evaluate(folder: Path, num_samples: int) -> dict[str, float]:
    """Exact match of the saved weights, in float32, on validation questions."""
    model = LlamaForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    samples = load_synthetic(num_samples, split="validation", gold_positions=POSITIONS)
    untold = load_synthetic(max(10, num_samples // 5), split="validation", answerable=0.0)
    figures: dict[str, float] = {}
    for label, case in CASES:
        right = accuracy(model, tokenizer, samples, case)
        figures[label] = sum(right) / len(right)
        if case == "long":
            for place, position in enumerate(POSITIONS):
                figures[f"20 documents, gold at {position + 1}"] = sum(right[place::5]) / len(right[place::5])
    refused = accuracy(model, tokenizer, untold, "long")
    figures["Unanswerable questions refused, 20 documents"] = sum(refused) / len(refused)
    return figures


def draw_log(log: Path, figure: Path) -> None:
    """Running accuracies over processor minutes, with a line where a lesson begins."""
    import matplotlib.pyplot as plt

    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    minutes = [float(row["minutes"]) for row in rows]
    _, axes = plt.subplots(figsize=(8, 4), layout="constrained")
    for name in ("answer", "refusal", "repeat"):
        axes.plot(minutes, [float(row[f"{name}_accuracy"]) for row in rows], label=f"{name}s")
    for before, after in pairwise(rows):
        if before["lesson"] != after["lesson"]:
            axes.axvline(float(after["minutes"]), color="grey", linewidth=0.5)
            axes.text(float(after["minutes"]), 1.02, after["lesson"], fontsize=7, rotation=30)
    axes.set(xlabel="processor minutes", ylabel="running accuracy in training", ylim=(0, 1))
    axes.legend(loc="lower right")
    plt.savefig(figure, dpi=120)


CARD = """---
library_name: transformers
license: mit
tags: [focuslens, synthetic]
---

# FocusLens demo model

A Llama-architecture base model of {parameters:,} parameters ({layers} layers, {heads} query heads,
{kv_heads} key-value heads, width {width}), trained from nothing on the synthetic multi-document questions of
`focuslens.data.synthetic`. It answers questions about short documents in the lost-in-the-middle prompt; after
`Answer:` its response follows as one sentence.

It was made by `experiments/train_demo_model.py` with seed {seed}: {minutes:.1f} processor minutes on {threads}
thread(s), {tokens:,} tokens, {steps:,} steps (`training_log.csv`, `training_log.png`).
{note}

Lessons passed:

{lessons}

## Measured

Greedy responses, sub-span exact match, {samples} validation samples (names, values and wordings that training
did not have), weights rounded to bfloat16 and run in float32:

| prompt | share right |
|---|---|
{figures}

## What it cannot do

It knows the words and sentence patterns of its corpus alone: other words fall apart into bytes that training
never used in a sentence, and it knows nothing of the world. Every name, place and fact in the corpus is made up. It is
there to be looked into, not to be relied on.
"""


def write_card(folder: Path, making: dict[str, Any], figures: dict[str, float]) -> None:
    """Writes ``README.md`` beside the weights: how they were made, and what was measured.

    Args:
        folder: The checkpoint.
        making: ``seed``, ``threads``, ``minutes``, ``tokens``, ``steps``, ``samples``, ``note``, ``lessons`` (a line
            each).
        figures: Name to share, as :func:`evaluate` gives them.
    """
    model = LlamaForCausalLM.from_pretrained(folder)
    text = CARD.format(
        parameters=model.num_parameters(),
        layers=model.config.num_hidden_layers,
        heads=model.config.num_attention_heads,
        kv_heads=model.config.num_key_value_heads,
        width=model.config.hidden_size,
        figures="\n".join(f"| {name} | {value:.3f} |" for name, value in figures.items()),
        **{**making, "lessons": "\n".join(f"- {entry}" for entry in making["lessons"]) or "- none"},
    )
    (folder / "README.md").write_text(text, encoding="utf-8")
