"""Execution of functions on a model in this process, or on copies of the model in other processes.

Scoring, evaluation and training use an :class:`Executor` to run functions on a model, batch by batch. An executor
returns results in the order of the batches. The last bits of a result depend on the batch in which it was computed.
Every executor therefore uses the same batches, so that the results are equal byte for byte.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch

from focuslens.heads import ModelShape
from focuslens.model.focus_model import FocusModel
from focuslens.prompts.batch import EncodedPrompt, PromptInput

__all__ = ["Executor", "InProcess", "executor_for"]

_R = TypeVar("_R")


@runtime_checkable
class Executor(Protocol):
    """Interface for running functions on a model. It also provides the model properties needed to plan the calls."""

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
        """Sizes of the model, such as the number of layers and the number of heads."""
        ...

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the checkpoint."""
        ...

    @property
    def device(self) -> torch.device:
        """Device in this process on which the tensors of results are placed."""
        ...

    def encode(self, prompt: PromptInput) -> EncodedPrompt:
        """Tokens and spans of a prompt; see :meth:`FocusModel.encode`."""
        ...

    def map(self, function: Callable[..., _R], calls: Iterable[tuple[Any, ...]]) -> Generator[_R]:
        """Results of ``function(model, *call)`` for every call, in the order of the calls.

        Results are computed on demand or a few calls ahead. If an executor uses several processes, functions and
        arguments must be picklable, and the tensors of results are moved to :attr:`device`.

        Raises:
            WorkerLostError: If three workers in a row were lost while they ran the same call.
            Exception: The error that ``function`` raised for a call, when the result of that call is read.
        """
        ...


def InProcess(model: FocusModel) -> Executor:
    """Return the model itself. A :class:`FocusModel` is an executor that runs calls one by one in this process."""
    return model


def executor_for(model: FocusModel | Executor) -> Executor:
    """Check that the argument is a model or an executor, and return it.

    Raises:
        TypeError: If the argument is neither a model nor an executor.
    """
    if not callable(getattr(model, "map", None)):
        hint = "fl.FocusModel.from_pretrained(name)" if isinstance(model, str) else "fl.FocusModel(model)"
        raise TypeError(f"model is a {type(model).__name__}; it must be a FocusModel: {hint}")
    return model
