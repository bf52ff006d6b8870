"""Families whose attention runs on the engine through the attention interface, against Hugging Face."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.scores.contextual_scores import KINDS
from tests.support.families import (
    FAMILIES,
    HEADS,
    RESPONSES,
    Family,
    counted_layers,
    generation_gap,
    logit_gap,
    open_family,
    score_gap,
    split_gap,
    steering_gap,
)
from tests.support.processor_time import shared_work
from tests.support.reference import gap, scores_of_rows
from tests.support.tiers import first_quick

MIXED = ("gpt-oss", "Phi-3", "Gemma 3", "SmolLM3", "Llama 4")
"""Families that together have sinks, windows, chunks, joined projections and layers without rotary embedding."""

BY_KIND = [*MIXED, *(name for name in FAMILIES if name not in MIXED)]
ALL = pytest.mark.parametrize("name", first_quick(BY_KIND, 5))
Open = Callable[[str], Family]


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Open:
    opened: dict[str, Family] = {}

    def open_once(name: str) -> Family:
        if name not in opened:
            with shared_work():
                opened[name] = open_family(name, tmp_path_factory.mktemp("family"))
        return opened[name]

    return open_once


@ALL
def test_every_layer_runs_on_the_engine(name: str, family: Open) -> None:
    """Otherwise the tests below would compare TransformerLens's own attention with Hugging Face's."""
    model = family(name).model
    assert model.slow_attention is None
    prompt = model.encode(family(name).samples[0].prompt("long"))
    with counted_layers() as rows:
        model.generate(prompt, max_new_tokens=3)
    n, layers = len(prompt.tokens), model.shape.n_layers
    assert rows.count(n - 1) == layers - 1, "the last layer only fills the cache"
    assert rows.count(1) == layers * 3


@ALL
def test_logits_are_hugging_faces(name: str, family: Open) -> None:
    assert logit_gap(family(name)) < 1e-4


@ALL
def test_responses_are_hugging_faces(name: str, family: Open) -> None:
    assert generation_gap(family(name)) == 0


@ALL
def test_scores_are_those_of_eager_patterns(name: str, family: Open) -> None:
    assert score_gap(family(name)) < 1e-4


@ALL
def test_split_softmax_is_that_of_patched_attention(name: str, family: Open) -> None:
    assert split_gap(family(name)) < 1e-3


@ALL
@pytest.mark.parametrize("site", ["rotary", "projection"])
def test_steering_is_that_of_patched_attention(name: str, site: str, family: Open) -> None:
    assert steering_gap(family(name), site) < 1e-3


@ALL
def test_head_kinds(name: str, family: Open) -> None:
    kinds = family(name).model.head_kinds
    assert tuple(map(str, kinds)) == FAMILIES[name]
    prompt = len(family(name).model.encode(family(name).samples[0].prompt("long")).tokens)
    seeing = fl.whole_prompt_heads(HEADS, kinds)
    # A row that cannot see the whole prompt gives its first token no attention.
    patterns = family(name).hf.patterns(family(name).hf.ids("a" * 10 + "b c d " * prompt)[:prompt])
    blind = [bool(patterns[layer, head, -1, 0] == 0) for layer, head in HEADS]
    assert [head in seeing for head in HEADS] == [not unseen for unseen in blind]


@pytest.mark.parametrize("name", first_quick((name for name in BY_KIND if name != "Llama 4"), 4))
def test_hooks_give_the_same_numbers_in_plain_transformer_lens(name: str, family: Open) -> None:
    model, sample = family(name).model, family(name).samples[0]
    prompt = sample.prompt("long")
    directions = fl.FocusDirections(HEADS, torch.ones(4, model.shape.d_head), None, "rotary")
    acting = [fl.SplitSoftmax(HEADS, 0.3)]
    acting += [] if name == "Phi-3" else [fl.FocusSteering(directions, 0.2)]
    hooks = [hook for one in acting for hook in one.hooks(model, prompt)]
    with torch.no_grad():
        plain = model.hooked.run_with_hooks(model.to_tokens(prompt), fwd_hooks=hooks)[0]
    assert gap(model.logits(prompt, acting), plain) < 1e-4
    assert gap(model.logits(prompt), plain) > 0.01


def test_plain_hooks_that_would_do_nothing_are_refused(family: Open) -> None:
    """Llama 4's attention is Hugging Face's own in TransformerLens, whose pattern no hook can edit."""
    model, prompt = family("Llama 4").model, family("Llama 4").samples[0].prompt("long")
    with pytest.raises(ValueError, match="acts in the passes of a FocusModel only"):
        fl.SplitSoftmax(HEADS, 0.3).hooks(model, prompt)


@pytest.mark.parametrize("name", ["Gemma 3", "gpt-oss"])
def test_a_part_of_the_layers_runs_alone(name: str, family: Open) -> None:
    """Reruns of prompts from a layer on, and rows that end at a layer, give the numbers of whole passes."""
    model, sample = family(name).model, family(name).samples[0]
    directions = fl.FocusDirections([(2, 0)], torch.ones(1, model.shape.d_head), None, "rotary")
    steering = fl.FocusSteering(directions, 0.5)
    whole = model.completed(model.prefill(sample.prompt("long"), [steering], hold_last=True), [steering])
    kept = model.prefill(sample.prompt("long"), hold_last=True, keep=[2])
    assert list(kept.residuals) == [2]
    again = model.completed(model.rerun(kept, [steering]), [steering])
    assert whole.logits is not None
    assert again.logits is not None
    assert gap(again.logits, whole.logits) < 1e-5
    read: list[torch.Tensor] = []
    model.read_rows(kept, 20, [("blocks.1.attn.hook_pattern", lambda pattern, hook: read.append(pattern.clone()))])
    rows = family(name).hf.patterns(model.encode(sample.prompt("long")).tokens)[1, :, 20:]
    assert gap(read[-1][0], rows) < 1e-5


@pytest.mark.parametrize("name", ["Qwen3-MoE", "Gemma 3", "OLMo 2"])
def test_hooks_after_norms_fire(name: str, family: Open) -> None:
    """Hook points of TransformerLens after the norms of queries and keys have the same tensors on the engine."""
    model = family(name).model
    tokens = model.encode(family(name).samples[0].prompt("long")).tokens[:11]
    names = ["blocks.1.attn.hook_q_normed", "blocks.1.attn.hook_k_normed", "blocks.1.attn.hook_cos"]

    def noted(run: Callable[[], object]) -> dict[str, torch.Tensor]:
        seen: dict[str, torch.Tensor] = {}
        hooks = [(one, lambda x, hook, one=one: seen.__setitem__(one, x.clone())) for one in names]
        with torch.no_grad(), model.hooked.hooks(fwd_hooks=hooks):
            run()
        return seen

    ours, plain = noted(lambda: model.logits(tokens)), noted(lambda: model.hooked(tokens[None]))
    assert set(ours) == set(plain) == set(names)
    for one in names:
        assert gap(ours[one], plain[one]) < 1e-5


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("GPT-2", "GPT2Attention does not rotate queries and keys"),
        ("GPT-NeoX", "the fused projection of GPTNeoXAttention does not hold queries, keys and values in succession"),
        ("BLOOM", "BloomAttention does not call transformers' attention interface"),
        ("DeepSeek V2", "queries, keys and values of DeepseekV2Attention have the shapes"),
    ],
)
def test_other_attention_is_named(name: str, reason: str, tmp_path, samples) -> None:
    model = open_family(name, tmp_path).model
    assert model.slow_attention is not None
    assert model.slow_attention.startswith(reason)
    assert "attention of TransformerLens: " in repr(model)


@ALL
def test_the_chance_level_is_that_of_even_rows(name: str, family: Open) -> None:
    """A row sees the keys to which Hugging Face's row attends at all: all, a window, or its chunk."""
    model, hf, samples = family(name).model, family(name).hf, family(name).samples
    scores = fl.contextual_scores(model, samples, responses=RESPONSES)
    assert scores.chance is not None
    for sample, text, chance in zip(samples, RESPONSES, scores.chance, strict=True):
        prompt, response = family(name).response(sample, text)
        seen = (hf.patterns(torch.cat((prompt, response)))[:, :, len(prompt) :] > 0).any(dim=1, keepdim=True).double()
        by_hand = scores_of_rows(hf, sample, "long", seen / seen.sum(dim=-1, keepdim=True))
        expected = torch.stack([by_hand[kind][:, 0] for kind in KINDS], dim=-1)
        assert gap(chance, expected) < 1e-6


