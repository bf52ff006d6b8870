"""Where a model's work is done: in this process, or wherever else copies of the model are.

Scores, evaluations and training ask an :class:`Executor` to run functions on a model, batch by batch, and take the
results in order. What a batch is does not depend on who runs it: the last bits of a result depend on what it was run
together with, so the same batches are what makes the same bytes come out everywhere.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from focuslens.heads import ModelShape
from focuslens.model.focus_model import FocusModel
from focuslens.prompts.batch import EncodedPrompt

__all__ = ["Executor", "InProcess", "executor_for"]

_R = TypeVar("_R")


@runtime_checkable
class Executor(Protocol):
    """Runs functions on a model, and knows of the model what planning the work needs."""

    @property
    def name(self) -> str:
        """What result files call the model."""
        ...

    @property
    def description(self) -> dict[str, Any]:
        """What result files say of the model."""
        ...

    @property
    def shape(self) -> ModelShape:
        """Layers, heads and sizes."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's own tokenizer."""
        ...

    @property
    def device(self) -> torch.device:
        """Where this process goes on with tensors that come of the work."""
        ...

    def encode(self, prompt: str | EncodedPrompt) -> EncodedPrompt:
        """A prompt's tokens and parts; see :meth:`FocusModel.encode`."""
        ...

    def map(self, function: Callable[..., _R], calls: Iterable[tuple[Any, ...]]) -> Generator[_R]:
        """``function(model, *call)`` for every call, in order.

        Results are made as they are asked for, perhaps some ahead. Elsewhere than in this process, function and
        arguments must be picklable, and tensors in results arrive on :attr:`device`.

        Raises:
            WorkerLostError: If a call was lost with its worker, three times in a row.
            Exception: What ``function`` raises, when that call's turn comes.
        """
        ...


def InProcess(model: FocusModel) -> Executor:
    """The model itself: a :class:`FocusModel` is an executor, which runs one call after the other in this process."""
    return model


def executor_for(model: FocusModel | Executor) -> Executor:
    """The model or executor that was given, if it is one.

    Raises:
        TypeError: If it is neither.
    """
    if not callable(getattr(model, "map", None)):
        hint = "fl.FocusModel.from_pretrained(name)" if isinstance(model, str) else "fl.FocusModel(model)"
        raise TypeError(f"model is a {type(model).__name__}; it must be a FocusModel: {hint}")
    return model
