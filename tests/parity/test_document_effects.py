"""Effects of documents against float64 passes over Hugging Face's eager attention, one document at a time."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import focuslens as fl
from tests.support.reference import INSTRUCTION, Edits, document_ranges, gap, prompt_text, tokens_of_ranges
from tests.support.tiers import first_quick

TOLERANCE = {"bridge": 1e-4, "hooked": 2e-3}
"""Tolerance of the log-probability of a whole response, which is a sum over up to five tokens."""

FAMILIES = pytest.mark.parametrize("name", first_quick(["llama", "qwen3", "mistral_window", "llama_chat"]))
GIVEN = ["the copper garden", "river", "  ", "a silver lantern of the harbour"]


def log_probability(logits: Tensor, response: Tensor) -> float:
    """Log-probability of a response from the logits of the prompt and the response, token by token."""
    first = len(logits) - len(response)
    rows = logits[first - 1 : -1].log_softmax(dim=-1)
    return sum(float(row[token]) for row, token in zip(rows, response, strict=True))


def knocked_out(hf: Any, prompt: Tensor, response: Tensor, columns: list[int]) -> float:
    """Log-probability with attention weights of zero on columns, in rows from the prompt's last token on."""
    first = len(prompt) - 1

    def knock(layer: int, pattern: Tensor, _: int) -> Tensor:
        result = pattern.clone()
        for head in range(pattern.shape[1]):
            for row in range(first, pattern.shape[2]):
                weights = pattern[0, head, row].clone()
                weights[columns] = 0
                # A row of a sliding window that sees the document alone stays as it is.
                if weights.sum() > 0:
                    result[0, head, row] = weights / weights.sum()
        return result

    return log_probability(hf.logits(torch.cat((prompt, response)), Edits(pattern=knock)), response)


def prompt_without(sample: fl.MultiDocSample, index: int) -> str:
    """The prompt without one document. The other documents keep their numbers."""
    lines = [f"Document [{i + 1}](Title: {d.title}) {d.text}" for i, d in enumerate(sample.documents) if i != index]
    return INSTRUCTION + "\n\n" + "\n".join(lines) + f"\n\nQuestion: {sample.question}\nAnswer:"


@FAMILIES
@pytest.mark.parametrize("by", ["knockout", "removal"])
def test_effects_are_falls_of_the_log_probability(name, by, backend, load_model, reference, samples):
    model, hf = load_model(name, backend), reference(name, torch.float64)
    measured = fl.document_effects(model, samples, by=by, max_new_tokens=5)
    assert measured.sample_ids == tuple(sample.id for sample in samples)
    for i, sample in enumerate(samples):
        generated = model.generate(sample.prompt(), max_new_tokens=5)
        text, prompt = prompt_text(sample, "long"), hf.ids(prompt_text(sample, "long"))
        whole = log_probability(hf.logits(torch.cat((prompt, generated.tokens))), generated.tokens)
        ranges = document_ranges(sample, hf.text(text))
        lowered: list[float] = []
        for index in range(len(sample.documents)):
            if by == "knockout":
                columns = tokens_of_ranges(hf.offsets(text), ranges[index])
                lowered.append(knocked_out(hf, prompt, generated.tokens, columns))
            else:
                shorter = torch.cat((hf.ids(prompt_without(sample, index)), generated.tokens))
                lowered.append(log_probability(hf.logits(shorter), generated.tokens))
        expected = whole - torch.tensor(lowered, dtype=torch.float64)
        assert gap(measured.effects[i], expected) < TOLERANCE[backend]
        assert measured.log_probabilities[i] == pytest.approx(whole, abs=TOLERANCE[backend])
        assert expected.abs().max() > 0.1
        assert (measured.responses[i], measured.n_tokens[i]) == (generated.text, len(generated.tokens))
        assert gap(measured.per_token()[i], expected / len(generated.tokens)) < TOLERANCE[backend]


@pytest.mark.parametrize("by", ["knockout", "removal"])
def test_given_responses_of_unequal_length(by, backend, load_model, reference, samples):
    model, hf = load_model("llama", backend), reference("llama", torch.float64)
    together = fl.document_effects(model, samples, responses=GIVEN, by=by)
    alone = fl.document_effects(model, samples, responses=GIVEN, by=by, batch_tokens=1)
    assert together.responses == alone.responses == tuple(GIVEN)
    for i, (sample, response) in enumerate(zip(samples, GIVEN, strict=True)):
        assert len(together.effects[i]) == len(sample.documents)
        if not response.strip():
            assert together.n_tokens[i] == 0
            assert together.effects[i].isnan().all()
            continue
        assert gap(together.effects[i], alone.effects[i]) < 1e-4
        prompt = hf.ids(prompt_text(sample, "long"))
        joint = torch.tensor(hf.tokenizer(f"{prompt_text(sample, 'long')} {response}")["input_ids"])
        assert torch.equal(joint[: len(prompt)], prompt)
        tokens = joint[len(prompt) :]
        assert together.n_tokens[i] == len(tokens)
        whole = log_probability(hf.logits(torch.cat((prompt, tokens))), tokens)
        assert together.log_probabilities[i] == pytest.approx(whole, abs=10 * TOLERANCE[backend])
