"""Interventions of the field against Hugging Face attention that float64 loops edit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor

import focuslens as fl
from focuslens.model import attention
from tests.support.edited_rows import (
    biased_rows,
    calibrated_rows,
    dimmed_rows,
    dimmed_rows_restated,
    lit_rows,
    lit_rows_restated,
)
from tests.support.reference import Edits, ReferenceModel, Rows, document_ranges, gap, prompt_text, tokens_of_ranges
from tests.support.tiers import first_quick

HEADS = [(0, 1), (0, 3), (1, 0), (1, 2), (2, 2), (2, 3)]
EVERY_HEAD = [(layer, head) for layer in range(3) for head in range(4)]
TOLERANCE = 1e-3
"""Tolerance of logits, as for split-softmax: edited rows are as accurate as the rows before the edit."""


@dataclass(frozen=True)
class Spans:
    """Tokens of a prompt and of its spans, found without FocusLens."""

    ids: Tensor
    documents: list[list[int]]
    relevant: list[int]
    irrelevant: list[int]

    @classmethod
    def of(cls, hf: ReferenceModel, sample: Any) -> Spans:
        prompt = prompt_text(sample, "long")
        offsets, ranges = hf.offsets(prompt), document_ranges(sample, hf.text(prompt))
        documents = [tokens_of_ranges(offsets, ranges[i]) for i in sorted(ranges)]
        others = [j for i, tokens in enumerate(documents) if i != sample.gold_index for j in tokens]
        return cls(hf.ids(prompt), documents, documents[sample.gold_index], others)

    @property
    def last(self) -> int:
        """Position of the first row that produces the response."""
        return len(self.ids) - 1


Case = tuple[Any, Callable[[Spans], Rows]]

CASES: dict[str, Case] = {
    "bias on the response": (fl.LogitBias(HEADS, 2.0), lambda s: biased_rows(HEADS, 2.0, s.relevant, s.last)),
    "bias in all rows": (
        fl.LogitBias(None, math.log(3), "irrelevant", "all"),
        lambda s: biased_rows(EVERY_HEAD, math.log(3), s.irrelevant, 0),
    ),
    "negative bias": (
        fl.LogitBias(HEADS, -200.0, "irrelevant"),
        lambda s: biased_rows(HEADS, -200.0, s.irrelevant, s.last),
    ),
    "large bias": (fl.LogitBias(HEADS, 900.0), lambda s: biased_rows(HEADS, 900.0, s.relevant, s.last)),
    "PASTA": (fl.Pasta(HEADS), lambda s: dimmed_rows(HEADS, 0.01, s.relevant, len(s.ids), 0)),
    "PASTA on several ranges": (
        fl.Pasta(None, 0.2, "irrelevant"),
        lambda s: dimmed_rows(EVERY_HEAD, 0.2, s.irrelevant, len(s.ids), 0),
    ),
    "PASTA on the response": (
        fl.Pasta(HEADS, 1e-50, positions="response"),
        lambda s: dimmed_rows(HEADS, 1e-50, s.relevant, len(s.ids), s.last),
    ),
    "SpotLight": (fl.SpotLight(0.4), lambda s: lit_rows(EVERY_HEAD, 0.4, s.relevant, len(s.ids), prompt=True)),
    "SpotLight on several ranges": (
        fl.SpotLight(0.9, "irrelevant", HEADS),
        lambda s: lit_rows(HEADS, 0.9, s.irrelevant, len(s.ids), prompt=True),
    ),
    "SpotLight on the response": (
        fl.SpotLight(0.4, positions="response"),
        lambda s: lit_rows(EVERY_HEAD, 0.4, s.relevant, len(s.ids), prompt=False),
    ),
}
FURTHER = [70, 300, 5, 90]
"""Tokens of a response."""


@pytest.mark.parametrize("name", first_quick(["llama", "qwen3"]))
@pytest.mark.parametrize("kind", CASES)
def test_logits_are_those_of_edited_rows(
    kind: str, name: str, backend: str, load_model: Any, reference: Any, samples: Any
) -> None:
    model, hf, sample = load_model(name, backend), reference(name), samples[2]
    spans, (intervention, rows) = Spans.of(hf, sample), CASES[kind]
    tokens = torch.cat((spans.ids, torch.tensor(FURTHER)))
    expected, plain = hf.logits(tokens, Edits(pattern=rows(spans))), hf.logits(tokens)
    actual = model.logits(tokens, [intervention], prompt=sample.prompt("long"))
    assert gap(actual, expected) < TOLERANCE
    changed = (expected - plain).abs().amax(dim=-1)
    assert changed[spans.last :].max() > 0.05
    assert (changed[: spans.last].max() > 0.02) == intervention.changes_prompt


@pytest.mark.parametrize("kind", first_quick(CASES, 3))
def test_a_padded_batch_runs_prompts_and_responses_as_each_prompt_alone(
    kind: str, backend: str, load_model: Any, reference: Any, samples: Any
) -> None:
    """Logits of the prompts' last rows and of rows after a cache, with the last token held back and without."""
    model, hf = load_model("llama", backend), reference("llama")
    intervention, rows = CASES[kind]
    prompts, further = [sample.prompt() for sample in samples[2:]], torch.tensor(FURTHER).expand(2, -1)
    assert len({len(model.encode(prompt).tokens) for prompt in prompts}) > 1
    whole = model.prefill(prompts, [intervention])
    assert whole.logits is not None
    held = model.prefill(prompts, [intervention], hold_last=True)
    after = [model.extend(prefix, further, [intervention])[0] for prefix in (whole, held)]
    for i, sample in enumerate(samples[2:]):
        spans = Spans.of(hf, sample)
        tokens = torch.cat((spans.ids, torch.tensor(FURTHER)))
        expected = hf.logits(tokens, Edits(pattern=rows(spans)))[spans.last :]
        assert gap(whole.logits[i], expected[0]) < TOLERANCE
        assert all(gap(logits[i], expected[1:]) < TOLERANCE for logits in after)


