"""The result files of a run, found and read without a model."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from focuslens.evaluation import Sweep, load_sweep
from focuslens.interventions.directions import FocusDirections

__all__ = ["HeadScores", "PaperArtefact", "RunFiles", "StoredDirections", "StoredSweep", "read_run"]

_DEPTH = 6
"""Levels of folders in which files are looked for, the run's own included."""

_AT_MOST = 5_000
"""Files after which no deeper folder is looked into."""

_OWN = ("_files", "scores", "checkpoint")
"""Ends of names of folders without results: a report's own, and chunks for resuming a run."""

_SET_ASIDE = re.compile(r"\.\d+$")
"""Ends of names of records that a command set aside because another run had made them."""


@dataclass(frozen=True)
class StoredSweep:
    """A sweep's file.

    Attributes:
        path: The JSON-lines file.
        sweep: Its content.
        wanted: Number of samples of the complete run.
    """

    path: Path
    sweep: Sweep
    wanted: int

    @property
    def name(self) -> str:
        """The file's name without its suffix."""
        return self.path.stem

    @property
    def part(self) -> str:
        """Part of the data; empty for all of it, and where the file does not name one."""
        part = str(self.sweep.header.get("data", {}).get("part", ""))
        return "" if part == "all" else part

    @property
    def done(self) -> int:
        """Number of samples that are done."""
        return len(next(iter(self.sweep.evaluations.values())))


@dataclass(frozen=True)
class HeadScores:
    """Mean contextual scores of every head, by case.

    Attributes:
        path: The file.
        cases: Rows of a table per case: ``layer``, ``head`` and a column per kind of score.
        sizes: Number of samples of each case.
        header: Model, data, seed and versions.
        intervals: ``[low, high]`` of the relevant score of some heads, by ``layer/head``, or none.
    """

    path: Path
    cases: Mapping[str, Sequence[Mapping[str, Any]]]
    sizes: Mapping[str, int]
    header: Mapping[str, Any]
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])


@dataclass(frozen=True)
class StoredDirections:
    """A directory of focus directions."""

    path: Path
    directions: FocusDirections


