"""A user's own hooks stay and act. FocusLens removes its own hooks after each pass, even after an exception."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

import focuslens as fl
from focuslens import FocusModel
from tests.support.reference import gap

HEADS = [(0, 1), (1, 2), (2, 0)]


def count_hooks(hooked: Any) -> int:
    """Total number of TransformerLens hooks, PyTorch hooks on modules, and replaced ``forward`` methods."""
    lens = sum(len(point.fwd_hooks) + len(point.bwd_hooks) for point in set(hooked.hook_dict.values()))
    modules = sum(len(module._forward_hooks) + len(module._forward_pre_hooks) for module in hooked.modules())
    return lens + modules + sum("forward" in vars(module) for module in hooked.modules())


@pytest.fixture
def clean(load_model, backend) -> Any:
    """The tiny Llama. After the test, its hooks must be unchanged."""
    model = load_model("llama", backend)
    model.hooked(torch.tensor([[5, 6]]))  # on its first run, a bridge adds hooks of its own
    before = count_hooks(model.hooked)
    level = model.hooked.context_level
    yield model
    model.hooked.reset_hooks()
    assert count_hooks(model.hooked) == before
    assert model.hooked.context_level == level


def interventions(model: FocusModel) -> list[Any]:
    generator = torch.Generator().manual_seed(1)
    query, key = (torch.randn(len(HEADS), model.shape.d_head, generator=generator) for _ in range(2))
    return [
        fl.SplitSoftmax(HEADS, 0.2),
        fl.FocusSteering(fl.FocusDirections(HEADS, query, key, site="projection"), 0.5),
        fl.FocusSteering(fl.FocusDirections(HEADS, query), 0.5, positions="response"),
        fl.HeadAblation([(0, 3)]),
        fl.HeadAblation([(1, 3)], "knockout", span="irrelevant"),
    ]


def calls(model: FocusModel, samples: list[Any]) -> dict[str, Callable[[], Any]]:
    """All public calls that run the model."""
    everything, prompt = interventions(model), samples[0].prompt("long")
    prompts = [sample.prompt("gold") for sample in samples[:2]]
    return {
        "logits": lambda: model.logits(prompt, everything),
        "generate": lambda: model.generate(prompts, everything, max_new_tokens=3),
        "contextual_scores": lambda: fl.contextual_scores(
            model, samples[:2], "gold", interventions=everything[:4], max_new_tokens=2, batch_tokens=600
        ),
        "evaluate": lambda: fl.evaluate(model, samples[:2], everything, max_new_tokens=2),
        "train": lambda: fl.train_focus_directions(model, samples[:2], HEADS, epochs=1, max_new_tokens=2),
        "mean_head_outputs": lambda: fl.mean_head_outputs(model, prompts, HEADS),
    }


CALLS = pytest.mark.parametrize(
    "call", ["logits", "generate", "contextual_scores", "evaluate", "train", "mean_head_outputs"]
)


@CALLS
def test_nothing_is_left_behind(call, clean, samples):
    prompt = samples[0].prompt("long")
    before, plain = count_hooks(clean.hooked), clean.logits(prompt)
    calls(clean, samples)[call]()
    assert count_hooks(clean.hooked) == before
    assert gap(clean.logits(prompt), plain) == 0
    assert all(parameter.grad is None for parameter in clean.hooked.parameters())


@CALLS
def test_a_users_own_hook_stays_and_acts(call, clean, samples):
    """Hooks from ``add_hook`` and from an enclosing ``hooks()`` context run in every forward pass and stay in place."""
    passes = {"added": 0, "context": 0}

    def count(which: str) -> Callable[..., None]:
        def hook(tensor: Tensor, hook: Any) -> None:
            passes[which] += 1

        return hook

    before = count_hooks(clean.hooked)
    clean.hooked.add_hook("blocks.1.attn.hook_pattern", count("added"))
    with_user = count_hooks(clean.hooked)
    assert with_user > before
    with clean.hooked.hooks(fwd_hooks=[("blocks.1.attn.hook_pattern", count("context"))]):
        calls(clean, samples)[call]()
        assert passes["added"] == passes["context"] > 0
    assert count_hooks(clean.hooked) == with_user
    clean.logits(samples[0].prompt("gold"))
    assert passes["added"] == passes["context"] + 1


def test_a_users_hook_changes_what_we_see(clean, samples):
    """Logits under a user's hook and an intervention equal those of both hooks in plain TransformerLens."""
    prompt = samples[0].prompt("long")
    ids = clean.encode(prompt).tokens
    split = fl.SplitSoftmax(HEADS, 0.1)

    def halve(z: Tensor, hook: Any) -> Tensor:
        return z / 2

    plain = clean.logits(prompt)
    ours = clean.logits(prompt, [split])
    together = clean.hooked.run_with_hooks(
        ids[None], fwd_hooks=[("blocks.0.attn.hook_z", halve), *split.hooks(clean, prompt)]
    )[0]
    clean.hooked.add_hook("blocks.0.attn.hook_z", halve)
    assert gap(clean.logits(prompt, [split]), together) < 1e-5
    clean.hooked.reset_hooks()
    with clean.hooked.hooks(fwd_hooks=[("blocks.0.attn.hook_z", halve)]):
        assert gap(clean.logits(prompt, [split]), together) < 1e-5
    assert gap(clean.logits(prompt, [split]), ours) == 0
    assert min(gap(together, plain), gap(together, ours), gap(ours, plain)) > 0.05


