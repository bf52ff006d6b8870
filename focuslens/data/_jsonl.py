"""Random access to the lines of a plain or gzipped text file, without loading the file into memory."""

from __future__ import annotations

import gzip
import os
import tempfile
import weakref
import zlib
from array import array
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, cast

from focuslens.util.progress import progress_bar

__all__ = ["LineStore"]

_GZIP_MAGIC = b"\x1f\x8b"


class LineStore:
    """Random access to the lines of one file that are not blank.

    After one pass with :meth:`scan`, ``store[i]`` returns the line with the index ``i`` among them, and
    ``store.number(i)`` its number in the file, counted from 1.

    Only the byte offsets of the lines are kept in memory. A plain file is read in place. A gzip stream does not support
    random access. During the scan, the lines of a gzipped file are therefore copied to an anonymous temporary file. The
    temporary file is deleted by :meth:`close` or when the store is garbage-collected. The first two bytes of a file
    determine whether it is gzipped.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        if not self.path.exists():
            raise FileNotFoundError(
                f"there is no file {str(self.path)!r}; the multi-document QA files come from "
                "https://github.com/nelson-liu/lost-in-the-middle (qa_data, and the retrieval results its README links)"
            )
        if self.path.is_dir():
            raise IsADirectoryError(f"{str(self.path)!r} is a directory; name a file in it, such as *.jsonl.gz")
        with self.path.open("rb") as file:
            self._compressed = file.read(2) == _GZIP_MAGIC
        # The file stays open until the store is closed or garbage-collected. The cast is needed because the class of
        # a temporary file depends on the operating system.
        file = tempfile.TemporaryFile() if self._compressed else self.path.open("rb")  # noqa: SIM115
        self._file = cast("BinaryIO", file)
        self._offsets, self._numbers = array("Q"), array("Q")
        weakref.finalize(self, self._file.close)

    def scan(self) -> Iterator[bytes]:
        """Yield the lines that are not blank, and record their offsets for random access.

        One line is in memory at a time.

        Raises:
            ValueError: If a gzipped file is corrupt or truncated.
        """
        offset, number, bar = (
            0,
            0,
            progress_bar(f"reading {self.path.name}", self.path.stat().st_size, unit="B", passing=True),
        )
        with bar, self.path.open("rb") as raw, gzip.GzipFile(fileobj=raw) if self._compressed else raw as source:
            while line := self._next(source, number + 1):
                bar.update(raw.tell() - bar.n)
                if self._compressed:
                    self._file.write(line)
                number += 1
                start, offset = offset, offset + len(line)
                if line.strip():
                    self._offsets.append(start)
                    self._numbers.append(number)
                    yield line

    def _next(self, source: gzip.GzipFile | BinaryIO, number: int) -> bytes:
        try:
            return source.readline()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{self.path}, line {number}: the gzip stream is damaged or cut off ({error}); download the file again"
            ) from error

    def number(self, index: int) -> int:
        """Number of a line in the file, counted from 1."""
        return self._numbers[index]

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> bytes:
        if self._file.closed:
            raise ValueError(f"{self.path} has been closed; load it again to read more samples")
        self._file.seek(self._offsets[index])
        return self._file.readline()

    def close(self) -> None:
        """Close the file, and delete its temporary copy, if any. Further calls have no effect."""
        self._file.close()
