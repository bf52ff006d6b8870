"""Focus without a label: self-focus, its variants, and the methods of others on the same questions."""

from __future__ import annotations

import json
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace

import torch
from einops import rearrange

from focuslens.evaluation import BASELINES, Evaluation, Setting, choices, run_sweep
from focuslens.heads import Head
from focuslens.interventions import SelfFocus
from focuslens.model.question_rows import question_attention
from focuslens.prompts.sample import MultiDocSample
from focuslens.studies.paper.artefact import Artefact
from focuslens.studies.paper.chunks import Measured, chunk_size, measure_in_chunks
from focuslens.studies.paper.focus_choice import Choosers, choosers
from focuslens.studies.paper.focus_families import Family, control, of_others, of_self_focus, refined, with_label
from focuslens.studies.paper.focus_table import Chosen, findings, table_of
from focuslens.studies.paper.study import Part, Study
from focuslens.util.files import write_json

__all__ = ["KEY", "SECTIONS", "run"]

KEY = "focus"
SECTIONS = ("focus", "directions")


def run(study: Study) -> Artefact:
    """Choose a setting of each method on validation questions, and compare the methods on test questions."""
    found = choosers(study)
    families, best = _families(study, found)
    validation = _evaluations(study, "validation", families)
    picked = [(family, _best(family, validation)) for family in families]
    others = (*BASELINES, control(best, study.settings.seed))
    test = _evaluations(
        study, "test", [Family("", (setting,), sweep=family.sweep) for family, setting in picked], others
    )
    chosen = [Chosen(family, setting, validation[setting.name], test[setting.name]) for family, setting in picked]
    seconds = _seconds(study, [Setting("baseline"), *(one.setting for one in chosen)])
    right = _right_choices(study, [one.setting for one in chosen])
    return Artefact(
        KEY,
        "Focus without a label",
        "beyond the paper",
        tuple(findings(chosen, test)),
        (),
        (table_of(chosen, test, seconds, right), found.table),
    )


def _families(study: Study, found: Choosers) -> tuple[list[Family], Setting]:
    """All methods, and the best setting of plain self-focus, whose choice the methods of others get."""
    settings, ranking = study.settings.focus, study.ranking
    label, own = with_label(settings, ranking), of_self_focus(settings, ranking, found)
    left = [family for family in (*label, *own) if family.name not in settings.leave_out]
    first = _evaluations(study, "validation", left)
    candidates = [family for family in left if family.is_self_focus]
    family = max(candidates, key=lambda family: first[_best(family, first).name].em.mean)
    best = _best(family, first)
    (focus,) = best.interventions
    assert isinstance(focus, SelfFocus)
    if focus.soft:
        focus = replace(focus, soft=False, top=1)
        best = replace(best, interventions=(focus,))
    directions = [("focus direction (the paper)", study.directions), *_with_rank(study)]
    sink = _mean_sink(study, ranking[: max(settings.steered)])
    return (
        [
            *left,
            *(one for one in refined(settings, focus, family.extra) if one.name not in settings.leave_out),
            *of_others(settings, ranking, found, focus, family.extra, directions, sink),
        ],
        best,
    )


def _with_rank(study: Study) -> list[tuple[str, object]]:
    """Directions that depend on the question, trained by the answers."""
    return [
        (f"direction of rank {rank} (U V^T q)", study.directions_at(study.settings.directions.site, rank=rank))
        for rank in study.settings.focus.ranks
    ]


def _mean_sink(study: Study, heads: Sequence[Head]) -> float:
    """Mean mass of heads on the sink in the row of the last token of a few validation prompts."""
    masses: list[float] = []
    for sample in study.samples("validation")[:10]:
        prefix = study.model.prefill(sample.prompt(), hold_last=True)
        masses.append(
            float(question_attention(study.model, prefix, heads, "last").attention[..., :2].sum(dim=-1).mean())
        )
    return sum(masses) / len(masses)


