"""The attention engine gives the numbers and hooks of plain TransformerLens, and computes patterns only when hooked."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import focuslens as fl
from focuslens.hooks import row_wise
from focuslens.model import attention, kernels

# The tolerance covers a different order of summation in float32: a few units in the last place for logits of about 10.
TOLERANCE = 1e-4
MODELS = ("llama", "qwen2", "qwen3", "mistral_window")


@pytest.fixture
def kernel(monkeypatch):
    """Shapes of the queries in calls of the fused kernel."""
    calls = []
    original = nn.functional.scaled_dot_product_attention

    def count(q, *args, **kwargs):
        calls.append(tuple(q.shape))
        return original(q, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", count)
    return calls


@pytest.mark.parametrize("name", MODELS)
def test_logits_are_those_of_plain_transformer_lens(name, load_model, backend, samples, kernel):
    model = load_model(name, backend)
    kernel.clear()  # the comparison with the plain model, when a checkpoint is loaded, calls the kernel too
    tokens = model.to_tokens(samples[0].prompt())
    plain = model.hooked(tokens)
    assert kernel == []
    fused = model.logits(tokens)
    # A model with a sliding window calls the kernel in pieces that are no longer than the window.
    longest = model.backend.window(0) or tokens.shape[1]
    assert len(kernel) >= model.shape.n_layers
    assert all(shape[2] <= longest for shape in kernel)
    assert sum(shape[2] for shape in kernel) == model.shape.n_layers * tokens.shape[1]
    torch.testing.assert_close(fused, plain[0], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_a_padded_batch_with_a_cache_gives_the_logits_of_each_prompt_alone(name, load_model, backend, samples):
    model = load_model(name, backend)
    prompts = [fl.EncodedPrompt(torch.arange(5, 8), {}), *(sample.prompt() for sample in samples)]
    new = torch.arange(5, 11).repeat(len(prompts), 1)
    logits, _ = model.extend(model.prefill(prompts), new)
    for i, prompt in enumerate(prompts):
        alone = model.hooked(torch.cat((model.to_tokens(prompt), new[:1]), dim=1))[0, -6:]
        torch.testing.assert_close(logits[i], alone, atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("name", MODELS)
def test_a_long_response_spans_many_segments(name, load_model, backend, samples, monkeypatch):
    monkeypatch.setattr(attention, "SEALED", 4)
    model = load_model(name, backend)
    prompt, new = samples[0].prompt(), torch.arange(5, 25)[None]
    prefix = model.prefill(prompt)
    parts = []
    for piece in new.split(3, dim=1):
        logits, prefix = model.extend(prefix, piece)
        parts.append(logits)
    assert len(prefix.cache.layers[0].segments) > 3
    expected = model.hooked(torch.cat((model.to_tokens(prompt), new), dim=1))[:, -20:]
    torch.testing.assert_close(torch.cat(parts, dim=1), expected, atol=TOLERANCE, rtol=0)


POINTS = ("q", "k", "v", "rot_q", "rot_k", "attn_scores", "pattern", "z")


@pytest.mark.parametrize("name", MODELS)
def test_every_hook_fires_with_the_same_value(name, load_model, backend, samples):
    model = load_model(name, backend)
    tokens = model.to_tokens(samples[0].prompt())
    names = [f"blocks.1.attn.hook_{point}" for point in POINTS] + ["blocks.1.hook_resid_post"]
    _, plain = model.hooked.run_with_cache(tokens, names_filter=names)
    fused = {}
    with model.hooked.hooks(
        fwd_hooks=[(one, lambda x, hook, one=one: fused.update({one: x.clone()})) for one in names]
    ):
        model.logits(tokens)
    for one in names:
        # At masked positions, the bridge has the most negative number and the engine has minus infinity.
        expected = plain[one].where(plain[one] > -1e30, -torch.inf)
        torch.testing.assert_close(fused[one], expected, atol=TOLERANCE, rtol=0)


def halve(tensor, hook):
    result = tensor.clone()
    result[:, 1] = tensor[:, 1] / 2
    return result


def stretch(tensor, hook):
    return tensor * torch.linspace(-1, 2, tensor.shape[-1])


EDITS = [("pattern", halve), ("attn_scores", halve), *((point, stretch) for point in ("rot_k", "rot_q", "k", "v"))]


@pytest.mark.parametrize(("point", "edit"), EDITS)
def test_what_a_hook_returns_counts_with_and_without_a_cache(point, edit, load_model, backend, samples):
    model = load_model("llama", backend)
    prompt, new = samples[0].prompt(), torch.arange(5, 9)[None]
    tokens = torch.cat((model.to_tokens(prompt), new), dim=1)
    hooks = [(f"blocks.{layer}.attn.hook_{point}", edit) for layer in range(model.shape.n_layers)]
    plain = model.hooked.run_with_hooks(tokens, fwd_hooks=hooks)[0]
    assert not torch.allclose(plain, model.hooked(tokens)[0], atol=0.1)
    with model.hooked.hooks(fwd_hooks=hooks):
        torch.testing.assert_close(model.logits(tokens), plain, atol=TOLERANCE, rtol=0)
        logits, _ = model.extend(model.prefill(prompt), new)
    torch.testing.assert_close(logits[0], plain[-4:], atol=TOLERANCE, rtol=0)


@pytest.mark.parametrize("point", ["hook_pattern", "hook_attn_scores"])
def test_only_a_layer_that_somebody_looks_at_is_computed_in_full(point, load_model, backend, samples, kernel):
    model = load_model("llama", backend)
    seen = []
    hook = (f"blocks.1.attn.{point}", lambda tensor, hook: seen.append(tuple(tensor.shape)))
    tokens = model.to_tokens(samples[0].prompt())
    with model.hooked.hooks(fwd_hooks=[hook]):
        model.logits(tokens)
    assert seen == [(1, model.shape.n_heads, tokens.shape[1], tokens.shape[1])]
    assert len(kernel) == model.shape.n_layers - 1


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("point", ["hook_pattern", "hook_attn_scores"])
def test_hooks_that_can_do_with_some_rows_get_blocks_of_them(name, point, load_model, backend, samples, monkeypatch):
    model = load_model(name, backend)
    tokens = model.to_tokens(samples[0].prompt())
    length, n_heads = tokens.shape[1], model.shape.n_heads
    monkeypatch.setattr(attention, "BLOCK", 7 * n_heads * length)
    seen = []

    @row_wise
    def note_and_halve(tensor, hook):
        seen.append(tuple(tensor.shape))
        return halve(tensor, hook)

    hooks = [(f"blocks.1.attn.{point}", halve)]
    plain = model.hooked.run_with_hooks(tokens, fwd_hooks=hooks)[0]
    with model.hooked.hooks(fwd_hooks=[(f"blocks.1.attn.{point}", note_and_halve)]):
        torch.testing.assert_close(model.logits(tokens), plain, atol=TOLERANCE, rtol=0)
    assert seen == [(1, n_heads, min(7, length - s), min(s + 7, length)) for s in range(0, length, 7)]
    # If one hook needs all rows, every hook receives all rows.
    seen.clear()
    with model.hooked.hooks(
        fwd_hooks=[(f"blocks.1.attn.{point}", hook) for hook in (note_and_halve, lambda t, hook: t)]
    ):
        torch.testing.assert_close(model.logits(tokens), plain, atol=TOLERANCE, rtol=0)
    assert seen == [(1, n_heads, length, length)]


@pytest.mark.parametrize("name", MODELS)
def test_interventions_in_blocks_of_rows_are_interventions(name, load_model, backend, samples, monkeypatch):
    model = load_model(name, backend)
    prompt = samples[0].prompt()
    heads = [(layer, head) for layer in range(2) for head in range(2)]
    cut = fl.HeadAblation(heads, "knockout", span="relevant", positions="all")
    interventions = [cut, fl.SplitSoftmax(heads, 0.2)]
    once = model.logits(prompt, interventions)
    monkeypatch.setattr(attention, "BLOCK", 5 * model.shape.n_heads * len(model.encode(prompt).tokens))
    torch.testing.assert_close(model.logits(prompt, interventions), once, atol=TOLERANCE, rtol=0)


def test_half_precision_stays_within_its_rounding(load_model, backend, samples, kernel):
    exact, half = (load_model("llama", backend, dtype=dtype) for dtype in ("float32", "bfloat16"))
    kernel.clear()
    tokens = exact.to_tokens(samples[0].prompt())
    truth = exact.hooked(tokens)[0]
    plain_error = (half.hooked(tokens)[0].float() - truth).abs().mean()
    fused_error = (half.logits(tokens).float() - truth).abs().mean()
    assert len(kernel) == half.shape.n_layers
    assert 0 < fused_error < 1.2 * plain_error


def test_an_exception_leaves_everything_as_it_was(load_model, backend, samples):
    model = load_model("llama", backend)

    def stop(tensor, hook):
        assert any("forward" in vars(block.attn) for block in model.hooked.blocks)
        raise RuntimeError("stop")

    tokens = model.to_tokens(samples[0].prompt())
    before = model.hooked(tokens)
    with pytest.raises(RuntimeError, match="stop"), model.hooked.hooks(fwd_hooks=[("blocks.1.attn.hook_z", stop)]):
        model.logits(tokens)
    assert not any("forward" in vars(block.attn) for block in model.hooked.blocks)
    assert torch.equal(model.hooked(tokens), before)


@pytest.mark.parametrize("spoil", ["a setting", "a replaced forward"])
def test_what_is_not_plain_attention_is_left_to_transformer_lens(
    spoil, load_model, backend, samples, kernel, monkeypatch
):
    model = load_model("llama", backend)
    if spoil == "a setting":
        monkeypatch.setattr(model.hooked.cfg, "use_attn_result", True)
    else:
        layer = model.hooked.blocks[1].attn
        monkeypatch.setitem(vars(layer), "forward", layer.forward)
    prompt = samples[0].prompt()
    torch.testing.assert_close(model.logits(prompt), model.hooked(model.to_tokens(prompt))[0], atol=TOLERANCE, rtol=0)
    responses = model.generate([prompt, samples[1].prompt()], max_new_tokens=3)
    held = model.copies(model.prefill(prompt, hold_last=True), 2)
    assert {one.text for one in model.decode(held, max_new_tokens=3)} == {responses[0].text}
    assert kernel == []
    monkeypatch.undo()
    fused = model.generate([prompt, samples[1].prompt()], max_new_tokens=3)
    assert [one.text for one in fused] == [one.text for one in responses]


def passes(model, monkeypatch):
    """Number of rows of every forward pass."""
    rows = []

    def count(original):
        def run(tokens, *args, **kwargs):
            rows.append(tokens.shape[1])
            return original(tokens, *args, **kwargs)

        return run

    for name in ("forward", "fill", "embed"):  # lean passes begin with the embedding
        monkeypatch.setattr(model.backend, name, count(getattr(model.backend, name)))
    return rows


EARLY = ("attn.hook_q", "attn.hook_k", "attn.hook_v", "attn.hook_rot_q", "attn.hook_rot_k", "hook_resid_pre")
LATE = ("attn.hook_z", "attn.hook_pattern", "hook_attn_out", "mlp.hook_post", "hook_mlp_out", "hook_resid_post")


@pytest.mark.parametrize("point", [*EARLY, *LATE])
def test_a_prompt_stops_at_the_last_keys_unless_somebody_looks_further(point, load_model, backend, samples, kernel):
    model = load_model("llama", backend)
    prompt, seen = samples[0].prompt(), []
    expected = model.generate(prompt, max_new_tokens=3)
    kernel.clear()
    last, length = model.shape.n_layers - 1, len(model.encode(prompt).tokens)
    hook = (f"blocks.{last}.{point}", lambda x, hook: seen.append(x.shape[-2 if "pattern" in point else 1]))
    with model.hooked.hooks(fwd_hooks=[hook]):
        response = model.generate(prompt, max_new_tokens=3)
    assert seen[0] == length - 1
    assert response.text == expected.text
    assert len(kernel) == model.shape.n_layers - (point in EARLY or "pattern" in point)


@pytest.mark.parametrize("point", [*EARLY, *LATE])
def test_observing_a_layer_runs_no_later_one(point, load_model, backend, samples, kernel):
    model, layer, seen = load_model("llama", backend), 1, []
    tokens = model.encode(samples[0].prompt()).tokens
    name = f"blocks.{layer}.{point}"
    model.points.require_firing([name])  # the passes of this check must not be counted below
    kernel.clear()
    model.observe(tokens, [(name, lambda x, hook: seen.append(x.clone()))])
    assert len(kernel) == layer + (point not in EARLY and "pattern" not in point)
    model.observe(tokens, [(name, lambda x, hook: seen.append(x.clone())), ("hook_embed", lambda x, hook: None)])
    assert len(kernel) >= model.shape.n_layers
    assert torch.equal(*seen)


def test_split_softmax_writes_out_the_rows_of_the_response_alone(load_model, backend, samples, kernel, monkeypatch):
    model = load_model("llama", backend)
    prompt, seen = samples[0].prompt(), []
    split = fl.SplitSoftmax([(1, 2)], 0.2)
    model.generate(prompt, [split], max_new_tokens=2)
    kernel.clear()
    rows = passes(model, monkeypatch)
    monkeypatch.setattr(attention, "BLOCK", 0)
    with model.hooked.hooks(fwd_hooks=[("blocks.1.attn.hook_z", lambda z, hook: seen.append(z.shape[1]))]):
        response = model.generate(prompt, [split], max_new_tokens=3)
    length = len(model.encode(prompt).tokens)
    assert len(kernel) == model.shape.n_layers - 1
    assert rows == seen == [length - 1, *[1] * len(response.tokens)]


def test_scores_come_out_of_the_generation_that_is_done_anyway(load_model, backend, samples, monkeypatch):
    model = load_model("llama", backend)
    model = fl.FocusModel(model.hooked, model.tokenizer, stop_strings=(), stop_tokens=())
    fl.contextual_scores(model, samples[:1], max_new_tokens=1)
    rows = passes(model, monkeypatch)
    fl.contextual_scores(model, samples[:1], max_new_tokens=3)
    # The first row after the prefill is that of the last prompt token, followed by one row per response token.
    assert rows == [len(model.encode(samples[0].prompt()).tokens) - 1, 1, 1, 1, 1]


UNASKED = (
    *("hook_pattern", "hook_attn_scores"),  # fire only when hooked, see above
    *("hook_mlp_in", "hook_attn_in", "hook_q_input", "hook_k_input", "hook_v_input", "hook_result"),  # off by default
)


@pytest.mark.parametrize("name", MODELS)
def test_exactly_the_hook_points_of_plain_transformer_lens_fire(name, load_model, backend, samples):
    """Each hook point fires as often and with the same shapes as in plain TransformerLens."""
    model = load_model(name, backend)
    tokens = model.to_tokens(samples[0].prompt())

    def fired(run):
        seen = []
        points = [point for point in model.hooked.hook_dict if point.rsplit(".", 1)[-1] not in UNASKED]
        hooks = [(point, lambda x, hook: seen.append((hook.name, tuple(getattr(x, "shape", ()))))) for point in points]
        with model.hooked.hooks(fwd_hooks=hooks):
            run()
        return sorted(seen)

    assert fired(lambda: model.logits(tokens)) == fired(lambda: model.hooked(tokens))


@pytest.mark.parametrize("kind", ["register_forward_pre_hook", "register_full_backward_hook", "register_forward_hook"])
def test_whoever_looks_at_a_pattern_in_whatever_way_gets_one(kind, load_model, backend, samples, kernel):
    model = load_model("llama", backend)
    point = model.hooked.blocks[1].attn.hook_pattern
    handle = getattr(point, kind)(lambda *arguments: None)
    try:
        model.logits(samples[0].prompt())
    finally:
        handle.remove()
    assert len(kernel) == model.shape.n_layers - 1


@pytest.mark.parametrize("point", ["hook_pattern", "hook_attn_scores"])
def test_a_plain_hook_sees_the_models_own_dtype_and_looking_changes_nothing(point, load_model, backend, samples):
    model, seen = load_model("llama", backend, dtype="bfloat16"), []
    prompt, name = samples[0].prompt(), f"blocks.1.attn.{point}"

    def logits(*hooks):
        with model.hooked.hooks(fwd_hooks=[(name, hook) for hook in hooks]):
            return model.logits(prompt)

    exact = logits(row_wise(lambda x, hook: seen.append(x.dtype)))
    assert torch.equal(logits(lambda x, hook: seen.append(x.dtype)), exact)
    assert seen == [torch.float32, torch.bfloat16]
    assert not torch.equal(logits(lambda x, hook: x / 2), exact)

    def in_place(x, hook):
        x.mul_(0.5)

    torch.testing.assert_close(logits(in_place), logits(lambda x, hook: x * 0.5))


def test_a_window_of_keys_is_all_that_a_piece_of_the_prompt_reads(load_model, backend, samples, monkeypatch):
    model, keys = load_model("mistral_window", backend), []
    original = nn.functional.scaled_dot_product_attention

    def note(q, k, *args, **kwargs):
        keys.append(k.shape[2])
        return original(q, k, *args, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", note)
    model.logits(samples[0].prompt())
    assert max(keys) < 2 * model.backend.window(0) < len(model.encode(samples[0].prompt()).tokens)


@pytest.mark.parametrize("window", [None, 5])
def test_where_no_kernel_reads_grouped_keys_each_query_head_gets_its_own(window, monkeypatch):
    q, k, v = torch.randn(2, 4, 12, 8), torch.randn(2, 2, 12, 8), torch.randn(2, 2, 12, 8)
    expected = kernels.causal(q, k, v, window, 0.3)
    heads, original = [], nn.functional.scaled_dot_product_attention

    def note(q, k, v, *, enable_gqa, **kwargs):
        heads.append((k.shape[1], enable_gqa))
        return original(q, k, v, enable_gqa=enable_gqa, **kwargs)

    monkeypatch.setattr(nn.functional, "scaled_dot_product_attention", note)
    monkeypatch.setattr(kernels, "_kernel_groups", lambda device, dtype, masked: False)
    torch.testing.assert_close(kernels.causal(q, k, v, window, 0.3), expected, atol=1e-6, rtol=0)
    assert set(heads) == {(4, False)}


def test_grouped_keys_are_read_as_they_are_where_a_kernel_does_so():
    half, single = torch.bfloat16, torch.float32
    cases = {("cpu", single, True): True, ("cuda", half, False): True, ("cuda", half, True): False}
    cases |= {("cuda", single, False): False, ("mps", single, False): False}
    for (device, dtype, masked), grouped in cases.items():
        assert kernels._kernel_groups(device, dtype, masked=masked) == grouped
