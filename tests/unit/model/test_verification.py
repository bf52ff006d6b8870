"""Comparison of loaded models with plain transformers: what differs is refused, what is missing is named."""

from __future__ import annotations

import dataclasses
import json
import shutil
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, MistralConfig, Phi3Config

from focuslens import FocusModel
from focuslens.model import loading, opening, plain, verification
from focuslens.model.backends.bridge import BridgeBackend
from focuslens.model.backends.hooked import HookedBackend
from focuslens.model.plain import Reference, UnfitError
from focuslens.model.stand_in import stand_in
from tests.support.architectures import ARCHITECTURES, WINDOW, build_architecture

WEIGHT = "model.layers.1.self_attn.q_proj.weight"


@pytest.fixture(autouse=True)
def empty_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache of the test's own, so that every checkpoint is compared."""
    monkeypatch.setenv("FOCUSLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def directory(tmp_path: Path, checkpoint: Any) -> Path:
    """A copy of the tiny Llama that a test may change."""
    return Path(shutil.copytree(checkpoint("llama"), tmp_path / "llama"))


def opened(directory: Path, backend: Any = None, **settings: Any) -> FocusModel:
    return FocusModel.from_pretrained(str(directory), device="cpu", backend=backend, **settings)


def edit_weights(directory: Path, edit: Any) -> None:
    weights = load_file(directory / "model.safetensors")
    edit(weights)
    save_file(weights, directory / "model.safetensors", metadata={"format": "pt"})


def edit_config(directory: Path, **changes: Any) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_a_kind_of_model_that_computes_another_thing_is_refused(
    directory: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    kind: Any = BridgeBackend if backend == "bridge" else HookedBackend
    monkeypatch.setattr(kind, "scale", lambda self, layer: 0.3)  # the tiny model's scale is 0.25
    with pytest.raises(
        UnfitError, match=r"does not compute .*: the logits of a pass of 9 tokens differ by [\d.]+ stand"
    ):
        opened(directory, backend)


def test_rows_over_a_cache_are_compared_too(directory: Path, backend: str, monkeypatch: pytest.MonkeyPatch) -> None:
    kind: Any = BridgeBackend if backend == "bridge" else HookedBackend
    forward = kind.forward

    def forgetting(self: Any, tokens: Any, mask: Any, cache: Any, *, last_only: bool) -> Any:
        if cache is not None and tokens.shape[1] == 1:
            mask, cache = mask[:, -1:], self.new_cache(len(tokens))
        return forward(self, tokens, mask, cache, last_only=last_only)

    monkeypatch.setattr(kind, "forward", forgetting)
    with pytest.raises(UnfitError, match="the logits of one prompt over a cache differ"):
        opened(directory, backend)


def test_a_window_beyond_the_compared_tokens_is_compared_on_a_stand_in(
    tmp_path: Path, checkpoint: Any, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The tiny Mistral's window is longer than the compared tokens. The stand-in's window is shorter."""
    copy = Path(shutil.copytree(checkpoint("mistral_window"), tmp_path / "mistral"))
    assert opened(copy, backend).backend.window(0) == WINDOW
    shutil.rmtree(tmp_path / "cache")
    kind: Any = BridgeBackend if backend == "bridge" else HookedBackend
    monkeypatch.setattr(kind, "window", lambda self, layer: None)
    with pytest.raises(UnfitError, match="does not compute"):
        opened(copy, backend)


def test_without_a_backend_the_kind_of_model_that_agrees_is_taken(
    directory: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "bridge":
        pytest.skip("a bridge is the last kind that is tried")
    assert type(opened(directory).hooked).__name__ == "HookedTransformer"
    shutil.rmtree(directory.parent / "cache")
    monkeypatch.setattr(HookedBackend, "scale", lambda self, layer: 0.3)
    assert type(opened(directory).hooked).__name__ == "TransformerBridge"


def test_a_configuration_is_compared_once_per_dtype_and_kind_of_model(
    directory: Path, backend: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = opened(directory, backend)
    (record,) = (empty_cache / "verified").iterdir()
    assert json.loads(record.read_text())["architecture"] == "LlamaForCausalLM"

    def fail(*_: Any, **__: Any) -> None:
        raise AssertionError("compared again")

    with monkeypatch.context() as patch:
        patch.setattr(Reference, "of", fail)
        assert torch.equal(opened(directory, backend).logits("a b c"), first.logits("a b c"))
        for change in ({"dtype": "bfloat16"}, {"changed": 9.0}):
            if "changed" in change:
                edit_config(directory, rms_norm_eps=1e-5)
                change = {}
            with pytest.raises(ValueError, match="compared again"):
                opened(directory, backend, **change)


@pytest.mark.parametrize("content", ["", "[]", "{}", "not JSON"])
def test_a_record_that_cannot_be_read_is_written_anew(
    directory: Path, backend: str, empty_cache: Path, content: str
) -> None:
    opened(directory, backend)
    (record,) = (empty_cache / "verified").iterdir()
    expected = record.read_text()
    record.write_text(content)
    opened(directory, backend)
    assert record.read_text() == expected


def test_a_cache_that_cannot_be_written_costs_a_comparison_only(
    directory: Path, backend: str, empty_cache: Path
) -> None:
    empty_cache.write_text("a file where the folder should be")
    assert opened(directory, backend).generate("a b", max_new_tokens=1).text is not None


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda weights: weights.pop(WEIGHT),
            f"lacks the weight '{WEIGHT}'; weights that a checkpoint lacks would be dra",
        ),
        (
            lambda weights: weights.update(extra=torch.ones(2)),
            "has the weight 'extra'; its architecture has no such weig",
        ),
    ],
)
def test_weights_that_are_missing_or_too_many_are_refused_by_name(
    directory: Path, backend: str, edit: Any, message: str
) -> None:
    edit_weights(directory, edit)
    with pytest.raises(ValueError, match=message):
        opened(directory, backend)


def test_an_output_matrix_that_is_said_to_be_untied_must_be_there(directory: Path, backend: str) -> None:
    edit_weights(directory, lambda weights: weights.pop("lm_head.weight"))
    with pytest.raises(ValueError, match=r"lacks the weight 'lm_head.weight'"):
        opened(directory, backend)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (None, "cannot be read .*: the download may have been cut off"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", "or the file is a Git LFS pointer"),
    ],
)
def test_broken_weights_are_refused_in_one_line(directory: Path, content: bytes | None, message: str) -> None:
    path = directory / "model.safetensors"
    path.write_bytes(path.read_bytes()[:20_000] if content is None else content)
    with pytest.raises(ValueError, match=message) as caught:
        opened(directory)
    assert "\n" not in str(caught.value)


def test_a_configuration_of_another_shape_is_refused_in_one_line(directory: Path) -> None:
    edit_config(directory, intermediate_size=100)
    with pytest.raises(ValueError, match=r"do not have the shapes that its config.json declares"):
        opened(directory)


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_without_keys_is_refused(tmp_path: Path, checkpoint: Any, window: int) -> None:
    copy = Path(shutil.copytree(checkpoint("mistral_window"), tmp_path / "mistral"))
    edit_config(copy, sliding_window=window)
    with pytest.raises(ValueError, match=rf"sliding_window is {window} in the configuration of .*at least 1 key"):
        opened(copy)


def test_a_checkpoint_that_transformers_cannot_run_is_refused_by_name(directory: Path) -> None:
    edit_config(directory, sliding_window=0)
    # Its whole passes are right, but transformers' cache keeps no key.
    with pytest.raises(ValueError, match=r"transformers cannot run .* must match the size of tensor"):
        opened(directory)


def test_a_context_length_changes_no_number(tmp_path: Path, checkpoint: Any) -> None:
    """Longrope's factors are computed from the configuration's context length, which ``n_ctx`` leaves alone."""
    tokenizer = AutoTokenizer.from_pretrained(checkpoint("llama"))
    (phi,) = (one for one in ARCHITECTURES if one.name == "Phi-3, longrope")
    directory = build_architecture(phi, tmp_path / "phi", tokenizer)
    tokens = torch.arange(5, 85)
    own = opened(directory)
    for n_ctx in (100, 4000):
        limited = opened(directory, n_ctx=n_ctx)
        assert limited.shape.n_ctx == n_ctx
        assert torch.equal(limited.logits(tokens), own.logits(tokens))
    with pytest.raises(ValueError, match="80 tokens do not fit the model's context of 79"):
        opened(directory, n_ctx=79).logits(tokens)
    with pytest.raises(ValueError, match="n_ctx is 0; it must be at least 1"):
        opened(directory, n_ctx=0)


def test_positions_that_are_learned_cannot_be_more(tmp_path: Path, checkpoint: Any) -> None:
    (gpt2,) = (one for one in ARCHITECTURES if one.name == "GPT-2")
    directory = build_architecture(gpt2, tmp_path / "gpt2", AutoTokenizer.from_pretrained(checkpoint("llama")))
    with pytest.raises(
        ValueError, match="n_ctx is 1025, but the configuration of gpt2 declares positions for 1024 tokens"
    ):
        opened(directory, n_ctx=1025)


def test_a_stand_in_has_the_kinds_of_layer_and_the_ratios_of_the_configuration() -> None:
    config: Any = MistralConfig(
        architectures=["MistralForCausalLM"], hidden_size=512, num_attention_heads=32, num_key_value_heads=8,
        num_hidden_layers=40, sliding_window=4096, vocab_size=32000,
    )  # fmt: skip
    model: Any = stand_in(config)
    small = model.config
    assert (small.sliding_window, small.vocab_size, small.num_hidden_layers) == (6, 96, 2)
    assert (small.num_attention_heads, small.num_key_value_heads, small.hidden_size) == (4, 2, 64)
    assert next(model.parameters()).dtype == torch.float32
    assert config.sliding_window == 4096
    parameters = {
        "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 48, "long_factor": [2.0] * 48,
        "original_max_position_embeddings": 4096,
    }  # fmt: skip
    phi: Any = Phi3Config(
        architectures=["Phi3ForCausalLM"], max_position_embeddings=131072, original_max_position_embeddings=4096,
        rope_parameters=parameters, pad_token_id=0,
    )  # fmt: skip
    small = stand_in(phi).config  # pyright: ignore[reportOptionalMemberAccess]
    assert small.max_position_embeddings / small.original_max_position_embeddings == 32


def test_the_state_of_random_numbers_is_left_alone() -> None:
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    stand_in(MistralConfig(architectures=["MistralForCausalLM"], hidden_size=64, num_attention_heads=4, vocab_size=99))
    assert torch.equal(torch.rand(3), expected)


def test_broken_numbers_are_no_difference(directory: Path) -> None:
    """A checkpoint that overflows in float16 is opened: transformers overflows alike. Decoding then refuses it."""
    edit_weights(
        directory,
        lambda weights: weights.update(
            {name: weight * 400 for name, weight in weights.items() if "down_proj" in name or "up_proj" in name}
        ),
    )
    model = opened(directory, dtype="float16")
    assert not model.logits("a b c").isfinite().all()
    with pytest.raises(
        ValueError, match=r"logits are NaN in float16; .*load the model with dtype='bfloat16' or 'float32'"
    ):
        model.generate("a b c", max_new_tokens=2)


def test_memory_that_runs_out_is_no_refusal(directory: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr(verification, "_comparisons", exhausted)
    with pytest.raises(torch.OutOfMemoryError):
        opened(directory)


def test_the_tolerance_is_far_from_what_is_measured(directory: Path, backend: str) -> None:
    """The largest difference of a right model is a tenth of the tolerance, or less."""
    model = opened(directory, backend)
    reference = plain_reference(directory)
    runner = opening._TokenRunner(model.backend, model.tokenizer, model.decoding)
    largest = max(
        float(verification._differences(ours, right).max())
        for _, ours, right in verification._comparisons(runner, reference)
    )
    assert largest < verification._TOLERANCES[torch.float32] / 10


def plain_reference(directory: Path) -> Reference:
    from transformers import AutoModelForCausalLM

    loader = plain.PlainLoader(AutoModelForCausalLM, "cpu", measure=True)
    loader.from_pretrained(str(directory), attn_implementation="eager")
    assert loader.reference is not None
    return loader.reference


def test_a_cache_that_transformer_lens_does_not_read_is_named_at_every_load(tmp_path: Path, checkpoint: Any) -> None:
    (mpt,) = (one for one in ARCHITECTURES if one.name == "MPT")
    directory = build_architecture(mpt, tmp_path / "mpt", AutoTokenizer.from_pretrained(checkpoint("llama")))
    message = r"own generate of .* does not read its key-value cache.*use_past_kv_cache=False"
    with pytest.warns(UserWarning, match=message):
        opened(directory)
    with pytest.warns(UserWarning, match=message):  # known from the record
        model = opened(directory)
    tokens = model.to_tokens("the river stone")
    settings: dict[str, Any] = {"do_sample": False, "max_new_tokens": 5, "verbose": False, "return_type": "tokens"}
    without = model.hooked.generate(tokens, use_past_kv_cache=False, **settings)[0, tokens.shape[1] :].tolist()
    ours = fl_tokens(model, tokens)
    assert ours[: len(without)] == without[: len(ours)]
    assert model.hooked.generate(tokens, **settings)[0, tokens.shape[1] :].tolist() != without


def fl_tokens(model: FocusModel, tokens: torch.Tensor) -> list[int]:
    return model.generate(tokens, max_new_tokens=5).tokens.tolist()


@pytest.mark.parametrize("n_ctx", [2, 5, 16, 17])
def test_a_short_context_is_compared_as_far_as_it_reaches(
    directory: Path, backend: str, empty_cache: Path, n_ctx: int
) -> None:
    assert opened(directory, backend, n_ctx=n_ctx).shape.n_ctx == n_ctx
    assert (empty_cache / "verified").exists() == (n_ctx >= plain.MEASURED_TOKENS)


@pytest.mark.parametrize("name", ["Qwen3MoeConfig", "OlmoeConfig", "Glm4MoeConfig", "GptOssConfig", "Gemma3Config"])
def test_large_configurations_have_stand_ins(name: str) -> None:
    """Routing to eight experts, nested configurations and their defaults do not leave a checkpoint without one."""
    model: Any = stand_in(getattr(transformers, name)())
    assert sum(parameter.numel() for parameter in model.parameters()) < 2e8
    small = model.config.get_text_config()
    if getattr(small, "sliding_window", None) is not None:
        assert small.sliding_window == 6


def test_a_kind_of_layer_that_comes_late_is_in_the_stand_in() -> None:
    config = transformers.Qwen2Config(use_sliding_window=True, max_window_layers=21)
    assert stand_in(config).config.layer_types == ["full_attention", "full_attention", "sliding_attention"]  # pyright: ignore[reportOptionalMemberAccess]


def test_a_checkpoint_without_a_stand_in_is_compared_at_every_load(
    directory: Path, backend: str, empty_cache: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(opening, "stand_in", lambda _, **__: None)
    opened(directory, backend)
    assert (
        "no tiny stand-in (no sizes fit its architecture), so windows and long tables were not compared" in caplog.text
    )
    assert not (empty_cache / "verified").exists()


@pytest.mark.parametrize("name", ["attn.masked_bias", "self_attn.rotary_emb.inv_freq"])
def test_buffers_of_old_checkpoints_are_not_surplus_weights(directory: Path, backend: str, name: str) -> None:
    edit_weights(directory, lambda weights: weights.update({f"model.layers.0.{name}": torch.ones(2)}))
    assert opened(directory, backend).shape.n_layers == 3


def test_stop_strings_do_not_keep_a_checkpoint_from_being_compared(directory: Path) -> None:
    (directory / "generation_config.json").write_text(json.dumps({"eos_token_id": 1, "stop_strings": ["x"]}))
    assert opened(directory).decoding.stop_strings == ("x",)


def test_a_refused_model_is_freed_before_the_next_kind_is_tried(
    directory: Path, backend: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if backend == "bridge":
        pytest.skip("a bridge is the last kind that is tried")
    refused: list[Any] = []
    as_hooked = loading.as_hooked

    def recording(*arguments: Any, **settings: Any) -> Any:
        hooked = as_hooked(*arguments, **settings)
        refused.append(weakref.ref(hooked))
        return hooked

    alive: list[bool] = []
    monkeypatch.setattr(loading, "as_hooked", recording)
    monkeypatch.setattr(HookedBackend, "scale", lambda self, layer: 0.3)
    boot = loading.boot
    monkeypatch.setattr(loading, "boot", lambda *a, **k: (alive.append(refused[0]() is not None), boot(*a, **k))[1])
    assert type(opened(directory).hooked).__name__ == "TransformerBridge"
    assert alive[0] is False


def test_rows_that_differ_in_half_precision_are_noticed(directory: Path, backend: str) -> None:
    model = opened(directory, backend, dtype="bfloat16")
    reference = plain_reference(directory)
    steps = (reference.step_logits[0], reference.step_logits[1].roll(1, dims=-1))
    runner = opening._TokenRunner(model.backend, model.tokenizer, model.decoding)
    with pytest.raises(UnfitError, match="over a cache differ"):
        verification.require_same_logits(runner, dataclasses.replace(reference, step_logits=steps), "x")
