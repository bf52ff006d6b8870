"""Accuracy of a model under interventions: one setting, or a sweep of several settings over the same samples."""

from __future__ import annotations

import warnings
from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from focuslens.evaluation.recorded_runs import RecordedRun, Task, count_passes, record_of, result_of
from focuslens.evaluation.responses import respond
from focuslens.evaluation.setting import Setting
from focuslens.hooks import Intervention, checked_interventions
from focuslens.model.batching import BATCH_TOKENS, RunOptions, require_fitting
from focuslens.model.execution import Executor, executor_for
from focuslens.prompts.answers import list_samples, require_answers
from focuslens.prompts.sample import Case, MultiDocSample, prompts_digest
from focuslens.prompts.spans import require_spans
from focuslens.util.checks import checked_integer, items_of
from focuslens.util.files import versions
from focuslens.util.frames import rows_frame
from focuslens.util.html import Cell, Markup, bar, card, details, shorten, table
from focuslens.util.progress import track
from focuslens.util.record_file import RecordFile
from focuslens.util.statistics import Interval, McNemar, bootstrap_mean, mcnemar_exact

if TYPE_CHECKING:
    import pandas as pd

    from focuslens.model.focus_model import FocusModel

__all__ = ["Evaluation", "Sweep", "evaluate", "evaluation_of", "run_sweep"]

_N_SHOWN = 20
"""Number of responses in the notebook display of an evaluation."""


@dataclass(frozen=True)
class Evaluation:
    """Responses of a model to samples under one setting.

    Attributes:
        em: Sub-span exact match: the fraction of responses that contain an accepted answer, with a 95 % bootstrap
            interval. The bootstrap resamples questions.
        sample_ids: ``MultiDocSample.id`` of each sample.
        question_ids: Question id of each sample.
        responses: Response to each sample.
        correct: Whether each response contains an accepted answer.
    """

    sample_ids: tuple[str, ...]
    question_ids: tuple[str, ...]
    responses: tuple[str, ...]
    correct: tuple[bool, ...]
    em: Interval

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __repr__(self) -> str:
        return (
            f"Evaluation(exact match {self.em}: {sum(self.correct)} of {len(self)} samples right, "
            f"{len(set(self.question_ids))} questions)"
        )

    def _repr_html_(self) -> str:
        verdicts = ("wrong", "right")
        lines = list(zip(self.sample_ids, self.correct, self.responses, strict=True))
        rows = [(name, verdicts[right], shorten(text, 160)) for name, right, text in lines[:_N_SHOWN]]
        title = f"{sum(self.correct)} of {len(self)} samples right, of {len(set(self.question_ids))} questions"
        responses = details("Responses", table(("sample", "answer", "response"), rows, f"The first {len(rows)}"))
        em = Markup(f"<div>exact match {bar(self.em.mean, self.em.low, self.em.high)}</div>")
        return card(title, em, responses)

    def to_frame(self) -> pd.DataFrame:
        """Data frame with one row per sample: ``sample_id``, ``question_id``, ``response`` and ``correct``."""
        names = ("sample_id", "question_id", "response", "correct")
        columns = zip(self.sample_ids, self.question_ids, self.responses, self.correct, strict=True)
        return rows_frame([dict(zip(names, row, strict=True)) for row in columns], {}, names)

    def compare(self, other: Evaluation) -> McNemar:
        """Exact McNemar test against another evaluation of the same samples. Samples are grouped by question.

        Raises:
            ValueError: If the two evaluations do not have the same samples in the same order.
        """
        if not isinstance(other, Evaluation):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"other is {other!r:.60}; it must be an Evaluation, such as sweep['baseline']")
        if self.sample_ids != other.sample_ids:
            raise ValueError(
                "the evaluations are of different samples, or of the same samples in another order; compare two "
                "settings of one sweep"
            )
        return mcnemar_exact(list(self.correct), list(other.correct), groups=self.question_ids)


