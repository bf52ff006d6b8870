"""Rewriting safetensors files without reading their tensors: the bytes are copied, whatever their number.

The format is eight bytes that say how long the header is, a header in JSON, and the tensors' bytes without holes
(https://github.com/huggingface/safetensors#format).
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from math import prod
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

__all__ = ["Shard", "copy", "dtype_of", "open_shard", "read", "rewrite"]

_DTYPES = {"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16, "F64": torch.float64}
_NAMES = {dtype: name for name, dtype in _DTYPES.items()}
_MAX_HEADER = 100_000_000  # what the library itself reads at most
_PART = 2**22  # bytes copied at once


class Shard(NamedTuple):
    """A safetensors file by its header."""

    path: Path
    tensors: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str]
    data_start: int

    @property
    def data_size(self) -> int:
        """Bytes of all tensors."""
        return max((entry["data_offsets"][1] for entry in self.tensors.values()), default=0)


def open_shard(path: Path) -> Shard:
    """Read a file's header.

    Raises:
        ValueError: If it is no safetensors file, or one that was cut off.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise ValueError(f"{path} is no safetensors file")
        header: dict[str, Any] = json.loads(file.read(length))
    shard = Shard(
        path, {k: v for k, v in header.items() if k != "__metadata__"}, header.get("__metadata__", {}), 8 + length
    )
    if size != shard.data_start + shard.data_size:
        raise ValueError(
            f"{path} has {size:,} bytes, and by its header {shard.data_start + shard.data_size:,}; it was cut off"
        )
    return shard


def dtype_of(shard: Shard, name: str) -> torch.dtype:
    """The dtype of a tensor.

    Raises:
        ValueError: If it is none that can be added to.
    """
    dtype = str(shard.tensors[name]["dtype"])
    if dtype not in _DTYPES:
        raise ValueError(f"{name} in {shard.path.name} is of the dtype {dtype}, and can be one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def read(shard: Shard, name: str) -> Tensor:
    """One tensor, read by itself."""
    entry = shard.tensors[name]
    start, end = entry["data_offsets"]
    with shard.path.open("rb") as file:
        file.seek(shard.data_start + start)
        content = bytearray(file.read(end - start))
    return torch.frombuffer(content, dtype=dtype_of(shard, name)).reshape(entry["shape"])


def rewrite(
    shard: Shard, target: Path, tensors: Mapping[str, Tensor], told: Callable[[int], object] = lambda written: None
) -> None:
    """Write a file that holds a shard's tensors and some more, or some in another's place.

    Args:
        shard: What is copied.
        target: The new file.
        tensors: Replace those of the same name, whose shape they have, and are added otherwise.
        told: Is told how many bytes were written, part by part.

    Raises:
        ValueError: If a tensor has not the shape of the one that it replaces.
    """
    entries: dict[str, Mapping[str, Any]] = dict(shard.tensors)
    for name, tensor in tensors.items():
        if name in entries and list(entries[name]["shape"]) != list(tensor.shape):
            raise ValueError(f"{name} is {entries[name]['shape']}; what replaces it is {list(tensor.shape)}")
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "bytes": _bytes(tensor)}
    # Widest types first, as the library writes them: so every tensor begins at a multiple of its type's size.
    names = sorted(entries, key=lambda name: -_width(entries[name]))
    header, end = dict[str, Mapping[str, Any]](), 0
    for name in names:
        start, end = end, end + _size(entries[name])
        header[name] = {key: entries[name][key] for key in ("dtype", "shape")} | {"data_offsets": [start, end]}
    text = json.dumps({**({"__metadata__": shard.metadata} if shard.metadata else {}), **header}).encode()
    text += b" " * (-len(text) % 8)
    with shard.path.open("rb") as source, target.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for name in names:
            if name in tensors:
                file.write(entries[name]["bytes"])
            else:
                source.seek(shard.data_start + entries[name]["data_offsets"][0])
                _copy(source, file, _size(entries[name]), told)


def copy(shard: Shard, target: Path, told: Callable[[int], object] = lambda written: None) -> None:
    """Write a file that holds what a shard holds; ``told`` is told how many bytes were written, part by part."""
    with shard.path.open("rb") as source, target.open("wb") as file:
        _copy(source, file, shard.data_start + shard.data_size, told)


def _size(entry: Mapping[str, Any]) -> int:
    if "bytes" in entry:
        return len(entry["bytes"])
    start, end = entry["data_offsets"]
    return end - start


def _width(entry: Mapping[str, Any]) -> int:
    """Bytes of a number; types of less than one count as none, and come last."""
    return _size(entry) // max(prod(entry["shape"]), 1)


def _copy(source: BinaryIO, target: BinaryIO, size: int, told: Callable[[int], object]) -> None:
    while size:
        part = source.read(min(size, _PART))
        if not part:
            raise ValueError(f"{source.name} was cut off while it was copied")
        target.write(part)
        size -= len(part)
        told(len(part))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
