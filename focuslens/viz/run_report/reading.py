"""Result files of a run, found and read without a model."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from focuslens.evaluation import Setting, Sweep, load_sweep
from focuslens.interventions.directions import FocusDirections
from focuslens.viz.run_report.run_progress import SET_ASIDE

__all__ = ["HeadScores", "PaperArtefact", "RunFiles", "StoredDirections", "StoredSweep", "read_run"]

_DEPTH = 6
"""Number of folder levels to search for files, including the run's folder."""

_AT_MOST = 5_000
"""Number of files after which deeper folder levels are not searched."""

_OWN = ("_files", "scores", "checkpoint")
"""Name endings of folders to skip: figures of a report, and intermediate files from which a run resumes."""


@dataclass(frozen=True)
class StoredSweep:
    """Sweep that was read from a file.

    Attributes:
        path: Path of the JSON-lines file.
        sweep: The sweep.
        wanted: Number of samples in the complete run.
    """

    path: Path
    sweep: Sweep
    wanted: int

    @property
    def name(self) -> str:
        """Name of the file without its suffix."""
        return self.path.stem

    @property
    def part(self) -> str:
        """Part of the data, such as ``validation``; empty if the sweep uses all data or has no recorded part."""
        part = str(self.sweep.header.get("data", {}).get("part", ""))
        return "" if part == "all" else part

    def described(self, setting: Setting) -> Mapping[str, Any]:
        """Description of a setting in the file, with its interventions and, if it has one, its method."""
        return next(entry for entry in self.sweep.header["settings"] if entry["name"] == setting.name)

    @property
    def compared(self) -> list[Setting]:
        """Settings on long prompts that have interventions, a method, or a parameter ``alpha`` or ``tau``."""
        return [
            setting
            for setting in self.sweep.settings
            if setting.case == "long"
            and (
                {"alpha", "tau"} & set(setting.parameters)
                or self.described(setting).get("interventions")
                or "method" in self.described(setting)
            )
        ]

    @property
    def varied(self) -> str:
        """Parameter that the settings vary: ``alpha`` or ``tau``; empty if they vary neither."""
        names = {name for setting in self.sweep.settings for name in setting.parameters}
        return next((name for name in ("alpha", "tau") if name in names), "")

    @property
    def done(self) -> int:
        """Number of finished samples."""
        return len(next(iter(self.sweep.evaluations.values())))


@dataclass(frozen=True)
class HeadScores:
    """Mean contextual scores of every head, by case, such as ``long`` or ``gold``.

    Attributes:
        path: Path of the file with the scores.
        cases: Table of each case, with one row per head. A row has ``layer``, ``head`` and one value per kind of score.
        sizes: Number of samples in each case.
        header: Model, data, seed and versions.
        intervals: Intervals ``[low, high]`` of relevant scores, with keys ``layer/head``. Some heads can be missing.
    """

    path: Path
    cases: Mapping[str, Sequence[Mapping[str, Any]]]
    sizes: Mapping[str, int]
    header: Mapping[str, Any]
    intervals: Mapping[str, Sequence[float]] = field(default_factory=dict[str, Sequence[float]])


@dataclass(frozen=True)
class StoredDirections:
    """Focus directions that were read from a directory."""

    path: Path
    directions: FocusDirections


@dataclass(frozen=True)
class PaperArtefact:
    """One artefact of ``focuslens paper``: its folder and the content of ``artefact.json``."""

    path: Path
    content: Mapping[str, Any]


@dataclass(frozen=True)
class RunFiles:
    """Contents of all result files in a run's folder.

    Attributes:
        root: Folder of the run.
        sweeps: Sweeps, in the order in which their files were found.
        heads: Contextual scores.
        directions: Focus directions.
        artefacts: Tables and figures of the paper.
        responses: Paths and contents of ``generate.json`` files.
        attributions: Paths and contents of ``attribution.json`` files.
        pages: Paths of the HTML pages that commands wrote.
        unread: Result files that could not be read, and folders that were not searched, each with the reason.
    """

    root: Path
    sweeps: tuple[StoredSweep, ...] = ()
    heads: tuple[HeadScores, ...] = ()
    directions: tuple[StoredDirections, ...] = ()
    artefacts: tuple[PaperArtefact, ...] = ()
    responses: tuple[tuple[Path, Mapping[str, Any]], ...] = ()
    attributions: tuple[tuple[Path, Mapping[str, Any]], ...] = ()
    pages: tuple[Path, ...] = ()
    unread: tuple[tuple[Path, str], ...] = ()

    @property
    def headers(self) -> list[Mapping[str, Any]]:
        """Header of each result: head scores, sweeps, directions, artefacts, responses and attributions, in order."""
        headers = [scores.header for scores in self.heads] + [stored.sweep.header for stored in self.sweeps]
        headers += [stored.directions.provenance for stored in self.directions]
        headers += [artefact.content.get("header", {}) for artefact in self.artefacts]
        headers += [content for _, content in (*self.responses, *self.attributions)]
        return [header for header in headers if header]


