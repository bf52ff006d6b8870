"""Placement of workers on a cluster: the number of workers, and the CPUs and GPUs per worker."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Shares", "share_out"]


@dataclass(frozen=True)
class Shares:
    """Resources that a pool requests from a cluster.

    Attributes:
        workers: Number of workers, each with one copy of the model.
        gpus: Number of GPUs per worker; below 1 if several workers share a GPU.
        threads: Number of CPU threads per worker.
    """

    workers: int
    gpus: float
    threads: int

    @property
    def cpus(self) -> int:
        """Number of CPUs to reserve per worker; 0 if workers have GPUs, which already limit the workers per machine."""
        return 0 if self.gpus else self.threads

    def __str__(self) -> str:
        gpus = f"{self.gpus:g} GPU(s), " if self.gpus else ""
        return f"{self.workers} worker(s) of {gpus}{self.threads} thread(s) each"


def share_out(
    machines: Sequence[Mapping[str, float]],
    *,
    workers: int | None = None,
    gpus_per_worker: float | None = None,
    threads: int | None = None,
    device: str | None = None,
    grows: bool = False,
) -> Shares:
    """Divide a cluster among workers. The default is one worker per GPU, or one per machine if no GPUs are used.

    Args:
        machines: Resources of each machine, under Ray's names ``CPU`` and ``GPU``.
        workers: Total number of workers.
        gpus_per_worker: Number of GPUs per worker: more than 1 for a model that is too large for one GPU, a fraction
            for a small model, 0 for workers without a GPU.
        threads: Number of CPU threads per worker; by default an equal share of a machine's CPUs.
        device: Device of the model; ``cpu`` requests no GPU.
        grows: Whether machines may join the cluster later. If so, more workers may be requested than currently fit.

    Raises:
        ValueError: If a number is not positive, or the cluster lacks the requested resources.
    """
    for option, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{option} is {value}; it must be at least 1")
    cpus, cards = ([int(machine.get(kind, 0)) for machine in machines] for kind in ("CPU", "GPU"))
    gpus = _gpus(gpus_per_worker, device, any(cards))
    slots = [int(n / gpus + 1e-9) if gpus else 0 for n in cards]  # number of workers that each machine's GPUs allow
    n_workers = workers or (sum(slots) if gpus else sum(n > 0 for n in cpus))
    shares = Shares(n_workers, gpus, threads or _cpus_per_worker(cpus, slots, gpus, workers))
    capacity = sum(slots) if gpus else sum(n // shares.threads for n in cpus)
    if n_workers > capacity and not (grows and workers):
        raise ValueError(
            f"the cluster has room for {capacity} of {shares} (CPUs of the machines: {_listed(cpus)}; GPUs: "
            f"{_listed(cards)}); request fewer workers, threads or GPUs"
        )
    if not n_workers:
        raise ValueError(
            f"no worker fits: each needs {shares.gpus:g} GPU(s), and the machines have {_listed(cards)}"
            if gpus
            else "the cluster has no CPUs"
        )
    return shares


def _cpus_per_worker(cpus: Sequence[int], slots: Sequence[int], gpus: float, workers: int | None) -> int:
    """Largest number of CPUs that every worker can have, but at least 1."""
    if gpus:
        share = min((n // n_slots for n, n_slots in zip(cpus, slots, strict=True) if n_slots), default=1)
    elif workers is None:
        share = min((n for n in cpus if n), default=1)
    else:
        sizes = range(max(cpus, default=1), 1, -1)
        share = next((size for size in sizes if sum(n // size for n in cpus) >= workers), 1)
    return max(1, share)


def _gpus(requested: float | None, device: str | None, has_gpus: bool) -> float:
    on_cpu = device is not None and device.startswith("cpu")
    if requested is None:
        return float(has_gpus and not on_cpu)
    if requested < 0 or (requested > 1 and requested != int(requested)):
        raise ValueError(f"gpus_per_worker is {requested:g}; it must be a whole number, or a fraction below 1")
    if requested and on_cpu:
        raise ValueError(f"gpus_per_worker is {requested:g}, but the device is {device!r}; give only one of them")
    return float(requested)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "no"
