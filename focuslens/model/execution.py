"""Execution of functions on a model, in this process or on copies of the model elsewhere.

Scores, evaluations and training ask an :class:`Executor` to run functions on a model, batch by batch, and take the
results in order. The last bits of a result depend on the batch in which it was computed. Every executor therefore uses
the same batches, so that the results are equal byte for byte.
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
    """Interface that runs functions on a model, with the properties of the model that are needed to plan the calls."""

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
        """Sizes of the model, such as its numbers of layers and heads."""
        ...

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's own tokenizer."""
        ...

    @property
    def device(self) -> torch.device:
        """Device of this process on which the tensors of results are placed."""
        ...

    def encode(self, prompt: str | EncodedPrompt) -> EncodedPrompt:
        """Tokens and spans of a prompt; see :meth:`FocusModel.encode`."""
        ...

    def map(self, function: Callable[..., _R], calls: Iterable[tuple[Any, ...]]) -> Generator[_R]:
        """Results of ``function(model, *call)`` for every call, in order.

        Results are computed on demand, or some calls ahead. An executor with several processes needs picklable
        functions and arguments, and moves the tensors of results to :attr:`device`.

        Raises:
            WorkerLostError: If three workers in a row were lost while they ran the same call.
            Exception: The error that ``function`` raised, in place of the call's result.
        """
        ...


def InProcess(model: FocusModel) -> Executor:
    """The model itself: a :class:`FocusModel` is an executor that runs calls one by one in this process."""
    return model


def executor_for(model: FocusModel | Executor) -> Executor:
    """Check that the argument is a model or an executor, and return it.

    Raises:
        TypeError: If the argument is neither.
    """
    if not callable(getattr(model, "map", None)):
        hint = "fl.FocusModel.from_pretrained(name)" if isinstance(model, str) else "fl.FocusModel(model)"
        raise TypeError(f"model is a {type(model).__name__}; it must be a FocusModel: {hint}")
    return model
