"""What runs where a copy of the model is: one actor of Ray, in a process of its own."""

from __future__ import annotations

import io
import os
import platform
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch

from focuslens.model.backends import ModelShape
from focuslens.model.batching import is_out_of_memory, release_memory
from focuslens.model.focus_model import FocusModel
from focuslens.prompts.encoder import PromptEncoder
from focuslens.util.files import versions

__all__ = ["Facts", "Failure", "Worker", "load_model", "unpack"]


@dataclass(frozen=True, eq=False)
class Facts:
    """What is known of a worker and of its copy of the model.

    Attributes:
        name: What result files call the model.
        description: What result files say of it.
        shape: Its sizes.
        encoder: Makes tokens of prompts.
        versions: Of the packages that decide results.
        where: The machine and the process.
    """

    name: str
    description: Mapping[str, Any]
    shape: ModelShape
    encoder: PromptEncoder
    versions: Mapping[str, str]
    where: str


@dataclass(frozen=True, eq=False)
class Failure:
    """An error that a call ended with.

    Attributes:
        error: What was raised, or a ``RuntimeError`` that names it where it cannot be sent.
        traceback: Where it was raised.
    """

    error: Exception
    traceback: str


class Worker:
    """A copy of a model, and whoever runs functions on it.

    Args:
        threads: Of computations on the CPU.
    """

    def __init__(self, threads: int) -> None:
        torch.set_num_threads(threads)
        self._model: FocusModel | None = None

    def open(self, load: Callable[[], FocusModel]) -> Facts | Failure:
        """Load the model."""
        try:
            self._model = model = load()
            found, description = versions(), model.description
        except Exception as error:
            return _failure(error)
        where = f"{platform.node()}, process {os.getpid()}"
        return Facts(model.name, description, model.shape, model.encoder, found, where)

    def run(self, function: Callable[..., Any], call: tuple[Any, ...]) -> tuple[Failure | None, bytes]:
        """``function(model, *call)``, packed: whether it failed is known before the result has been sent anywhere."""
        try:
            return None, _pack(function(self._model, *call))
        except Exception as error:
            failure, ran_out = _failure(error), is_out_of_memory(error)
        if ran_out:
            release_memory()
        return failure, b""


def load_model(name: str, settings: Mapping[str, Any]) -> FocusModel:
    """A model by its name or directory."""
    return FocusModel.from_pretrained(name, **settings)


def _failure(error: Exception) -> Failure:
    text = "".join(traceback.format_exception(error))
    if is_out_of_memory(error):
        # CUDA's own error cannot be told from others once it has been sent.
        return Failure(MemoryError(" ".join(str(error).split())), text)
    try:
        unpack(_pack(error), torch.device("cpu"))
    except Exception:
        return Failure(RuntimeError(f"{type(error).__name__}: {error}"), text)
    return Failure(error, text)


def _pack(result: Any) -> bytes:
    """A result as bytes that can be read on another device."""
    from ray import cloudpickle  # pyright: ignore[reportMissingTypeStubs]

    content = io.BytesIO()
    torch.save(result, content, pickle_module=cloudpickle)
    return content.getvalue()


def unpack(content: bytes, device: torch.device) -> Any:
    """A packed result, its tensors on a device."""
    return torch.load(io.BytesIO(content), map_location=device, weights_only=False)
