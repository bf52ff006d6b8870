"""Reading of GGUF files: metadata, tensor table, and the checks that come before a conversion."""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from focuslens.util.cache import cache_folder
from focuslens.util.progress import progress_bar

__all__ = ["ORIGIN", "GgufFile", "check_gguf", "gguf_folder", "gguf_origin", "read_gguf"]

ORIGIN = "gguf.json"
"""File beside a converted checkpoint that names the GGUF file. It is written last."""

_MAGIC = b"GGUF"
_SPLIT = re.compile(r"-\d{5}-of-(\d{5})\.gguf$", re.IGNORECASE)
_BLOCK = 2**22


@dataclass(frozen=True, eq=False)
class GgufFile:
    """A GGUF file without the data of its tensors.

    Attributes:
        path: The file.
        metadata: All entries of its header, by key. Arrays are lists.
        elements: Number of elements of each tensor, by name.
        types: GGML type of each tensor, such as ``Q4_K``, by name.
    """

    path: Path
    metadata: Mapping[str, Any]
    elements: Mapping[str, int]
    types: Mapping[str, str]

    @property
    def architecture(self) -> str:
        """Architecture under llama.cpp's name, such as ``llama`` or ``gemma3``."""
        return str(self.metadata["general.architecture"])

    @property
    def settings(self) -> dict[str, Any]:
        """Entries of the architecture, such as ``attention.head_count``, without the architecture's name."""
        prefix = f"{self.architecture}."
        return {key.removeprefix(prefix): value for key, value in self.metadata.items() if key.startswith(prefix)}

    @cached_property
    def quantization(self) -> str:
        """Type of the file, such as ``Q4_K_M``; by default the type that most tensors have."""
        from gguf import LlamaFileType

        declared = self.metadata.get("general.file_type")
        if declared in {kind.value for kind in LlamaFileType}:
            return re.sub(r"^(MOSTLY|ALL)_", "", LlamaFileType(declared).name)
        return Counter(self.types.values()).most_common(1)[0][0]

    @cached_property
    def sha256(self) -> str:
        """SHA-256 of the file."""
        digest = hashlib.sha256()
        label = f"reading {self.path.name}"
        with progress_bar(label, self.path.stat().st_size, unit="B", passing=True) as bar, self.path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)
                bar.update(len(block))
        return digest.hexdigest()

    def tensor(self, name: str) -> Any:
        """Values of a tensor as a numpy array, dequantised."""
        from gguf import GGUFReader
        from gguf.quants import dequantize

        found = next(tensor for tensor in GGUFReader(self.path).tensors if tensor.name == name)
        return dequantize(found.data, found.tensor_type)


def check_gguf(path: Path) -> None:
    """Check the first bytes and the name of a GGUF file.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a GGUF file, or one part of a model that is split over several files.
    """
    if not path.is_file():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    with path.open("rb") as file:
        magic = file.read(len(_MAGIC))
    if magic != _MAGIC:
        raise ValueError(
            f"{str(path)!r} is not a GGUF file: it begins with {magic!r} and not with {_MAGIC!r}. The download may be "
            "a page or a Git LFS pointer; download the file again"
        )
    if (parts := _SPLIT.search(path.name)) and int(parts[1]) > 1:
        raise ValueError(_split(path, int(parts[1])))


def _split(path: Path, parts: int) -> str:
    return (
        f"{str(path)!r} is one of {parts} parts of a model; a single file is needed: "
        f"llama-gguf-split --merge {path.name} merged.gguf, with the first part's name"
    )


def read_gguf(path: str | Path) -> GgufFile:
    """Read the header of a GGUF file, and check that the file is complete.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is not a GGUF file, is cut off, is one of several parts, or has no architecture.
    """
    from gguf import GGUFReader

    path = Path(path)
    check_gguf(path)
    try:
        reader = GGUFReader(path)
        metadata = {name: field.contents() for name, field in reader.fields.items()}
        tensors = {tensor.name: tensor for tensor in reader.tensors}
    except (ValueError, IndexError, KeyError, OverflowError, MemoryError, UnicodeDecodeError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise ValueError(
            f"the GGUF file {str(path)!r} of {path.stat().st_size:,} bytes cannot be read ({reason}): it may be cut "
            "off; download it again"
        ) from error
    if isinstance(parts := metadata.get("split.count"), int) and parts > 1:
        raise ValueError(_split(path, parts))
    if not isinstance(metadata.get("general.architecture"), str):
        raise ValueError(f"the GGUF file {str(path)!r} does not name its architecture (general.architecture)")
    elements = {name: int(tensor.n_elements) for name, tensor in tensors.items()}
    types = {name: str(tensor.tensor_type.name) for name, tensor in tensors.items()}
    return GgufFile(path, metadata, elements, types)


def gguf_folder() -> Path:
    """Folder of the converted checkpoints. It may not exist yet."""
    return cache_folder() / "gguf"


def gguf_origin(directory: str | Path) -> dict[str, Any] | None:
    """Name, digest and quantisation of the GGUF file of a converted checkpoint; ``None`` for other directories."""
    try:
        origin = json.loads((Path(directory) / ORIGIN).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return {key: origin.get(key) for key in ("file", "sha256", "quantization")}
