"""Result files from which a killed run can resume: a header that describes the run, then one JSON line per sample."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

from focuslens.evaluation.refused_runs import OtherResultsError, require_same_run

__all__ = ["RecordFile", "read_records"]


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
    return entries[0]["header"], entries[1:]


class RecordFile:
    """JSON-lines file with a header in the first line and a record with an ``id`` in every other line.

    Records are written and flushed as whole lines. If a run is killed, the last line can be incomplete. When the file
    is opened again, an incomplete line is removed, and its sample is run again. No complete record is lost or repeated.

    Args:
        path: Path of the file. The file and its folder are created when the first record is written.
        header: Description of the run. An existing file must have an equal header.

    Raises:
        OtherResultsError: If the file belongs to a different run. The message names the difference.
        ValueError: If the file is not a result file.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.header: dict[str, Any] = json.loads(json.dumps(header))
        self.records: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        complete_lines = content[: content.rfind(b"\n") + 1]
        entries = _entries(self.path, complete_lines)
        if entries:
            require_same_run(self.path, entries[0]["header"], self.header)
            self.records = {record["id"]: record for record in entries[1:]}
        elif not _line({"header": self.header}).startswith(content):
            kind = OtherResultsError if content.startswith(b'{"header"') else ValueError
            raise kind(f"{self.path} is not a result file of these settings; name another file, or delete it")
        if len(complete_lines) < len(content):
            os.truncate(self.path, len(complete_lines))

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Append records to the file. When this method returns, the records are on disk."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            header = [] if file.tell() else [{"header": self.header}]
            entries = [*header, *records]
            file.write(b"".join(map(_line, entries)))
            file.flush()
            os.fsync(file.fileno())
        self.records.update((record["id"], record) for record in records)


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
