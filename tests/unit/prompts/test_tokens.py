"""From characters to tokens: the tokenizer's tokens, and spans of the tokens that overlap a character range."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from focuslens import EncodedPrompt, FocusModel, MultiDocSample, Prompt
from focuslens.prompts.encoder import PromptEncoder, token_span

MERGES = [("a", "b"), ("ab", "c"), ("Ġ", "x"), ("Ã", "¼"), ("d", "Ã"), (":", "Ġ")]


def byte_tokenizer(merges: list[tuple[str, str]] = MERGES, chat_template: str | None = None) -> Any:
    """A tokenizer with a token per byte and per merge, so that its output is predictable."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocabulary = {piece: i for i, piece in enumerate([*alphabet, *(a + b for a, b in merges)])}
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # type: ignore[assignment]
    tokenizer.decoder = decoders.ByteLevel()  # type: ignore[assignment]
    fast: Any = PreTrainedTokenizerFast(tokenizer_object=tokenizer, clean_up_tokenization_spaces=False)
    fast.chat_template = chat_template
    return fast


def pieces(tokenizer: Any, ids: torch.Tensor) -> list[str]:
    return tokenizer.convert_ids_to_tokens(ids.tolist())


@pytest.mark.parametrize(
    ("span", "tokens"),
    [
        ((0, 3), (0, 1)),
        ((1, 2), (0, 1)),  # inside one token
        ((2, 4), (0, 2)),  # across two tokens
        ((3, 5), (1, 3)),
        ((4, 7), (2, 4)),
        ((5, 6), None),  # a character without a token
        ((5, 7), (3, 4)),
        ((0, 7), (0, 4)),
    ],
)
def test_tokens_that_share_a_character_belong_to_a_span(span: tuple[int, int], tokens: tuple[int, int] | None) -> None:
    assert token_span(torch.tensor([(0, 3), (3, 4), (4, 5), (6, 7)]), span) == tokens


def test_tokens_that_cover_nothing_belong_to_no_span() -> None:
    # Special tokens have the offsets (0, 0).
    offsets = torch.tensor([(0, 0), (0, 2), (2, 4), (0, 0)])
    assert token_span(offsets, (0, 2)) == (1, 2)
    assert token_span(offsets, (2, 4)) == (2, 3)


def test_a_token_that_straddles_a_part_belongs_to_it() -> None:
    tokenizer = byte_tokenizer()
    text = "zabcd xy"  # z | abc | d | Ġx | y
    encoded = PromptEncoder(tokenizer, False).encode(
        Prompt(text, {"middle": [(2, 3)], "space": [(5, 6)], "two": [(3, 5), (6, 7)], "end": [(7, 8)]})
    )
    assert pieces(tokenizer, encoded.tokens) == ["z", "abc", "d", "Ġx", "y"]
    assert encoded.spans == {"middle": ((1, 2),), "space": ((3, 4),), "two": ((1, 3), (3, 4)), "end": ((4, 5),)}
    assert encoded.text == text


def test_a_character_of_several_tokens_belongs_with_all_of_them() -> None:
    tokenizer = byte_tokenizer()
    text = "z🦊ü!"
    encoded = PromptEncoder(tokenizer, False).encode(Prompt(text, {"fox": [(1, 2)], "u": [(2, 3)], "mark": [(3, 4)]}))
    assert pieces(tokenizer, encoded.tokens) == ["z", "ð", "Ł", "¦", "Ĭ", "Ã¼", "!"]
    assert encoded.spans == {"fox": ((1, 5),), "u": ((5, 6),), "mark": ((6, 7),)}


@settings(max_examples=40)
@given(st.text(alphabet="abcdx 🦊ü:\n", min_size=1, max_size=20), st.data())
def test_a_part_has_the_tokens_that_hold_its_bytes(text: str, data: st.DataObject) -> None:
    tokenizer = byte_tokenizer()
    start = data.draw(st.integers(0, len(text) - 1))
    end = data.draw(st.integers(start + 1, len(text)))
    encoded = PromptEncoder(tokenizer, False).encode(Prompt(text, {"part": [(start, end)]}))
    assert encoded.tokens.tolist() == tokenizer(text)["input_ids"]
    # In a byte-level vocabulary, the name of a token has one character per byte.
    first_byte, last_byte = len(text[:start].encode()), len(text[:end].encode())
    position, expected = 0, list[int]()
    for i, piece in enumerate(pieces(tokenizer, encoded.tokens)):
        if position < last_byte and position + len(piece) > first_byte:
            expected.append(i)
        position += len(piece)
    assert position == len(text.encode())
    assert encoded.spans == {"part": ((expected[0], expected[-1] + 1),)}


