"""Result files from which a killed run can resume: a header that describes the run, then one JSON line per sample.

A sample's line is written when all settings of the sample are finished. Until then, finished settings are kept in a
second file beside the result file, with the suffix ``.unfinished``. This file is removed when it is no longer needed.
"""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from focuslens.util.files import require_writable
from focuslens.util.refused_runs import OtherResultsError, require_same_run

__all__ = ["RecordFile", "read_records", "unfinished_path"]

_PART_SECONDS = 10.0
"""Finished settings of unfinished samples are written once they have taken this long. Short runs write no such file."""


def unfinished_path(path: Path) -> Path:
    """File beside a result file that keeps the finished settings of unfinished samples."""
    return path.with_name(f"{path.name}.unfinished")


def read_records(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """Read the header and the complete records of a result file, without changing the file.

    A killed run can leave an incomplete last line. This line is ignored.

    Raises:
        FileNotFoundError: If the file does not exist.
        ValueError: If the file is not a result file, or if it has no complete line.
    """
    path = Path(path)
    content = path.read_bytes()
    entries = _entries(path, content[: content.rfind(b"\n") + 1])
    if not entries:
        raise ValueError(f"{path} contains no complete line: it is not a result file, or its run was killed at once")
    # Files of earlier versions, and joined files, can contain a sample twice. It counts once.
    return entries[0]["header"], list({record["id"]: record for record in entries[1:]}.values())


class RecordFile:
    """JSON-lines file with a header in the first line and a record with an ``id`` in every other line.

    Records are written and flushed as whole lines. If a run is killed, the last line can be incomplete. When the file
    is opened again, an incomplete line is removed, and its sample is run again. No complete record is lost or repeated.

    Args:
        path: Path of the file. The file and its folder are created when the first record is written.
        header: Description of the run. An existing file must have an equal header.

    Raises:
        OtherResultsError: If the file belongs to a different run. The message names the difference.
        ValueError: If the file is not a result file, or the path is that of a directory or below a file.

    Attributes:
        records: Record of each finished sample, by its id.
        parts: Results of each sample that has no record yet, by its id and by the name of the setting.
        pace: Planned duration of the run per prompt token, in seconds; ``None`` until it is planned.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.header: dict[str, Any] = json.loads(json.dumps(header))
        self.records: dict[str, dict[str, Any]] = {}
        self.parts: dict[str, dict[str, Any]] = {}
        self.pace: float | None = None
        self._unwritten: list[dict[str, Any]] = []
        self._last_write = time.monotonic()
        self._sizes: dict[Path, int] = {}
        require_writable(self.path)
        if self.path.exists():
            self.records = {record["id"]: record for record in self._read(self.path)}
        if self._parts_path.exists():
            for part in self._read(self._parts_path):
                self._keep(part)
            self._forget_recorded()

    @property
    def _parts_path(self) -> Path:
        return unfinished_path(self.path)

    def _read(self, path: Path) -> list[dict[str, Any]]:
        """Entries after the header. An incomplete last line is removed from the file."""
        content = path.read_bytes()
        complete_lines = content[: content.rfind(b"\n") + 1]
        entries = _entries(path, complete_lines)
        if entries:
            require_same_run(path, entries[0]["header"], self.header)
            self.pace = float(entries[0].get("seconds_per_token", 0.0))
        elif not self._header_line().startswith(content[: len(_line({"header": self.header})) - 2]):
            kind = OtherResultsError if content.startswith(b'{"header"') else ValueError
            raise kind(f"{path} is not a result file of these settings; name another file, or delete it")
        if len(complete_lines) < len(content):
            os.truncate(path, len(complete_lines))
        self._sizes[path] = len(complete_lines)
        return entries[1:]

    def _header_line(self) -> bytes:
        """First line of the file: the header and, if batches were cut to save work, the pace they were cut by."""
        return _line({"header": self.header, **({"seconds_per_token": self.pace} if self.pace else {})})

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Append records to the file. When this method returns, the records are on disk."""
        self.write(self.path, records)
        self.records.update((record["id"], record) for record in records)
        self._forget_recorded()

    def append_part(self, setting: str, results: Mapping[str, Any]) -> None:
        """Keep the results of one setting, by sample id, until the records of these samples are appended.

        The results are on disk no later than with the first call after ten seconds without a write.
        """
        part = {"id": "", "setting": setting, "results": dict(results)}
        self._keep(part)
        self._unwritten.append(part)
        if time.monotonic() - self._last_write >= _PART_SECONDS:
            self.write(self._parts_path, self._unwritten)
            self._unwritten = []

    def _keep(self, part: Mapping[str, Any]) -> None:
        for name, result in part["results"].items():
            self.parts.setdefault(name, {})[part["setting"]] = result

    def _forget_recorded(self) -> None:
        """Forget the parts of samples that have a record, and remove the file of parts if no other part is left."""
        self.parts = {name: results for name, results in self.parts.items() if name not in self.records}
        if not self.parts:
            self._unwritten = []
            if self._sizes.pop(self._parts_path, None) is not None:
                self._parts_path.unlink(missing_ok=True)

    def write(self, path: Path, entries: Sequence[dict[str, Any]]) -> None:
        """Append entries to one of the run's files. When this method returns, they are on disk.

        Raises:
            OtherResultsError: If another process has written to the file since this run read or wrote it.
        """
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("ab") as file:
            size = os.fstat(file.fileno()).st_size
            if size != self._sizes.get(path, 0):
                raise OtherResultsError(
                    f"{path} was changed by another process since this run opened it; two runs cannot share a file: "
                    "name another file for one of them"
                )
            file.write((b"" if size else self._header_line()) + b"".join(map(_line, entries)))
            file.flush()
            os.fsync(file.fileno())
            self._sizes[path] = os.fstat(file.fileno()).st_size
        self._last_write = time.monotonic()


def _entries(path: Path, content: bytes) -> list[dict[str, Any]]:
    return [_entry(path, line, number) for number, line in enumerate(content.splitlines(), start=1)]


def _entry(path: Path, line: bytes, number: int) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is not JSON ({error}); name another file") from error
    key, kind = ("header", dict) if number == 1 else ("id", str)
    if not isinstance(entry, dict) or not isinstance(cast("dict[str, Any]", entry).get(key), kind):
        raise ValueError(f"{path}, line {number} has no {key!r}: it is not a result file; name another")
    return cast("dict[str, Any]", entry)


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode() + b"\n"
