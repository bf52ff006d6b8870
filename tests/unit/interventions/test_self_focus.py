"""Self-focus: the heads' own choice, the gate, and the same result as split-softmax on the chosen part."""

from __future__ import annotations

import math
from typing import Any, cast

import pytest
import torch

import focuslens as fl
from focuslens.interventions import Lanes, intervention_from
from focuslens.interventions.mixed_split import MixedSplitSoftmax
from focuslens.prompts.encoder import sentence_ranges

HEADS = [fl.Head(1, 2), fl.Head(2, 0), fl.Head(0, 3)]
VOTES = fl.HeadVotes(tuple(HEADS), (2.0, -0.5, 1.0))


def choices(model: fl.FocusModel, focus: fl.SelfFocus, prompts: Any) -> list[fl.Choice]:
    return focus.choose(model, model.prefill(prompts, hold_last=True))


@pytest.mark.parametrize("rows", ["question", "tail", "last"])
@pytest.mark.parametrize("null", [None, "N/A"])
def test_the_document_with_the_most_attention_is_chosen(
    tiny_model: fl.FocusModel, samples: Any, rows: Any, null: str | None
) -> None:
    scores = fl.question_scores(tiny_model, samples, HEADS, rows=rows, null=null)
    expected = scores.of(HEADS, "attention" if null is None else "calibrated")
    found = choices(tiny_model, fl.SelfFocus(HEADS, 0.1, rows=rows, null=null), [one.prompt() for one in samples])
    for choice, values, sample in zip(found, expected, samples, strict=True):
        assert choice.chosen == (int(values.argmax()),)
        assert choice.parts == tiny_model.encode(sample.prompt()).spans["document"]
        positive = values.clamp(min=0)
        assert choice.shares == pytest.approx((positive / positive.sum()).tolist(), abs=1e-4)
        assert sum(choice.shares) == pytest.approx(1)


@pytest.mark.parametrize("rows", ["tail", "response"])
def test_votes_choose_by_weighted_logarithms(tiny_model: fl.FocusModel, samples: Any, rows: Any) -> None:
    votes = fl.HeadVotes(VOTES.heads, VOTES.weights, rows)
    focus = fl.SelfFocus(votes, 0.1, focused=HEADS[:2], rows=rows)
    prefix = tiny_model.prefill([one.prompt() for one in samples], hold_last=True)
    if rows == "tail":
        attention = fl.question_scores(tiny_model, samples, null=None).attention
    else:
        attention = fl.document_scores(tiny_model, samples, max_new_tokens=6).scores
    for choice, values in zip(focus.choose(tiny_model, prefix, 6), attention, strict=True):
        logs = [
            [math.log(float(values[layer, head, i]) + 1e-3) for layer, head in HEADS] for i in range(len(choice.parts))
        ]
        terms = [math.exp(2 * a - 0.5 * b + c) for a, b, c in logs]
        assert choice.shares == pytest.approx([term / sum(terms) for term in terms], rel=1e-3)
        assert choice.chosen == (max(range(len(terms)), key=terms.__getitem__),)
    assert focus.heads == tuple(HEADS[:2])
    again = intervention_from(focus.describe())
    assert (again, again.describe()) == (focus, focus.describe())


@pytest.mark.parametrize("n_rows", [None, 2])
def test_an_answer_without_focus_can_choose(tiny_model: fl.FocusModel, samples: Any, n_rows: int | None) -> None:
    prompts = [one.prompt() for one in samples]
    prefix = tiny_model.prefill(prompts, hold_last=True)
    found = fl.SelfFocus(HEADS, 0.1, rows="response", n_rows=n_rows).choose(tiny_model, prefix, 6)
    scores = fl.document_scores(tiny_model, samples, max_new_tokens=n_rows or 6).of(HEADS)
    for choice, values in zip(found, scores, strict=True):
        assert choice.chosen == (int(values.argmax()),)
        assert choice.shares == pytest.approx((values / values.sum()).tolist(), abs=1e-4)


