"""Hugging Face references of the tiny checkpoints, and the tolerances that the tests share."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Protocol

import pytest
import torch

if TYPE_CHECKING:
    from tests.support.reference import ReferenceModel


class References(Protocol):
    """The Hugging Face reference of a tiny checkpoint, opened once a session."""

    def __call__(self, name: str, dtype: torch.dtype = ...) -> ReferenceModel: ...


@pytest.fixture(scope="session")
def reference(checkpoint) -> References:
    from tests.support.reference import ReferenceModel

    opened: dict[tuple[str, torch.dtype], ReferenceModel] = {}

    def open_reference(name: str, dtype: torch.dtype = torch.float32) -> ReferenceModel:
        if (name, dtype) not in opened:
            directory: Path = checkpoint(name)
            opened[name, dtype] = ReferenceModel(directory, dtype)
        return opened[name, dtype]

    return open_reference


@pytest.fixture(scope="session")
def logit_tolerance() -> dict[str, float]:
    """Largest difference of logits (whose standard deviation is about 1.6) that is rounding.

    The bridge runs Hugging Face's own modules in the same order: equal, or a few units in the last place apart where
    matrix products have another shape (2.5e-5 measured over a cache).
    ``HookedTransformer`` computes its rotary tables otherwise (angles of single precision at positions up to 300 are
    off by 1e-5) and multiplies in another order: 1e-4 was measured, and an error in the last bit of three layers'
    attention logits may be ten times larger on another machine.
    """
    return {"bridge": 1e-4, "hooked": 1e-3}
