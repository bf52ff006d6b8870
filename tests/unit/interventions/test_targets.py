"""Strength per prompt: exponents and alphas that bring the heads' attention to a target."""

from __future__ import annotations

from functools import partial
from typing import Any, cast

import pytest
import torch

import focuslens as fl
from focuslens.interventions import intervention_from
from focuslens.interventions.targets import last_rows

HEADS = [fl.Head(1, 2), fl.Head(2, 0), fl.Head(0, 3)]


@pytest.fixture(scope="module")
def directions() -> fl.FocusDirections:
    query = torch.randn(len(HEADS), 16, generator=torch.Generator().manual_seed(3))
    return fl.FocusDirections(HEADS, query, query.flip(0), "rotary")


def prompts(samples: Any) -> list[Any]:
    return [sample.prompt() for sample in samples[:3]]


def mean_masses(model: fl.FocusModel, prompts: Any, interventions: Any, span: str) -> list[float]:
    """Mean mass of the heads on a span in the row of the last prompt token, from a whole pass per prompt."""
    means: list[float] = []
    for prompt in prompts:
        rows = dict[int, torch.Tensor]()
        hooks = [
            (
                f"blocks.{layer}.attn.hook_pattern",
                partial(lambda rows, layer, x, hook: rows.update({layer: x[0]}), rows, layer),
            )
            for layer, _ in HEADS
        ]
        encoded = model.encode(prompt)
        model.observe(encoded.tokens, hooks, interventions, prompt=encoded)
        ranges = [(0, 2)] if span == "sink" else encoded.spans[span]
        masses = [sum(float(rows[layer][head, -1, start:end].sum()) for start, end in ranges) for layer, head in HEADS]
        means.append(sum(masses) / len(masses))
    return means


def test_split_softmax_reaches_the_mass_in_every_prompt(tiny_model: fl.FocusModel, samples: Any) -> None:
    before = mean_masses(tiny_model, prompts(samples), [], "relevant")
    assert all(0.02 < mass < 0.5 for mass in before)
    target = fl.TargetedSplitSoftmax(HEADS, 0.6)
    taus = target.taus(tiny_model, tiny_model.prefill(prompts(samples), hold_last=True))
    assert len(set(taus)) == 3
    # Later layers see what earlier ones changed, so heads of one layer are measured.
    for prompt, tau in zip(prompts(samples), taus, strict=True):
        rows = last_rows(tiny_model, tiny_model.prefill(prompt, hold_last=True), HEADS, ())
        ((start, end),) = tiny_model.encode(prompt).spans["relevant"]
        masses = rows[0, :, start:end].double().sum(dim=-1)
        assert float((masses**tau).mean()) == pytest.approx(0.6, abs=1e-6)
    one_layer = [fl.Head(1, 0), fl.Head(1, 2)]
    prefix = tiny_model.prefill(prompts(samples), hold_last=True)
    batch, split = fl.TargetedSplitSoftmax(one_layer, 0.6).resolve(tiny_model, prefix)
    rows = last_rows(tiny_model, prefix, one_layer, [split])
    inside = batch.columns("relevant", batch.width)
    assert (rows * inside[:, None]).sum(dim=-1).mean(dim=1).tolist() == pytest.approx([0.6] * 3, abs=1e-4)


def test_nothing_is_lowered(tiny_model: fl.FocusModel, samples: Any) -> None:
    prefix = tiny_model.prefill(prompts(samples), hold_last=True)
    assert fl.TargetedSplitSoftmax(HEADS, 0.0).taus(tiny_model, prefix) == [1, 1, 1]
    assert fl.TargetedSplitSoftmax(HEADS, 1.0).taus(tiny_model, prefix) == [0, 0, 0]
    negative = tiny_model.prefill([sample.prompt("negative") for sample in samples[:2]], hold_last=True)
    assert fl.TargetedSplitSoftmax(HEADS, 0.9).taus(tiny_model, negative) == [1, 1]


def test_each_prompt_runs_under_its_own_exponent(tiny_model: fl.FocusModel, samples: Any) -> None:
    target = fl.TargetedSplitSoftmax(HEADS, 0.9)
    taus = target.taus(tiny_model, tiny_model.prefill(prompts(samples), hold_last=True))
    expected = [
        tiny_model.generate(prompt, [fl.SplitSoftmax(HEADS, tau)], max_new_tokens=5).text
        for prompt, tau in zip(prompts(samples), taus, strict=True)
    ]
    together = tiny_model.generate(prompts(samples), [target], max_new_tokens=5)
    assert [one.text for one in together] == expected
    sweep = fl.run_sweep(
        tiny_model, samples[:3], [fl.Setting("a", (target,)), fl.Setting("baseline")], max_new_tokens=5
    )
    assert list(sweep["a"].responses) == expected
    assert sweep["a"].responses != sweep["baseline"].responses
    tokens = tiny_model.to_tokens(prompts(samples)[0])
    hooked = tiny_model.hooked.run_with_hooks(tokens, fwd_hooks=target.hooks(tiny_model, prompts(samples)[0]))[0]
    split = fl.SplitSoftmax(HEADS, taus[0])
    torch.testing.assert_close(hooked[-1], tiny_model.logits(prompts(samples)[0], [split])[-1], atol=1e-3, rtol=0)


