"""Execution of functions on a model, in this process or on copies of the model elsewhere.

Scores, evaluations and training ask an :class:`Executor` to run functions on a model, batch by batch, and take the
results in order. The last bits of a result depend on the batch it was computed in. The batches are therefore the same
for every executor, and so are the bytes of the results.
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
    """Runs functions on a model, and has the properties of the model by which calls are planned."""

    @property
    def name(self) -> str:
        """Name of the model in result files."""
        ...

    @property
    def description(self) -> dict[str, Any]:
        """Description of the model in result files."""
        ...

    @property
    def shape(self) -> ModelShape:
        """Numbers of layers and heads, and other sizes."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's own tokenizer."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of the tensors in results, in this process."""
        ...

    def encode(self, prompt: str | EncodedPrompt) -> EncodedPrompt:
        """Tokens and parts of a prompt; see :meth:`FocusModel.encode`."""
        ...

    def map(self, function: Callable[..., _R], calls: Iterable[tuple[Any, ...]]) -> Generator[_R]:
        """Results of ``function(model, *call)`` for every call, in order.

        Results are computed on demand, possibly some calls ahead. An executor of several processes needs picklable
        functions and arguments, and moves the tensors of results to :attr:`device`.

        Raises:
            WorkerLostError: If a call was lost with its worker three times in a row.
            Exception: The error of ``function``, in place of the call's result.
        """
        ...


def InProcess(model: FocusModel) -> Executor:
    """The model itself: a :class:`FocusModel` is an executor that runs calls one by one in this process."""
    return model


def executor_for(model: FocusModel | Executor) -> Executor:
    """The argument itself, checked to be a model or an executor.

    Raises:
        TypeError: If the argument is neither.
    """
    if not callable(getattr(model, "map", None)):
        hint = "fl.FocusModel.from_pretrained(name)" if isinstance(model, str) else "fl.FocusModel(model)"
        raise TypeError(f"model is a {type(model).__name__}; it must be a FocusModel: {hint}")
    return model
