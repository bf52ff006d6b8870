"""Command-line options of a Ray cluster, and the workers that these options describe.

``focuslens --help`` imports this module. Ray and torch are therefore imported only inside functions.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Generator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from focuslens.model.execution import Executor

__all__ = ["add_options", "open_pool"]

_LOG = logging.getLogger(__name__)


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add ``--ray`` and the options of the Ray workers."""
    ray = parser.add_argument_group("many machines")
    ray.add_argument(
        "--ray",
        nargs="?",
        const="local",
        metavar="ADDRESS",
        help="spread samples over a Ray cluster: local (default; starts Ray here), auto, HOST:PORT or ray://HOST:PORT",
    )
    ray.add_argument(
        "--ray-workers",
        type=int,
        metavar="N",
        help="number of workers, each with a copy of the model; default: one per GPU, or one per machine without GPUs",
    )
    ray.add_argument(
        "--ray-gpus-per-worker",
        type=float,
        metavar="N",
        help="GPUs per worker, also below 1 (default 1, or 0 without GPUs)",
    )
    ray.add_argument(
        "--ray-threads", type=int, metavar="N", help="CPU threads of a worker; default: its share of a machine's CPUs"
    )


@contextmanager
def open_pool(
    args: argparse.Namespace,
    model: str,
    settings: Mapping[str, Any],
) -> Generator[Executor | None]:
    """Pool of Ray workers that each load the model, for use in a ``with`` block; ``None`` without ``--ray``.

    Args:
        args: Parsed options of the command.
        model: Hub name or directory of the model.
        settings: Keyword arguments of ``FocusModel.from_pretrained``.

    Raises:
        ValueError: If a cluster option such as ``--ray-workers`` is given without ``--ray``.
    """
    if args.ray is None:
        for option in ("ray_workers", "ray_gpus_per_worker", "ray_threads"):
            if getattr(args, option) is not None:
                raise ValueError(f"--{option.replace('_', '-')} {getattr(args, option):g} needs --ray")
        yield None
        return
    from focuslens.model.cluster import RayPool

    _LOG.info("starting workers of %s, each of which loads %s", args.ray, model)
    pool = RayPool(
        model,
        address=args.ray,
        workers=args.ray_workers,
        gpus_per_worker=args.ray_gpus_per_worker,
        threads=args.ray_threads,
        **settings,
    )
    with pool:
        _LOG.info("Ray: %s", pool.shares)
        yield pool