@pytest.mark.parametrize("rows", ["tail", "response"])
def test_it_is_split_softmax_on_the_choice_wherever_it_is_used(
    tiny_model: fl.FocusModel, samples: Any, rows: Any
) -> None:
    model, focus, prompts = tiny_model, fl.SelfFocus(HEADS, 0.05, rows=rows), [one.prompt() for one in samples]
    prefix = model.prefill(prompts, hold_last=True)
    found = focus.choose(model, prefix, 5)
    expected = [
        model.generate(prompt, [fl.SplitSoftmax(HEADS, 0.05, choice.parts[choice.chosen[0]])], max_new_tokens=5)
        for prompt, choice in zip(prompts, found, strict=True)
    ]
    plain = model.generate(prompts, max_new_tokens=5)
    assert [one.text for one in expected] != [one.text for one in plain]
    texts = [one.text for one in expected]
    assert [one.text for one in model.generate(prompts, [focus], max_new_tokens=5)] == texts
    assert list(fl.evaluate(model, samples, [focus], max_new_tokens=5).responses) == texts
    grid = [fl.Setting("a", (focus,)), fl.Setting("b", (fl.SelfFocus(HEADS, 1.0),))]
    sweep = fl.run_sweep(model, samples, grid, max_new_tokens=5)
    assert list(sweep.evaluations["a"].responses) == texts
    assert list(sweep.evaluations["b"].responses) == [one.text for one in plain]
    scored = fl.contextual_scores(model, samples, interventions=[focus], max_new_tokens=5)
    assert list(scored.responses) == texts


def test_hooks_for_plain_transformer_lens_choose_too(tiny_model: fl.FocusModel, samples: Any) -> None:
    prompt, focus = samples[1].prompt(), fl.SelfFocus(HEADS, 0.05)
    (choice,) = choices(tiny_model, focus, prompt)
    tokens = tiny_model.to_tokens(prompt)
    found = tiny_model.hooked.run_with_hooks(tokens, fwd_hooks=focus.hooks(tiny_model, prompt))[0]
    split = fl.SplitSoftmax(HEADS, 0.05, choice.parts[choice.chosen[0]])
    torch.testing.assert_close(found[-1], tiny_model.logits(prompt, [split])[-1], atol=1e-3, rtol=0)


@pytest.mark.usefixtures("unchecked")
def test_self_focus_needs_a_model_that_it_can_run(tiny_model: fl.FocusModel, samples: Any) -> None:
    with pytest.raises(TypeError, match="needs a FocusModel"):
        fl.SelfFocus(HEADS, 0.05).hooks(object(), samples[1].prompt())  # pyright: ignore[reportArgumentType]


def test_after_steering_the_steered_prompt_chooses(tiny_model: fl.FocusModel, samples: Any) -> None:
    vectors = torch.randn(3, tiny_model.shape.d_head, generator=torch.Generator().manual_seed(0))
    steering = fl.FocusSteering(fl.FocusDirections(HEADS, vectors, None, site="rotary"), 8.0)
    both, prompts = [steering, fl.SelfFocus(HEADS, 0.05)], [one.prompt() for one in samples]
    expected = [model_text.text for model_text in tiny_model.generate(prompts, both, max_new_tokens=5)]
    sweep = fl.run_sweep(
        tiny_model, samples, [fl.Setting("both", tuple(both)), fl.Setting("steered", (steering,))], max_new_tokens=5
    )
    assert list(sweep.evaluations["both"].responses) == expected


def test_given_responses_are_scored_under_the_choice(tiny_model: fl.FocusModel, samples: Any) -> None:
    responses, focus = ["queen 42.", "the bridge", "x", "a silver lantern"], fl.SelfFocus(HEADS, 0.05)
    found = fl.contextual_scores(tiny_model, samples, interventions=[focus], responses=responses).relevant
    for i, sample in enumerate(samples):
        (choice,) = choices(tiny_model, focus, sample.prompt())
        split = fl.SplitSoftmax(HEADS, 0.05, choice.parts[choice.chosen[0]])
        one = fl.contextual_scores(tiny_model, [sample], interventions=[split], responses=responses[i : i + 1])
        torch.testing.assert_close(torch.as_tensor(found[i]), torch.as_tensor(one.relevant[0]), atol=1e-5, rtol=1e-4)


def asking(documents: tuple[str, str], question: str, rest: str) -> fl.Prompt:
    """Prompt of two documents, a question and a text after it."""
    text = f"{documents[0]} {documents[1]} {question}{rest}"
    second = len(documents[0]) + 1
    asked = second + len(documents[1]) + 1
    spans = {"document": [(0, second - 1), (second, asked - 1)], "question": [(asked, asked + len(question))]}
    return fl.Prompt(text, spans=spans)


def test_a_short_prompt_beside_one_that_asks_early_is_calibrated_alike(tiny_model: fl.FocusModel) -> None:
    early = asking(("the queen sleeps.", "the bridge is cold."), "where is the queen?", " the winter harbour" * 30)
    prompts = [early, asking(("a silver lantern.", "the winter harbour."), "where is the lantern?", "")]
    focus = fl.SelfFocus(HEADS, 0.1, rows="last", null="N/A")
    for prompt, choice in zip(prompts, choices(tiny_model, focus, prompts), strict=True):
        (alone,) = choices(tiny_model, focus, prompt)
        assert choice.shares == pytest.approx(alone.shares, abs=1e-4)
        assert choice.sink == pytest.approx(alone.sink, abs=1e-5)


