"""Executor that runs copies of the model as Ray actors, on the devices of one or more machines."""

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
from focuslens.model.cluster.placement import Shares, share_out
from focuslens.model.cluster.worker import Worker, load_model, unpack
from focuslens.model.cluster.worker_pool import MAX_AHEAD, CallQueue, WorkerPool
from focuslens.model.focus_model import FocusModel
from focuslens.prompts.batch import EncodedPrompt, PromptInput
from focuslens.util.files import versions

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["RayPool"]

_R = TypeVar("_R")

_LOCAL_ENVIRONMENT = {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
"""Environment variables for starting Ray: no usage reports, and workers with the same priority as this process."""


class RayPool:
    """Copies of a model on a Ray cluster. The pool can replace the model in scoring, evaluation and training.

    By default, there is one worker per GPU, or one worker per machine if no GPUs are used. Each worker loads the model
    once. Batches and the order of results are the same as in a single process. If devices and numbers of threads are
    also the same, the results are equal byte for byte. If a worker is killed, another worker runs its batch again.

    If this process is already connected to Ray, the pool uses that connection and leaves it open.

    Args:
        model: Hub name; directory that exists on every machine; ``"demo"`` for the embedded model; or function that
            loads the model.
        address: ``None`` or ``"local"`` to start Ray on this machine; ``"auto"``, ``"HOST:PORT"`` or
            ``"ray://HOST:PORT"`` to join a cluster. All machines must have the package versions of this process.
        workers: Total number of workers.
        gpus_per_worker: Number of GPUs per worker: more than 1 for a model that is too large for one GPU (with
            ``device_map="auto"``), a fraction for a small model, 0 for workers without a GPU.
        threads: Number of CPU threads per worker; by default an equal share of a machine's CPUs. The last bits of a
            result can depend on the number of threads, which is also true in a single process.
        **settings: Arguments of :meth:`FocusModel.from_pretrained`.

    Raises:
        ImportError: If Ray is not installed.
        ConnectionError: If there is no cluster at the address.
        ValueError: If the workers do not fit the cluster, or its package versions differ from those of this process.
        Exception: The error that a worker raised while it loaded the model.
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
        self._worker_pool: WorkerPool | None = None
        self._connected_here = _connect(self._ray, address)
        try:
            machines = [node["Resources"] for node in self._ray.nodes() if node["Alive"]]
            self.shares = share_out(
                machines,
                workers=workers,
                gpus_per_worker=gpus_per_worker,
                threads=threads,
                device=settings.get("device"),
                grows=address not in (None, "local"),
            )
            create_actor, load = partial(_create_actor, self._ray, self.shares), _loader(model, self.shares, settings)
            self._worker_pool = WorkerPool(self._ray, create_actor, self.shares.workers, load, versions())
            self._worker_pool.start()
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
        """Stop the workers, and disconnect from Ray if this pool made the connection."""
        if self._worker_pool is not None and self._ray.is_initialized():
            self._worker_pool.stop()
        self._worker_pool = None
        if self._connected_here:
            self._ray.shutdown()
            self._connected_here = False

    @property
    def name(self) -> str:
        """Name of the model in result files."""
        return self._workers.info.name

    @property
    def description(self) -> dict[str, Any]:
        """Description of the model in result files."""
        return dict(self._workers.info.description)

    @property
    def shape(self) -> ModelShape:
        """Sizes of the model, such as the number of layers and the number of heads."""
        return self._workers.info.shape

    @property
    def tokenizer(self) -> Any:
        """Tokenizer of the checkpoint."""
        return self._workers.info.encoder.tokenizer

    @property
    def device(self) -> torch.device:
        """Device of the results: CUDA if it is available to the workers and to this process, else the CPU."""
        kind = self._workers.info.description["device"]
        return torch.device(kind if kind == "cuda" and torch.cuda.is_available() else "cpu")

    def encode(self, prompt: PromptInput) -> EncodedPrompt:
        """Tokens and spans of a prompt; see :meth:`FocusModel.encode`."""
        return prompt if isinstance(prompt, EncodedPrompt) else self._workers.info.encoder.encode(prompt)

    def map(self, function: Callable[..., _R], calls: Iterable[tuple[Any, ...]]) -> Generator[_R]:
        """Results of ``function(model, *call)`` for every call, in the order of the calls.

        Idle workers receive calls in this order.

        Raises:
            WorkerLostError: If several workers in a row are lost while they run the same call, or if no worker can be
                started.
            Exception: The error that ``function`` raises for a call, when the result of that call is read.
        """
        queue = CallQueue(self._ray.put(function), iter(calls), MAX_AHEAD * self.shares.workers)
        while queue.has_results:
            yield unpack(self._workers.next_result(queue), self.device)

    @property
    def _workers(self) -> WorkerPool:
        if self._worker_pool is None:
            raise RuntimeError("the pool is closed; open a new RayPool")
        return self._worker_pool


def _require_ray() -> Any:
    try:
        return importlib.import_module("ray")
    except ImportError as error:
        raise ImportError(
            f"a RayPool needs Ray, and {error.name!r} is missing: pip install 'focuslens[ray]'"
        ) from error


def _connect(ray: Any, address: str | None) -> bool:
    """Start Ray on this machine or join a cluster. Return ``False`` if this process is already connected to Ray."""
    if ray.is_initialized():
        return False
    options: dict[str, Any] = {"log_to_driver": False, "logging_level": logging.ERROR}
    if address in (None, "local"):
        for name, value in _LOCAL_ENVIRONMENT.items():
            os.environ.setdefault(name, value)
        ray.init(address="local", include_dashboard=False, **options)
        return True
    try:
        ray.init(address=address, **options)
    except ImportError:
        raise
    except Exception as error:  # ``ray.init`` raises errors of many types
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ConnectionError(
            f"no Ray cluster can be joined at {address!r} ({reason[:300]}); start one with 'ray start --head', set "
            "RAY_AUTH_MODE=token if the cluster requires a token, or omit the address to start Ray here"
        ) from error
    return True


def _create_actor(ray: Any, shares: Shares) -> Any:
    """Create the actor of a worker, without loading the model."""
    options: dict[str, Any] = {"num_cpus": shares.cpus, "num_gpus": shares.gpus, "max_restarts": 0}
    return ray.remote(Worker).options(scheduling_strategy="SPREAD", **options).remote(shares.threads)


def _loader(model: str | Callable[..., FocusModel], shares: Shares, settings: dict[str, Any]) -> Any:
    """Function without arguments that loads the model on a worker."""
    if not isinstance(model, str):
        return partial(model, **settings)
    if not shares.gpus and settings.get("device") is None and settings.get("device_map") is None:
        # A worker may see the GPUs of its machine even if no GPU is reserved for the worker.
        settings = {**settings, "device": "cpu"}
    name = str(Path(model).resolve()) if Path(model).is_dir() else model  # workers have a different working directory
    return partial(load_model, name, settings)