@ALL
def test_scores_from_given_attentions_count_sinks(name: str, family: Open) -> None:
    model, hf, sample = family(name).model, family(name).hf, family(name).samples[0]
    prompt, response = family(name).response(sample, RESPONSES[0])
    attentions = [pattern[None].float() for pattern in hf.patterns(torch.cat((prompt, response)))]
    given = fl.scores_from_attentions(attentions, model.encode(sample.prompt("long")), samples=[sample])
    scores = fl.contextual_scores(model, [sample], responses=RESPONSES[:1])
    for kind in KINDS:
        assert gap(getattr(given, kind), getattr(scores, kind)) < 1e-5


@pytest.mark.parametrize("name", ["gpt-oss", "Gemma 3"])
@pytest.mark.parametrize("rows", ["question", "last", "response"])
def test_the_gate_of_self_focus_counts_the_sinks_of_heads(name: str, rows: Any, family: Open) -> None:
    """A sink is not a key. Its mass is what a row of Hugging Face's patterns lacks to one."""
    model, hf, sample = family(name).model, family(name).hf, family(name).samples[0]
    heads = [fl.Head(0, 1), fl.Head(1, 0), fl.Head(2, 1)]
    prompt = model.encode(sample.prompt("long"))
    prefix = model.prefill(prompt, hold_last=True)
    (choice,) = fl.SelfFocus(heads, 0.1, rows=rows).choose(model, prefix, 4)
    n, response = len(prompt.tokens), model.generate(prompt, max_new_tokens=4).tokens
    ((start, end),) = prompt.spans["question"]
    read = {"question": slice(start, end), "last": slice(n - 1, n), "response": slice(n, n + len(response))}[rows]
    patterns = hf.patterns(torch.cat((prompt.tokens, response)))
    chosen = torch.stack([patterns[head.layer, head.head, read] for head in heads])
    lacking = 1 - chosen.sum(dim=-1)
    assert (lacking.mean() > 2e-4) == family(name).sinks
    expected = (chosen[..., :2].sum(dim=-1) + lacking).mean()
    assert choice.sink == pytest.approx(float(expected), abs=1e-5)