def test_a_null_question_needs_the_question_after_the_documents(tiny_model: fl.FocusModel) -> None:
    prompt = fl.Prompt("where? the queen sleeps.", spans={"question": [(0, 6)], "document": [(7, 24)]})
    with pytest.raises(ValueError, match="asks its question before a part to choose from"):
        choices(tiny_model, fl.SelfFocus(HEADS, 0.1, null="N/A"), prompt)


def test_an_unsure_choice_leaves_the_prompt_alone(tiny_model: fl.FocusModel, samples: Any) -> None:
    prompts = [one.prompt() for one in samples]
    plain = [one.text for one in tiny_model.generate(prompts, max_new_tokens=5)]
    for gate in ({"min_margin": 1.0}, {"max_entropy": 0.0}, {"max_sink": 0.0}):
        focus = fl.SelfFocus(HEADS, 0.05, **cast("Any", gate))
        assert all(choice.chosen == () for choice in choices(tiny_model, focus, prompts))
        assert [one.text for one in tiny_model.generate(prompts, [focus], max_new_tokens=5)] == plain


def test_the_gate_of_a_hand_worked_choice() -> None:
    attention = torch.tensor([0.3, 0.2, 0.1, 0.2, 0.05, 0.05, 0.05, 0.05])
    parts = [(2, 4), (4, 6), (6, 8)]  # shares 0.6, 0.2 and 0.2; the sink has 0.5
    # The entropy is -(0.6 log 0.6 + 0.4 log 0.2) / log 3 = 0.865.
    focus = fl.SelfFocus(HEADS, 0.1, top=2)
    shares = focus._shares(attention[None], parts)
    for gate, sure in (
        ({"min_margin": 0.39}, True),
        ({"min_margin": 0.41}, False),
        ({"max_entropy": 0.87}, True),
        ({"max_entropy": 0.86}, False),
        ({"max_sink": 0.51}, True),
        ({"max_sink": 0.49}, False),
    ):
        choice = fl.SelfFocus(HEADS, 0.1, **cast("Any", gate))._choice(shares, parts, 0.5)
        assert choice.chosen == ((0,) if sure else ())
        assert choice.shares == pytest.approx((0.6, 0.2, 0.2))
        assert choice.sink == pytest.approx(0.5)
    assert focus._choice(shares, parts, 0.5).chosen == (0, 1)
    for top_p, n in ((0.5, 1), (0.6, 1), (0.61, 2), (0.8, 2), (1.0, 3)):
        assert len(fl.SelfFocus(HEADS, 0.1, top_p=top_p)._choice(shares, parts, 0.5).chosen) == n


@pytest.mark.parametrize("top", [None, 2])
def test_soft_choices_count_by_their_shares(tiny_model: fl.FocusModel, samples: Any, top: int | None) -> None:
    prompts = [one.prompt() for one in samples[:2]]
    focus = fl.SelfFocus(HEADS, 0.05, top=top, soft=True)
    prefix = tiny_model.prefill(prompts, hold_last=True)
    found = focus.choose(tiny_model, prefix)
    for choice in found:
        order = sorted(range(len(choice.parts)), key=lambda i: -choice.shares[i])
        assert choice.chosen == tuple(order[:top])
        chosen = sum(choice.shares[i] for i in choice.chosen)
        expected = [share / chosen if i in choice.chosen else 0 for i, share in enumerate(choice.shares)]
        assert choice.weighted.weights == pytest.approx(expected)
    mixed = MixedSplitSoftmax(HEADS, 0.05, [choice.weighted for choice in found])
    texts = [one.text for one in tiny_model.decode(prefix, [mixed], max_new_tokens=5)]
    assert [one.text for one in tiny_model.generate(prompts, [focus], max_new_tokens=5)] == texts
    hard = tiny_model.generate(prompts, [fl.SelfFocus(HEADS, 0.05)], max_new_tokens=5)
    assert texts != [one.text for one in hard]
    sweep = fl.run_sweep(tiny_model, samples[:2], [fl.Setting("soft", (focus,)), fl.Setting("none")], max_new_tokens=5)
    assert list(sweep["soft"].responses) == texts


