"""Greedy decoding with the settings of a checkpoint's generation config, against Hugging Face's ``generate``."""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM

import focuslens as fl
from focuslens.model.decoding_settings import DecodingSettings

N = 14
SETTINGS: dict[str, dict[str, Any]] = {
    "repetition penalty": {"repetition_penalty": 1.4},
    "no repeated tokens": {"no_repeat_ngram_size": 1},
    "bad words": {"bad_words_ids": [[140], [353, 386]]},
    "tokens never": {"suppress_tokens": list(range(100, 400))},
    "tokens not first": {"begin_suppress_tokens": list(range(30, 450))},
    "all": {
        "repetition_penalty": 1.2,
        "no_repeat_ngram_size": 3,
        "suppress_tokens": [5, 6],
        "begin_suppress_tokens": [9],
    },
}


def copy_with(checkpoint: Any, tmp_path: Path, **generation: Any) -> Path:
    directory = Path(shutil.copytree(checkpoint("llama"), tmp_path / "copy"))
    (directory / "generation_config.json").write_text(json.dumps(generation))
    return directory


def theirs(directory: Path, tokens: torch.Tensor, **settings: Any) -> list[int]:
    model: Any = cast("Any", AutoModelForCausalLM).from_pretrained(directory)
    return model.generate(tokens[None], max_new_tokens=N, do_sample=False, **settings)[0, len(tokens) :].tolist()


def with_stop(response: fl.Generation) -> list[int]:
    return response.tokens.tolist() + ([] if response.stop is None else [response.stop])


@pytest.mark.parametrize("name", SETTINGS)
def test_responses_are_those_of_transformers(
    name: str, checkpoint: Any, tmp_path: Path, backend: Any, samples: Any
) -> None:
    directory = copy_with(checkpoint, tmp_path, eos_token_id=1, pad_token_id=2, **SETTINGS[name])
    model = fl.FocusModel.from_pretrained(str(directory), device="cpu", backend=backend, stop_strings=())
    prompts = [sample.prompt() for sample in samples[:3]]
    expected = [theirs(directory, model.encode(prompt).tokens) for prompt in prompts]
    assert [with_stop(response) for response in model.generate(prompts, max_new_tokens=N)] == expected
    assert [with_stop(model.generate(prompt, max_new_tokens=N)) for prompt in prompts] == expected
    plain = fl.FocusModel(model.backend, model.tokenizer, stop_strings=(), stop_tokens=model.stop_tokens)
    assert [with_stop(response) for response in plain.generate(prompts, max_new_tokens=N)] != expected
    texts = [model.tokenizer.decode(ids, skip_special_tokens=True).strip() for ids in expected]
    assert list(fl.evaluate(model, samples[:3], max_new_tokens=N).responses) == texts
    assert list(fl.document_scores(model, samples[:3], max_new_tokens=N).responses) == texts
    assert model.description["decoding"] == model.decoding.describe() != {}


def test_a_stop_token_comes_no_sooner_than_declared(checkpoint: Any, tmp_path: Path, samples: Any) -> None:
    first = copy_with(checkpoint, tmp_path, eos_token_id=None)
    prompt = samples[0].prompt()
    model = fl.FocusModel.from_pretrained(str(first), device="cpu", stop_strings=())
    stop = theirs(first, model.encode(prompt).tokens)[2]
    settings = {"eos_token_id": stop, "min_new_tokens": 8}
    (first / "generation_config.json").write_text(json.dumps(settings))
    model = fl.FocusModel.from_pretrained(str(first), device="cpu", stop_strings=())
    expected = theirs(first, model.encode(prompt).tokens)
    assert with_stop(model.generate(prompt, max_new_tokens=N)) == expected
    assert len(expected) > 3


def test_settings_that_are_not_applied_are_named(checkpoint: Any, tmp_path: Path) -> None:
    directory = copy_with(checkpoint, tmp_path, eos_token_id=1, num_beams=3, do_sample=True, temperature=0.3)
    with pytest.warns(UserWarning, match=r"has num_beams=3, which FocusLens does not apply: its responses are greedy"):
        fl.FocusModel.from_pretrained(str(directory), device="cpu")


def test_settings_of_sampling_are_not_named(checkpoint: Any, tmp_path: Path) -> None:
    """Their absence is what "greedy" means."""
    directory = copy_with(checkpoint, tmp_path, eos_token_id=1, do_sample=True, temperature=0.3, top_p=0.9, top_k=20)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        warnings.filterwarnings("ignore", message="TransformerLens's own generate")  # with transformers 5.24
        fl.FocusModel.from_pretrained(str(directory), device="cpu")


@pytest.mark.parametrize("penalty", [0, -1.5])
def test_a_penalty_that_is_not_positive_is_refused(penalty: float) -> None:
    with pytest.raises(ValueError, match=f"repetition_penalty is {penalty}; it must be above 0"):
        DecodingSettings(repetition_penalty=penalty)


def test_penalties_count_the_tokens_of_an_extended_prefix(checkpoint: Any, tmp_path: Path, samples: Any) -> None:
    directory = copy_with(checkpoint, tmp_path, eos_token_id=1, pad_token_id=2, repetition_penalty=1.5)
    model = fl.FocusModel.from_pretrained(str(directory), device="cpu", stop_strings=())
    prompt = model.encode(samples[0].prompt())
    more = torch.tensor([[11, 12, 13]])
    _, longer = model.extend(model.prefill(prompt, hold_last=True), more)
    (response,) = model.decode(longer, max_new_tokens=N)
    assert with_stop(response) == theirs(directory, torch.cat((prompt.tokens, more[0])))


def test_a_generation_config_that_cannot_be_read_is_refused(checkpoint: Any, tmp_path: Path) -> None:
    directory = copy_with(checkpoint, tmp_path, eos_token_id=1)
    (directory / "generation_config.json").write_text('{"eos_token_id": 1,}')
    with pytest.raises(ValueError, match=r"generation_config.json of .* cannot be read"):
        fl.FocusModel.from_pretrained(str(directory), device="cpu")


@pytest.mark.parametrize("name", SETTINGS)
def test_settings_left_in_config_json_hold_where_there_is_no_other_file(
    name: str, checkpoint: Any, tmp_path: Path, samples: Any
) -> None:
    directory = copy_with(checkpoint, tmp_path)
    (directory / "generation_config.json").unlink()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, **SETTINGS[name], "num_beams": 2}))
    with pytest.warns(UserWarning, match=r"has num_beams=2, which FocusLens does not apply"):
        model = fl.FocusModel.from_pretrained(str(directory), device="cpu", stop_strings=())
    tokens = model.encode(samples[0].prompt()).tokens
    assert with_stop(model.generate(samples[0].prompt(), max_new_tokens=N)) == theirs(directory, tokens, num_beams=1)
    assert model.decoding.describe()


def test_a_declared_absence_of_the_cache_is_named_where_it_matters(checkpoint: Any, tmp_path: Path) -> None:
    directory = copy_with(checkpoint, tmp_path, eos_token_id=1, use_cache=False)
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message=".*use_cache")
        fl.FocusModel.from_pretrained(str(directory), device="cpu")
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "sliding_window": 24}))
    with pytest.warns(UserWarning, match="has use_cache=False, which FocusLens does not apply"):
        fl.FocusModel.from_pretrained(str(directory), device="cpu")
