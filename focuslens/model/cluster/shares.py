"""How many workers a cluster gets, and what of its machines each of them gets."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

__all__ = ["Shares", "share_out"]


@dataclass(frozen=True)
class Shares:
    """What is asked of a cluster.

    Attributes:
        workers: Copies of the model.
        gpus: Of each; below 1 where several share one.
        threads: Of each, for computations on the CPU.
    """

    workers: int
    gpus: float
    threads: int

    @property
    def cpus(self) -> int:
        """CPUs that are reserved for each: none where GPUs say how many workers a machine takes."""
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
    """One worker a GPU or, where there are none, one a machine; unless something else is asked for.

    Args:
        machines: ``CPU`` and ``GPU`` of each, as far as it has any.
        workers: How many in all.
        gpus_per_worker: Several for a model that does not fit one, a fraction for a small one, 0 for none.
        threads: Of each worker; by default its share of a machine's CPUs.
        device: Where the model goes; with ``cpu`` no GPU is asked for.
        grows: Whether the cluster may get more machines than it has: then more can be asked for than is there.

    Raises:
        ValueError: If a number is not positive, or the cluster does not have what is asked for.
    """
    for option, value in (("workers", workers), ("threads", threads)):
        if value is not None and value < 1:
            raise ValueError(f"{option} is {value}; it must be at least 1")
    cpus, cards = ([int(one.get(kind, 0)) for one in machines] for kind in ("CPU", "GPU"))
    gpus = _gpus(gpus_per_worker, device, any(cards))
    on_gpus = [int(n / gpus + 1e-9) if gpus else 0 for n in cards]
    wanted = workers or (sum(on_gpus) if gpus else sum(n > 0 for n in cpus))
    if gpus:
        share = min((n // place for n, place in zip(cpus, on_gpus, strict=True) if place), default=1)
    elif workers is None:
        share = min((n for n in cpus if n), default=1)
    else:
        share = next((n for n in range(max(cpus, default=1), 1, -1) if sum(one // n for one in cpus) >= workers), 1)
    shares = Shares(wanted, gpus, threads or max(1, share))
    room = sum(on_gpus) if gpus else sum(n // shares.threads for n in cpus)
    if shares.workers > room and not (grows and workers):
        raise ValueError(
            f"there is room for {room} of {shares} (CPUs of the machines: {_listed(cpus)}; GPUs: {_listed(cards)}); "
            "ask for fewer workers, threads or GPUs"
        )
    if not shares.workers:
        raise ValueError(
            f"no worker fits: each is to have {shares.gpus:g} GPU(s), and the machines have {_listed(cards)}"
            if gpus
            else "the cluster has no CPUs"
        )
    return shares


def _gpus(asked: float | None, device: str | None, any_there: bool) -> float:
    on_cpu = device is not None and device.startswith("cpu")
    if asked is None:
        return float(any_there and not on_cpu)
    if asked < 0 or (asked > 1 and asked != int(asked)):
        raise ValueError(f"gpus_per_worker is {asked:g}; it must be a whole number, or a part of 1")
    if asked and on_cpu:
        raise ValueError(f"gpus_per_worker is {asked:g}, but the device is {device!r}; leave one of them away")
    return float(asked)


def _listed(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers)) or "no"
