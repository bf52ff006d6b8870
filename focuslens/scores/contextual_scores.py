"""Contextual scores: attention from response tokens to parts of the prompt (equation 1 of "Focus Directions")."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import HeadList, Sparsity, random_heads, rank_heads, sparsity, top_heads
from focuslens.hooks import Intervention, checked_interventions
from focuslens.model.batching import BATCH_TOKENS, RunOptions
from focuslens.model.execution import Executor, executor_for
from focuslens.prompts.answers import answered_right, require_answers, require_samples
from focuslens.prompts.batch import EncodedPrompt
from focuslens.prompts.sample import Case, MultiDocSample
from focuslens.scores.base import KINDS, SCORED_SPANS, ResponseRun, scores_of_parts, sink_and_documents
from focuslens.scores.chance import ABOVE_UNITS, AboveChance, Measure, chance_of_scores
from focuslens.scores.given_responses import GivenResponses, given_responses
from focuslens.scores.pattern_rows import PatternRows
from focuslens.scores.recorded_scores import open_scores, record_id, score_record, scores_of_record
from focuslens.scores.saved_results import SavedResult
from focuslens.util.frames import SHARE, long_frame, rows_frame
from focuslens.util.html import Markup, bar, card, map_image, table

if TYPE_CHECKING:
    import pandas as pd

    from focuslens.model.focus_model import FocusModel
    from focuslens.util.record_file import RecordFile

__all__ = [
    "KINDS",
    "ContextualScores",
    "ScoredCase",
    "attention_pattern",
    "by_outcome",
    "contextual_scores",
    "contextual_scores_by_case",
]

ScoredCase: TypeAlias = Literal["long", "gold", "negative", "correct", "wrong"]
"""Case of the scored prompts (``long``, ``gold`` or ``negative``), or a group of long prompts by outcome.

