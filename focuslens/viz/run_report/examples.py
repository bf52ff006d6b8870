"""Samples whose answer became right or wrong under an intervention, and views of their attention."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from focuslens.evaluation import Setting
from focuslens.heads import Head
from focuslens.hooks import Intervention
from focuslens.interventions import intervention_from
from focuslens.model.focus_model import FocusModel
from focuslens.prompts.sample import MultiDocSample
from focuslens.scores.response_attention import ResponseAttention, response_attention
from focuslens.scores.window_attention import window_attention
from focuslens.util.progress import track
from focuslens.viz import AttentionView, compare_view, token_view
from focuslens.viz.report import Section, Table
from focuslens.viz.run_report.chosen_parts import chosen_parts
from focuslens.viz.run_report.reading import RunFiles, StoredSweep
from focuslens.viz.run_report.samples import UnavailableError, reopen_model, reopen_samples
from focuslens.viz.run_report.sections import chosen_setting

__all__ = ["Sources", "examples_section"]

_HEADS = 4
"""Maximum number of heads in a view. A view shows the first heads that the intervention acts on."""


@dataclass(frozen=True)
class Sources:
    """Locations of a run's model and data, and the number of samples with attention views.

    Attributes:
        model: A loaded model, which is used if it is the run's model. Otherwise the run's model is loaded.
        model_name: Name or directory of the run's model, if it differs from the name in the run's files.
        device: Device to load the model on.
        data: Path of the data file, if it differs from the name in the run's files.
        views: Maximum number of samples with attention views, per sweep and per kind of change (wrong to right, right
            to wrong). With 0, no model is loaded.
    """

    model: FocusModel | None = None
    model_name: str | None = None
    device: str | None = None
    data: Path | None = None
    views: int = 2


@dataclass(frozen=True)
class _Change:
    """Sample whose answer is right under the baseline and wrong under a setting, or the reverse.

    Attributes:
        place: Index of the sample in the sweep.
        setting: The setting.
        is_right: Whether the answer under the setting is right.
        compared: Whether the sweep has a baseline. Without one, any answer is shown.
    """

    place: int
    setting: Setting
    is_right: bool
    compared: bool = True

    @property
    def verdict(self) -> str:
        return "right" if self.is_right else "wrong"

    @property
    def title(self) -> str:
        """Beginning of a caption."""
        return f"Became {self.verdict}" if self.compared else self.verdict.capitalize()


def examples_section(files: RunFiles, sources: Sources, log: Callable[[str], None]) -> Section | None:
    """Section on the samples whose answer changed, or on the first samples of a result without a baseline.

    The result is ``None`` if no sweep has interventions.
    """
    tables: list[Table] = []
    views: list[tuple[str, AttentionView]] = []
    missing: list[str] = []
    for stored in _sweeps(files):
        chosen = chosen_setting(stored, files.sweeps)
        if chosen is None:
            continue
        is_compared = "baseline" in stored.sweep.evaluations
        changes = _changes(stored, chosen[0]) if is_compared else _first(stored, chosen[0], sources.views)
        if not changes and not is_compared:
            continue  # no samples were requested
        if not changes:
            missing.append(f"{stored.path.name}: no answer changed, so there is no sample to show.")
            continue
        try:
            samples = _in_order(stored, reopen_samples(stored.sweep.header, sources.data))
        except UnavailableError as error:
            samples = None
            missing.append(f"{stored.path.name}: no questions and no attention views, since {error}.")
        tables += _tables(stored, chosen[0], changes, samples)
        if samples is None or not sources.views:
            continue
        try:
            shown, failures = _views(files, stored, changes, samples, sources, log)
            views += shown
            missing += failures
        except UnavailableError as error:
            missing.append(f"{stored.path.name}: no attention views, since {error}.")
    if not sources.views and tables:
        missing.append("No attention views: none were requested.")
    if not tables and not missing:
        return None
    title = "Samples that became right, and wrong"
    return Section("examples", title, tables=tuple(tables), views=tuple(views), missing=tuple(missing))


def _sweeps(files: RunFiles) -> list[StoredSweep]:
    """Sweeps to show: at most one of ``alpha``, one of ``tau``, one of other settings, and one without a baseline.

    A sweep on validation questions is used only if all sweeps of its kind are on validation questions.
    """
    kinds: dict[str, list[StoredSweep]] = {name: [] for name in ("alpha", "tau", "", "no baseline")}
    for stored in files.sweeps:
        if stored.compared:
            kinds[stored.varied if "baseline" in stored.sweep.evaluations else "no baseline"].append(stored)
    for sweeps in kinds.values():
        sweeps.sort(key=lambda stored: stored.part == "validation")
    return [stored for sweeps in kinds.values() for stored in sweeps[:1]]


def _changes(stored: StoredSweep, chosen: Setting) -> list[_Change]:
    """Samples whose answer became right under the chosen setting, followed by samples whose answer became wrong.

    If no answer became wrong under the chosen setting, the second group shows the answers that became wrong under the
    setting with the lowest accuracy.
    """
    sweep = stored.sweep
    before = sweep["baseline"].correct

    def changed(setting: Setting, right: bool) -> list[_Change]:
        after = sweep[setting.name].correct
        pairs = enumerate(zip(before, after, strict=True))
        return [_Change(place, setting, right) for place, (was, now) in pairs if was != now and now == right]

    worst = min(stored.compared, key=lambda setting: sweep[setting.name].em.mean)
    return changed(chosen, True) + (changed(chosen, False) or changed(worst, False))


def _first(stored: StoredSweep, chosen: Setting, views: int) -> list[_Change]:
    """The first samples with right answers and the first with wrong ones, ``views`` of each."""
    correct = stored.sweep[chosen.name].correct
    return [
        _Change(place, chosen, right, compared=False)
        for right in (True, False)
        for place in [i for i, now in enumerate(correct) if now == right][:views]
    ]


def _in_order(stored: StoredSweep, samples: Sequence[MultiDocSample]) -> list[MultiDocSample]:
    """Samples sorted into the order of the sweep's evaluations."""
    by_id = {sample.id: sample for sample in samples}
    return [by_id[name] for name in next(iter(stored.sweep.evaluations.values())).sample_ids]


