"""Every function that takes interventions refuses what is not a list of them, and says what would be right."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

import focuslens as fl
from focuslens.interventions import Lanes
from focuslens.scores.contextual_scores import attention_pattern

pytestmark = pytest.mark.usefixtures("unchecked")

HEADS = [(0, 0)]
SPLIT = fl.SplitSoftmax(HEADS, 0.5, (0, 2))
HOOK = ("blocks.0.attn.hook_pattern", lambda pattern, hook: pattern)

DOORS: dict[str, Callable[[fl.FocusModel, Any, Any], object]] = {
    "evaluate": lambda model, samples, given: fl.evaluate(model, samples, given),
    "Setting": lambda model, samples, given: fl.run_sweep(model, samples, [fl.Setting("a", given)]),
    "contextual_scores": lambda model, samples, given: fl.contextual_scores(model, samples, interventions=given),
    "by_case": lambda model, samples, given: fl.contextual_scores_by_case(model, samples, interventions=given),
    "document_scores": lambda model, samples, given: fl.document_scores(model, samples, interventions=given),
    "attention_budget": lambda model, samples, given: fl.attention_budget(model, samples, interventions=given),
    "generate": lambda model, samples, given: model.generate("Who?", given),
    "logits": lambda model, samples, given: model.logits("Who?", given),
    "prefill": lambda model, samples, given: model.prefill("Who?", given),
    "prefill_held": lambda model, samples, given: model.prefill("Who?", given, hold_last=True),
    "decode": lambda model, samples, given: model.decode(model.prefill("Who?"), given),
    "extend": lambda model, samples, given: model.extend(model.prefill("Who?"), model.to_tokens("a"), given),
    "completed": lambda model, samples, given: model.completed(model.prefill("Who?", hold_last=True), given),
    "rerun": lambda model, samples, given: model.rerun(model.prefill("Who?", hold_last=True), given),
    "observe": lambda model, samples, given: model.observe(model.to_tokens("Who?")[0], [], given),
    "response_attention": lambda model, samples, given: fl.response_attention(
        model, "Who?", HEADS, response="a", interventions=given
    ),
    "window_attention": lambda model, samples, given: fl.window_attention(
        model, "Who?", HEADS, response="a", interventions=given
    ),
    "attention_pattern": lambda model, samples, given: attention_pattern(
        model, "Who?", model.to_tokens("a")[0], HEADS, [0], interventions=given
    ),
}


@pytest.mark.parametrize("door", DOORS)
def test_every_door_refuses_what_is_no_list_of_interventions(door, load_model, samples):
    run, model = DOORS[door], load_model("llama")
    with pytest.raises(
        TypeError, match=r"^interventions is one SplitSoftmax; it must be a list of interventions, such"
    ):
        run(model, samples, SPLIT)
    for given, message in (
        (None, "interventions is None"),
        ("split", "interventions is 'split', a str"),
        ([SPLIT, "split"], r"interventions\[1\] is 'split', a str"),
        ([HOOK], r"interventions\[0\] is \('blocks.0.attn.hook_pattern'.* a tuple"),
        (HOOK, r"interventions\[0\] is 'blocks.0.attn.hook_pattern', a str"),
        ([fl.SplitSoftmax], r"interventions\[0\] is the class SplitSoftmax"),
    ):
        with pytest.raises(TypeError, match=rf"^{message}; it must be a list of interventions, such as \[fl.Split"):
            run(model, samples, given)


def test_a_generator_of_interventions_acts_in_every_pass(load_model, samples):
    model, prompt = load_model("llama"), samples[0].prompt()
    strong = fl.SplitSoftmax([(layer, head) for layer in range(3) for head in range(4)], 0.0, (0, 2))

    def once() -> Any:
        return iter([strong])

    prefix = model.prefill(prompt, hold_last=True)
    wanted = model.completed(prefix, [strong]).logits
    assert wanted is not None
    assert not wanted.equal(model.completed(prefix).logits)
    assert wanted.equal(model.completed(prefix, once()).logits)
    listed = fl.contextual_scores(model, samples, "correct", interventions=[strong], max_new_tokens=3)
    passed = fl.contextual_scores(model, samples, "correct", interventions=once(), max_new_tokens=3)
    assert passed.sample_ids == listed.sample_ids
    assert passed.relevant.equal(listed.relevant)
    by_case = fl.contextual_scores_by_case(model, samples, interventions=once(), max_new_tokens=3)
    assert by_case["gold"].relevant.equal(
        fl.contextual_scores(model, samples, "gold", interventions=[strong], max_new_tokens=3).relevant
    )
    generated = [model.generate(prompt, given, max_new_tokens=8).text for given in (once(), [strong])]
    assert generated[0] == generated[1]


def test_settings_that_are_not_settings_are_named(load_model, samples):
    model = load_model("llama")
    cases: list[Any] = [
        (fl.Setting("a"), r"settings is Setting\(name='a'"),
        ([SPLIT], r"settings\[0\] is SplitSoftmax\("),
        ("baseline", r"settings is 'baseline', a str"),
        (None, r"settings is None"),
    ]
    for given, message in cases:
        with pytest.raises(TypeError, match=message + r".*; it must be a list of Setting, such as \[Setting\("):
            fl.run_sweep(model, samples, given)
    with pytest.raises(TypeError, match=r"settings\[1\] is one SplitSoftmax"):
        Lanes([[], SPLIT])  # pyright: ignore[reportArgumentType]
