"""Rows of a table of the user: of a file, a ``datasets.Dataset``, a data frame, or a list."""

from __future__ import annotations

import csv
import gzip
import hashlib
import io
import json
import math
import os
import re
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias, cast

from focuslens.data._jsonl import LineStore

__all__ = ["Row", "Rows", "digest_of_rows", "is_table", "open_rows"]

Row: TypeAlias = Mapping[str, Any]
"""Values of one row, by column."""

_JSON_LINES = (".jsonl", ".ndjson")
_TABLES = {".csv": ",", ".tsv": "\t"}
_WHOLE_FLOAT = re.compile(r"-?\d+\.0", re.ASCII)
_SUFFIXES = ".jsonl, .json, .csv, .tsv (all of them also with .gz) or .parquet"


@dataclass(frozen=True, eq=False)
class Rows:
    """Rows that are read on access.

    Attributes:
        name: Name of the source in messages.
        count: Number of rows.
        read: Function that returns a row, given its index.
        place: Function that returns the place of a row in messages, given its index, such as ``line 3``.
        path: Path of the file; ``None`` for rows that are no file.
        nested: Whether each row is a question out of an article, as in SQuAD's original files.
    """

    name: str
    count: int
    read: Callable[[int], Row]
    place: Callable[[int], str]
    path: Path | None = None
    nested: bool = False

    def where(self, index: int) -> str:
        """Place of a row, with the name of the source."""
        return f"{self.name}, {self.place(index)}"

    def __iter__(self) -> Iterator[Row]:
        return map(self.read, range(self.count))


def open_rows(source: Any, limit: int | None = None, keyed: Callable[[Row], list[Row]] | None = None) -> Rows:
    """Open the rows of a source.

    Args:
        source: A file, or an object of Python.
        limit: Largest number of rows; ``None`` for all.
        keyed: Function that turns the object of a ``.json`` file into rows, if it has no list ``data``; ``None`` to
            refuse such a file.

    Raises:
        FileNotFoundError: If a file does not exist.
        IsADirectoryError: If the path is that of a directory.
        ImportError: If a library that reads the format is missing.
        TypeError: If the source is of another kind.
        ValueError: If the source is empty, or a file is not in the format of its suffix.
    """
    is_path = isinstance(source, str | os.PathLike)
    rows = _of_file(Path(source), limit, keyed) if is_path else _of_object(source, limit)
    if not rows.count:
        raise ValueError(f"{rows.name} has no rows")

    def read(index: int) -> Row:
        return {name: _plain(value) for name, value in rows.read(index).items()}

    return replace(rows, read=read)


def _numbered(name: str, rows: Sequence[Row], word: str, path: Path | None = None, limit: int | None = None) -> Rows:
    chosen = rows if limit is None else rows[:limit]
    return Rows(name, len(chosen), lambda index: chosen[index], lambda index: f"{word} {index + 1}", path)


# Objects


def _of_object(source: Any, limit: int | None) -> Rows:
    kind = type(source).__name__
    wanted = f"give the path of a file ({_SUFFIXES}), a datasets.Dataset, a data frame, or a list of dicts"
    if isinstance(source, Mapping) or isinstance(getattr(source, "column_names", None), Mapping):
        splits = ", ".join(map(repr, cast("Mapping[str, Any]", source)))
        raise TypeError(
            f"source is a {kind} with {splits}; give one of them, such as source['train'], if it is a table"
        )
    if hasattr(source, "iloc") and hasattr(source, "columns"):
        names = _distinct([str(name) for name in source.columns], "the data frame")

        def row_of_frame(index: int) -> Row:
            return dict(zip(names, source.iloc[index].tolist(), strict=True))

        return Rows("the data frame", _limited(len(source), limit), row_of_frame, lambda index: f"row {index + 1}")
    if hasattr(source, "column_names") and hasattr(source, "__getitem__"):
        if not hasattr(source, "__len__"):
            raise TypeError(f"source is a {kind}, which has no length; give list(source.take(1000)), for example")
        return Rows(
            f"the {kind}",
            _limited(len(source), limit),
            lambda index: source[index],
            lambda index: f"row {index + 1}",
        )
    if isinstance(source, str | bytes) or not isinstance(source, Sequence):
        raise TypeError(f"source is {source!r:.60}, a {kind}; {wanted}")
    rows = cast("Sequence[Any]", source)
    for i, row in enumerate(rows):
        if not isinstance(row, Mapping):
            raise TypeError(f"source[{i}] is {row!r:.60}, a {type(row).__name__}; {wanted}")
    return _numbered("the list", cast("Sequence[Row]", rows), "row", limit=limit)


