"""Steering with ``d_Q(q) = b + U V^T q`` at both sites against Hugging Face models that compute it themselves."""

from __future__ import annotations

from collections.abc import Generator
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from torch import Tensor

import focuslens as fl
from tests.support.reference import Edits, ReferenceModel, Rows, gap, prompt_text

HEADS = [(0, 0), (0, 3), (1, 1), (1, 2), (2, 0), (2, 1)]
ALPHA = 0.7
TOLERANCE = 1e-3
"""Tolerance of logits, as in the tests of constant vectors. 1e-5 is measured on the bridge."""

FAMILIES = pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral_window"])
SITES = pytest.mark.parametrize("site", ["rotary", "projection"])


def directions(d_head: int, site: Any, rank: int = 2, seed: int = 1) -> fl.FocusDirections:
    generator = torch.Generator().manual_seed(seed)
    b = torch.randn(len(HEADS), d_head, generator=generator)
    u, v = (torch.randn(len(HEADS), d_head, rank, generator=generator) / d_head**0.5 for _ in range(2))
    return fl.FocusDirections(HEADS, b, None, site, u=2 * u, v=v)


def vector_of(made: fl.FocusDirections, place: int, q: Tensor) -> Tensor:
    """``b + U V^T q`` of one head for queries ``[... d_head]``, one rank at a time."""
    assert made.u is not None
    assert made.v is not None
    vector = made.query[place].to(q).expand_as(q)
    for r in range(made.u.shape[2]):
        vector = vector + (q * made.v[place, :, r].to(q)).sum(dim=-1, keepdim=True) * made.u[place, :, r].to(q)
    return vector


def added_to_rows(made: fl.FocusDirections, alpha: float, from_row: int = 0) -> Rows:
    """Edit of rotated queries ``[batch head row d_head]``."""

    def add(layer: int, tensor: Tensor, first: int) -> Tensor:
        result = tensor.clone()
        for place, (where, head) in enumerate(HEADS):
            if where == layer:
                rows = tensor[:, head, max(0, from_row - first) :]
                result[:, head, max(0, from_row - first) :] = rows + alpha * vector_of(made, place, rows)
        return result

    return add


