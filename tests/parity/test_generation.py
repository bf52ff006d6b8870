"""All ways to run an intervention give the same response.

The ways are: with and without a cache, alone and in a batch, through FocusModel and through TransformerLens alone.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import pytest
import torch
from torch import Tensor

import focuslens as fl
from focuslens import FocusModel
from tests.support.own_cache import BRIDGE_IGNORES_CACHE, require_own_cache
from tests.support.reference import (
    Edits,
    add_to_rows,
    document_ranges,
    gap,
    prompt_text,
    split_softmax_rows,
    tokens_of_ranges,
)

if TYPE_CHECKING:
    from focuslens import Intervention, MultiDocSample

NEW = 4
"""Number of response tokens."""

TOLERANCE = 2e-4
"""Tolerance between logits of one model run in one pass, in several passes over a cache, or in a padded batch.

Matrix products of different shapes round differently, by about 1e-6 for logits of 2. The error grows over three layers
and through a softmax whose logits reach 10.
"""

HEADS = [(0, 0), (0, 3), (1, 1), (1, 2), (2, 0), (2, 3)]
RANGE = (34, 56)
"""Token positions inside the documents of every prompt in this module."""


def directions(model: FocusModel, site: str) -> fl.FocusDirections:
    generator = torch.Generator().manual_seed(4)
    query, key = (2 * torch.randn(len(HEADS), model.shape.d_head, generator=generator) for _ in range(2))
    return fl.FocusDirections(HEADS, query, key if site == "projection" else None, site=site)  # type: ignore[arg-type]


def steering(site: str, positions: str) -> Callable[[FocusModel], list[Intervention]]:
    return lambda model: [fl.FocusSteering(directions(model, site), 0.8, positions=positions)]  # type: ignore[arg-type]


def composition(model: FocusModel) -> list[Intervention]:
    """Three interventions on overlapping heads, each at a different hook point."""
    return [
        fl.SplitSoftmax(HEADS[:4], 0.2),
        fl.FocusSteering(directions(model, "rotary"), 0.8, heads=HEADS[1:5], positions="response"),
        fl.HeadAblation(HEADS[4:], "zero"),
    ]


def mean(model: FocusModel) -> list[Intervention]:
    vectors = torch.randn(len(HEADS), model.shape.d_head, generator=torch.Generator().manual_seed(9))
    return [fl.HeadAblation(HEADS, "mean", mean=vectors)]


INTERVENTIONS: dict[str, Callable[[FocusModel], list[Intervention]]] = {
    "split-softmax on a part": lambda model: [fl.SplitSoftmax(HEADS, 0.1)],
    "split-softmax on a range": lambda model: [fl.SplitSoftmax(HEADS, 0.1, span=RANGE)],
    "rotary, all rows": steering("rotary", "all"),
    "rotary, response": steering("rotary", "response"),
    "projection, all rows": steering("projection", "all"),
    "projection, response": steering("projection", "response"),
    "zero": lambda model: [fl.HeadAblation(HEADS)],
    "zero, response": lambda model: [fl.HeadAblation(HEADS, positions="response")],
    "mean": mean,
    "knockout": lambda model: [fl.HeadAblation(HEADS, "knockout", span="irrelevant")],
    "knockout, all rows": lambda model: [fl.HeadAblation(HEADS, "knockout", span=RANGE, positions="all")],
    "composition": composition,
}
EVERY = pytest.mark.parametrize("kind", list(INTERVENTIONS))


@pytest.fixture(scope="session")
def pair(samples) -> list[MultiDocSample]:
    """Two samples of few documents whose prompts have unequal lengths."""
    return [
        fl.MultiDocSample(one.question, one.answers, one.documents[: 2 + i], gold_index=i, question_id=one.question_id)
        for i, one in enumerate(samples[:2])
    ]


def greedy(step: Callable[[Tensor], Tensor], tokens: Tensor) -> list[int]:
    """Greedy tokens without a cache. ``step`` maps all tokens so far to the logits of the last token."""
    for _ in range(NEW):
        tokens = torch.cat((tokens, step(tokens).argmax().reshape(1)))
    return tokens[-NEW:].tolist()


def is_greedy(step: Callable[[Tensor], Tensor], tokens: Tensor, response: list[int]) -> bool:
    """Whether a response equals the result of :func:`greedy`, checked in one forward pass over prompt and response."""
    logits = step(torch.cat((tokens, torch.tensor(response[:-1]))))
    return logits[-len(response) :].argmax(dim=-1).tolist() == response


def own_generation(hooked: Any, tokens: Tensor) -> list[int]:
    """Greedy tokens of TransformerLens's own generation, with its cache."""
    out = hooked.generate(
        tokens[None], max_new_tokens=NEW, do_sample=False, use_past_kv_cache=True, stop_at_eos=False,
        verbose=False, return_type="tokens",
    )  # fmt: skip
    return out[0, len(tokens) :].tolist()