def read_run(root: Path) -> RunFiles:
    """Find and read the result files in a run's folder.

    Raises:
        FileNotFoundError: If the folder does not exist or contains no results.
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
            "artefact.json, generate.json or attribution.json; name the --out of a command that has run"
        )
    return files


class _Reader:
    """Reader of the result files in a folder."""

    def __init__(self, root: Path) -> None:
        self.root = root
        self.sweeps: list[StoredSweep] = []
        self.heads: list[HeadScores] = []
        self.directions: list[StoredDirections] = []
        self.artefacts: list[PaperArtefact] = []
        self.responses: list[tuple[Path, Mapping[str, Any]]] = []
        self.attributions: list[tuple[Path, Mapping[str, Any]]] = []
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
            tuple(self.attributions),
            tuple(self.pages),
            tuple(self.unread),
        )

    def paths(self) -> Iterator[Path]:
        """Paths of all files with the suffix of a result file, level by level, sorted by name within each folder.

        Hidden folders and folders that ``_OWN`` excludes are skipped. ``unread`` states where the search ended early.
        """
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
                why = f"it holds more than {_AT_MOST:,} files; folders further down were not searched"
                self.unread.append((self.root, f"{why}: name one of these folders instead"))
                return
            folders = below
        why = f"it lies more than {_DEPTH} folders down; name this folder instead"
        self.unread += [(folder, why) for folder in folders]

    def read(self, path: Path) -> None:
        """Read a result file, whose kind follows from its name and content. Skip all other files."""
        if path.suffix == ".jsonl":
            self.read_sweep(path)
        elif path.name == "directions.json":
            self.directions.append(StoredDirections(path.parent, FocusDirections.load(path.parent)))
        elif path.name in ("heads.json", "results.json", "generate.json", "attribution.json", "artefact.json"):
            content = json.loads(path.read_text())
            if path.name == "generate.json":
                self.responses.append((path, content))
            elif path.name == "attribution.json":
                if not {"samples", "heads", "responses"} <= content.keys():
                    raise ValueError("it has no answers of focuslens attribute")
                self.attributions.append((path, content))
            elif path.name == "artefact.json":
                self.artefacts.append(PaperArtefact(path.parent, content))
            elif "scores" in content:
                self.heads.append(_heads(path, content))
        elif path.name == "index.html":
            self.pages.append(path)

    def read_sweep(self, path: Path) -> None:
        """Read a file of sweep records. Skip files that a command set aside, and JSON-lines files of other kinds."""
        if SET_ASIDE.search(path.stem):
            return
        with path.open("rb") as file:
            first = file.readline()
        if not first.startswith(b'{"header":'):
            return
        # Files of scores and of responses have a header too, without settings.
        if first.endswith(b"\n") and "settings" not in json.loads(first)["header"]:
            return
        sweep = load_sweep(path, rows=_written_rows(path))
        wanted = int(sweep.header.get("data", {}).get("samples", 0))
        self.sweeps.append(StoredSweep(path, sweep, max(wanted, len(next(iter(sweep.evaluations.values()))))))


def _heads(path: Path, content: Mapping[str, Any]) -> HeadScores:
    """Head scores from the output of ``focuslens heads`` (one case) or ``focuslens demo`` (several cases)."""
    scores, several = content["scores"], isinstance(content["scores"], dict)
    cases = scores if several else {content["case"]: scores}
    if not scores or not all(cases.values()):
        raise ValueError("it has no scores")
    sizes = content["case_sizes"] if several else {content["case"]: len(content["samples"])}
    return HeadScores(path, cases, sizes, content, content.get("intervals", {}))


def _written_rows(path: Path) -> Sequence[Mapping[str, Any]]:
    """Result rows of a sweep, with intervals, from a JSON file beside its records; empty if there is no such file."""
    own, shared = path.with_suffix(".json"), path.parent / "results.json"
    if own.is_file():
        return json.loads(own.read_text()).get("settings", ())
    return json.loads(shared.read_text()).get(path.stem, ()) if shared.is_file() else ()
