"""Rotary tables that depend on the length: a response depends on nothing but its own prompt."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import focuslens as fl
from tests.support.architectures import ARCHITECTURES, build_architecture
from tests.support.tiers import first_quick

NAMES = ("Phi-3, longrope", "Llama, longrope", "Llama, dynamic")
LIMIT = 64
N = 12


@pytest.fixture(scope="module")
def directory_of(tmp_path_factory: pytest.TempPathFactory, checkpoint: Any) -> Any:
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("llama"))
    built: dict[str, Path] = {}

    def directory(name: str) -> Path:
        (architecture,) = (one for one in ARCHITECTURES if one.name == name)
        if name not in built:
            built[name] = build_architecture(architecture, tmp_path_factory.mktemp("longrope"), tokenizer)
        return built[name]

    return directory


def opened(directory: Path) -> fl.FocusModel:
    model = fl.FocusModel.from_pretrained(str(directory), device="cpu", n_ctx=512)
    return fl.FocusModel(model.backend, model.tokenizer, chat=False, stop_strings=(), stop_tokens=())


def prompt(length: int) -> fl.EncodedPrompt:
    return fl.EncodedPrompt(5 + (torch.arange(length) * 31) % 490, {})


def theirs(directory: Path, encoded: fl.EncodedPrompt) -> list[int]:
    """Response of a fresh transformers model, which remembers no other prompt."""
    model: Any = cast("Any", AutoModelForCausalLM).from_pretrained(directory, attn_implementation="eager")
    settings: dict[str, Any] = {"do_sample": False, "eos_token_id": None, "pad_token_id": 2}
    return model.generate(encoded.tokens[None], max_new_tokens=N, **settings)[0, len(encoded.tokens) :].tolist()


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("length", first_quick([LIMIT - 4, LIMIT, 20, LIMIT - N, LIMIT - 1, LIMIT + 1, 100], 2))
def test_responses_on_both_sides_of_the_limit_and_across_it(name: str, length: int, directory_of: Any) -> None:
    directory = directory_of(name)
    model, encoded = opened(directory), prompt(length)
    expected = theirs(directory, encoded)
    assert model.generate(encoded, max_new_tokens=N).tokens.tolist() == expected
    together = model.generate([prompt(150), encoded, prompt(7)], max_new_tokens=N)
    assert together[1].tokens.tolist() == expected
    assert model.generate(encoded, max_new_tokens=N).tokens.tolist() == expected  # after longer prompts


@pytest.mark.parametrize("name", NAMES[1:])
@pytest.mark.parametrize("length", [LIMIT, LIMIT + 1])
def test_a_layer_under_a_hook_of_others_has_the_table_of_the_layers_around_it(
    name: str, length: int, directory_of: Any
) -> None:
    """Keys of a prompt without its last token, which is held back, have the table of the whole prompt."""
    model, encoded, seen = opened(directory_of(name)), prompt(length), list[int]()
    expected = model.prefill(encoded, hold_last=True)
    with model.hooked.hooks(fwd_hooks=[("blocks.1.mlp.hook_out", lambda x, hook: seen.append(x.shape[1]))]):
        prefix = model.prefill(encoded, hold_last=True)
    assert seen == [length - 1]
    for ours, plain in zip(prefix.cache.layers, expected.cache.layers, strict=True):
        torch.testing.assert_close(ours.segments[0].keys, plain.segments[0].keys, atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", NAMES)
def test_interventions_and_prefixes_across_the_limit_equal_whole_passes(name: str, directory_of: Any) -> None:
    """For each row, the pattern after a crossing is the one of a pass over the whole sequence, if keys are renewed."""
    model, encoded = opened(directory_of(name)), prompt(LIMIT - 3)
    edit = fl.SplitSoftmax([(0, 1), (2, 3)], 0.3, span=(5, 20))
    response = model.generate(encoded, [edit], max_new_tokens=N).tokens
    assert response.tolist() != model.generate(encoded, max_new_tokens=N).tokens.tolist()
    prefix = model.prefill(encoded, hold_last=True)
    logits, _ = model.extend(prefix, response[None], [edit])
    one_by_one = [model.completed(prefix, [edit]).logits]
    grown = prefix
    for token in response:
        row, grown = model.extend(grown, token[None, None], [edit])
        one_by_one.append(row[:, -1])
    torch.testing.assert_close(logits[0], torch.cat(one_by_one[1:]), atol=1e-4, rtol=0)  # pyright: ignore[reportCallIssue, reportArgumentType]
    assert [int(row.argmax()) for row in one_by_one[:-1]] == response.tolist()  # pyright: ignore[reportOptionalMemberAccess]
    if name == "Phi-3, longrope":
        whole = model.logits(torch.cat((encoded.tokens, response)), [edit], prompt=encoded)
        torch.testing.assert_close(whole[-1], logits[0, -1], atol=1e-4, rtol=0)


def test_nothing_is_left_on_the_model(directory_of: Any) -> None:
    model = opened(directory_of("Llama, dynamic"))
    (embedding,) = model.backend._tables.embeddings  # pyright: ignore[reportAttributeAccessIssue]
    model.generate(prompt(100), max_new_tokens=2)
    assert "forward" not in vars(embedding)
    assert embedding.max_seq_len_cached == embedding.original_max_seq_len == LIMIT


def test_scores_of_a_sweep_are_those_of_single_runs(directory_of: Any, samples: Any) -> None:
    """Settings share prefixes, so their tables must be those of whole prompts."""
    model = opened(directory_of("Phi-3, longrope"))
    settings = [fl.Setting("baseline"), *fl.split_softmax_settings([(0, 1), (1, 2)], [0.3, 2.0], [1, 2])]
    sweep = fl.run_sweep(model, samples, settings, max_new_tokens=4)
    for setting in settings:
        for sample, response in zip(samples, sweep[setting.name].responses, strict=True):
            alone = model.generate(sample.prompt(), setting.interventions, max_new_tokens=4)
            assert alone.text == response


def test_keys_that_are_computed_again_need_the_prefixs_interventions(directory_of: Any) -> None:
    model = opened(directory_of("Phi-3, longrope"))
    steering = fl.HeadAblation([(0, 1)])
    prefix = model.prefill(prompt(LIMIT), [steering], hold_last=True)
    token = torch.tensor([[5]])
    with pytest.raises(
        ValueError, match=r"outgrows a rotary table.*pass the interventions under which the prefix was run"
    ):
        model.extend(model.completed(prefix, [steering]), token)
    model.extend(prefix, token, [steering])


def test_tables_for_training_are_those_of_the_sequence(directory_of: Any) -> None:
    """Without a memory of longer sequences."""
    backend = opened(directory_of("Llama, dynamic")).backend
    first = backend.rotary(0, 100).cos
    backend.rotary(0, 200)
    assert torch.equal(backend.rotary(0, 100).cos, first)


def test_a_method_that_another_library_replaced_is_called_and_stays(directory_of: Any) -> None:
    model = opened(directory_of("Llama, longrope"))
    (embedding,) = model.backend._tables.embeddings  # pyright: ignore[reportAttributeAccessIssue]
    original, calls = embedding.forward, list[int]()

    def forward(*arguments: Any, **settings: Any) -> Any:
        calls.append(1)
        return original(*arguments, **settings)

    vars(embedding)["forward"] = forward
    try:
        model.logits(prompt(20))
        assert calls
        assert vars(embedding)["forward"] is forward
    finally:
        vars(embedding).pop("forward")


def test_rows_with_scaled_attention_are_not_computed_again_without_it(directory_of: Any) -> None:
    model, method = opened(directory_of("Phi-3, longrope")), fl.DySCO([(0, 0)], strength=1)
    for length in (LIMIT - N, LIMIT + 20):
        encoded = prompt(length)
        (response,) = method.respond(model, model.batch(encoded), max_new_tokens=N)
        assert response.tokens.tolist() == model.generate(encoded, max_new_tokens=N).tokens.tolist()
    for length in (LIMIT - 4, LIMIT + 1):  # the response outgrows the table, or the last rows of the prompt do
        with pytest.raises(ValueError, match=f"the sequence outgrows a rotary table at {LIMIT + 1} tokens"):
            method.respond(model, model.batch(prompt(length)), max_new_tokens=N)
