"""Files are written completely or not at all."""

from __future__ import annotations

import os
import stat
from pathlib import Path
from typing import Any

import pytest

from focuslens.util.files import file_sizes, versions, write_atomically, write_json


def test_content_directory_and_permissions_are_those_of_an_ordinary_file(tmp_path: Path) -> None:
    path = tmp_path / "new" / "deeper" / "file.bin"
    old = os.umask(0o027)
    try:
        write_atomically(path, b"\x00\xff content")
    finally:
        os.umask(old)
    assert path.read_bytes() == b"\x00\xff content"
    assert stat.S_IMODE(path.stat().st_mode) == 0o640
    assert os.umask(old) == old
    assert [entry.name for entry in path.parent.iterdir()] == ["file.bin"]


@pytest.mark.parametrize("broken", ["fsync", "replace"])
def test_what_fails_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str
) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"old")

    def fail(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(os if broken == "fsync" else Path, broken, fail)
    with pytest.raises(OSError, match="disk full"):
        write_atomically(path, b"new")
    assert path.read_bytes() == b"old"
    assert [entry.name for entry in tmp_path.iterdir()] == ["file"]


def test_an_existing_file_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_atomically(path, b"a long old content")
    write_atomically(path, b"new")
    assert path.read_bytes() == b"new"


def test_json_is_indented_ends_with_a_line_and_holds_no_nan(tmp_path: Path) -> None:
    path = tmp_path / "results.json"
    write_json(path, {"a": [1]})
    assert path.read_text() == '{\n  "a": [\n    1\n  ]\n}\n'
    with pytest.raises(ValueError, match="JSON compliant"):
        write_json(path, {"a": float("nan")})
    assert path.read_text().startswith('{\n  "a"')


def test_versions_name_what_decides_results(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch
    import transformers

    found = versions()
    assert set(found) == {"python", "focuslens", "torch", "transformer-lens", "transformers", "tokenizers"}
    assert found["torch"].split("+")[0] == torch.__version__.split("+")[0]
    assert found["transformers"] == transformers.__version__

    from importlib.metadata import PackageNotFoundError

    def missing(name: str) -> str:
        raise PackageNotFoundError(name)

    monkeypatch.setattr("focuslens.util.files.version", missing)
    assert versions()["torch"] == "not installed"


def test_what_a_killed_write_left_is_removed_by_a_later_one(tmp_path: Path) -> None:
    path = tmp_path / "file[1]"
    left, fresh, others = (tmp_path / name for name in (".file[1].abcd1234", ".file[1].efgh5678", ".file2.abcd1234"))
    for file in (left, fresh, others):
        file.write_bytes(b"half")
    for file in (left, others):
        os.utime(file, (1.0, 1.0))
    write_atomically(path, b"new")
    assert sorted(entry.name for entry in tmp_path.iterdir()) == [".file2.abcd1234", ".file[1].efgh5678", "file[1]"]


def test_sizes_leave_out_what_another_process_removes_meanwhile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    for name, size in {"a.whl": 3, "inner/b.whl": 5, "inner/c.txt": 1, "gone/d.whl": 7}.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(bytes(size))
    assert sorted(file_sizes(tmp_path)) == [1, 3, 5, 7]
    assert sorted(file_sizes(tmp_path, ".whl")) == [3, 5, 7]
    listing, status = os.scandir, os.lstat

    def scandir(path: Any) -> Any:
        if str(path).endswith("gone"):
            raise FileNotFoundError(path)
        return listing(path)

    def lstat(path: Any, **options: Any) -> os.stat_result:
        if str(path).endswith("b.whl"):
            raise FileNotFoundError(path)
        return status(path, **options)

    monkeypatch.setattr(os, "scandir", scandir)
    monkeypatch.setattr(os, "lstat", lstat)
    assert sorted(file_sizes(tmp_path)) == [1, 3]