def _evaluations(
    study: Study, part: Part, families: Sequence[Family], further: Iterable[Setting] = ()
) -> Mapping[str, Evaluation]:
    """Evaluations of all settings on the samples of a part, by name. Each sweep has a file of its own."""
    settings = study.settings.focus
    questions = settings.validation if part == "validation" else settings.questions
    sweeps: dict[str, list[Setting]] = {"attention": [Setting("baseline")] if part == "validation" else list(further)}
    for family in families:
        sweeps.setdefault(family.sweep, []).extend(family.settings)
    evaluations: dict[str, Evaluation] = {}
    for items in sweeps.values():
        unique = {setting.name: setting for setting in items}
        evaluations.update(study.sweep(KEY, part, list(unique.values()), questions).evaluations)
    return evaluations


def _best(family: Family, evaluations: Mapping[str, Evaluation]) -> Setting:
    """Setting with the highest exact match; the first of equals."""
    return max(family.settings, key=lambda setting: evaluations[setting.name].em.mean)


def _seconds(study: Study, settings: Sequence[Setting]) -> dict[str, float]:
    """Median seconds that each setting takes for a test sample, one sample at a time."""
    samples = study.samples("test")[: study.settings.focus.timed]
    path, header = study.folder(KEY) / "seconds.json", study.header("seconds", "focus")
    kept = json.loads(path.read_text()) if path.is_file() else {}
    seconds: dict[str, float] = kept.get("seconds", {}) if kept.get("header") == json.loads(json.dumps(header)) else {}
    for setting in settings:
        if setting.name in seconds or not samples:
            continue
        taken: list[float] = []
        for sample in samples:
            started = time.monotonic()
            run_sweep(study.model, [sample], [setting], max_new_tokens=study.settings.max_new_tokens, progress=False)
            taken.append(time.monotonic() - started)
        seconds[setting.name] = sorted(taken)[len(taken) // 2]
        write_json(path, {"header": header, "seconds": seconds})
    return seconds


def _right_choices(study: Study, settings: Sequence[Setting]) -> dict[str, float | None]:
    """Share of test samples whose gold document is chosen, by setting; ``None`` for methods other than self-focus."""
    choosing = {setting.name: _choosing(setting) for setting in settings}
    every = {json.dumps(focus.describe()): focus for focus in choosing.values() if focus is not None}
    samples, options = study.samples("test", study.settings.focus.questions), study.run_options()

    def measure(chunk: Sequence[MultiDocSample]) -> Measured:
        made = choices(
            study.executor,
            chunk,
            list(every.values()),
            max_new_tokens=options.max_new_tokens,
            batch_tokens=options.batch_tokens,
            progress=False,
        )
        right = torch.tensor([one.right() for one in made])
        return Measured(
            {"right": rearrange(right, "focus sample -> sample focus")}, {"sample_ids": list(made[0].sample_ids)}
        )

    described = [focus.describe() for focus in every.values()]
    folder = study.kept("test-choices", focus=described, questions=study.settings.focus.questions)
    size = chunk_size(study.executor, samples[0])
    measured = measure_in_chunks(samples, folder, measure, label="choices", chunk=size, progress=study.progress)
    shares = dict(zip(every, measured.tensors["right"].double().mean(dim=0).tolist(), strict=True))
    return {name: None if focus is None else shares[json.dumps(focus.describe())] for name, focus in choosing.items()}


def _choosing(setting: Setting) -> SelfFocus | None:
    """The choice of a setting of self-focus, without what happens to it; ``None`` for other methods."""
    focuses = [item for item in setting.interventions if isinstance(item, SelfFocus)]
    if not focuses:
        return None
    (focus,) = focuses
    # Of a soft choice, the document with the largest share counts.
    top = 1 if focus.top is None else focus.top
    return replace(focus, tau=1.0, edit=None, focused=None, soft=False, top=top)
