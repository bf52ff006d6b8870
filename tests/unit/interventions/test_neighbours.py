"""Logit biases, PASTA, SpotLight and position calibration: arguments, descriptions, and rows that must not change."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest
import torch
from torch import Tensor

import focuslens as fl
from focuslens.interventions import Lanes, intervention_from
from focuslens.interventions.logit_bias import bias_factors
from focuslens.prompts.rewriting import Edit

# pyright: reportArgumentType=false

HEADS = [fl.Head(0, 1), fl.Head(2, 3)]
METHODS: list[Any] = [
    fl.LogitBias(HEADS, 1.5, (2, 9), "all"),
    fl.LogitBias(None, -0.5, "irrelevant"),
    fl.Pasta(HEADS, 0.05, "question", "response"),
    fl.Pasta(None),
    fl.SpotLight(0.3),
    fl.SpotLight(1.0, (1, 2), HEADS, "response"),
    fl.PositionCalibration(),
    fl.PositionCalibration(0.1, 3, "nothing", False, "all", "row"),
]


@pytest.mark.parametrize("method", METHODS)
def test_a_method_is_rebuilt_from_its_description(method: Any) -> None:
    description = json.loads(json.dumps(method.describe()))
    assert intervention_from(description) == method
    assert isinstance(method, fl.Intervention)
    assert hash(method) == hash(intervention_from(description))


def test_all_heads_are_none_and_lanes_act_on_all_of_them() -> None:
    assert Lanes([[fl.Pasta(HEADS)], [fl.LogitBias(HEADS[:1], 1.0)]]).heads == tuple(HEADS)
    assert Lanes([[fl.Pasta(HEADS)], [fl.SpotLight(0.5)]]).heads is None
    assert [fl.Pasta(HEADS).changes_prompt, fl.LogitBias(HEADS, 1.0).changes_prompt] == [True, False]


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("work", "error", "message"),
    [
        (lambda: fl.LogitBias(HEADS, math.inf), ValueError, "bias is inf; it must be a finite number"),
        (lambda: fl.LogitBias(HEADS, "1"), TypeError, "bias is '1', a str; it must be one number"),
        (lambda: fl.LogitBias("all", 1.0), TypeError, "heads is 'all'; heads are"),
        (lambda: fl.LogitBias(HEADS, 1.0, (4, 4)), ValueError, r"span is \(4, 4\); it must be a name or one range"),
        (lambda: fl.LogitBias(HEADS, 1.0, positions="prompt"), ValueError, "positions is 'prompt'; it must be one of"),
        (lambda: fl.Pasta(HEADS, 0), ValueError, "alpha is 0.0; it must be a finite number above 0"),
        (lambda: fl.Pasta(HEADS, math.nan), ValueError, "alpha is nan; it must be"),
        (lambda: fl.Pasta(HEADS, positions="some"), ValueError, "positions is 'some'; it must be one of all, response"),
        (lambda: fl.SpotLight(0), ValueError, "target is 0.0; it must be a proportion"),
        (lambda: fl.SpotLight(1.01), ValueError, "target is 1.01; it must be a proportion of the attention"),
        (lambda: fl.SpotLight(0.1, positions="some"), ValueError, "positions is 'some'"),
        (lambda: fl.PositionCalibration(0), ValueError, "temperature is 0.0; it must be a finite number above 0"),
        (lambda: fl.PositionCalibration(layers=0), ValueError, "layers is 0; it must be at least 1"),
        (lambda: fl.PositionCalibration(layers=1.5), TypeError, "layers is 1.5, a float; it must be an integer"),
        (lambda: fl.PositionCalibration(dummies="two"), ValueError, "dummies is 'two'; it must be one of one, all"),
        (
            lambda: fl.PositionCalibration(relative_to="x"),
            ValueError,
            "relative_to is 'x'; it must be one of mean, row",
        ),
        (lambda: fl.PositionCalibration(dummy=" "), ValueError, "dummy is empty"),
        (lambda: fl.PositionCalibration().hooks("a model", "a text"), TypeError, "needs a FocusModel, not a str"),
    ],
)
def test_wrong_arguments_are_named(work: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        work()


def test_settings_that_do_not_fit_the_model_or_prompt_are_refused(tiny_model: fl.FocusModel, samples: Any) -> None:
    model, prompt = tiny_model, samples[0].prompt()
    for method in (fl.LogitBias([(7, 0)], 1.0), fl.Pasta([(7, 0)]), fl.SpotLight(0.5, heads=[(7, 0)])):
        with pytest.raises(ValueError, match=r"head \(7, 0\) does not exist"):
            method.hooks(model, prompt)
        with pytest.raises(ValueError, match="needs the prompt"):
            method.hooks(model)
    for method in (fl.LogitBias(None, 1.0, "x"), fl.Pasta(None, span="x"), fl.SpotLight(0.5, "x")):
        with pytest.raises(KeyError, match="no span 'x'"):
            method.hooks(model, prompt)
    tokens = model.encode(prompt).tokens
    only_tokens = fl.EncodedPrompt(tokens, {"document": ((2, 9),)})
    with pytest.raises(ValueError, match="the text of a prompt is unknown, so its documents cannot be replaced"):
        model.generate(only_tokens, [fl.PositionCalibration()], max_new_tokens=1)
    with pytest.raises(KeyError, match="no span 'document'"):
        model.generate("a text", [fl.PositionCalibration()], max_new_tokens=1)


NEUTRAL: list[Any] = [
    fl.LogitBias(None, 0.0, positions="all"),
    fl.LogitBias([], 5.0),
    fl.Pasta(None, 1.0),
    fl.Pasta([]),
    fl.SpotLight(1e-12),
    fl.SpotLight(0.9, heads=[]),
]


@pytest.mark.parametrize("method", NEUTRAL)
def test_neutral_settings_change_nothing(method: Any, tiny_model: fl.FocusModel, samples: Any) -> None:
    prompts = [sample.prompt() for sample in samples[2:]]
    pattern = torch.randn(2, 4, 9, len(tiny_model.encode(prompts[0]).tokens) + 9).softmax(dim=-1)
    for _, hook in method.hooks(tiny_model, prompts, cursor=fl.Cursor(pattern.shape[-1] - 9)):
        assert torch.equal(hook.on_rows(pattern.clone()), pattern)
    plain = tiny_model.prefill(prompts).logits
    edited = tiny_model.prefill(prompts, [method]).logits
    torch.testing.assert_close(edited, plain, atol=1e-4, rtol=0)


@pytest.mark.parametrize("method", [fl.LogitBias(None, 3.0), fl.Pasta(None), fl.SpotLight(0.9)])
def test_prompts_without_the_span_stay_as_they_are(method: Any, tiny_model: fl.FocusModel, samples: Any) -> None:
    prompts = [samples[0].prompt("negative"), samples[1].prompt("long")]
    further = torch.tensor([[70, 300], [5, 90]])
    plain, _ = tiny_model.extend(tiny_model.prefill(prompts), further)
    edited, _ = tiny_model.extend(tiny_model.prefill(prompts, [method]), further, [method])
    torch.testing.assert_close(edited[0], plain[0], atol=1e-4, rtol=0)
    assert (edited[1] - plain[1]).abs().max() > 0.02


def test_one_document_or_none_leaves_the_attention_to_documents_alone(tiny_model: fl.FocusModel, samples: Any) -> None:
    sample = samples[0]
    prompts = [sample.prompt("gold"), fl.Prompt("no documents", spans={"document": []})]
    plain = tiny_model.generate(prompts, max_new_tokens=4)
    edited = tiny_model.generate(prompts, [fl.PositionCalibration()], max_new_tokens=4)
    assert [one.tokens.tolist() for one in edited] == [one.tokens.tolist() for one in plain]


@pytest.mark.parametrize("bias", [-1000.0, -100.0, -1.0, 1.0, 100.0, 1000.0])
@pytest.mark.parametrize("mass", [1e-300, 1e-42, 0.5, 1 - 1e-16])
def test_factors_of_any_bias_and_mass_keep_the_sum(bias: float, mass: float) -> None:
    on_span, elsewhere = torch.tensor([mass, 1 - mass], dtype=torch.float64).view(2, 1, 1, 1, 1)
    inside, outside = bias_factors(on_span, elsewhere, torch.full((1, 1, 1), bias, dtype=torch.float64))
    new = (on_span * inside, elsewhere * outside)
    assert sum(map(float, new)) == pytest.approx(1, abs=1e-12)
    odds = math.log(mass) - math.log1p(-mass) + bias
    assert float(new[0]) == pytest.approx(1 / (1 + math.exp(-odds)) if odds > -700 else 0.0, rel=1e-9, abs=1e-300)
    for edge in (torch.zeros_like(on_span), torch.ones_like(on_span)):
        same = bias_factors(edge, 1 - edge, torch.full((1, 1, 1), bias, dtype=torch.float64))
        assert [float(x) for x in same] == [1.0, 1.0]


def test_tiny_masses_in_single_precision_are_edited_exactly(tiny_model: fl.FocusModel, samples: Any) -> None:
    """A span with 1e-42 of the attention that is raised, and all but 1e-42 of it that is lowered."""
    prompt = tiny_model.encode(samples[0].prompt())
    ((start, end),) = prompt.spans["relevant"]
    pattern = torch.zeros(1, 4, 1, len(prompt.tokens))
    pattern[..., 0], pattern[..., start] = 1, 1e-42
    tiny = float(pattern[0, 0, 0, start])

    def edited(method: Any, weights: Tensor) -> Tensor:
        return method.hooks(tiny_model, prompt, cursor=fl.Cursor(len(prompt.tokens) - 1))[0][1](weights, None)

    raised = edited(fl.LogitBias(None, 96.0), pattern)
    assert float(raised[0, 0, 0, start]) == pytest.approx(tiny * math.exp(96) / (1 + tiny * math.exp(96)), rel=1e-6)
    for method in (fl.LogitBias(None, -500.0, (0, 1)), fl.Pasta(None, 1e-300, (start, end))):
        assert float(edited(method, pattern)[0, 0, 0, start]) == pytest.approx(1, abs=1e-6)


def test_spotlight_needs_all_rows_of_the_prompt(tiny_model: fl.FocusModel, samples: Any) -> None:
    prompt = tiny_model.encode(samples[0].prompt())
    n = len(prompt.tokens)
    for _, hook in fl.SpotLight(0.5).hooks(tiny_model, prompt, cursor=fl.Cursor(4)):
        with pytest.raises(ValueError, match="needs all rows of the prompt in one pass"):
            hook(torch.full((1, 4, n - 4, n), 1 / n), None)


def test_documents_are_replaced_with_the_text_around_them(tiny_model: fl.FocusModel, samples: Any) -> None:
    prompt = tiny_model.encode(samples[0].prompt())
    first, second = prompt.characters["document"][1], prompt.characters["document"][3]
    replaced = tiny_model.encoder.rewritten(prompt, [Edit(*second, "longer " * 40), Edit(*first, "x")])
    for name, ranges in prompt.characters.items():
        before = [prompt.text[start:end] for start, end in ranges]
        expected = [
            {first: "x", second: "longer " * 40}.get(span, text) for span, text in zip(ranges, before, strict=True)
        ]
        assert [replaced.text[start:end] for start, end in replaced.characters[name]] == expected
    inner = (first[0] + 1, first[1])
    nested = fl.EncodedPrompt(prompt.tokens, {}, prompt.text, {"inside": (inner,), "document": (first,)})
    moved = tiny_model.encoder.rewritten(nested, [Edit(*first, "a short text")])
    assert moved.characters["inside"] == ()
    assert len(moved.characters["document"]) == 1
