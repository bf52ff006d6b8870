"""The result files of a run, found and read; nothing here needs a model."""

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
"""How far below the run's folder files are looked for."""

_AT_MOST = 5_000
"""Files that a run may have; a folder with more is none."""

_OWN = ("_files", "scores", "checkpoint")
"""Ends of names of folders whose files are no results: a report's own, and chunks that a run goes on from."""

_SET_ASIDE = re.compile(r"\.\d+$")
"""Ends of names of records that a command put aside because they were made otherwise."""


@dataclass(frozen=True)
class StoredSweep:
    """A sweep's file.

    Attributes:
        path: The JSON-lines file.
        sweep: What it holds.
        wanted: Samples that the run was to do.
    """

    path: Path
    sweep: Sweep
    wanted: int

    @property
    def name(self) -> str:
        """The file's name without its end."""
        return self.path.stem

    @property
    def part(self) -> str:
        """Part of the data; empty for all of it, and where the file does not name one."""
        part = str(self.sweep.header.get("data", {}).get("part", ""))
        return "" if part == "all" else part

    @property
    def done(self) -> int:
        """Samples that are done."""
        return len(next(iter(self.sweep.evaluations.values())))


@dataclass(frozen=True)
class HeadScores:
    """Mean contextual scores of every head, by case.

    Attributes:
        path: The file.
        cases: Rows of a table: ``layer``, ``head`` and a column a kind of score; of each case.
        sizes: Samples of each case.
        header: What made them.
        intervals: ``[low, high]`` of the relevant score of some heads, by ``layer/head``, where the file has any.
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
    """One artefact of ``focuslens paper``: its folder and what ``artefact.json`` says."""

    path: Path
    content: Mapping[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """What was found in a folder.

    Attributes:
        root: The folder.
        sweeps: Sweeps, in the order of their paths.
        heads: Contextual scores.
        directions: Focus directions.
        artefacts: Tables and figures of the paper.
        responses: Contents of ``generate.json`` files.
        pages: Pages that other commands wrote.
        unread: Files that look like results and could not be read, with the reason.
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
        """What made each result, most telling first."""
        found = [one.header for one in self.heads] + [one.sweep.header for one in self.sweeps]
        found += [one.directions.provenance for one in self.directions]
        found += [one.content.get("header", {}) for one in self.artefacts]
        return [one for one in [*found, *(content for _, content in self.responses)] if one]


def read_run(root: Path) -> RunFiles:
    """Find and read a run's files.

    Raises:
        FileNotFoundError: If there is no such folder, or no results in it.
    """
    if not root.is_dir():
        raise FileNotFoundError(f"there is no folder {root}; name the --out of a command that has run")
    found = _Found(root)
    for path in _files(root, found):
        try:
            _read(path, found)
        except (ValueError, KeyError, TypeError, OSError) as error:
            found.unread.append((path, str(error.args[0] if isinstance(error, KeyError) else error)))
    files = found.finish()
    if not files.headers and not files.unread:
        raise FileNotFoundError(
            f"{root} holds no results: no records of a sweep (.jsonl), heads.json, results.json, directions.json, "
            "artefact.json or generate.json; name the --out of a command that has run"
        )
    return files


class _Found:
    """What has been found so far."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sweeps: list[StoredSweep] = []
        self.heads: list[HeadScores] = []
        self.directions: list[StoredDirections] = []
        self.artefacts: list[PaperArtefact] = []
        self.responses: list[tuple[Path, Mapping[str, Any]]] = []
        self.pages: list[Path] = []
        self.unread: list[tuple[Path, str]] = []

    def finish(self) -> RunFiles:
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


def _files(root: Path, found: _Found) -> Iterator[Path]:
    """Files of a run, nearer ones first, in the order of their names; folders of other kinds of files left out."""
    folders, seen = [root], 0
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
            why = f"it holds more than {_AT_MOST:,} files; folders further down were not looked into: name one of them"
            found.unread.append((root, why))
            return
        folders = below
    found.unread += [(folder, f"it lies more than {_DEPTH} folders down; name it itself") for folder in folders]


def _read(path: Path, found: _Found) -> None:
    """Take a file for what its name and content say it is; others are passed over."""
    if path.suffix == ".jsonl":
        if _SET_ASIDE.search(path.stem):
            return
        with path.open("rb") as file:
            if file.read(10) != b'{"header":':
                return
        sweep = load_sweep(path, rows=_written_rows(path))
        wanted = int(sweep.header.get("data", {}).get("samples", 0))
        found.sweeps.append(StoredSweep(path, sweep, max(wanted, len(next(iter(sweep.evaluations.values()))))))
    elif path.name == "directions.json":
        found.directions.append(StoredDirections(path.parent, FocusDirections.load(path.parent)))
    elif path.name in ("heads.json", "results.json", "generate.json", "artefact.json"):
        content = json.loads(path.read_text())
        if path.name == "generate.json":
            found.responses.append((path, content))
        elif path.name == "artefact.json":
            found.artefacts.append(PaperArtefact(path.parent, content))
        elif "scores" in content:
            found.heads.append(_heads(path, content))
    elif path.name == "index.html":
        found.pages.append(path)


def _heads(path: Path, content: Mapping[str, Any]) -> HeadScores:
    """Scores of ``focuslens heads`` (one case) or of ``focuslens demo`` (several)."""
    scores, several = content["scores"], isinstance(content["scores"], dict)
    cases = scores if several else {content["case"]: scores}
    if not scores or not all(cases.values()):
        raise ValueError("it has no scores")
    sizes = content["case_sizes"] if several else {content["case"]: len(content["samples"])}
    return HeadScores(path, cases, sizes, content, content.get("intervals", {}))


def _written_rows(path: Path) -> Sequence[Mapping[str, Any]]:
    """The table that the command wrote beside a sweep's records, with its intervals."""
    own, shared = path.with_suffix(".json"), path.parent / "results.json"
    if own.is_file():
        return json.loads(own.read_text()).get("settings", ())
    return json.loads(shared.read_text()).get(path.stem, ()) if shared.is_file() else ()
