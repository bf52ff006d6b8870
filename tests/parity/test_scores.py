"""Contextual scores against a direct computation on the full patterns of Hugging Face's eager attention."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import focuslens as fl
from focuslens import FocusModel
from focuslens.scores.contextual_scores import ScoredCase
from tests.support.reference import (
    Edits,
    ReferenceModel,
    add_to_rows,
    document_ranges,
    gap,
    prompt_text,
    scores_of_rows,
    split_softmax_rows,
    tokens_of_ranges,
)

if TYPE_CHECKING:
    from focuslens import MultiDocSample

KINDS = ("relevant", "irrelevant", "irrelevant_max", "sink")

TOLERANCE = 1e-4
"""Tolerance of scores, which are means of sums of attention weights.

Each weight is accurate to a few 1e-7. Logits that differ by 1e-4 (rotary tables of ``HookedTransformer``) change a
weight by at most 1e-4 of its value.
"""

FAMILIES = ("llama", "qwen2", "qwen3", "mistral")

RESPONSES = ("The silver lantern", "queen 42.", "naïve señor of the winter harbour bridge", "x")
"""Fixed responses of unequal length. One has multi-byte characters, and one has only one or two tokens."""


def scores_by_hand(
    hf: ReferenceModel, sample: MultiDocSample, case: str, response: Tensor, edits: Edits | None = None, shift: int = 0
) -> dict[str, Tensor]:
    """The four scores ``[layer head]`` from equation 1, computed on the full pattern. ``shift`` moves the rows."""
    ids = hf.ids(prompt_text(sample, case))
    patterns = hf.patterns(torch.cat((ids, response)), edits)
    return scores_of_rows(hf, sample, case, patterns[:, :, len(ids) + shift : len(ids) + len(response) + shift])


def given_response(hf: ReferenceModel, sample: MultiDocSample, case: str, response: str) -> Tensor:
    """Tokens of a response when Hugging Face's tokenizer encodes prompt and response as one text."""
    prompt = hf.ids(prompt_text(sample, case)).tolist()
    text = hf.text(prompt_text(sample, case)) + (response if hf.chat else " " + response)
    whole = hf.tokenizer(text, add_special_tokens=not hf.chat)["input_ids"]
    assert whole[: len(prompt)] == prompt
    return torch.tensor(whole[len(prompt) :])


def check(scores: Any, expected: list[dict[str, Tensor]], rows: slice = slice(None)) -> None:
    for kind in KINDS:
        wanted = torch.stack([one[kind] for one in expected])
        assert gap(getattr(scores, kind)[rows], wanted) < TOLERANCE, kind


@pytest.mark.parametrize(
    ("name", "case"),
    [(name, case) for name in FAMILIES for case in ("long", "gold", "negative")]
    + [("llama_chat", "long"), ("mistral_window", "long")],
)
def test_scores_of_given_responses(name, case, backend, load_model, reference, samples):
    model, hf = load_model(name, backend), reference(name)
    ids = [given_response(hf, sample, case, text) for sample, text in zip(samples, RESPONSES, strict=True)]
    assert len({len(one) for one in ids}) > 2
    expected = [scores_by_hand(hf, sample, case, one) for sample, one in zip(samples, ids, strict=True)]
    for batch_tokens in (1, 600):
        scores = fl.contextual_scores(model, samples, case=case, responses=RESPONSES, batch_tokens=batch_tokens)
        check(scores, expected)
        assert scores.responses == RESPONSES