def _tables(
    stored: StoredSweep, chosen: Setting, changes: Sequence[_Change], samples: Sequence[MultiDocSample] | None
) -> list[Table]:
    sweep = stored.sweep

    def row(change: _Change) -> tuple[str, ...]:
        place, after = change.place, sweep[change.setting.name]
        question = after.sample_ids[place] if samples is None else samples[place].question
        accepted = () if samples is None else (", ".join(samples[place].answers),)
        return (
            change.verdict,
            question,
            *accepted,
            *((sweep["baseline"].responses[place],) if change.compared else ()),
            change.setting.name,
            after.responses[place],
        )

    columns = ("sample" if samples is None else "question", *(() if samples is None else ("accepted",)))
    if not changes[0].compared:
        caption = f"{stored.path.name}: first answers under {chosen.name}"
        return [Table(caption, ("answer", *columns, "setting", "response"), tuple(row(change) for change in changes))]
    caption = f"{stored.path.name}: answers that {chosen.name} changed"
    others = {change.setting.name for change in changes} - {chosen.name}
    caption += f"; it made no answer wrong, so the answers that {others.pop()} made wrong follow" if others else ""
    return [
        Table(caption, ("became", *columns, "before", "setting", "after"), tuple(row(change) for change in changes))
    ]


def _views(
    files: RunFiles,
    stored: StoredSweep,
    changes: Sequence[_Change],
    samples: Sequence[MultiDocSample],
    sources: Sources,
    log: Callable[[str], None],
) -> tuple[list[tuple[str, AttentionView]], list[str]]:
    """Captions and views of the first changes, and a sentence for each setting or sample that cannot be shown."""
    methods = {change.setting.name: _method(stored, change.setting) for change in changes}
    failures = [
        f"{stored.path.name}: no attention views under {name}, since the setting has a method ({method}), which is not "
        "drawn."
        for name, method in methods.items()
        if method
    ]
    drawn = [change for change in changes if not methods[change.setting.name]]
    right, wrong = ([change for change in drawn if change.is_right == kind][: sources.views] for kind in (True, False))
    header, views = stored.sweep.header, list[tuple[str, AttentionView]]()
    if not drawn:
        return views, failures
    log(f"attention of {len(right) + len(wrong)} samples of {stored.path.name} ...")
    description = header.get("model", {})
    model = reopen_model(description, name=sources.model_name, device=sources.device, given=sources.model)
    limit = int(header.get("max_new_tokens", 100))
    for change in track([*right, *wrong], "attention"):
        sample, applied = samples[change.place], _interventions(files, stored, change.setting)
        try:
            before, after = _look(model, sample, change.setting.name, applied, limit)
            chosen = "".join(f" {text}." for text in chosen_parts(model, sample, applied, limit))
            caption = f"{change.title} under {change.setting.name}. {_question(sample)}{chosen}"
            views.append((caption, compare_view(before, after, title=sample.question)))
            if len(views) == 1:
                views.append(_tokens(model, sample, change.setting.name, applied, after))
        except (ValueError, KeyError) as error:
            reason = error.args[0] if isinstance(error, KeyError) else error
            failures.append(f"{stored.path.name}: no attention view of {sample.id}, since {reason}.")
    return views, failures