def check_every_way(model: FocusModel, interventions: list[Intervention], pair: list[MultiDocSample]) -> None:
    # Without stop tokens, all ways generate the same number of tokens.
    model = FocusModel(model.hooked, model.tokenizer, stop_strings=(), stop_tokens=())
    prompts = [sample.prompt("long") for sample in pair]
    ids = [model.encode(prompt).tokens for prompt in prompts]
    assert len(ids[0]) != len(ids[1])
    hooks = [[hook for one in interventions for hook in one.hooks(model, prompt)] for prompt in prompts]
    # With a cache: each prompt alone, and both in a batch of unequal lengths.
    cached = [model.generate(prompt, interventions, max_new_tokens=NEW).tokens.tolist() for prompt in prompts]
    batched = model.generate(prompts, interventions, max_new_tokens=NEW)
    assert [one.tokens.tolist() for one in batched] == cached
    # Without a cache: one pass per token over all tokens so far, and one pass over the whole response.
    assert greedy(lambda t: model.logits(t, interventions, prompt=prompts[0])[-1], ids[0]) == cached[0]
    assert is_greedy(lambda t: model.logits(t, interventions, prompt=prompts[1]), ids[1], cached[1])
    # With TransformerLens alone, without a cache.
    plain: Any = model.hooked
    assert greedy(lambda t: plain.run_with_hooks(t[None], fwd_hooks=hooks[1])[0, -1], ids[1]) == cached[1]
    assert is_greedy(lambda t: plain.run_with_hooks(t[None], fwd_hooks=hooks[0])[0], ids[0], cached[0])
    # The test shows nothing unless the intervention changes a response.
    assert not all(is_greedy(model.logits, one, response) for one, response in zip(ids, cached, strict=True))


def check_own_generation(model: FocusModel, interventions: list[Intervention], sample: MultiDocSample) -> None:
    """Hooks act alike in FocusLens's generation and, inside a ``hooks()`` context, in TransformerLens's own."""
    model = FocusModel(model.hooked, model.tokenizer, stop_strings=(), stop_tokens=())
    prompt = sample.prompt("long")
    expected = model.generate(prompt, interventions, max_new_tokens=NEW).tokens.tolist()
    with model.hooked.hooks(fwd_hooks=[hook for one in interventions for hook in one.hooks(model, prompt)]):
        assert own_generation(model.hooked, model.encode(prompt).tokens) == expected


@EVERY
def test_llama(kind, backend, load_model, pair):
    model = load_model("llama", backend)
    check_every_way(model, INTERVENTIONS[kind](model), pair)


@EVERY
def test_own_generation_of_llama(kind, backend, load_model, pair):
    require_own_cache(backend)
    model = load_model("llama", backend)
    check_own_generation(model, INTERVENTIONS[kind](model), pair[0])


IN_OTHER_FAMILIES = pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("qwen3", "composition"),
        ("qwen3", "projection, all rows"),
        ("qwen3", "mean"),
        ("qwen2", "composition"),
        ("qwen2", "knockout, all rows"),
        ("mistral", "split-softmax on a part"),
        ("mistral", "rotary, response"),
        ("mistral_window", "projection, response"),
    ],
)


@IN_OTHER_FAMILIES
def test_other_families(name, kind, backend, load_model, pair):
    """All ways agree in other families, some of them with query and key norms (Qwen3) or a short window (Mistral).

    Edits of parts of the prompt under a window are tested below, because not every cache supports them.
    """
    model = load_model(name, backend)
    check_every_way(model, INTERVENTIONS[kind](model), pair)


@IN_OTHER_FAMILIES
def test_own_generation_of_other_families(name, kind, backend, load_model, pair):
    require_own_cache(backend)
    model = load_model(name, backend)
    check_own_generation(model, INTERVENTIONS[kind](model), pair[0])


