"""Training of focus directions: single steps against a direct computation, effects on scores, and errors."""

from __future__ import annotations

import dataclasses
import hashlib
import warnings
from contextlib import nullcontext
from typing import Any

import pytest
import torch

from focuslens import (
    FocusDirections,
    FocusModel,
    FocusSteering,
    Head,
    MultiDocSample,
    TrainingConfig,
    contextual_scores,
    train_focus_directions,
)
from focuslens.directions import activations as activation_rows
from focuslens.directions import objective
from focuslens.directions.activations import measured_scores

SITES = ["rotary", "projection"]
HEADS = [(2, 3), (0, 1), (2, 0), (2, 2)]  # heads 2 and 3 share a key-value head
QUICK: dict[str, Any] = {"epochs": 2, "max_new_tokens": 3, "learning_rate": 0.01}


@pytest.fixture
def model(tiny_model: FocusModel) -> FocusModel:
    return FocusModel(tiny_model.hooked, tiny_model.tokenizer, stop_strings=(), stop_tokens=(), name="tiny")


def same(one: FocusDirections, other: FocusDirections) -> bool:
    assert one.losses is not None
    assert other.losses is not None
    return one.digest == other.digest and torch.equal(one.losses, other.losses)


# --- single steps ---


def activations(model: FocusModel, tokens: torch.Tensor, layer: int, site: str) -> tuple[torch.Tensor, torch.Tensor]:
    """Queries and keys [pos head d_head] of a layer, observed with plain hooks on the unmodified model."""
    seen: dict[str, torch.Tensor] = {}
    infix = "rot_" if site == "rotary" else ""

    def keep(name: str) -> Any:
        def observe(activation: torch.Tensor, hook: Any) -> None:
            seen[name] = activation[0].double().clone()

        return observe

    model.observe(tokens, [(f"blocks.{layer}.attn.hook_{infix}{name}", keep(name)) for name in "qk"])
    return seen["q"], seen["k"]


def turn(x: torch.Tensor) -> torch.Tensor:
    """Rotary embedding of one head [pos d_head] at positions 0, 1, ..., computed with complex numbers."""
    half = x.shape[1] // 2
    angles = torch.outer(torch.arange(len(x)).double(), 10_000.0 ** (-torch.arange(half).double() / half))
    z = torch.complex(x[:, :half], x[:, half:]) * torch.polar(torch.ones_like(angles), angles)
    return torch.cat((z.real, z.imag), dim=1)


def loss_by_hand(
    q: torch.Tensor, k: torch.Tensor, n_prompt: int, span: tuple[int, int], site: str,
    d_query: torch.Tensor, d_key: torch.Tensor,
) -> torch.Tensor:  # fmt: skip
    """The loss ``-S_C`` of one head [pos d_head] in float64, computed from the full pattern."""
    q, k = q + d_query, k + d_key
    if site == "projection":
        q, k = turn(q), turn(k)
    n = len(q)
    logits = (q @ k.T / q.shape[1] ** 0.5).masked_fill(torch.ones(n, n).triu(1).bool(), -torch.inf)
    return -logits.softmax(dim=1)[n_prompt:, span[0] : span[1]].sum(dim=1).mean()


def start(seed: int, of_keys: int, heads: list[tuple[int, int]]) -> torch.Tensor:
    """Initial random vectors of heads, before they are scaled."""
    rows: list[torch.Tensor] = []
    for layer, head in heads:
        digest = hashlib.sha256(f"{seed}/{of_keys}/{layer}/{head}".encode()).digest()
        rows.append(torch.randn(16, generator=torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))))
    return torch.stack(rows)