def _distinct(names: list[str], source: str) -> list[str]:
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"{source} has two columns {twice!r}; give each column a name of its own")
    return names


def _limited(count: int, limit: int | None) -> int:
    return count if limit is None else min(count, limit)


def _plain(value: Any) -> Any:
    """Value with NumPy's arrays and numbers as Python's own, and ``None`` for NaN, which marks a missing value."""
    if hasattr(value, "tolist"):
        value = value.tolist()
    if isinstance(value, float) and math.isnan(value):
        return None
    if isinstance(value, list | tuple):
        return [_plain(item) for item in cast("list[Any]", value)]
    if isinstance(value, Mapping):
        return {str(name): _plain(item) for name, item in cast("Mapping[Any, Any]", value).items()}
    # Of the missing values of pandas, only NaN is a number.
    return None if type(value).__name__ in ("NAType", "NaTType") else value


# Files


def is_table(path: str | Path) -> bool:
    """Whether a file is a table of the user, and not a lost-in-the-middle file.

    The suffix tells it and, for JSON lines, the fields of the first line. A line that is no JSON object tells nothing.
    """
    path = Path(path)
    suffix = _suffix(path)
    if suffix not in (".parquet", ".json", *_TABLES, *_JSON_LINES) or not path.is_file():
        return suffix in (".parquet", ".json", *_TABLES)
    if suffix not in (".json", *_JSON_LINES):
        return True
    try:
        line = next(iter(LineStore(path).scan()), b"")
        fields = json.loads(line)
    except ValueError:  # a list of objects goes over several lines, or the line is broken
        return suffix == ".json"
    if not isinstance(fields, dict):
        return suffix == ".json"
    row = cast("dict[str, Any]", fields)
    passages = cast("list[Any]", row["ctxs"]) if isinstance(row.get("ctxs"), list) else []
    marked = any(isinstance(passage, dict) and ("isgold" in passage or "hasanswer" in passage) for passage in passages)
    return not marked and "nq_annotated_gold" not in row


def _suffix(path: Path) -> str:
    return (Path(path.stem).suffix if path.suffix == ".gz" else path.suffix).lower()


def _of_file(path: Path, limit: int | None, keyed: Callable[[Row], list[Row]] | None = None) -> Rows:
    if not path.exists():
        raise FileNotFoundError(f"there is no file {str(path)!r}")
    if path.is_dir():
        raise IsADirectoryError(f"{str(path)!r} is a directory; name a file in it")
    suffix = _suffix(path)
    if suffix == ".parquet":
        return _of_parquet(path, limit)
    if suffix in _TABLES:
        return _of_csv(path, _TABLES[suffix], limit)
    if suffix in _JSON_LINES:
        return _of_json_lines(path, limit)
    if suffix == ".json":
        return _of_json(path, limit, keyed)
    raise ValueError(f"{path} has the suffix {path.suffix!r}; a table ends with {_SUFFIXES}")


def _of_json_lines(path: Path, limit: int | None) -> Rows:
    store = LineStore(path)
    count = 0
    for number, line in enumerate(store.scan(), start=1):
        count = number if line.strip() else count  # blank lines at the end of a file are no rows
        if count == limit:
            break

    def read(index: int) -> Row:
        return _object(_parsed(store[index], "every line must hold one JSON object"), "the line")

    return Rows(str(path), count, read, lambda index: f"line {store.number(index)}", path)