@contextmanager
def projected(model: Any, made: fl.FocusDirections, alpha: float, from_row: int = 0) -> Generator[None]:
    """Context in which module hooks on ``q_proj`` add the vectors. The tensor's first row must be that of column 0."""
    d_head, handles = made.d_head, []

    def hook(layer: int) -> Any:
        def add(module: Any, inputs: Any, output: Tensor) -> Tensor:
            result = output.clone()
            for place, (where, head) in enumerate(HEADS):
                if where == layer:
                    columns = slice(head * d_head, (head + 1) * d_head)
                    rows = output[:, from_row:, columns]
                    result[:, from_row:, columns] = rows + alpha * vector_of(made, place, rows)
            return result

        return add

    try:
        for i, layer in enumerate(model.model.layers):
            handles.append(layer.self_attn.q_proj.register_forward_hook(hook(i)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def logits_of(hf: ReferenceModel, tokens: Tensor, made: fl.FocusDirections, alpha: float, from_row: int = 0) -> Tensor:
    if made.site == "rotary":
        return hf.logits(tokens, Edits(query=added_to_rows(made, alpha, from_row)))
    with projected(hf.eager, made, alpha, from_row):
        return hf.logits(tokens)


def generated(hf: ReferenceModel, tokens: Tensor, n: int, made: fl.FocusDirections, alpha: float) -> list[int]:
    """Greedy tokens, each from a pass over the whole text, without the stop token."""
    made_tokens: list[int] = []
    for _ in range(n):
        text = torch.cat((tokens, torch.tensor(made_tokens, dtype=torch.long)))
        token = int(logits_of(hf, text, made, alpha)[-1].argmax())
        if token == 1:
            break
        made_tokens.append(token)
    return made_tokens


@FAMILIES
@SITES
@pytest.mark.parametrize("positions", ["all", "response"])
def test_logits_are_those_of_patched_attention(name, site, positions, backend, load_model, reference, samples):
    model, hf = load_model(name, backend), reference(name)
    made = directions(model.shape.d_head, site)
    prompt = hf.ids(prompt_text(samples[0], "long"))
    tokens = torch.cat((prompt, torch.tensor([70, 300, 5])))
    from_row = 0 if positions == "all" else len(prompt) - 1
    expected = logits_of(hf, tokens, made, ALPHA, from_row)
    steering = fl.FocusSteering(made, ALPHA, positions=positions)
    assert gap(model.logits(tokens, [steering], prompt=samples[0].prompt("long")), expected) < TOLERANCE
    # The part that depends on the query has an effect of its own.
    constant = fl.FocusDirections(HEADS, made.query, None, site)
    alone = model.logits(
        tokens, [fl.FocusSteering(constant, ALPHA, positions=positions)], prompt=samples[0].prompt("long")
    )
    assert gap(alone, expected) > 0.1


@pytest.mark.parametrize("name", ["llama", "qwen3"])
@SITES
def test_responses_of_a_padded_batch_are_those_of_patched_attention(
    name, site, backend, load_model, reference, samples
):
    model, hf = load_model(name, backend), reference(name)
    made = directions(model.shape.d_head, site)
    prompts = [samples[0].prompt("long"), samples[1].prompt("gold")]
    ids = [hf.ids(prompt_text(samples[0], "long")), hf.ids(prompt_text(samples[1], "gold"))]
    assert len(ids[0]) != len(ids[1])
    expected = [generated(hf, tokens, 6, made, ALPHA) for tokens in ids]
    steering = fl.FocusSteering(made, ALPHA)
    responses = model.generate(prompts, [steering], max_new_tokens=6)
    assert [response.tokens.tolist() for response in responses] == expected
    assert all(hf.generate(tokens, 6) != wanted for tokens, wanted in zip(ids, expected, strict=True))


@SITES
def test_lanes_of_several_ranks_are_their_settings_alone(site, backend, load_model, samples):
    model = load_model("llama", backend)
    ranked = [directions(16, site, rank, seed=rank) for rank in (1, 3)]
    constant = fl.FocusDirections(HEADS[:2], ranked[0].query[:2], ranked[0].query[:2], site)
    settings = [
        fl.Setting("none"),
        fl.Setting("constant", (fl.FocusSteering(constant, 0.5),)),
        fl.Setting("one", (fl.FocusSteering(ranked[0], 0.5),)),
        fl.Setting("three", (fl.FocusSteering(ranked[1], -0.5, HEADS[1:4]),)),
        fl.Setting("response", (fl.FocusSteering(ranked[1], 0.9, positions="response"),)),
        fl.Setting("both", (fl.FocusSteering(ranked[0], 0.5), fl.FocusSteering(ranked[1], 0.9, positions="response"))),
    ]
    result = fl.run_sweep(model, samples[:2], settings, max_new_tokens=5)
    for setting in settings:
        alone = [model.generate(s.prompt(), setting.interventions, max_new_tokens=5).text for s in samples[:2]]
        assert list(result[setting.name].responses) == alone, setting.name
    assert len({result[setting.name].responses for setting in settings}) > 3


@SITES
def test_half_precision_adds_the_vector_of_single_precision(site, backend, load_model, samples):
    model = load_model("llama", backend, dtype="bfloat16")
    made = directions(16, site)
    ((name, hook),) = [
        h for h in fl.FocusSteering(made, ALPHA, HEADS[2:4]).hooks(model) if h[0].startswith("blocks.1.attn")
    ]
    assert name == f"blocks.1.attn.hook_{'rot_q' if site == 'rotary' else 'q'}"
    q = torch.randn(2, 3, 4, 16, generator=torch.Generator().manual_seed(0)).bfloat16()
    steered: Any = hook(q, None)
    assert steered.dtype == torch.bfloat16
    for place, (_, head) in ((2, HEADS[2]), (3, HEADS[3])):
        vector = ALPHA * vector_of(made, place, q[:, :, head].double())
        torch.testing.assert_close(steered[:, :, head], q[:, :, head] + vector.bfloat16(), rtol=8e-3, atol=0)
    assert torch.equal(steered[:, :, [0, 3]], q[:, :, [0, 3]])
