"""FocusModel: generated responses, their end, and an unchanged model."""

from __future__ import annotations

import json
from typing import Any, cast

import pytest
import torch

from focuslens import (
    EncodedPrompt,
    FocusDirections,
    FocusModel,
    FocusSteering,
    HeadAblation,
    Intervention,
    MultiDocSample,
    PromptBatch,
    SplitSoftmax,
)
from tests.support.architectures import ARCHITECTURES, build_architecture
from tests.support.checkpoints import VOCABULARY, _tokenizer

HEADS = [(0, 1), (1, 3), (2, 0), (2, 2)]


def prompt_of(length: int, start: int = 5) -> EncodedPrompt:
    return EncodedPrompt(torch.arange(start, start + length), {"relevant": ((2, 6),)})


def without_stops(model: FocusModel) -> FocusModel:
    return FocusModel(model.hooked, model.tokenizer, chat=False, stop_strings=(), stop_tokens=())


def greedy(
    model: FocusModel, prompt: EncodedPrompt, steps: int, interventions: list[Intervention] | None = None
) -> list[int]:
    """Greedy response tokens, each from a full pass without a cache."""
    tokens = prompt.tokens
    for _ in range(steps):
        logits = model.logits(tokens, interventions or [], prompt=prompt)
        tokens = torch.cat((tokens, logits[-1].argmax()[None]))
    return tokens[len(prompt.tokens) :].tolist()


@pytest.fixture
def model(tiny_model: FocusModel) -> FocusModel:
    return without_stops(tiny_model)


def steering(alpha: float, **settings: Any) -> FocusSteering:
    query = torch.randn(4, 16, generator=torch.Generator().manual_seed(3))
    return FocusSteering(FocusDirections(HEADS, query), alpha, **settings)


# --- generation ---


def test_generation_is_greedy_and_ends_at_the_maximum(model: FocusModel) -> None:
    expected = greedy(model, prompt_of(20), 7)
    response = model.generate(prompt_of(20), max_new_tokens=7)
    assert response.tokens.tolist() == expected
    assert response.finished is False
    assert response.text == model.tokenizer.decode(expected).strip()
    assert len(model.generate(prompt_of(20)).tokens) == 100
    assert len(set(expected)) > 3


def test_generation_ends_before_a_stop_token(model: FocusModel) -> None:
    expected = greedy(model, prompt_of(20), 7)
    for place in (0, 3, 6):
        stopped = FocusModel(model.hooked, model.tokenizer, stop_strings=(), stop_tokens=(2, expected[place]))
        first = expected.index(expected[place])
        response = stopped.generate(prompt_of(20), max_new_tokens=7)
        assert response.tokens.tolist() == expected[:first]
        assert response.finished is True
    # With a limit of six tokens, the seventh token, which stops the response, is not generated.
    stopped = FocusModel(model.hooked, model.tokenizer, stop_strings=(), stop_tokens=(expected[6],))
    if expected.index(expected[6]) == 6:
        assert stopped.generate(prompt_of(20), max_new_tokens=6).finished is False


def test_each_prompt_of_a_batch_ends_for_itself(model: FocusModel) -> None:
    prompts = [prompt_of(20), prompt_of(9, start=60), prompt_of(14, start=200)]
    alone = [greedy(model, prompt, 8) for prompt in prompts]
    # The stop token is only in the first response, but not at its beginning.
    stop = next(token for token in alone[0][1:] if token != alone[0][0] and token not in alone[1] + alone[2])
    stopped = FocusModel(model.hooked, model.tokenizer, stop_strings=(), stop_tokens=(stop,))
    responses = stopped.generate(prompts, max_new_tokens=8)
    assert [one.tokens.tolist() for one in responses] == [alone[0][: alone[0].index(stop)], *alone[1:]]
    assert [one.finished for one in responses] == [True, False, False]


def test_special_tokens_and_white_space_are_not_in_the_text(model: FocusModel) -> None:
    ids = [0, *model.tokenizer(" two words ")["input_ids"][1:], 2]
    response = model._generation(ids, model.stop_tokens)
    assert response.text == "two words"
    assert response.tokens.tolist() == ids


def test_a_list_gives_a_list_and_a_prompt_one_response(model: FocusModel) -> None:
    (one,) = model.generate(["copper river"], max_new_tokens=3)
    assert one.text == model.generate("copper river", max_new_tokens=3).text


