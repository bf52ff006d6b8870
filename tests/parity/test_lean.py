"""Layers that run from their weights give what TransformerLens gives, and a guard tells which layers ran so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import focuslens as fl
from focuslens.interventions.lanes import Lanes
from focuslens.model import lean, lean_attention, lean_products
from focuslens.model.decoding_settings import DecodingSettings
from focuslens.model.runner import ModelRunner
from tests.support.tiers import first_quick

# Another order of summation in float32: a few units in the last place for logits of about 10.
TOLERANCE = 1e-4
MODELS = ("llama", "qwen2", "qwen3", "mistral_window")
HEADS = [(0, 1), (1, 0), (1, 3), (2, 2)]


@pytest.fixture
def ran(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Number of rows per prompt of each layer that ran from its weights."""
    rows: list[int] = []

    def counted(original: Any) -> Any:
        def run(layer: Any, x: Any, n_rows: int, *others: Any) -> Any:
            rows.append(n_rows)
            return original(layer, x, n_rows, *others)

        return run

    for name in ("run_layer", "keys_and_values"):
        monkeypatch.setattr(lean, name, counted(getattr(lean, name)))
    return rows


def directions(d_head: int, site: Any = "rotary") -> fl.FocusDirections:
    vectors = torch.randn(2, len(HEADS), d_head, generator=torch.Generator().manual_seed(1))
    return fl.FocusDirections(HEADS, vectors[0], vectors[1] if site == "projection" else None, site=site)


INTERVENTIONS: dict[str, Callable[[int], list[Any]]] = {
    "none": lambda d_head: [],
    "split-softmax": lambda d_head: [fl.SplitSoftmax(HEADS, 0.2)],
    "split-softmax down, then up": lambda d_head: [
        fl.SplitSoftmax(HEADS, 1000),
        fl.SplitSoftmax(HEADS[:2], 0.0, "question"),
    ],
    "rotary site": lambda d_head: [fl.FocusSteering(directions(d_head), 2.0)],
    "projection site": lambda d_head: [fl.FocusSteering(directions(d_head, "projection"), 1.0)],
    "steered response": lambda d_head: [fl.FocusSteering(directions(d_head), 2.0, positions="response")],
    "zero": lambda d_head: [fl.HeadAblation(HEADS)],
    "mean": lambda d_head: [fl.HeadAblation(HEADS, "mean", mean=torch.ones(len(HEADS), d_head))],
    "knockout": lambda d_head: [fl.HeadAblation(HEADS, "knockout", span="relevant")],
    "logit bias": lambda d_head: [fl.LogitBias(HEADS, 2.0), fl.LogitBias(None, -90.0, "question")],
    "PASTA": lambda d_head: [fl.Pasta(HEADS, 0.01, "irrelevant", positions="response")],
    "SpotLight": lambda d_head: [fl.SpotLight(0.6, positions="response")],
    "position calibration": lambda d_head: [fl.PositionCalibration(0.004, 2)],
    "all together": lambda d_head: [
        fl.FocusSteering(directions(d_head), 2.0),
        fl.HeadAblation(HEADS[:1], "knockout", span="irrelevant"),
        fl.SplitSoftmax(HEADS, 0.3),
        fl.HeadAblation([(2, 3)], positions="response"),
    ],
}


def traced(
    model: fl.FocusModel, prompts: Any, interventions: list[Any], monkeypatch: Any, n: int = 5
) -> tuple[list[list[int]], torch.Tensor, torch.Tensor]:
    """Response tokens, their logits ``[step batch d_vocab]`` and scores, from a prefill and greedy decoding."""
    logits: list[torch.Tensor] = []
    require = ModelRunner._require_numbers
    with monkeypatch.context() as patched:
        patched.setattr(ModelRunner, "_require_numbers", lambda self, x: (logits.append(x), require(self, x)))
        prefix = model.prefill(prompts, interventions, hold_last=True)
        from focuslens.scores.base import ResponseMasses, sink_and_documents

        masses = ResponseMasses(model.shape, prefix.batch, sink_and_documents)
        decoding = DecodingSettings((-1,))
        found = model.decode(prefix, interventions, max_new_tokens=n, observers=masses.hooks(), decoding=decoding)
    return [one.tokens.tolist() for one in found], torch.stack(logits[:n]), masses.means([n] * len(found))


