"""Memory that runs out: how to recognise it, and how to release what a failed pass still holds."""

from __future__ import annotations

import gc

__all__ = ["is_out_of_memory", "release_memory"]

_OUT_OF_MEMORY = ("can't allocate memory", "MPS backend out of memory", "CUBLAS_STATUS_ALLOC_FAILED")
"""Phrases that identify an out-of-memory ``RuntimeError`` from the CPU allocator, Apple GPUs or cuBLAS."""


def release_memory() -> None:
    """Release the memory that a failed pass still occupies."""
    gc.collect()
    import torch  # imported here so that ``focuslens --help`` does not import torch

    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def is_out_of_memory(error: Exception) -> bool:
    """Whether an error reports that memory ran out: a dedicated error, or a ``RuntimeError`` with a known message."""
    import torch

    known = isinstance(error, RuntimeError) and any(words in str(error) for words in _OUT_OF_MEMORY)
    return known or isinstance(error, MemoryError | torch.OutOfMemoryError)