@pytest.mark.parametrize("site", SITES)
@pytest.mark.parametrize("case", ["long", "gold"])
def test_two_steps_are_those_of_adamw_on_each_head_alone(
    model: FocusModel, samples: list[MultiDocSample], site: Any, case: Any
) -> None:
    sample, heads = samples[3], [(2, 1), (0, 2), (2, 3)]
    config = TrainingConfig(
        site=site, prompts=case, epochs=2, learning_rate=0.02, weight_decay=0.3, init_std=0.5, max_new_tokens=3, seed=5
    )
    trained = train_focus_directions(model, [sample], heads, config=config)

    # Initial vectors are normal, with a separate seed for each head and each key-value head.
    queries = start(5, 0, heads) * 0.5
    # Layer 0 uses key-value head 1 (for head 2). Layer 2 uses key-value heads 0 (for head 1) and 1 (for head 3).
    keys = start(5, 1, [(2, 0), (0, 1), (2, 1)]) * (0.5 if site == "projection" else 0)

    response = model.generate(sample.prompt("gold"), max_new_tokens=3).tokens
    encoded = model.encode(sample.prompt(case))
    tokens = torch.cat((encoded.tokens, response))
    ((span),) = encoded.spans["relevant"]
    assert trained.losses is not None
    for place, (layer, head) in enumerate(heads):
        q, k = activations(model, tokens, layer, site)
        q, k = q[:, head], k[:, head // 2]
        vectors = [queries[place].double().clone(), keys[place].double().clone()]
        moments = [(torch.zeros(16).double(), torch.zeros(16).double()) for _ in vectors]
        for step in (1, 2):
            d_query, d_key = (vector.clone().requires_grad_() for vector in vectors)
            loss = loss_by_hand(q, k, len(encoded.tokens), span, site, d_query, d_key)
            assert float(trained.losses[step - 1, place]) == pytest.approx(float(loss.detach()), abs=1e-5)
            gradients = torch.autograd.grad(loss, [d_query, d_key])
            if site == "rotary":
                assert gradients[1].abs().max() < 1e-9
            for i, gradient in enumerate(gradients[: 1 if site == "rotary" else 2]):
                first, second = moments[i]
                first = 0.9 * first + 0.1 * gradient
                second = 0.999 * second + 0.001 * gradient**2
                moments[i] = first, second
                adam = (first / (1 - 0.9**step)) / ((second / (1 - 0.999**step)).sqrt() + 1e-8)
                vectors[i] = vectors[i] * (1 - 0.02 * 0.3) - 0.02 * adam
        # Adam divides by the gradient's magnitude, so its step is arbitrary where the gradient is only rounding error.
        # All other components must agree.
        sure = gradients[0].abs() > 1e-4 * gradients[0].abs().max()
        assert sure.sum() > 8
        torch.testing.assert_close(trained.query[place].double()[sure], vectors[0][sure], rtol=0, atol=2e-4)
        if trained.key is not None:
            sure = gradients[1].abs() > 1e-3 * gradients[1].abs().max()
            assert sure.sum() > 4
            torch.testing.assert_close(trained.key[place].double()[sure], vectors[1][sure], rtol=0, atol=2e-4)
    assert (trained.key is None) == (site == "rotary")


def test_all_together_is_each_alone(load_model: Any, samples: list[MultiDocSample]) -> None:
    model = load_model("llama")
    together = train_focus_directions(model, samples[:2], HEADS, init_std=0.0, **QUICK)
    assert together.losses is not None
    for place, head in enumerate(HEADS):
        alone = train_focus_directions(model, samples[:2], [head], init_std=0.0, **QUICK)
        torch.testing.assert_close(alone.query[0], together.query[place], rtol=0, atol=1e-6)
        assert alone.losses is not None
        torch.testing.assert_close(alone.losses[:, 0], together.losses[:, place], rtol=0, atol=1e-6)


def test_heads_that_share_keys_get_one_key_vector(model: FocusModel, samples: list[MultiDocSample]) -> None:
    trained = train_focus_directions(model, samples[:1], HEADS, site="projection", **QUICK)
    assert trained.key is not None
    assert torch.equal(trained.key[0], trained.key[3])  # (2, 3) and (2, 2)
    assert len({tuple(vector.tolist()) for vector in trained.key}) == 3
    # Steering uses the trained vectors: the shared vector is added once.
    ((_, hook),) = [h for h in FocusSteering(trained, 1.0).hooks(model) if h[0] == "blocks.2.attn.hook_k"]
    added = hook(torch.zeros(1, 1, 2, 16), None)
    assert added is not None
    torch.testing.assert_close(added[0, 0], torch.stack([trained.key[2], trained.key[0]]))


# --- effect on scores ---


@pytest.mark.parametrize("site", SITES)
def test_trained_directions_raise_the_score_they_were_trained_for(
    model: FocusModel, samples: list[MultiDocSample], site: Any
) -> None:
    trained = train_focus_directions(
        model, samples[:2], HEADS, site=site, epochs=15, learning_rate=0.1, max_new_tokens=3
    )
    assert trained.losses is not None
    assert trained.losses.shape == (15, 4)
    assert (trained.losses[-1] < trained.losses[0] - 0.02).all()
    # Scores are computed with one steered head. Heads of lower layers are unmodified, as in training.
    responses = [model.generate(sample.prompt("gold"), max_new_tokens=3).text for sample in samples[:2]]
    layer, head = HEADS[0]
    before, after, lowered = (
        contextual_scores(
            model, samples[:2], responses=responses, interventions=[FocusSteering(trained, alpha, HEADS[:1])]
        ).mean()[layer, head]
        for alpha in (0.0, 1.0, -1.0)
    )
    assert after > before + 0.02
    # At the projection site, the product of both vectors is the same for alpha and -alpha, so the score may also rise.
    assert lowered < before or site == "projection"


def test_the_first_loss_is_the_score_of_the_unmodified_model(model: FocusModel, samples: list[MultiDocSample]) -> None:
    trained = train_focus_directions(model, samples[:1], HEADS, init_std=0.0, epochs=1, max_new_tokens=3)
    response = model.generate(samples[0].prompt("gold"), max_new_tokens=3).tokens
    encoded = model.encode(samples[0].prompt("long"))
    ((start, end),) = encoded.spans["relevant"]
    seen: dict[int, torch.Tensor] = {}
    observers: list[Any] = [
        (f"blocks.{layer}.attn.hook_pattern", lambda w, hook, layer=layer: seen.update({layer: w[0].clone()}))
        for layer in (0, 2)
    ]
    model.observe(torch.cat((encoded.tokens, response)), observers)
    assert trained.losses is not None
    for place, (layer, head) in enumerate(HEADS):
        rows = seen[layer][head, len(encoded.tokens) :, start:end]
        assert float(trained.losses[0, place]) == pytest.approx(-float(rows.sum(dim=1).mean()), abs=1e-5)


def test_gold_and_long_prompts_give_different_directions(load_model: Any, samples: list[MultiDocSample]) -> None:
    long, gold = (
        train_focus_directions(load_model("llama"), samples[:1], HEADS[:1], prompts=case, **QUICK)
        for case in ("long", "gold")
    )
    assert not torch.allclose(long.query, gold.query, atol=1e-4)
    assert (long.provenance["settings"]["prompts"], gold.provenance["settings"]["prompts"]) == ("long", "gold")


@pytest.mark.parametrize("site", SITES)
def test_the_model_is_left_as_it_was(model: FocusModel, samples: list[MultiDocSample], site: Any) -> None:
    parameters = dict(model.hooked.named_parameters())
    before = {name: parameter.detach().clone() for name, parameter in parameters.items()}
    logits = model.logits(torch.arange(5, 25))
    train_focus_directions(model, samples[:1], HEADS, site=site, **QUICK)
    assert all(parameter.grad is None for parameter in parameters.values())
    assert all(torch.equal(parameter, before[name]) for name, parameter in parameters.items())
    assert torch.equal(model.logits(torch.arange(5, 25)), logits)


def test_all_heads_are_trained_by_default_and_what_was_done_is_recorded(
    load_model: Any, samples: list[MultiDocSample]
) -> None:
    model = load_model("qwen3")
    without_gold = MultiDocSample("q", ("a",), samples[0].documents, None)
    trained = train_focus_directions(
        model, [without_gold, samples[3]], epochs=1, max_new_tokens=2, seed=9, data={"file": "x.jsonl"}
    )
    assert trained.heads == tuple((layer, head) for layer in range(3) for head in range(4))
    assert trained.query.shape == (12, 24)
    provenance = trained.provenance
    assert provenance["model"] == model.description
    assert provenance["shape"] == {"n_layers": 3, "n_heads": 4, "n_key_value_heads": 2, "d_head": 24}
    assert provenance["data"].items() >= {"file": "x.jsonl", "samples": 1}.items()
    assert provenance["settings"] == dataclasses.asdict(TrainingConfig(epochs=1, max_new_tokens=2, seed=9))
    assert {"torch", "transformers", "focuslens"} <= provenance["versions"].keys()
    trained.require_shape(model.shape)


@pytest.mark.parametrize("name", ["qwen2", "qwen3", "mistral_window"])
@pytest.mark.parametrize("site", SITES)
def test_every_family_can_be_trained(
    load_model: Any, backend: str, samples: list[MultiDocSample], name: str, site: Any
) -> None:
    model = load_model(name, backend)
    # The gold document is last, so that a sliding window reaches it.
    trained = train_focus_directions(
        model, samples[2:3], [(1, 0), (1, 3)], site=site, epochs=6, learning_rate=0.1, max_new_tokens=3
    )
    assert trained.losses is not None
    assert (trained.losses[-1] < trained.losses[0] - 1e-3).all()


def test_the_seed_decides_start_and_order(load_model: Any, samples: list[MultiDocSample]) -> None:
    model = load_model("llama")
    one, again, other = (train_focus_directions(model, samples, HEADS[:1], seed=s, **QUICK) for s in (1, 1, 2))
    assert same(one, again)
    assert one.digest != other.digest
    # Without initial noise, the seed determines only the order of the samples.
    orders = [train_focus_directions(model, samples, HEADS[:1], seed=s, init_std=0.0, **QUICK) for s in (1, 2)]
    assert orders[0].digest != orders[1].digest


@pytest.mark.parametrize("site", SITES)
def test_activations_that_do_not_fit_in_memory_are_made_anew(
    load_model: Any, samples: list[MultiDocSample], site: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model("llama")
    passes: list[int] = []
    original = activation_rows.capture_rows
    monkeypatch.setattr(activation_rows, "capture_rows", lambda *args: passes.append(1) or original(*args))
    kept = train_focus_directions(model, samples[:2], HEADS, site=site, **QUICK)
    with_memory, passes[:] = len(passes), []
    anew = train_focus_directions(model, samples[:2], HEADS, site=site, memory_gb=0, **QUICK)
    assert same(kept, anew)
    # With memory_gb=0, there is one pass to check the model's attention, and one pass per sample and epoch.
    assert (with_memory, len(passes)) == (2, 1 + 2 * 2)


def test_a_step_on_several_samples_takes_their_mean_gradient(
    load_model: Any, samples: list[MultiDocSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = load_model("llama")
    chosen = [sample for sample in samples if sample.gold_index is not None][:3]
    # SGD shows the size of a gradient. AdamW's first step does not depend on the size.
    monkeypatch.setattr(torch.optim, "AdamW", lambda vectors, lr, weight_decay: torch.optim.SGD(vectors, lr=lr))
    configs = [TrainingConfig(epochs=1, batch_size=3, max_new_tokens=3, learning_rate=rate) for rate in (1e-30, 1.0)]
    start, trained = (train_focus_directions(model, chosen, HEADS, config=config) for config in configs)
    groups = activation_rows.LayerHeads.group([Head(*head) for head in HEADS], model.shape)
    query, losses = start.query.clone().requires_grad_(), list[torch.Tensor]()
    for sample in chosen:
        prompt, response = model.encode(sample.prompt("long")), model.generate(sample.prompt("gold"), max_new_tokens=3)
        rows = activation_rows.capture_rows(model, prompt, response.tokens, groups, "rotary")
        losses.append(objective.direction_losses(model.backend, query, None, groups, rows, "rotary"))
    mean = torch.stack(losses).mean(dim=0)
    (gradient,) = torch.autograd.grad(mean.sum(), query)
    assert trained.losses is not None
    torch.testing.assert_close(trained.losses[0], mean.detach(), atol=1e-6, rtol=1e-5)
    torch.testing.assert_close(trained.query - start.query, -gradient, atol=1e-6, rtol=1e-3)


def test_responses_of_a_batch_end_where_each_long_prompt_leaves_no_room(
    model: FocusModel, samples: list[MultiDocSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    chosen = sorted(samples, key=lambda sample: len(model.encode(sample.prompt("long")).tokens))[-2:]
    shorter, longer = (len(model.encode(sample.prompt("long")).tokens) for sample in chosen)
    assert shorter < longer
    shape = dataclasses.replace(model.shape, n_ctx=longer + 1)
    monkeypatch.setattr(model.backend, "shape", shape)
    seen: list[int] = []
    original = activation_rows.capture_rows
    monkeypatch.setattr(activation_rows, "capture_rows", lambda *args: seen.append(len(args[2])) or original(*args))
    train_focus_directions(model, chosen, HEADS[:1], epochs=1, max_new_tokens=3)
    assert sorted(seen) == sorted([1, min(3, longer + 1 - shorter)])


def test_an_epoch_takes_every_sample_once_whatever_the_batches(load_model: Any, samples: list[MultiDocSample]) -> None:
    model = load_model("llama")
    chosen = [sample for sample in samples if sample.gold_index is not None][:3]
    still: dict[str, Any] = {**QUICK, "learning_rate": 1e-30}
    losses = [train_focus_directions(model, chosen, HEADS, batch_size=size, **still).losses for size in (1, 2, 5)]
    for other in losses[1:]:
        torch.testing.assert_close(other, losses[0], atol=1e-6, rtol=1e-5)


# --- errors ---


def test_a_model_that_attends_otherwise_is_refused(
    model: FocusModel, samples: list[MultiDocSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(model.hooked.cfg, "use_attn_result", True)  # attention of TransformerLens, not of the engine
    monkeypatch.setattr(model.backend, "scale", lambda layer: 0.5 if layer == 2 else 0.25)
    train_focus_directions(model, samples[3:], [(0, 1)], epochs=1, max_new_tokens=2)
    with pytest.raises(ValueError, match=r"layer 2 of 'tiny' does not attend as softmax\(Q K\^T \* scale\)"):
        train_focus_directions(model, samples[3:], HEADS, epochs=1, max_new_tokens=2)


@pytest.mark.parametrize("cap", [5.0, 50.0])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_soft_cap_is_refused_however_little_it_does(
    cap: float,
    dtype: str,
    load_model: Any,
    backend: str,
    samples: list[MultiDocSample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_model("llama", backend, dtype=dtype)
    if backend == "hooked":
        monkeypatch.setattr(model.hooked.cfg, "attn_scores_soft_cap", cap)
    else:
        monkeypatch.setattr(model.hooked.original_model.config, "attn_logit_softcapping", cap, raising=False)
    with pytest.raises(ValueError, match=r"has attn_(scores_soft_cap|logit_softcapping); directions cannot"):
        train_focus_directions(model, samples[3:], HEADS[:2], epochs=1, max_new_tokens=2)


@pytest.mark.parametrize(
    ("dtype", "gap", "refused"),
    [("float32", 5e-4, False), ("float32", 2e-3, True), ("bfloat16", 1e-2, False), ("bfloat16", 4e-2, True)],
)
def test_scores_may_differ_from_the_models_own_by_rounding_alone(
    dtype: str,
    gap: float,
    refused: bool,
    load_model: Any,
    samples: list[MultiDocSample],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    model = load_model("llama", dtype=dtype)

    def shifted(*arguments: Any) -> Any:
        return {layer: scores + gap for layer, scores in measured_scores(*arguments).items()}

    monkeypatch.setattr(objective, "measured_scores", shifted)
    with pytest.raises(ValueError, match="does not attend") if refused else nullcontext():
        train_focus_directions(model, samples[3:], HEADS[:2], epochs=1, max_new_tokens=2)


def test_samples_beyond_the_memory_are_said_to_be_computed_anew(load_model: Any, samples: list[MultiDocSample]) -> None:
    model = load_model("llama")
    quick: dict[str, Any] = {"epochs": 1, "max_new_tokens": 2}
    with pytest.warns(
        UserWarning, match=r"activations of 0 of 2 samples fill \S+ GB; those of the others are recomputed"
    ) as seen:
        train_focus_directions(model, samples[2:], HEADS[:2], memory_gb=1e-9, **quick)
    assert len(seen) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train_focus_directions(model, samples[2:], HEADS[:2], **quick)


@pytest.mark.parametrize("site", SITES)
def test_a_window_that_was_overlooked_is_refused(
    load_model: Any, backend: str, samples: list[MultiDocSample], monkeypatch: pytest.MonkeyPatch, site: Any
) -> None:
    model = load_model("mistral_window", backend)
    monkeypatch.setattr(model.hooked.cfg, "use_attn_result", True)  # attention of TransformerLens, not of the engine
    monkeypatch.setattr(model.backend, "window", lambda layer: None)
    with pytest.raises(ValueError, match="directions cannot be trained on this architecture"):
        train_focus_directions(model, samples[2:3], site=site, epochs=1, max_new_tokens=2)


def test_nothing_to_train_on_is_refused(
    model: FocusModel, samples: list[MultiDocSample], tiny_model: FocusModel
) -> None:
    without_gold = MultiDocSample("q", ("a",), samples[0].documents, None)
    with pytest.raises(ValueError, match="none of the 1 samples has a gold document and a response"):
        train_focus_directions(model, [without_gold], HEADS)
    first = int(model.generate(samples[3].prompt("gold"), max_new_tokens=1).tokens[0])
    silent = FocusModel(tiny_model.hooked, tiny_model.tokenizer, stop_strings=(), stop_tokens=(first,))
    with pytest.raises(ValueError, match="none of the 1 samples has a gold document and a response"):
        train_focus_directions(silent, samples[3:], HEADS)
    with pytest.raises(ValueError, match="there are no heads to train"):
        train_focus_directions(model, samples, [])
    with pytest.raises(ValueError, match="does not exist"):
        train_focus_directions(model, samples, [(3, 0)])


def test_settings_come_one_way_or_the_other(model: FocusModel, samples: list[MultiDocSample]) -> None:
    with pytest.raises(TypeError, match="either config or single settings, not both: seed"):
        train_focus_directions(model, samples, config=TrainingConfig(), seed=1)
    with pytest.raises(TypeError, match="learning_rte"):
        train_focus_directions(model, samples, learning_rte=0.1)


def test_the_defaults_are_the_papers() -> None:
    config = TrainingConfig()
    assert (config.epochs, config.learning_rate, config.weight_decay) == (10, 1e-3, 0.01)
    assert (config.site, config.prompts, config.init_std) == ("rotary", "long", 0.01)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"site": "output"}, "site is 'output'; it must be one of rotary, projection"),
        ({"prompts": "negative"}, "prompts is 'negative'; it must be 'long' or 'gold'"),
        ({"epochs": 0}, "epochs is 0; it must be more than 0"),
        ({"learning_rate": 0.0}, "learning_rate is 0.0; it must be more than 0"),
        ({"max_new_tokens": -1}, "max_new_tokens is -1; it must be more than 0"),
        ({"weight_decay": -0.1}, "weight_decay is -0.1; it must not be negative"),
        ({"init_std": -1.0}, "init_std is -1.0; it must not be negative"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        TrainingConfig(**settings)
