"""Many architectures at a tiny size: a checkpoint has the logits and responses of transformers, or it is refused.

The table in the documentation lists the outcomes. ``FOCUSLENS_WRITE_TABLES=1`` writes it anew.
"""

from __future__ import annotations

import os
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from focuslens import EncodedPrompt, FocusModel
from tests.support.architectures import ARCHITECTURES, Architecture, build_architecture
from tests.support.paths import ROOT
from tests.support.versions import HAS_HOOKED

pytestmark = pytest.mark.slow

PAGE = ROOT / "docs" / "architectures.md"
START, END = "<!-- table: written by a test -->\n", "<!-- end of the table -->\n"
POINTS = ("hook_q", "hook_k", "hook_rot_q", "hook_attn_scores", "hook_pattern", "hook_z")
TOLERANCE = 1e-3
"""Largest difference between logits whose standard deviation is about 1.6. ``HookedTransformer`` differs by 1e-4."""


@dataclass(frozen=True)
class Outcome:
    """What opening a tiny checkpoint gives: the kind of model with its difference to transformers, or a refusal."""

    kind: str
    difference: float
    points: tuple[str, ...]
    refusal: str

    @property
    def cells(self) -> tuple[str, str, str]:
        if self.refusal:
            return "refused", self.refusal, ""
        points = ", ".join(f"`{point}`" for point in self.points)
        return "equal", f"{self.kind}, {self.difference:.0e}", points


def acting_points(model: FocusModel) -> tuple[str, ...]:
    acting: list[str] = []
    for point in POINTS:
        try:
            model.points.require_acting([f"blocks.0.attn.{point}"])
        except ValueError:
            continue
        acting.append(point)
    return tuple(acting)


@torch.no_grad()
def reference_of(directory: Path, prompts: list[torch.Tensor], n: int) -> tuple[list[torch.Tensor], list[list[int]]]:
    """Logits and greedy responses of transformers, one prompt at a time."""
    logits, responses = list[torch.Tensor](), list[list[int]]()
    for tokens in prompts:
        # A fresh model for each prompt, because dynamic NTK remembers the longest sequence that it has seen.
        plain: Any = cast("Any", AutoModelForCausalLM).from_pretrained(directory, attn_implementation="eager")
        logits.append(plain(tokens[None], use_cache=False).logits[0])
        made = plain.generate(tokens[None], max_new_tokens=n, do_sample=False, eos_token_id=None, pad_token_id=2)
        responses.append(made[0, len(tokens) :].tolist())
    return logits, responses


def outcome_of(directory: Path, architecture: Architecture) -> Outcome:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            model = FocusModel.from_pretrained(str(directory), device="cpu", chat=False, n_ctx=architecture.n_ctx)
        except ValueError as error:
            return Outcome("", 0.0, (), str(error).replace(f"'{directory}'", "the checkpoint"))
    # Longer than the windows, and on both sides of the lengths at which rotary tables change (64 tokens).
    prompts = [(5 + (torch.arange(length) * 31) % 490) for length in (90, 59, 30)]
    logits, responses = reference_of(directory, prompts, 9)
    unending = FocusModel(model.backend, model.tokenizer, chat=False, stop_strings=(), stop_tokens=())
    batch = [model.batch([EncodedPrompt(tokens, {})]).prompts[0] for tokens in prompts]
    differences = [
        float((model.logits(tokens) - right).abs().max()) for tokens, right in zip(prompts, logits, strict=True)
    ]
    together = [response.tokens.tolist() for response in unending.generate(batch, max_new_tokens=9)]
    alone = [unending.generate(prompt, max_new_tokens=9).tokens.tolist() for prompt in batch]
    assert alone == responses, architecture.name
    assert together == responses, architecture.name
    return Outcome(type(model.hooked).__name__, max(differences), acting_points(model), "")


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory: pytest.TempPathFactory, checkpoint: Any) -> dict[str, Outcome]:
    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint("llama"))
    found: dict[str, Outcome] = {}
    for architecture in ARCHITECTURES:
        directory = build_architecture(architecture, tmp_path_factory.mktemp("architecture"), tokenizer)
        found[architecture.name] = outcome_of(directory, architecture)
    return found


def test_a_checkpoint_has_the_logits_of_transformers_or_is_refused(outcomes: dict[str, Outcome]) -> None:
    assert len(outcomes) >= 40
    wrong = {name: outcome for name, outcome in outcomes.items() if outcome.difference > TOLERANCE}
    assert wrong == {}
    refused = [name for name, outcome in outcomes.items() if outcome.refusal]
    assert len(refused) < len(outcomes) / 3


@pytest.mark.skipif(not HAS_HOOKED, reason="the page lists the outcomes with TransformerLens 3")
def test_the_documentation_lists_the_outcomes(outcomes: dict[str, Outcome]) -> None:
    """The numbers of the page are those of the machine that wrote it. Other machines round in another way."""
    text = PAGE.read_text()
    head, rest = text.split(START)
    old, tail = rest.split(END)
    if os.environ.get("FOCUSLENS_WRITE_TABLES"):
        PAGE.write_text(head + START + "\n" + table_of(outcomes) + "\n" + END + tail)
        return
    rows = {row.split("|")[1].strip(): row for row in old.splitlines() if row.startswith("| ") and "---" not in row}
    assert list(rows)[1:] == list(outcomes)
    for name, outcome in outcomes.items():
        kind, why, points = outcome.cells
        cells = [cell.strip() for cell in rows[name].split("|")]
        assert cells[3] == kind
        assert cells[5] == points
        assert cells[4].split(",")[0] == why.split(",")[0].replace("|", "/")


def table_of(outcomes: dict[str, Outcome]) -> str:
    features = {architecture.name: architecture.feature for architecture in ARCHITECTURES}
    lines = [
        "| Architecture | Feature | Outcome | Kind of model and largest difference, or reason | Hook points that act |",
        "|---|---|---|---|---|",
    ]
    for name, outcome in outcomes.items():
        kind, why, points = outcome.cells
        lines.append(f"| {name} | {features[name]} | {kind} | {why.replace('|', '/')} | {points} |")
    return "\n".join(lines) + "\n"