def _interventions(files: RunFiles, stored: StoredSweep, setting: Setting) -> list[Intervention]:
    recorded = stored.described(setting)
    directions = [each.directions for each in files.directions]
    try:
        return [intervention_from(description, directions) for description in recorded["interventions"]]
    except (ValueError, KeyError) as error:
        if "the directions with the digest" in str(error):
            raise UnavailableError(f"{error}: put the directions' directory into the run's folder") from error
        raise UnavailableError(f"the interventions of {setting.name} cannot be made again ({error})") from error


def _method(stored: StoredSweep, setting: Setting) -> str:
    """Kind of a setting's method; empty if it has none."""
    return str(stored.described(setting).get("method", {}).get("kind", ""))


def _look(
    model: FocusModel, sample: MultiDocSample, name: str, applied: Sequence[Intervention], limit: int
) -> tuple[ResponseAttention, ResponseAttention]:
    """Attention of two responses to a sample's prompt: without and with the interventions.

    Raises:
        ValueError: If a response is empty, or the prompt does not fit the model's context.
    """
    heads, prompt = _heads(model, applied), sample.prompt("long")
    before = response_attention(model, prompt, heads, max_new_tokens=limit, name="baseline")
    return before, response_attention(model, prompt, heads, interventions=applied, max_new_tokens=limit, name=name)


def _heads(model: FocusModel, applied: Sequence[Intervention]) -> list[Head]:
    """Heads to show. An intervention on all heads is shown in the last layers."""
    layers, heads = reversed(range(model.shape.n_layers)), range(model.shape.n_heads)
    every = [Head(layer, head) for layer in layers for head in heads]
    acting = [every if intervention.heads is None else intervention.heads for intervention in applied]
    return list(dict.fromkeys(head for heads in acting for head in heads))[:_HEADS]


def _question(sample: MultiDocSample) -> str:
    return f"Question: {sample.question} Accepted: {', '.join(sample.answers)}."


def _tokens(
    model: FocusModel, sample: MultiDocSample, name: str, applied: Sequence[Intervention], after: ResponseAttention
) -> tuple[str, AttentionView]:
    window = window_attention(
        model, sample.prompt("long"), _heads(model, applied), margin=0, response=after.text, interventions=applied
    )
    caption = (
        f"The same under {name}, token by token (circuitsvis): the sink, the relevant document, the question and the "
        "response."
    )
    return caption, token_view(window)
