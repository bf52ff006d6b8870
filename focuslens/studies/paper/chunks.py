"""Measurements of many samples in chunks. Each chunk is written to disk before the next chunk starts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from safetensors.torch import load, save
from torch import Tensor

from focuslens.data.needles import NeedleSample
from focuslens.model.batching import assumed_seconds
from focuslens.prompts.sample import MultiDocSample
from focuslens.util.estimates import Estimate
from focuslens.util.files import write_atomically
from focuslens.util.progress import progress_bar

if TYPE_CHECKING:
    from focuslens.model.execution import Executor

__all__ = ["CHUNK", "Measured", "chunk_size", "measure_in_chunks", "read_chunks"]

CHUNK = 64
"""Maximum number of samples per chunk."""

_CHUNK_SECONDS = 480.0
"""Longest duration of a chunk on slow hardware, unless a single sample takes longer. Most machines are several times
faster, so that a killed run loses about a minute of work."""

_T = TypeVar("_T")


@dataclass(frozen=True, eq=False)
class Measured:
    """Measurements of a list of samples.

    Attributes:
        tensors: Tensors by name. The tensors of several chunks are concatenated along the first axis.
        about: Lists of JSON values by name, such as the ids of the samples.
    """

    tensors: Mapping[str, Tensor]
    about: Mapping[str, Sequence[Any]]


def chunk_size(executor: Executor, sample: MultiDocSample | NeedleSample) -> int:
    """Number of samples like ``sample`` per chunk: fewer for larger models and longer prompts."""
    prompt = sample.prompt("long") if isinstance(sample, MultiDocSample) else sample.prompt
    seconds, size = assumed_seconds(executor) * len(executor.encode(prompt).tokens), CHUNK
    while size > 1 and size * seconds > _CHUNK_SECONDS:
        size //= 2
    return size


def measure_in_chunks(
    samples: Sequence[_T],
    folder: Path,
    measure: Callable[[Sequence[_T]], Measured],
    *,
    label: str,
    chunk: int,
    progress: bool | None = None,
) -> Measured:
    """Measure samples in chunks. Finished chunks are read from ``folder``.

    Interruptions do not change the chunks. A resumed run therefore gives bit-identical results. Chunks of another size,
    which an earlier version can have left, are measured again.

    Args:
        samples: Samples to measure.
        folder: Folder of the chunks. The folder's name must identify the model, the samples and the settings.
        measure: Function that measures one chunk of samples.
        label: Label of the progress bar.
        chunk: Number of samples per chunk; see :func:`chunk_size`.
        progress: Whether to show a progress bar; :mod:`focuslens.util.progress` describes the default.

    Raises:
        ValueError: If there are no samples.
    """
    if not samples:
        raise ValueError("there are no samples to score")
    starts, parts = range(0, len(samples), chunk), list[Measured]()
    n_done = sum(len(samples[i : i + chunk]) for i in starts if (folder / f"{i:06d}.safetensors").exists())
    with progress_bar(label, len(samples), show=progress) as bar, Estimate(len(samples) - n_done) as estimate:
        for start in starts:
            part, path = samples[start : start + chunk], folder / f"{start:06d}.safetensors"
            measured = _unpacked(path.read_bytes()) if path.exists() else None
            if measured is None or len(measured.about["sample_ids"]) != len(part):
                write_atomically(path, _packed(measure(part)))
                measured = _unpacked(path.read_bytes())
                estimate.finish(len(part))
            parts.append(measured)
            bar.update(len(part))
    for path in set(folder.glob("*.safetensors")) - {folder / f"{i:06d}.safetensors" for i in starts}:
        path.unlink()
    return _joined(parts)


def read_chunks(folder: Path) -> Measured:
    """All finished chunks of a folder, concatenated.

    Raises:
        FileNotFoundError: If the folder has no chunk.
    """
    parts = [_unpacked(path.read_bytes()) for path in sorted(folder.glob("*.safetensors"))]
    if not parts:
        raise FileNotFoundError(f"{folder} holds no measurements")
    return _joined(parts)


def _joined(parts: Sequence[Measured]) -> Measured:
    return Measured(
        {name: torch.cat([part.tensors[name] for part in parts]) for name in parts[0].tensors},
        {name: [entry for part in parts for entry in part.about[name]] for name in parts[0].about},
    )


def _packed(measured: Measured) -> bytes:
    """Bytes of a safetensors file with the tensors, and with the JSON values as metadata."""
    about = {name: list(values) for name, values in measured.about.items()}
    # The metadata is a single entry, because safetensors writes several entries in arbitrary order.
    metadata = {"about": json.dumps(about, sort_keys=True)}
    return save({name: tensor.contiguous() for name, tensor in measured.tensors.items()}, metadata=metadata)


def _unpacked(content: bytes) -> Measured:
    length = int.from_bytes(content[:8], "little")
    metadata: dict[str, str] = json.loads(content[8 : 8 + length])["__metadata__"]
    return Measured(load(content), json.loads(metadata["about"]))