@dataclass(frozen=True)
class Sweep:
    """Evaluations of the same samples under several settings.

    Attributes:
        settings: Settings, in the order in which they were passed.
        evaluations: Evaluation of each setting, keyed by the setting's name.
        header: Description of the run: model, data, settings, seed and versions.
    """

    settings: tuple[Setting, ...]
    evaluations: Mapping[str, Evaluation]
    header: Mapping[str, Any]

    def __getitem__(self, name: str) -> Evaluation:
        if name not in self.evaluations:
            raise KeyError(f"no setting {name!r}; there are {', '.join(self.evaluations)}")
        return self.evaluations[name]

    def __repr__(self) -> str:
        n_samples = len(next(iter(self.evaluations.values()))) if self.evaluations else 0
        first = [f"{name} {evaluation.em}" for name, evaluation in list(self.evaluations.items())[:3]]
        rest = ", ..." if len(self.evaluations) > 3 else ""
        return f"Sweep({len(self.settings)} settings on {n_samples} samples: {', '.join(first)}{rest})"

    def _repr_html_(self) -> str:
        rows: list[tuple[Cell, ...]] = []
        for row in self.rows():
            test = (row["gained"], row["lost"], f"{row['mcnemar_p']:.2g}") if "gained" in row else ("-", "-", "-")
            rows.append((row["name"], bar(row["em"], row["em_low"], row["em_high"]), *test))
        columns = ("setting", "exact match", "gained", "lost", "p")
        caption = "95 % intervals; samples gained and lost against the baseline, exact McNemar p"
        return card(repr(self).partition(":")[0].removeprefix("Sweep("), table(columns, rows, caption))

    def rows(self, baseline: str | None = "baseline") -> list[dict[str, Any]]:
        """One row per setting, with its parameters, its exact match and a confidence interval of the exact match.

        If ``baseline`` is the name of a setting of the sweep, each row also has the McNemar test against this setting.
        """
        rows: list[dict[str, Any]] = []
        for setting in self.settings:
            evaluation = self[setting.name]
            row: dict[str, Any] = {"name": setting.name, "case": setting.case, **setting.parameters}
            em = evaluation.em
            row |= {"em": em.mean, "em_low": em.low, "em_high": em.high, "samples": len(evaluation)}
            if baseline is not None and baseline in self.evaluations:
                test = evaluation.compare(self[baseline])
                row |= {"gained": test.only_first, "lost": test.only_second, "mcnemar_p": test.p_value}
            rows.append(row)
        return rows

    def to_frame(self, baseline: str | None = "baseline") -> pd.DataFrame:
        """Rows from :meth:`rows` as a pandas ``DataFrame``."""
        share = "share of samples, 0 to 1"
        return rows_frame(
            self.rows(baseline), {"em": share, "em_low": share, "em_high": share, "mcnemar_p": "probability, 0 to 1"}
        )