@dataclass(frozen=True)
class PaperArtefact:
    """One artefact of ``focuslens paper``: its folder and the content of ``artefact.json``."""

    path: Path
    content: Mapping[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """Result files of a folder.

    Attributes:
        root: The folder.
        sweeps: Sweeps, in the order of their paths.
        heads: Contextual scores.
        directions: Focus directions.
        artefacts: Tables and figures of the paper.
        responses: Contents of ``generate.json`` files.
        pages: Pages of other commands.
        unread: Files with the names of results that could not be read, and the reason.
    """

    root: Path
    sweeps: tuple[StoredSweep, ...] = ()
    heads: tuple[HeadScores, ...] = ()
    directions: tuple[StoredDirections, ...] = ()
    artefacts: tuple[PaperArtefact, ...] = ()
    responses: tuple[tuple[Path, Mapping[str, Any]], ...] = ()
    pages: tuple[Path, ...] = ()
    unread: tuple[tuple[Path, str], ...] = ()

    @property
    def headers(self) -> list[Mapping[str, Any]]:
        """Model, data, seed and versions of each result; the headers with most entries come first."""
        headers = [scores.header for scores in self.heads] + [stored.sweep.header for stored in self.sweeps]
        headers += [stored.directions.provenance for stored in self.directions]
        headers += [artefact.content.get("header", {}) for artefact in self.artefacts]
        return [header for header in [*headers, *(content for _, content in self.responses)] if header]


def read_run(root: Path) -> RunFiles:
    """Find and read a run's files.

    Raises:
        FileNotFoundError: If there is no such folder, or no results in it.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; name the --out of a command that has run")
    reader = _Reader(root)
    for path in reader.paths():
        try:
            reader.read(path)
        except (ValueError, KeyError, TypeError, OSError) as error:
            reader.unread.append((path, str(error.args[0] if isinstance(error, KeyError) else error)))
    files = reader.files()
    if not files.headers and not files.unread:
        raise FileNotFoundError(
            f"{root} holds no results: no records of a sweep (.jsonl), heads.json, results.json, directions.json, "
            "artefact.json or generate.json; name the --out of a command that has run"
        )
    return files


class _Reader:
    """Finds and reads the files of a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sweeps: list[StoredSweep] = []
        self.heads: list[HeadScores] = []
        self.directions: list[StoredDirections] = []
        self.artefacts: list[PaperArtefact] = []
        self.responses: list[tuple[Path, Mapping[str, Any]]] = []
        self.pages: list[Path] = []
        self.unread: list[tuple[Path, str]] = []

    def files(self) -> RunFiles:
        return RunFiles(
            self.root,
            tuple(self.sweeps),
            tuple(self.heads),
            tuple(self.directions),
            tuple(self.artefacts),
            tuple(self.responses),
            tuple(self.pages),
            tuple(self.unread),
        )

    def paths(self) -> Iterator[Path]:
        """Paths with the suffixes of results, level by level in the order of names; skips folders without results."""
        folders, seen = [self.root], 0
        for _ in range(_DEPTH):
            below: list[Path] = []
            for folder in folders:
                for path in sorted(folder.iterdir()):
                    if path.is_dir() and not path.name.startswith(".") and not path.name.endswith(_OWN):
                        below.append(path)
                    elif path.is_file() and path.suffix in (".json", ".jsonl", ".html"):
                        yield path
                        seen += 1
            if seen > _AT_MOST and below:
                why = f"it holds more than {_AT_MOST:,} files; folders further down were not looked into"
                self.unread.append((self.root, f"{why}: name one of them"))
                return
            folders = below
        why = f"it lies more than {_DEPTH} folders down; name it itself"
        self.unread += [(folder, why) for folder in folders]

    def read(self, path: Path) -> None:
        """Read a file of the kind that its name and content show; pass over other files."""
        if path.suffix == ".jsonl":
            self.read_sweep(path)
        elif path.name == "directions.json":
            self.directions.append(StoredDirections(path.parent, FocusDirections.load(path.parent)))
        elif path.name in ("heads.json", "results.json", "generate.json", "artefact.json"):
            content = json.loads(path.read_text())
            if path.name == "generate.json":
                self.responses.append((path, content))
            elif path.name == "artefact.json":
                self.artefacts.append(PaperArtefact(path.parent, content))
            elif "scores" in content:
                self.heads.append(_heads(path, content))
        elif path.name == "index.html":
            self.pages.append(path)

    def read_sweep(self, path: Path) -> None:
        """Read the records of a sweep; pass over records that were set aside, and other JSON lines."""
        if _SET_ASIDE.search(path.stem):
            return
        with path.open("rb") as file:
            if file.read(10) != b'{"header":':
                return
        sweep = load_sweep(path, rows=_written_rows(path))
        wanted = int(sweep.header.get("data", {}).get("samples", 0))
        self.sweeps.append(StoredSweep(path, sweep, max(wanted, len(next(iter(sweep.evaluations.values()))))))


def _heads(path: Path, content: Mapping[str, Any]) -> HeadScores:
    """Scores of ``focuslens heads`` (one case) or of ``focuslens demo`` (several)."""
    scores, several = content["scores"], isinstance(content["scores"], dict)
    cases = scores if several else {content["case"]: scores}
    if not scores or not all(cases.values()):
        raise ValueError("it has no scores")
    sizes = content["case_sizes"] if several else {content["case"]: len(content["samples"])}
    return HeadScores(path, cases, sizes, content, content.get("intervals", {}))


def _written_rows(path: Path) -> Sequence[Mapping[str, Any]]:
    """Rows of the table beside a sweep's records, with their intervals."""
    own, shared = path.with_suffix(".json"), path.parent / "results.json"
    if own.is_file():
        return json.loads(own.read_text()).get("settings", ())
    return json.loads(shared.read_text()).get(path.stem, ()) if shared.is_file() else ()
