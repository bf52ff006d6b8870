"""A folded checkpoint, run by Hugging Face alone, equals the model steered with hooks."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import focuslens as fl
from focuslens.directions.checkpoints import fold

FAMILIES = ("llama", "llama_bias", "llama_rope", "llama_tied", "llama_mha", "qwen2", "qwen2_window", "qwen3", "mistral")
HEADS = (fl.Head(0, 2), fl.Head(1, 1), fl.Head(2, 0), fl.Head(2, 1))


def steering(
    model: fl.FocusModel, alpha: float = 1.5, *, keys: bool = True, heads: Any = HEADS, site: Any = "projection"
):
    noise = torch.randn(2, len(heads), model.shape.d_head, generator=torch.Generator().manual_seed(3))
    return fl.FocusSteering(fl.FocusDirections(heads, noise[0], noise[1] if keys else None, site), alpha)


def opened(directory: Path, attention: str = "sdpa", dtype: torch.dtype = torch.float32) -> Any:
    loading: Any = AutoModelForCausalLM
    model, info = loading.from_pretrained(
        directory, attn_implementation=attention, dtype=dtype, output_loading_info=True
    )
    assert not any(info.values()), info  # no weights are missing or unused
    return model.eval()


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
@pytest.mark.parametrize("name", FAMILIES)
def test_logits_are_those_of_the_hooks(name, attention, load_model, checkpoint, samples, tmp_path):
    model = load_model(name)
    chosen = steering(model)
    done = fold(checkpoint(name), chosen, tmp_path / "out")
    assert done.directory == tmp_path / "out"
    prompt = model.encode(samples[0].prompt())
    with torch.no_grad():
        folded = opened(tmp_path / "out", attention)(prompt.tokens[None]).logits[0]
    torch.testing.assert_close(folded, model.logits(prompt, [chosen]), atol=1e-4, rtol=0)
    assert (folded - model.logits(prompt)).abs().max() > 0.1


def ranked(model: fl.FocusModel, alpha: float = 1.5) -> fl.FocusSteering:
    """Steering by directions of rank 2."""
    plain, generator = steering(model).directions, torch.Generator().manual_seed(4)
    u, v = (torch.randn(len(HEADS), model.shape.d_head, 2, generator=generator) / 3 for _ in range(2))
    return fl.FocusSteering(fl.FocusDirections(HEADS, plain.query, plain.key, "projection", u=u, v=v), alpha)


@pytest.mark.parametrize("name", FAMILIES)
def test_a_rank_is_folded_into_the_weight_of_the_queries(name, load_model, checkpoint, samples, tmp_path):
    model = load_model(name)
    chosen = ranked(model)
    fold(checkpoint(name), chosen, tmp_path / "out")
    prompt = model.encode(samples[0].prompt())
    with torch.no_grad():
        folded = opened(tmp_path / "out")(prompt.tokens[None]).logits[0]
    torch.testing.assert_close(folded, model.logits(prompt, [chosen]), atol=3e-4, rtol=0)
    constant = fl.FocusDirections(HEADS, chosen.directions.query, chosen.directions.key, "projection")
    assert (folded - model.logits(prompt, [fl.FocusSteering(constant, 1.5)])).abs().max() > 0.1
    # All other weights are those of the base. Only layers with steered heads change, and only in their rows.
    old, new = (load_file(folder / "model.safetensors") for folder in (checkpoint(name), tmp_path / "out"))
    weights = {f"model.layers.{layer}.self_attn.q_proj.weight" for layer, _ in HEADS}
    assert {
        tensor for tensor in old if not tensor.endswith(".bias") and not torch.equal(old[tensor], new[tensor])
    } == weights
    d_head = model.shape.d_head
    for layer in range(3):
        changed = (
            old[f"model.layers.{layer}.self_attn.q_proj.weight"] != new[f"model.layers.{layer}.self_attn.q_proj.weight"]
        ).any(dim=1)
        steered = {head for where, head in HEADS if where == layer}
        assert {int(row) // d_head for row in changed.nonzero()} == steered
    assert "at rank 2, in the weights of `q_proj`" in (tmp_path / "out" / "README.md").read_text()


def test_a_rank_in_shards_of_half_precision_is_not_rounded(load_model, checkpoint, samples, tmp_path):
    plain: Any = AutoModelForCausalLM.from_pretrained(checkpoint("qwen2"), dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "half", max_shard_size="40KB")
    shutil.copyfile(checkpoint("qwen2") / "tokenizer.json", tmp_path / "half" / "tokenizer.json")
    model = fl.FocusModel.from_pretrained(str(tmp_path / "half"), device="cpu", dtype="float32")
    chosen = ranked(model)
    fold(tmp_path / "half", chosen, tmp_path / "out")
    tokens = load_model("qwen2").encode(samples[0].prompt()).tokens
    with torch.no_grad():
        folded = opened(tmp_path / "out")(tokens[None]).logits[0]
    torch.testing.assert_close(folded, model.logits(tokens, [chosen]), atol=3e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_in_half_precision_within_its_rounding(name, load_model, checkpoint, samples, tmp_path):
    exact, half = load_model(name), load_model(name, dtype="bfloat16")
    plain: Any = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "half")
    chosen = steering(half)
    fold(tmp_path / "half", chosen, tmp_path / "out")
    prompt = half.encode(samples[0].prompt())
    with torch.no_grad():
        folded = opened(tmp_path / "out", dtype=torch.bfloat16)(prompt.tokens[None]).logits[0].float()
    reference = exact.logits(prompt, [chosen])
    rounding = (half.logits(prompt, [chosen]).float() - reference).abs().mean()
    assert (folded - reference).abs().mean() < 1.5 * rounding


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_vectors_are_not_rounded_to_the_dtype_of_the_weights(name, load_model, checkpoint, samples, tmp_path):
    plain: Any = AutoModelForCausalLM.from_pretrained(checkpoint(name), dtype=torch.bfloat16)
    plain.save_pretrained(tmp_path / "half")
    shutil.copyfile(checkpoint(name) / "tokenizer.json", tmp_path / "half" / "tokenizer.json")
    config = json.loads((tmp_path / "half" / "config.json").read_text())
    (tmp_path / "half" / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "dtype"}))
    model = fl.FocusModel.from_pretrained(str(tmp_path / "half"), device="cpu", dtype="float32")
    chosen = steering(model)
    fold(tmp_path / "half", chosen, tmp_path / "out")
    tokens = load_model(name).encode(samples[0].prompt()).tokens
    with torch.no_grad():
        folded = opened(tmp_path / "out")(tokens[None]).logits[0]
    torch.testing.assert_close(folded, model.logits(tokens, [chosen]), atol=1e-4, rtol=0)
    own: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert own.dtype == torch.bfloat16  # dtype of the weights before folding


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_greedy_texts_are_those_of_the_hooks(name, load_model, checkpoint, samples, tmp_path):
    model = load_model(name)
    chosen = steering(model)
    fold(checkpoint(name), chosen, tmp_path / "out")
    folded = fl.FocusModel.from_pretrained(str(tmp_path / "out"), device="cpu", stop_strings=())
    for sample in samples:
        expected = model.generate(sample.prompt(), [chosen], max_new_tokens=8).tokens
        assert torch.equal(folded.generate(sample.prompt(), max_new_tokens=8).tokens, expected)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_shards_keep_every_weight_and_get_their_own_biases(name, load_model, checkpoint, samples, tmp_path):
    model = load_model(name)
    AutoModelForCausalLM.from_pretrained(checkpoint(name)).save_pretrained(tmp_path / "sharded", max_shard_size="60KB")
    names = sorted(path.name for path in (tmp_path / "sharded").glob("*.safetensors"))
    assert len(names) > 3
    chosen = steering(model)
    fold(tmp_path / "sharded", chosen, tmp_path / "out")
    assert sorted(path.name for path in (tmp_path / "out").glob("*.safetensors")) == names
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())
    old = {name: load_file(tmp_path / "sharded" / name) for name in names}
    new = {name: load_file(tmp_path / "out" / name) for name in names}
    held = {tensor: shard for shard, tensors in new.items() for tensor in tensors}
    assert index["weight_map"] == held
    assert index["metadata"]["total_size"] == sum(t.nbytes for tensors in new.values() for t in tensors.values())
    for shard, tensors in old.items():
        for tensor, value in tensors.items():
            changed = tensor.endswith(("q_proj.bias", "k_proj.bias"))
            assert changed or torch.equal(new[shard][tensor], value)
        assert (
            safe_open(tmp_path / "out" / shard, "pt").metadata()
            == safe_open(tmp_path / "sharded" / shard, "pt").metadata()
        )
    prompt = model.encode(samples[0].prompt())
    with torch.no_grad():
        folded = opened(tmp_path / "out")(prompt.tokens[None]).logits[0]
    torch.testing.assert_close(folded, model.logits(prompt, [chosen]), atol=1e-4, rtol=0)


@pytest.mark.parametrize("name", ["llama", "qwen2", "mistral"])
def test_projections_of_one_layer_may_lie_in_different_shards(name, load_model, checkpoint, samples, tmp_path):
    base = shutil.copytree(checkpoint(name), tmp_path / "base")
    tensors = load_file(base / "model.safetensors")
    (base / "model.safetensors").unlink()
    parts, homes = [dict[str, torch.Tensor]() for _ in range(3)], dict[str, str]()
    for place, (tensor, value) in enumerate(sorted(tensors.items())):
        number = next((i for i, kind in enumerate(("q_proj.", "k_proj.")) if kind in tensor), place % 3)
        parts[number][tensor] = value
        homes[tensor] = f"model-0000{number}.safetensors"
    for number, part in enumerate(parts):
        save_file(part, base / f"model-0000{number}.safetensors", metadata={"format": "pt"})
    (base / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": homes}))
    model = load_model(name)
    chosen = steering(model)
    fold(base, chosen, tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model.safetensors.index.json").read_text())["weight_map"]
    for layer in range(3):
        for number, kind in enumerate(("q_proj", "k_proj")):
            bias = f"model.layers.{layer}.self_attn.{kind}.bias"
            assert index[bias] == f"model-0000{number}.safetensors"
            assert bias in load_file(tmp_path / "out" / index[bias])
    prompt = model.encode(samples[0].prompt())
    with torch.no_grad():
        folded = opened(tmp_path / "out")(prompt.tokens[None]).logits[0]
    torch.testing.assert_close(folded, model.logits(prompt, [chosen]), atol=1e-4, rtol=0)


def test_it_says_whose_keys_are_shared_with_heads_not_chosen(load_model, checkpoint, tmp_path):
    model = load_model("llama")
    done = fold(checkpoint("llama"), steering(model), tmp_path / "a")
    assert [str(one) for one in done.shared] == [
        "the key vector of L0H2 is also read by L0H3",
        "the key vector of L1H1 is also read by L1H0",
    ]
    assert "also read by L0H3" in (tmp_path / "a" / "README.md").read_text()
    assert fold(checkpoint("llama"), steering(model, keys=False), tmp_path / "b").shared == ()
    assert fold(checkpoint("llama_mha"), steering(load_model("llama_mha")), tmp_path / "c").shared == ()


def test_the_card_keeps_that_of_the_base_and_other_weights_stay_behind(load_model, checkpoint, tmp_path):
    base = shutil.copytree(checkpoint("llama"), tmp_path / "base")
    (base / "README.md").write_text("---\nlicense: mit\n---\n\n# The base\n\nIts text.\n")
    (base / "pytorch_model.bin").write_bytes(b"other weights")
    (base / "consolidated.safetensors").write_bytes(b"other weights")
    (base / "merges.txt").write_text("a b\n")
    chosen = steering(load_model("llama"))
    done = fold(base, chosen, tmp_path / "out")
    assert done.left_out == ("consolidated.safetensors", "pytorch_model.bin")
    card = (tmp_path / "out" / "README.md").read_text()
    assert card.startswith("---\nlicense: mit\n---\n\n# With focus directions folded in\n")
    assert card.endswith("# The base\n\nIts text.\n")
    assert "strength 1.5" in card
    assert "L0H2, L1H1, L2H0, L2H1" in card
    assert (tmp_path / "out" / "merges.txt").read_text() == "a b\n"
    record = json.loads((tmp_path / "out" / "focuslens.json").read_text())
    assert record["steering"] == json.loads(json.dumps(chosen.describe()))


def changed(config: dict[str, Any], directory: Path, checkpoint: Path) -> Path:
    shutil.copytree(checkpoint, directory)
    whole = json.loads((directory / "config.json").read_text()) | config
    (directory / "config.json").write_text(json.dumps(whole))
    return directory


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "gpt2"}, r"of the type 'gpt2'; llama, mistral, qwen2, qwen3, .* can be folded$"),
        (
            {"model_type": "gemma2"},
            "is a LlamaForCausalLM; of the type 'gemma2' only a Gemma2ForCausalLM can be folded",
        ),
        ({"model_type": "phi3"}, r"of the type 'phi3'; .*; use export, .* \(focuslens export --site projection\)"),
        ({"quantization_config": {"bits": 4}}, "are quantized"),
        ({"auto_map": {"AutoModelForCausalLM": "x.y"}}, "has its own code"),
        (
            {"model_type": "mistral", "architectures": ["MistralForCausalLM"], "sliding_window": 24},
            "a sliding window of 24 tokens",
        ),
        ({"num_hidden_layers": 2}, r"head \(2, 0\) does not exist"),
        ({"head_dim": 32}, "directions have d_head = 16, the model has 32"),
    ],
)
def test_what_cannot_be_folded_is_refused_by_name(config, message, load_model, checkpoint, tmp_path):
    base = changed(config, tmp_path / "base", checkpoint("llama"))
    with pytest.raises(ValueError, match=message):
        fold(base, steering(load_model("llama")), tmp_path / "out")
    assert not (tmp_path / "out").exists()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base"]


def test_what_a_configuration_leaves_unsaid_is_what_its_class_takes(load_model, checkpoint, samples, tmp_path):
    """Folding refuses a Mistral configuration without ``sliding_window``, whose default is a window of 4,096 tokens."""
    base = shutil.copytree(checkpoint("mistral"), tmp_path / "base")
    config = json.loads((base / "config.json").read_text())
    silent = {key: value for key, value in config.items() if key not in ("sliding_window", "max_position_embeddings")}
    (base / "config.json").write_text(json.dumps(silent))
    model = load_model("mistral")
    with pytest.raises(ValueError, match="a sliding window of 4096 tokens"):
        fold(base, steering(model), tmp_path / "out")
    (base / "config.json").write_text(json.dumps(silent | {"sliding_window": None}))
    fold(base, steering(model), tmp_path / "out")
    prompt = model.encode(samples[0].prompt())
    with torch.no_grad():
        folded = opened(tmp_path / "out")(prompt.tokens[None]).logits[0]
    torch.testing.assert_close(folded, model.logits(prompt, [steering(model)]), atol=1e-4, rtol=0)


def test_the_one_file_comes_before_an_index_as_in_hugging_face(load_model, checkpoint, tmp_path):
    base = shutil.copytree(checkpoint("llama"), tmp_path / "base")
    other: Any = AutoModelForCausalLM.from_pretrained(checkpoint("llama_tied"))
    other.save_pretrained(tmp_path / "other", max_shard_size="60KB")
    for path in (tmp_path / "other").glob("model*"):
        shutil.copyfile(path, base / path.name)
    fold(base, steering(load_model("llama")), tmp_path / "out")
    new, old = load_file(tmp_path / "out" / "model.safetensors"), load_file(base / "model.safetensors")
    assert all(torch.equal(new[name], tensor) for name, tensor in old.items())
    assert not (tmp_path / "out" / "model.safetensors.index.json").exists()


def test_steering_that_is_no_bias_is_refused(load_model, checkpoint, tmp_path):
    model = load_model("llama")
    with pytest.raises(ValueError, match="act at the rotary site"):
        fold(checkpoint("llama"), steering(model, site="rotary"), tmp_path / "out")
    chosen = steering(model)
    with pytest.raises(ValueError, match="a bias acts at all positions"):
        fold(checkpoint("llama"), fl.FocusSteering(chosen.directions, 1.0, positions="response"), tmp_path / "out")


def test_what_is_not_there_or_not_whole_is_refused(load_model, checkpoint, tmp_path):
    chosen, base = steering(load_model("llama")), shutil.copytree(checkpoint("llama"), tmp_path / "base")
    with pytest.raises(FileNotFoundError, match="neither a directory nor a model on the hub"):
        fold(tmp_path / "nowhere", chosen, tmp_path / "out")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine").write_text("kept")
    with pytest.raises(FileExistsError, match="is not an empty directory"):
        fold(base, chosen, full)
    assert (full / "mine").read_text() == "kept"
    weights = (base / "model.safetensors").read_bytes()
    (base / "model.safetensors").write_bytes(weights[:-10])
    with pytest.raises(ValueError, match="it was cut off"):
        fold(base, chosen, tmp_path / "out")
    (base / "model.safetensors").write_bytes(b"0123456789")
    with pytest.raises(ValueError, match="is not a safetensors file"):
        fold(base, chosen, tmp_path / "out")
    (base / "model.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match="holds neither"):
        fold(base, chosen, tmp_path / "out")
    (base / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match="is it a Hugging Face checkpoint"):
        fold(base, chosen, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_the_command_folds_the_best_heads_of_a_ranking(load_model, checkpoint, samples, tmp_path, capsys):
    from focuslens.cli.main import main

    model = load_model("llama")
    directions = steering(model).directions
    directions.save(tmp_path / "directions")
    ranking = [HEADS[2], fl.Head(1, 3), HEADS[0], HEADS[1]]  # the second head has no direction
    (tmp_path / "heads.json").write_text(json.dumps({"heads": [list(head) for head in ranking]}))
    named = ["fold", "--model", str(checkpoint("llama")), "--directions", str(tmp_path / "directions"), "--alpha=-0.5"]
    assert main([*named, "--top-k", "2", "--heads", str(tmp_path / "heads.json"), "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "layer 0: the key vector of L0H2 is also read by L0H3" in said
    assert f"folded 2 heads at alpha = -0.5; wrote {tmp_path / 'out'}" in said
    prompt = model.encode(samples[0].prompt())
    with torch.no_grad():
        folded = opened(tmp_path / "out")(prompt.tokens[None]).logits[0]
    chosen = fl.FocusSteering(directions, -0.5, [HEADS[2], HEADS[0]])
    torch.testing.assert_close(folded, model.logits(prompt, [chosen]), atol=1e-4, rtol=0)
    assert main([*named, "--out", str(tmp_path / "out")]) == 1
    assert "is not an empty directory" in capsys.readouterr().err
