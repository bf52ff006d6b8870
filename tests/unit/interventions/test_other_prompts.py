"""Hooks that depend on a prompt run on this prompt and its continuations, and refuse all other tokens."""

from __future__ import annotations

import copy
import pickle
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.interventions.lanes import Lanes
from focuslens.model.running_tokens import RunningTokens
from tests.support.versions import needs_hooked

OTHER = "these hooks are for another prompt"
PROMPT = fl.EncodedPrompt(torch.arange(5, 25), {"relevant": ((3, 9),)})
SHORT = fl.EncodedPrompt(torch.arange(40, 52), {"relevant": ((2, 5),)})


def steering(positions: Any = "response") -> fl.FocusSteering:
    return fl.FocusSteering(fl.FocusDirections([(1, 2)], torch.ones(1, 16)), 3.0, positions=positions)


INTERVENTIONS: dict[str, Any] = {
    "split-softmax": fl.SplitSoftmax([(1, 2)], 0.1),
    "knockout": fl.HeadAblation([(1, 2)], "knockout", span="relevant"),
    "knockout, all rows": fl.HeadAblation([(1, 2)], "knockout", span="relevant", positions="all"),
    "zero, response": fl.HeadAblation([(1, 2)], positions="response"),
    "steering, response": steering(),
    "one setting": Lanes([[fl.SplitSoftmax([(1, 2)], 0.1)]]),
    "one setting of an ablation": Lanes([[fl.HeadAblation([(1, 2)], positions="response")]]),
    "one setting of steering": Lanes([[steering()]]),
}


def generated(model: fl.FocusModel, tokens: torch.Tensor, hooks: list[Any], *, cache: bool) -> list[int]:
    with model.hooked.hooks(fwd_hooks=hooks):
        out = model.hooked.generate(
            tokens, max_new_tokens=3, do_sample=False, use_past_kv_cache=cache, stop_at_eos=False, verbose=False,
            return_type="tokens",
        )  # fmt: skip
    return out[0].tolist()


@pytest.mark.parametrize("kind", list(INTERVENTIONS))
def test_hooks_run_on_their_prompt_and_what_follows_it_alone(tiny_model, kind):
    model, hooks = tiny_model, INTERVENTIONS[kind].hooks(tiny_model, PROMPT)
    tokens, response = PROMPT.tokens[None], torch.tensor([[7, 7, 30]])
    model.hooked.run_with_hooks(tokens, fwd_hooks=hooks)
    model.hooked.run_with_hooks(torch.cat((tokens, response), dim=1), fwd_hooks=hooks)
    assert generated(model, tokens, hooks, cache=True) == generated(model, tokens, hooks, cache=False)
    same_length, longer, last = tokens.clone(), torch.cat((tokens[:, 1:], response), dim=1), tokens.clone()
    same_length[0, 4], last[0, -1] = 60, 61
    for other in (same_length, longer, last, torch.cat((response, tokens), dim=1)):
        with pytest.raises(ValueError, match=OTHER):
            model.hooked.run_with_hooks(other, fwd_hooks=hooks)
        with pytest.raises(ValueError, match=OTHER):
            generated(model, other, hooks, cache=True)
        with pytest.raises(ValueError, match=OTHER), model.hooked.hooks(fwd_hooks=hooks):
            model.hooked(other)
    # A refusal leaves nothing behind.
    model.hooked.run_with_hooks(tokens, fwd_hooks=hooks)


@pytest.mark.parametrize("kind", [kind for kind in INTERVENTIONS if "setting" not in kind])
def test_prompts_of_a_batch_in_another_order_are_refused(tiny_model, kind):
    model, batch = tiny_model, fl.PromptBatch.of([PROMPT, SHORT])
    hooks, mask = INTERVENTIONS[kind].hooks(model, batch), batch.mask()
    for pad in (0, 9):
        model.hooked.run_with_hooks(batch.tokens(pad), fwd_hooks=hooks, attention_mask=mask)
    with pytest.raises(
        ValueError, match=r"token 0 of their prompt 0 \(counted from 0\) is 5, and the pass runs 0 there"
    ):
        model.hooked.run_with_hooks(batch.tokens(0).flip(0), fwd_hooks=hooks, attention_mask=mask.flip(0))
    padded_right = torch.cat((SHORT.tokens, torch.zeros(8, dtype=torch.long)))
    with pytest.raises(ValueError, match=r"token 0 of their prompt 1 \(counted from 0\) is 40"):
        model.hooked.run_with_hooks(torch.stack((PROMPT.tokens, padded_right)), fwd_hooks=hooks)


def test_copies_for_settings_know_their_own_rows(tiny_model):
    """The lanes of one batch hold different interventions; each compares the rows of its own prompts."""
    lanes = Lanes([[INTERVENTIONS["zero, response"]], [INTERVENTIONS["knockout"]]])
    batch = fl.PromptBatch.of([PROMPT, SHORT]).repeated(2)
    hooks, tokens = lanes.hooks(tiny_model, batch), batch.tokens(0)
    tiny_model.hooked.run_with_hooks(tokens, fwd_hooks=hooks, attention_mask=batch.mask())
    for row in range(4):
        changed = tokens.clone()
        changed[row, -2] = 63
        with pytest.raises(ValueError, match=OTHER):
            tiny_model.hooked.run_with_hooks(changed, fwd_hooks=hooks, attention_mask=batch.mask())


