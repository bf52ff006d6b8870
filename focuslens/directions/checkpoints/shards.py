"""Rewriting of safetensors files of any size by copying bytes, without loading the tensors.

A safetensors file consists of the length of the header (eight bytes), the header in JSON, and the bytes of the tensors
without gaps (https://github.com/huggingface/safetensors#format).
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
_MAX_HEADER = 100_000_000  # maximum size of a header in bytes, as in the safetensors library
_PART = 2**22  # bytes per read


class Shard(NamedTuple):
    """Header of a safetensors file."""

    path: Path
    tensors: Mapping[str, Mapping[str, Any]]
    metadata: Mapping[str, str]
    data_start: int

    @property
    def data_size(self) -> int:
        """Size of all tensors, in bytes."""
        return max((entry["data_offsets"][1] for entry in self.tensors.values()), default=0)


def open_shard(path: Path) -> Shard:
    """Read the header of a safetensors file.

    Raises:
        ValueError: If the file is not a safetensors file, or if it is truncated.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, _MAX_HEADER):
            raise ValueError(f"{path} is not a safetensors file")
        header: dict[str, Any] = json.loads(file.read(length))
    shard = Shard(
        path, {k: v for k, v in header.items() if k != "__metadata__"}, header.get("__metadata__", {}), 8 + length
    )
    if size != shard.data_start + shard.data_size:
        raise ValueError(
            f"{path} has {size:,} bytes, but its header requires {shard.data_start + shard.data_size:,}; it was cut off"
        )
    return shard


def dtype_of(shard: Shard, name: str) -> torch.dtype:
    """Dtype of a tensor.

    Raises:
        ValueError: If the dtype is not float16, bfloat16, float32 or float64.
    """
    dtype = str(shard.tensors[name]["dtype"])
    if dtype not in _DTYPES:
        raise ValueError(f"{name} in {shard.path.name} has the dtype {dtype}; it must be one of {', '.join(_DTYPES)}")
    return _DTYPES[dtype]


def read(shard: Shard, name: str) -> Tensor:
    """Read a single tensor, without loading the rest of the file."""
    entry = shard.tensors[name]
    start, end = entry["data_offsets"]
    with shard.path.open("rb") as file:
        file.seek(shard.data_start + start)
        content = bytearray(file.read(end - start))
    return torch.frombuffer(content, dtype=dtype_of(shard, name)).reshape(entry["shape"])


def rewrite(
    shard: Shard, target: Path, tensors: Mapping[str, Tensor], progress: Callable[[int], object] = lambda written: None
) -> None:
    """Write a copy of a shard in which some tensors are replaced or added.

    Args:
        shard: Header of the source file.
        target: Path of the new file.
        tensors: New tensors by name. A new tensor replaces the shard's tensor of the same name. If the shard has no
            tensor of this name, the new tensor is added.
        progress: Callback that receives the size of each copied block, in bytes.

    Raises:
        ValueError: If a new tensor differs in shape from the tensor that it replaces.
    """
    entries: dict[str, Mapping[str, Any]] = dict(shard.tensors)
    for name, tensor in tensors.items():
        if name in entries and list(entries[name]["shape"]) != list(tensor.shape):
            raise ValueError(
                f"{name} has the shape {entries[name]['shape']}; its replacement has the shape {list(tensor.shape)}"
            )
        entries[name] = {"dtype": _NAMES[tensor.dtype], "shape": list(tensor.shape), "bytes": _bytes(tensor)}
    # The widest dtypes come first, as in the safetensors library. This order aligns every tensor to its element size.
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
                _copy(source, file, _size(entries[name]), progress)


def copy(shard: Shard, target: Path, progress: Callable[[int], object] = lambda written: None) -> None:
    """Copy a shard to a new file. ``progress`` receives the size of each copied block, in bytes."""
    with shard.path.open("rb") as source, target.open("wb") as file:
        _copy(source, file, shard.data_start + shard.data_size, progress)


def _size(entry: Mapping[str, Any]) -> int:
    if "bytes" in entry:
        return len(entry["bytes"])
    start, end = entry["data_offsets"]
    return end - start


def _width(entry: Mapping[str, Any]) -> int:
    """Number of bytes per element, rounded down. Dtypes of less than one byte have width 0 and come last."""
    return _size(entry) // max(prod(entry["shape"]), 1)


def _copy(source: BinaryIO, target: BinaryIO, size: int, progress: Callable[[int], object]) -> None:
    while size:
        part = source.read(min(size, _PART))
        if not part:
            raise ValueError(f"{source.name} was cut off while it was copied")
        target.write(part)
        size -= len(part)
        progress(len(part))


def _bytes(tensor: Tensor) -> bytes:
    return tensor.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes()