def test_own_generation_reads_its_cache_unless_its_name_is_unknown(load_model, pair):
    """The reason for the tests that are skipped is the one that is given, and it still holds."""
    model = load_model("llama", "bridge")
    tokens = model.encode(pair[0].prompt("long")).tokens
    assert is_greedy(model.logits, tokens, own_generation(model.hooked, tokens)) is not BRIDGE_IGNORES_CACHE


WINDOWED: dict[str, Callable[[FocusModel], list[Intervention]]] = {
    "split-softmax": lambda model: [fl.SplitSoftmax(HEADS, 0.1, span="question")],
    "knockout": lambda model: [fl.HeadAblation(HEADS, "knockout", span="question")],
    "composition": lambda model: [fl.SplitSoftmax(HEADS[:4], 0.2, span="question"), *composition(model)[1:]],
}


@pytest.mark.parametrize("kind", list(WINDOWED))
def test_parts_of_the_prompt_inside_a_window(kind, backend, load_model, pair):
    """Edits of the question, which lies inside the window of 24 keys, act with and without FocusLens's cache."""
    model = load_model("mistral_window", backend)
    model = FocusModel(model.hooked, model.tokenizer, stop_strings=(), stop_tokens=())
    interventions = WINDOWED[kind](model)
    prompts = [sample.prompt("long") for sample in pair]
    responses = [response.tokens.tolist() for response in model.generate(prompts, interventions, max_new_tokens=NEW)]
    for prompt, response in zip(prompts, responses, strict=True):
        ids = model.encode(prompt).tokens
        assert is_greedy(lambda t, p=prompt: model.logits(t, interventions, prompt=p), ids, response)
        hooks = [hook for one in interventions for hook in one.hooks(model, prompt)]
        assert greedy(lambda t, h=hooks: model.hooked.run_with_hooks(t[None], fwd_hooks=h)[0, -1], ids) == response
        assert not is_greedy(model.logits, ids, response)


@pytest.mark.parametrize("kind", list(WINDOWED))
def test_a_cache_that_forgets_keys_is_served_or_refused(kind, backend, load_model, pair):
    """With a cache that drops keys, an edit of a part of the prompt acts on exactly that part or raises an error.

    With a sliding window, the bridge's cache in a user's own generation drops keys outside the window. Columns of the
    pattern are then not absolute positions.
    """
    model = load_model("mistral_window", backend)
    model = FocusModel(model.hooked, model.tokenizer, stop_strings=(), stop_tokens=())
    prompt = pair[0].prompt("long")
    ids, interventions = model.encode(prompt).tokens, WINDOWED[kind](model)
    expected = model.generate(prompt, interventions, max_new_tokens=NEW).tokens.tolist()
    assert expected != model.generate(prompt, max_new_tokens=NEW).tokens.tolist()
    try:
        with model.hooked.hooks(fwd_hooks=[hook for one in interventions for hook in one.hooks(model, prompt)]):
            found = own_generation(model.hooked, ids)
    except ValueError:
        return
    assert found == expected


@pytest.mark.parametrize("kind", ["split-softmax on a part", "projection, response", "composition"])
def test_plain_hooks_on_a_padded_batch(kind, backend, load_model, pair):
    """Hooks from ``hooks(model, prompts)`` act on the prompts as one left-padded batch with an attention mask."""
    model = load_model("llama", backend)
    interventions = INTERVENTIONS[kind](model)
    prompts = [sample.prompt("long") for sample in pair]
    ids = [model.encode(prompt).tokens for prompt in prompts]
    width = max(map(len, ids))
    padded = torch.stack([torch.cat((torch.full((width - len(one),), 2), one)) for one in ids])
    mask = torch.stack([(torch.arange(width) >= width - len(one)).long() for one in ids])
    hooks = [hook for one in interventions for hook in one.hooks(model, prompts)]
    logits = model.hooked.run_with_hooks(padded, fwd_hooks=hooks, attention_mask=mask)
    for row, prompt in zip(logits, prompts, strict=True):
        alone = model.logits(prompt, interventions)[-1]
        assert gap(row[-1], alone) < TOLERANCE
        assert gap(model.logits(prompt)[-1], alone) > 0.1