@pytest.mark.parametrize("kind", first_quick(CASES, 3))
def test_responses_are_those_of_edited_rows(
    kind: str, backend: str, load_model: Any, reference: Any, samples: Any
) -> None:
    """Responses of a batch and of a sweep equal those of Hugging Face's cached generation for each prompt alone."""
    model, hf, (intervention, rows) = load_model("llama", backend), reference("llama"), CASES[kind]
    expected: list[list[int]] = []
    for sample in samples[2:]:
        spans = Spans.of(hf, sample)
        expected.append(hf.generate(spans.ids, 6, Edits(pattern=rows(spans))))
    batched = model.generate([sample.prompt() for sample in samples[2:]], [intervention], max_new_tokens=6)
    assert [response.tokens.tolist() for response in batched] == expected
    texts = [response.text for response in batched]
    other = fl.SplitSoftmax(HEADS, 0.1)
    grid = [fl.Setting("plain"), fl.Setting("other", (other,)), fl.Setting("edited", (intervention,))]
    sweep = fl.run_sweep(model, samples[2:], grid, max_new_tokens=6)
    assert list(sweep["edited"].responses) == texts
    assert sweep["plain"].responses != sweep["edited"].responses


@pytest.mark.parametrize("kind", ["bias in all rows", "PASTA", "SpotLight", "SpotLight on the response"])
def test_rows_in_blocks_are_edited_as_all_rows_at_once(
    kind: str, backend: str, load_model: Any, samples: Any, monkeypatch: Any
) -> None:
    model, prompts, (intervention, _) = load_model("llama", backend), [one.prompt() for one in samples[2:]], CASES[kind]
    whole = model.prefill(prompts, [intervention]).logits
    monkeypatch.setattr(attention, "BLOCK", 7 * 2 * 4 * len(model.encode(prompts[0]).tokens))
    torch.testing.assert_close(model.prefill(prompts, [intervention]).logits, whole, atol=1e-4, rtol=0)


def test_pasta_is_the_authors_change_of_the_mask(backend: str, load_model: Any, reference: Any, samples: Any) -> None:
    model, hf, sample = load_model("qwen2", backend), reference("qwen2"), samples[0]
    spans = Spans.of(hf, sample)
    part = (spans.relevant[0], spans.relevant[-1] + 1)
    tokens = torch.cat((spans.ids, torch.tensor(FURTHER)))
    expected = hf.logits(tokens, Edits(pattern=dimmed_rows_restated(HEADS, 0.05, part, len(spans.ids))))
    actual = model.logits(tokens, [fl.Pasta(HEADS, 0.05, part)], prompt=sample.prompt())
    assert gap(actual, expected) < TOLERANCE


def test_spotlight_is_the_authors_hook_on_each_pass(
    backend: str, load_model: Any, reference: Any, samples: Any
) -> None:
    model, hf, sample = load_model("qwen2", backend), reference("qwen2"), samples[0]
    spans = Spans.of(hf, sample)
    part = (spans.relevant[0], spans.relevant[-1] + 1)
    tokens = torch.cat((spans.ids, torch.tensor(FURTHER)))
    expected = hf.logits(tokens, Edits(pattern=lit_rows_restated(0.5, part, len(spans.ids))))
    actual = model.logits(tokens, [fl.SpotLight(0.5, part)], prompt=sample.prompt())
    assert gap(actual, expected) < TOLERANCE
    assert gap(expected, hf.logits(tokens)) > 0.1


DUMMY = "stone of the river."