@pytest.mark.parametrize("name", first_quick(MODELS))
@pytest.mark.parametrize("kind", INTERVENTIONS)
def test_lean_layers_give_what_the_engine_gives(
    name: str, kind: str, load_model: Any, backend: str, samples: Any, ran: list[int], monkeypatch: Any
) -> None:
    model = load_model(name, backend)
    interventions = INTERVENTIONS[kind](model.shape.d_head)
    prompts = [sample.prompt() for sample in samples]
    model.generate(prompts[0], max_new_tokens=1)  # the first response of a model compares the two paths
    ran.clear()
    tokens, logits, scores = traced(model, prompts, interventions, monkeypatch)
    n_layers = model.shape.n_layers
    assert ran.count(1) == 6 * n_layers  # the last token of the prompts, and five of the responses
    assert len(ran) == 7 * n_layers
    monkeypatch.setattr(model, "lean", False)
    ran.clear()
    expected = traced(model, prompts, interventions, monkeypatch)
    assert not ran
    assert tokens == expected[0]
    torch.testing.assert_close(logits, expected[1], atol=TOLERANCE, rtol=0)
    torch.testing.assert_close(scores, expected[2], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    ("narrow", "calls"), [(0, 16), (1000, 16), (0, 1)], ids=["wide heads", "narrow heads", "one product"]
)
@pytest.mark.parametrize("name", MODELS)
def test_lanes_over_one_prefix_give_what_each_setting_gives_alone(
    name: str, narrow: int, calls: int, load_model: Any, backend: str, samples: Any, ran: list[int], monkeypatch: Any
) -> None:
    monkeypatch.setattr(lean_products, "_NARROW", narrow)
    monkeypatch.setattr(lean_products, "_CALLS", calls)
    written: list[int] = []

    def counted(*arguments: Any) -> torch.Tensor:
        written.append(1)
        return lean_products.written_products(*arguments)

    monkeypatch.setattr(lean_attention, "written_products", counted)
    model, prompts = load_model(name, backend), [sample.prompt() for sample in samples[:2]]
    given = [
        INTERVENTIONS[kind](model.shape.d_head) for kind in ("none", "split-softmax", "steered response", "knockout")
    ]
    together = model.decode(model.copies(model.prefill(prompts, hold_last=True), 4), [Lanes(given)], max_new_tokens=5)
    assert min(ran.count(1), len(written)) >= 5 * model.shape.n_layers
    for lane, interventions in enumerate(given):
        alone = model.decode(model.prefill(prompts, hold_last=True), interventions, max_new_tokens=5)
        assert [one.tokens.tolist() for one in together[lane::4]] == [one.tokens.tolist() for one in alone]


def test_layers_under_hooks_of_others_run_as_before_and_those_around_them_stay_lean(
    tiny_model: fl.FocusModel, samples: Any, ran: list[int]
) -> None:
    prompt, seen = samples[0].prompt(), []
    expected = tiny_model.generate(prompt, max_new_tokens=4, interventions=[fl.SplitSoftmax(HEADS, 0.2)])
    ran.clear()
    hook = ("blocks.1.mlp.hook_post" if not tiny_model.backend.is_bridge else "blocks.1.mlp.hook_out",)
    with tiny_model.hooked.hooks(fwd_hooks=[(hook[0], lambda x, hook: seen.append(tuple(x.shape[:2])))]):
        found = tiny_model.generate(prompt, max_new_tokens=4, interventions=[fl.SplitSoftmax(HEADS, 0.2)])
    assert found.tokens.tolist() == expected.tokens.tolist()
    assert seen.count((1, 1)) == 4
    assert ran.count(1) == 4 * (tiny_model.shape.n_layers - 1)


