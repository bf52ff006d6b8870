"""A model on many devices: an executor whose copies of the model are actors of Ray."""

from __future__ import annotations

import importlib
import logging
import os
from collections.abc import Callable, Generator, Iterable
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, TypeVar

import torch

from focuslens.heads import ModelShape
from focuslens.model.cluster.crew import AHEAD, Crew, Work
from focuslens.model.cluster.shares import Shares, share_out
from focuslens.model.cluster.worker import Worker, load_model, unpack
from focuslens.model.focus_model import FocusModel
from focuslens.prompts.batch import EncodedPrompt
from focuslens.util.files import versions

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["RayPool"]

_R = TypeVar("_R")

_QUIET = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
"""For a Ray of our own: it reports to nobody, and its workers are as quick as this process would be."""


class RayPool:
    """Copies of a model on the devices of a Ray cluster; takes the model's place in scores, evaluations and training.

    One worker a GPU or, where there are none, one a machine loads the model once. Batches are those of one process and
    so are the results, in the same order: byte for byte where devices and threads are the same. A worker that is killed
    costs the batch that it was running, which another does again.

    Where this process is connected to Ray already, that connection is used, and left as it is.

    Args:
        model: Hub name or directory, which every machine must have; ``"demo"`` for the embedded model; or a function
            that opens the model.
        address: ``None`` or ``"local"`` to start Ray here; ``"auto"``, ``"HOST:PORT"`` or ``"ray://HOST:PORT"`` to join
            a cluster, on whose machines the same versions are installed.
        workers: How many copies in all.
        gpus_per_worker: Several for a model that does not fit one (with ``device_map="auto"``), a part of 1 for a small
            one, 0 for none.
        threads: Of each worker on the CPU; by default its share of a machine's CPUs. The last bits of a result can
            depend on it, as in one process.
        **settings: Of :meth:`FocusModel.from_pretrained`.

    Raises:
        ImportError: If Ray is not installed.
        ConnectionError: If there is no cluster at the address.
        ValueError: If the cluster has no room for the workers, or theirs are other versions than this process's.
        Exception: What opening the model raises.
    """

    def __init__(
        self,
        model: str | Callable[..., FocusModel],
        *,
        address: str | None = None,
        workers: int | None = None,
        gpus_per_worker: float | None = None,
        threads: int | None = None,
        **settings: Any,
    ) -> None:
        self._ray = _require_ray()
        self._crew: Crew | None = None
        self._connected_here = _connect(self._ray, address)
        try:
            machines = [one["Resources"] for one in self._ray.nodes() if one["Alive"]]
            self.shares = share_out(
                machines,
                workers=workers,
                gpus_per_worker=gpus_per_worker,
                threads=threads,
                device=settings.get("device"),
                grows=address not in (None, "local"),
            )
            hire, load = partial(_hire, self._ray, self.shares), _loader(model, self.shares, settings)
            self._crew = Crew(self._ray, hire, self.shares.workers, load, versions())
            self._crew.start()
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """End the workers, and the connection to Ray if it was made here."""
        if self._crew is not None and self._ray.is_initialized():
            self._crew.dismiss()
        self._crew = None
        if self._connected_here:
            self._ray.shutdown()
            self._connected_here = False

    @property
    def name(self) -> str:
        """What result files call the model."""
        return self._workers.facts.name

    @property
    def description(self) -> dict[str, Any]:
        """What result files say of the model."""
        return dict(self._workers.facts.description)

    @property
    def shape(self) -> ModelShape:
        """Layers, heads and sizes."""
        return self._workers.facts.shape

    @property
    def tokenizer(self) -> Any:
        """The checkpoint's own tokenizer."""
        return self._workers.facts.encoder.tokenizer

    @property
    def device(self) -> torch.device:
        """Where results arrive: on a device like the workers' if this process has one, else on the CPU."""
        kind = self._workers.facts.description["device"]
        return torch.device(kind if kind == "cuda" and torch.cuda.is_available() else "cpu")

    def encode(self, prompt: str | EncodedPrompt) -> EncodedPrompt:
        """A prompt's tokens and parts; see :meth:`FocusModel.encode`."""
        return prompt if isinstance(prompt, EncodedPrompt) else self._workers.facts.encoder.encode(prompt)

    def map(self, function: Callable[..., _R], calls: Iterable[tuple[Any, ...]]) -> Generator[_R]:
        """``function(model, *call)`` for every call, on whichever worker is free; results in the order of the calls.

        Raises:
            WorkerLostError: If one call's workers are lost time and again, or no worker can be started any more.
            Exception: What ``function`` raises, when that call's turn comes.
        """
        work = Work(self._ray.put(function), list(calls), AHEAD * self.shares.workers)
        for _ in work.calls:
            yield unpack(self._workers.answer(work), self.device)

    @property
    def _workers(self) -> Crew:
        if self._crew is None:
            raise RuntimeError("the pool is closed; make another")
        return self._crew


def _require_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ImportError(
            f"spreading work over machines needs Ray, and {error.name!r} is missing: pip install 'focuslens[ray]'"
        ) from error


def _connect(ray: Any, address: str | None) -> bool:
    """Start Ray here or join a cluster, unless this process is connected already; whether a connection was made."""
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address in (None, "local"):
        for name, value in _QUIET.items():
            os.environ.setdefault(name, value)
        ray.init(address="local", include_dashboard=False, **options)
        return True
    try:
        ray.init(address=address, **options)
    except ImportError:
        raise
    except Exception as error:  # of many kinds, some of them after a minute
        said = " ".join(str(error).split()) or type(error).__name__
        raise ConnectionError(
            f"no Ray cluster can be joined at {address!r} ({said[:300]}); start one with 'ray start --head', set "
            "RAY_AUTH_MODE=token for one that asks for a token, or leave the address away"
        ) from error
    return True


def _hire(ray: Any, shares: Shares) -> Any:
    """An actor that has no model yet."""
    options: dict[str, Any] = {"num_cpus": shares.cpus, "num_gpus": shares.gpus, "max_restarts": 0}
    return ray.remote(Worker).options(scheduling_strategy="SPREAD", **options).remote(shares.threads)


def _loader(model: str | Callable[..., FocusModel], shares: Shares, settings: dict[str, Any]) -> Any:
    """What opens the model on a worker."""
    if not isinstance(model, str):
        return partial(model, **settings)
    if not shares.gpus and settings.get("device") is None and settings.get("device_map") is None:
        # A worker that was given no GPU may still see them.
        settings = {**settings, "device": "cpu"}
    name = str(Path(model).resolve()) if Path(model).is_dir() else model  # workers have other working directories
    return partial(load_model, name, settings)
