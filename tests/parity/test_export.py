"""An exported checkpoint, run by Hugging Face with the exported code, equals the model steered with rotary hooks."""

from __future__ import annotations

import copy
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import focuslens as fl
from focuslens.directions.checkpoints import export

FAMILIES = (
    "llama",
    "llama_rope",
    "llama_tied",
    "llama_mha",
    "qwen2",
    "qwen2_window",
    "qwen3",
    "mistral",
    "mistral_window",
)
HEADS = (fl.Head(0, 2), fl.Head(2, 0), fl.Head(2, 1))


@pytest.fixture(autouse=True)
def _modules_of_its_own(tmp_path_factory, monkeypatch):
    """Copy the code of checkpoints to a temporary cache instead of the user's cache."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))


def steering(model: fl.FocusModel, alpha: float = 1.0, **settings: Any) -> fl.FocusSteering:
    vectors = torch.randn(len(HEADS), model.shape.d_head, generator=torch.Generator().manual_seed(3))
    site = settings.pop("site", "rotary")
    return fl.FocusSteering(fl.FocusDirections(HEADS, vectors, None, site), alpha, **settings)


def opened(directory: Path, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    loading: Any = AutoModelForCausalLM
    model, info = loading.from_pretrained(
        directory, attn_implementation=attention, dtype=dtype, output_loading_info=True, trust_remote_code=True
    )
    assert not any(info.values()), info  # no weights are missing or unused
    return model.eval()


def logits_of(model: Any, tokens: Any) -> torch.Tensor:
    with torch.no_grad():
        return model(tokens[None]).logits[0]


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_hooks(name, attention, load_model, checkpoint, samples, tmp_path):
    model = load_model(name)
    chosen = steering(model)
    assert export(checkpoint(name), chosen, tmp_path / "out").directory == tmp_path / "out"
    prompt = model.encode(samples[0].prompt())
    exported = logits_of(opened(tmp_path / "out", attention), prompt.tokens)
    torch.testing.assert_close(exported, model.logits(prompt, [chosen]), atol=1e-4, rtol=0)
    assert (exported - model.logits(prompt)).abs().max() > 0.1


@pytest.mark.slow
def test_flex_attention_too(load_model, checkpoint, samples, tmp_path):
    model = load_model("llama")
    chosen = steering(model)
    export(checkpoint("llama"), chosen, tmp_path / "out")
    prompt = model.encode(samples[0].prompt())
    exported = logits_of(opened(tmp_path / "out", "flex_attention"), prompt.tokens)
    torch.testing.assert_close(exported, model.logits(prompt, [chosen]), atol=1e-4, rtol=0)


def test_what_flash_attention_is_given(load_model, checkpoint, samples, tmp_path, monkeypatch):
    """A steered layer has every attribute that Transformers' flash attention reads.

    Flash attention kernels need a GPU, so scaled dot product attention replaces the kernel.
    """
    from transformers.integrations import flash_attention

    model, names = load_model("llama"), list[str]()
    chosen = steering(model)
    export(checkpoint("llama"), chosen, tmp_path / "out")
    steered = opened(tmp_path / "out")

    def kernel(query, key, value, mask, *, attn_implementation, softmax_scale, is_causal, **_: Any):
        names.append(attn_implementation)
        heads = [tensor.transpose(1, 2) for tensor in (query, key, value)]
        out = torch.nn.functional.scaled_dot_product_attention(
            *heads, is_causal=is_causal, scale=softmax_scale, enable_gqa=True
        )
        return out.transpose(1, 2)

    monkeypatch.setattr(flash_attention, "_flash_attention_forward", kernel)
    steered.config._attn_implementation_internal = "flash_attention_2"
    prompt = model.encode(samples[0].prompt())
    exported = logits_of(steered, prompt.tokens)
    assert names == ["flash_attention_2"] * 3
    torch.testing.assert_close(exported, model.logits(prompt, [chosen]), atol=1e-4, rtol=0)


def test_the_attention_can_be_changed_later(load_model, checkpoint, samples, tmp_path):
    model = load_model("qwen2")
    chosen = steering(model)
    export(checkpoint("qwen2"), chosen, tmp_path / "out")
    steered = opened(tmp_path / "out")
    prompt = model.encode(samples[0].prompt())
    steered.set_attn_implementation("eager")
    with torch.no_grad():
        done = steered(prompt.tokens[None], output_attentions=True)
    torch.testing.assert_close(done.logits[0], model.logits(prompt, [chosen]), atol=1e-4, rtol=0)
    assert len(done.attentions) == 3


def test_in_half_precision_the_same_as_hooks(load_model, checkpoint, samples, tmp_path):
    exact, half = load_model("llama"), load_model("llama", dtype="bfloat16")
    chosen = steering(half)
    export(checkpoint("llama"), chosen, tmp_path / "out")
    prompt = half.encode(samples[0].prompt())
    exported = logits_of(opened(tmp_path / "out", dtype=torch.bfloat16), prompt.tokens).float()
    reference = exact.logits(prompt, [chosen])
    rounding = (half.logits(prompt, [chosen]).float() - reference).abs().mean()
    assert (exported - reference).abs().mean() < 1.5 * rounding


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_greedy_texts_are_those_of_the_hooks(name, load_model, checkpoint, samples, tmp_path):
    model = load_model(name)
    chosen = steering(model)
    export(checkpoint(name), chosen, tmp_path / "out")
    steered = opened(tmp_path / "out")
    for sample in samples:
        prompt = model.encode(sample.prompt())
        expected = model.generate(prompt, [chosen], max_new_tokens=8).tokens
        done = steered.generate(prompt.tokens[None], max_new_tokens=8, do_sample=False)
        assert done[0, len(prompt.tokens) :].tolist() == expected.tolist()


def test_left_padded_batches_are_as_one_by_one(load_model, checkpoint, samples, tmp_path):
    model = load_model("llama")
    export(checkpoint("llama"), steering(model), tmp_path / "out")
    steered = opened(tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out", trust_remote_code=True, padding_side="left")
    texts = [str(sample.prompt()) for sample in samples]
    batch = tokenizer(texts, return_tensors="pt", padding=True)
    together = steered.generate(**batch, max_new_tokens=6, do_sample=False)[:, batch["input_ids"].shape[1] :]
    for text, row in zip(texts, together, strict=True):
        one = tokenizer(text, return_tensors="pt")
        alone = steered.generate(**one, max_new_tokens=6, do_sample=False)[0, one["input_ids"].shape[1] :]
        assert row[: len(alone)].tolist() == alone.tolist()


def test_it_can_be_saved_and_copied_as_any_model(load_model, checkpoint, samples, tmp_path):
    model = load_model("llama")
    chosen = steering(model)
    export(checkpoint("llama"), chosen, tmp_path / "out")
    steered = opened(tmp_path / "out")
    tokens = model.encode(samples[0].prompt()).tokens
    expected = logits_of(steered, tokens)
    steered.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(opened(tmp_path / "again"), tokens), expected)
    twin = copy.deepcopy(steered)
    with torch.no_grad():
        for parameter in steered.parameters():
            parameter.zero_()
    assert torch.equal(logits_of(twin, tokens), expected)


def test_the_weights_are_copied_and_the_vectors_lie_beside_them(load_model, checkpoint, tmp_path):
    model = load_model("llama")
    chosen = steering(model, 0.5)
    AutoModelForCausalLM.from_pretrained(checkpoint("llama")).save_pretrained(tmp_path / "base", max_shard_size="60KB")
    (tmp_path / "base" / "pytorch_model.bin").write_bytes(b"other weights")
    done = export(tmp_path / "base", chosen, tmp_path / "out")
    assert done.left_out == ("pytorch_model.bin",)
    names = [path.name for path in (tmp_path / "base").glob("*.safetensors")]
    assert len(names) > 3
    for name in names:
        assert (tmp_path / "out" / name).read_bytes() == (tmp_path / "base" / name).read_bytes()
    vectors = load_file(tmp_path / "out" / "focus_directions.safetensors")
    assert sorted(vectors) == [f"model.layers.{layer}.self_attn.focus_query" for layer in (0, 2)]
    second = torch.zeros(4, 1, model.shape.d_head)
    second[:2, 0] = 0.5 * chosen.directions.query[1:]
    torch.testing.assert_close(vectors["model.layers.2.self_attn.focus_query"], second)
    card = (tmp_path / "out" / "README.md").read_text()
    assert "strength 0.5" in card
    assert "trust_remote_code=True" in card
    record = json.loads((tmp_path / "out" / "focuslens.json").read_text())
    assert record["steering"] == json.loads(json.dumps(chosen.describe()))


@pytest.mark.parametrize("loads", [AutoModelForCausalLM.from_pretrained, fl.FocusModel.from_pretrained])
def test_it_is_not_run_unsteered_by_mistake(loads, load_model, checkpoint, tmp_path):
    export(checkpoint("llama"), steering(load_model("llama")), tmp_path / "out")
    with pytest.raises(ValueError, match="trust_remote_code"):
        loads(str(tmp_path / "out"))


def test_what_cannot_be_exported_is_refused(load_model, checkpoint, tmp_path):
    model = load_model("llama")
    with pytest.raises(ValueError, match="act at the projection site, where they are biases"):
        export(checkpoint("llama"), steering(model, site="projection"), tmp_path / "out")
    with pytest.raises(ValueError, match="does not know where a response begins"):
        export(checkpoint("llama"), steering(model, positions="response"), tmp_path / "out")
    done = export(checkpoint("llama"), steering(model), tmp_path / "done").directory
    with pytest.raises(ValueError, match=r"of the type 'steered_llama'; llama, mistral, .* can be exported$"):
        export(done, steering(model), tmp_path / "out")
    with pytest.raises(FileExistsError, match="is not an empty directory"):
        export(checkpoint("llama"), steering(model), done)
    other = shutil.copytree(checkpoint("llama"), tmp_path / "other")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps(config | {"head_dim": 32}))
    with pytest.raises(ValueError, match="directions have d_head = 16, the model has 32"):
        export(other, steering(model), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["done", "other"]


def test_the_command(load_model, checkpoint, samples, tmp_path, capsys):
    from focuslens.cli.main import main

    model = load_model("mistral_window")
    chosen = steering(model)
    chosen.directions.save(tmp_path / "directions")
    source = str(checkpoint("mistral_window"))
    named = ["export", "--model", source, "--directions", str(tmp_path / "directions"), "--alpha=-0.5", "--top-k", "2"]
    assert main([*named, "--out", str(tmp_path / "out")]) == 0
    assert f"exported 2 heads at alpha = -0.5; wrote {tmp_path / 'out'}" in capsys.readouterr().out
    prompt = model.encode(samples[0].prompt())
    exported = logits_of(opened(tmp_path / "out"), prompt.tokens)
    expected = model.logits(prompt, [fl.FocusSteering(chosen.directions, -0.5, HEADS[:2])])
    torch.testing.assert_close(exported, expected, atol=1e-4, rtol=0)
    assert main([*named, "--site", "projection", "--out", str(tmp_path / "folded")]) == 1
    assert "the directions act at the rotary site, and --site is projection" in capsys.readouterr().err


def test_the_command_adds_biases_to_a_family_without_them(load_model, checkpoint, samples, tmp_path, capsys):
    from focuslens.cli.main import main

    model = load_model("mistral_window")
    noise = torch.randn(2, len(HEADS), model.shape.d_head, generator=torch.Generator().manual_seed(3))
    directions = fl.FocusDirections(HEADS, noise[0], noise[1], "projection")
    directions.save(tmp_path / "directions")
    source, prompt = str(checkpoint("mistral_window")), model.encode(samples[0].prompt())
    named = ["--site", "projection", "--directions", str(tmp_path / "directions"), "--alpha", "0.5"]
    assert main(["export", "--model", source, *named, "--out", str(tmp_path / "out"), "--json"]) == 0
    keys = json.loads(capsys.readouterr().out)["shared_keys"]
    assert keys == [{"layer": 0, "key_value_head": 1, "others": [[0, 3]]}]
    steered = opened(tmp_path / "out")
    expected = model.logits(prompt, [fl.FocusSteering(directions, 0.5)])
    torch.testing.assert_close(logits_of(steered, prompt.tokens), expected, atol=1e-4, rtol=0)
    assert (expected - model.logits(prompt)).abs().max() > 0.1
    steered.save_pretrained(tmp_path / "again")
    assert torch.equal(logits_of(opened(tmp_path / "again"), prompt.tokens), logits_of(steered, prompt.tokens))
    half = opened(tmp_path / "out", dtype=torch.bfloat16)
    assert half.model.layers[0].self_attn.q_proj.bias.dtype == torch.bfloat16
    card = (tmp_path / "out" / "README.md").read_text()
    assert "queries and keys of 3 attention heads as biases" in card
    assert "also read by L0H3" in card
    # Where the family has biases, the same command folds.
    base = load_model("llama")
    assert main(["export", "--model", str(checkpoint("llama")), *named, "--out", str(tmp_path / "folded")]) == 0
    assert "auto_map" not in json.loads((tmp_path / "folded" / "config.json").read_text())
    folded = logits_of(opened(tmp_path / "folded"), prompt.tokens)
    torch.testing.assert_close(folded, base.logits(prompt, [fl.FocusSteering(directions, 0.5)]), atol=1e-4, rtol=0)


def test_directions_with_a_rank_are_refused(load_model, checkpoint, tmp_path):
    plain = steering(load_model("llama")).directions
    matrices = torch.ones(len(HEADS), 16, 2)
    made = fl.FocusDirections(HEADS, plain.query, None, "rotary", u=matrices, v=matrices)
    with pytest.raises(
        ValueError, match=r"the directions have rank 2, .*; steer with FocusSteering, or train with site="
    ):
        export(checkpoint("llama"), fl.FocusSteering(made, 1.0), tmp_path / "out")
    assert not (tmp_path / "out").exists()