def test_a_chosen_part_can_have_a_target(tiny_model: fl.FocusModel, samples: Any) -> None:
    prompt = samples[0].prompt()
    prefix = tiny_model.prefill(prompt, hold_last=True)
    (choice,) = fl.SelfFocus(HEADS, 0.5).choose(tiny_model, prefix)
    span = choice.parts[choice.chosen[0]]
    focus = fl.SelfFocus(HEADS, edit=fl.TargetedSplitSoftmax(HEADS, 0.9))
    for one in (focus, intervention_from(focus.describe())):
        assert tiny_model.generate(prompt, [one], max_new_tokens=5).text == (
            tiny_model.generate(prompt, [fl.TargetedSplitSoftmax(HEADS, 0.9, span)], max_new_tokens=5).text
        )


@pytest.mark.parametrize("positions", ["all", "response"])
@pytest.mark.parametrize("part", ["sink", "document"])
def test_steering_comes_to_the_target(
    tiny_model: fl.FocusModel, samples: Any, directions: fl.FocusDirections, part: Any, positions: Any
) -> None:
    alphas = [0, 1, 2, 4]
    measured = [
        mean_masses(tiny_model, prompts(samples), [fl.FocusSteering(directions, alpha, None, positions)], part)
        for alpha in alphas
    ]
    (before, after) = (measured[0][0], measured[1][0])
    sign = -1 if part == "sink" else 1
    if sign * (after - before) < 0:  # a random direction may turn this part down
        directions = fl.FocusDirections(HEADS, -directions.query, None, "rotary")
        measured = [
            mean_masses(tiny_model, prompts(samples), [fl.FocusSteering(directions, alpha, None, positions)], part)
            for alpha in alphas
        ]
        (before, after) = (measured[0][0], measured[1][0])
    target = before + 0.25 * (after - before)
    steering = fl.TargetedSteering(directions, target, part=part, alphas=alphas, positions=positions)
    found = steering.strengths(tiny_model, tiny_model.prefill(prompts(samples), hold_last=True))
    assert found[0] == pytest.approx(0.25, abs=2e-3)
    for strength, *masses in zip(found, *measured, strict=True):
        gaps = [sign * (target - mass) for mass in masses]
        first = next((i for i, gap in enumerate(gaps) if gap <= 0), None)
        if first is None:
            assert strength == alphas[min(range(4), key=gaps.__getitem__)]
        elif first == 0:
            assert strength == 0
        else:
            assert alphas[first - 1] <= strength <= alphas[first]
    expected = [
        tiny_model.generate(prompt, [fl.FocusSteering(directions, alpha, None, positions)], max_new_tokens=5).text
        for prompt, alpha in zip(prompts(samples), found, strict=True)
    ]
    assert [one.text for one in tiny_model.generate(prompts(samples), [steering], max_new_tokens=5)] == expected
    sweep = fl.run_sweep(
        tiny_model, samples[:3], [fl.Setting("a", (steering,)), fl.Setting("baseline")], max_new_tokens=5
    )
    assert list(sweep["a"].responses) == expected


def test_descriptions_give_the_interventions_back(directions: fl.FocusDirections) -> None:
    split = fl.TargetedSplitSoftmax(HEADS, 0.4, "question")
    assert intervention_from(split.describe()) == split
    steering = fl.TargetedSteering(directions, 0.4, HEADS[:2], part="document", alphas=[0, 3], positions="response")
    again = intervention_from(steering.describe(), [directions])
    assert again.describe() == steering.describe()
    assert (split.changes_prompt, steering.changes_prompt) == (False, False)
    assert fl.TargetedSteering(directions, 0.4).changes_prompt


@pytest.mark.usefixtures("unchecked")
def test_settings_out_of_range_are_refused(directions: fl.FocusDirections, samples: Any) -> None:
    with pytest.raises(ValueError, match=r"mass is 1\.5; it must be a number from 0 to 1"):
        fl.TargetedSplitSoftmax(HEADS, 1.5)
    with pytest.raises(ValueError, match="there must be 0 first, and at least one strength after it"):
        fl.TargetedSteering(directions, 0.5, alphas=[1, 2])
    with pytest.raises(TypeError, match="targeted split-softmax runs the model first, so it needs a FocusModel"):
        fl.TargetedSplitSoftmax(HEADS, 0.5).hooks(cast("Any", object()), samples[0].prompt())
