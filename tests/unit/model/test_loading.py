"""Checkpoints loaded as TransformerLens models: no weight processing, no caps, and no guesses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GemmaConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen3Config,
)

from focuslens import (
    FocusDirections,
    FocusModel,
    FocusSteering,
    Setting,
    contextual_scores,
    run_sweep,
    train_focus_directions,
)
from focuslens.model import loading
from focuslens.model.decoding_settings import DecodingSettings
from focuslens.model.hooked_weights import hooked_config, hooked_state_dict
from focuslens.model.loading import load_tokenizer, open_checkpoint, original_tokenizer
from tests.support.checkpoints import multidoc_samples
from tests.support.versions import HAS_HOOKED, needs_hooked

SIZES: dict[str, Any] = {
    "vocab_size": 40,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def config(cls: Any, architecture: str, **settings: Any) -> Any:
    return cls(**{**SIZES, "architectures": [architecture], **settings})


def llama(**settings: Any) -> Any:
    return config(LlamaConfig, "LlamaForCausalLM", **settings)


def converted(hf_config: Any, **arguments: Any) -> Any:
    return hooked_config(hf_config, device="cpu", **cast("Any", {"dtype": torch.float32, **arguments}))


# --- configuration ---


@needs_hooked
def test_sizes_and_context_are_the_checkpoints_own() -> None:
    cfg = converted(llama(max_position_embeddings=131_072, rms_norm_eps=3e-7, hidden_act="silu"))
    assert (cfg.n_layers, cfg.d_model, cfg.n_heads, cfg.n_key_value_heads) == (4, 16, 4, 2)
    assert (cfg.d_head, cfg.rotary_dim, cfg.d_mlp, cfg.d_vocab) == (4, 4, 24, 40)
    assert cfg.n_ctx == 131_072
    assert (cfg.eps, cfg.act_fn, cfg.normalization_type, cfg.gated_mlp) == (3e-7, "silu", "RMS", True)
    assert (cfg.use_qk_norm, cfg.use_local_attn, cfg.rotary_adjacent_pairs) == (False, False, False)
    assert converted(llama(max_position_embeddings=131_072), n_ctx=512).n_ctx == 512
    assert converted(llama(num_key_value_heads=4)).n_key_value_heads is None
    assert converted(llama(), dtype=torch.bfloat16).dtype == torch.bfloat16


@needs_hooked
def test_head_size_may_differ_from_width_over_heads() -> None:
    cfg = converted(config(Qwen3Config, "Qwen3ForCausalLM", head_dim=10))
    assert (cfg.d_head, cfg.rotary_dim, cfg.use_qk_norm) == (10, 10, True)
    assert converted(config(MistralConfig, "MistralForCausalLM", head_dim=6)).d_head == 6


@needs_hooked
@pytest.mark.parametrize(
    ("hf_config", "expected"),
    [
        (config(MistralConfig, "MistralForCausalLM", sliding_window=None), (False, None, None)),
        (config(MistralConfig, "MistralForCausalLM", sliding_window=7), (True, 7, ["local"] * 4)),
        (config(Qwen2Config, "Qwen2ForCausalLM", sliding_window=7, use_sliding_window=False), (False, None, None)),
        (
            config(Qwen2Config, "Qwen2ForCausalLM", sliding_window=7, use_sliding_window=True, max_window_layers=3),
            (True, 7, ["global", "global", "global", "local"]),
        ),
    ],
)
def test_sliding_windows_are_kept_layer_by_layer(hf_config: Any, expected: tuple[Any, ...]) -> None:
    cfg = converted(hf_config)
    assert (cfg.use_local_attn, cfg.window_size, cfg.attn_types) == expected


def rope(**parameters: Any) -> Any:
    return llama(rope_parameters={"rope_theta": 500_000.0, **parameters})


@needs_hooked
def test_rotary_settings_are_kept() -> None:
    default = converted(rope(rope_type="default"))
    assert (default.rotary_base, default.use_NTK_by_parts_rope, default.rotary_scaling_factor) == (500_000, False, 1.0)
    linear = converted(rope(rope_type="linear", factor=4.0))
    assert (linear.rotary_base, linear.rotary_scaling_factor) == (500_000, 4.0)
    llama3 = converted(
        rope(
            rope_type="llama3",
            factor=32.0,
            low_freq_factor=1.5,
            high_freq_factor=3.5,
            original_max_position_embeddings=8192,
        )
    )
    assert llama3.use_NTK_by_parts_rope
    assert (llama3.NTK_by_parts_factor, llama3.NTK_original_ctx_len) == (32.0, 8192)
    assert (llama3.NTK_by_parts_low_freq_factor, llama3.NTK_by_parts_high_freq_factor) == (1.5, 3.5)


@needs_hooked
def test_what_cannot_be_opened_is_refused_by_name() -> None:
    with pytest.raises(ValueError, match=r"GemmaForCausalLM cannot be opened .* open it with backend='bridge'"):
        converted(config(GemmaConfig, "GemmaForCausalLM"))
    with pytest.raises(ValueError, match="unknown cannot be opened"):
        converted(llama(architectures=None))
    with pytest.raises(ValueError, match=r"rotary scaling 'yarn' is not supported .* backend='bridge'"):
        converted(rope(rope_type="yarn", factor=4.0, original_max_position_embeddings=64))


# --- weights ---

HEAD_SHAPES = {"q": (4, 16, 4), "k": (2, 16, 4), "v": (2, 16, 4)}


def state_of(hf_config: Any) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model = LlamaForCausalLM(hf_config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_()
    return model.state_dict()


@needs_hooked
def test_every_weight_is_the_files_own() -> None:
    hf_config = llama(attention_bias=True, tie_word_embeddings=False)
    state = state_of(hf_config)
    weights = hooked_state_dict(dict(state), converted(hf_config))
    assert torch.equal(weights["embed.W_E"], state["model.embed_tokens.weight"])
    assert torch.equal(weights["unembed.W_U"], state["lm_head.weight"].T)
    assert torch.equal(weights["ln_final.w"], state["model.norm.weight"])
    layer, block = "model.layers.2.", "blocks.2."
    assert torch.equal(weights[block + "ln1.w"], state[layer + "input_layernorm.weight"])
    assert torch.equal(weights[block + "ln2.w"], state[layer + "post_attention_layernorm.weight"])
    for part, name in (("gate", "W_gate"), ("up", "W_in"), ("down", "W_out")):
        assert torch.equal(weights[f"{block}mlp.{name}"], state[f"{layer}mlp.{part}_proj.weight"].T)
    for part, name in (("q", "_Q"), ("k", "_K"), ("v", "_V")):
        weight, bias = (state[f"{layer}self_attn.{part}_proj.{kind}"] for kind in ("weight", "bias"))
        grouped = "_" if part in "kv" else ""
        for head in range(HEAD_SHAPES[part][0]):
            rows = slice(4 * head, 4 * head + 4)
            assert torch.equal(weights[f"{block}attn.{grouped}W{name}"][head], weight[rows].T)
            assert torch.equal(weights[f"{block}attn.{grouped}b{name}"][head], bias[rows])
    for head in range(4):
        expected = state[layer + "self_attn.o_proj.weight"][:, 4 * head : 4 * head + 4].T
        assert torch.equal(weights[block + "attn.W_O"][head], expected)
    assert torch.equal(weights[block + "attn.b_O"], state[layer + "self_attn.o_proj.bias"])
    assert not weights[block + "mlp.b_in"].any()
    assert not weights["unembed.b_U"].any()


@needs_hooked
def test_tied_embeddings_serve_twice() -> None:
    hf_config = llama(tie_word_embeddings=True)
    state = {name: weight for name, weight in state_of(hf_config).items() if name != "lm_head.weight"}
    weights = hooked_state_dict(state, converted(hf_config))
    assert torch.equal(weights["unembed.W_U"], state["model.embed_tokens.weight"].T)
    assert not weights["blocks.0.attn.b_Q"].any()
    assert weights["blocks.0.attn._b_K"].shape == (2, 4)


@needs_hooked
def test_heads_that_share_no_keys_have_ungrouped_names() -> None:
    hf_config = llama(num_key_value_heads=4)
    weights = hooked_state_dict(state_of(hf_config), converted(hf_config))
    assert weights["blocks.0.attn.W_K"].shape == (4, 16, 4)
    assert "blocks.0.attn._W_K" not in weights


@needs_hooked
def test_a_parameter_without_a_place_is_refused() -> None:
    state = state_of(llama())
    cfg = converted(llama())
    with pytest.raises(ValueError, match=r"'model.layers.0.self_attn.sinks' has no place in a HookedTransformer"):
        hooked_state_dict({**state, "model.layers.0.self_attn.sinks": torch.zeros(4)}, cfg)
    with pytest.raises(ValueError, match=r"gate_proj.bias': a bias on the MLP's gate has no place"):
        hooked_state_dict(state_of(llama(mlp_bias=True)), cfg)
    frequencies = {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.zeros(2)}  # part of old checkpoints
    assert hooked_state_dict({**state, **frequencies}, cfg).keys() == hooked_state_dict(state, cfg).keys()


# --- whole checkpoints ---


def eager_logits(directory: Path, tokens: torch.Tensor) -> torch.Tensor:
    model: Any = AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager")
    with torch.no_grad():
        return model(tokens[None]).logits[0]


@needs_hooked
@pytest.mark.parametrize(
    "settings",
    [
        {"tie_word_embeddings": True, "attention_bias": True},
        {"num_key_value_heads": 4, "rope_parameters": {"rope_type": "linear", "rope_theta": 1000.0, "factor": 2.5}},
        {"num_key_value_heads": 1, "head_dim": 6, "hidden_act": "gelu"},
    ],
)
def test_a_hooked_checkpoint_gives_the_logits_of_transformers(
    tmp_path: Path, checkpoint: Any, settings: dict[str, Any]
) -> None:
    torch.manual_seed(1)
    hf_config = llama(vocab_size=420, initializer_range=0.3, max_position_embeddings=64, **settings)
    model = LlamaForCausalLM(hf_config)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith("bias"):
                parameter.normal_()
    model.save_pretrained(tmp_path)
    AutoTokenizer.from_pretrained(checkpoint("llama")).save_pretrained(tmp_path)
    tokens = torch.arange(5, 45)
    ours = FocusModel.from_pretrained(str(tmp_path), device="cpu", backend="hooked").logits(tokens)
    expected = eager_logits(tmp_path, tokens)
    torch.testing.assert_close(ours, expected, rtol=1e-4, atol=1e-4)
    assert float(expected.std()) > 0.1


@pytest.mark.parametrize("word", ["llama", "gemma", "Meta-Llama-3-olmo"])
def test_words_in_a_local_path_mean_nothing(
    tmp_path: Path, checkpoint: Any, load_model: Any, backend: str, word: str
) -> None:
    directory = tmp_path / word / f"my-{word}-model"
    shutil.copytree(checkpoint("qwen2"), directory)
    model = FocusModel.from_pretrained(str(directory), device="cpu", backend=backend)  # pyright: ignore[reportArgumentType]
    tokens = torch.arange(5, 45)
    assert torch.equal(model.logits(tokens), load_model("qwen2", backend).logits(tokens))
    assert torch.equal(model.encode("Hello.").tokens, load_model("qwen2", backend).encode("Hello.").tokens)


def test_context_is_whole_unless_told_otherwise(load_model: Any, backend: str) -> None:
    model = load_model("llama", backend)
    assert model.shape.n_ctx == 1024
    assert load_model("llama", backend, n_ctx=256).shape.n_ctx == 256


def test_the_tokenizer_stays_the_checkpoints_own(load_model: Any, backend: str, checkpoint: Any) -> None:
    own: Any = AutoTokenizer.from_pretrained(checkpoint("qwen2"))
    tokenizer = load_model("qwen2", backend).tokenizer
    assert tokenizer.bos_token is None
    assert (tokenizer.padding_side, tokenizer.pad_token) == (own.padding_side, own.pad_token)
    assert tokenizer("text")["input_ids"] == own("text")["input_ids"]


@needs_hooked
def test_weights_that_do_not_fit_are_refused(tmp_path: Path, checkpoint: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    original = loading.hooked_state_dict

    def lossy(state: dict[str, Any], cfg: Any) -> dict[str, Any]:
        weights = original(state, cfg)
        weights["surplus"] = weights.pop("blocks.0.attn.W_Q")
        return weights

    monkeypatch.setattr(loading, "hooked_state_dict", lossy)
    with pytest.raises(ValueError, match=r"missing \['blocks.0.attn.W_Q'\], unexpected \['surplus'\]"):
        FocusModel.from_pretrained(str(checkpoint("llama")), device="cpu", backend="hooked")


def test_a_slow_tokenizer_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        is_fast = False

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *_, **__: Slow())
    with pytest.raises(ValueError, match=r"tokenizer of 'x' is a slow one \(Slow\) without character offsets"):
        load_tokenizer("x")


def test_a_tokenizer_that_was_told_to_prepend_is_replaced_by_the_original(checkpoint: Any) -> None:
    own: Any = load_tokenizer(str(checkpoint("qwen2")))
    # A tokenizer that equals its original is kept, and so is a tokenizer whose original cannot be loaded.
    assert original_tokenizer(own) is own
    assert original_tokenizer(None) is None
    told: Any = load_tokenizer(str(checkpoint("llama")))
    told.name_or_path = str(checkpoint("qwen2"))  # same vocabulary, but texts begin with <s>
    assert told("x")["input_ids"] != own("x")["input_ids"]
    replaced = original_tokenizer(told)
    assert replaced is not told
    assert replaced("x")["input_ids"] == own("x")["input_ids"]
    for unknown in ("", "/nowhere/at/all", "nobody/knows-this"):
        told.name_or_path = unknown
        assert original_tokenizer(told) is told


def decoding_of(directory: Path, tokenizer: Any, **config: Any) -> DecodingSettings:
    return DecodingSettings.of(str(directory), llama(**config), tokenizer)


@pytest.mark.parametrize(("declared", "expected"), [([7, 9], (7, 9)), (5, (5,)), (None, (1,))])
def test_stop_tokens_come_from_the_generation_config(
    tmp_path: Path, checkpoint: Any, declared: Any, expected: tuple[int, ...]
) -> None:
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": declared}))
    tokenizer = load_tokenizer(str(checkpoint("llama")))
    assert decoding_of(tmp_path, tokenizer, eos_token_id=3).stop_tokens == expected


@pytest.mark.parametrize(("declared", "expected"), [([7, 9], (7, 9)), (5, (5,)), (None, (1,))])
def test_stop_tokens_without_a_generation_config_come_from_the_configuration(
    tmp_path: Path, checkpoint: Any, declared: Any, expected: tuple[int, ...]
) -> None:
    tokenizer = load_tokenizer(str(checkpoint("llama")))
    assert decoding_of(tmp_path, tokenizer, eos_token_id=declared).stop_tokens == expected
    tokenizer.eos_token = None
    assert decoding_of(tmp_path, tokenizer, eos_token_id=declared).stop_tokens == (() if declared is None else expected)


def backends_of(name: str, backend: str | None = None, device_map: Any = None) -> tuple[str, ...]:
    device = "cpu" if device_map is None else None
    checkpoint = open_checkpoint(name, revision=None, device=device, device_map=device_map, dtype=torch.float32)
    return checkpoint.backends(backend)


def test_the_kinds_of_model_to_try_are_those_that_were_asked_for_or_fit(
    tmp_path: Path, checkpoint: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = str(checkpoint("llama"))
    assert backends_of(name, "bridge") == ("bridge",)
    with pytest.raises(ValueError, match="backend is 'jax'; it must be 'hooked', 'bridge' or None"):
        backends_of(name, "jax")
    if HAS_HOOKED:
        assert backends_of(name) == ("hooked", "bridge")
        assert backends_of(name, "hooked") == ("hooked",)
        assert backends_of(name, device_map="auto") == ("bridge",)
        config(GemmaConfig, "GemmaForCausalLM").save_pretrained(tmp_path)
        assert backends_of(str(tmp_path)) == ("bridge",)
    monkeypatch.setattr(loading, "version", lambda _: "4.3.0")
    assert backends_of(name) == ("bridge",)
    with pytest.raises(ValueError, match=r"\(4 or later\) has no HookedTransformer; use backend='bridge'"):
        backends_of(name, "hooked")


# --- models over several devices ---


def generated(model: FocusModel) -> Any:
    """Responses, scores and trained directions of a model, to compare devices.

    The settings steer only the last layer, so the sweep reruns only part of the model.
    """
    samples, heads = multidoc_samples(), [(2, 1)]
    steering = FocusSteering(FocusDirections(heads, torch.ones(1, model.shape.d_head)), 2.0)
    settings = [Setting("baseline"), *(Setting(name, (steering,)) for name in "abcd")]
    sweep = run_sweep(model, samples, settings, max_new_tokens=3)
    scores = contextual_scores(model, samples, max_new_tokens=3)
    trained = train_focus_directions(model, samples, heads, site="projection", epochs=1, max_new_tokens=3)
    return sweep.evaluations, scores.relevant.numpy().tobytes(), trained.digest


@pytest.mark.parametrize("device_map", ["auto", {"": "cpu"}])
def test_a_device_map_changes_where_a_model_is_and_nothing_else(
    checkpoint: Any, load_model: Any, device_map: Any
) -> None:
    mapped = FocusModel.from_pretrained(str(checkpoint("llama")), device_map=device_map, stop_strings=())
    assert type(mapped.hooked).__name__ == "TransformerBridge"
    if mapped.description["device"] == "cpu":  # with a GPU, "auto" uses the GPU
        assert mapped.description == load_model("llama").description
        assert generated(mapped) == generated(load_model("llama"))


def test_a_model_that_accelerate_moves_piece_by_piece_gives_the_same(checkpoint: Any, load_model: Any) -> None:
    """Results are unchanged under accelerate's hooks, which move a module's inputs to the module's device.

    A ``device_map`` over several devices adds these hooks.
    """
    from accelerate import dispatch_model
    from transformer_lens.model_bridge import TransformerBridge

    for name in ("llama", "qwen3"):
        model, directory = load_model(name), str(checkpoint(name))
        hf = cast("Any", AutoModelForCausalLM).from_pretrained(directory, attn_implementation="eager")
        parts = ["model.embed_tokens", *(f"model.layers.{i}" for i in range(3))]
        parts += ["model.norm", "model.rotary_emb", "lm_head"]
        hf = cast("Any", dispatch_model)(hf, dict.fromkeys(parts, "cpu"), force_hooks=True)
        assert hasattr(hf.model.layers[1].self_attn.q_proj, "_hf_hook")
        boot: Any = TransformerBridge.boot_transformers
        bridge = boot(directory, hf_model=hf, tokenizer=model.tokenizer)
        settings: dict[str, Any] = {"decoding": model.decoding, "chat": model.encoder.chat, "name": model.name}
        model = FocusModel(model.hooked, model.tokenizer, **settings)
        model.lean = False  # layers with accelerate's hooks run under TransformerLens
        assert generated(FocusModel(bridge, model.tokenizer, **settings)) == generated(model)


def test_a_device_map_is_for_bridges_and_in_place_of_a_device(checkpoint: Any) -> None:
    with pytest.raises(ValueError, match="a HookedTransformer is on one device; with device_map use backend='bridge'"):
        FocusModel.from_pretrained(str(checkpoint("llama")), device_map="auto", backend="hooked")
    with pytest.raises(ValueError, match="device is 'cpu' and device_map 'auto'; give one of them"):
        FocusModel.from_pretrained(str(checkpoint("llama")), device_map="auto", device="cpu")