def _parsed(text: bytes, wanted: str) -> Any:
    try:
        return json.loads(text)
    except (json.JSONDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise ValueError(f"broken JSON ({error}); {wanted}") from error


def _object(value: Any, what: str) -> Row:
    if not isinstance(value, dict):
        raise ValueError(f"{what} is {json.dumps(value, ensure_ascii=False):.60}; it must be a JSON object")
    return cast("Row", value)


def _of_json(path: Path, limit: int | None, keyed: Callable[[Row], list[Row]] | None = None) -> Rows:
    content = _content(path)
    first, _, rest = content.lstrip().partition(b"\n")
    # Files of several benchmarks end with .json and have one object per line.
    if rest.strip() and _is_object(first):
        return _of_json_lines(path, limit)
    try:
        value = _parsed(content, "a .json file holds a list of objects")
        if isinstance(value, dict) and isinstance(cast("dict[str, Any]", value).get("data"), list):
            value = cast("dict[str, Any]", value)["data"]
        elif isinstance(value, dict) and keyed is not None:
            value = keyed(cast("Row", value))
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not isinstance(value, list):
        raise ValueError(
            f"{path} holds {content[:40].decode(errors='replace')!r}; a .json file holds a list of objects"
        )
    for i, entry in enumerate(cast("list[Any]", value)):
        if not isinstance(entry, dict):
            raise ValueError(f"{path}, entry {i + 1} is {entry!r:.60}; it must be a JSON object")
    return _numbered(str(path), cast("list[Row]", value), "entry", path, limit)


def _is_object(line: bytes) -> bool:
    try:
        return isinstance(json.loads(line), dict)
    except ValueError:
        return False


def _content(path: Path) -> bytes:
    """Content of a plain or gzipped file."""
    data = path.read_bytes()
    try:
        return gzip.decompress(data) if data[:2] == b"\x1f\x8b" else data
    except (OSError, EOFError) as error:
        raise ValueError(f"{path}: the gzip stream is damaged or cut off ({error}); download the file again") from error


def _of_csv(path: Path, delimiter: str, limit: int | None) -> Rows:
    try:
        text = _content(path).decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not in UTF-8 ({error}); save it in UTF-8") from error
    head = text.partition("\n")[0]
    if delimiter not in head and ";" in head:
        delimiter = ";"
    size = csv.field_size_limit(min(sys.maxsize, 2**31 - 1))  # a cell may contain a whole document
    try:
        rows, lines = _cells(path, csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True))
    finally:
        csv.field_size_limit(size)
    rows = _with_integers(rows)
    return Rows(
        str(path), _limited(len(rows), limit), lambda index: rows[index], lambda index: f"line {lines[index]}", path
    )


def _cells(path: Path, reader: Any) -> tuple[list[dict[str, str]], list[int]]:
    """Rows of a table with a header, and the line on which each row begins."""
    rows: list[dict[str, str]] = []
    lines: list[int] = []
    names: list[str] | None = None
    begins = 1
    try:
        for cells in reader:
            if names is None:
                names = _distinct([name.strip() for name in cells], str(path))
            elif cells:  # a line without any cell is an empty line
                if len(cells) != len(names):
                    raise ValueError(
                        f"{path}, line {begins}: the row has {len(cells)} cells, and the header has {len(names)} "
                        "columns; a cell that contains the delimiter, a quotation mark or a new line must be quoted"
                    )
                rows.append(dict(zip(names, cells, strict=True)))
                lines.append(begins)
            begins = reader.line_num + 1
    except csv.Error as error:
        raise ValueError(f"{path}, line {begins}: {error}; a cell with quotation marks must be quoted") from error
    return rows, lines


def _with_integers(rows: list[dict[str, str]]) -> list[Row]:
    """Rows in which columns of integers with gaps, which pandas writes as ``1932.0``, have integers.

    The whole file counts, so that a limit does not change a cell.
    """
    for name in rows[0] if rows else ():
        filled = [row[name] for row in rows if row[name]]
        if 0 < len(filled) < len(rows) and all(map(_WHOLE_FLOAT.fullmatch, filled)):
            for row in rows:
                row[name] = row[name].removesuffix(".0")
    return list(rows)


def _of_parquet(path: Path, limit: int | None) -> Rows:
    try:
        import pyarrow.parquet as parquet
    except ImportError as error:
        raise ImportError(
            f"{path}: Parquet files are read with pyarrow, which is missing; pip install pyarrow"
        ) from error
    names = _of_arrow(path, parquet.read_schema).names
    _distinct(names, str(path))  # pyarrow does not read two columns of one name
    table = _of_arrow(path, parquet.read_table)

    def read(index: int) -> Row:
        return table.slice(index, 1).to_pylist()[0]

    return Rows(str(path), _limited(table.num_rows, limit), read, lambda index: f"row {index + 1}", path)


def _of_arrow(path: Path, read: Callable[[Path], Any]) -> Any:
    try:
        return read(path)
    except (OSError, ValueError) as error:
        raise ValueError(f"{path} is not a Parquet file that can be read ({error})") from error


def digest_of_rows(rows: Rows) -> str:
    """SHA-256 digest of the file, as stored on disk, or of the rows of another source."""
    digest = hashlib.sha256()
    if rows.path is None:
        for row in rows:
            digest.update(json.dumps(dict(row), sort_keys=True, default=str).encode())
        return digest.hexdigest()
    with rows.path.open("rb") as file:
        while block := file.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
