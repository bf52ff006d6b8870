"""Worker of a Ray cluster: an actor that runs one copy of a model in a separate process."""

from __future__ import annotations

import io
import os
import platform
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import GeneratorType
from typing import Any

import torch

from focuslens.heads import ModelShape
from focuslens.model.batching import Parts
from focuslens.model.focus_model import FocusModel
from focuslens.prompts.encoder import PromptEncoder
from focuslens.util.files import versions
from focuslens.util.memory import is_out_of_memory, release_memory

__all__ = ["Failure", "Worker", "WorkerInfo", "load_model", "unpack"]


@dataclass(frozen=True, eq=False)
class WorkerInfo:
    """A worker's description of itself and of its copy of the model.

    Attributes:
        name: Name of the model in result files.
        description: Description of the model in result files.
        shape: Sizes of the model, such as the number of layers and the number of heads.
        encoder: Encoder that turns prompts into tokens.
        versions: Versions of Python and of the packages that affect results.
        location: Machine and process of the worker.
    """

    name: str
    description: Mapping[str, Any]
    shape: ModelShape
    encoder: PromptEncoder
    versions: Mapping[str, str]
    location: str


@dataclass(frozen=True, eq=False)
class Failure:
    """An error that ended a call on a worker.

    Attributes:
        error: The error itself, or, if it cannot be pickled, a ``RuntimeError`` with the error's type and message.
        traceback: The traceback on the worker, as text.
    """

    error: Exception
    traceback: str


class Worker:
    """Ray actor that loads one copy of a model and runs functions on it.

    Args:
        threads: Number of CPU threads of the worker.
    """

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model: FocusModel | None = None

    def open(self, load: Callable[[], FocusModel]) -> WorkerInfo | Failure:
        """Load the model. Return a description of this worker, or a :class:`Failure`."""
        try:
            self._model = model = load()
            package_versions, description = versions(), model.description
        except Exception as error:
            return _failure(error)
        location = f"{platform.node()}, process {os.getpid()}"
        return WorkerInfo(model.name, description, model.shape, model.encoder, package_versions, location)

    def run(self, function: Callable[..., Any], arguments: tuple[Any, ...]) -> tuple[Failure | None, bytes]:
        """Run ``function(model, *arguments)``. Return the failure (``None`` for success) and the serialised result.

        The result of a generator function is all that it yields, as :class:`Parts`.
        The failure is a separate return value, so that the pool can check for a failure before it fetches the result.
        """
        try:
            result = function(self._model, *arguments)
            return None, _pack(Parts(result) if isinstance(result, GeneratorType) else result)
        except Exception as error:
            failure, out_of_memory = _failure(error), is_out_of_memory(error)
        if out_of_memory:
            release_memory()
        return failure, b""


def load_model(name: str, settings: Mapping[str, Any]) -> FocusModel:
    """Load a model by its hub name or directory; ``"demo"`` is the embedded model."""
    return FocusModel.from_pretrained(name, **settings)


def _failure(error: Exception) -> Failure:
    text = "".join(traceback.format_exception(error))
    if is_out_of_memory(error):
        # Pickling loses the type of CUDA's out-of-memory error. Another process could then not recognise the error.
        return Failure(MemoryError(" ".join(str(error).split())), text)
    try:
        unpack(_pack(error), torch.device("cpu"))
    except Exception:
        return Failure(RuntimeError(f"{type(error).__name__}: {error}"), text)
    return Failure(error, text)


def _pack(result: Any) -> bytes:
    """Serialise a result, so that it can be loaded on another device."""
    from ray import cloudpickle  # pyright: ignore[reportMissingTypeStubs]

    content = io.BytesIO()
    torch.save(result, content, pickle_module=cloudpickle)
    return content.getvalue()


def unpack(content: bytes, device: torch.device) -> Any:
    """Load a serialised result, with its tensors on ``device``."""
    return torch.load(io.BytesIO(content), map_location=device, weights_only=False)