The group ``correct`` contains the long prompts with a correct response. The group ``wrong`` contains the long prompts
with a wrong response. Samples with a wrong response to the gold prompt are left out of both groups.
"""


@dataclass(frozen=True, eq=False)
class ContextualScores(AboveChance, SavedResult):
    """Contextual scores per sample and head.

    A score is the attention from response tokens to a part of the prompt, summed over the tokens of the part and
    averaged over the response tokens. Scores are between 0 and 1. All scores of a sample with an empty response are
    NaN. The relevant score of a sample without a gold document is NaN. :meth:`save` and :meth:`load` keep scores in a
    folder.

    Attributes:
        relevant: Attention to the relevant document.
        irrelevant: Attention to all irrelevant documents together.
        irrelevant_max: Attention to the irrelevant document with the most attention, selected per head and sample.
        sink: Attention to the first two tokens.
        case: Case of the scored prompts, or group of samples.
        sample_ids: ``MultiDocSample.id`` of each sample.
        responses: The scored response of each sample.
        correct: Whether each response contains an accepted answer.
        chance: Scores of even attention by layer, with the kinds in the order of the attributes above; ``None`` if they
            are unknown (see :meth:`with_chance`).
    """

    relevant: Float[Tensor, "sample layer head"]
    irrelevant: Float[Tensor, "sample layer head"]
    irrelevant_max: Float[Tensor, "sample layer head"]
    sink: Float[Tensor, "sample layer head"]
    case: ScoredCase
    sample_ids: tuple[str, ...]
    responses: tuple[str, ...]
    correct: tuple[bool, ...]
    chance: Float[Tensor, "sample layer kind"] | None = None

    def __len__(self) -> int:
        return len(self.sample_ids)

    def __repr__(self) -> str:
        _, n_layers, n_heads = self.relevant.shape
        best = "" if self.relevant.isnan().all() else f"; best {self._best(3)}"
        return (
            f"ContextualScores({self.case}: {len(self)} samples, {sum(self.correct)} answered right, {n_layers} layers "
            f"x {n_heads} heads{best})"
        )

    def _best(self, n: int) -> str:
        means = self.mean()
        return ", ".join(f"{head} {float(means[head]):.3f}" for head in self.top_heads(min(n, means.numel())))

    def _repr_html_(self) -> str:
        n_layers, n_heads = self.relevant.shape[1:]
        title = f"Contextual scores, {self.case}: {len(self)} samples, {sum(self.correct)} answered right"
        if self.relevant.isnan().all():
            return card(title, Markup("<div>no sample has a response and a relevant document</div>"))
        means = {kind: self.mean(kind) for kind in KINDS}
        top = float(means["relevant"].max())
        above = self.means_above_chance()
        rows = [
            (
                str(head),
                bar(float(means["relevant"][head]), full=top),
                *(float(means[kind][head]) for kind in KINDS[1:]),
                *(float(values[head]) for values in above.values()),
            )
            for head in self.top_heads(min(10, n_layers * n_heads))
        ]
        alt = f"Mean relevant score of {n_layers} layers (downward) of {n_heads} heads, light where it is high"
        columns = ("head", *(kind.replace("_", " ") for kind in (*KINDS, *above)))
        counts = "; ".join(map(str, self.sparsity()))
        return card(
            title,
            map_image(means["relevant"].tolist(), alt),
            table(columns, rows, "Mean share of the response's attention, best heads first"),
            Markup(f"<div>heads with a relevant score {escape(counts)}</div>"),
        )

    def mean(self, kind: str = "relevant", by: Measure = "score") -> Float[Tensor, "layer head"]:
        """Mean score of one kind, or another measure of it, per head. Samples whose score is NaN are left out.

        Raises:
            ValueError: As for :meth:`measured`, or if all scores of this kind are NaN.
        """
        scores = self.measured(kind, by)
        if scores.isnan().all():
            document = " and a relevant document" if kind == "relevant" else ""
            raise ValueError(f"none of the {len(self)} samples of case {self.case!r} has a response{document} to score")
        return scores.nanmean(dim=0)

    def ranking(self, by: Measure = "score") -> HeadList:
        """All heads, in descending order of mean relevant score, or of another :meth:`measured` value of it."""
        return rank_heads(self.mean("relevant", by))

    def top_heads(self, k: int, by: Measure = "score") -> HeadList:
        """Contextual heads: the ``k`` heads with the highest mean relevant score or excess, in descending order.

        Raises:
            ValueError: If ``k`` is negative or greater than the number of heads.
        """
        return top_heads(self.mean("relevant", by), k)

    def random_heads(self, k: int, *, exclude: Iterable[tuple[int, int]] = (), seed: int = 0) -> HeadList:
        """Draw ``k`` random heads that are not in ``exclude``, as a control for ``k`` contextual heads."""
        _, n_layers, n_heads = self.relevant.shape
        return random_heads(n_layers, n_heads, k, exclude=exclude, seed=seed)

    def sparsity(self, thresholds: Sequence[float] = (0.2, 0.1, 0.05), by: Measure = "score") -> tuple[Sparsity, ...]:
        """Number of heads whose mean relevant score (or excess) exceeds each threshold, and their layers."""
        return sparsity(self.mean("relevant", by), thresholds)

    def to_frame(self, *, by_sample: bool = False) -> pd.DataFrame:
        """Mean scores as a data frame, with one row per head, in descending order of relevant score.

        Args:
            by_sample: Whether there is one row per sample and head instead, in the order of the samples.
        """
        units: dict[str, str] = dict.fromkeys(KINDS, SHARE) | ABOVE_UNITS
        if by_sample:
            _, n_layers, n_heads = self.relevant.shape
            axes = {"sample_id": self.sample_ids, "layer": range(n_layers), "head": range(n_heads)}
            return long_frame(axes, {kind: getattr(self, kind) for kind in KINDS}, units)
        means = {kind: self.mean(kind) for kind in KINDS} | self.means_above_chance()
        rows = [
            {"layer": head.layer, "head": head.head} | {name: float(values[head]) for name, values in means.items()}
            for head in self.ranking()
        ]
        return rows_frame(rows, units)

    def where(self, keep: Sequence[bool], case: ScoredCase) -> ContextualScores:
        """Select the scores of the samples for which ``keep`` is true, and label them with ``case``."""
        index = torch.tensor([i for i, is_kept in enumerate(keep) if is_kept], dtype=torch.long)
        indices = index.tolist()
        return ContextualScores(
            *(getattr(self, kind)[index] for kind in KINDS),
            case=case,
            sample_ids=tuple(self.sample_ids[i] for i in indices),
            responses=tuple(self.responses[i] for i in indices),
            correct=tuple(self.correct[i] for i in indices),
            chance=None if self.chance is None else self.chance[index],
        )


def _score_case(run: ResponseRun, store: RecordFile | None = None) -> ContextualScores:
    """Contextual scores of all samples in a run. Samples with a record in ``store`` are not run again."""
    samples, model_shape = run.samples, run.executor.shape
    shape = (len(samples), model_shape.n_layers, model_shape.n_heads)
    scores = {kind: torch.full(shape, torch.nan) for kind in KINDS}
    responses = [""] * len(samples)
    records = {} if store is None else store.records
    done = {i: records[name] for i, sample in enumerate(samples) if (name := record_id(run.case, sample.id)) in records}
    for i, record in done.items():
        responses[i] = record["response"]
        for kind, values in scores_of_record(record).items():
            scores[kind][i] = values
    label, skip = f"contextual scores ({run.case})", {samples[i].id for i in done}
    for indices, masses, texts in run.masses(sink_and_documents, label, needs=SCORED_SPANS, skip=skip, record=store):
        for kind, values in scores_of_parts(masses).items():
            scores[kind][indices] = values
        for i, response in zip(indices, texts, strict=True):
            responses[i] = response
        if store is not None:
            rows = [{kind: scores[kind][i] for kind in KINDS} for i in indices]
            named = zip(indices, texts, rows, strict=True)
            store.append([score_record(run.case, samples[i].id, text, row) for i, text, row in named])
    # The relevant score of a sample without a gold document is undefined, not zero.
    scores["relevant"][[i for i, sample in enumerate(samples) if sample.gold_index is None]] = torch.nan
    return ContextualScores(
        *(scores[kind] for kind in KINDS),
        case=run.case,
        sample_ids=tuple(sample.id for sample in samples),
        responses=tuple(responses),
        correct=answered_right(responses, samples),
        chance=chance_of_scores(run.executor, samples, run.case, responses),
    )


def contextual_scores(
    model: FocusModel | Executor,
    samples: Iterable[MultiDocSample],
    case: ScoredCase = "long",
    *,
    responses: GivenResponses | None = None,
    interventions: Sequence[Intervention] = (),
    max_new_tokens: int = 100,
    batch_tokens: int = BATCH_TOKENS,
    out: str | Path | None = None,
    data: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> ContextualScores:
    """Compute the contextual scores of every head: attention from the response to the documents and to the sink.

    The score of a part ``C`` of the prompt is ``S_C = mean_i sum_{j in C} W[i, j]`` (equation 1), where ``W`` is the
    attention pattern of the head and ``i`` runs over the response tokens. Row ``i`` is the row of the response token
    itself, not the row that generates the token. Each row is summed as soon as it is computed. The attention pattern of
    the whole prompt is never stored.

    Args:
        model: The model, or an executor that runs the model in other processes, such as :class:`RayPool`.
        samples: The samples to score.
        case: Prompts to score: ``long``, ``gold`` or ``negative``, or a group of long prompts: ``correct`` or
            ``wrong`` (see :data:`ScoredCase`). For a group, the model also generates responses to the gold prompts.
        responses: Responses to score, one per sample, or by sample id; see :func:`document_scores`. If ``None``, the
            model generates the responses.
        interventions: Interventions, applied in order during generation and scoring.
        max_new_tokens: Maximum length of a generated response, in tokens.
        batch_tokens: Maximum number of prompt tokens per batch; halved when memory runs out.
        out: Path of a JSON-lines file with the scores of each sample. A killed run resumes from this file, and loses
            about a minute of work at most.
        data: Description of the data, stored in ``out``; by default the ``description`` attribute of ``samples``.
        progress: Whether to show a progress bar; :mod:`focuslens.util.progress` describes the default.

    Raises:
        ValueError: If ``case`` is unknown, there are no samples, two samples have the same id, the numbers of responses
            and samples differ, an accepted answer is empty after normalisation, or ``out`` belongs to a different run.
        TypeError: If ``interventions`` is not a sequence of interventions.
    """
    interventions = checked_interventions(interventions)
    if case not in get_args(ScoredCase):
        raise ValueError(f"case is {case!r}; it must be one of {', '.join(get_args(ScoredCase))}")
    data = getattr(samples, "description", None) if data is None else data
    executor, sample_list = executor_for(model), require_samples(samples)
    given = None if responses is None else given_responses(responses, sample_list, executor)
    options = RunOptions(max_new_tokens, batch_tokens, progress)
    first: Case = "long" if case in ("correct", "wrong") else case
    if first != case:
        require_answers(sample_list, f"the group {case!r}")
    run = ResponseRun(executor, sample_list, first, options, interventions, given)
    if first == case:
        return _score_case(run, None if out is None else open_scores(out, [run], data))
    gold = ResponseRun(executor, sample_list, "gold", options, interventions)
    return by_outcome(*_score_cases((run, gold), out, data))[case]


def _score_cases(
    runs: Sequence[ResponseRun], out: str | Path | None, data: Mapping[str, Any] | None
) -> Generator[ContextualScores]:
    """Contextual scores of several runs over the same samples, in one result file."""
    store = None if out is None else open_scores(out, runs, data)
    return (_score_case(run, store) for run in runs)


def contextual_scores_by_case(
    model: FocusModel | Executor,
    samples: Iterable[MultiDocSample],
    *,
    interventions: Sequence[Intervention] = (),
    max_new_tokens: int = 100,
    batch_tokens: int = BATCH_TOKENS,
    out: str | Path | None = None,
    data: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> dict[str, ContextualScores]:
    """Compute the contextual scores of ``long``, ``gold``, ``correct`` and ``wrong`` (Table 1 of "Focus Directions").

    The model runs each prompt only once. The arguments are those of :func:`contextual_scores`.
    """
    data = getattr(samples, "description", None) if data is None else data
    executor, sample_list = executor_for(model), require_samples(samples)
    require_answers(sample_list, "a group of right or wrong answers")
    options = RunOptions(max_new_tokens, batch_tokens, progress)
    interventions = checked_interventions(interventions)
    cases: tuple[Case, ...] = ("long", "gold")
    runs = [ResponseRun(executor, sample_list, case, options, interventions) for case in cases]
    long, gold = _score_cases(runs, out, data)
    return {"long": long, "gold": gold, **by_outcome(long, gold)}


def by_outcome(long: ContextualScores, gold: ContextualScores) -> dict[str, ContextualScores]:
    """Split the scores of the long prompts into the groups ``correct`` and ``wrong``, by the outcome of each response.

    Samples with a wrong response to the gold prompt are left out.
    """
    outcomes = list(zip(gold.correct, long.correct, strict=True))
    return {
        "correct": long.where([gold_right and long_right for gold_right, long_right in outcomes], "correct"),
        "wrong": long.where([gold_right and not long_right for gold_right, long_right in outcomes], "wrong"),
    }


@torch.no_grad()
def attention_pattern(
    model: FocusModel,
    prompt: str | EncodedPrompt,
    response: Tensor,
    heads: Sequence[tuple[int, int]],
    positions: Sequence[int],
    *,
    interventions: Sequence[Intervention] = (),
) -> Float[Tensor, "n position position"]:
    """Attention pattern of each head in ``heads``, restricted to the tokens at ``positions``, for display.

    Args:
        model: The model.
        prompt: The prompt.
        response: Token ids of the response.
        heads: Heads to read. The result contains one pattern per head.
        positions: Token positions in the prompt and the response. They are the rows and the columns of each pattern.
        interventions: Interventions, applied in order. The returned pattern includes their effect.
    """
    encoded_prompt, rows = model.encode(prompt), PatternRows(heads, positions)
    tokens = torch.cat((encoded_prompt.tokens, response))
    model.observe(tokens, rows.hooks(), interventions, prompt=encoded_prompt)
    return rows.pattern()