def test_generation_ends_where_the_context_does(load_model: Any, backend: str) -> None:
    model = without_stops(load_model("llama", backend, n_ctx=64))
    assert len(model.generate(prompt_of(60)).tokens) == 4
    assert model.generate(prompt_of(60)).finished is False
    assert model.generate(prompt_of(64)).tokens.tolist() == []
    held = model.prefill(prompt_of(60), hold_last=True)
    assert len(model.decode(held)[0].tokens) == 4
    _, extended = model.extend(model.prefill(prompt_of(60)), torch.tensor([[7, 8, 9]]))
    assert len(model.decode(extended)[0].tokens) == 1


def test_what_does_not_fit_the_context_is_refused(load_model: Any, backend: str) -> None:
    model = without_stops(load_model("llama", backend, n_ctx=64))
    message = "65 tokens do not fit the model's context of 64"
    with pytest.raises(ValueError, match=message):
        model.generate(prompt_of(65))
    with pytest.raises(ValueError, match=message):
        model.logits(torch.arange(65))
    with pytest.raises(ValueError, match=message):
        model.observe(torch.arange(65), [])
    with pytest.raises(ValueError, match=message):
        model.extend(model.prefill(prompt_of(63)), torch.tensor([[1, 2]]))


@pytest.mark.parametrize("steps", [0, -1])
def test_a_response_of_nothing_is_refused(model: FocusModel, steps: int) -> None:
    with pytest.raises(ValueError, match=f"max_new_tokens is {steps}; it must be at least 1"):
        model.generate(prompt_of(5), max_new_tokens=steps)


# --- prefixes ---


def test_a_prefix_can_be_used_again_and_again(model: FocusModel) -> None:
    prompts, more = [prompt_of(20), prompt_of(9, start=60)], torch.tensor([[7, 8], [9, 10]])
    longer = [EncodedPrompt(torch.cat((prompt.tokens, new)), {}) for prompt, new in zip(prompts, more, strict=True)]
    expected = [greedy(model, prompt, 5) for prompt in prompts]
    onward = [greedy(model, prompt, 4) for prompt in longer]
    prefix = model.prefill(prompts)
    _, extended = model.extend(prefix, more)
    for _ in range(2):
        assert [one.tokens.tolist() for one in model.decode(prefix, max_new_tokens=5)] == expected
        assert [one.tokens.tolist() for one in model.decode(extended, max_new_tokens=4)] == onward
        logits, again = model.extend(prefix, more)
        assert (prefix.mask.shape, again.mask.shape) == ((2, 20), (2, 22))
        for row, prompt in zip(logits, longer, strict=True):
            torch.testing.assert_close(row, model.logits(prompt)[-2:], rtol=1e-4, atol=1e-4)
    assert onward != expected


def test_holding_the_last_token_back_changes_nothing(model: FocusModel) -> None:
    prompts = [prompt_of(20), prompt_of(9, start=60)]
    held = model.prefill(prompts, hold_last=True)
    assert held.logits is None
    assert held.mask.shape == (2, 19)
    for interventions in ([], [SplitSoftmax(HEADS, 0.2)]):
        normal = model.generate(prompts, interventions, max_new_tokens=6)
        again = model.decode(held, interventions, max_new_tokens=6)
        assert [one.tokens.tolist() for one in again] == [one.tokens.tolist() for one in normal]
    assert len(model.decode(model.prefill(prompt_of(1), hold_last=True), max_new_tokens=3)[0].tokens) == 3


def test_one_held_prefix_serves_different_settings(model: FocusModel) -> None:
    prompt = prompt_of(40)
    held = model.prefill(prompt, hold_last=True)
    responses: list[list[int]] = []
    for tau in (0.0, 0.2, 50.0):
        interventions: list[Intervention] = [SplitSoftmax(HEADS, tau)]
        (response,) = model.decode(held, interventions, max_new_tokens=6)
        assert response.tokens.tolist() == greedy(model, prompt, 6, interventions)
        responses.append(response.tokens.tolist())
    assert responses[0] != responses[2]


# --- interventions ---


