"""Attention of a response: its parts, token texts, windows, and the number of computed rows."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from focuslens import (
    FocusModel,
    MultiDocSample,
    Prompt,
    ResponseAttention,
    SplitSoftmax,
    UnitAttention,
    response_attention,
    window_attention,
)
from focuslens.model import attention, engine
from focuslens.scores.window_attention import window_positions


def made(**changes: Any) -> ResponseAttention:
    """Attention of one head, with two rows and seven tokens. Five tokens are the prompt."""
    fields: dict[str, Any] = {
        "rows": torch.tensor([[[0.1, 0.2, 0.3, 0.25, 0.05, 0.1, 0.0], [0.0, 0.1, 0.4, 0.1, 0.1, 0.2, 0.1]]]),
        "head_names": ("L0H1",),
        "tokens": ("<s>", "Document [7", "](", "river", "?", " It", " is"),
        "spans": {"document": ((2, 4),), "relevant": ((2, 4),), "question": ((4, 5),)},
        "text": "It is",
    }
    return ResponseAttention(**{**fields, **changes})


def test_parts_share_out_every_token():
    units = made().units()
    assert [(label, places) for label, places, _ in units] == [
        ("sink", [0, 1]),
        ("Document [7]", [2, 3]),
        ("question", [4]),
        ("response", [5, 6]),
    ]
    assert [marked for *_, marked in units] == [False, True, False, False]
    pooled = made().by_unit()
    torch.testing.assert_close(pooled.shares, torch.tensor([[[0.3, 0.55, 0.05, 0.1], [0.1, 0.5, 0.1, 0.3]]]))
    assert (pooled.labels[1], pooled.relevant, pooled.response) == ("Document [7]", (1,), (" It", " is"))


@pytest.mark.parametrize(
    ("spans", "labels"),
    [
        ({}, ["sink", "template", "response"]),
        ({"relevant": ((2, 3),), "irrelevant": ((3, 4),)}, ["sink", "relevant", "irrelevant", "template", "response"]),
        ({"fact": ((2, 3), (3, 5))}, ["sink", "fact 1", "fact 2", "response"]),
        ({"document": ((1, 3), (3, 4))}, ["sink", "Document [1]", "Document [2]", "template", "response"]),
        ({"document": ((0, 2),)}, ["sink", "template", "response"]),  # the document is entirely in the sink
    ],
)
def test_prompts_without_documents_have_parts_too(spans: Any, labels: list[str]):
    tokens = ("a", "b", "c", "d", "e", "f", "g")
    assert [label for label, *_ in made(spans=spans, tokens=tokens).units()] == labels


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"head_names": ("x", "y")}, r"shape \(1, 2, 7\) .* for 2 head names and 7 tokens"),
        ({"tokens": ("a", "b")}, "and 2 tokens"),
        ({"rows": torch.zeros(1, 0, 7)}, "at least one row"),
        ({"rows": torch.zeros(1, 7, 7)}, "at least one token before the response"),
        ({"rows": torch.full((1, 2, 7), torch.nan)}, "NaN"),
        ({"rows": torch.full((1, 2, 7), -0.1)}, "negative"),
        ({"spans": {"question": ((4, 6),)}}, r"span 'question' = \(4, 6\) does not lie in a prompt of 5 tokens"),
    ],
)
def test_attention_that_does_not_fit_is_refused(changes: Any, message: str):
    with pytest.raises(ValueError, match=message):
        made(**changes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"labels": ("a",)}, r"shape \(1, 2, 2\); for these names it must be \(1, 2, 1\)"),
        ({"head_names": ()}, r"must be \(0, 2, 2\)"),
        ({"response": ("x",)}, r"must be \(1, 1, 2\)"),
        ({"shares": torch.zeros(1, 0, 2), "response": ()}, "with at least one of each"),
        ({"shares": torch.full((1, 2, 2), torch.nan)}, "NaN"),
        ({"relevant": (2,)}, "relevant unit 2 does not exist: there are 2"),
    ],
)
def test_attention_to_parts_that_does_not_fit_is_refused(changes: Any, message: str):
    fields: dict[str, Any] = {"labels": ("a", "b"), "shares": torch.ones(1, 2, 2), "head_names": ("x",)}
    fields |= {"response": ("m", "n"), **changes}
    with pytest.raises(ValueError, match=message):
        UnitAttention(**fields)


def test_it_says_what_it_is():
    assert repr(made(name="baseline")) == (
        "ResponseAttention(baseline: 1 heads, 2 response tokens 'It is' after a prompt of 5)"
    )


# Tests on a model


def test_texts_of_tokens_make_up_the_prompt(tiny_model: FocusModel, samples: list[MultiDocSample]):
    for sample in samples:
        encoded = tiny_model.encode(sample.prompt("long"))
        first, *texts = tiny_model.encoder.texts(encoded)
        assert first == "<s>"
        assert "".join(texts) == encoded.text
        for name, ranges in encoded.spans.items():
            for (start, end), part in zip(ranges, sample.prompt("long").part(name), strict=True):
                assert part in "".join(texts[start - 1 : end - 1])


def test_texts_of_tokens_hold_the_chat_template(load_model: Any, samples: list[MultiDocSample]):
    encoder = load_model("qwen2").encoder
    encoded = encoder.encode(samples[3].prompt("long"))
    assert "".join(encoder.texts(encoded)) == encoded.text
    assert encoder.texts(encoded)[0] == "<|im_start|>"


def test_characters_of_several_tokens_are_told_once(tiny_model: FocusModel):
    encoded = tiny_model.encode("a €")  # three bytes, without a merge in the vocabulary
    assert "".join(tiny_model.encoder.texts(encoded)[1:]) == "a €"
    said = tiny_model.encoder.encode_response(tiny_model.encode("a"), "€ b")
    texts = tiny_model.encoder.response_texts(tiny_model.encode("a"), said)
    assert "".join(texts) == " € b"
    assert "" in texts


def test_no_more_rows_are_made_than_the_response_has(
    tiny_model: FocusModel, samples: list[MultiDocSample], monkeypatch: pytest.MonkeyPatch
):
    rows: list[int] = []
    explicit = attention.attend_explicitly

    def watched(q: Any, *others: Any, **steps: Any) -> Any:
        rows.append(q.shape[1])
        return explicit(q, *others, **steps)

    monkeypatch.setattr(engine, "attend_explicitly", watched)
    monkeypatch.setattr(tiny_model, "lean", False)  # lean layers have one row per prompt
    prompt, heads = samples[0].prompt("long"), [(1, 1), (2, 0)]
    found = response_attention(tiny_model, prompt, heads, response="The silver lantern hangs")
    assert rows, "the engine was not asked"
    assert max(rows) <= len(found.response)
    rows.clear()
    response_attention(tiny_model, prompt, heads, max_new_tokens=4)
    assert set(rows) == {1}


def test_given_and_generated_responses_give_the_same_rows(tiny_model: FocusModel, samples: list[MultiDocSample]):
    prompt, heads = samples[1].prompt("long"), [(0, 0), (2, 3)]
    split = SplitSoftmax(heads, tau=0.3)
    made_up = response_attention(tiny_model, prompt, heads, interventions=[split], max_new_tokens=6)
    said = response_attention(tiny_model, prompt, heads, interventions=[split], response=made_up.text)
    if said.response == made_up.response:
        torch.testing.assert_close(said.rows, made_up.rows, atol=1e-5, rtol=0)


def test_what_cannot_be_looked_at_is_refused(tiny_model: FocusModel, samples: list[MultiDocSample]):
    prompt = samples[0].prompt("long")
    with pytest.raises(ValueError, match="there are no heads to read"):
        response_attention(tiny_model, prompt, [])
    with pytest.raises(ValueError, match=r"head \(3, 0\) does not exist"):
        response_attention(tiny_model, prompt, [(3, 0)])
    with pytest.raises(ValueError, match="the response is empty"):
        response_attention(tiny_model, prompt, [(0, 0)], response=" ")
    first = int(tiny_model.logits(prompt)[-1].argmax())
    silent = FocusModel(tiny_model.hooked, tiny_model.tokenizer, stop_strings=(), stop_tokens=[first])
    with pytest.raises(ValueError, match="ended its response at once"):
        response_attention(silent, prompt, [(0, 0)])
    with pytest.raises(ValueError, match="there are no heads to read"):
        window_attention(tiny_model, prompt, [])
    with pytest.raises(KeyError, match="no span 'river'"):
        window_attention(tiny_model, prompt, [(0, 0)], ["river"])


def test_a_window_takes_ranges_given_responses_and_plain_texts(tiny_model: FocusModel):
    prompt = Prompt("The river runs to the harbour. Where does it run?", {"fact": [(0, 30)]})
    found = window_attention(tiny_model, prompt, [(0, 0)], ["fact", (8, 9)], margin=0, response="To the harbour")
    fact = tiny_model.encode(prompt).spans["fact"][0]
    assert set(found.positions) == {0, 1, *range(*fact), 8, *range(len(tiny_model.encode(prompt).tokens), found.length)}
    assert found.text == "To the harbour"
    assert found.pattern.shape == (1, len(found.positions), len(found.positions))


# Windows


@given(st.data())
def test_windows_hold_what_was_asked_for_as_far_as_there_is_room(data: st.DataObject):
    length = data.draw(st.integers(3, 40))
    starts = data.draw(st.lists(st.integers(0, length - 1), max_size=3))
    spans = [(start, data.draw(st.integers(start + 1, length))) for start in starts]
    margin, most = data.draw(st.integers(0, 3)), data.draw(st.integers(4, 50))
    positions, left_out = window_positions(spans, length, margin=margin, most=most)
    asked = {0, 1} | {place for span in spans for place in range(*span)}
    near = {place for place in range(length) if any(abs(place - one) <= margin for one in asked)}
    assert positions == sorted(set(positions))
    assert len(positions) <= most
    if len(near) <= most:
        assert (set(positions), left_out) == (near, 0)
    else:
        assert set(positions) <= asked
        assert left_out == len(asked) - len(positions)
        assert len(positions) == min(most, len(asked))


def test_windows_cut_the_longest_part_first():
    positions, left_out = window_positions([(10, 13), (20, 40)], 50, margin=2, most=10)
    assert (positions, left_out) == ([0, 1, 10, 11, 12, *range(20, 25)], 15)


def test_windows_refuse_what_is_not_there():
    with pytest.raises(ValueError, match=r"span \(3, 9\) does not lie in a text of 8 tokens"):
        window_positions([(3, 9)], 8)
    with pytest.raises(ValueError, match="most is 2, and there are 3 parts"):
        window_positions([(4, 5), (8, 9)], 10, margin=0, most=2)