@pytest.mark.parametrize(
    "kind",
    ["split-softmax on a part", "rotary, response", "projection, all rows", "projection, response", "mean", "knockout"],
)
def test_logits_of_passes_over_a_cache(kind, backend, load_model, pair):
    """All logits of two passes over a batch's cache equal those of one pass per sequence, not only the argmax."""
    model = load_model("llama", backend)
    interventions = INTERVENTIONS[kind](model)
    prompts = [sample.prompt("long") for sample in pair]
    response = torch.tensor([[70, 300, 301, 90, 4], [5, 90, 91, 260, 301]])
    prefix = model.prefill(prompts, interventions)
    first, longer = model.extend(prefix, response[:, :2], interventions)
    second, _ = model.extend(longer, response[:, 2:], interventions)
    for i, prompt in enumerate(prompts):
        ids = model.encode(prompt).tokens
        everything = torch.cat((ids, response[i]))
        alone = model.logits(everything, interventions, prompt=prompt)[len(ids) - 1 :]
        assert prefix.logits is not None
        assert gap(prefix.logits[i], alone[0]) < TOLERANCE
        assert gap(torch.cat((first[i], second[i])), alone[1:]) < TOLERANCE
        hooks = [hook for one in interventions for hook in one.hooks(model, prompt)]
        hooked = model.hooked.run_with_hooks(everything[None], fwd_hooks=hooks)[0]
        assert gap(hooked[len(ids) - 1 :], alone) < TOLERANCE
        assert gap(model.logits(everything)[len(ids) - 1 :], alone) > 0.1


@pytest.mark.parametrize("kind", ["split-softmax on a part", "rotary, response", "projection, response"])
def test_one_prefill_serves_many_settings(kind, backend, load_model, pair):
    """A prefill without interventions serves all settings that leave the prompt unchanged.

    The prefill holds back the last token of each prompt.
    """
    model = load_model("llama", backend)
    interventions = INTERVENTIONS[kind](model)
    assert not any(one.changes_prompt for one in interventions)
    prompts = [sample.prompt("long") for sample in pair]
    prefix = model.prefill(prompts, hold_last=True)
    expected = [model.generate(prompt, interventions, max_new_tokens=NEW).tokens.tolist() for prompt in prompts]
    plain = [model.generate(prompt, max_new_tokens=NEW).tokens.tolist() for prompt in prompts]
    assert expected != plain
    for wanted, setting in ((expected, interventions), (plain, []), (expected, interventions)):
        assert [response.tokens.tolist() for response in model.decode(prefix, setting, max_new_tokens=NEW)] == wanted


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_interventions_act_in_the_order_given(name, backend, load_model, reference, pair):
    """Two edits of the same rows do not commute. Each order equals Hugging Face's attention edited in that order."""
    model, hf, sample = load_model(name, backend), reference(name), pair[0]
    text = prompt_text(sample, "long")
    ids = hf.ids(text)
    relevant = tokens_of_ranges(hf.offsets(text), document_ranges(sample, hf.text(text))[0])
    query = directions(model, "rotary").query
    steering = fl.FocusSteering(directions(model, "rotary"), 0.8)
    one, other = fl.SplitSoftmax(HEADS, 0.1), fl.SplitSoftmax(HEADS, 3.0, span=RANGE)
    by_hand = {
        one: split_softmax_rows(HEADS, 0.1, relevant, len(ids) - 1),
        other: split_softmax_rows(HEADS, 3.0, range(*RANGE), len(ids) - 1),
    }
    steered = add_to_rows(dict(zip(HEADS, query, strict=True)), 0.8)
    seen: list[Tensor] = []
    for first, second in ((one, other), (other, one)):

        def both(layer: int, pattern: Tensor, start: int, order: tuple[Any, Any] = (first, second)) -> Tensor:
            return by_hand[order[1]](layer, by_hand[order[0]](layer, pattern, start), start)

        expected = hf.logits(ids, Edits(query=steered, pattern=both))
        # Wherever steering is in the list, it acts before the softmax.
        for interventions in ([first, second, steering], [steering, first, second]):
            # The tolerance covers the rotary tables of HookedTransformer; see conftest.
            assert gap(model.logits(sample.prompt("long"), interventions), expected) < 1e-3
        seen.append(expected[-1])
    assert gap(*seen) > 0.05


def test_the_later_of_two_ablations_stands(backend, load_model, pair):
    model = load_model("llama", backend)
    prompt = pair[0].prompt("long")
    (constant,) = mean(model)
    zero = fl.HeadAblation(HEADS)
    for order, last in (([zero, constant], constant), ([constant, zero], zero)):
        assert gap(model.logits(prompt, order), model.logits(prompt, [last])) < 1e-6
    assert gap(model.logits(prompt, [zero]), model.logits(prompt, [constant])) > 0.1