def test_every_strength_counts_and_none_stays_behind(model: FocusModel) -> None:
    tokens = torch.arange(5, 35)
    plain = model.logits(tokens)
    weak, strong = (model.logits(tokens, [steering(alpha)]) for alpha in (0.5, 5.0))
    assert not torch.allclose(weak, plain, atol=1e-2)
    assert not torch.allclose(weak, strong, atol=1e-2)
    assert torch.equal(model.logits(tokens, [steering(0.5)]), weak)
    assert torch.equal(model.logits(tokens), plain)
    torch.testing.assert_close(model.logits(tokens, [steering(0.0)]), plain, rtol=0, atol=1e-5)


def test_interventions_compose_in_order(model: FocusModel) -> None:
    prompt = prompt_of(30)
    ablation = HeadAblation([(1, 3)], "zero")
    steered = steering(3.0)
    split = SplitSoftmax(HEADS, 0.1)
    all_three = model.logits(prompt, [steered, split, ablation])
    hooks = [hook for one in (steered, split, ablation) for hook in one.hooks(model, prompt)]
    by_hand = model.hooked.run_with_hooks(prompt.tokens[None], fwd_hooks=hooks, return_type="logits")[0]
    torch.testing.assert_close(all_three, by_hand.detach(), rtol=1e-4, atol=1e-4)
    for fewer in ([steered, split], [steered, ablation], [split, ablation]):
        assert not torch.allclose(model.logits(prompt, fewer), all_three, atol=1e-3)
    # Of two interventions on the same hook point, the later one determines the value.
    means = HeadAblation([(1, 3)], "mean", mean=torch.ones(1, 16))
    assert torch.equal(model.logits(prompt, [means, ablation]), model.logits(prompt, [ablation]))
    assert torch.equal(model.logits(prompt, [ablation, means]), model.logits(prompt, [means]))


def test_nothing_is_left_behind_by_an_exception(model: FocusModel) -> None:
    plain = model.logits(torch.arange(5, 25))

    def fail(activation: torch.Tensor, hook: Any) -> None:
        raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"), model.intervened([steering(3.0)], prompt_of(20)):
        model.observe(torch.arange(5, 25), [("blocks.1.attn.hook_pattern", fail)])
    with pytest.raises(KeyError), model.intervened([steering(3.0)], prompt_of(20)):
        raise KeyError
    assert torch.equal(model.logits(torch.arange(5, 25)), plain)


def test_the_users_own_hooks_stay_where_they_are(model: FocusModel) -> None:
    prompt = prompt_of(20)
    ablation, split = HeadAblation([(1, 3)], "zero"), SplitSoftmax([(2, 2)], 0.0)
    plain, ablated, both = (model.logits(prompt, chosen) for chosen in ([], [ablation], [ablation, split]))
    assert not torch.allclose(plain, ablated, atol=1e-2)
    with model.hooked.hooks(fwd_hooks=ablation.hooks(model)):
        for interventions, expected in (([], ablated), ([split], both), ([], ablated)):
            torch.testing.assert_close(model.logits(prompt, interventions), expected, rtol=1e-4, atol=1e-4)
        with pytest.raises(KeyError), model.intervened([split], prompt):
            raise KeyError
        torch.testing.assert_close(model.logits(prompt), ablated, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.logits(prompt), plain, rtol=0, atol=1e-5)


@pytest.mark.parametrize("site", ["rotary", "projection"])
def test_padding_moves_no_position(model: FocusModel, site: Any) -> None:
    # A rotary-site direction depends on absolute positions, so padding must not shift them.
    query = 3 * torch.randn(4, 16, generator=torch.Generator().manual_seed(3))
    steered = [FocusSteering(FocusDirections(HEADS, query, query, site), 1.0)]
    long, short, more = prompt_of(40), prompt_of(10, start=60), torch.tensor([[7, 8], [7, 8]])
    batch, alone = model.prefill([long, short], steered), model.prefill(short, steered)
    assert batch.logits is not None
    assert alone.logits is not None
    torch.testing.assert_close(batch.logits[1], alone.logits[0], rtol=1e-4, atol=1e-4)
    together, _ = model.extend(batch, more, steered)
    apart, _ = model.extend(alone, more[:1], steered)
    torch.testing.assert_close(together[1], apart[0], rtol=1e-4, atol=1e-4)


def test_intervened_works_around_the_users_own_calls(model: FocusModel) -> None:
    tokens = torch.arange(5, 25)
    with model.intervened([steering(3.0)], None):
        inside = model.hooked(tokens[None], return_type="logits")[0].detach()
    torch.testing.assert_close(inside, model.logits(tokens, [steering(3.0)]), rtol=1e-4, atol=1e-4)
    assert not torch.allclose(inside, model.logits(tokens), atol=1e-2)