def test_a_plain_string_has_no_parts() -> None:
    encoded = PromptEncoder(byte_tokenizer(), False).encode("abc")
    assert encoded.spans == {}
    assert len(encoded.tokens) == 1


CHECKPOINTS = ["llama", "qwen2", "mistral", "llama_chat"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_tokens_are_those_of_the_checkpoints_own_tokenizer(
    name: str, backend: str, load_model: Any, checkpoint: Any, samples: list[MultiDocSample]
) -> None:
    from transformers import AutoTokenizer

    tokenizer: Any = AutoTokenizer.from_pretrained(checkpoint(name))
    model: FocusModel = load_model(name, backend)
    for prompt in (samples[0].prompt("long"), samples[1].prompt("gold"), "Just text, naïve 🦊."):
        encoded = model.encode(prompt)
        if tokenizer.chat_template:
            turn = [{"role": "user", "content": str(prompt)}]
            expected = tokenizer.apply_chat_template(turn, tokenize=True, add_generation_prompt=True)["input_ids"]
        else:
            expected = tokenizer(str(prompt))["input_ids"]
        assert encoded.tokens.tolist() == expected
        assert expected.count(0) == (0 if name == "qwen2" else 1)  # the BOS token
        assert (expected[0] == 0) == (name != "qwen2")
        assert model.to_tokens(prompt).tolist() == [expected]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_parts_are_found_in_the_chat_template_too(name: str, load_model: Any, samples: list[MultiDocSample]) -> None:
    model: FocusModel = load_model(name)
    prompt = samples[0].prompt("long")
    encoded = model.encode(prompt)
    assert encoded.spans.keys() == prompt.spans.keys()
    for part, ranges in encoded.spans.items():
        assert len(ranges) == len(prompt.spans[part])
        for (start, end), text in zip(ranges, prompt.part(part), strict=True):
            decoded = model.tokenizer.decode(encoded.tokens[start:end])
            assert text in decoded
            assert len(decoded) < len(text) + 12  # only the rest of the first and last token may be extra
            assert text not in model.tokenizer.decode(encoded.tokens[start + 1 : end])
            assert text not in model.tokenizer.decode(encoded.tokens[start : end - 1])


ECHO = "{{ 'user, ask the user\n' }}{% for message in messages %}{{ message['content'] }}{% endfor %}{{ '\nuser' }}"


def test_words_of_the_template_are_not_taken_for_the_prompt() -> None:
    tokenizer = byte_tokenizer(chat_template=ECHO)
    encoded = PromptEncoder(tokenizer, True).encode(Prompt("user", {"all": [(0, 4)], "last": [(3, 4)]}))
    assert encoded.text == "user, ask the user\nuser\nuser"
    assert encoded.spans == {"all": ((19, 23),), "last": ((22, 23),)}


STRIP = "{% for message in messages %}{{ '<' + (message['content'] | trim) + '>' }}{% endfor %}"


def test_a_template_that_changes_the_text_is_refused() -> None:
    encoder = PromptEncoder(byte_tokenizer(chat_template=STRIP), True)
    # The template strips one of the two characters of a part, so the part's position is undefined.
    for prompt in (Prompt("kept ", {"a": [(0, 4)], "b": [(3, 5)]}), Prompt("\nkept", {"a": [(0, 2)]})):
        with pytest.raises(ValueError, match="chat template changes the prompt's text"):
            encoder.encode(prompt)


def test_a_template_that_strips_loses_no_part_inside() -> None:
    encoder = PromptEncoder(byte_tokenizer(chat_template=STRIP), True)
    for text, shift in (("kept", 0), ("kept \n", 0), ("\n kept", 2)):
        assert encoder.encode(text).text == "<kept>"
        encoded = encoder.encode(Prompt(text, {"ep": [(shift + 1, shift + 3)]}))
        assert encoded.text == "<kept>"
        ((start, end),) = encoded.spans["ep"]
        assert encoder.tokenizer.decode(encoded.tokens[start:end]) == "ep"


def test_arguments_reach_the_template() -> None:
    template = "{{ date_string + '|' }}{% for message in messages %}{{ message['content'] }}{% endfor %}"
    encoder = PromptEncoder(byte_tokenizer(chat_template=template), True, {"date_string": "26 Jul"})
    encoded = encoder.encode(Prompt("zz", {"all": [(0, 2)]}))
    assert (encoded.text, encoded.spans) == ("26 Jul|zz", {"all": ((7, 9),)})


def test_a_chat_without_a_template_is_refused() -> None:
    with pytest.raises(ValueError, match="no chat template; use chat=False"):
        PromptEncoder(byte_tokenizer(), True)


def test_a_part_without_tokens_is_refused() -> None:
    class Forgetful:
        chat_template = None

        def __call__(self, text: str, **_: Any) -> dict[str, Any]:
            return {"input_ids": [1, 2], "offset_mapping": [(0, 1), (2, 3)]}

    with pytest.raises(ValueError, match="span 'gap' of the prompt has no token"):
        PromptEncoder(Forgetful(), False).encode(Prompt("a b", {"gap": [(1, 2)]}))


@pytest.mark.parametrize(
    ("response", "expected"),
    [
        ("x y", ["Ġx", "Ġ", "y"]),
        ("  x y", ["Ġx", "Ġ", "y"]),  # one space for any number of spaces in the text
        ("abc", ["Ġ", "abc"]),
    ],
)
def test_a_response_follows_a_base_prompt_after_one_space(response: str, expected: list[str]) -> None:
    tokenizer = byte_tokenizer([merge for merge in MERGES if merge != (":", "Ġ")])
    encoder = PromptEncoder(tokenizer, False)
    tokens = encoder.encode_response(encoder.encode("z:"), response)
    assert pieces(tokenizer, tokens) == expected


def test_a_response_never_changes_the_tokens_of_its_prompt() -> None:
    # In one text, ":" and the space would become one token, but the prompt alone ends with ":".
    tokenizer = byte_tokenizer([(":", "Ġ"), ("Ġ", "x")])
    encoder = PromptEncoder(tokenizer, False)
    assert pieces(tokenizer, encoder.encode("z: x").tokens) == ["z", ":Ġ", "x"]
    assert pieces(tokenizer, encoder.encode_response(encoder.encode("z:"), "x")) == ["Ġx"]


def test_a_response_follows_a_chat_template_directly() -> None:
    tokenizer = byte_tokenizer(chat_template=ECHO)
    encoder = PromptEncoder(tokenizer, True)
    assert pieces(tokenizer, encoder.encode_response(encoder.encode("zz"), "abc x")) == ["abc", "Ġx"]


def test_a_response_to_tokens_alone_is_tokenised_alone() -> None:
    tokenizer = byte_tokenizer()
    prompt = EncodedPrompt(torch.tensor([5, 6, 7]), {})
    assert pieces(tokenizer, PromptEncoder(tokenizer, False).encode_response(prompt, "x")) == ["Ġx"]


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_a_response_is_what_the_tokenizer_gives_after_the_prompt(
    name: str, load_model: Any, samples: list[MultiDocSample]
) -> None:
    model: FocusModel = load_model(name)
    encoded = model.encode(samples[3].prompt("gold"))
    tokens = model.encoder.encode_response(encoded, "the copper river 42")
    assert 0 not in tokens  # no second BOS
    space = "" if model.encoder.chat else " "
    assert model.tokenizer.decode(tokens) == space + "the copper river 42"
    together = model.tokenizer(encoded.text + space + "the copper river 42", add_special_tokens=not model.encoder.chat)
    assert [*encoded.tokens.tolist(), *tokens.tolist()] == together["input_ids"]


@pytest.mark.parametrize(
    ("name", "before", "after"),
    [
        ("llama", "<s>", ""),
        ("llama_chat", "<s>[user]\n", "\n[assistant]\n"),
        ("qwen2", "<|im_start|>user\n", "<|im_end|>\n<|im_start|>assistant\n"),
    ],
)
def test_tokens_of_the_template_are_those_around_the_prompt(load_model, name, before, after):
    encoder = load_model(name).encoder
    prompt = encoder.encode("river stone user lantern")
    mask = encoder.template_mask(prompt).tolist()
    inside = [token for token, outside in zip(prompt.tokens.tolist(), mask, strict=True) if not outside]
    assert encoder.tokenizer.decode(inside) == "river stone user lantern"
    first, last = mask.index(False), len(mask) - mask[::-1].index(False)
    assert encoder.tokenizer.decode(prompt.tokens[:first]) == before
    assert encoder.tokenizer.decode(prompt.tokens[last:]) == after
    # Of tokens without a text, only the special ones are known.
    special = [token in (0, 1, 2) for token in prompt.tokens.tolist()]
    assert encoder.template_mask(encoder.encode(prompt.tokens)).tolist() == special or name == "qwen2"


def test_the_beginning_of_a_response_is_counted_in_tokens(load_model):
    assert load_model("llama").encoder.generation_prompt_length is None
    for name, begins in (("llama_chat", "[assistant]\n"), ("qwen2", "<|im_start|>assistant\n")):
        encoder = load_model(name).encoder
        assert encoder.generation_prompt_length == len(encoder.tokenizer(begins, add_special_tokens=False)["input_ids"])
