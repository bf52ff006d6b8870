"""Prefixes in place of prompts: the number of rows that are run, and prefixes that are refused."""

from __future__ import annotations

import copy
from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.model.prefilled import prefilled, prompt_of

HEADS = [(2, 3), (0, 1), (2, 0)]


def steering(model: fl.FocusModel) -> fl.FocusSteering:
    query = torch.randn(1, model.shape.d_head, generator=torch.Generator().manual_seed(3))
    return fl.FocusSteering(fl.FocusDirections([fl.Head(1, 1)], query), 1.0)


@contextmanager
def rows_run(model: fl.FocusModel) -> Generator[list[int]]:
    """Number of rows of each pass inside a block."""
    rows: list[int] = []
    base = getattr(model.hooked, "original_model", None)
    embedding = model.hooked.embed if base is None else base.get_input_embeddings()
    handle = embedding.register_forward_hook(lambda module, arguments, out: rows.append(out.shape[1]))
    try:
        yield rows
    finally:
        handle.remove()


def test_one_run_of_a_prompt_serves_all_functions(tiny_model, samples):
    prompt, settings = samples[0].prompt("long"), dict[str, Any](max_new_tokens=3)
    n = len(tiny_model.encode(prompt).tokens)
    with rows_run(tiny_model) as rows:
        prefix = tiny_model.prefill(prompt)
        assert rows == [n]
        tiny_model.generate(prefix, **settings)
        fl.response_attention(tiny_model, prefix, HEADS, **settings)
        assert set(rows[1:]) == {1}
        made = len(rows)
        window = fl.window_attention(tiny_model, prefix, HEADS, ["question"], margin=0, **settings)
    # The response, and the rows of the window: those in the prompt, its last one and those of the response.
    inside = sum(position < n - 1 for position in window.positions)
    n_response = window.length - n
    assert sum(rows[made:]) == (3 + inside + 1 + n_response)
    assert sum(count >= n // 2 for count in rows) == 1


def test_a_window_of_a_prompt_runs_the_prompt_once(tiny_model, samples):
    prompt = samples[0].prompt("long")
    n = len(tiny_model.encode(prompt).tokens)
    with rows_run(tiny_model) as rows:
        fl.window_attention(tiny_model, prompt, HEADS, ["question"], margin=0, max_new_tokens=3)
    assert sum(count >= n // 2 for count in rows) == 1


def test_a_prefix_needs_what_changes_its_prompt(tiny_model, samples):
    prompt, steered = samples[0].prompt("long"), steering(tiny_model)
    plain, changed = tiny_model.prefill(prompt), tiny_model.prefill(prompt, [steered])
    works: list[Any] = [
        lambda prefix, items: tiny_model.generate(prefix, items, max_new_tokens=2),
        lambda prefix, items: fl.response_attention(tiny_model, prefix, HEADS, interventions=items, max_new_tokens=2),
        lambda prefix, items: fl.window_attention(tiny_model, prefix, HEADS, interventions=items, max_new_tokens=2),
    ]
    for work in works:
        with pytest.raises(ValueError, match="changes the prompt's own rows, and this prefix was run without it"):
            work(plain, [steered])
        with pytest.raises(ValueError, match=r"the prefix was run under FocusSteering.*pass the same intervention"):
            work(changed, [])
        work(changed, [steered])


def test_a_prefix_of_several_prompts_has_no_one_prompt(tiny_model, samples):
    prefix = tiny_model.prefill([sample.prompt("long") for sample in samples[:2]])
    for work in (fl.response_attention, fl.window_attention):
        with pytest.raises(ValueError, match="the prefix has 2 prompts; give one of one prompt"):
            work(tiny_model, prefix, HEADS)


def test_a_prefix_says_what_it_holds_in_one_line(tiny_model, samples):
    prompts = [sample.prompt() for sample in samples[:2]]
    width = max(len(tiny_model.encode(prompt).tokens) for prompt in prompts)
    assert repr(tiny_model.prefill(prompts)) == f"Prefix(2 prompts, {width} columns)"
    held = f"Prefix(2 prompts, {width - 1} columns, without the rows of their last tokens)"
    assert repr(tiny_model.prefill(prompts, hold_last=True)) == held


def test_a_prefix_that_goes_on_is_answered_from_its_end(tiny_model, samples):
    encoded, new = tiny_model.encode(samples[0].prompt("long")), torch.tensor([[5, 6, 7]])
    _, longer = tiny_model.extend(tiny_model.prefill(encoded), new)
    expected = tiny_model.generate(torch.cat((encoded.tokens, new[0])), max_new_tokens=3)
    assert torch.equal(tiny_model.generate(longer, max_new_tokens=3).tokens, expected.tokens)
    with pytest.raises(ValueError, match="goes on for 3 tokens after its prompt"):
        fl.response_attention(tiny_model, longer, HEADS)
    with pytest.raises(ValueError, match="without an intervention that acts on it"):
        tiny_model.generate(longer, [fl.SplitSoftmax([fl.Head(0, 0)], 0.1)])


def test_a_prefix_with_its_last_row_stays_as_it_is(tiny_model, samples):
    prompt = samples[0].prompt("long")
    prefix = tiny_model.prefill(prompt)
    held = prefilled(tiny_model, prefix, [])
    assert (held.mask.shape[1], held.logits) == (prefix.mask.shape[1] - 1, None)
    assert prefix.logits is not None
    assert prefilled(tiny_model, held, []) is held
    assert prompt_of(tiny_model, prefix) is prefix.batch.prompts[0]


@pytest.mark.parametrize("hold_last", [True, False])
def test_a_prefix_of_another_model_of_the_same_shape_is_refused(hold_last, load_model, samples):
    model, other = load_model("llama"), load_model("llama", dtype="float32")
    assert model.hooked is not other.hooked
    prefix = model.prefill(samples[0].prompt(), hold_last=hold_last)
    observer = ("blocks.1.attn.hook_pattern", lambda pattern, hook: None)
    uses = [
        lambda: other.decode(prefix, max_new_tokens=2),
        lambda: other.generate(prefix, max_new_tokens=2),
        lambda: other.extend(prefix, torch.tensor([[5]])),
        lambda: other.completed(prefix),
        lambda: other.rerun(prefix, []),
        lambda: other.read_rows(prefix, 3, [observer]),
        lambda: other.decode(other.copies(prefix, 2), max_new_tokens=2),
        lambda: fl.response_attention(other, prefix, HEADS, max_new_tokens=2),
        lambda: fl.window_attention(other, prefix, HEADS, max_new_tokens=2),
    ]
    for use in uses:
        with pytest.raises(ValueError, match="was run by another model; prefill the prompts with the model that goes"):
            use()


def test_a_prefix_serves_every_focus_model_of_its_transformer_lens_model(tiny_model, samples):
    prefix = tiny_model.prefill(samples[0].prompt())
    beside = fl.FocusModel(tiny_model.hooked, tiny_model.tokenizer, stop_strings=())
    (again,) = beside.decode(prefix, max_new_tokens=3)
    assert again.tokens.tolist() == tiny_model.generate(prefix, max_new_tokens=3).tokens.tolist()
    _, further = beside.extend(prefix, torch.tensor([[5]]))
    assert further.of == prefix.of
    # A copy of a prefix does not contain a copy of the model, which would not be the model that ran it.
    (copied,) = tiny_model.decode(copy.deepcopy(prefix), max_new_tokens=3)
    assert copied.tokens.tolist() == again.tokens.tolist()
