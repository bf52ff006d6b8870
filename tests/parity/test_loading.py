"""A user's own model objects, half precision, and sliding windows give the same numbers as the reference."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from transformers import AutoTokenizer

import focuslens as fl
from focuslens import FocusModel
from tests.support.reference import (
    Edits,
    ReferenceModel,
    add_to_rows,
    document_ranges,
    gap,
    prompt_text,
    split_softmax_rows,
    tokens_of_ranges,
)
from tests.support.versions import needs_hooked

HEADS = [(0, 1), (1, 2), (2, 0)]


def user_bridge(directory: Any) -> Any:
    from transformer_lens.model_bridge import TransformerBridge

    return TransformerBridge.boot_transformers(str(directory), device="cpu", dtype=torch.float32)


def user_hooked(hf: ReferenceModel, *, process: bool = False) -> Any:
    """A HookedTransformer that a user would build with TransformerLens's configuration and weight conversion."""
    from transformer_lens import HookedTransformer, HookedTransformerConfig
    from transformer_lens.pretrained.weight_conversions.llama import convert_llama_weights
    from transformer_lens.pretrained.weight_conversions.qwen2 import convert_qwen2_weights

    config, qwen = hf.eager.config, hf.eager.config.model_type == "qwen2"
    cfg = HookedTransformerConfig(
        n_layers=3, d_model=64, n_ctx=1024, d_head=16, n_heads=4, n_key_value_heads=2, d_mlp=config.intermediate_size,
        d_vocab=config.vocab_size, act_fn="silu", eps=config.rms_norm_eps, normalization_type="RMS", final_rms=True,
        gated_mlp=True, positional_embedding_type="rotary", rotary_dim=16, rotary_adjacent_pairs=False,
        original_architecture=config.architectures[0], model_name="mine", device="cpu",
    )  # fmt: skip
    hooked = HookedTransformer(cfg, tokenizer=copy.deepcopy(hf.tokenizer))
    state = (convert_qwen2_weights if qwen else convert_llama_weights)(hf.eager, cfg)
    hooked.load_and_process_state_dict(
        state, fold_ln=process, center_writing_weights=False, center_unembed=process, fold_value_biases=process
    )
    return hooked.eval()


def tokenizer_state(tokenizer: Any) -> tuple[Any, ...]:
    return (
        tokenizer("a text").input_ids, tokenizer.padding_side, tokenizer.pad_token, tokenizer.bos_token,
        tokenizer.eos_token, len(tokenizer), tokenizer.chat_template, str(tokenizer.special_tokens_map),
    )  # fmt: skip


@pytest.mark.parametrize("kind", [pytest.param("hooked", marks=needs_hooked), "bridge"])
@pytest.mark.parametrize(
    ("name", "tokenizer"),
    [("llama", "the model's"), ("llama_chat", "the model's"), ("qwen2", "the model's"), ("qwen2", "given")],
)
def test_a_users_own_model(name, kind, tokenizer, checkpoint, load_model, reference, samples):
    hf = reference(name)
    mine = user_hooked(hf) if kind == "hooked" else user_bridge(checkpoint(name))
    original: Any = AutoTokenizer.from_pretrained(checkpoint(name))
    before = tokenizer_state(original), tokenizer_state(mine.tokenizer), copy.deepcopy(vars(mine.cfg))
    model = FocusModel(mine, original) if tokenizer == "given" else FocusModel(mine)
    assert model.hooked is mine
    loaded = load_model(name, kind)
    split = fl.SplitSoftmax(HEADS, 0.1)
    samples = samples[2:]
    prompts = [sample.prompt("long") for sample in samples]
    for prompt, sample in zip(prompts, samples, strict=True):
        assert model.encode(prompt).tokens.tolist() == hf.ids(prompt_text(sample, "long")).tolist()
    assert gap(model.logits(prompts[0]), hf.logits(hf.ids(prompt_text(samples[0], "long")))) < 1e-3
    # The operations and their order are the same, but rounding of matrix products depends on memory alignment.
    assert gap(model.logits(prompts[0], [split]), loaded.logits(prompts[0], [split])) < 1e-4
    assert [one.text for one in model.generate(prompts, [split], max_new_tokens=4)] == [
        one.text for one in loaded.generate(prompts, [split], max_new_tokens=4)
    ]
    scores = [fl.contextual_scores(one, samples, max_new_tokens=3, batch_tokens=600) for one in (model, loaded)]
    assert gap(scores[0].relevant, scores[1].relevant) < 1e-6
    assert (tokenizer_state(original), tokenizer_state(mine.tokenizer), vars(mine.cfg)) == before