@pytest.mark.parametrize("rows", ["tail", "response"])
def test_settings_with_one_choice_measure_it_once(
    tiny_model: fl.FocusModel, samples: Any, rows: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    original, measured = fl.SelfFocus._measured, list[Any]()

    def counted(self: fl.SelfFocus, *arguments: Any) -> Any:
        measured.append(self)
        return original(self, *arguments)

    monkeypatch.setattr(fl.SelfFocus, "_measured", counted)
    focuses = [
        fl.SelfFocus(HEADS, 0.1, rows=rows),
        fl.SelfFocus(HEADS, 0.9, rows=rows, top=2),
        fl.SelfFocus(HEADS, 0.1, rows=rows, min_margin=1.0),
        fl.SelfFocus(HEADS[:1], 0.1, rows=rows),
    ]
    settings = [fl.Setting(str(i), (focus,)) for i, focus in enumerate(focuses)]
    sweep = fl.run_sweep(tiny_model, samples[:2], settings, max_new_tokens=4)
    assert len(measured) == 2, "one batch, two sets of heads"
    for i, focus in enumerate(focuses):
        alone = fl.evaluate(tiny_model, samples[:2], [focus], max_new_tokens=4)
        assert sweep[str(i)].responses == alone.responses


def test_a_prefix_of_a_user_is_measured_at_each_use(tiny_model: fl.FocusModel, samples: Any) -> None:
    prefix = tiny_model.prefill(samples[0].prompt(), hold_last=True)
    focus = fl.SelfFocus(HEADS, 0.1)
    (before,) = focus.choose(tiny_model, prefix)
    layer, head = HEADS[0]

    def block(scores: torch.Tensor, hook: Any) -> torch.Tensor:
        scores[:, head, :, before.parts[before.chosen[0]][0]] = -1e9
        return scores

    with tiny_model.hooked.hooks(fwd_hooks=[(f"blocks.{layer}.attn.hook_attn_scores", block)]):
        (during,) = focus.choose(tiny_model, prefix)
    assert during.shares != before.shares
    assert focus.choose(tiny_model, prefix)[0].shares == before.shares


def test_a_token_of_two_parts_counts_for_the_first() -> None:
    choice = fl.Choice(((4, 9), (2, 5), (8, 9)), (0.2, 0.5, 0.3), (1, 2), 0.0)
    assert choice.weighted == (((2, 5), (5, 9)), (0.625, 0.0))


def test_another_edit_acts_on_the_choice(tiny_model: fl.FocusModel, samples: Any) -> None:
    prompt = samples[0].prompt()
    focus = fl.SelfFocus(HEADS, edit=fl.SplitSoftmax(HEADS[:2], 0.02))
    same = fl.SelfFocus(HEADS, 0.02, focused=HEADS[:2])
    for one in (focus, intervention_from(focus.describe())):
        assert tiny_model.generate(prompt, [one], max_new_tokens=5).text == (
            tiny_model.generate(prompt, [same], max_new_tokens=5).text
        )
    with pytest.raises(ValueError, match="give either tau, for split-softmax on the chosen parts, or another edit"):
        fl.SelfFocus(HEADS, 0.1, edit=fl.SplitSoftmax(HEADS, 0.02))
    with pytest.raises(ValueError, match="give either tau"):
        fl.SelfFocus(HEADS)
    with pytest.raises(ValueError, match="soft and focused are settings of split-softmax"):
        fl.SelfFocus(HEADS, edit=fl.SplitSoftmax(HEADS, 0.02), soft=True)
    with pytest.raises(TypeError, match="edit is a Lanes; it must be an intervention on a span"):
        fl.SelfFocus(HEADS, edit=Lanes([[]]))


def test_windows_and_sentences_are_parts_of_any_prompt(tiny_model: fl.FocusModel) -> None:
    text = "The queen sleeps in the tower. The winter harbour is cold! Where is the bridge? It is 42."
    n = len(tiny_model.encode(text).tokens)
    (windows,) = choices(tiny_model, fl.SelfFocus(HEADS, 0.1, rows="last", parts=5), text)
    assert windows.parts == tuple((start, min(start + 5, n - 1)) for start in range(2, n - 1, 5))
    (sentences,) = choices(tiny_model, fl.SelfFocus(HEADS, 0.1, rows="last", parts="sentence"), text)
    texts = tiny_model.encoder.texts(tiny_model.encode(text))
    shown = ["".join(texts[start:end]).strip() for start, end in sentences.parts]
    assert shown[1:] == ["The winter harbour is cold!", "Where is the bridge?"]
    documents = (fl.Document("The", "queen sleeps. The bridge is cold."), fl.Document("A", "winter harbour."))
    prompt = fl.MultiDocSample("where?", ("here",), documents, 0).prompt()
    (in_documents,) = choices(tiny_model, fl.SelfFocus(HEADS, 0.1, parts="sentence"), prompt)
    texts = tiny_model.encoder.texts(tiny_model.encode(prompt))
    shown = ["".join(texts[start:end]).strip() for start, end in in_documents.parts]
    assert [text[-8:] for text in shown] == [" sleeps.", "is cold.", "harbour."]
    with pytest.raises(KeyError, match="no span 'document'"):
        choices(tiny_model, fl.SelfFocus(HEADS, 0.1, rows="last"), text)
    with pytest.raises(ValueError, match="the text of the prompt is unknown"):
        choices(tiny_model, fl.SelfFocus(HEADS, 0.1, rows="last", parts="sentence"), torch.arange(5, 20))


def test_sentences_of_hand_worked_texts() -> None:
    for text, sentences in (
        ("One. Two!  Three?", ["One.", "Two!", "Three?"]),
        ('He said "no." Then he left', ['He said "no."', "Then he left"]),
        ("A line\nanother 3.5 line.\n\nEnd", ["A line", "another 3.5 line.", "End"]),
        ("   ", []),
    ):
        assert [text[start:end] for start, end in sentence_ranges(text)] == sentences


def test_a_random_part_is_the_control(tiny_model: fl.FocusModel, samples: Any) -> None:
    prompts = [one.prompt() for one in samples]
    spans = [tiny_model.encode(prompt).spans["document"] for prompt in prompts]
    drawn = list[list[int]]()
    for seed in range(30):
        focus = fl.RandomFocus(HEADS, 0.05, seed=seed)
        batch, split = focus.resolve(tiny_model, tiny_model.prefill(prompts, hold_last=True))
        parts = [prompt.spans[cast("Any", split).span] for prompt in batch.prompts]
        assert all(len(part) == 1 for part in parts)
        drawn.append([documents.index(part[0]) for documents, part in zip(spans, parts, strict=True)])
    for of_prompt, documents in zip(zip(*drawn, strict=True), spans, strict=True):
        assert set(of_prompt) == set(range(len(documents))), "every document is drawn"
    focus = fl.RandomFocus(HEADS, 0.05, seed=29)
    expected = [
        tiny_model.generate(prompt, [fl.SplitSoftmax(HEADS, 0.05, documents[place])], max_new_tokens=5).text
        for prompt, documents, place in zip(prompts, spans, drawn[-1], strict=True)
    ]
    assert [one.text for one in tiny_model.generate(prompts, [focus], max_new_tokens=5)] == expected
    assert list(fl.evaluate(tiny_model, samples, [focus], max_new_tokens=5).responses) == expected
    assert intervention_from(focus.describe()) == focus
    hooks = focus.hooks(tiny_model, prompts[0])
    found = tiny_model.hooked.run_with_hooks(tiny_model.to_tokens(prompts[0]), fwd_hooks=hooks)[0, -1]
    split = fl.SplitSoftmax(HEADS, 0.05, spans[0][drawn[-1][0]])
    torch.testing.assert_close(found, tiny_model.logits(prompts[0], [split])[-1], atol=1e-3, rtol=0)


def test_a_description_gives_the_intervention_back() -> None:
    focus = fl.SelfFocus(HEADS, 0.2, focused=HEADS[:1], rows="question", parts=64, top_p=0.9, null="N/A", max_sink=0.5)
    again = intervention_from(focus.describe())
    assert (again, again.describe()) == (focus, focus.describe())
    plain = fl.SelfFocus(HEADS, 0.2)
    assert intervention_from(plain.describe()).describe() == plain.describe()
    assert Lanes([[focus]]).heads == tuple(HEADS[:1])


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"by": []}, "there are no heads to choose by"),
        ({"tau": -1}, "tau is -1"),
        ({"rows": "all"}, "rows is 'all'; it must be one of question, tail, last, response"),
        ({"parts": "word"}, "parts is 'word'"),
        ({"parts": 0}, "parts is 0; it must be at least 1"),
        ({"top": 0}, "top is 0; it must be at least 1"),
        ({"top_p": 1.5}, "top_p is 1.5; it must be a number from 0 to 1"),
        ({"n_rows": 4}, "n_rows is a number of response rows"),
        ({"rows": "response", "null": "N/A"}, "null calibrates rows of the question"),
        ({"by": VOTES, "rows": "response"}, "the votes were fitted on rows 'tail' without a null question"),
        ({"by": VOTES, "null": "N/A"}, "which must be the same"),
    ],
)
def test_settings_out_of_range_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        fl.SelfFocus(**cast("Any", {"by": HEADS, "tau": 0.1, **settings}))