@pytest.mark.parametrize("name", ["gpt-oss", "Gemma 3"])
def test_steering_to_a_share_of_the_sink_counts_the_sinks_of_heads(name: str, family: Open) -> None:
    """The strength lies on the line between the mass on the sink without steering and the mass at strength 1."""
    model, sample = family(name).model, family(name).samples[0]
    heads = [fl.Head(0, 1), fl.Head(1, 0), fl.Head(2, 1)]
    prompt = model.encode(sample.prompt("long"))
    names = [f"blocks.{layer}.attn.hook_pattern" for layer in range(3)]

    def last_rows(steering: fl.FocusSteering) -> torch.Tensor:
        with model.hooked.hooks(fwd_hooks=steering.hooks(model, prompt)):
            _, cache = model.hooked.run_with_cache(prompt.tokens[None], names_filter=names)
        return torch.stack([cache[names[head.layer]][0, head.head, -1] for head in heads]).double()

    def directions(sign: float) -> fl.FocusDirections:
        noise = torch.randn(len(heads), model.shape.d_head, generator=torch.Generator().manual_seed(7))
        return fl.FocusDirections(heads, 0.5 * sign * noise, None, "rotary")

    def mass(sign: float, alpha: float) -> float:
        rows = last_rows(fl.FocusSteering(directions(sign), alpha, positions="response"))
        return float((rows[:, :2].sum(dim=-1) + 1 - rows.sum(dim=-1)).mean())

    assert (float(1 - last_rows(fl.FocusSteering(directions(1), 0)).sum(dim=-1).mean()) > 2e-4) == family(name).sinks
    sign = min((1.0, -1.0), key=lambda sign: mass(sign, 1))
    before, after = mass(sign, 0), mass(sign, 1)
    assert after < before - 1e-4
    steering = fl.TargetedSteering(directions(sign), 0.75 * before + 0.25 * after, alphas=(0, 1), positions="response")
    (strength,) = steering.strengths(model, model.prefill(prompt, hold_last=True))
    assert strength == pytest.approx(0.25, abs=0.01)
