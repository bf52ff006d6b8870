"""Report of a run, with all sections in order on one page."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

from focuslens.viz.report import Section, write_sections
from focuslens.viz.run_report.attributions import attribution_section
from focuslens.viz.run_report.examples import Sources, examples_section
from focuslens.viz.run_report.reading import RunFiles, read_run
from focuslens.viz.run_report.sections import (
    ReportFolder,
    artefact_section,
    directions_section,
    heads_section,
    responses_section,
    sweep_section,
)

__all__ = ["run_facts", "write_run_report"]


def write_run_report(
    folder: str | Path,
    page: str | Path | None = None,
    *,
    sources: Sources | None = None,
    title: str | None = None,
    log: Callable[[str], None] = lambda text: None,
) -> tuple[Path, list[str]]:
    """Write the report of a run as one offline page, and return its path and a sentence for each missing part.

    The page also contains these sentences. Figures and their data are written to a folder beside the page. For
    ``report.html``, this folder is ``report_files``.

    Args:
        folder: The ``--out`` folder of a command, or a folder that contains several ``--out`` folders.
        page: The file to write; by default ``report.html`` in ``folder``.
        sources: Locations of the model and the data, and the number of samples with an attention view.
        title: The page's title; by default the names of the folder and the model.
        log: Function that is called with one line of text per step.

    Raises:
        FileNotFoundError: If the folder does not exist or contains no results.
    """
    root = Path(folder)
    files = read_run(root)
    output = ReportFolder(Path(page) if page is not None else root / "report.html", root)
    sections = _sections(output, files)
    examples = examples_section(files, sources or Sources(), log)
    if examples or files.sweeps or not files.attributions:
        sections.append(examples or _no_examples(files))
    if files.unread:
        unread = tuple(f"{path.relative_to(root)} could not be read: {why}" for path, why in files.unread)
        sections.append(Section("unread", "What could not be read", missing=unread))
    name = str(_first(files, "model").get("name", "")) if files.headers else ""
    heading = title or f"FocusLens: {' on '.join(filter(None, (root.resolve().name, Path(name).name)))}"
    written = write_sections(output.page, title=heading, facts=_facts(output, files), sections=sections)
    return written, [text for section in sections for text in section.missing]


def run_facts(folder: str | Path) -> dict[str, str]:
    """Commands, models, data, seeds and versions of a run, in the form in which the run's report lists them.

    Raises:
        FileNotFoundError: If the folder does not exist or contains no results.
    """
    root = Path(folder)
    return _facts(ReportFolder(root / "report.html", root), read_run(root))


def _sections(output: ReportFolder, files: RunFiles) -> list[Section]:
    inside = {artefact.path for artefact in files.artefacts}
    found = [(artefact.path, artefact_section(output, artefact)) for artefact in files.artefacts]
    found += [(scores.path, heads_section(output, scores)) for scores in files.heads]
    sweeps = [stored for stored in files.sweeps if stored.path.parent not in inside]
    # Validation sweeps, on which settings are chosen, come after the sweeps that report the chosen settings.
    sweeps.sort(key=lambda stored: stored.part == "validation")
    found += [(stored.path, sweep_section(output, stored, files.sweeps)) for stored in sweeps]
    found += [(stored.path, directions_section(output, stored)) for stored in files.directions]
    found += [(path, attribution_section(output, path, content)) for path, content in files.attributions]
    found += [(path, responses_section(output, path, content)) for path, content in files.responses]
    # Sections of one title are told apart by the paths of their results.
    titles = Counter(section.title for _, section in found)
    return [
        section if titles[section.title] == 1 else replace(section, title=f"{section.title} ({_place(output, path)})")
        for path, section in found
    ]


def _place(output: ReportFolder, path: Path) -> str:
    """Path of a result in the run's folder, or the folder's name if the result is the folder itself."""
    inside = path.relative_to(output.root)
    return inside.as_posix() if inside.name else output.root.resolve().name


def _no_examples(files: RunFiles) -> Section:
    """Section that states why no samples are shown. The reason depends on the kind of run."""
    why = (
        "Its sweeps compare no setting with a baseline, so no sample became right or wrong."
        if files.sweeps
        else "This run compares no settings on the same samples; focuslens split-softmax and focuslens steer do, and "
        "with --out their records are shown here."
    )
    return Section("examples", "Samples that became right, and wrong", missing=(why,))


def _first(files: RunFiles, key: str) -> Mapping[str, Any]:
    return next((header[key] for header in files.headers if isinstance(header.get(key), dict)), {})


def _facts(output: ReportFolder, files: RunFiles) -> dict[str, str]:
    """Commands, models, data, seeds and versions from the headers of the result files."""
    headers = files.headers
    facts = {
        "commands": _several(str(header["command"]) for header in headers if "command" in header),
        "model": _several(_model(header["model"]) for header in headers if isinstance(header.get("model"), dict)),
        "data": _several(_data(header["data"]) for header in headers if isinstance(header.get("data"), dict)),
        "seed": _several(str(header["seed"]) for header in headers if "seed" in header),
        "new tokens at most": _several(
            str(header["max_new_tokens"]) for header in headers if "max_new_tokens" in header
        ),
        "versions": _several(
            ", ".join(f"{name} {number}" for name, number in header["versions"].items())
            for header in headers
            if "versions" in header
        ),
        "other pages": _several(output.link(path) for path in files.pages),
        "folder": files.root.resolve().name,
    }
    return {name: text for name, text in facts.items() if text}


def _several(texts: Any) -> str:
    return "; ".join(dict.fromkeys(texts))


def _model(description: Mapping[str, Any]) -> str:
    revision = f" at {description['revision']}" if description.get("revision") else ""
    return (
        f"{description.get('name')}{revision}: {description.get('backend')}, {description.get('dtype')} on "
        f"{description.get('device')}, context {description.get('n_ctx')}, weights {description.get('weights')}"
    )


def _data(description: Mapping[str, Any]) -> str:
    part = "" if description.get("part") == "all" else description.get("part")
    choice = description.get("distractors", "random")
    distractors = "" if choice == "random" else f"distractors by {choice}, "
    rows = description.get("rows")
    if rows is not None:
        counted = f"{description.get('samples')} of {rows} rows, form {description.get('form')}"
        return (
            f"{description.get('file')}{f' ({part})' if part else ''}: {counted}, prompts "
            f"{str(description.get('prompts_sha256'))[:16]}"
        )
    return (
        f"{description.get('file')}{f' ({part})' if part else ''}: {description.get('samples')} samples of "
        f"{description.get('num_documents')} documents, gold at {description.get('gold_positions')}, {distractors}"
        f"prompts {str(description.get('prompts_sha256'))[:16]}"
    )
