"""Masks of transformers are read by their visible keys, and hooks after a measurement are those before it."""

from __future__ import annotations

import pytest
import torch
from transformers.masking_utils import (
    causal_mask_function,
    chunked_causal_mask_function,
    sliding_window_bidirectional_mask_function,
    sliding_window_causal_mask_function,
)

from focuslens.model.backends.measuring import _extent

CPU = torch.device("cpu")


@pytest.mark.parametrize("size", [1, 2, 3, 24, 512, 4096, 131072])
def test_windows_and_chunks_are_told_apart(size: int) -> None:
    assert _extent(sliding_window_causal_mask_function(size), CPU) == (size, None)
    chunked = chunked_causal_mask_function(size, torch.zeros(1, dtype=torch.long))
    # A row in a chunk of one token sees itself alone, as in a window of one token.
    assert _extent(chunked, CPU) == ((1, None) if size == 1 else (None, size))


def test_other_masks_are_unknown() -> None:
    assert _extent(causal_mask_function, CPU) == (None, None)
    assert _extent(sliding_window_bidirectional_mask_function(24), CPU) is None
    assert _extent(lambda batch, head, q, kv: kv <= q + 1, CPU) is None
    assert _extent(lambda batch, head, q, kv: (kv <= q) & (kv % 2 == 0), CPU) is None
    assert _extent(lambda batch, head, q, kv: (kv <= q) & ((kv < 4) | (kv > q - 24)), CPU) is None
