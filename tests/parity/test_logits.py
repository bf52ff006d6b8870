"""Without interventions, FocusLens's logits and greedy responses equal those of Hugging Face."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from focuslens import FocusModel
from tests.support.checkpoints import CHECKPOINTS
from tests.support.reference import document_ranges, gap, prompt_text, tokens_of_ranges

ALL = pytest.mark.parametrize("name", list(CHECKPOINTS))
FAMILIES = pytest.mark.parametrize("name", ["llama", "llama_chat", "qwen2", "qwen3", "mistral", "mistral_window"])


@FAMILIES
@pytest.mark.parametrize("case", ["long", "gold", "negative"])
def test_prompt_tokens_are_those_hugging_face_makes(name, case, load_model, reference, samples):
    model, hf = load_model(name), reference(name)
    for sample in samples:
        encoded = model.encode(sample.prompt(case))
        assert encoded.tokens.tolist() == hf.ids(prompt_text(sample, case)).tolist()
        assert encoded.tokens.tolist().count(0) == (0 if name.startswith("qwen") else 1), "one BOS or none, never two"
        assert model.to_tokens(sample.prompt(case)).tolist() == [encoded.tokens.tolist()]


@pytest.mark.parametrize("name", ["llama", "llama_chat", "qwen2"])
def test_parts_are_the_tokens_that_hold_their_characters(name, load_model, reference, samples):
    model, hf = load_model(name), reference(name)
    straddling = 0
    for sample in samples:
        prompt = prompt_text(sample, "long")
        offsets = hf.offsets(prompt)
        encoded = model.encode(sample.prompt("long"))
        found = document_ranges(sample, hf.text(prompt))
        assert len(found) == len(sample.documents)
        for index, characters in found.items():
            tokens = tokens_of_ranges(offsets, characters)
            assert encoded.spans["document"][index] == (tokens[0], tokens[-1] + 1)
            straddling += offsets[tokens[0]][0] < characters[0]
        assert encoded.spans["relevant"] == (encoded.spans["document"][sample.gold_index],)
    # "](" is one token of this vocabulary, so a document begins in the middle of a token.
    assert straddling > 0


@ALL
def test_logits_are_hugging_faces(name, backend, load_model, reference, samples, logit_tolerance):
    model, hf = load_model(name, backend), reference(name)
    sample = samples[1]
    prompt = hf.ids(prompt_text(sample, "long"))
    response = torch.tensor([70, 300, 301, 5])
    expected = hf.logits(torch.cat((prompt, response)))
    assert expected.std() > 1
    assert gap(model.logits(torch.cat((prompt, response))), expected) < logit_tolerance[backend]
    assert gap(model.logits(sample.prompt("long")), expected[: len(prompt)]) < logit_tolerance[backend]


@FAMILIES
def test_logits_with_a_cache_are_those_without(name, backend, load_model, reference, samples, logit_tolerance):
    """Logits of a prefilled and extended batch of unequal lengths equal those of one Hugging Face pass per sequence."""
    model, hf = load_model(name, backend), reference(name)
    chosen = [samples[1], samples[3]]
    response = torch.tensor([[70, 300, 301], [5, 90, 91]])
    prefix = model.prefill([sample.prompt("long") for sample in chosen])
    logits, longer = model.extend(prefix, response)
    more, _ = model.extend(longer, response.flip(0))
    for i, sample in enumerate(chosen):
        prompt = hf.ids(prompt_text(sample, "long"))
        expected = hf.logits(torch.cat((prompt, response[i], response[1 - i])))[len(prompt) - 1 :]
        assert gap(prefix.logits[i], expected[0]) < logit_tolerance[backend]
        assert gap(logits[i], expected[1:4]) < logit_tolerance[backend]
        assert gap(more[i], expected[4:7]) < logit_tolerance[backend]


@pytest.mark.parametrize("name", ["llama_rope", "llama_linear", "mistral_window", "qwen2_window"])
def test_rotary_scaling_and_windows_matter_on_these_prompts(name, checkpoint, reference, samples):
    """Rotary scaling and windows change the logits by far more than the tolerance of the tests above.

    A loader that ignored these settings would therefore fail those tests.
    """
    config = AutoConfig.from_pretrained(checkpoint(name))
    if "window" in name:
        config.sliding_window = 4096
    else:
        config.rope_parameters = {"rope_type": "default", "rope_theta": 10000.0}
    without = AutoModelForCausalLM.from_pretrained(checkpoint(name), config=config, attn_implementation="eager").eval()
    hf = reference(name)
    prompt = hf.ids(prompt_text(samples[1], "long"))
    with torch.no_grad():
        assert gap(without(prompt[None]).logits[0], hf.logits(prompt)) > 0.5


@FAMILIES
def test_greedy_responses_are_hugging_faces(name, backend, load_model, reference, samples):
    model, hf = load_model(name, backend), reference(name)
    prompts = [sample.prompt("long") for sample in samples]
    expected = [hf.generate(hf.ids(prompt_text(sample, "long")), 8) for sample in samples]
    batched = model.generate(prompts, max_new_tokens=8)
    assert [response.tokens.tolist() for response in batched] == expected
    assert model.generate(prompts[1], max_new_tokens=8).tokens.tolist() == expected[1]
    assert len({tuple(tokens) for tokens in expected}) == len(expected), "the responses must differ to show anything"
    assert [one.text for one in batched] == [
        hf.tokenizer.decode(tokens, skip_special_tokens=True).strip() for tokens in expected
    ]


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral_window"])
def test_responses_in_a_batch_end_where_each_alone_would(name, backend, load_model, reference, samples):
    """Responses of a batch end at the same steps as each response alone.

    The stop tokens are taken from the responses, so that responses end at different steps and one is empty.
    """
    hf = reference(name)
    ids = [hf.ids(prompt_text(sample, "long")) for sample in samples]
    free = [hf.generate(one, 8) for one in ids]
    stop = [max(free[0], key=free[0].index), free[1][2], free[2][0]]
    expected = [hf.generate(one, 8, stop=stop) for one in ids]
    assert len({len(tokens) for tokens in expected}) > 1
    assert [] in expected
    loaded = load_model(name, backend)
    model = FocusModel(loaded.hooked, loaded.tokenizer, stop_strings=(), stop_tokens=stop)
    batched = model.generate([sample.prompt("long") for sample in samples], max_new_tokens=8)
    assert [one.tokens.tolist() for one in batched] == expected
    assert [one.finished for one in batched] == [len(tokens) < 8 for tokens in expected]
    alone = [model.generate(sample.prompt("long"), max_new_tokens=8) for sample in samples]
    assert [one.tokens.tolist() for one in alone] == expected
    assert [one.finished for one in alone] == [one.finished for one in batched]
    assert [one.text for one in alone] == [one.text for one in batched]


def test_a_context_of_the_checkpoints_own_length(backend, load_model, reference, samples):
    """The context length is the checkpoint's, not a default cap, and the last position is as exact as the first."""
    hf, model = reference("llama_rope"), load_model("llama_rope", backend)
    prompt = hf.ids(prompt_text(samples[0], "long"))
    tokens = prompt.repeat(5)[:1024]
    assert model.shape.n_ctx == 1024
    expected = hf.logits(tokens)
    # Rotary angles grow with the position, and so does their float32 rounding error: an angle of 1,024 radians is
    # accurate to 6e-5. The bridge uses Hugging Face's angles and differs only in the order of summation (2e-5
    # measured).
    assert gap(model.logits(tokens), expected) < (1e-4 if backend == "bridge" else 5e-3)
