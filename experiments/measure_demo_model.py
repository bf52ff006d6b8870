"""Measure a demo checkpoint on held-out questions, and write its model card.

    python experiments/measure_demo_model.py --model focuslens/assets/demo

Heads are ranked and directions are trained on questions of the train split. Settings are chosen on the validation
split. All results are measured on the test split. The names, values and wordings of the test split do not occur in the
train or validation split. An interrupted run resumes from its records in ``--work`` if the weights have not changed.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from demo_model_card import write_card

import focuslens as fl
from focuslens.data.selection import SampleSelection
from focuslens.data.synthetic_words import UNKNOWN
from focuslens.evaluation import BASELINES, Evaluation, Setting, Sweep, best_setting, bootstrap_mean
from focuslens.prompts.sample import MultiDocSample
from focuslens.util.files import versions, write_json

POSITIONS = (0, 4, 9, 14, 19)
TAUS = (0.03, 0.05, 0.07, 0.1, 0.2, 0.3, 0.6)
KS = (2, 4, 6, 8, 12)
ALPHAS = (-2.0, -1.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0, 12.0)
STEERED = (4, 8)
TOP = 5
DRAWS = 5
"""Number of sets of random heads that are tested at the chosen setting."""
CONTEXTUAL = 0.1
"""Relevant score above which a head counts as contextual."""
SEED = 42
TEST_SEED = 2028


@dataclass(frozen=True)
class Run:
    """Inputs that all measurements have in common."""

    model: fl.FocusModel
    work: Path
    settings: dict[str, Any]

    def sweep(self, name: str, samples: Sequence[MultiDocSample], settings: Sequence[Setting]) -> Sweep:
        """Run a sweep that writes records, from which a killed run can resume."""
        out = self.work / f"{name}.jsonl"
        return fl.run_sweep(self.model, samples, settings, out=out, seed=SEED, progress=True, **self.settings)


def questions(split: Any, n: int) -> Sequence[MultiDocSample]:
    """Samples of ``n`` questions with 20 documents, one sample per question, with the gold positions in rotation."""
    seed = TEST_SEED if split == "test" else SEED
    return SampleSelection(gold_positions=POSITIONS, part=split, questions=n, seed=seed).open()


def at_every_position(split: Any, n: int) -> Sequence[MultiDocSample]:
    """Samples of the ``n`` questions of :func:`questions`, five samples per question, one for each gold position."""
    seed = TEST_SEED if split == "test" else SEED
    return fl.load_synthetic(n * len(POSITIONS), gold_positions=POSITIONS, split=split, seed=seed)


def by_position(sweep: Sweep) -> dict[str, dict[str, Any]]:
    """Exact match of every setting by the gold document's position, counted from 1."""
    return {
        setting.name: {
            str(position + 1): bootstrap_mean(sweep[setting.name].correct[place :: len(POSITIONS)], seed=SEED).to_dict()
            for place, position in enumerate(POSITIONS)
        }
        for setting in sweep.settings
    }


def unanswerable(run: Run, n: int) -> dict[str, float]:
    """Share of refusals ("not recorded") among questions that no document answers."""
    samples = fl.load_synthetic(n, split="test", answerable=0.0, seed=TEST_SEED)
    return run.sweep("unanswerable", samples, [Setting("baseline")])["baseline"].em.to_dict()


def errors(samples: Sequence[MultiDocSample], result: Evaluation) -> dict[str, int]:
    """Number of wrong responses of each kind: refusals, values from earlier or later documents, and others."""
    counts = {"wrong": 0, "refused": 0, "earlier document": 0, "later document": 0, "something else": 0}
    for sample, response, right in zip(samples, result.responses, result.correct, strict=True):
        if right or sample.gold_index is None:
            continue
        counts["wrong"] += 1
        value = response.split(" was ")[-1].strip().rstrip(".")
        word = re.compile(rf"\b{re.escape(value)}\b")
        places = [i for i, document in enumerate(sample.documents) if value and word.search(document.text)]
        if value == UNKNOWN:
            counts["refused"] += 1
        elif len(places) == 1 and places[0] != sample.gold_index:
            counts["earlier document" if places[0] < sample.gold_index else "later document"] += 1
        else:
            counts["something else"] += 1
    return counts


