"""The demo model's card and the figure of its training log."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

from matplotlib.figure import Figure
from matplotlib.ticker import ScalarFormatter
from transformers import LlamaForCausalLM

from focuslens.util.files import write_atomically

__all__ = ["Finding", "draw_log", "findings", "write_card"]


def draw_log(log: Path, figure: Path) -> None:
    """Running accuracies over the tokens trained on, with a line where a lesson begins."""
    with log.open(newline="") as file:
        rows = list(csv.DictReader(file))
    tokens = [int(row["tokens"]) / 1e6 for row in rows]
    drawn = Figure(figsize=(8, 4), layout="constrained")
    axes = drawn.subplots()
    for name in ("answer", "refusal", "repeat"):
        axes.plot(tokens, [float(row[f"{name}_accuracy"] or "nan") for row in rows], label=f"{name}s")
    begins = [
        (place, now["lesson"])
        for place, (old, now) in zip(tokens[1:], pairwise(rows), strict=True)
        if old["lesson"] != now["lesson"]
    ]
    for i, (place, lesson) in enumerate(begins):
        axes.axvline(place, color="grey", linewidth=0.5)
        # Some lessons are too short for their names to stand side by side.
        axes.text(place, 1.02 + 0.05 * (i % 3), lesson, fontsize=7)
    # Most lessons are over within a tenth of the tokens.
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set(xlabel="million tokens (logarithmic)", ylabel="running accuracy in training", ylim=(0, 1))
    axes.legend(loc="lower right")
    picture = BytesIO()
    drawn.savefig(picture, dpi=120, format="png")
    write_atomically(figure, picture.getvalue())


class Finding(NamedTuple):
    """One property of the model: what would show it, what was measured, and whether it is there."""

    name: str
    bar: str
    measured: str
    holds: bool


def interval(row: Mapping[str, Any]) -> str:
    """A mean with its 95 % interval, of a sweep's row or of an interval's own numbers."""
    mean, low, high = (row[name] for name in (("em", "em_low", "em_high") if "em" in row else ("mean", "low", "high")))
    return f"{mean:.3f} ({low:.3f} to {high:.3f})"


def _tested(row: Mapping[str, Any]) -> str:
    return f"{row['name']}: {interval(row)}, McNemar p = {row['mcnemar_p']:.2g}"


def _ratio(outcome: Mapping[str, Any]) -> str:
    single = outcome["ratio_by_head"]
    parts = f"{interval(outcome['relevant'])} over {interval(outcome['irrelevant_max'])}"
    return f"{outcome['ratio']:.2f}: {parts}; single heads {min(single):.2f} to {max(single):.2f}"


def _direction_finding(rows: Sequence[Mapping[str, Any]], chosen: str) -> Finding:
    baseline, best = (next(row for row in rows if row["name"] == name) for name in ("baseline", chosen))
    line = [row for row in rows if row.get("alpha") is not None]
    strongest, negative = max(line, key=lambda row: row["alpha"]), min(line, key=lambda row: row["alpha"])
    helps = best["em"] > baseline["em"] and best["mcnemar_p"] < 0.01
    hurts = all(row["em"] < baseline["em"] for row in (strongest, negative))
    return Finding(
        "Focus direction (strength and heads chosen on validation)",
        "above 20 documents, p < 0.01; the strongest and the most negative hurt",
        "; ".join(_tested(row) for row in {row["name"]: row for row in (best, strongest, negative)}.values()),
        helps and hurts,
    )


def findings(figures: Mapping[str, Any]) -> list[Finding]:
    """The properties that make the model worth looking into, from what ``measure_demo_model.py`` measured."""
    once, gold, negative = figures["baselines"]
    everywhere = figures["everywhere"]
    baseline = next(row for row in everywhere if row["name"] == "baseline")
    scores, split, off, controls = figures["scores"], figures["split_softmax"], figures["off"], figures["random"]
    count, total = len(scores["above"]), scores["heads"]
    correct, wrong = scores["outcomes"]["correct"], scores["outcomes"]["wrong"]
    furthest = max(controls, key=lambda row: abs(row["em"] - once["em"]))
    return [
        Finding("Gold document only", "at least 0.95", interval(gold), gold["em"] >= 0.95),
        Finding("20 documents", "0.50 to 0.85", interval(baseline), 0.5 <= baseline["em"] <= 0.85),
        Finding("19 irrelevant documents", "below 0.15", interval(negative), negative["em"] < 0.15),
        Finding(
            "Heads with a relevant score above 0.1",
            "under 25 %, none in the first layer",
            f"{count} of {total}: {', '.join(scores['above']) or 'none'}",
            0 < count < 0.25 * total and 0 not in scores["above_layers"],
        ),
        Finding(
            "Top five heads together, relevant over largest irrelevant score, correct answers",
            "above 1",
            _ratio(correct),
            correct["ratio"] > 1,
        ),
        Finding(
            "The same, wrong answers",
            "below 1",
            _ratio(wrong),
            wrong["ratio"] < 1,
        ),
        Finding(
            "Split-softmax on contextual heads (tau and k chosen on validation)",
            "above gold document only minus 0.02",
            _tested(split),
            split["em"] > gold["em"] - 0.02,
        ),
        Finding(
            "tau = 1000 on the same heads",
            "within 0.1 of 19 irrelevant documents",
            _tested(off),
            abs(off["em"] - negative["em"]) <= 0.1,
        ),
        Finding(
            f"Random other heads, tau = 0.3, k = 1 to {len(controls)}",
            "within 0.05 of 20 documents",
            f"furthest: {_tested(furthest)}, where 20 documents gave {interval(once)}",
            abs(furthest["em"] - once["em"]) <= 0.05,
        ),
        _direction_finding(everywhere, figures["steering_chosen"]),
    ]


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

It was made by `experiments/train_demo_model.py` with seed {seed}: {tokens:,} tokens, {steps:,} steps,
{minutes:.1f} processor minutes on {threads} thread(s) (`training_log.csv`, `training_log.png`). Another
run with the same seed, versions and number of threads takes the same steps; on another processor their rounding
differs, and gives another model of the same kind.

Lessons, and when each ended:

{lessons}

Lessons have documents of one to three facts; the corpus as it is asked about below has two or three in each, and so
more competitors in a prompt that is a little longer.

In the last lesson, `late`, the last document is asked about {recency:.0f} times as often as the first. The model
learns to find late facts better than early ones (the table of positions below). An earlier model without that lesson,
on an earlier wording of the corpus, was distracted all over the prompt, and no focus direction that was tried helped it
significantly: a bias on keys that does not know the question can favour early documents over late ones, but not one
document over another that looks like it.

## Measured

By `experiments/measure_demo_model.py` (`measured.json`): {questions} test questions of 20 documents, whose names,
values, facts and questions are combinations of known parts that are in no other split (titles, filler and response
sentences are shared), each with the gold document at positions 1, 5, 10, 15 and 20: {samples:,} samples. Controls of
random heads are on one sample a question, the positions in turn, as is what stands alone or without the gold document.
Greedy responses, sub-span exact match. Weights rounded to bfloat16, run in float32. Heads were ranked and directions
trained on {train} training questions, settings chosen on {validation} validation questions at all five positions. 95 %
bootstrap intervals in parentheses, exact McNemar tests against 20 documents; both count a question's samples together.
{note}

The ranking begins {ranking}; the first {contextual} have relevant scores above 0.1 on
training questions. Correct and wrong answers are told apart among questions that are right with the gold document
alone.

| property | bar | measured | holds |
|---|---|---|---|
{findings}

{positions}

Of {errors[wrong]} wrong answers with 20 documents, {errors[refused]} say "not recorded", {errors[later document]} give
a value from a later document, {errors[earlier document]} one from an earlier document, and
{errors[something else]} something else.

Split-softmax on random other heads, as many and as strong as was chosen for the contextual ones, gave
{as_chosen} in {draws} draws.

Questions that no document answers, {unanswerable} others, are refused ("not recorded") in {refused} of cases.

## What it cannot do

It knows the words and sentence patterns of its corpus alone: other words fall apart into bytes that training
never used in a sentence, and it knows nothing of the world. Every name, place and fact in the corpus is made up. It is
there to be looked into, not to be relied on. Its English is stiff: every response has the form "The job title of Ann
Poe was miller", of several things too, and what stands between the facts was drawn at random.
"""


