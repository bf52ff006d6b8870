"""Model card of the demo model, and the figure of its training log."""

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
    """Draw running accuracies against training tokens, with a vertical line at the start of each lesson."""
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
        # Some lessons are so short that their names would overlap at one height.
        axes.text(place, 1.02 + 0.05 * (i % 3), lesson, fontsize=7)
    # The scale is logarithmic, because most lessons end within the first tenth of the tokens.
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.set(xlabel="million tokens (logarithmic)", ylabel="running accuracy in training", ylim=(0, 1))
    axes.legend(loc="lower right")
    picture = BytesIO()
    drawn.savefig(picture, dpi=120, format="png")
    write_atomically(figure, picture.getvalue())


class Finding(NamedTuple):
    """One property of the model: its criterion, its measurement, and whether the criterion is met."""

    name: str
    bar: str
    measured: str
    holds: bool


def interval(row: Mapping[str, Any]) -> str:
    """Mean with its 95 % interval as text, from a row of a sweep or from the fields of an interval."""
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
    """Findings on the properties that experiments need, from the results of ``measure_demo_model.py``."""
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
{kv_heads} key-value heads, width {width}), trained from scratch on the synthetic multi-document questions of
`focuslens.data.synthetic`. It answers questions about short documents in the lost-in-the-middle prompt. Its response
after `Answer:` is one sentence.

`experiments/train_demo_model.py` trained it with seed {seed}: {tokens:,} tokens, {steps:,} steps,
{minutes:.1f} processor minutes on {threads} thread(s) (`training_log.csv`, `training_log.png`). Another
run with the same seed, versions and number of threads takes the same steps. Another processor rounds differently, and
gives another model of the same kind.

Ends of the lessons:

{lessons}

Documents in the lessons have one to three facts. Documents in the evaluation below have two or three, so there are more
competitors and slightly longer prompts.

In the last lesson, `late`, questions are about the last document {recency:.0f} times as often as about the first. The
model learns to find late facts better than early ones (see the table of positions below). An earlier model without that
lesson, on an earlier wording of the corpus, was distracted at all positions, and no tested focus direction helped it
significantly. A bias on keys that does not depend on the question can favour early documents over late ones, but not
one document over another that looks like it.

## Measured

By `experiments/measure_demo_model.py` (`measured.json`): {questions} test questions of 20 documents, each with the
gold document at positions 1, 5, 10, 15 and 20: {samples:,} samples. The names, values, facts and questions are
combinations of known parts that are in no other split. Titles, filler and response sentences are shared. Controls with
random heads, and prompts with only the gold document or without it, have one sample per question, at the positions in
turn. Responses are greedy, and the metric is sub-span exact match. Weights are rounded to bfloat16 and run in float32.
Heads were ranked and directions trained on {train} training questions. Settings were chosen on {validation} validation
questions at all five positions. Parentheses have 95 % bootstrap intervals. Exact McNemar tests compare with 20
documents. Both treat the samples of one question together.
{note}

The ranking begins {ranking}. The first {contextual} have relevant scores above 0.1 on
training questions. Correct and wrong answers are those of questions that are right with the gold document alone.

| property | bar | measured | holds |
|---|---|---|---|
{findings}

{positions}

Of {errors[wrong]} wrong answers with 20 documents, {errors[refused]} are "not recorded", {errors[later document]} are
values from a later document, {errors[earlier document]} are values from an earlier document, and
{errors[something else]} are something else.

Split-softmax on random other heads, with the number of heads and the strength chosen for the contextual heads, gave
{as_chosen} in {draws} draws.

The model answers "not recorded" for {refused} of {unanswerable} other questions that no document answers.

## Limitations

The model knows only the words and sentence patterns of its corpus. Other words are split into bytes that training
never used in a sentence, and the model has no knowledge of the world. All names, places and facts in the corpus are
synthetic. The model is for experiments on its internals, and its answers are not reliable. Its English is stiff: every
response has the form "The job title of Ann Poe was miller", even for plural nouns, and the sentences between the facts
are random.
"""


def _positions(figures: Mapping[str, Any]) -> str:
    """Table of exact match by the gold document's position, without intervention and under the chosen settings."""
    names = {"baseline": "20 documents"}
    names |= {name: name for name in (figures["split_softmax"]["name"], figures["steering_chosen"])}
    by_setting = figures["positions"]
    lines = [["gold document at position", *names.values()], ["---"] * (1 + len(names))]
    lines += [[place, *(interval(by_setting[name][place]) for name in names)] for place in by_setting["baseline"]]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def write_card(folder: Path, making: Mapping[str, Any], figures: Mapping[str, Any]) -> None:
    """Write ``README.md`` beside the weights.

    Args:
        folder: Folder of the checkpoint.
        making: Content of ``making.json``, which ``train_demo_model.py`` writes.
        figures: Content of ``measured.json``, which ``measure_demo_model.py`` writes.
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
            f"| {finding.name} | {finding.bar} | {finding.measured} | {'yes' if finding.holds else 'no'} |"
            for finding in findings(figures)
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