def head_scores(run: Run, heads: Sequence[fl.Head], samples: Sequence[MultiDocSample]) -> dict[str, Any]:
    """Scores of all heads on long prompts, and of the top heads for correct and wrong answers."""
    cases = fl.contextual_scores_by_case(run.model, samples, progress=True, **run.settings)
    questions = {sample.id: sample.question_id for sample in samples}
    long, top = cases["long"], list(heads[:TOP])
    above = [head for head in long.ranking() if long.mean()[head] > CONTEXTUAL]
    outcomes: dict[str, Any] = {}
    for name in ("correct", "wrong"):
        scores = cases[name]
        known = ~scores.relevant[:, 0, 0].isnan()
        relevant, largest = (
            torch.stack([getattr(scores, kind)[known, head.layer, head.head] for head in top], dim=1).mean(dim=1)
            for kind in ("relevant", "irrelevant_max")
        )
        groups = [questions[id] for id, is_known in zip(scores.sample_ids, known.tolist(), strict=True) if is_known]
        ratios = [float(scores.mean()[head] / scores.mean("irrelevant_max")[head]) for head in top]
        outcomes[name] = {
            "samples": int(known.sum()),
            "relevant": bootstrap_mean(relevant.tolist(), groups=groups, seed=SEED).to_dict(),
            "irrelevant_max": bootstrap_mean(largest.tolist(), groups=groups, seed=SEED).to_dict(),
            "ratio": float(relevant.mean() / largest.mean()),
            "ratio_by_head": ratios,
        }
    sparsity = [{"threshold": s.threshold, "count": s.count, "layers": s.layers} for s in long.sparsity()]
    means = {kind: [float(long.mean(kind)[head]) for head in top] for kind in ("relevant", "irrelevant_max", "sink")}
    return {
        "top": [str(head) for head in top],
        "means": means,
        "above": [str(head) for head in above],
        "above_layers": [head.layer for head in above],
        "heads": long.relevant[0].numel(),
        "sparsity": sparsity,
        "outcomes": outcomes,
    }


def rows(sweep: Sweep, settings: Sequence[Setting]) -> list[dict[str, Any]]:
    """Rows of a sweep for some of its settings."""
    names = {setting.name for setting in settings}
    return [row for row in sweep.rows() if row["name"] in names]


def random_others(model: fl.FocusModel, heads: Sequence[fl.Head], k: int, draw: int) -> list[fl.Head]:
    """Draw ``k`` random heads that are not among the first ``k`` heads of the ranking ``heads``."""
    return fl.random_heads(model.shape.n_layers, model.shape.n_heads, k, exclude=heads[:k], seed=SEED + draw)