def evaluate(
    model: FocusModel | Executor,
    samples: Iterable[MultiDocSample],
    interventions: Sequence[Intervention] = (),
    *,
    case: Case = "long",
    max_new_tokens: int = 100,
    batch_tokens: int = BATCH_TOKENS,
    out: str | Path | None = None,
    data: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Evaluation:
    """Sub-span exact match of greedy responses, with a 95 % bootstrap interval.

    Args:
        model: The model, or an executor such as :class:`RayPool` that runs the model in other processes.
        samples: Samples with distinct ids.
        interventions: Interventions, applied in order.
        case: Case of the prompts: ``long``, ``gold`` or ``negative``.
        max_new_tokens: Maximum length of a response, in tokens.
        batch_tokens: Maximum number of prompt tokens per batch; halved when memory runs out.
        out: Path of a JSON-lines result file. Records are written batch by batch, and batches are cut so that a killed
            run loses about a minute of work at most. Finished settings of unfinished samples are kept beside the file,
            in ``OUT.unfinished``. If the file exists, what it contains is not run again.
        data: Description of the data, stored in ``out``. The default is the ``description`` attribute of ``samples``,
            if it exists, as in :class:`MultiDocData`.
        seed: Seed of the bootstrap.
        progress: Whether to show a progress bar; :mod:`focuslens.util.progress` describes the default.

    Raises:
        ValueError: If there are no samples, if two samples have the same id, or if ``out`` belongs to a different run.
    """
    setting = Setting("evaluation", checked_interventions(interventions), case)
    sweep = run_sweep(
        model,
        samples,
        [setting],
        max_new_tokens=max_new_tokens,
        batch_tokens=batch_tokens,
        out=out,
        data=data,
        seed=seed,
        progress=progress,
    )
    return sweep["evaluation"]


def run_sweep(
    model: FocusModel | Executor,
    samples: Iterable[MultiDocSample],
    settings: Sequence[Setting],
    *,
    max_new_tokens: int = 100,
    batch_tokens: int = BATCH_TOKENS,
    out: str | Path | None = None,
    data: Mapping[str, Any] | None = None,
    seed: int = 0,
    progress: bool | None = None,
) -> Sweep:
    """Evaluate samples under every setting.

    Settings that leave the prompt's keys and values unchanged share one forward pass over the prompt. All arguments
    except ``settings`` have the same meaning as in :func:`evaluate`.

    Raises:
        ValueError: If there are no samples or settings, if the name of a setting or the id of a sample occurs twice, or
            if ``out`` belongs to a different run.
    """
    executor, sample_list = executor_for(model), list_samples(samples)
    settings = items_of(settings, Setting, "settings", 'Setting("baseline")')
    options = RunOptions(max_new_tokens, batch_tokens, progress)
    max_new_tokens, seed = options.max_new_tokens, checked_integer(seed, "seed")
    _require_unique("setting", [setting.name for setting in settings])
    _require_unique("sample", [sample.id for sample in sample_list])
    require_answers(sample_list, "an evaluation")
    _require_gold(settings, sample_list)
    # A collection of samples from a data file describes the file in the attribute ``description``.
    data = getattr(samples, "description", None) if data is None else data
    header = _header(executor, sample_list, settings, max_new_tokens, data, seed)
    store = None if out is None else RecordFile(out, header)
    records: dict[str, dict[str, Any]] = {} if store is None else dict(store.records)
    run = RecordedRun(
        executor,
        partial(_answer, settings=tuple(settings), max_new_tokens=max_new_tokens),
        tuple(setting.name for setting in settings),
        record_of,
        store,
        len({setting.case for setting in settings}) + _count_runs(settings),
        max_new_tokens,
    )
    todo = [sample for sample in sample_list if sample.id not in records]
    tasks = _tasks(executor, todo, store, options, ("relevant",) if _on_relevant(settings) else ())
    for batch in run.run(tasks, options.batch_tokens, "evaluation", n_done=len(records), show=progress):
        records.update((record["id"], record) for record in batch)
    ordered_records = [records[sample.id] for sample in sample_list]
    return Sweep(tuple(settings), {s.name: evaluation_of(ordered_records, s.name, seed) for s in settings}, header)


def _tasks(
    executor: Executor,
    samples: Sequence[MultiDocSample],
    store: RecordFile | None,
    options: RunOptions,
    needs: Sequence[str],
) -> list[Task]:
    """Samples to run, with the settings that are finished. All prompts fit the model's context, and have the spans."""
    prompts = [executor.encode(sample.prompt("long")) for sample in track(samples, "tokenising", show=options.progress)]
    require_spans(samples, prompts, needs)
    lengths = [len(prompt.tokens) for prompt in prompts]
    require_fitting([sample.id for sample in samples], lengths, executor.shape.n_ctx)
    finished = {} if store is None else store.parts
    return [
        Task(sample.id, sample, length, dict(finished.get(sample.id, {})), sample.id)
        for sample, length in zip(samples, lengths, strict=True)
    ]


def _count_runs(settings: Sequence[Setting]) -> int:
    """Number of settings that run the prompts anew. A method counts once."""
    plain = [setting.interventions for setting in settings if setting.method is None]
    return count_passes(plain) + len(settings) - len(plain)


def _on_relevant(settings: Sequence[Setting]) -> list[str]:
    """Names of the settings that act on the relevant document."""
    return [
        setting.name
        for setting in settings
        if any(getattr(intervention, "span", None) == "relevant" for intervention in setting.interventions)
    ]


def _require_gold(settings: Sequence[Setting], samples: Sequence[MultiDocSample]) -> None:
    """Check that the samples have a relevant document if any setting acts on the relevant document.

    Raise an error if no sample has a relevant document. Warn if only some samples have one.
    """
    n_missing = sum(sample.gold_index is None for sample in samples)
    setting_names = _on_relevant(settings)
    if not n_missing or not setting_names:
        return
    fact = (
        f"{n_missing} of {len(samples)} samples have no relevant document (gold_index is None), and setting "
        f"{setting_names[0]!r} acts on it"
    )
    if n_missing == len(samples):
        raise ValueError(f"{fact}; give gold_index, counted from 0, or let the intervention act on another span")
    warnings.warn(f"{fact}: the setting does not change those samples", stacklevel=3)


def _require_unique(kind: str, names: Sequence[str]) -> None:
    if not names:
        raise ValueError(f"there is no {kind} to evaluate")
    duplicates = sorted({name for name in names if names.count(name) > 1}) if len(set(names)) < len(names) else []
    if duplicates:
        raise ValueError(
            f"{kind} {duplicates[0]!r} occurs more than once; results are stored by name, so names must differ "
            "(for samples: question_id or gold_index)"
        )


def _header(
    executor: Executor,
    samples: Sequence[MultiDocSample],
    settings: Sequence[Setting],
    max_new_tokens: int,
    data: Mapping[str, Any] | None,
    seed: int,
) -> dict[str, Any]:
    return {
        "model": executor.description,
        "data": {**(data or {}), "samples": len(samples), "prompts_sha256": prompts_digest(samples)},
        "settings": [setting.describe() for setting in settings],
        "max_new_tokens": max_new_tokens,
        "seed": seed,
        "versions": versions(),
    }


def _answer(
    model: FocusModel,
    samples: Sequence[MultiDocSample],
    budget: int,
    skip: frozenset[str],
    share: float,
    *,
    settings: Sequence[Setting],
    max_new_tokens: int,
) -> Generator[tuple[str, list[dict[str, Any]]]]:
    """Yield the name of each setting and its results on all samples, in the order in which the settings finish."""
    most = max(1, int(share * len(settings)))
    cases: list[Case] = list(dict.fromkeys(setting.case for setting in settings if setting.name not in skip))
    for case in cases:
        batch = model.batch([sample.prompt(case) for sample in samples])
        of_case = [setting for setting in settings if setting.case == case and setting.method is None]
        skipped = {index for index, setting in enumerate(of_case) if setting.name in skip}
        for done in respond(
            model,
            batch,
            [setting.interventions for setting in of_case],
            max_new_tokens=max_new_tokens,
            budget=budget,
            skip=skipped,
            most=most,
        ):
            pairs = zip(samples, done.responses, strict=True)
            yield of_case[done.setting].name, [result_of(sample, response) for sample, response in pairs]
        for setting in settings:
            if setting.method is not None and setting.case == case and setting.name not in skip:
                answers = setting.method.respond(model, batch, setting.interventions, max_new_tokens=max_new_tokens)
                pairs = zip(samples, answers, strict=True)
                yield setting.name, [result_of(sample, response) for sample, response in pairs]


def evaluation_of(records: Sequence[Mapping[str, Any]], name: str, seed: int) -> Evaluation:
    """Compute the evaluation of one setting from the records of a sweep.

    Args:
        records: One record per sample, in the order of the samples.
        name: Name of the setting.
        seed: Seed of the bootstrap.
    """
    results = [record["results"][name] for record in records]
    correct = tuple(bool(result["correct"]) for result in results)
    questions = tuple(str(record["question_id"]) for record in records)
    # A sample without a question id counts as a separate question.
    groups = [question or f"sample {i}" for i, question in enumerate(questions)]
    return Evaluation(
        tuple(str(record["id"]) for record in records),
        questions,
        tuple(str(result["response"]) for result in results),
        correct,
        bootstrap_mean([float(is_correct) for is_correct in correct], groups=groups, seed=seed),
    )
