"""Results on a GPU equal those on the CPU, and fused attention on a GPU uses memory linear in the length."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.data.synthetic import build_tokenizer

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")

# The tolerances cover float32 products in a different order of summation. TF32 is off by default in torch.
LOGITS, MASS = 1e-3, 1e-4
FAMILIES = ("llama", "qwen2", "qwen3", "mistral_window")
HEADS = (fl.Head(0, 2), fl.Head(1, 1), fl.Head(2, 0), fl.Head(2, 3))


@pytest.fixture(params=FAMILIES)
def pair(request, load_model, backend):
    """The same model on the CPU and on the GPU."""
    return load_model(request.param, backend), load_model(request.param, backend, device="cuda")


def directions(model: fl.FocusModel, site: Any = "rotary") -> fl.FocusDirections:
    noise = torch.randn(len(HEADS), model.shape.d_head, generator=torch.Generator().manual_seed(3))
    return fl.FocusDirections(heads=HEADS, query=noise, key=None if site == "rotary" else noise.flip(0), site=site)


def interventions(model: fl.FocusModel) -> dict[str, tuple[Any, ...]]:
    projection = directions(model, "projection")
    return {
        "none": (),
        "split": (fl.SplitSoftmax(HEADS, 0.2),),
        "rotary": (fl.FocusSteering(directions(model), 2.0),),
        "projection": (fl.FocusSteering(projection, 1.0, positions="all"),),
        "ablation": (fl.HeadAblation(HEADS[:2]),),
        "attention": (fl.HeadAblation(HEADS[2:], "knockout", span="relevant"),),
        "both": (fl.FocusSteering(directions(model), -1.0), fl.SplitSoftmax(HEADS[:2], 5.0)),
    }


def test_it_runs_there(pair):
    on_cpu, on_gpu = pair
    assert on_cpu.backend.device.type == "cpu"
    assert on_gpu.backend.device.type == "cuda"
    assert on_gpu.prefill(["some words"]).cache.layers[0].segments[0].keys.is_cuda


def test_logits(pair, samples):
    on_cpu, on_gpu = pair
    for name, chosen in interventions(on_cpu).items():
        prompt = on_cpu.encode(samples[0].prompt())
        given = on_gpu.logits(prompt, chosen).cpu()
        torch.testing.assert_close(
            given, on_cpu.logits(prompt, chosen), atol=LOGITS, rtol=0, msg=lambda m, n=name: n + m
        )


def test_scores_and_responses_of_a_padded_batch(pair, samples):
    scores = [fl.contextual_scores(model, samples, max_new_tokens=5) for model in pair]
    assert scores[0].responses == scores[1].responses
    for kind in ("relevant", "irrelevant_max", "sink"):
        torch.testing.assert_close(scores[1].mean(kind), scores[0].mean(kind), atol=MASS, rtol=0)


def test_a_sweep(pair, samples):
    made = []
    for model in pair:
        swept = [fl.Setting(name, chosen) for name, chosen in interventions(model).items()]
        sweep = fl.run_sweep(model, samples, swept, max_new_tokens=4)
        made.append({name: one.responses for name, one in sweep.evaluations.items()})
    assert made[0] == made[1]
    assert len({tuple(one) for one in made[0].values()}) > 2


def test_recorded_passes_give_what_passes_give(pair, samples, recwarn):
    _, model = pair
    swept = [fl.Setting(name, chosen) for name, chosen in interventions(model).items()]
    found: list[Any] = []
    for compiled in (False, True):
        model.compile = compiled
        scores = fl.contextual_scores(model, samples, max_new_tokens=5)
        sweep = fl.run_sweep(model, samples, swept, max_new_tokens=4)
        found.append((scores, {name: one.responses for name, one in sweep.evaluations.items()}))
    model.compile = False
    assert not [one for one in recwarn if "compile=True" in str(one.message)]
    (plain, responses), (recorded, again) = found
    assert (again, recorded.responses) == (responses, plain.responses)
    torch.testing.assert_close(recorded.mean("relevant"), plain.mean("relevant"), atol=MASS, rtol=0)


@pytest.mark.parametrize("site", ["rotary", "projection"])
def test_training(pair, samples, site):
    settings: dict[str, Any] = {"epochs": 2, "learning_rate": 0.02, "site": site, "max_new_tokens": 3}
    on_cpu, on_gpu = (fl.train_focus_directions(model, samples[:2], HEADS, **settings) for model in pair)
    torch.testing.assert_close(on_gpu.losses, on_cpu.losses, atol=MASS, rtol=0)
    torch.testing.assert_close(on_gpu.query, on_cpu.query, atol=1e-2, rtol=0)
    assert on_gpu.query.device.type == "cpu"


def test_keys(pair, samples):
    on_cpu, on_gpu = (
        fl.collect_keys(model, [model.encode(one.prompt()) for one in samples[:2]], HEADS) for model in pair
    )
    for head in HEADS:
        torch.testing.assert_close(on_gpu[head].contents, on_cpu[head].contents, atol=LOGITS, rtol=0)


@pytest.fixture(scope="module")
def wide(tmp_path_factory):
    """A random Llama with grouped keys, wide enough for a GPU's fused kernels."""
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer, folder = build_tokenizer(), tmp_path_factory.mktemp("wide")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1024, num_hidden_layers=3, num_attention_heads=8,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=40000, bos_token_id=1, eos_token_id=2,
        pad_token_id=0, initializer_range=0.05,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def peak(run: Any) -> int:
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_memory_is_linear_in_the_length(wide, backend, dtype):
    model = fl.FocusModel.from_pretrained(str(wide), backend=backend, device="cuda", dtype=dtype)
    taken = {}
    for length in (2048, 8192, 32768):
        tokens = torch.randint(10, 1000, (length,), generator=torch.Generator().manual_seed(1))
        prompt = fl.EncodedPrompt(tokens, {"relevant": ((100, 200),)})
        model.generate(prompt, [fl.SplitSoftmax(HEADS[:2], 0.2)], max_new_tokens=3)
        taken[length] = peak(
            lambda prompt=prompt: model.generate(prompt, [fl.SplitSoftmax(HEADS[:2], 0.2)], max_new_tokens=3)
        )
    assert taken[8192] < 5 * taken[2048]
    assert taken[32768] < 5 * taken[8192]
    # A single head's full pattern in one layer would need at least this much.
    assert taken[32768] < 32768**2


def test_a_batch_that_does_not_fit_is_halved(wide, backend, samples, monkeypatch):
    model = fl.FocusModel.from_pretrained(str(wide), backend=backend, device="cuda")
    alone = fl.contextual_scores(model, samples, max_new_tokens=3)
    run, sizes = model.prefill, []

    def small(prompts, *args, **kwargs):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            torch.empty(2**50, device="cuda")
        return run(prompts, *args, **kwargs)

    monkeypatch.setattr(model, "prefill", small)
    with pytest.warns(UserWarning, match="memory ran out on 4 prompts"):
        halved = fl.contextual_scores(model, samples, max_new_tokens=3)
    assert sizes[0] == len(samples)
    assert max(sizes[1:]) <= 2
    assert halved.responses == alone.responses
    torch.testing.assert_close(halved.mean(), alone.mean(), atol=MASS, rtol=0)
