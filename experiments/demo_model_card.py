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
    parts = f"{interval(outcome['relevant'])} divided by {interval(outcome['irrelevant_max'])}"
    return f"{outcome['ratio']:.2f}: {parts}; ratios of single heads {min(single):.2f} to {max(single):.2f}"


def _direction_finding(rows: Sequence[Mapping[str, Any]], chosen: str) -> Finding:
    baseline, best = (next(row for row in rows if row["name"] == name) for name in ("baseline", chosen))
    line = [row for row in rows if row.get("alpha") is not None]
    strongest, negative = max(line, key=lambda row: row["alpha"]), min(line, key=lambda row: row["alpha"])
    helps = best["em"] > baseline["em"] and best["mcnemar_p"] < 0.01
    hurts = all(row["em"] < baseline["em"] for row in (strongest, negative))
    return Finding(
        "Exact match with a focus direction (alpha and k chosen on validation questions)",
        "above the exact match with 20 documents, p < 0.01; below it with the highest and with the lowest alpha",
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
        Finding("Exact match with the gold document only", "at least 0.95", interval(gold), gold["em"] >= 0.95),
        Finding("Exact match with 20 documents", "0.50 to 0.85", interval(baseline), 0.5 <= baseline["em"] <= 0.85),
        Finding(
            "Exact match with the 19 irrelevant documents", "below 0.15", interval(negative), negative["em"] < 0.15
        ),
        Finding(
            "Number of heads with a relevant score above 0.1",
            "under 25 % of all heads, and none in the first layer",
            f"{count} of {total}: {', '.join(scores['above']) or 'none'}",
            0 < count < 0.25 * total and 0 not in scores["above_layers"],
        ),
        Finding(
            "Relevant score divided by largest irrelevant score, top five heads together, correct answers",
            "above 1",
            _ratio(correct),
            correct["ratio"] > 1,
        ),
        Finding(
            "Relevant score divided by largest irrelevant score, top five heads together, wrong answers",
            "below 1",
            _ratio(wrong),
            wrong["ratio"] < 1,
        ),
        Finding(
            "Exact match with split-softmax on contextual heads (tau and k chosen on validation questions)",
            "less than 0.02 below the exact match with the gold document only",
            _tested(split),
            split["em"] > gold["em"] - 0.02,
        ),
        Finding(
            "Exact match with split-softmax on the same heads with tau = 1000",
            "within 0.1 of the exact match with the 19 irrelevant documents",
            _tested(off),
            abs(off["em"] - negative["em"]) <= 0.1,
        ),
        Finding(
            f"Exact match with split-softmax on random other heads (tau = 0.3, k = 1 to {len(controls)})",
            "within 0.05 of the exact match with 20 documents, for every k",
            f"largest difference: {_tested(furthest)}; without an intervention, the same samples gave {interval(once)}",
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

This is a base model with the Llama architecture and {parameters:,} parameters ({layers} layers, {heads} query heads,
{kv_heads} key-value heads, width {width}). It was trained from scratch on the synthetic multi-document questions of
`focuslens.data.synthetic`. It answers questions about short documents, in the wording of the lost-in-the-middle prompt.
Its response after `Answer:` is one sentence.

`experiments/train_demo_model.py` trained the model with seed {seed}. The training took {steps:,} steps with {tokens:,}
tokens, and {minutes:.1f} minutes of processor time on {threads} thread(s). `training_log.csv` and `training_log.png`
show its course. A second run with the same seed, package versions, number of threads and processor takes the same
steps. Another processor rounds differently. A run there gives a different model of the same kind.

The training consists of lessons. Each line of this list shows the number of tokens, the minutes of processor time and
the step at which a lesson ended, counted from the start of the training:

{lessons}

In the lessons, a document has one to three facts. In the evaluation below, a document has two or three facts. The
evaluation therefore has more facts that can be confused with the right one, and its prompts are slightly longer.

The last lesson is called `late`. In this lesson, questions are about the last document {recency:.0f} times as often as
about the first. The model learns to find facts in late documents better than facts in early documents (see the table of
positions below). An earlier model was trained without this lesson and with an earlier wording of the corpus. Irrelevant
documents distracted that model at all positions of the gold document, and no tested focus direction improved its
accuracy significantly. A focus direction at the rotary site is a bias on keys that does not depend on the question. It
can favour early documents over late documents. It cannot favour one document over another document that looks like it.

## Measured

`experiments/measure_demo_model.py` made the measurements. `measured.json` contains them.

- **Samples.** The test set has this size: {samples:,} samples. They come from {questions} test questions with 20
  documents each. Each question has five samples, with the gold document at the positions 1, 5, 10, 15 and 20.
- **Held-out questions.** The names, values, facts and questions in the test samples are combinations of parts that the
  training split also contains. The combinations themselves occur in no other split. Titles, filler sentences and
  response sentences do occur in other splits.
- **One sample per question.** Three measurements use only one sample per question: the controls with random heads, the
  prompts with only the gold document, and the prompts without the gold document. The five positions of the gold
  document alternate from question to question.
- **Responses.** Responses are greedy, and the metric is sub-span exact match. The weights are rounded to bfloat16, and
  the model runs in float32.
- **Choices.** Heads were ranked on {train} training questions, and focus directions were trained on the same questions.
  Settings were chosen on {validation} validation questions at all five positions.
- **Uncertainty.** Parentheses after a mean contain its 95 % bootstrap confidence interval. Each p-value is that of an
  exact McNemar test that compares a setting with the unchanged model on the same prompts with 20 documents. Confidence
  intervals and tests treat the samples of one question together.
{note}

The ranking of heads begins with {ranking}.
On the training questions, the first {contextual} heads of the ranking have relevant scores above 0.1.

Explanations for the next table:

- Split-softmax and focus directions act on prompts with 20 documents.
- *tau* is the strength of split-softmax, *alpha* is the strength of a focus direction, and *k* is the number of heads.
- The *relevant score* is the attention from the response to the gold document. The *largest irrelevant score* is the
  attention to the irrelevant document that receives the most attention.
- *Correct answers* and *wrong answers* are answers to prompts with 20 documents. Both include only samples that the
  model answers correctly with the gold document alone.

| property | criterion | measured | holds |
|---|---|---|---|
{findings}

The next table shows the exact match at each position of the gold document, without an intervention and under the two
chosen settings.

{positions}

Of {errors[wrong]} wrong answers with 20 documents, {errors[refused]} are the refusal "not recorded".
Another {errors[later document]} give a value from a document after the gold document, {errors[earlier document]} give
a value from a document before the gold document, and {errors[something else]} give something else.

A further control used split-softmax on random other heads, with the tau and the number of heads that were chosen for
the contextual heads. In exact match, it gave {as_chosen} in {draws} draws of random heads.

The share of responses "not recorded" is {refused}
on a set of {unanswerable} other questions that no document answers.

## Limitations

The model knows only the words and sentence patterns of its corpus. Other words are split into bytes, which the training
never used in a sentence. The model has no knowledge of the world. All names, places and facts in the corpus are
synthetic. The model is for experiments on its internals, and its answers are not reliable. Its English is stiff. Every
response has the form "The job title of Ann Poe was miller", even if the noun is plural. The sentences between the facts
are random.
"""


def _positions(figures: Mapping[str, Any]) -> str:
    """Table of exact match by the gold document's position, without intervention and under the chosen settings."""
    names = {"baseline": "without an intervention"}
    names |= {name: name for name in (figures["split_softmax"]["name"], figures["steering_chosen"])}
    by_setting = figures["positions"]
    lines = [["position of the gold document", *names.values()], ["---"] * (1 + len(names))]
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
