"""Settings that run together in one batch give the same results as each setting alone."""

from __future__ import annotations

import sys
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.hooks import is_row_wise
from focuslens.interventions import Lanes
from focuslens.interventions.rescaling import SpanColumns
from focuslens.model import attention
from tests.support.tiers import first_quick

HEADS = [fl.Head(0, 1), fl.Head(1, 3), fl.Head(1, 0), fl.Head(2, 2)]


def directions(model: fl.FocusModel, site: Any) -> fl.FocusDirections:
    generator = torch.Generator().manual_seed(3)
    query, key = (torch.randn(len(HEADS), model.shape.d_head, generator=generator) for _ in range(2))
    return fl.FocusDirections(HEADS, 4 * query, 4 * key if site == "projection" else None, site)


def settings(model: fl.FocusModel) -> list[list[fl.Intervention]]:
    rotary, projection = (directions(model, site) for site in ("rotary", "projection"))
    return [
        [],
        [fl.SplitSoftmax(HEADS, 0.1)],
        [fl.SplitSoftmax(HEADS[:2], 0.0), fl.SplitSoftmax(HEADS[1:], 30.0, span="question")],
        [fl.SplitSoftmax(HEADS[3:], 1.0)],
        [fl.FocusSteering(rotary, 1.0, positions="response")],
        [fl.FocusSteering(projection, -0.5, HEADS[:3], positions="response"), fl.SplitSoftmax(HEADS, 0.3)],
        [fl.SplitSoftmax(HEADS, 2.0, span=(3, 9)), fl.FocusSteering(rotary, 0.5, HEADS[:1], positions="response")],
        [fl.HeadAblation(HEADS, positions="response")],
        [fl.HeadAblation(HEADS, "knockout", span="relevant"), fl.SplitSoftmax(HEADS, 0.3, span="irrelevant")],
    ]


def changing(model: fl.FocusModel) -> list[list[fl.Intervention]]:
    """Settings that change the prompt. All but the last leave layer 0 unchanged."""
    rotary, projection = (directions(model, site) for site in ("rotary", "projection"))
    upper = HEADS[1:]
    return [
        [fl.FocusSteering(rotary, 1.0, upper)],
        [fl.FocusSteering(rotary, -0.5, upper), fl.SplitSoftmax(HEADS, 0.3)],
        [fl.FocusSteering(projection, 0.5, upper), fl.FocusSteering(rotary, 1.0, upper, positions="response")],
        [fl.HeadAblation(upper)],
        [fl.HeadAblation(upper, "knockout", span="relevant", positions="all")],
        [fl.FocusSteering(rotary, 0.7, HEADS[:2])],
    ]


def rows(model: fl.FocusModel, prefix: Any, interventions: list[fl.Intervention], n: int) -> tuple[Any, torch.Tensor]:
    """Responses, and the last layer's output ``[batch row d_model]`` at the rows that generate them."""
    seen: list[torch.Tensor] = []
    name = f"blocks.{model.shape.n_layers - 1}.hook_resid_post"
    observer: Any = (name, lambda x, hook: seen.append(x[:, -1].clone()))
    made = model.decode(prefix, interventions, max_new_tokens=n, observers=[observer])
    return [one.tokens.tolist() for one in made], torch.stack(seen[:n], dim=1)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral_window"])
def test_every_lane_is_its_setting_alone(name, load_model, backend, samples):
    model = load_model(name, backend)
    model = fl.FocusModel(model.hooked, model.tokenizer, stop_strings=(), stop_tokens=())
    lanes = settings(model)
    prompts = [model.encode(sample.prompt()) for sample in samples[:2]]
    held = model.prefill(prompts, hold_last=True)
    responses, together = rows(model, model.copies(held, len(lanes)), [Lanes(lanes)], 4)
    assert together.shape[0] == 2 * len(lanes)
    for lane, interventions in enumerate(lanes):
        expected, alone = rows(model, held, interventions, 4)
        assert responses[lane :: len(lanes)] == expected
        torch.testing.assert_close(together[lane :: len(lanes)], alone, atol=2e-4, rtol=0)
    # The lanes must differ to show anything.
    assert (together.std(dim=0) > 1e-3).any()
    assert len({tuple(one) for one in responses[: len(lanes)]}) > 3


