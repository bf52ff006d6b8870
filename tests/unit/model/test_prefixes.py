"""Prefixes: permitted continuations, and calls that are not allowed while a prefix runs."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.interventions import Lanes
from focuslens.prompts.batch import disjoint

HEADS = [fl.Head(0, 1), fl.Head(1, 3), fl.Head(2, 2)]
TOLERANCE = 1e-4


@pytest.fixture
def model(load_model, backend):
    return load_model("llama", backend)


def steering(model, positions: Any = "all"):
    generator = torch.Generator().manual_seed(3)
    query = 4 * torch.randn(len(HEADS), model.shape.d_head, generator=generator)
    return fl.FocusSteering(fl.FocusDirections(HEADS, query), 1.0, positions=positions)


def test_a_prefix_is_not_decoded_under_what_should_have_made_its_first_token(model, samples):
    prefix = model.prefill(samples[0].prompt())
    for one in (fl.SplitSoftmax(HEADS, 0.0), steering(model), steering(model, "response")):
        with pytest.raises(ValueError, match="its last token included, without an intervention that acts on it"):
            model.decode(prefix, [one])
        own = model.prefill(samples[0].prompt(), [one])
        expected = model.generate(samples[0].prompt(), [one], max_new_tokens=5).tokens.tolist()
        assert model.decode(own, [one], max_new_tokens=5)[0].tokens.tolist() == expected


def test_a_prefix_is_not_extended_under_what_should_have_changed_it(model, samples):
    for hold_last in (True, False):
        prefix = model.prefill(samples[0].prompt(), hold_last=hold_last)
        with pytest.raises(ValueError, match="without"):
            model.extend(prefix, torch.tensor([[5]]), [steering(model)])


@pytest.mark.parametrize("interventions", [[], [fl.SplitSoftmax(HEADS, 0.1)]])
def test_a_last_token_held_back_is_run_before_what_follows_it(interventions, model, samples):
    prompts, new = [sample.prompt() for sample in samples[:2]], torch.arange(5, 9).repeat(2, 1)
    held, _ = model.extend(model.prefill(prompts, interventions, hold_last=True), new, interventions)
    whole, _ = model.extend(model.prefill(prompts, interventions), new, interventions)
    torch.testing.assert_close(held, whole, atol=TOLERANCE, rtol=0)


def test_what_follows_rows_of_unequal_length_follows_their_last_tokens(model, samples):
    prompts = [sample.prompt() for sample in samples[:3]]
    new, mask = torch.tensor([[5, 6, 7], [8, 2, 2], [2, 2, 2]]), torch.tensor([[1, 1, 1], [1, 0, 0], [0, 0, 0]])
    _, longer = model.extend(model.prefill(prompts), new, mask=mask)
    for i, response in enumerate(model.decode(longer, max_new_tokens=4)):
        tokens = torch.cat((model.encode(prompts[i]).tokens, new[i][mask[i] == 1]))[None]
        for _ in range(4):
            tokens = torch.cat((tokens, model.hooked(tokens)[:, -1].argmax(-1)[:, None]), dim=1)
        assert response.tokens.tolist() == tokens[0, -4:].tolist()


@pytest.mark.parametrize("shape", [(1, 3), (3, 3), (2, 0)])
def test_tokens_that_do_not_fit_a_prefix_are_refused(shape, model, samples):
    prefix = model.prefill([sample.prompt() for sample in samples[:2]])
    with pytest.raises(ValueError, match=r"for a prefix of 2 prompt\(s\) both must be \(2, new\)"):
        model.extend(prefix, torch.full(shape, 5))


def test_a_hook_that_runs_its_own_model_is_told_so(model, samples):
    other = model.to_tokens(samples[1].prompt())

    def again(x, hook):
        if not running:
            running.append(1)
            model.hooked(other)

    running = []
    with (
        model.hooked.hooks(fwd_hooks=[("blocks.1.hook_resid_pre", again)]),
        pytest.raises(RuntimeError, match="interrupted by another run of the same model"),
    ):
        model.generate(samples[0].prompt(), max_new_tokens=2)
    assert not any("forward" in vars(block.attn) for block in model.hooked.blocks)
    model.generate(samples[0].prompt(), max_new_tokens=2)


def test_threads_take_turns(model, samples):
    jobs = [(sample.prompt(), [fl.SplitSoftmax(HEADS, tau)]) for sample in samples for tau in (0.0, 3.0)]
    alone = [model.generate(prompt, edits, max_new_tokens=4).text for prompt, edits in jobs]
    with ThreadPoolExecutor(4) as pool:
        made = list(pool.map(lambda job: model.generate(*job, max_new_tokens=4).text, jobs))
    assert made == alone
    assert len(set(alone)) > 2


@pytest.mark.parametrize("layer", [-1, 3])
def test_a_layer_that_does_not_exist_is_not_kept(layer, model, samples):
    with pytest.raises(ValueError, match=f"keep names layer {layer}; the model has layers 0 to 2"):
        model.prefill(samples[0].prompt(), keep=[layer])


def test_a_prefix_run_under_something_is_no_base_for_something_else(model, samples):
    one = fl.HeadAblation([(1, 2)])
    with pytest.raises(ValueError, match="only a prefix that was run without interventions"):
        model.rerun(model.prefill(samples[0].prompt(), [one], hold_last=True), [one])


def test_ranges_that_overlap_are_one():
    assert disjoint([(8, 20), (5, 12), (30, 31), (20, 22)]) == [(5, 22), (30, 31)]


def test_a_token_of_two_ranges_of_a_part_counts_once(model, samples):
    encoded = model.encode(samples[0].prompt())
    prompt = fl.EncodedPrompt(encoded.tokens, {"x": ((5, 12), (8, 20))})
    firsts = []
    observer = ("blocks.1.attn.hook_pattern", lambda x, hook: seen.append(x[:, HEADS[1].head, -1].clone()))
    for interventions in ([fl.SplitSoftmax(HEADS, 3.0, span="x")], [Lanes([[fl.SplitSoftmax(HEADS, 3.0, span="x")]])]):
        seen = []
        model.decode(model.prefill(prompt, hold_last=True), interventions, max_new_tokens=1, observers=[observer])
        firsts.append(seen[0])
    alone, lanes = firsts
    torch.testing.assert_close(lanes, alone, atol=1e-6, rtol=0)
    torch.testing.assert_close(lanes.sum(dim=-1), torch.ones(1), atol=1e-5, rtol=0)


def test_a_check_of_hook_points_waits_for_the_interventions_of_another_thread(model, samples):
    """The check removes all hooks for one pass, so it must not run inside another thread's block."""
    prompt, silence = samples[0].prompt(), fl.HeadAblation([(layer, head) for layer in range(3) for head in range(4)])
    other = fl.FocusModel(model.hooked, model.tokenizer, chat=False)  # has checked no hook point yet
    silenced = model.logits(prompt, [silence])
    ran, forward = threading.Event(), other.backend.forward

    def recording(*arguments, **settings):
        ran.set()
        return forward(*arguments, **settings)

    other.backend.forward = recording
    with ThreadPoolExecutor(1) as threads, model.intervened([silence], prompt):
        hooks = threads.submit(fl.SplitSoftmax([(1, 2)], 0.3).hooks, other, prompt)
        assert not ran.wait(0.5)
        torch.testing.assert_close(model.hooked(model.to_tokens(prompt))[0], silenced, atol=1e-4, rtol=0)
    assert len(hooks.result()) == 1
    assert ran.is_set()


def test_a_prefix_that_ends_in_padding_is_refused_where_a_window_would_count_it(load_model, backend, samples):
    model = load_model("mistral_window", backend)
    prefix = model.prefill([samples[0].prompt(), samples[1].prompt()])
    tokens, mask = torch.tensor([[5, 6], [7, 0]]), torch.tensor([[1, 1], [1, 0]])
    _, longer = model.extend(prefix, tokens, mask=mask)
    with pytest.raises(ValueError, match="a row of the prefix ends in padding, and the model has sliding windows"):
        model.extend(longer, tokens)
    with pytest.raises(ValueError, match="a row of the prefix ends in padding"):
        model.decode(longer, max_new_tokens=1)
