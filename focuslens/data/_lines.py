"""Access by line number to a text file that is too large for memory, compressed or not."""

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
    """Lines of one file, which :meth:`scan` streams once and which can then be read by number.

    Only the offsets of the lines are held in memory. A gzip stream cannot be read from the middle. The lines of a
    compressed file (recognised by its first bytes) are therefore copied to an anonymous temporary file during the
    scan. :meth:`close` deletes that file, and so does garbage collection of the store. A plain file is read in place.
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
        # The file stays open as long as the store lives. Its class depends on the operating system, hence the cast.
        file = tempfile.TemporaryFile() if self._compressed else self.path.open("rb")  # noqa: SIM115
        self._file = cast("BinaryIO", file)
        self._offsets = array("Q")
        weakref.finalize(self, self._file.close)

    def scan(self) -> Iterator[bytes]:
        """Yield every line in order, with one line in memory at a time. After the scan, lines can be read by number.

        Raises:
            ValueError: If a compressed file is damaged or cut off.
        """
        offset, bar = 0, progress_bar(f"reading {self.path.name}", self.path.stat().st_size, unit="B", passing=True)
        with bar, self.path.open("rb") as raw, gzip.GzipFile(fileobj=raw) if self._compressed else raw as source:
            while line := self._next(source):
                bar.update(raw.tell() - bar.n)
                if self._compressed:
                    self._file.write(line)
                self._offsets.append(offset)
                offset += len(line)
                yield line

    def _next(self, source: gzip.GzipFile | BinaryIO) -> bytes:
        try:
            return source.readline()
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(
                f"{self.path}, line {len(self) + 1}: the gzip stream is damaged or cut off ({error}); "
                "download the file again"
            ) from error

    def __len__(self) -> int:
        return len(self._offsets)

    def __getitem__(self, index: int) -> bytes:
        if self._file.closed:
            raise ValueError(f"{self.path} has been closed; load it again to read more samples")
        self._file.seek(self._offsets[index])
        return self._file.readline()

    def close(self) -> None:
        """Close the file, and delete the temporary copy if there is one. A second call has no effect."""
        self._file.close()
