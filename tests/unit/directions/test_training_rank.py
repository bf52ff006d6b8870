"""Training of ``d_Q(q) = b + U V^T q``: start, gradients, rank 0, and errors."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from focuslens import FocusDirections, FocusModel, Head, MultiDocSample, TrainingConfig, train_focus_directions
from focuslens.directions import training
from focuslens.directions.activations import LayerHeads, capture_rows
from focuslens.directions.objective import direction_losses
from focuslens.interventions.low_rank import LowRank

SITES = pytest.mark.parametrize("site", ["rotary", "projection"])
HEADS = [(2, 3), (0, 1), (2, 0), (2, 2)]
QUICK: dict[str, Any] = {"epochs": 2, "max_new_tokens": 3, "learning_rate": 0.01}


@pytest.fixture
def model(tiny_model: FocusModel) -> FocusModel:
    return FocusModel(tiny_model.hooked, tiny_model.tokenizer, stop_strings=(), stop_tokens=(), name="tiny")


def noise(kind: int, place: tuple[int, int], *size: int) -> Tensor:
    digest = hashlib.sha256(f"0/{kind}/{place[0]}/{place[1]}".encode()).digest()
    return torch.randn(*size, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big")))


@SITES
def test_rank_0_is_the_training_of_constant_vectors_bit_for_bit(
    model: FocusModel, samples: list[MultiDocSample], site: Any
) -> None:
    """The steps of AdamW on constant vectors are written out, with the loss without a product."""
    chosen = [sample for sample in samples if sample.gold_index is not None][:2]
    trained = train_focus_directions(model, chosen, HEADS, site=site, rank=0, **QUICK)
    groups = LayerHeads.group([Head(*head) for head in HEADS], model.shape)
    query = (torch.stack([noise(0, head, 16) for head in HEADS]) * 0.01).requires_grad_()
    key_heads = [(group.layer, head) for group in groups for head in group.key_value_heads]
    key = (torch.stack([noise(1, head, 16) for head in key_heads]) * 0.01).requires_grad_()
    vectors = [query] if site == "rotary" else [query, key]
    optimizer = torch.optim.AdamW(vectors, lr=0.01, weight_decay=0.01)
    rows = [
        capture_rows(
            model,
            model.encode(sample.prompt("long")),
            model.generate(sample.prompt("gold"), max_new_tokens=3).tokens,
            groups,
            site,
        )
        for sample in chosen
    ]
    for epoch in range(2):
        for index in torch.randperm(2, generator=torch.Generator().manual_seed(epoch)).tolist():
            optimizer.zero_grad()
            own_key = None if site == "rotary" else key
            direction_losses(model.backend, query, own_key, groups, rows[index], site).sum().backward()
            optimizer.step()
    assert torch.equal(trained.query, query.detach())
    assert (trained.rank, trained.u, trained.v) == (0, None, None)
    assert trained.provenance["settings"]["rank"] == 0


@SITES
def test_the_first_step_is_that_of_rank_0(model: FocusModel, samples: list[MultiDocSample], site: Any) -> None:
    arguments: dict[str, Any] = {"site": site, "epochs": 1, "max_new_tokens": 3, "learning_rate": 0.02}
    plain, ranked = (
        train_focus_directions(model, samples[:1], HEADS, rank=rank, weight_decay=0.3, **arguments) for rank in (0, 2)
    )
    assert torch.equal(plain.query, ranked.query)
    assert plain.losses is not None
    assert ranked.losses is not None
    assert torch.equal(plain.losses, ranked.losses)
    # V has no gradient while U is zero, and shrinks by its weight decay. U moves by the learning rate.
    assert ranked.u is not None
    assert ranked.v is not None
    for place, head in enumerate(HEADS):
        torch.testing.assert_close(ranked.v[place], noise(2, head, 16, 2) / 4 * (1 - 0.02 * 0.3))
    assert 0 < float(ranked.u.abs().median()) <= 0.02 * 1.001


def turn(x: Tensor) -> Tensor:
    """Rotary embedding of one head [pos d_head] at positions 0, 1, ..., computed with complex numbers."""
    half = x.shape[1] // 2
    angles = torch.outer(torch.arange(len(x)).double(), 10_000.0 ** (-torch.arange(half).double() / half))
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag), dim=1)


def loss_by_hand(q: Tensor, k: Tensor, n: int, span: tuple[int, int], site: str, vectors: list[Tensor]) -> float:
    """The loss ``-S_C`` of one head in float64, from all queries and keys [pos d_head] of the unmodified model."""
    b, u, v = vectors
    q = torch.stack([row + b + u @ (v.T @ row) for row in q])
    if site == "projection":
        q, k = turn(q), turn(k)
    length = len(q)
    logits = (q @ k.T / q.shape[1] ** 0.5).masked_fill(torch.ones(length, length).triu(1).bool(), -torch.inf)
    return -float(logits.softmax(dim=1)[n:, span[0] : span[1]].sum(dim=1).mean())


@SITES
def test_gradients_are_finite_differences_in_double_precision(
    model: FocusModel, samples: list[MultiDocSample], site: Any
) -> None:
    prompt = model.encode(samples[3].prompt("long"))
    response = torch.tensor([70, 300, 5])
    (span,) = prompt.spans["relevant"]
    groups = LayerHeads.group([Head(2, 1), Head(0, 2)], model.shape)
    seen: dict[str, Tensor] = {}
    infix = "rot_" if site == "rotary" else ""
    model.observe(
        torch.cat((prompt.tokens, response)),
        [
            (f"blocks.2.attn.hook_{infix}{x}", lambda a, hook, x=x: seen.update({x: a[0].double().clone()}))
            for x in "qk"
        ],
    )
    generator = torch.Generator().manual_seed(1)
    start = [torch.randn(*size, generator=generator) / 4 for size in ((2, 16), (2, 16, 3), (2, 16, 3))]
    b, u, v = (tensor.clone().requires_grad_() for tensor in start)
    rows = capture_rows(model, prompt, response, groups, site)
    key = torch.zeros(2, 16) if site == "projection" else None
    losses = direction_losses(model.backend, b, key, groups, rows, site, LowRank(u, v))
    gradients = torch.autograd.grad(losses.sum(), (b, u, v))
    exact = [tensor[0].double() for tensor in start]

    def loss(vectors: list[Tensor]) -> float:
        return loss_by_hand(seen["q"][:, 1], seen["k"][:, 0], len(prompt.tokens), span, site, vectors)

    assert float(losses[0].detach()) == pytest.approx(loss(exact), abs=1e-5)
    for part in range(3):
        assert float(gradients[part][0].abs().max()) > 1e-4
        for _ in range(4):
            direction = torch.randn(exact[part].shape, generator=generator).double()
            up, down = (
                [x + step * direction if i == part else x for i, x in enumerate(exact)] for step in (1e-5, -1e-5)
            )
            expected = (loss(up) - loss(down)) / 2e-5
            assert float((gradients[part][0].double() * direction).sum()) == pytest.approx(expected, rel=1e-3, abs=1e-6)


@SITES
def test_a_rank_raises_the_score_further(model: FocusModel, samples: list[MultiDocSample], site: Any) -> None:
    constant, ranked = (
        train_focus_directions(
            model, samples[:2], HEADS, site=site, rank=rank, epochs=15, learning_rate=0.05, max_new_tokens=3
        )
        for rank in (0, 4)
    )
    assert constant.losses is not None
    assert ranked.losses is not None
    assert float(ranked.losses[-1].mean()) < float(constant.losses[-1].mean()) - 0.02
    assert ranked.rank == 4
    assert "rank 4" in repr(ranked)


@pytest.mark.parametrize("objective", ["score", "answer"])
def test_an_interrupted_training_goes_on_to_the_same_numbers(
    load_model: Any, samples: list[MultiDocSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, objective: Any
) -> None:
    model = load_model("llama")
    arguments: dict[str, Any] = {**QUICK, "rank": 2, "objective": objective, "site": "projection"}
    whole = train_focus_directions(model, samples[:2], HEADS, **arguments)
    original, taken = training._step, list[int]()

    def interrupted(*args: Any) -> Any:
        if len(taken) == 3:
            raise KeyboardInterrupt
        taken.append(1)
        return original(*args)

    monkeypatch.setattr(training, "_step", interrupted)
    settings: dict[str, Any] = {**arguments, "checkpoint": tmp_path / "state.pt", "checkpoint_every": 1}
    with pytest.raises(KeyboardInterrupt):
        train_focus_directions(model, samples[:2], HEADS, **settings)
    monkeypatch.setattr(training, "_step", original)
    resumed = train_focus_directions(model, samples[:2], HEADS, **settings)
    assert resumed.digest == whole.digest
    assert resumed.provenance == whole.provenance
    settings["rank"] = 1
    with pytest.raises(ValueError, match="is a checkpoint of another training"):
        train_focus_directions(model, samples[:2], HEADS, **settings)


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"rank": -1}, ValueError, "rank is -1; it must not be negative"),
        ({"rank": 1.5}, TypeError, "rank is 1.5, a float; it must be an integer"),
        ({"objective": "em"}, ValueError, "objective is 'em'; it must be 'score' or 'answer'"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_settings_that_make_no_sense_are_refused(settings: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        TrainingConfig(**settings)


def test_a_rank_above_the_head_size_is_refused(model: FocusModel, samples: list[MultiDocSample]) -> None:
    with pytest.raises(ValueError, match="rank is 17; it must be at most d_head = 16"):
        train_focus_directions(model, samples[:1], HEADS, rank=17, **QUICK)
    made = train_focus_directions(model, samples[:1], HEADS[:1], rank=16, epochs=1, max_new_tokens=2)
    assert isinstance(made, FocusDirections)
    assert made.rank == 16
