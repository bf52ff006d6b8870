"""Sections of a run's report: findings with intervals, figures with their data, and tables."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import chain, count
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
from matplotlib.axes import Axes

from focuslens.evaluation import Setting, best_setting, bootstrap_mean
from focuslens.heads import Head
from focuslens.scores.contextual_scores import KINDS
from focuslens.util.files import write_atomically
from focuslens.viz import (
    curves,
    direction_curves,
    head_map,
    loss_curves,
    norms_by_rank,
    save_figure,
    split_softmax_curves,
)
from focuslens.viz.report import Figure, Section, Table
from focuslens.viz.run_report.chance import ABOVE, ABOVE_CAPTION, DOTS, chance_cells, chance_findings
from focuslens.viz.run_report.reading import HeadScores, PaperArtefact, StoredDirections, StoredSweep

__all__ = [
    "ReportFolder",
    "artefact_section",
    "chosen_setting",
    "directions_section",
    "heads_section",
    "responses_section",
    "sweep_section",
]

_SHOWN_HEADS = 20
_OUTLINED = 8


@dataclass(frozen=True)
class ReportFolder:
    """Page of a report, and the folder with its figures and their data.

    Attributes:
        page: Path of the report.
        root: The run's folder. Names in the report are derived from paths in this folder.
        named: Path of the result behind each name. The names are in lower case.
    """

    page: Path
    root: Path
    named: dict[str, Path] = field(default_factory=dict[str, Path], init=False, repr=False)

    @property
    def folder(self) -> Path:
        """Folder of the figures and their data, beside the report."""
        return self.page.with_name(f"{self.page.stem}_files")

    def figure(self, name: str, caption: str, draw: Callable[[], Axes], data: pd.DataFrame) -> Figure:
        """Draw and save a figure, and write its numbers as CSV."""
        axes = draw()
        file = save_figure(axes, self.folder / f"{name}.png")
        plt.close(axes.get_figure(root=True))
        numbers = self.folder / f"{name}.csv"
        write_atomically(numbers, data.to_csv(index=False).encode())
        return Figure(caption, file, f"{self.folder.name}/{numbers.name}")

    def name(self, path: Path) -> str:
        """Unique name of a result for links and file names, derived from its path relative to the run's folder.

        If a different path already has this name, a number is added. Names that differ only in case count as equal,
        because some file systems ignore case.
        """
        inside = str(path.relative_to(self.root)).removesuffix(path.suffix if path.is_file() else "")
        plain = "--".join(re.sub(r"\W+", "-", part, flags=re.ASCII) for part in Path(inside).parts) or "run"
        names = chain((plain,), (f"{plain}-{i}" for i in count(2)))
        name = next(name for name in names if self.named.get(name.casefold(), path) == path)
        self.named[name.casefold()] = path
        return name

    def link(self, path: Path) -> str:
        """Address of a file, relative to the report."""
        return Path(os.path.relpath(path.resolve(), self.page.parent.resolve())).as_posix()


# Sweeps


def chosen_setting(stored: StoredSweep, others: Sequence[StoredSweep]) -> tuple[Setting, str] | None:
    """Best setting in a sweep that is no control, and a phrase that names the questions on which it was chosen.

    If ``others`` has a validation sweep with the settings and model of ``stored``, the setting is chosen on the
    validation sweep. Otherwise the setting is chosen on ``stored``, and the phrase is empty. The result is ``None`` if
    no setting on contextual heads changes anything.
    """
    contextual = [
        setting for setting in stored.compared if setting.parameters.get("heads", "contextual") == "contextual"
    ]
    if not contextual:
        return None
    for other in others:
        if _chose_for_another(other, [stored]):
            return best_setting(other.sweep, contextual), "on validation questions"
    return best_setting(stored.sweep, contextual), ""


def _chose_for_another(stored: StoredSweep, others: Sequence[StoredSweep]) -> bool:
    """Whether ``stored`` is a validation sweep whose settings and model match a non-validation sweep in ``others``."""

    def identity(sweep: StoredSweep) -> Any:
        return [sweep.sweep.header["settings"], sweep.sweep.header.get("model")]

    return stored.part == "validation" and any(
        other.part != "validation" and identity(other) == identity(stored) for other in others
    )


def sweep_section(output: ReportFolder, stored: StoredSweep, others: Sequence[StoredSweep]) -> Section:
    """Section on a sweep, with its findings, curves and table."""
    sweep, name = stored.sweep, output.name(stored.path)
    part = f", {stored.part} questions" if stored.part else ""
    part += ", on which settings were chosen" if _chose_for_another(stored, others) else ""
    partial = f"{stored.done} of {stored.wanted} samples are done; the same command goes on with the others."
    table = Table(
        "Exact match with its 95 % interval; samples that became right and wrong against the baseline, McNemar's "
        "exact p over questions",
        ("setting", "exact match", "low", "high", "gained", "lost", "p"),
        tuple(_row(row) for row in sweep.rows()),
    )
    return Section(
        name,
        f"{_title(stored, name)}{part}",
        findings=() if _chose_for_another(stored, others) else tuple(_sweep_findings(stored, others)),
        figures=tuple(_sweep_figures(output, name, stored)),
        tables=(table,),
        missing=(partial,) if stored.done < stored.wanted else (),
        links=((f"Every response: {stored.path.name}", output.link(stored.path)),),
    )


def _row(row: Mapping[str, Any]) -> tuple[str | int | float, ...]:
    p = f"{row['mcnemar_p']:.2g}" if "mcnemar_p" in row else "-"
    return (row["name"], row["em"], row["em_low"], row["em_high"], row.get("gained", "-"), row.get("lost", "-"), p)


_TITLES = {"split_softmax": "Split-softmax", "focus_steering": "Focus directions", "self_focus": "Self-focus"}


def _title(stored: StoredSweep, name: str) -> str:
    """Title of a sweep with interventions of one kind, beside random controls, or its name."""
    described = [stored.described(setting) for setting in stored.compared]
    kinds = {entry["kind"] for one in described for entry in one.get("interventions", ())} - {"random_focus"}
    kinds |= {"method" for one in described if "method" in one}
    return _TITLES.get(kinds.pop(), f"Evaluation: {name}") if len(kinds) == 1 else f"Evaluation: {name}"


def _sweep_findings(stored: StoredSweep, others: Sequence[StoredSweep]) -> list[str]:
    data = stored.sweep.evaluations
    questions = len(set(next(iter(data.values())).question_ids))
    size = f"{stored.done} {stored.part + ' ' if stored.part else ''}samples of {questions} questions"
    findings: list[str] = []
    if "baseline" in data:
        cases = [f"{data[key].em} {case}" for key, case in _CASES.items() if key in data]
        rest = f"; {' and '.join(cases)}" if cases else ""
        findings.append(f"On {size} exact match is {data['baseline'].em} with all documents{rest}.")
    else:
        findings += [f"{name}: exact match {evaluation.em} on {size}." for name, evaluation in data.items()]
    chosen = chosen_setting(stored, others)
    if chosen is None or "baseline" not in data:
        return findings
    setting, where = chosen
    test = data[setting.name].compare(data["baseline"])
    caveat = f"chosen {where}" if where else "chosen on the same questions, which makes the result optimistic"
    findings.append(
        f"{_title(stored, stored.name)}: {setting.name}, {caveat}, gives {data[setting.name].em} against "
        f"{data['baseline'].em} without; {_samples(test.only_first)} became right, {test.only_second} wrong (exact "
        f"McNemar p = {test.p_value:.2g})."
    )
    return findings + _counterparts(stored, setting)


def _samples(number: int) -> str:
    return f"{number} sample{'' if number == 1 else 's'}"


_CASES = {"gold": "with the relevant document alone", "negative": "without it"}


def _counterparts(stored: StoredSweep, chosen: Setting) -> list[str]:
    """Findings on the setting with the lowest accuracy and on a control with random heads, if the sweep has them."""
    findings, sweep, varied = list[str](), stored.sweep, stored.compared
    worst = min(varied, key=lambda setting: sweep[setting.name].em.mean)
    if sweep[worst.name].em.mean < sweep["baseline"].em.mean and worst.name != chosen.name:
        test = sweep[worst.name].compare(sweep["baseline"])
        findings.append(
            f"The lowest of all settings is {worst.name} with {sweep[worst.name].em}: {_samples(test.only_second)} "
            f"became wrong, {test.only_first} right (p = {test.p_value:.2g})."
        )
    random = [
        setting
        for setting in varied
        if setting.parameters.get("heads") == "random" and {"k", "tau"} <= setting.parameters.keys()
    ]
    if random:
        control = max(random, key=lambda setting: setting.parameters["k"])
        test = sweep[control.name].compare(sweep["baseline"])
        findings.append(
            f"Control: {control.parameters['k']} random heads at tau = {control.parameters['tau']:g} give "
            f"{sweep[control.name].em} (p = {test.p_value:.2g})."
        )
    return findings


def _sweep_figures(output: ReportFolder, name: str, stored: StoredSweep) -> list[Figure]:
    sweep, varied = stored.sweep, stored.varied
    fixed = {"heads": "contextual"} if varied == "tau" else {}
    if not curves(sweep, varied, **fixed):
        return []
    levels = {key: sweep[key].em for key in ("baseline", "gold", "negative") if key in sweep.evaluations}

    def draw() -> Axes:
        if varied == "alpha":
            return direction_curves(curves(sweep, "alpha"), levels)
        return split_softmax_curves(
            curves(sweep, "tau", heads="contextual") + curves(sweep, "tau", heads="random"), levels
        )

    caption = f"Exact match by number of heads for each {varied}, with 95 % bootstrap intervals over questions."
    return [output.figure(name, caption, draw, sweep.to_frame("baseline" if "baseline" in levels else None))]


# Heads


def heads_section(output: ReportFolder, stored: HeadScores) -> Section:
    """Section on contextual heads, with their number, a map of all heads, and a table of the best heads."""
    frames = {case: pd.DataFrame(list(rows)) for case, rows in stored.cases.items() if rows}
    case = "long" if "long" in frames else next(iter(frames))
    scores = _matrix(frames[case])
    chance = _matrix(frames[case], "chance") if "chance" in frames[case] else None
    best = [Head(int(row["layer"]), int(row["head"])) for row in stored.cases[case][:_OUTLINED]]
    name, n = output.name(stored.path), stored.sizes.get(case, 0)
    figure = output.figure(
        f"{name}-map" if name in ("heads", "results") else name,
        f"Relevant contextual score of every head on {case} prompts; the best {len(best)} are outlined."
        f"{DOTS * (chance is not None)}",
        lambda: head_map(scores, heads=best, chance=chance),
        frames[case],
    )
    above = () if chance is None else ABOVE
    rows = tuple(
        (key, stored.sizes.get(key, 0), _head_name(row), *chance_cells(row, (*KINDS, *above)))
        for key in frames
        for row in stored.cases[key][:_SHOWN_HEADS]
    )
    table = Table(
        f"Contextual scores (share of the response's attention): the best {_SHOWN_HEADS} heads of each case"
        f"{ABOVE_CAPTION * bool(above)}",
        ("case", "samples", "head", *(kind.replace("_", " ") for kind in (*KINDS, *above))),
        rows,
    )
    missing = () if stored.intervals else (f"{stored.path.name} holds means without intervals.",)
    return Section(
        f"{name}-heads",
        "Contextual heads",
        findings=(*_head_findings(stored, case, scores, n), *chance_findings(stored.header, case, scores, chance)),
        figures=(figure,),
        tables=(table,),
        missing=missing,
    )


def _head_name(row: Mapping[str, Any]) -> str:
    return str(Head(int(row["layer"]), int(row["head"])))


def _matrix(frame: pd.DataFrame, column: str = "relevant") -> np.ndarray:
    layers, heads = frame["layer"].to_numpy(int), frame["head"].to_numpy(int)
    scores = np.full((layers.max() + 1, heads.max() + 1), np.nan)
    scores[layers, heads] = frame[column].to_numpy(float)
    return scores


def _head_findings(stored: HeadScores, case: str, scores: np.ndarray, n: int) -> tuple[str, ...]:
    first = max(stored.cases[case], key=lambda row: row["relevant"])
    ends = stored.intervals.get(f"{first['layer']}/{first['head']}")
    interval = f" [{ends[0]:.3f}, {ends[1]:.3f}]" if ends else ""
    above = int((scores > 0.1).sum())
    return (
        f"Of {np.isfinite(scores).sum()} heads {above} give more than a tenth of the response's attention to the "
        f"relevant document on {n} {case} prompts; {_head_name(first)} gives most, "
        f"{first['relevant']:.3f}{interval}, and {first['irrelevant']:.3f} to all other documents together.",
    )


# Directions, responses, artefacts


def directions_section(output: ReportFolder, stored: StoredDirections) -> Section:
    """Section on focus directions, with their training losses and norms."""
    directions, name = stored.directions, output.name(stored.path)
    names, figures, findings = [str(head) for head in directions.heads], list[Figure](), list[str]()
    losses = directions.losses
    if losses is not None and len(losses):
        frame = pd.DataFrame(losses.numpy(), columns=names).rename_axis("epoch").reset_index()
        caption = "Training loss of each head's direction: minus its relevant contextual score."
        figures.append(output.figure(f"{name}-losses", caption, lambda: loss_curves(losses.numpy(), names), frame))
        gain = bootstrap_mean((losses[0] - losses[-1]).tolist())
        findings.append(
            f"Training directions for {len(directions)} heads at the {directions.site} site raised their relevant "
            f"score on the training prompts by {gain} (mean of heads, interval over heads) from the first epoch to the "
            "last."
        )
    by_epoch = directions.provenance.get("answer_losses")
    if by_epoch:
        findings.append(
            f"Training changed the loss per response token from {by_epoch[0]:.3f} in the first epoch to "
            f"{by_epoch[-1]:.3f} in the last."
        )
    norms = {"d_Q": directions.query.norm(dim=1)}
    if directions.key is not None:
        norms["d_K"] = directions.key.norm(dim=1)
        frame = pd.DataFrame({"head": names, **{part: values.numpy() for part, values in norms.items()}})
        if all(bool((values > 0).all()) for values in norms.values()):
            query, key = (values.double().numpy() for values in norms.values())
            caption = "Norms of the directions, in the order of the heads."
            figures.append(output.figure(f"{name}-norms", caption, lambda: norms_by_rank(query, key), frame))
    if directions.rank:
        norms["U V^T"] = directions.product_norms
    rows = tuple((head, *(float(values[i]) for values in norms.values())) for i, head in enumerate(names))
    table = Table("Norms of the directions", ("head", *norms), rows)
    missing = () if losses is not None or by_epoch else ("These directions come without the losses of their training.",)
    return Section(f"{name}-vectors", "The directions", tuple(findings), tuple(figures), (table,), missing=missing)


def responses_section(output: ReportFolder, path: Path, content: Mapping[str, Any]) -> Section:
    """Section with the responses from ``focuslens generate``."""
    verdicts = {True: "right", False: "wrong", None: "-"}
    rows = tuple((entry["name"], entry["response"], verdicts[entry["correct"]]) for entry in content["responses"])
    question = content.get("question") or content.get("prompt", "")
    return Section(
        output.name(path),
        "Responses",
        tables=(Table(f"Responses to: {question}", ("setting", "response", "answer"), rows),),
    )


def artefact_section(output: ReportFolder, stored: PaperArtefact) -> Section:
    """Section on one table or figure of the paper, from the output files of ``focuslens paper``."""
    content = stored.content
    figures = [
        Figure(caption, stored.path / file, _numbers_of(output, stored.path, file))
        for caption, file in content["figures"]
    ]
    tables = [
        Table(entry["caption"], tuple(entry["columns"]), tuple(tuple(row) for row in entry["rows"]))
        for entry in (*content["tables"], *content["reported"])
    ]
    return Section(
        output.name(stored.path),
        f"{content['title']} ({content['paper']})",
        findings=tuple(f"{text}{f' [{verdict}]' if verdict else ''}" for text, verdict in content["findings"]),
        figures=tuple(figures),
        tables=tuple(tables),
    )


def _numbers_of(output: ReportFolder, folder: Path, file: str) -> str:
    """Link to a picture's CSV file, or to the CSV file of the artefact's first table; empty if neither file exists."""
    for name in (f"{Path(file).stem}.csv", "table_1.csv"):
        if (folder / name).is_file():
            return output.link(folder / name)
    return ""