def test_hooks_of_pytorch_on_any_module_are_called(tiny_model: fl.FocusModel, samples: Any, ran: list[int]) -> None:
    """Also hooks on the whole model, which lean layers would leave out."""
    prompt, hooked = samples[0].prompt(), tiny_model.hooked
    tiny_model.generate(prompt, max_new_tokens=1)
    block = hooked.blocks[1]
    modules = [hooked, block, block.mlp, block.attn, hooked.embed, hooked.unembed, hooked.ln_final]
    modules += [hooked.original_model, hooked.original_model.base_model] if tiny_model.backend.is_bridge else []
    for module in modules:
        calls: list[int] = []
        handle = module.register_forward_hook(lambda *_, calls=calls: calls.append(1))
        try:
            ran.clear()
            tiny_model.generate(prompt, max_new_tokens=3)
        finally:
            handle.remove()
        assert len(calls) >= 3, type(module)
        assert (len(ran) > 0) == (module not in (hooked, *modules[7:])), type(module)


def test_a_hook_on_the_whole_model_at_first_does_not_turn_lean_layers_off_for_good(
    tiny_model: fl.FocusModel, samples: Any, ran: list[int]
) -> None:
    model, prompt = fl.FocusModel(tiny_model.hooked, tiny_model.tokenizer), samples[0].prompt()
    handle = model.hooked.register_forward_hook(lambda *_: None)
    try:
        model.generate(prompt, max_new_tokens=2)
    finally:
        handle.remove()
    n = model.shape.n_layers
    assert ran == [4] * n + [1] * n  # only the comparison of the two paths, without the hook
    ran.clear()
    model.generate(prompt, max_new_tokens=2)
    assert ran


def as_measured(model: fl.FocusModel, prompt: fl.Prompt, interventions: list[Any]) -> list[Any]:
    """The interventions, with what position calibration measures on a prompt that the others have changed."""
    return [
        item.resolve(model, model.prefill(prompt, interventions, hold_last=True))[1]
        if isinstance(item, fl.PositionCalibration)
        else item
        for item in interventions
    ]


PLACES = ("hook_resid_pre", "attn.hook_z", "attn.hook_pattern", "attn.hook_q", "hook_mlp_out")


@settings(
    max_examples=25,
    deadline=None,
    suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow],
    derandomize=True,
)
@given(data=st.data())
@pytest.mark.slow
def test_any_mixture_of_hooks_interventions_and_prompts_gives_plain_transformer_lens(
    data: st.DataObject, load_model: Any, backend: str, samples: Any, ran: list[int]
) -> None:
    """Logits after any response, with hooks of the user in some layers, are those of one pass over the whole text."""
    model = load_model(data.draw(st.sampled_from(MODELS)), backend)
    model.generate(samples[0].prompt(), max_new_tokens=1)
    ran.clear()
    chosen = data.draw(st.lists(st.sampled_from(sorted(INTERVENTIONS)), max_size=2, unique=True))
    interventions = [item for kind in chosen for item in INTERVENTIONS[kind](model.shape.d_head)]
    hooked = data.draw(st.lists(st.tuples(st.integers(0, 2), st.sampled_from(PLACES)), max_size=2, unique=True))
    scale = data.draw(st.floats(0.5, 1.5))
    user = [(f"blocks.{layer}.{place}", lambda x, hook: x * scale) for layer, place in hooked]
    prompts = [samples[i].prompt() for i in data.draw(st.lists(st.integers(0, 3), min_size=1, max_size=3))]
    logits: list[torch.Tensor] = []
    require = ModelRunner._require_numbers
    with pytest.MonkeyPatch.context() as patched, model.hooked.hooks(fwd_hooks=user):
        patched.setattr(ModelRunner, "_require_numbers", lambda self, x: (logits.append(x), require(self, x)))
        prefix = model.prefill(prompts, interventions, hold_last=True)
        found = model.decode(prefix, interventions, max_new_tokens=4, decoding=DecodingSettings((-1,)))
    lean_layers = model.shape.n_layers - len({layer for layer, _ in hooked})
    assert ran.count(1) >= 4 * lean_layers
    for row, (prompt, response) in enumerate(zip(prompts, found, strict=True)):
        encoded = model.encode(prompt)
        tokens = torch.cat((encoded.tokens, response.tokens))[None]
        with model.hooked.hooks(fwd_hooks=user):
            hooks = [hook for item in as_measured(model, prompt, interventions) for hook in item.hooks(model, prompt)]
            plain = model.hooked.run_with_hooks(tokens, fwd_hooks=hooks)[0, len(encoded.tokens) - 1 : -1]
        torch.testing.assert_close(torch.stack(logits)[:, row], plain, atol=3e-4, rtol=0)