def test_chunks_with_a_cursor_are_compared_with_their_part_of_the_prompt(tiny_model):
    cursor = fl.Cursor(0)
    hooks = fl.SplitSoftmax([(1, 2)], 0.1).hooks(tiny_model, PROMPT, cursor=cursor)
    tiny_model.hooked.run_with_hooks(PROMPT.tokens[None, :8], fwd_hooks=hooks)
    with pytest.raises(ValueError, match="token 0 of their prompt is 5, and the pass runs 13"):
        tiny_model.hooked.run_with_hooks(PROMPT.tokens[None, 8:], fwd_hooks=hooks)


def test_several_rows_after_a_cache_are_not_taken_for_the_prompt(tiny_model):
    """Queries have no key axis. As many rows as a short prompt has were taken for the prompt itself."""
    hooks = steering().hooks(tiny_model, fl.EncodedPrompt(torch.arange(5, 8), {}))
    with pytest.raises(ValueError, match=OTHER):
        tiny_model.hooked.run_with_hooks(torch.tensor([[20, 21, 22, 23]]), fwd_hooks=hooks)


def test_observers_beside_a_prompt_that_is_not_run_are_refused(tiny_model):
    observers = [("blocks.2.attn.hook_z", lambda z, hook: None)]
    split = [fl.SplitSoftmax([(1, 2)], 0.1)]
    tiny_model.observe(PROMPT.tokens, observers, split, prompt=PROMPT)
    with pytest.raises(ValueError, match=OTHER):
        tiny_model.observe(PROMPT.tokens.flip(0), observers, split, prompt=PROMPT)


def test_hooks_without_a_prompt_run_on_anything(tiny_model):
    for one in (fl.HeadAblation([(1, 2)]), steering("all")):
        tiny_model.hooked.run_with_hooks(SHORT.tokens[None], fwd_hooks=one.hooks(tiny_model, PROMPT))


def test_tokens_are_forgotten_when_a_pass_has_ended(tiny_model):
    """A pass that begins after the embedding is not compared with the tokens of an earlier one."""
    model, hooks = tiny_model, fl.SplitSoftmax([(1, 2)], 0.1).hooks(tiny_model, PROMPT)
    for run in (
        lambda: model.hooked(PROMPT.tokens[None].flip(1)),
        lambda: model.observe(PROMPT.tokens.flip(0), [("blocks.0.attn.hook_z", lambda z, hook: None)]),
        lambda: model.generate(PROMPT, max_new_tokens=1),
    ):
        run()
        assert RunningTokens.of(model.hooked)._tokens is None
    if not model.backend.is_bridge:
        residual = model.hooked(PROMPT.tokens[None], stop_at_layer=1)
        model.hooked(SHORT.tokens[None])
        model.hooked.run_with_hooks(residual, start_at_layer=1, fwd_hooks=hooks)


def test_gradients_pass_through_checked_hooks(tiny_model):
    hooks = fl.SplitSoftmax([(1, 2)], 0.1).hooks(tiny_model, PROMPT)
    with torch.enable_grad():
        logits = tiny_model.hooked.run_with_hooks(PROMPT.tokens[None], fwd_hooks=hooks)
        (gradient,) = torch.autograd.grad(logits[0, -1].max(), [next(tiny_model.hooked.parameters())])
    assert gradient.abs().sum() > 0


def test_a_model_has_one_record_which_goes_along_with_copies(checkpoint, backend):
    model = fl.FocusModel.from_pretrained(str(checkpoint("llama")), backend=backend, device="cpu")
    record = RunningTokens.of(model.hooked)
    assert fl.FocusModel(model.hooked, model.tokenizer)._running is record
    assert len(model.hooked.embed._forward_pre_hooks) == 1
    assert isinstance(pickle.loads(pickle.dumps(record)), RunningTokens)
    if backend == "hooked":
        twin = fl.FocusModel(copy.deepcopy(model.hooked), model.tokenizer)
        assert twin._running is not record
        hooks = fl.SplitSoftmax([(1, 2)], 0.1).hooks(twin, PROMPT)
        with pytest.raises(ValueError, match=OTHER):
            twin.hooked.run_with_hooks(PROMPT.tokens[None].flip(1), fwd_hooks=hooks)


def test_a_static_cache_is_refused(load_model):
    model = load_model("llama", "bridge")
    tokens = PROMPT.tokens[None]
    for intervention in (fl.SplitSoftmax([(1, 2)], 0.1), INTERVENTIONS["knockout"]):
        for cache in ("static", None):
            settings = {"max_new_tokens": 30, "do_sample": False, "cache_implementation": cache}
            with model.hooked.hooks(fwd_hooks=intervention.hooks(model, PROMPT)):
                if cache is None:
                    model.hooked.hf_generate(tokens, **settings)
                    continue
                with pytest.raises(ValueError, match="the last key of this pass is masked, as in a static cache"):
                    model.hooked.hf_generate(tokens, **settings)


@needs_hooked
def test_a_pass_from_a_layer_on_is_not_taken_for_the_pass_before_it(load_model):
    """Activation patching: the residuals of one prompt, after a pass of another that stopped early."""
    model = load_model("llama", "hooked")
    other = torch.arange(105, 125)[None]
    hooks = INTERVENTIONS["split-softmax"].hooks(model, PROMPT)
    residual = model.hooked(PROMPT.tokens[None], stop_at_layer=1)
    expected = model.hooked.run_with_hooks(residual, start_at_layer=1, fwd_hooks=hooks)
    model.hooked(other, stop_at_layer=1)
    found = model.hooked.run_with_hooks(residual, start_at_layer=1, fwd_hooks=hooks)
    torch.testing.assert_close(found, expected, atol=0, rtol=0)
    with pytest.raises(ValueError, match=OTHER):
        model.hooked.run_with_hooks(other, fwd_hooks=hooks)
