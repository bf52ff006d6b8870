"""Stop tokens of a model and of single calls, and their place in result files."""

from __future__ import annotations

from typing import Any

import pytest

import focuslens as fl


@pytest.fixture
def free(load_model: Any) -> tuple[fl.FocusModel, fl.MultiDocSample, list[int]]:
    """A model, a sample, and the tokens of an answer that nothing ends."""
    loaded = load_model("llama_chat")
    model = fl.FocusModel(loaded.backend, loaded.tokenizer, stop_tokens=(), stop_strings=())
    sample = fl.MultiDocSample("where?", ("x",), (fl.Document("a", "river"), fl.Document("b", "stone")), 0)
    tokens = model.generate(sample.prompt(), max_new_tokens=8).tokens.tolist()
    assert len(tokens) == 8
    return model, sample, tokens


def first(tokens: list[int], token: int) -> int:
    return tokens.index(token)


def test_from_pretrained_takes_ids_and_tokens(checkpoint: Any, free: Any) -> None:
    """The defaults hold for generation, evaluation and scores, and result files name them."""
    _, sample, tokens = free
    stop = tokens[4]
    name = free[0].tokenizer.convert_ids_to_tokens(stop)
    model = fl.FocusModel.from_pretrained(str(checkpoint("llama_chat")), stop_tokens=[name, 1], device="cpu")
    assert model.stop_tokens == (stop, 1)
    assert model.description["stop_tokens"] == [stop, 1]
    expected = tokens[: first(tokens, stop)]
    generated = model.generate(sample.prompt(), max_new_tokens=8)
    assert (generated.tokens.tolist(), generated.stop) == (expected, stop)
    assert fl.evaluate(model, [sample], max_new_tokens=8).responses == (generated.text,)
    assert fl.document_scores(model, [sample], max_new_tokens=8).responses == (generated.text,)
    assert fl.FocusModel.from_pretrained(str(checkpoint("llama_chat")), stop_tokens=(), device="cpu").stop_tokens == ()
    assert fl.FocusModel.from_pretrained(str(checkpoint("llama_chat")), device="cpu").stop_tokens == (1,)


def test_arguments_of_a_call_win(free: Any) -> None:
    model, sample, tokens = free
    stop = tokens[3]
    ended = model.generate(sample.prompt(), max_new_tokens=8, stop_tokens=[stop])
    assert ended.tokens.tolist() == tokens[: first(tokens, stop)]
    assert ended.finished
    assert model.stop_tokens == ()
    assert model.generate(sample.prompt(), max_new_tokens=8).tokens.tolist() == tokens
    text = model.tokenizer.decode(tokens)
    string = text.strip()[2:4]
    by_string = model.generate(sample.prompt(), max_new_tokens=8, stop_strings=[string])
    assert string not in by_string.text
    assert len(by_string.tokens) < 8
    stopping = fl.FocusModel(model.backend, model.tokenizer, stop_tokens=[stop], stop_strings=())
    assert stopping.generate(sample.prompt(), max_new_tokens=8, stop_tokens=()).tokens.tolist() == tokens


@pytest.mark.parametrize(
    ("stops", "kind", "message"),
    [
        ("</s>", TypeError, "stop_tokens is '</s>'; give a list of token ids, or of tokens such as '</s>'"),
        (2, TypeError, "stop_tokens is 2; give a list"),
        ([1.5], TypeError, "a stop token is 1.5, a float; it must be a token id, or a token"),
        ([500], ValueError, "stop_tokens has 500; the vocabulary has the ids 0 to 499"),
        ([-1], ValueError, "stop_tokens has -1"),
        (["no such token"], ValueError, "stop_tokens has 'no such token', which is no single token of the vocabulary"),
    ],
)
def test_other_values_are_refused(stops: Any, kind: type[Exception], message: str, free: Any, unchecked: None) -> None:
    model, sample, _ = free
    with pytest.raises(kind, match=message):
        fl.FocusModel(model.backend, model.tokenizer, stop_tokens=stops)
    with pytest.raises(kind, match=message):
        model.generate(sample.prompt(), stop_tokens=stops)
