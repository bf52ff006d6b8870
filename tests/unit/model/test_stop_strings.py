"""Stop strings: the definition of a response's end, its use in decoding, and the default for base models."""

from __future__ import annotations

import json
import random
import shutil
from itertools import accumulate
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

import focuslens as fl
from focuslens.data.synthetic import build_tokenizer
from focuslens.model.stop_strings import BASE_STOP_STRINGS, ResponseText, text_before_stop

if TYPE_CHECKING:
    from collections.abc import Sequence

N = 12
HEADS = [(0, 0), (1, 1), (2, 3)]


def spaced_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer in the style of Llama 2: words after a space, bytes for all else, and a first space removed."""
    pieces = ["<s>", "▁Paris", "▁", ".\n", "▁The", "Qu", "estion", ":", "x", "\n\n"]
    vocabulary = {piece: index for index, piece in enumerate([*pieces, *(f"<0x{byte:02X}>" for byte in range(256))])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=[], byte_fallback=True))
    tokenizer.decoder = decoders.Sequence(  # pyright: ignore[reportAttributeAccessIssue]
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, bos_token="<s>", clean_up_tokenization_spaces=False)


def ids_of(tokenizer: Any, *pieces: str) -> list[int]:
    """Token of each piece, or the tokens of its bytes if the vocabulary of :func:`spaced_tokenizer` lacks it."""
    vocabulary: dict[str, int] = tokenizer.get_vocab()
    ids: list[int] = []
    for piece in pieces:
        ids += [vocabulary[piece]] if piece in vocabulary else [vocabulary[f"<0x{b:02X}>"] for b in piece.encode()]
    return ids


def ended(tokenizer: Any, tokens: Sequence[int], strings: Sequence[str]) -> tuple[int, str, int] | None:
    """Number of tokens at which a response ends, its text and its length; ``None`` if it does not end."""
    text = ResponseText(tokenizer, strings)
    for n, token in enumerate(tokens, start=1):
        if text.append(token):
            return n, text.text, text.length
    return None


def defined_end(tokenizer: Any, tokens: Sequence[int], strings: Sequence[str]) -> tuple[int, str, int] | None:
    """:func:`ended`, by the definition: the whole response is decoded again with each token."""

    def decode(n: int) -> str:
        return tokenizer.decode(tokens[:n], skip_special_tokens=True)

    for n in range(1, len(tokens) + 1):
        text = decode(n)
        first = len(text) - len(text.lstrip())
        places = [i for s in strings for i in range(len(text)) if text.startswith(s, i) and i + len(s) > first]
        if places:
            # With one more byte, a tokenizer can write the whole characters before it as incomplete ones.
            starts = accumulate((len(decode(i).rstrip("\ufffd")) for i in range(n)), max)
            length = sum(start < min(places) for start in starts)
            return n, text[: min(places)], length if text[: min(places)].strip() else 0
    return None


def test_the_end_is_that_of_the_whole_text_decoded_again_with_every_token(load_model: Any) -> None:
    """Random tokens of byte-level tokenizers, which include incomplete and broken characters, and text in pieces."""
    rng, n_ended = random.Random(0), 0
    pieces = ["é", "日本", "\n", "Question:", " a", "Document [1]", "😀", "\n\n", "x"]
    choices = [("\n",), BASE_STOP_STRINGS, ("日",), ("😀x", "a\n"), (" ",), ("本\n",)]
    for tokenizer in (load_model("llama").tokenizer, build_tokenizer()):
        for trial in range(400):
            tokens = [rng.choice([0, 1, 2, *rng.choices(range(len(tokenizer)), k=7)]) for _ in range(30)]
            if trial % 2:
                text = "".join(rng.choices(pieces, k=12))
                tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
            strings = rng.choice(choices)
            expected = defined_end(tokenizer, tokens, strings)
            assert ended(tokenizer, tokens, strings) == expected
            n_ended += expected is not None
    assert n_ended > 200


@pytest.mark.parametrize(
    ("pieces", "strings", "expected"),
    [
        (("▁Paris", "\n", "x"), ("\n",), (2, "Paris", 1)),
        # a token with the end of the answer and the beginning of the stop string
        (("▁Paris", ".\n", "x"), ("\n",), (2, "Paris.", 2)),
        # several tokens; only the whole string ends the response
        (("▁Paris", "Qu", "estion", "x", "Qu", "estion", ":"), ("Question:",), (7, "ParisQuestionx", 4)),
        # a string that begins with the space that the tokenizer removes from the beginning of a text
        (("▁Paris", "▁The", "x"), (" The",), (2, "Paris", 1)),
        # bytes of characters, of which none is whole before its last token
        (("日本", "\n"), ("\n",), (7, "日本", 6)),
        (("日本", "x"), ("本",), (6, "日", 3)),
        # white space before the answer, in tokens of its own and in one token with it
        (("\n", "\n\n", "▁", "▁Paris", "\n\n"), ("\n",), (5, "\n\n\n  Paris", 4)),
        (("\n", "▁Paris", "\n", "x"), ("\n\n",), None),
        # special tokens are no part of the text
        (("<s>", "Qu", "<s>", "estion", "<s>", ":"), ("Question:",), (6, "", 0)),
        # nothing but white space before the stop string
        (("\n", "Qu", "estion", ":"), ("\n", "Question:"), (4, "\n", 0)),
        # the first of two strings that end with the same token
        (("x", "Qu", ".\n"), ("\n", "Qu."), (3, "x", 1)),
        (("▁Paris", "Qu", "estion"), BASE_STOP_STRINGS, None),
    ],
)
def test_ends_of_responses(
    pieces: tuple[str, ...], strings: tuple[str, ...], expected: tuple[int, str, int] | None
) -> None:
    tokenizer = spaced_tokenizer()
    tokens = ids_of(tokenizer, *pieces)
    assert ended(tokenizer, tokens, strings) == expected == defined_end(tokenizer, tokens, strings)
    if expected is not None:
        whole = str(tokenizer.decode(tokens, skip_special_tokens=True))
        assert text_before_stop(whole, strings) == expected[1].strip()


@pytest.mark.parametrize("rest", [[], [0xE6], [0xFF] * 40])
def test_few_tokens_are_decoded_with_each_token(rest: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    """Also after bytes that never form a character."""
    tokenizer = spaced_tokenizer()
    decoded: list[int] = []
    decode = tokenizer.decode

    def counted(tokens: list[int], **settings: Any) -> Any:
        decoded.append(len(tokens))
        return decode(tokens, **settings)

    monkeypatch.setattr(tokenizer, "decode", counted)
    broken = [tokenizer.get_vocab()[f"<0x{byte:02X}>"] for byte in rest]
    tokens = [*ids_of(tokenizer, *["▁Paris", "x"] * 50), *broken, *ids_of(tokenizer, "▁The", "Qu", "estion", ":")]
    assert ended(tokenizer, tokens, ("Question:",)) is not None
    assert max(decoded) <= 20
    assert len(decoded) <= 2 * len(tokens)


def stop_of(model: fl.FocusModel, prompt: Any, interventions: Sequence[Any] = (), n: int = N // 2) -> str:
    """Three characters of a response, of which the first is the last character of token ``n``."""
    response = model.generate(prompt, interventions, max_new_tokens=N)
    texts = model.encoder.response_texts(model.encode(prompt), response.tokens)
    text = "".join(texts)
    place = len("".join(texts[:n])) - 1
    assert text[: place - 2].strip()
    return text[place : place + 3]


def with_stops(model: fl.FocusModel, *strings: str) -> fl.FocusModel:
    return fl.FocusModel(model.backend, model.tokenizer, stop_tokens=(), stop_strings=strings, chat=False, name="tiny")


@pytest.fixture
def unending(tiny_model: fl.FocusModel) -> fl.FocusModel:
    return with_stops(tiny_model)


def expected_of(model: fl.FocusModel, response: fl.Generation, strings: Sequence[str]) -> tuple[list[int], str, bool]:
    """Tokens, text and end of a response that goes on, if it ended at a stop string."""
    end = defined_end(model.tokenizer, response.tokens.tolist(), strings)
    if end is None:
        return response.tokens.tolist(), response.text, response.finished
    return response.tokens[: end[2]].tolist(), end[1].strip(), True


def facts(response: fl.Generation) -> tuple[list[int], str, bool]:
    return response.tokens.tolist(), response.text, response.finished


def interventions() -> list[list[Any]]:
    return [[], [fl.SplitSoftmax(HEADS, 0.1)], [fl.HeadAblation(HEADS, positions="response")]]


def test_rows_of_a_batch_and_lanes_of_a_sweep_end_at_different_steps(unending: fl.FocusModel, samples: Any) -> None:
    prompts = [sample.prompt() for sample in samples[2:]]
    settings = interventions()
    strings = tuple(stop_of(unending, prompts[i % 2], setting, 4 + 2 * i) for i, setting in enumerate(settings))
    stopped = with_stops(unending, *strings)
    lengths: set[int] = set()
    named = [fl.Setting(f"s{i}", tuple(setting)) for i, setting in enumerate(settings)]
    sweep = fl.run_sweep(stopped, samples[2:], named, max_new_tokens=N, progress=False)
    for setting in named:
        plain = unending.generate(prompts, setting.interventions, max_new_tokens=N)
        expected = [expected_of(unending, response, strings) for response in plain]
        batch = stopped.generate(prompts, setting.interventions, max_new_tokens=N)
        assert [facts(response) for response in batch] == expected
        assert all(response.stop is None for response in batch)
        assert list(sweep[setting.name].responses) == [text for _, text, _ in expected]
        lengths |= {len(tokens) for tokens, _, _ in expected}
    assert len(lengths) > 2


def test_rows_of_contextual_scores_are_those_of_the_shorter_response(unending: fl.FocusModel, samples: Any) -> None:
    """Attention rows, and so their means, are those of the tokens before the stop string, read in the same passes."""
    samples = samples[2:]
    prompts = [sample.prompt() for sample in samples]
    strings = (stop_of(unending, prompts[0]),)
    stopped = with_stops(unending, *strings)
    tokens = [response.tokens for response in stopped.generate(prompts, max_new_tokens=N)]
    assert len({len(ids) for ids in tokens}) > 1
    scores = fl.contextual_scores(stopped, samples, max_new_tokens=N, progress=False)
    unstopped = fl.contextual_scores(unending, samples, max_new_tokens=N, progress=False)
    for row, ids in enumerate(tokens):
        # The same tokens, and then no more.
        shorter = fl.contextual_scores(unending, [samples[row]], max_new_tokens=len(ids), progress=False)
        assert torch.allclose(scores.relevant[row], shorter.relevant[0], atol=2e-6)
        assert torch.allclose(scores.sink[row], shorter.sink[0], atol=2e-6)
    assert not torch.allclose(scores.sink[0], unstopped.sink[0], atol=1e-3)


def test_the_row_of_a_token_that_begins_before_the_stop_string_is_read(unending: fl.FocusModel, samples: Any) -> None:
    """That token completes the stop string, so no further token is generated after it, but its row counts."""
    prompt = samples[0].prompt()
    response = unending.generate(prompt, max_new_tokens=N)
    texts = unending.encoder.response_texts(unending.encode(prompt), response.tokens)
    place = next(i for i, text in enumerate(texts) if i > 3 and len(text.strip()) > 1)
    stopped = with_stops(unending, "".join(texts[: place + 1])[-1 - len(texts[place].strip()) // 2 :])
    end = defined_end(unending.tokenizer, response.tokens.tolist(), stopped.decoding.stop_strings)
    assert end is not None
    assert end[0] == end[2] == place + 1
    attention = fl.response_attention(stopped, prompt, HEADS, max_new_tokens=N)
    longer = fl.response_attention(unending, prompt, HEADS, max_new_tokens=N)
    assert torch.allclose(attention.rows, longer.rows[:, : place + 1, : attention.rows.shape[2]], atol=2e-6)
    assert attention.rows[:, -1].sum() > 0.99 * len(HEADS)


def test_an_empty_response_has_no_scores(unending: fl.FocusModel, samples: Any) -> None:
    text = unending.generate(samples[0].prompt(), max_new_tokens=4).text
    stopped = with_stops(unending, text[:1])
    response = stopped.generate(samples[0].prompt(), max_new_tokens=4)
    assert facts(response) == ([], "", True)
    scores = fl.contextual_scores(stopped, samples[:1], max_new_tokens=4, progress=False)
    assert scores.sink.isnan().all()


def test_a_repetition_penalty_and_stop_strings_act_together(checkpoint: Any, tmp_path: Path, samples: Any) -> None:
    directory = Path(shutil.copytree(checkpoint("llama"), tmp_path / "copy"))
    settings: dict[str, Any] = {"eos_token_id": 1, "pad_token_id": 2, "repetition_penalty": 1.4}
    (directory / "generation_config.json").write_text(json.dumps(settings))
    model = fl.FocusModel.from_pretrained(str(directory), device="cpu", stop_strings=())
    prompts = [sample.prompt() for sample in samples]
    strings = [stop_of(model, prompts[0])]
    (directory / "generation_config.json").write_text(json.dumps({**settings, "stop_strings": strings}))
    stopped = fl.FocusModel.from_pretrained(str(directory), device="cpu")
    expected = [expected_of(model, response, strings) for response in model.generate(prompts, max_new_tokens=N)]
    assert [facts(response) for response in stopped.generate(prompts, max_new_tokens=N)] == expected
    assert stopped.description["decoding"] == {"repetition_penalty": 1.4, "stop_strings": strings}


def test_a_run_is_not_resumed_with_other_stop_strings(unending: fl.FocusModel, samples: Any, tmp_path: Path) -> None:
    out = tmp_path / "records.jsonl"
    settings: dict[str, Any] = {"max_new_tokens": 3, "out": out, "progress": False}
    fl.evaluate(with_stops(unending, "\n"), samples[:2], **settings)
    fl.evaluate(with_stops(unending, "\n"), samples[:2], **settings)
    with pytest.raises(ValueError, match="stop_strings"):
        fl.evaluate(with_stops(unending, "\n", "Question:"), samples[:2], **settings)
    with pytest.raises(ValueError, match="decoding"):
        fl.evaluate(unending, samples[:2], **settings)


@pytest.mark.parametrize(
    ("declared", "settings", "expected"),
    [
        (None, {}, BASE_STOP_STRINGS),
        (None, {"stop_strings": ()}, ()),
        (None, {"stop_strings": ["x"]}, ("x",)),
        (["a", "b"], {}, ("a", "b")),
        ("a", {}, ("a",)),
        (["a"], {"stop_strings": []}, ()),
    ],
)
def test_stop_strings_of_a_base_model(
    declared: Any, settings: dict[str, Any], expected: tuple[str, ...], checkpoint: Any, tmp_path: Path
) -> None:
    directory = Path(shutil.copytree(checkpoint("llama"), tmp_path / "copy"))
    content = {"eos_token_id": 1} if declared is None else {"eos_token_id": 1, "stop_strings": declared}
    (directory / "generation_config.json").write_text(json.dumps(content))
    model = fl.FocusModel.from_pretrained(str(directory), device="cpu", **settings)
    assert model.decoding.stop_strings == expected
    assert model.description.get("decoding", {}).get("stop_strings", []) == list(expected)


def test_the_default_depends_on_the_chat_template(load_model: Any) -> None:
    base, chat = load_model("llama"), load_model("llama_chat")
    assert fl.FocusModel(base.backend, base.tokenizer).decoding.stop_strings == BASE_STOP_STRINGS
    assert fl.FocusModel(chat.backend, chat.tokenizer).decoding.stop_strings == ()
    assert fl.FocusModel(chat.backend, chat.tokenizer, chat=False).decoding.stop_strings == BASE_STOP_STRINGS
    given = fl.FocusModel(base.backend, base.tokenizer, decoding=base.decoding)
    assert given.decoding == base.decoding


def test_the_embedded_model_ends_its_own_answers() -> None:
    model = fl.FocusModel.demo()
    assert model.decoding.stop_strings == ()
    assert fl.FocusModel.demo(stop_strings=["\n"]).decoding.stop_strings == ("\n",)


@pytest.mark.parametrize(
    ("strings", "error", "message"),
    [
        ("\n", TypeError, r"stop_strings is '\\n'; give a list of texts"),
        (7, TypeError, "stop_strings is 7; give a list of texts"),
        (["a", 7], TypeError, "stop_strings has 7, a int; every stop string must be a text"),
        (["a", ""], ValueError, "stop_strings has an empty text"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_other_values_are_refused(strings: Any, error: type[Exception], message: str, load_model: Any) -> None:
    model = load_model("llama")
    with pytest.raises(error, match=message):
        fl.FocusModel(model.backend, model.tokenizer, stop_strings=strings)