class Interrupted(Exception):
    pass


def explode(tensor: Tensor, hook: Any) -> None:
    raise Interrupted


class Exploding:
    """An intervention whose hook raises, used after interventions whose hooks have been added."""

    heads = ()
    changes_prompt = True

    def __init__(self, after: int = 0) -> None:
        self.after = after

    def describe(self) -> dict[str, Any]:
        return {}

    def hooks(self, model: fl.HookTarget, prompt: Any = None, *, cursor: Any = None) -> list[Any]:
        left = [self.after]

        def fail(tensor: Tensor, hook: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                raise Interrupted

        return [("blocks.1.attn.hook_z", fail)]


@pytest.mark.parametrize("call", ["logits", "generate", "decoding", "contextual_scores", "observe", "extend"])
def test_an_exception_inside_a_forward_pass_leaves_nothing(call, clean, samples):
    prompt = samples[0].prompt("long")
    ids = clean.encode(prompt).tokens
    plain, before, level = clean.logits(prompt), count_hooks(clean.hooked), clean.hooked.context_level
    prefix = clean.prefill(prompt)
    failing = [*interventions(clean), Exploding()]
    on_responses = [one for one in interventions(clean) if not one.changes_prompt]
    observer = [("blocks.2.attn.hook_pattern", explode)]
    run: dict[str, Callable[[], Any]] = {
        "logits": lambda: clean.logits(prompt, failing),
        "generate": lambda: clean.generate(prompt, failing),
        "decoding": lambda: clean.generate(prompt, [*interventions(clean), Exploding(after=1)], max_new_tokens=6),
        "contextual_scores": lambda: fl.contextual_scores(clean, samples, interventions=failing, max_new_tokens=2),
        "observe": lambda: clean.observe(ids, observer),
        "extend": lambda: clean.extend(prefix, torch.tensor([[5, 6]]), on_responses, observer),
    }
    with pytest.raises(Interrupted):
        run[call]()
    assert count_hooks(clean.hooked) == before
    assert clean.hooked.context_level == level
    assert gap(clean.logits(prompt), plain) == 0
    # The prefix in use at the time of the exception is unchanged.
    again, _ = clean.extend(prefix, torch.tensor([[5, 6]]))
    assert gap(again[0], clean.logits(torch.cat((ids, torch.tensor([5, 6]))))[-2:]) < 2e-4


def test_a_hook_point_that_does_not_exist_is_an_error(clean, samples):
    """An unknown hook point raises an error, although the bridge would ignore it silently."""
    before = count_hooks(clean.hooked)
    with pytest.raises(ValueError, match="hook_nowhere"):
        clean.observe(clean.encode(samples[0].prompt("gold")).tokens, [("blocks.0.attn.hook_nowhere", explode)])
    assert count_hooks(clean.hooked) == before


def test_an_intervention_of_an_unknown_part_is_refused_before_anything_runs(clean, samples):
    before = count_hooks(clean.hooked)
    with pytest.raises(KeyError, match="preamble"):
        clean.generate(samples[0].prompt("long"), [*interventions(clean), fl.SplitSoftmax(HEADS, 0.5, span="preamble")])
    assert count_hooks(clean.hooked) == before