def measured(
    hf: ReferenceModel, sample: Any, documents: Sequence[Sequence[int]], dummies: str
) -> tuple[list[float], list[float]]:
    """Mean attention of the last row to the tokens of each document, and of a dummy in its place."""

    def means(text: str, places: Sequence[Sequence[int]]) -> list[float]:
        rows = hf.patterns(hf.ids(text)).double()[:, :, -1].mean(dim=(0, 1))
        return [math.fsum(rows[list(tokens)].tolist()) / len(tokens) for tokens in places]

    text = prompt_text(sample, "long")
    ranges, texts = document_ranges(sample, text), {}
    for k, (start, end) in ranges.items():
        copies = max(1, round((end - start + 1) / (len(DUMMY) + 1)))
        texts[k] = " ".join([DUMMY] * copies)
    bias: list[float] = []
    for k, (start, end) in ranges.items():
        if dummies == "one":
            changed, first = text[:start] + texts[k] + text[end:], start
        else:
            changed, first, reached = "", 0, 0
            for i, (a, b) in ranges.items():
                changed += text[reached:a]
                first = len(changed) if i == k else first
                changed, reached = changed + texts[i], b
            changed += text[reached:]
        tokens = tokens_of_ranges(hf.offsets(changed), (first, first + len(texts[k])))
        bias += means(changed, [tokens])
    return means(text, documents), bias


@pytest.mark.parametrize("name", first_quick(["llama", "mistral_window"]))
@pytest.mark.parametrize("relative_to", ["mean", "row"])
@pytest.mark.parametrize(("dummies", "layers"), first_quick([("one", 2), ("all", 16)]))
def test_calibrated_attention_is_that_of_full_patterns(
    name: str, relative_to: Any, dummies: Any, layers: int, backend: str, load_model: Any, reference: Any, samples: Any
) -> None:
    """Measured attention of a batch, logits of each prompt, and responses of the batch and of a sweep."""
    model, hf = load_model(name, backend), reference(name)
    temperature = 0.004
    method = fl.PositionCalibration(temperature, layers, DUMMY, dummies=dummies, relative_to=relative_to)
    prompts = [sample.prompt() for sample in samples]
    found = method.measure(model, model.prefill(prompts, hold_last=True))
    heads = [(layer, head) for layer, head in EVERY_HEAD if layer >= 3 - layers]
    expected_tokens: list[list[int]] = []
    for sample, values in zip(samples, found, strict=True):
        spans = Spans.of(hf, sample)
        attention, bias = measured(hf, sample, spans.documents, dummies)
        assert values.attention == pytest.approx(attention, abs=1e-6)
        assert values.bias == pytest.approx(bias, abs=1e-6)
        assert sum(values.shares) == pytest.approx(1)
        rows = calibrated_rows(
            heads, spans.documents, attention, bias, temperature, spans.last, relative_to=relative_to
        )
        tokens = torch.cat((spans.ids, torch.tensor(FURTHER)))
        expected, plain = hf.logits(tokens, Edits(pattern=rows)), hf.logits(tokens)
        actual = model.logits(tokens, [method], prompt=sample.prompt())
        assert gap(actual, expected) < 2 * TOLERANCE
        assert gap(expected[: spans.last], plain[: spans.last]) < 1e-5
        # The window of 24 keys contains the end of one document only, whose attention cannot move to another one.
        assert (gap(expected, plain) > 0.02) == (name == "llama")
        expected_tokens.append(hf.generate(spans.ids, 4, Edits(pattern=rows)))
    responses = model.generate(prompts, [method], max_new_tokens=4)
    assert [response.tokens.tolist() for response in responses] == expected_tokens
    grid = [fl.Setting("plain"), fl.Setting("edited", (method,)), fl.Setting("split", (fl.SplitSoftmax(HEADS, 0.1),))]
    sweep = fl.run_sweep(model, samples, grid, max_new_tokens=4)
    assert list(sweep["edited"].responses) == [response.text for response in responses]


@pytest.mark.parametrize("method", [*(case[0] for case in CASES.values()), fl.PositionCalibration(0.004, 2, DUMMY)])
def test_rows_sum_to_one(method: Any, backend: str, load_model: Any, samples: Any) -> None:
    model, prompt = load_model("qwen2", backend), samples[0].prompt()
    sums: list[Tensor] = []

    def observe(pattern: Tensor, hook: Any) -> None:
        sums.append(pattern.double().sum(dim=-1))

    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(3)]
    hooks = [*method.hooks(model, prompt), *((name, observe) for name in names)]
    model.hooked.run_with_hooks(model.to_tokens(prompt), fwd_hooks=hooks)
    assert len(sums) == 3
    for total in sums:
        torch.testing.assert_close(total, torch.ones_like(total), atol=2e-6, rtol=0)
