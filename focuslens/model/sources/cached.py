"""List of what the cache folder holds, and its removal."""

from __future__ import annotations

import shutil
from collections.abc import Generator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout

from focuslens.model.sources.gguf_file import gguf_folder, gguf_origin
from focuslens.model.sources.known_models import KNOWN_MODELS, models_folder
from focuslens.util.cache import cache_folder
from focuslens.util.files import file_sizes

__all__ = ["CacheEntry", "cache_entries", "clear_cache"]

_NOTES = ("verified", "places")
"""Folders of small notes: comparisons of checkpoints with transformers, and places of models on this machine."""


@dataclass(frozen=True)
class CacheEntry:
    """Something in the cache folder. All of it can be made again.

    Attributes:
        kind: ``download``, ``conversion``, ``unfinished`` or ``notes``.
        name: Name of the model or GGUF file; the name of the folder for notes.
        path: The folder.
        size: Size of its files in bytes.
        digest: SHA-256 of the GGUF file of a conversion; otherwise empty.
    """

    kind: str
    name: str
    path: Path
    size: int
    digest: str = ""

    @classmethod
    def of(cls, kind: str, name: str, path: Path, digest: str = "") -> CacheEntry:
        """Entry for a folder, with the size of its files."""
        return cls(kind, name, path, sum(file_sizes(path)), digest)


def cache_entries() -> list[CacheEntry]:
    """Everything in the cache folder: downloaded models, converted GGUF files, unfinished work, and notes."""
    downloads = [CacheEntry.of("download", path.name, path) for path in _folders(models_folder())]
    conversions = [_conversion(path) for path in _folders(gguf_folder())]
    notes = [CacheEntry.of("notes", name, path) for name in _NOTES if (path := cache_folder() / name).is_dir()]
    return [*downloads, *conversions, *notes]


def _folders(parent: Path) -> list[Path]:
    return sorted(path for path in parent.iterdir() if path.is_dir()) if parent.is_dir() else []


def _conversion(path: Path) -> CacheEntry:
    origin = gguf_origin(path)
    if origin is None or path.name.startswith("."):
        return CacheEntry.of("unfinished", path.name.lstrip(".")[:12], path)
    return CacheEntry.of("conversion", f"{origin['file']} ({origin['quantization']})", path, str(origin["sha256"]))


def clear_cache(names: Sequence[str] = ()) -> tuple[list[CacheEntry], list[CacheEntry]]:
    """Remove entries of the cache folder.

    Args:
        names: Names of entries, or the beginnings of digests; by default everything.

    Returns:
        The removed entries, and the entries that another process is writing and that were kept.

    Raises:
        ValueError: If a name fits no entry.
    """
    entries = cache_entries()
    for name in names:
        if not any(_fits(entry, name) for entry in entries):
            known = ", ".join(entry.name for entry in entries) or "nothing"
            raise ValueError(f"the cache has no {name!r}; it holds {known}")
    removed: list[CacheEntry] = []
    kept: list[CacheEntry] = []
    for entry in entries:
        if names and not any(_fits(entry, name) for name in names):
            continue
        with _unused(entry) as unused:
            if unused:
                shutil.rmtree(entry.path)
            (removed if unused else kept).append(entry)
    return removed, kept


def _fits(entry: CacheEntry, name: str) -> bool:
    """Whether a name means an entry: its name, the model or file of a conversion, or the beginning of a digest."""
    if name in (entry.name, entry.name.rpartition(" (")[0]):
        return True
    known = name in KNOWN_MODELS and entry.digest == KNOWN_MODELS[name].sha256
    return known or (bool(entry.digest) and len(name) >= 6 and entry.digest.startswith(name))


@contextmanager
def _unused(entry: CacheEntry) -> Generator[bool]:
    """Hold the lock of an entry while it is removed. The value is ``False`` if another process holds it."""
    if entry.kind == "notes":
        yield True
        return
    digest = entry.path.name.lstrip(".").partition(".")[0]
    lock = entry.path / "lock" if entry.kind == "download" else entry.path.parent / f"{digest}.lock"
    held = FileLock(lock)
    try:
        held.acquire(timeout=0)
    except Timeout:
        yield False
        return
    try:
        yield True
    finally:
        held.release()