@pytest.mark.parametrize("kind", [pytest.param("hooked", marks=needs_hooked), "bridge"])
def test_a_users_own_model_with_processed_weights(kind, checkpoint, reference, samples):
    """A model with folded layer norms and centred weights gives the same log-probabilities and responses.

    Processing shifts all logits of a row by a constant.
    """
    hf, sample = reference("llama"), samples[2]
    if kind == "hooked":
        mine = user_hooked(hf, process=True)
    else:
        mine = user_bridge(checkpoint("llama"))
        mine.enable_compatibility_mode(disable_warnings=True)
    model = FocusModel(mine, hf.tokenizer)
    text = prompt_text(sample, "long")
    ids = hf.ids(text)
    span = tokens_of_ranges(hf.offsets(text), document_ranges(sample, text)[sample.gold_index])
    vectors = 2 * torch.randn(len(HEADS), 16, generator=torch.Generator().manual_seed(1))
    interventions = [
        fl.FocusSteering(fl.FocusDirections(HEADS, vectors), 1.0),
        fl.SplitSoftmax(HEADS, 0.1),
    ]
    edits = Edits(
        query=add_to_rows(dict(zip(HEADS, vectors, strict=True)), 1.0),
        pattern=split_softmax_rows(HEADS, 0.1, span, len(ids) - 1),
    )
    expected, plain = hf.logits(ids, edits).log_softmax(dim=-1), hf.logits(ids).log_softmax(dim=-1)
    assert gap(model.logits(ids).log_softmax(dim=-1), plain) < 1e-3
    assert gap(model.logits(sample.prompt("long"), interventions).log_softmax(dim=-1), expected) < 1e-3
    assert gap(expected, plain) > 0.3
    response = model.generate(sample.prompt("long"), interventions, max_new_tokens=4)
    assert response.tokens.tolist() == hf.generate(ids, 4, edits)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_half_precision(name, backend, load_model, reference, samples):
    """Half-precision logits and scores match Hugging Face's bfloat16 and single precision up to rounding.

    A bfloat16 number is accurate to 2^-9 = 0.2 %, an attention logit of 10 to 0.04, and a contextual score to about 4 %
    of its value. Later layers add to this error. In scores of about 0.5, differences of at most 0.06 and of 0.005 on
    average were measured. The tolerance of logits is the rounding error of Hugging Face's bfloat16 model. Two bfloat16
    implementations round at different places, so they may differ by as much as each differs from single precision.
    """
    model, full = load_model(name, backend, dtype="bfloat16"), load_model(name, backend)
    hf, half = reference(name), reference(name, torch.bfloat16)
    assert model.hooked.cfg.dtype == torch.bfloat16
    assert {p.dtype for p in model.hooked.parameters()} == {torch.bfloat16}
    ids = hf.ids(prompt_text(samples[0], "long"))
    exact = hf.logits(ids)
    logits, theirs = model.logits(samples[0].prompt("long")), half.logits(ids)
    rounding = float((theirs.float() - exact).square().mean().sqrt())
    assert float((logits.float() - exact).square().mean().sqrt()) < 2 * rounding < 0.2
    assert float((logits.float() - theirs.float()).square().mean().sqrt()) < 2 * rounding
    assert rounding > 1e-3, "bfloat16 was not used"
    responses, samples = ["The silver lantern", "queen 42."], samples[2:]
    split = fl.SplitSoftmax(HEADS, 0.2)
    for given in ([], [split]):
        ours, single = (
            fl.contextual_scores(one, samples, responses=responses, interventions=given, batch_tokens=600)
            for one in (model, full)
        )
        for kind in ("relevant", "irrelevant", "irrelevant_max", "sink"):
            assert gap(getattr(ours, kind), getattr(single, kind)) < 0.1
            assert float((getattr(ours, kind) - getattr(single, kind)).abs().mean()) < 0.01
    prompts = [sample.prompt("long") for sample in samples]
    alone = [model.generate(prompt, [split], max_new_tokens=3).tokens.tolist() for prompt in prompts]
    assert all(len(tokens) > 0 for tokens in alone)
    # The first token is the argmax of a row that does not depend on the cache.
    first = [int(model.logits(prompt, [split])[-1].argmax()) for prompt in prompts]
    assert [tokens[0] for tokens in alone] == first


def test_a_window_shorter_than_the_prompt(backend, load_model, reference, samples):
    """Mistral with a window of 24 keys matches Hugging Face with and without a cache, alone and in a batch.

    The responses are longer than the window.
    """
    model, hf = load_model("mistral_window", backend), reference("mistral_window")
    ids = [hf.ids(prompt_text(sample, "long")) for sample in samples]
    expected = [hf.generate(one, 30) for one in ids]
    prompts = [sample.prompt("long") for sample in samples]
    # At the end of the response, no prompt token is inside the window.
    assert [one.tokens.tolist() for one in model.generate(prompts, max_new_tokens=30)] == expected
    whole = torch.cat((ids[0], torch.tensor(expected[0])))
    assert gap(model.logits(whole), hf.logits(whole)) < 1e-3
    pattern = hf.patterns(whole)
    assert pattern[:, :, -1, : len(whole) - 24].sum() == 0
    assert pattern[:, :, -1, len(whole) - 24].min() > 0


def test_a_context_shorter_than_the_checkpoints(checkpoint, load_model, backend, samples):
    prompt, room = samples[1].prompt("long"), 6
    n_ctx = len(load_model("llama", backend).encode(prompt).tokens) + room
    model = FocusModel.from_pretrained(str(checkpoint("llama")), backend=backend, device="cpu", n_ctx=n_ctx)
    response = model.generate(prompt, max_new_tokens=50)
    assert len(response.tokens) == room
    assert not response.finished
    with pytest.raises(ValueError, match=str(n_ctx)):
        model.logits([5] * (n_ctx + 1))
