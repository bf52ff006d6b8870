"""HookedTransformers of many kinds, on FocusLens's engine or on TransformerLens's, against TransformerLens alone."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import focuslens as fl
from tests.support.versions import needs_hooked

pytestmark = needs_hooked

SIZES: dict[str, Any] = {
    "n_layers": 3, "d_model": 64, "n_ctx": 512, "d_head": 16, "n_heads": 4, "d_mlp": 96, "d_vocab": 500, "seed": 1,
    "act_fn": "silu", "normalization_type": "RMS", "initializer_range": 0.15, "device": "cpu",
    "positional_embedding_type": "rotary", "rotary_dim": 16,
}  # fmt: skip
WINDOWS: dict[str, Any] = {"use_local_attn": True, "window_size": 13, "attn_types": ["global", "local", "local"]}
ON_THE_ENGINE: dict[str, dict[str, Any]] = {
    "grouped queries": {"n_key_value_heads": 2},
    "part of a head rotated": {"rotary_dim": 8, "rotary_adjacent_pairs": True},
    "scores not scaled": {"use_attn_scale": False},
    "scores scaled otherwise": {"attn_scale": 3.0},
    "scores scaled by layer": {"scale_attn_by_inverse_layer_idx": True},
    "logits capped": {"output_logits_soft_cap": 1.5},
    "windows in some layers": WINDOWS,
    "norms of queries and keys": {"use_qk_norm": True, "n_key_value_heads": 2},
    "norms without weights": {"normalization_type": "LNPre"},
    "attention and MLP side by side": {"parallel_attn_mlp": True},
    "split inputs": {"use_split_qkv_input": True, "n_key_value_heads": 2},
}
LEFT_ALONE: dict[str, dict[str, Any]] = {
    "scores capped": {"attn_scores_soft_cap": 2.0},
    "learned positions": {"positional_embedding_type": "standard"},
    "alibi": {"positional_embedding_type": "alibi"},
    "attention sinks": {"use_attention_sinks": True},
    "norms over all heads": {"original_architecture": "Olmo2ForCausalLM"},
}
# The tolerance covers a different order of summation for logits of about 1.
TOLERANCE = 2e-5


def build(changes: dict[str, Any], tokenizer: Any) -> fl.FocusModel:
    from transformer_lens import HookedTransformer, HookedTransformerConfig

    torch.manual_seed(3)
    hooked = HookedTransformer(HookedTransformerConfig(**{**SIZES, **changes}))
    with torch.no_grad():
        for name, parameter in hooked.named_parameters():
            if name.split(".")[-1].startswith("b_"):
                parameter.normal_(0, 0.3)
    return fl.FocusModel(hooked, tokenizer, stop_strings=(), stop_tokens=(), chat=False)


@pytest.fixture
def kernel_calls(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    calls: list[int] = []
    original = torch.nn.functional.scaled_dot_product_attention

    def count(q: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        calls.append(q.shape[2])
        return original(q, *args, **kwargs)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", count)
    return calls


@pytest.mark.parametrize("kind", [*ON_THE_ENGINE, *LEFT_ALONE])
def test_logits_and_responses_are_transformer_lenss(kind: str, load_model: Any, samples: Any, kernel_calls: list[int]):
    model = build({**ON_THE_ENGINE, **LEFT_ALONE}[kind], load_model("llama", "hooked").tokenizer)
    prompts = [fl.EncodedPrompt(torch.tensor([7]), {}), *(model.encode(one.prompt()) for one in samples[:3])]
    plain = [model.hooked(prompt.tokens[None])[0] for prompt in prompts]
    assert not kernel_calls
    for prompt, expected in zip(prompts, plain, strict=True):
        torch.testing.assert_close(model.logits(prompt), expected, atol=TOLERANCE, rtol=0)
    assert bool(kernel_calls) == (kind in ON_THE_ENGINE)
    for prompt, response in zip(prompts, model.generate(prompts, max_new_tokens=5), strict=True):
        tokens = prompt.tokens[None]
        for _ in range(5):
            tokens = torch.cat((tokens, model.hooked(tokens)[:, -1].argmax(-1)[:, None]), dim=1)
        assert response.tokens.tolist() == tokens[0, -5:].tolist()


def test_what_looks_ahead_is_refused(load_model: Any, samples: Any):
    model = build({"attention_dir": "bidirectional"}, load_model("llama", "hooked").tokenizer)
    with pytest.raises(ValueError, match="attention is 'bidirectional'"):
        model.generate(samples[0].prompt())
