"""Training by the log-likelihood of responses: the loss, its gradient, its effect, and the model afterwards."""

from __future__ import annotations

from typing import Any, cast

import pytest
import torch
from torch import Tensor

from focuslens import FocusDirections, FocusModel, FocusSteering, Head, MultiDocSample, train_focus_directions
from focuslens.directions.activations import LayerHeads
from focuslens.directions.answer_objective import answer_loss
from focuslens.directions.training_state import TrainedVectors
from focuslens.interventions.low_rank import LowRank

SITES = pytest.mark.parametrize("site", ["rotary", "projection"])
HEADS = [Head(2, 3), Head(0, 1), Head(2, 0), Head(2, 2)]
RESPONSE = torch.tensor([70, 300, 5])


def random_vectors(site: str, rank: int, d_head: int, dtype: torch.dtype = torch.float32) -> TrainedVectors:
    """Vectors of all heads. Layer 0 reads one key-value head, and layer 2 two."""
    generator = torch.Generator().manual_seed(2)
    query, key = (torch.randn(n, d_head, generator=generator).to(dtype) / 2 for n in (4, 3))
    u, v = (torch.randn(4, d_head, max(rank, 1), generator=generator).to(dtype) / 3 for _ in range(2))
    return TrainedVectors(query, key if site == "projection" else None, LowRank(u, v) if rank else None)


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("name", ["llama", "qwen3"])
@SITES
def test_the_loss_is_that_of_the_steered_model(
    name: str, load_model: Any, backend: str, samples: list[MultiDocSample], site: Any, rank: int
) -> None:
    model: FocusModel = load_model(name, backend)
    vectors, prompt = random_vectors(site, rank, model.shape.d_head), model.encode(samples[0].prompt())
    groups = LayerHeads.group(HEADS, model.shape)
    key = (
        None if vectors.key is None else vectors.key[[2, 0, 1, 2]]
    )  # of key-value heads (2, 1), (0, 0), (2, 0), (2, 1)
    u, v = (None, None) if vectors.product is None else (vectors.product.u, vectors.product.v)
    steering = FocusSteering(FocusDirections(HEADS, vectors.query, key, site, u=u, v=v), 1.0)
    tokens = torch.cat((prompt.tokens, RESPONSE))
    logits = model.logits(tokens, [steering]).double()[len(prompt.tokens) - 1 : -1]
    expected = -logits.log_softmax(dim=-1)[torch.arange(3), RESPONSE].mean()
    loss = answer_loss(model, vectors, groups, prompt, RESPONSE, site)
    assert float(loss) == pytest.approx(float(expected), abs=1e-4)
    plain = model.logits(tokens).double()[len(prompt.tokens) - 1 : -1]
    assert abs(float(-plain.log_softmax(dim=-1)[torch.arange(3), RESPONSE].mean() - expected)) > 0.01


@SITES
def test_gradients_are_finite_differences_in_double_precision(
    load_model: Any, samples: list[MultiDocSample], site: Any
) -> None:
    model: FocusModel = load_model("llama", "hooked", dtype="float64")
    groups, prompt = LayerHeads.group(HEADS, model.shape), model.encode(samples[0].prompt("gold"))
    vectors = random_vectors(site, 2, 16, torch.float64)
    tensors = [tensor.requires_grad_() for tensor in vectors.tensors]

    def loss() -> Tensor:
        return answer_loss(model, vectors, groups, prompt, RESPONSE, site)

    gradients = torch.autograd.grad(loss().sum(), tensors)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for tensor, gradient in zip(tensors, gradients, strict=True):
            direction = torch.randn(tensor.shape, generator=generator).double()
            tensor += 1e-5 * direction
            up = loss()
            tensor -= 2e-5 * direction
            down = loss()
            tensor += 1e-5 * direction
            expected = float((up - down) / 2e-5)
            # HookedTransformer's rotary tables are in single precision, and its results are exact functions of them.
            assert float((gradient * direction).sum()) == pytest.approx(expected, rel=1e-4, abs=1e-7)
            assert abs(expected) > 1e-4


@pytest.mark.parametrize("rank", [0, 2])
@SITES
def test_training_makes_the_responses_more_likely(
    load_model: Any, backend: str, samples: list[MultiDocSample], site: Any, rank: int
) -> None:
    tiny = load_model("llama", backend)
    model = FocusModel(tiny.hooked, tiny.tokenizer, stop_strings=(), stop_tokens=())
    before = {name: parameter.detach().clone() for name, parameter in model.hooked.named_parameters()}
    required = {name: parameter.requires_grad for name, parameter in model.hooked.named_parameters()}
    trained = train_focus_directions(
        model,
        samples[:2],
        HEADS,
        site=site,
        rank=rank,
        objective="answer",
        epochs=6,
        learning_rate=0.05,
        max_new_tokens=3,
    )
    losses = trained.provenance["answer_losses"]
    assert len(losses) == 6
    assert losses[-1] < losses[0] - 0.05
    assert trained.losses is None
    assert trained.rank == rank
    assert (trained.key is None) == (site == "rotary")
    # The loss that is recorded last is close to that of the directions which are returned.
    steered = [_likelihood(model, sample, [FocusSteering(trained, 1.0)]) for sample in samples[:2]]
    plain = [_likelihood(model, sample, []) for sample in samples[:2]]
    assert sum(steered) > sum(plain) + 0.1
    for name, parameter in model.hooked.named_parameters():
        assert parameter.grad is None
        assert torch.equal(parameter, before[name])
        assert parameter.requires_grad == required[name]


def _likelihood(model: FocusModel, sample: MultiDocSample, interventions: Any) -> float:
    prompt = model.encode(sample.prompt())
    response = model.generate(sample.prompt("gold"), max_new_tokens=3).tokens
    logits = model.logits(torch.cat((prompt.tokens, response)), interventions)[len(prompt.tokens) - 1 : -1]
    return float(logits.log_softmax(dim=-1)[torch.arange(len(response)), response].mean())


def test_gradients_do_not_go_through_other_processes(load_model: Any, samples: list[MultiDocSample]) -> None:
    model = load_model("llama")

    class Elsewhere:
        """Executor that is no model, like a pool of workers."""

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

        name = description = shape = tokenizer = device = property(lambda self: None)

        def encode(self, prompt: Any) -> Any:
            return model.encode(prompt)

        def map(self, function: Any, calls: Any) -> Any:
            return model.map(function, calls)

    with pytest.raises(
        ValueError, match="objective='answer' takes gradients through the model, which a Elsewhere runs"
    ):
        train_focus_directions(cast("Any", Elsewhere()), samples[:1], HEADS, objective="answer")
