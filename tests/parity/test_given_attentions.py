"""Scores from attention patterns of plain transformers equal the scores that FocusLens computes itself."""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import focuslens as fl
from focuslens.scores.contextual_scores import KINDS

TOLERANCE = 1e-5
RESPONSES = ("the river", "a stone of 1984 and more", "no", "the old mill by the river")
FAMILIES = ["llama", "qwen2_window", "qwen3", "mistral_window"]


class Plain:
    """A Hugging Face model with eager attention, and its tokenizer."""

    def __init__(self, directory: Path) -> None:
        self.model: Any = cast("Any", AutoModelForCausalLM).from_pretrained(directory, attn_implementation="eager")
        self.tokenizer: Any = cast("Any", AutoTokenizer).from_pretrained(directory)

    @torch.no_grad()
    def attentions(self, ids: torch.Tensor, mask: torch.Tensor | None = None) -> Any:
        return self.model(ids, attention_mask=mask, output_attentions=True).attentions

    def generated(self, ids: torch.Tensor, mask: torch.Tensor, n: int) -> Any:
        return self.model.generate(
            ids,
            attention_mask=mask,
            max_new_tokens=n,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=2,
            output_attentions=True,
            return_dict_in_generate=True,
        )


@pytest.fixture(scope="module")
def plain(checkpoint: Any) -> Any:
    opened: dict[str, Plain] = {}
    return lambda name: opened.setdefault(name, Plain(checkpoint(name)))


def check(actual: Any, expected: Any, rows: slice = slice(None)) -> None:
    for kind in KINDS:
        torch.testing.assert_close(getattr(actual, kind), getattr(expected, kind)[rows], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_pass_over_each_prompt_and_response(name: str, plain: Any, load_model: Any, samples: Any) -> None:
    model, hf = load_model(name, "bridge"), plain(name)
    expected = fl.contextual_scores(model, samples, responses=RESPONSES)
    documents = fl.document_scores(model, samples, max_new_tokens=1)
    assert documents.gold == tuple(sample.gold_index for sample in samples)
    for i, (sample, response) in enumerate(zip(samples, RESPONSES, strict=True)):
        prompt = model.encode(sample.prompt())
        ids = torch.cat((prompt.tokens, model.encoder.encode_response(prompt, response)))[None]
        attentions = hf.attentions(ids)
        given: dict[str, Any] = {"samples": [sample], "responses": [response], "input_ids": ids}
        scores = fl.scores_from_attentions(attentions, prompt, **given)
        check(scores, expected, slice(i, i + 1))
        assert (scores.sample_ids, scores.responses) == ((sample.id,), (response,))
        assert scores.correct == expected.correct[i : i + 1]
        by_document = fl.document_scores_from_attentions(attentions, prompt, **given)
        assert by_document.gold == (sample.gold_index,)
        relevant = by_document.scores[0][..., sample.gold_index]
        torch.testing.assert_close(relevant, expected.relevant[i], atol=TOLERANCE, rtol=0)
        others = by_document.scores[0].sum(dim=-1) - relevant
        torch.testing.assert_close(others, expected.irrelevant[i], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("side", ["left", "right"])
def test_one_pass_over_a_padded_batch(side: str, plain: Any, load_model: Any, samples: Any) -> None:
    model, hf = load_model("llama", "bridge"), plain("llama")
    prompts = [model.encode(sample.prompt()) for sample in samples]
    responses = [model.encoder.encode_response(*pair) for pair in zip(prompts, RESPONSES, strict=True)]
    rows = [torch.cat((prompt.tokens, response)) for prompt, response in zip(prompts, responses, strict=True)]
    width = max(map(len, rows))
    assert min(map(len, rows)) < width
    ids, mask = torch.full((len(rows), width), 2), torch.zeros(len(rows), width, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(width - len(row), width) if side == "left" else slice(0, len(row))
        ids[i, place], mask[i, place] = row, 1
    attentions = hf.attentions(ids, mask)
    scores = fl.scores_from_attentions(attentions, prompts, attention_mask=mask, input_ids=ids)
    check(scores, fl.contextual_scores(model, samples, responses=RESPONSES))
    assert scores.sample_ids == ("prompt 0", "prompt 1", "prompt 2", "prompt 3")


@pytest.mark.parametrize("name", FAMILIES)
def test_generation_of_a_padded_batch(name: str, plain: Any, load_model: Any, samples: Any) -> None:
    """Generation computes no row of its last token, so it makes one token more than the scored responses have."""
    loaded, hf, n = load_model(name, "bridge"), plain(name), 5
    model = fl.FocusModel(loaded.hooked, loaded.tokenizer, stop_strings=(), stop_tokens=())
    prompts = [model.encode(sample.prompt()) for sample in samples]
    batch = model.batch(prompts)
    done = hf.generated(batch.tokens(2), batch.mask(), n + 1)
    expected = fl.contextual_scores(model, samples, max_new_tokens=n)
    check(fl.scores_from_attentions(done.attentions, prompts), expected)
    lengths = [1, 2, 3, n]
    shorter = [
        fl.contextual_scores(model, [sample], max_new_tokens=length).relevant
        for sample, length in zip(samples, lengths, strict=True)
    ]
    scores = fl.scores_from_attentions(
        done.attentions, prompts, attention_mask=batch.mask(), input_ids=done.sequences, response_lengths=lengths
    )
    torch.testing.assert_close(scores.relevant, torch.cat(shorter), atol=TOLERANCE, rtol=0)
    assert (scores.relevant - expected.relevant)[:3].abs().max() > 1e-3
    documents = fl.document_scores(model, samples, max_new_tokens=n)
    by_document = fl.document_scores_from_attentions(done.attentions, prompts)
    for mine, theirs in zip(by_document.scores, documents.scores, strict=True):
        torch.testing.assert_close(mine, theirs, atol=TOLERANCE, rtol=0)


def test_texts_with_a_tokenizer_and_its_chat_template(plain: Any, load_model: Any, samples: Any) -> None:
    loaded, hf = load_model("qwen2", "bridge"), plain("qwen2")
    model = fl.FocusModel(loaded.hooked, loaded.tokenizer, stop_strings=(), stop_tokens=())
    assert model.encoder.chat
    messages = [{"role": "user", "content": str(samples[0].prompt())}]
    ids = hf.tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)[
        "input_ids"
    ]
    done = hf.generated(ids, torch.ones_like(ids), 4)
    text = samples[0].prompt()
    scores = fl.scores_from_attentions(
        done.attentions, text, tokenizer=hf.tokenizer, chat=True, input_ids=done.sequences
    )
    check(scores, fl.contextual_scores(model, samples[:1], max_new_tokens=3))
    with pytest.raises(ValueError, match=r"prompt 0 has .* tokens, and the model was given"):
        fl.scores_from_attentions(done.attentions, text, tokenizer=hf.tokenizer)


def test_samples_without_a_gold_document(plain: Any, load_model: Any, samples: Any) -> None:
    model, hf = load_model("llama", "bridge"), plain("llama")
    first = samples[0]
    unknown = fl.MultiDocSample(first.question, first.answers, first.documents, None)
    prompt = model.encode(unknown.prompt())
    done = hf.generated(prompt.tokens[None], torch.ones(1, len(prompt.tokens), dtype=torch.long), 3)
    scores = fl.scores_from_attentions(done.attentions, prompt)
    assert scores.relevant.isnan().all()
    assert not scores.irrelevant.isnan().any()
    assert fl.document_scores_from_attentions(done.attentions, prompt).gold == (None,)
