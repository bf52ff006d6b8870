"""Result files that survive a kill at any moment: a header that says what made them, then one JSON line a sample."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, cast

__all__ = ["OtherResultsError", "RecordFile", "read_records"]


class OtherResultsError(ValueError):
    """A result file holds records made by another model, on other data or under other settings."""


def read_records(path: str | Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The header and the whole records of a result file, whatever made them; the file stays as it is.

    A last line that a killed run left unfinished is passed over.

    Raises:
        FileNotFoundError: If there is no such file.
        ValueError: If it is no result file.
    """
    path = Path(path)
    content = path.read_bytes()
    entries = _entries(path, content[: content.rfind(b"\n") + 1])
    if not entries:
        raise ValueError(f"{path} holds no whole line: this is no result file, or its run was stopped at once")
    return entries[0]["header"], entries[1:]


class RecordFile:
    """A JSON-lines file whose first line is a header and whose others are records with an ``id``.

    A record is written and flushed as a whole line. After a kill the last line may be half a line: it is cut off, and
    its sample is run again. Nothing is repeated and nothing lost.

    Args:
        path: The file; made, with its directory, when the first record is written.
        header: What made the records. A file with another header is not continued.

    Raises:
        OtherResultsError: If the file holds records made otherwise; the message says what differs.
        ValueError: If it holds something else.
    """

    def __init__(self, path: str | Path, header: Mapping[str, Any]) -> None:
        self.path = Path(path)
        self.header: dict[str, Any] = json.loads(json.dumps(header))
        self.records: dict[str, dict[str, Any]] = {}
        if self.path.exists():
            self._read()

    def _read(self) -> None:
        content = self.path.read_bytes()
        whole = content[: content.rfind(b"\n") + 1]
        entries = _entries(self.path, whole)
        if entries:
            self._require_same(entries[0]["header"])
            self.records = {record["id"]: record for record in entries[1:]}
        elif not _line({"header": self.header}).startswith(content):
            kind = OtherResultsError if content.startswith(b'{"header"') else ValueError
            raise kind(f"{self.path} is no result file of these settings; name another file, or delete it")
        if len(whole) < len(content):
            os.truncate(self.path, len(whole))

    def _require_same(self, found: Mapping[str, Any]) -> None:
        differing = [key for key in {**found, **self.header} if found.get(key) != self.header.get(key)]
        if differing:
            key, was, now = _first_difference(sorted(differing)[0], found, self.header)
            raise OtherResultsError(
                f"{self.path} holds results made otherwise ({', '.join(sorted(differing))} differ; {key} was "
                f"{_short(was)}, is now {_short(now)}); name another file, or delete it"
            )

    def append(self, records: Sequence[dict[str, Any]]) -> None:
        """Write records, and have them on disk before returning."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with self.path.open("ab") as file:
            header = [] if file.tell() else [{"header": self.header}]
            entries = [*header, *records]
            file.write(b"".join(map(_line, entries)))
            file.flush()
            os.fsync(file.fileno())
        self.records.update((record["id"], record) for record in records)


def _entries(path: Path, whole: bytes) -> list[dict[str, Any]]:
    return [_entry(path, line, number) for number, line in enumerate(whole.splitlines(), start=1)]


def _entry(path: Path, line: bytes, number: int) -> dict[str, Any]:
    try:
        entry = json.loads(line)
    except ValueError as error:
        raise ValueError(f"{path}, line {number} is not JSON ({error}); name another file") from error
    key, kind = ("header", dict) if number == 1 else ("id", str)
    if not isinstance(entry, dict) or not isinstance(cast("dict[str, Any]", entry).get(key), kind):
        raise ValueError(f"{path}, line {number} has no {key!r}: this is no result file; name another")
    return cast("dict[str, Any]", entry)


def _line(entry: Mapping[str, Any]) -> bytes:
    return json.dumps(entry, ensure_ascii=False).encode() + b"\n"


def _first_difference(key: str, found: Any, wanted: Any) -> tuple[str, Any, Any]:
    """Where two headers first differ below ``key``, as deep as both are objects: ``model.weights``, not ``model``."""
    was, now = found.get(key), wanted.get(key)
    while isinstance(was, dict) and isinstance(now, dict):
        old, new = cast("dict[str, Any]", was), cast("dict[str, Any]", now)
        inner = min(name for name in {**old, **new} if old.get(name) != new.get(name))
        key, was, now = f"{key}.{inner}", old.get(inner), new.get(inner)
    return key, was, now


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 120 else text[:117] + "..."