@pytest.mark.parametrize("name", [*FAMILIES, "llama_chat", "mistral_window"])
def test_the_rows_and_the_parts_matter(name, reference, samples):
    """The tests above can fail: scores of the rows before, or of another kind, would exceed the tolerance."""
    hf = reference(name)
    ids = [given_response(hf, sample, "long", text) for sample, text in zip(samples, RESPONSES, strict=True)]
    here = [scores_by_hand(hf, *pair) for pair in zip(samples, ["long"] * 4, ids, strict=True)]
    before = [scores_by_hand(hf, sample, "long", one, shift=-1) for sample, one in zip(samples, ids, strict=True)]
    # A window of 24 keys reaches back to the last document at most.
    kinds = ("relevant", "irrelevant") if name == "mistral_window" else KINDS
    for i, first in enumerate(kinds):
        assert max(gap(a[first], b[first]) for a, b in zip(here, before, strict=True)) > 0.01
        for second in kinds[:i]:
            assert max(gap(one[first], one[second]) for one in here) > 0.01


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral_window"])
def test_scores_of_generated_responses(name, backend, load_model, reference, samples):
    """Scores of generated responses that end at different steps. The scores of an empty response are NaN."""
    hf = reference(name)
    ids = [hf.ids(prompt_text(sample, "long")) for sample in samples]
    free = [hf.generate(one, 5) for one in ids]
    stop = [free[1][2], free[2][0]]
    responses = [hf.generate(one, 5, stop=stop) for one in ids]
    assert [] in responses
    assert len({len(response) for response in responses}) > 1
    loaded = load_model(name, backend)
    model = FocusModel(loaded.hooked, loaded.tokenizer, stop_strings=(), stop_tokens=stop)
    expected = [
        scores_by_hand(hf, sample, "long", torch.tensor(response)) if response else None
        for sample, response in zip(samples, responses, strict=True)
    ]
    for batch_tokens in (1, 600):
        scores = fl.contextual_scores(model, samples, batch_tokens=batch_tokens, max_new_tokens=5)
        for i, (by_hand, response) in enumerate(zip(expected, responses, strict=True)):
            assert scores.responses[i] == hf.tokenizer.decode(response, skip_special_tokens=True).strip()
            if by_hand is None:
                assert all(getattr(scores, kind)[i].isnan().all() for kind in KINDS)
            else:
                check(scores, [by_hand], slice(i, i + 1))


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_scores_under_interventions(name, backend, load_model, reference, samples):
    """Scores are computed on the pattern that interventions produce, here split-softmax over steered queries."""
    model, hf = load_model(name, backend), reference(name)
    torch.manual_seed(3)
    split, steered = [(0, 1), (1, 2), (2, 0)], [(0, 1), (0, 2), (2, 3)]
    query = torch.randn(len(steered), model.shape.d_head)
    interventions = [
        fl.SplitSoftmax(split, tau=0.2),
        fl.FocusSteering(fl.FocusDirections(steered, query), alpha=1.5),
    ]
    expected, plain = [], []
    for sample, text in zip(samples, RESPONSES, strict=True):
        prompt, response = prompt_text(sample, "long"), given_response(hf, sample, "long", text)
        span = tokens_of_ranges(hf.offsets(prompt), document_ranges(sample, hf.text(prompt))[sample.gold_index])
        edits = Edits(
            query=add_to_rows(dict(zip(steered, query, strict=True)), 1.5),
            pattern=split_softmax_rows(split, 0.2, span, len(hf.ids(prompt)) - 1),
        )
        expected.append(scores_by_hand(hf, sample, "long", response, edits))
        plain.append(scores_by_hand(hf, sample, "long", response))
    for batch_tokens in (1, 600):
        scores = fl.contextual_scores(
            model, samples, responses=RESPONSES, batch_tokens=batch_tokens, interventions=interventions
        )
        check(scores, expected)
    assert all(gap(a["relevant"], b["relevant"]) > 0.1 for a, b in zip(expected, plain, strict=True))


def test_correct_and_wrong_are_the_long_prompts_split_by_outcome(backend, load_model, reference, samples):
    """Scores of "correct" and "wrong" are those of the long prompts, split by outcome.

    With the gold document alone, the first three samples are correct. With all documents, one of these three is
    correct.
    """
    model, hf = load_model("llama", backend), reference("llama")

    def says(sample: MultiDocSample, case: str) -> str:
        return hf.tokenizer.decode(hf.generate(hf.ids(prompt_text(sample, case)), 8), skip_special_tokens=True).strip()

    def word(text: str) -> str:
        return max("".join(c if c.isascii() and c.isalpha() else " " for c in text).split(), key=len)

    both = (word(says(samples[0], "gold")), word(says(samples[0], "long")))
    gold_only = [(word(says(sample, "gold")),) for sample in samples[1:3]]
    answers = [both, *gold_only, ("never said",)]
    asked = [
        fl.MultiDocSample(one.question, accepted, one.documents, one.gold_index, one.question_id)
        for one, accepted in zip(samples, answers, strict=True)
    ]
    everything = fl.contextual_scores(model, asked, max_new_tokens=8, batch_tokens=600)
    outcomes: list[tuple[ScoredCase, list[int]]] = [("correct", [0]), ("wrong", [1, 2])]
    for case, expected in outcomes:
        scores = fl.contextual_scores(model, asked, case=case, max_new_tokens=8, batch_tokens=600)
        assert scores.sample_ids == tuple(asked[i].id for i in expected)
        for kind in KINDS:
            assert gap(getattr(scores, kind), getattr(everything, kind)[expected]) < 1e-6