def test_edits_of_chosen_rows_are_edits_of_all_rows_to_the_last_bit(load_model, samples, monkeypatch):
    model, module = load_model("llama"), sys.modules["focuslens.interventions.split_softmax"]
    prompts = [model.encode(sample.prompt()) for sample in samples[:2]]
    lanes = settings(model)[:4]
    held, kinds, found = model.prefill(prompts, hold_last=True), list[str](), list[torch.Tensor]()
    edit_of = module._edit_of
    monkeypatch.setattr(module, "_edit_of", lambda *given: (kinds.append(type(x := edit_of(*given)).__name__), x)[1])
    for worth in (10**9, 0):
        monkeypatch.setattr(module, "_WORTH_CHOOSING", worth)
        found.append(rows(model, model.copies(held, len(lanes)), [Lanes(lanes)], 4)[1])
    assert kinds == [*["Rescaling"] * (len(kinds) // 2), *["ChosenHeads"] * (len(kinds) // 2)]
    assert torch.equal(*found)


def test_chosen_rows_know_the_columns_of_their_prompts():
    """Spans of two lengths, also where rows have not all keys of the prompts, as in a pass over part of a prompt."""
    inside = torch.tensor([[0, 1, 1, 0, 0, 0], [0, 0, 0, 1, 0, 1]]).bool()
    columns = SpanColumns(inside).of_prompts(torch.tensor([1, 0, 1]))
    for n_keys in (6, 4):
        pattern = torch.rand(3, 1, 1, n_keys)
        within = columns.within(n_keys)
        mass = within.mass(within.taken(pattern.clone()))[:, 0, 0, 0]
        expected = (pattern[:, 0, 0] * inside[[1, 0, 1], :n_keys]).sum(dim=-1)
        torch.testing.assert_close(mass.float(), expected)


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral_window"])
def test_prompts_run_again_from_a_layer_are_prompts_run_from_the_first(name, load_model, backend, samples):
    model = load_model(name, backend)
    model = fl.FocusModel(model.hooked, model.tokenizer, stop_strings=(), stop_tokens=())
    lanes = Lanes(changing(model)[:5])
    prompts = model.batch([model.encode(sample.prompt()) for sample in samples[:2]])
    base = model.prefill(prompts, hold_last=True, keep=[1])
    assert list(base.residuals) == [1]
    again = model.rerun(base, [lanes], copies=5)
    kept = zip(base.cache.layers, again.cache.layers, strict=True)
    shared = [a.segments[0].keys.data_ptr() == b.segments[0].keys.data_ptr() for a, b in kept]
    assert shared == [True, False, False]
    responses, together = rows(model, again, [lanes], 4)
    for lane, interventions in enumerate(changing(model)[:5]):
        on_prompt = [one for one in interventions if one.changes_prompt]
        expected, alone = rows(model, model.prefill(prompts, on_prompt, hold_last=True), interventions, 4)
        assert responses[lane::5] == expected
        torch.testing.assert_close(together[lane::5], alone, atol=2e-4, rtol=0)


def test_the_prompts_keys_are_not_copied(load_model, backend, samples):
    model = load_model("llama", backend)
    held = model.prefill(samples[0].prompt(), hold_last=True)
    copies = model.copies(held, 50)
    pairs = zip(held.cache.layers, copies.cache.layers, strict=True)
    assert all(a.segments[0].keys.data_ptr() == b.segments[0].keys.data_ptr() for a, b in pairs)
    assert (len(copies.batch), copies.mask.shape[0]) == (50, 50)


def test_a_mass_too_small_for_a_factor_in_single_precision(load_model, samples):
    model = load_model("llama")
    prompt = model.encode(samples[0].prompt())
    taus, start = (0.0, 0.5, 1.0), prompt.spans["relevant"][0][0]
    pattern = torch.full((3, model.shape.n_heads, 1, len(prompt.tokens)), 1 / len(prompt.tokens))
    for first, last in prompt.spans["relevant"]:
        pattern[..., first:last] = 0
    pattern /= pattern.sum(dim=-1, keepdim=True)
    pattern[..., start] = 1e-42
    ((_, hook),) = Lanes([[fl.SplitSoftmax([(1, 2)], tau)] for tau in taus]).hooks(model, [prompt] * 3)
    turned: Any = hook(pattern, None)
    assert abs(turned[0, 2, 0, start] - 1) < 1e-6
    for lane, tau in enumerate(taus):
        expected = fl.split_softmax(pattern[lane, 2], (start, start + 1), tau)
        torch.testing.assert_close(turned[lane, 2], expected, rtol=1e-5, atol=1e-9)
        assert torch.equal(turned[lane, :2], pattern[lane, :2])


def test_what_does_not_fit_is_refused(load_model, samples):
    model = load_model("llama")
    held = model.prefill(samples[0].prompt(), hold_last=True)
    with pytest.raises(ValueError, match="changes the prompt's own rows"):
        model.decode(model.copies(held, 2), [Lanes([[], [fl.HeadAblation(HEADS)]])])
    with pytest.raises(ValueError, match="run without interventions and holds its last token back"):
        model.rerun(model.prefill(samples[0].prompt()), [])
    lanes = Lanes([[], [fl.SplitSoftmax(HEADS, 0.2)]])
    with pytest.raises(ValueError, match="there are 2 settings, and the batch has 3 rows"):
        lanes.hooks(model, [samples[0].prompt()] * 3)
    with pytest.raises(KeyError, match="no span 'nowhere'"):
        Lanes([[fl.SplitSoftmax(HEADS, 0.2, span="nowhere")]]).hooks(model, samples[0].prompt())
    assert (lanes.heads, lanes.changes_prompt) == (tuple(HEADS), False)
    assert lanes.describe()["settings"] == [[], [fl.SplitSoftmax(HEADS, 0.2).describe()]]


@pytest.fixture(scope="module")
def alone(load_model, backend, samples) -> list[tuple[fl.Setting, list[str]]]:
    """Settings, and the responses to every sample under each setting alone."""
    model = load_model("llama", backend)
    swept = [fl.Setting(str(i), tuple(chosen)) for i, chosen in enumerate([*settings(model), *changing(model)])]
    swept.insert(3, fl.Setting("gold", (fl.SplitSoftmax(HEADS, 3.0),), case="gold"))
    return [
        (
            setting,
            [
                model.generate(sample.prompt(setting.case), setting.interventions, max_new_tokens=4).text
                for sample in samples
            ],
        )
        for setting in swept
    ]


@pytest.mark.parametrize("budget", [1, 600, 10**6])
def test_a_sweep_is_what_each_setting_gives_alone(budget, alone, load_model, backend, samples):
    model = load_model("llama", backend)
    result = fl.run_sweep(model, samples, [setting for setting, _ in alone], max_new_tokens=4, batch_tokens=budget)
    assert list(result.evaluations) == [setting.name for setting, _ in alone]
    for setting, responses in alone:
        assert list(result[setting.name].responses) == responses


class Louder:
    """An intervention outside the layers, which doubles the embedding."""

    heads, changes_prompt = (), True

    def describe(self) -> dict[str, Any]:
        return {"kind": "louder"}

    def hooks(self, model: Any, prompt: Any = None, *, cursor: Any = None) -> list[Any]:
        return [("hook_embed", lambda x, hook: 2 * x)]


POINTS = ("hook_resid_pre", "hook_resid_post", "attn.hook_rot_k", "attn.hook_k", "attn.hook_z", "ln1.hook_normalized")


@pytest.mark.parametrize("point", first_quick(POINTS, 2))
def test_a_users_own_hook_acts_once_in_a_sweep(point, load_model, backend, samples):
    model = load_model("llama", backend)
    swept = [fl.Setting(str(i), tuple(one)) for i, one in enumerate([*settings(model)[:2], *changing(model)])]
    swept.append(fl.Setting("louder", (Louder(),)))
    swept.append(fl.Setting("nothing", (fl.HeadAblation([]),)))

    def shift(x: torch.Tensor, hook: Any) -> torch.Tensor:
        return x * torch.linspace(-1, 2, x.shape[-1])

    names = [f"blocks.{layer}.{point}" for layer in range(model.shape.n_layers)]
    with model.hooked.hooks(fwd_hooks=[(name, shift) for name in names]):
        result = fl.run_sweep(model, samples[:2], swept, max_new_tokens=4)
        for setting in swept:
            alone = [model.generate(one.prompt(), setting.interventions, max_new_tokens=4).text for one in samples[:2]]
            assert list(result[setting.name].responses) == alone, setting.name
    unhooked = fl.run_sweep(model, samples[:2], swept[:1], max_new_tokens=4)
    assert unhooked["0"].responses != result["0"].responses


def test_lanes_of_a_whole_pass_act_where_their_settings_do(load_model, backend, samples):
    model = load_model("llama", backend)
    steered = [fl.FocusSteering(directions(model, "rotary"), 1.0, positions="response")]
    prompts = [samples[0].prompt()] * 2
    logits = model.prefill(prompts, [Lanes([[], steered])]).logits
    alone = [model.logits(prompts[0], one)[-1] for one in ([], steered)]
    torch.testing.assert_close(logits, torch.stack(alone), atol=1e-4, rtol=0)
    keys = model.prefill(prompts, [Lanes([[], steered])]).cache.layers[2].segments[0].keys
    # Rows before the prompt's last token are unchanged in every lane.
    torch.testing.assert_close(keys[0, :, :-1], keys[1, :, :-1], atol=1e-5, rtol=0)


def test_no_settings_are_refused():
    with pytest.raises(ValueError, match="there are no settings"):
        Lanes([])


def test_lanes_of_prompts_do_with_some_rows_at_a_time(load_model, backend, samples, monkeypatch):
    model = load_model("llama", backend)
    settings = [
        [fl.HeadAblation(HEADS[1:], "knockout", span=span, positions="all")] for span in ("relevant", "question")
    ]
    lanes, prompts = Lanes(settings), [samples[0].prompt()] * 2
    assert all(is_row_wise(hook) for _, hook in lanes.hooks(model, prompts))
    whole = [one.text for one in model.generate(prompts, [lanes], max_new_tokens=4)]
    monkeypatch.setattr(attention, "BLOCK", 5 * 2 * model.shape.n_heads * len(model.encode(prompts[0]).tokens))
    assert [one.text for one in model.generate(prompts, [lanes], max_new_tokens=4)] == whole


@pytest.mark.parametrize("shared", [True, False])
def test_settings_run_together_only_as_far_as_their_keys_are_shared_or_fit(
    shared, load_model, backend, samples, monkeypatch
):
    model, copies = load_model("llama", backend), []
    if not shared:
        monkeypatch.setattr(
            model.hooked.cfg, "use_attn_result", True
        )  # with TransformerLens's attention, keys are copied per setting
    original = model.copies
    monkeypatch.setattr(model, "copies", lambda prefix, n: copies.append(n) or original(prefix, n))
    swept = [fl.Setting(str(tau), (fl.SplitSoftmax(HEADS, tau),)) for tau in (0.1, 0.2, 0.3, 0.4, 0.5)]
    budget = 2 * len(model.encode(samples[0].prompt()).tokens)
    fl.run_sweep(model, samples[:1], swept, max_new_tokens=2, batch_tokens=budget)
    assert copies == ([5] if shared else [2, 2, 1])
