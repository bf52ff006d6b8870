"""Steering at the rotary site against Hugging Face attention with the vectors added to rotated queries."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import focuslens as fl
from tests.support.paths import SHARED_DATA
from tests.support.reference import Edits, add_to_rows, document_ranges, gap, largest, prompt_text, tokens_of_ranges

HEADS = [(0, 0), (0, 3), (1, 1), (1, 2), (2, 0), (2, 1)]
ALPHA = 0.7
TOLERANCE = 1e-3
"""Tolerance of logits. 1e-5 is measured on the bridge.

``HookedTransformer``'s rotary tables differ by 1e-5 at late positions, which three layers amplify to 1e-4.
"""

FAMILIES = pytest.mark.parametrize("name", ["llama", "llama_rope", "qwen2", "qwen3", "mistral", "mistral_window"])


def random_vectors(d_head: int, seed: int) -> Tensor:
    """One vector per head, with a norm close to that of the rotated queries (about 7)."""
    return 2 * torch.randn(len(HEADS), d_head, generator=torch.Generator().manual_seed(seed))


def by_head(vectors: Tensor) -> dict[tuple[int, int], Tensor]:
    return dict(zip(HEADS, vectors, strict=True))


@FAMILIES
@pytest.mark.parametrize("positions", ["all", "response"])
def test_logits_are_those_of_patched_attention(name, positions, backend, load_model, reference, samples):
    model, hf = load_model(name, backend), reference(name)
    query = random_vectors(model.shape.d_head, 1)
    prompt = hf.ids(prompt_text(samples[0], "long"))
    tokens = torch.cat((prompt, torch.tensor([70, 300, 5])))
    steering = fl.FocusSteering(fl.FocusDirections(HEADS, query), ALPHA, positions=positions)
    from_row = 0 if positions == "all" else len(prompt) - 1
    expected = hf.logits(tokens, Edits(query=add_to_rows(by_head(query), ALPHA, from_row)))
    assert gap(model.logits(tokens, [steering], prompt=samples[0].prompt("long")), expected) < TOLERANCE
    changed = (expected - hf.logits(tokens)).abs().amax(dim=-1)
    assert changed[len(prompt) - 1 :].min() > 0.3
    assert (changed[: len(prompt) - 1].max() < 1e-5) == (positions == "response")


def test_strength_and_heads_are_those_asked_for(backend, load_model, reference, samples):
    model, hf = load_model("llama", backend), reference("llama")
    query = random_vectors(16, 2)
    tokens = hf.ids(prompt_text(samples[1], "long"))
    directions = fl.FocusDirections(HEADS, query)
    plain = hf.logits(tokens)
    for alpha, heads in ((-1.3, HEADS), (0.4, [(2, 1), (0, 3)])):
        chosen = {head: vector for head, vector in by_head(query).items() if head in heads}
        expected = hf.logits(tokens, Edits(query=add_to_rows(chosen, alpha)))
        assert gap(model.logits(tokens, [fl.FocusSteering(directions, alpha, heads=heads)]), expected) < TOLERANCE
        assert gap(expected, plain) > 0.3
    assert gap(model.logits(tokens, [fl.FocusSteering(directions, 0.0)]), plain) < TOLERANCE


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_steered_responses_are_those_of_patched_attention(name, backend, load_model, reference, samples):
    model, hf = load_model(name, backend), reference(name)
    query = random_vectors(model.shape.d_head, 1)
    steering = fl.FocusSteering(fl.FocusDirections(HEADS, query), ALPHA)
    edits = Edits(query=add_to_rows(by_head(query), ALPHA))
    ids = [hf.ids(prompt_text(sample, "long")) for sample in samples[:2]]
    expected = [hf.generate(one, 8, edits) for one in ids]
    responses = model.generate([sample.prompt("long") for sample in samples[:2]], [steering], max_new_tokens=8)
    assert [response.tokens.tolist() for response in responses] == expected
    assert all(hf.generate(one, 8) != tokens for one, tokens in zip(ids, expected, strict=True))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3", "mistral_window"])
def test_key_vectors_change_no_logit(name, backend, load_model, reference, samples):
    """A key vector adds the same ``(q + d_Q) . d_K`` to the scores of all keys, so the softmax does not change.

    This holds even if the constant is in the hundreds. Attention logits shift by the constant over
    ``sqrt(d_head)``, about 10. Single precision rounds each logit by about 1e-6. Double precision shows no error.
    """
    model, hf, exact = load_model(name, backend), reference(name), reference(name, torch.float64)
    query, key = random_vectors(model.shape.d_head, 1), random_vectors(model.shape.d_head, 5)
    tokens = hf.ids(prompt_text(samples[3], "long"))
    with_query = Edits(query=add_to_rows(by_head(query), ALPHA))
    with_both = Edits(query=add_to_rows(by_head(query), ALPHA), key=add_to_rows(by_head(key), ALPHA))
    assert gap(hf.logits(tokens, with_both), hf.logits(tokens, with_query)) < 1e-3
    assert gap(exact.logits(tokens, with_both), exact.logits(tokens, with_query)) < 1e-11
    steering = fl.FocusSteering(fl.FocusDirections(HEADS, query, key), ALPHA)
    assert gap(model.logits(tokens, [steering]), exact.logits(tokens, with_both)) < TOLERANCE
    assert gap(exact.logits(tokens, with_both), exact.logits(tokens)) > 0.3
    # The key vectors are large enough to show an effect: the same vectors added to queries change the logits.
    assert gap(exact.logits(tokens, Edits(query=add_to_rows(by_head(key), ALPHA))), exact.logits(tokens)) > 0.3


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_score_has_no_gradient_to_a_key_vector(name, reference, samples):
    """The contextual score has zero gradient to a key vector.

    The gradient is computed in double precision on Hugging Face's model, with one key vector per query head.
    """
    hf, sample = reference(name, torch.float64), samples[3]
    prompt = prompt_text(sample, "long")
    ids = hf.ids(prompt)
    relevant = tokens_of_ranges(hf.offsets(prompt), document_ranges(sample, prompt)[sample.gold_index or 0])
    d_head = hf.hf.config.head_dim if name == "qwen3" else 16
    query, key = (random_vectors(d_head, seed).double().requires_grad_() for seed in (1, 5))
    edits = Edits(query=add_to_rows(by_head(query), ALPHA), key=add_to_rows(by_head(key), ALPHA))
    hf.state.patterns = {}
    try:
        with hf.edited(edits):
            hf.hf(torch.cat((ids, torch.tensor([70, 300])))[None], use_cache=False)
        patterns = torch.cat([hf.state.patterns[layer] for layer in range(3)])
    finally:
        hf.state.patterns = None
    scores = patterns[:, :, len(ids) :, relevant].sum(dim=-1).mean(dim=-1)
    for i, (layer, head) in enumerate(HEADS):
        to_query, to_key = torch.autograd.grad(scores[layer, head], (query, key), retain_graph=True)
        # Summation over 300 keys in double precision can leave an error of 1e-12 for a score of at most 1.
        assert largest(to_key[i]) < 1e-12
        assert largest(to_query[i]) > 1e-5


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_the_gradient_is_zero_at_the_hook_points_too(name, backend, load_model, samples):
    """The gradient is also zero at TransformerLens's ``hook_rot_q`` and ``hook_rot_k``, per key-value head.

    On the bridge it is zero up to single precision, because the bridge, like Hugging Face, computes its softmax in
    single precision for every model dtype.
    """
    model = load_model(name, backend, dtype="float64")
    encoded = model.encode(samples[3].prompt("long"))
    ((start, end),) = encoded.spans["relevant"]
    generator = torch.Generator().manual_seed(2)
    query = torch.randn(4, model.shape.d_head, generator=generator, dtype=torch.float64).requires_grad_()
    key = torch.randn(2, model.shape.d_head, generator=generator, dtype=torch.float64).requires_grad_()
    score: list[Tensor] = []

    def observe(pattern: Tensor, hook: Any) -> None:
        score.append(pattern[0, :, -1, start:end].sum())

    hooks = [
        ("blocks.1.attn.hook_rot_q", lambda tensor, hook: tensor + query),
        ("blocks.1.attn.hook_rot_k", lambda tensor, hook: tensor + key),
        ("blocks.1.attn.hook_pattern", observe),
    ]
    with torch.enable_grad():
        model.hooked.run_with_hooks(encoded.tokens[None], fwd_hooks=hooks)
    to_query, to_key = torch.autograd.grad(score[0], (query, key))
    assert largest(to_query) > 0.01
    assert largest(to_key) < (1e-12 if backend == "hooked" else 1e-6)


def published_directories() -> list[Path]:
    return sorted(SHARED_DATA.glob("published/head_features/*/direction_relevant"))


@pytest.mark.skipif(not published_directories(), reason="the authors' published files are not here")
@pytest.mark.parametrize("directory", published_directories(), ids=lambda path: path.parent.name)
def test_published_key_vectors_change_no_attention(directory):
    """The authors' key vectors do not change attention.

    On random keys and queries in double precision, rows with ``d_Q`` and ``d_K`` equal rows with ``d_Q`` alone, and the
    gradient to ``d_K`` is zero.
    """
    directions = fl.FocusDirections.from_published(directory)
    assert directions.site == "rotary"
    norms = directions.query.norm(dim=-1)
    generator = torch.Generator().manual_seed(0)
    for place in norms.argsort(descending=True)[:5].tolist():
        layer, head = directions.heads[place]
        # The authors' files are read directly, to check ``from_published`` too.
        d_q, d_k = (
            torch.load(directory / f"head_{part}_directions_{layer}.pth", map_location="cpu")[head].detach().double()
            for part in "qk"
        )
        assert gap(directions.query[place], d_q.float()) == 0
        assert directions.key is not None
        assert gap(directions.key[place], d_k.float()) == 0
        queries = torch.randn(8, len(d_q), generator=generator, dtype=torch.float64)
        keys = torch.randn(400, len(d_q), generator=generator, dtype=torch.float64)

        def rows(q: Tensor, k: Tensor) -> Tensor:
            return (q @ k.T / q.shape[-1] ** 0.5).softmax(dim=-1)

        for alpha in (0.3, 1.0, -1.0):
            both = rows(queries + alpha * d_q, keys + alpha * d_k)
            alone = rows(queries + alpha * d_q, keys)
            assert largest(both - alone) < 1e-13
            assert largest(alone - rows(queries, keys)) > 0.01
            # The key vector is large enough to show an effect: added to queries, it changes rows.
            assert largest(rows(queries + d_k, keys) - rows(queries, keys)) > 1e-4
        # The gradient of a contextual score is taken at the published vectors.
        vectors = [d_q.requires_grad_(), d_k.requires_grad_()]
        score = rows(queries + d_q, keys + d_k)[:, 100:200].sum(dim=-1).mean()
        to_query, to_key = torch.autograd.grad(score, vectors)
        assert largest(to_key) < 1e-14
        assert largest(to_query) > 1e-4