def test_a_hook_point_that_does_not_exist_is_refused(model: FocusModel) -> None:
    model.points.require_acting(["blocks.0.attn.hook_pattern"])
    with pytest.raises(ValueError, match=r"has no hook point 'blocks.9.attn.hook_z'; hooks on it would be ignored"):
        model.points.require_acting(["blocks.0.attn.hook_pattern", "blocks.9.attn.hook_z"])
    with pytest.raises(ValueError, match="has no hook point 'nowhere'"):
        model.observe(torch.arange(3), [("nowhere", lambda *_: None)])


def test_observers_see_what_the_interventions_made(model: FocusModel) -> None:
    prefix = model.prefill(prompt_of(20))
    seen: list[torch.Tensor] = []

    def keep(pattern: torch.Tensor, hook: Any) -> None:
        seen.append(pattern[0, 1].clone())

    split = SplitSoftmax([(0, 1)], 0.0)
    model.extend(prefix, torch.tensor([[7, 8]]), [split], [("blocks.0.attn.hook_pattern", keep)])
    model.extend(prefix, torch.tensor([[7, 8]]), [], [("blocks.0.attn.hook_pattern", keep)])
    steered, plain = seen
    assert steered.shape == (2, 22)
    torch.testing.assert_close(steered[:, 2:6].sum(dim=-1), torch.ones(2))
    assert float(plain[:, 2:6].sum(dim=-1).max()) < 0.9


# --- logits ---


def test_logits_know_where_the_response_begins(model: FocusModel) -> None:
    prompt = prompt_of(20)
    tokens = torch.cat((prompt.tokens, torch.tensor([7, 8])))
    split = SplitSoftmax(HEADS, 0.0)
    plain = model.logits(tokens)
    with_response = model.logits(tokens, [split], prompt=prompt)
    torch.testing.assert_close(with_response[:19], plain[:19], rtol=0, atol=1e-5)
    for row in (19, 20, 21):
        assert not torch.allclose(with_response[row], plain[row], atol=1e-2)
    assert torch.equal(model.logits(EncodedPrompt(tokens, {}), [split], prompt=prompt), with_response)
    # By default, all tokens are the prompt, so only the last row produces a response.
    whole = EncodedPrompt(tokens, prompt.spans)
    last_only = model.logits(whole, [split])
    torch.testing.assert_close(last_only[:21], plain[:21], rtol=0, atol=1e-5)
    assert not torch.allclose(last_only[21], plain[21], atol=1e-2)
    by_range = SplitSoftmax(HEADS, 0.0, (2, 6))
    assert torch.equal(model.logits(tokens, [by_range]), last_only)


def test_logits_take_tokens_text_or_a_prompt(model: FocusModel, samples: list[MultiDocSample]) -> None:
    prompt = samples[3].prompt("gold")
    tokens = model.encode(prompt).tokens
    expected = model.logits(tokens)
    assert expected.shape == (len(tokens), model.shape.d_vocab)
    assert torch.equal(model.logits(tokens.tolist()), expected)
    assert torch.equal(model.logits(prompt), expected)
    assert torch.equal(model.logits(model.encode(prompt)), expected)
    assert torch.equal(model.logits(tokens, prompt=prompt), expected)


def test_tokens_that_do_not_begin_with_the_prompt_are_refused(model: FocusModel) -> None:
    for tokens in (torch.arange(6, 30), torch.arange(5, 15)):
        with pytest.raises(ValueError, match="tokens do not begin with the tokens of the prompt"):
            model.logits(tokens, prompt=prompt_of(20))


def test_nothing_to_run_on_is_refused(model: FocusModel) -> None:
    with pytest.raises(ValueError, match="no tokens"):
        model.logits([])
    with pytest.raises(ValueError, match="at least one prompt"):
        model.generate([])


# --- wrapping ---


def test_what_is_wrapped_stays_the_users(tiny_model: FocusModel) -> None:
    hooked = tiny_model.hooked
    model = FocusModel(hooked)
    assert model.hooked is hooked
    assert torch.equal(model.logits(torch.arange(9)), tiny_model.logits(torch.arange(9)))
    assert model.stop_tokens == (1,)
    shape = model.shape
    assert (shape.n_layers, shape.n_heads, shape.n_key_value_heads, shape.d_head) == (3, 4, 2, 16)
    assert (shape.d_model, shape.d_vocab, shape.n_ctx) == (64, VOCABULARY, 1024)
    assert [shape.key_value_head(head) for head in range(4)] == [0, 0, 1, 1]