def measure(run: Run, sizes: argparse.Namespace) -> dict[str, Any]:
    """Measure all numbers of the model card."""
    model = run.model
    train, validation = questions("train", sizes.train), at_every_position("validation", sizes.validation)
    test, everywhere = questions("test", sizes.questions), at_every_position("test", sizes.questions)
    ranked_on = fl.contextual_scores(model, train, progress=True, **run.settings)
    heads = ranked_on.ranking()
    scores = head_scores(run, heads, everywhere)
    contextual = max(sum(bool(ranked_on.mean()[head] > CONTEXTUAL) for head in heads[: len(heads) // 2]), 1)
    split = fl.split_softmax_settings(heads, TAUS, KS)
    directions = fl.train_focus_directions(
        model,
        train,
        heads[: max(STEERED)],
        learning_rate=sizes.rate,
        max_new_tokens=run.settings["max_new_tokens"],
        seed=SEED,
        progress=True,
    )
    steering = fl.steering_settings(directions, heads, ALPHAS, STEERED)
    chosen_on = run.sweep("validation", validation, [Setting("baseline"), *split, *steering])
    chosen, steered = best_setting(chosen_on, split), best_setting(chosen_on, steering)
    same = heads[: chosen.parameters["k"]]
    off = fl.split_softmax_settings(same, [1000.0], [len(same)])
    drawn = [random_others(model, heads, max(contextual, len(same)), draw) for draw in range(DRAWS)]
    controls = fl.split_softmax_settings(drawn[0], [0.3], range(1, contextual + 1), label="random")
    as_chosen = [
        setting
        for draw, others in enumerate(drawn)
        for setting in fl.split_softmax_settings(
            others, [chosen.parameters["tau"]], [len(same)], label=f"random, draw {draw + 1},"
        )
    ]
    line = [setting for setting in steering if setting.parameters["k"] == steered.parameters["k"]]
    shown = {setting.name: setting for setting in (steered, line[0], line[-1])}
    # The main results use five samples per question. Controls and the full range of strengths use one sample.
    whole = run.sweep("positions", everywhere, [Setting("baseline"), chosen, *off, *shown.values()])
    swept = run.sweep("test", test, [*BASELINES, *controls, *as_chosen, *line])
    return {
        "baselines": rows(swept, BASELINES),
        "everywhere": whole.rows(),
        "errors": errors(everywhere, whole["baseline"]),
        "ranking": [str(head) for head in heads[: max(STEERED)]],
        "contextual": contextual,
        "scores": scores,
        "split_softmax": rows(whole, [chosen])[0],
        "off": rows(whole, off)[0],
        "random": rows(swept, controls),
        "random_as_chosen": rows(swept, as_chosen),
        "steering_chosen": steered.name,
        "steering": rows(swept, line),
        "validation": chosen_on.rows(),
        "positions": by_position(whole),
        "unanswerable": unanswerable(run, sizes.unanswerable),
    }


def parse(arguments: list[str] | None = None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", type=Path, required=True, help="folder of the checkpoint; its README.md is written")
    parser.add_argument("--work", type=Path, default=Path("runs/demo-model/measured"), help="folder for records")
    parser.add_argument("--questions", type=int, default=500, help="test questions (default 500)")
    parser.add_argument("--unanswerable", type=int, default=100, help="test questions that nothing answers")
    parser.add_argument("--validation", type=int, default=200, help="questions that settings are chosen on")
    parser.add_argument(
        "--train", type=int, default=200, help="questions on which heads are ranked and directions are trained"
    )
    parser.add_argument("--rate", type=float, default=1e-3, help="learning rate of directions (the paper's: 1e-3)")
    parser.add_argument("--note", default="", help="a note for the card on the origin of its numbers")
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> None:
    options = parse(arguments)
    torch.set_num_threads(options.threads)
    making = json.loads((options.model / "making.json").read_text())
    model = fl.FocusModel.from_pretrained(str(options.model), device="cpu")
    model.name = "demo"
    run = Run(model, options.work / model.description["weights"], {"max_new_tokens": 24})
    sizes = {name: getattr(options, name) for name in ("questions", "unanswerable", "validation", "train", "rate")}
    made_of = {key: value for key, value in model.description.items() if key in ("weights", "dtype", "backend")}
    # The digest in the model's description covers only part of the weights. The digest in the card covers all weights.
    made_of["sha256"] = hashlib.sha256((options.model / "model.safetensors").read_bytes()).hexdigest()
    figures = {
        "model": made_of,
        "sizes": {**sizes, "seed": SEED, "test_seed": TEST_SEED},
        "note": options.note,
        "versions": versions(),
        **measure(run, options),
    }
    write_json(options.model / "measured.json", figures)
    write_card(options.model, making, figures)


if __name__ == "__main__":
    main()
