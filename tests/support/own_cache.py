"""Whether TransformerLens's own generation can read a key-value cache with the installed versions."""

from __future__ import annotations

import inspect

import pytest
from transformer_lens.model_bridge.generalized_components.attention import AttentionBridge
from transformers.models.llama.modeling_llama import LlamaAttention

__all__ = ["BRIDGE_IGNORES_CACHE", "require_own_cache"]

BRIDGE_IGNORES_CACHE = (
    "cache" in inspect.signature(LlamaAttention.forward).parameters
    and "cache" not in AttentionBridge._update_kv_cache.__code__.co_consts
)
"""Whether attention receives its cache under a name that a ``TransformerBridge`` does not look for.

Since version 5.24, transformers hands the cache to attention modules as ``cache``. TransformerLens (up to 4.3.0) looks
for ``past_key_values`` and ``layer_past``. The cache then stays empty, so each new token of TransformerLens's own
``generate`` attends to itself alone, and hooks see one key.
"""


def require_own_cache(backend: str) -> None:
    """Skip a test of TransformerLens's own generation on a kind of model that would ignore its cache."""
    if backend == "bridge" and BRIDGE_IGNORES_CACHE:
        pytest.skip("transformers names the cache of attention 'cache', and this TransformerLens does not look for it")