def test_the_description_names_what_ran(load_model: Any, backend: str) -> None:
    names = {"hooked": "HookedTransformer", "bridge": "TransformerBridge"}
    model = FocusModel(load_model("llama", backend).hooked, name="mine")
    expected = {"name": "mine", "chat": False, "backend": names[backend], "dtype": "float32", "device": "cpu"}
    assert expected.items() <= model.description.items()
    half = load_model("llama", backend, dtype="bfloat16")
    assert half.description["dtype"] == "bfloat16"
    assert half.logits(torch.arange(5)).dtype == torch.bfloat16


def test_chat_is_used_where_there_is_a_template_unless_told_otherwise(load_model: Any) -> None:
    with_template, without = load_model("qwen2"), load_model("llama")
    assert (with_template.encoder.chat, without.encoder.chat) == (True, False)
    plain = FocusModel(with_template.hooked, with_template.tokenizer, chat=False)
    assert plain.encode("river").text == "river"
    assert with_template.encode("river").text.startswith("<|im_start|>user\nriver<|im_end|>")
    with pytest.raises(ValueError, match="chat=True, but the tokenizer has no chat template"):
        FocusModel(without.hooked, chat=True)


def test_a_batch_is_taken_as_it_is(model: FocusModel) -> None:
    batch = PromptBatch.of([prompt_of(3)])
    assert model.batch(batch) is batch
    assert model.batch("river").width == len(model.encode("river").tokens)
    assert len(model.batch(["river", "stone"])) == 2


@pytest.mark.usefixtures("unchecked")
def test_what_is_no_transformer_lens_model_is_refused(model: FocusModel) -> None:
    with pytest.raises(
        TypeError, match=r"expected a HookedTransformer or a TransformerBridge, got Linear; .*from_pretr"
    ):
        FocusModel(torch.nn.Linear(1, 1))

    class TransformerBridge:
        cfg = model.hooked.cfg
        tokenizer = None
        original_model = torch.nn.Linear(1, 1)

    with pytest.raises(ValueError, match=r"has no tokenizer; pass one: FocusModel\(hooked, tokenizer=...\)"):
        FocusModel(TransformerBridge())


@pytest.mark.parametrize("dtype", ["floaty", "nn"])
def test_a_dtype_that_is_none_is_refused(checkpoint: Any, dtype: str) -> None:
    with pytest.raises(ValueError, match=f"dtype is '{dtype}'; it must be the name of a torch dtype"):
        FocusModel.from_pretrained(str(checkpoint("llama")), dtype=dtype)


@pytest.mark.usefixtures("unchecked")
def test_a_backend_that_is_none_is_refused(checkpoint: Any) -> None:
    with pytest.raises(ValueError, match="backend is 'tpu'"):
        FocusModel.from_pretrained(str(checkpoint("llama")), backend=cast("Any", "tpu"))


def test_a_model_that_is_being_trained_runs_without_dropout(tmp_path, samples):
    (architecture,) = [one for one in ARCHITECTURES if one.name == "GPT-2"]
    directory = build_architecture(architecture, tmp_path, _tokenizer(bos=True, chat_template=None))
    model = FocusModel.from_pretrained(str(directory), device="cpu")
    prompt = samples[0].prompt()
    expected = model.logits(prompt)
    model.hooked.train()
    assert any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in model.hooked.modules())
    torch.testing.assert_close(model.logits(prompt), expected, atol=0, rtol=0)
    assert model.hooked.training
    assert all(module.training for module in model.hooked.modules())


@pytest.mark.parametrize("n", [60, 4096])
def test_a_context_under_a_name_of_its_own_is_read(n, tmp_path):
    (architecture,) = [one for one in ARCHITECTURES if one.name == "MPT"]
    directory = build_architecture(architecture, tmp_path, _tokenizer(bos=True, chat_template=None))
    config = json.loads((directory / "config.json").read_text())
    config.pop("max_position_embeddings", None)
    (directory / "config.json").write_text(json.dumps({**config, "max_seq_len": n}))
    assert FocusModel.from_pretrained(str(directory), device="cpu").shape.n_ctx == n
