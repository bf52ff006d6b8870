"""The demo's report: findings in sentences, tables, figures, and where the model looked."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from focuslens.evaluation import Evaluation, Sweep
from focuslens.files import versions
from focuslens.heads import Head
from focuslens.hooks import Intervention
from focuslens.model import FocusModel
from focuslens.prompts import MultiDocSample
from focuslens.response_attention import response_attention
from focuslens.scoring import ContextualScores, attention_pattern
from focuslens.viz import AttentionView, Table, attention_view, document_view, write_report

__all__ = ["write_demo_report"]

_SHOWN_HEADS = 4


def write_demo_report(
    path: Path,
    model: FocusModel,
    cases: Mapping[str, ContextualScores],
    split: Sweep,
    steer: Sweep,
    chosen: str,
    ranking: Sequence[Head],
    samples: Sequence[MultiDocSample],
    figures: Sequence[tuple[str, Path]],
) -> None:
    """Write the report of a demo run."""
    contextual = [setting for setting in split.settings if setting.parameters.get("heads") == "contextual"]
    best = max(contextual, key=lambda setting: split[setting.name].em.mean)
    shape = model.shape
    facts = {
        "model": f"{model.name}: {shape.n_layers} layers of {shape.n_heads} heads, d_head {shape.d_head}",
        "backend": f"{model.description['backend']}, {model.description['dtype']} on {model.description['device']}",
        "held-out questions": str(len(samples)),
        "seed": str(split.header["seed"]),
        "versions": ", ".join(f"{name} {number}" for name, number in versions().items()),
    }
    write_report(
        path,
        title="FocusLens: where the embedded model looks, and what changes it",
        facts=facts,
        findings=_findings(cases, split, steer, best.name, chosen),
        tables=_tables(cases, split, steer, ranking),
        figures=figures,
        views=_views(model, split, best.name, ranking, samples),
    )


def _findings(cases: Mapping[str, ContextualScores], split: Sweep, steer: Sweep, best: str, chosen: str) -> list[str]:
    above = cases["long"].sparsity((0.1,))[0]
    test = split[best].compare(split["baseline"])
    steered = steer[chosen].compare(steer["baseline"])
    return [
        f"{above.count} of {cases['long'].relevant[0].numel()} heads have a relevant contextual score above 0.1.",
        f"Exact match is {split['baseline'].em} with all documents, {split['gold'].em} with the relevant one alone and "
        f"{split['negative'].em} without it.",
        f"The best split-softmax setting ({best}) reaches {split[best].em}; exact McNemar test against the baseline: "
        f"{test}. It was chosen on the questions it is shown on.",
        f"The focus direction chosen on validation questions ({chosen}) reaches {steer[chosen].em} on held-out ones, "
        f"against {steer['baseline'].em}; exact McNemar test: {steered}.",
    ]


def _tables(cases: Mapping[str, ContextualScores], split: Sweep, steer: Sweep, ranking: Sequence[Head]) -> list[Table]:
    kinds = ("relevant", "irrelevant", "irrelevant_max", "sink")
    rows: list[tuple[Any, ...]] = []
    for name, scores in cases.items():
        if len(scores) and not scores.relevant.isnan().all():
            means = {kind: scores.mean(kind) for kind in kinds}
            rows += [
                (name, len(scores), str(head), *(round(float(means[kind][head]), 3) for kind in kinds))
                for head in ranking[:5]
            ]
    scores = Table(
        "Contextual scores (share of attention) of the top five heads by case",
        ("case", "samples", "head", "relevant", "irrelevant", "irrelevant max", "sink"),
        tuple(rows),
    )
    return [
        scores,
        _sweep_table("Split-softmax on held-out questions", split),
        _sweep_table("Focus directions on held-out questions", steer),
    ]


def _sweep_table(caption: str, sweep: Sweep) -> Table:
    rows = tuple(
        (
            row["name"],
            round(row["em"], 3),
            f"[{row['em_low']:.3f}, {row['em_high']:.3f}]",
            row["gained"],
            row["lost"],
            f"{row['mcnemar_p']:.2g}",
        )
        for row in sweep.rows()
    )
    return Table(
        f"{caption}: exact match, 95 % interval, questions gained and lost against the baseline, McNemar's exact p",
        ("setting", "exact match", "interval", "gained", "lost", "p"),
        rows,
    )


def _views(
    model: FocusModel, split: Sweep, best: str, ranking: Sequence[Head], samples: Sequence[MultiDocSample]
) -> list[tuple[str, AttentionView]]:
    """One question that split-softmax repaired (else the first), before and after, and its tokens in circuitsvis."""
    index = _repaired(split["baseline"], split[best])
    sample, heads = samples[index], list(ranking[:_SHOWN_HEADS])
    intervention = next(s.interventions for s in split.settings if s.name == best)
    views: list[tuple[str, AttentionView]] = []
    for name, applied in (("baseline", ()), (best, intervention)):
        views.append(_documents(model, sample, heads, name, applied))
    views.append(_tokens(model, sample, heads))
    return views


def _repaired(before: Evaluation, after: Evaluation) -> int:
    pairs = enumerate(zip(before.correct, after.correct, strict=True))
    return next((i for i, (was, now) in pairs if now and not was), 0)


def _documents(
    model: FocusModel, sample: MultiDocSample, heads: Sequence[Head], name: str, applied: Sequence[Intervention]
) -> tuple[str, AttentionView]:
    looked = response_attention(
        model, sample.prompt("long"), heads, interventions=applied, max_new_tokens=24, name=name
    )
    caption = f"{name}. Question: {sample.question} Accepted: {', '.join(sample.answers)}. Response: {looked.text}"
    return caption, document_view(looked)


def _tokens(model: FocusModel, sample: MultiDocSample, heads: Sequence[Head]) -> tuple[str, AttentionView]:
    """The relevant document, the question and the response, token by token."""
    prompt = sample.prompt("long")
    encoded, response = model.encode(prompt), model.generate(prompt, max_new_tokens=24)
    tokens = torch.cat((encoded.tokens, response.tokens))
    (start, end), (asked, _) = encoded.spans["relevant"][0], encoded.spans["question"][0]
    positions = sorted({0, 1, *range(start, end), *range(asked, len(tokens))})
    pattern = attention_pattern(model, encoded, response.tokens, heads, positions)
    view = attention_view(
        [model.tokenizer.decode([int(tokens[i])]) or "·" for i in positions],
        pattern,
        [str(head) for head in heads],
        places=positions,
        max_tokens=max(128, len(positions)),
        title="The sink, the relevant document, the question and the response (baseline)",
    )
    return "Token by token (circuitsvis): the sink, the relevant document, the question and the response.", view
