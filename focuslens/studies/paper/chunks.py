"""What is measured of many samples, in chunks that are on disk before the next one is begun."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor

from focuslens.util.files import write_atomically
from focuslens.util.progress import progress_bar

__all__ = ["CHUNK", "Measured", "measure_in_chunks"]

CHUNK = 64
"""Samples that are measured between two writes."""

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Measured:
    """What was measured of some samples.

    Attributes:
        tensors: By name; those of two chunks are joined along their first axis.
        about: What goes with them, by name: lists of what JSON can hold.
    """

    tensors: Mapping[str, Tensor]
    about: Mapping[str, Sequence[Any]]


def measure_in_chunks(
    samples: Sequence[_T],
    folder: Path,
    measure: Callable[[Sequence[_T]], Measured],
    *,
    label: str,
    progress: bool | None = None,
) -> Measured:
    """Measure samples, taking what is there already from ``folder``.

    Chunks are the same whether or not a run was killed, so the results are the same to the last bit.

    Args:
        samples: Any number of them.
        folder: Where chunks are kept. Its name must tell the model, the samples and the settings from others.
        measure: Measures some of them.
        label: Of the progress bar.
        progress: Show one; by default where someone may watch.

    Raises:
        ValueError: If there are no samples.
    """
    if not samples:
        raise ValueError("there are no samples to score")
    parts: list[Measured] = []
    with progress_bar(label, len(samples), show=progress) as bar:
        for start in range(0, len(samples), CHUNK):
            chunk, path = samples[start : start + CHUNK], folder / f"{start:06d}.safetensors"
            if not path.exists():
                write_atomically(path, _packed(measure(chunk)))
            parts.append(_unpacked(path.read_bytes()))
            bar.update(len(chunk))
    return Measured(
        {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors},
        {name: [one for part in parts for one in part.about[name]] for name in parts[0].about},
    )


def _packed(measured: Measured) -> bytes:
    """Tensors, and what goes with them as metadata: one file, whole or not there."""
    about = {name: list(values) for name, values in measured.about.items()}
    # One entry: safetensors writes several in any order, and the same results shall be the same file.
    metadata = {"about": json.dumps(about, sort_keys=True)}
    return save({name: tensor.contiguous() for name, tensor in measured.tensors.items()}, metadata=metadata)


def _unpacked(content: bytes) -> Measured:
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return Measured(load(content), json.loads(metadata["about"]))