def _positions(figures: Mapping[str, Any]) -> str:
    """Exact match by the gold document's position, as it is and under the chosen settings."""
    names = {"baseline": "20 documents"}
    names |= {name: name for name in (figures["split_softmax"]["name"], figures["steering_chosen"])}
    by_setting = figures["positions"]
    lines = [["gold document at position", *names.values()], ["---"] * (1 + len(names))]
    lines += [[place, *(interval(by_setting[name][place]) for name in names)] for place in by_setting["baseline"]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_card(folder: Path, making: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Writes ``README.md`` beside the weights.

    Args:
        folder: The checkpoint.
        making: How it was made: ``making.json`` of the training script.
        figures: ``measured.json`` of the measuring script.
    """
    model: Any = LlamaForCausalLM.from_pretrained(folder)
    sizes = figures["sizes"]
    text = CARD.format(
        parameters=model.num_parameters(),
        layers=model.config.num_hidden_layers,
        heads=model.config.num_attention_heads,
        kv_heads=model.config.num_key_value_heads,
        width=model.config.hidden_size,
        questions=sizes["questions"],
        train=sizes["train"],
        validation=sizes["validation"],
        findings="\n".join(
            f"| {one.name} | {one.bar} | {one.measured} | {'yes' if one.holds else 'no'} |" for one in findings(figures)
        ),
        samples=sizes["questions"] * len(figures["positions"]["baseline"]),
        positions=_positions(figures),
        refused=interval(figures["unanswerable"]),
        unanswerable=sizes["unanswerable"],
        lessons="\n".join(f"- {entry}" for entry in making["passed"]) or "- none",
        note=f"\n{figures['note']}\n" if figures["note"] else "",
        ranking=", ".join(figures["ranking"]),
        contextual=figures["contextual"],
        errors=figures["errors"],
        draws=len(figures["random_as_chosen"]),
        as_chosen=", ".join(f"{row['em']:.3f}" for row in figures["random_as_chosen"]),
        **{name: making[name] for name in ("seed", "recency", "minutes", "threads", "tokens", "steps")},
    )
    write_atomically(folder / "README.md", text.encode())
