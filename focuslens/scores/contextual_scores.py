"""Contextual scores: attention from response tokens to parts of the prompt (equation 1 of "Focus Directions")."""

from __future__ import annotations

from collections.abc import Generator, Iterable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from einops import reduce
from jaxtyping import Float
from torch import Tensor

from focuslens.heads import HeadList, Sparsity, heads_by_layer, random_heads, rank_heads, sparsity, top_heads
from focuslens.hooks import Hook, Intervention, checked_interventions, hook_name, row_wise
from focuslens.model.batching import BATCH_TOKENS, RunOptions
from focuslens.model.execution import Executor, executor_for
from focuslens.prompts.answers import answered_right, require_samples
from focuslens.prompts.batch import EncodedPrompt
from focuslens.prompts.sample import Case, MultiDocSample
from focuslens.scores.base import ResponseRun, sink_and_documents
from focuslens.scores.recorded_scores import open_scores, record_id, score_record, scores_of_record
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

KINDS = ("relevant", "irrelevant", "irrelevant_max", "sink")
"""Kinds of contextual score, by part of the prompt.

The parts are the relevant document, all irrelevant documents together, the irrelevant document with the most attention,
and the sink.
"""


ScoredCase: TypeAlias = Literal["long", "gold", "negative", "correct", "wrong"]
"""Case of the scored prompts (``long``, ``gold`` or ``negative``), or a group of long prompts by outcome.

The group ``correct`` contains the long prompts with a correct response. The group ``wrong`` contains the long prompts
with a wrong response. Samples with a wrong response to the gold prompt are left out of both groups.
"""


@dataclass(frozen=True, eq=False)
class ContextualScores:
    """Contextual scores per sample and head.

    A score is the attention from response tokens to a part of the prompt, summed over the tokens of the part and
    averaged over the response tokens. Scores are between 0 and 1. All scores of a sample with an empty response are
    NaN. The relevant score of a sample without a gold document is NaN.

    Attributes:
        relevant: Attention to the relevant document.
        irrelevant: Attention to all irrelevant documents together.
        irrelevant_max: Attention to the irrelevant document with the most attention, selected per head and sample.
        sink: Attention to the first two tokens.
        case: Case of the scored prompts, or group of samples.
        sample_ids: ``MultiDocSample.id`` of each sample.
        responses: The scored response of each sample.
        correct: Whether each response contains an accepted answer.
    """

    relevant: Float[Tensor, "sample layer head"]
    irrelevant: Float[Tensor, "sample layer head"]
    irrelevant_max: Float[Tensor, "sample layer head"]
    sink: Float[Tensor, "sample layer head"]
    case: ScoredCase
    sample_ids: tuple[str, ...]
    responses: tuple[str, ...]
    correct: tuple[bool, ...]

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
        rows = [
            (
                str(head),
                bar(float(means["relevant"][head]), full=top),
                *(float(means[kind][head]) for kind in KINDS[1:]),
            )
            for head in self.top_heads(min(10, n_layers * n_heads))
        ]
        alt = f"Mean relevant score of {n_layers} layers (downward) of {n_heads} heads, light where it is high"
        columns = ("head", *(kind.replace("_", " ") for kind in KINDS))
        counts = "; ".join(map(str, self.sparsity()))
        return card(
            title,
            map_image(means["relevant"].tolist(), alt),
            table(columns, rows, "Mean share of the response's attention, best heads first"),
            Markup(f"<div>heads with a relevant score {escape(counts)}</div>"),
        )

    def mean(self, kind: str = "relevant") -> Float[Tensor, "layer head"]:
        """Mean score of one kind, per head. Samples whose score is NaN are left out.

        Raises:
            ValueError: If ``kind`` is unknown, or if all scores of this kind are NaN.
        """
        if kind not in KINDS:
            raise ValueError(f"kind is {kind!r}; it must be one of {', '.join(KINDS)}")
        scores: Tensor = getattr(self, kind)
        if scores.isnan().all():
            document = " and a relevant document" if kind == "relevant" else ""
            raise ValueError(f"none of the {len(self)} samples of case {self.case!r} has a response{document} to score")
        return scores.nanmean(dim=0)

    def ranking(self) -> HeadList:
        """All heads, in descending order of mean relevant score."""
        return rank_heads(self.mean("relevant"))

    def top_heads(self, k: int) -> HeadList:
        """Contextual heads: the ``k`` heads with the highest mean relevant score, in descending order.

        Raises:
            ValueError: If ``k`` is negative or greater than the number of heads.
        """
        return top_heads(self.mean("relevant"), k)

    def random_heads(self, k: int, *, exclude: Iterable[tuple[int, int]] = (), seed: int = 0) -> HeadList:
        """Draw ``k`` random heads that are not in ``exclude``, as a control for ``k`` contextual heads."""
        _, n_layers, n_heads = self.relevant.shape
        return random_heads(n_layers, n_heads, k, exclude=exclude, seed=seed)

    def sparsity(self, thresholds: Sequence[float] = (0.2, 0.1, 0.05)) -> tuple[Sparsity, ...]:
        """Number of heads whose mean relevant score exceeds each threshold, and the layers of these heads."""
        return sparsity(self.mean("relevant"), thresholds)

    def to_frame(self) -> pd.DataFrame:
        """Mean scores as a data frame, with one row per head, in descending order of relevant score."""
        import pandas as pd

        means = {kind: self.mean(kind) for kind in KINDS}
        rows = [
            {"layer": head.layer, "head": head.head} | {kind: float(means[kind][head]) for kind in KINDS}
            for head in self.ranking()
        ]
        return pd.DataFrame(rows)

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
    for indices, masses, texts in run.masses(sink_and_documents, label, skip=skip, record=store):
        for kind, values in _scores_of(masses).items():
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
    )


def _scores_of(by_part: Float[Tensor, "batch layer head part"]) -> dict[str, Float[Tensor, "batch layer head"]]:
    """Compute the scores of every kind from the attention to the parts of :func:`sink_and_documents`."""
    others = by_part[..., 2:]
    irrelevant = reduce(others, "batch layer head part -> batch layer head", "sum")
    largest = reduce(others, "batch layer head part -> batch layer head", "max") if others.shape[-1] else irrelevant
    sink, relevant = by_part[..., 0], by_part[..., 1]
    # Without irrelevant documents, the sum is zero even for an empty response, whose scores must be NaN.
    irrelevant, largest = (torch.where(sink.isnan(), sink, score) for score in (irrelevant, largest))
    return {"relevant": relevant, "irrelevant": irrelevant, "irrelevant_max": largest, "sink": sink}


def contextual_scores(
    model: FocusModel | Executor,
    samples: Iterable[MultiDocSample],
    case: ScoredCase = "long",
    *,
    responses: Sequence[str] | None = None,
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
        responses: Responses to score, one per sample; if ``None``, the model generates the responses.
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
    if responses is not None and len(responses) != len(sample_list):
        raise ValueError(f"there are {len(responses)} responses for {len(sample_list)} samples; give one per sample")
    options = RunOptions(max_new_tokens, batch_tokens, progress)
    first: Case = "long" if case in ("correct", "wrong") else case
    run = ResponseRun(executor, sample_list, first, options, interventions, responses)
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
    encoded_prompt = model.encode(prompt)
    position_tensor = torch.as_tensor(positions, dtype=torch.long)
    patterns = {(layer, head): torch.zeros(len(position_tensor), len(position_tensor)) for layer, head in heads}

    def read(layer: int, indices: list[int]) -> Any:
        @row_wise
        def observe(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
            n_rows, n_keys = pattern.shape[-2:]
            first = n_keys - n_rows
            rows = ((position_tensor >= first) & (position_tensor < n_keys)).nonzero()[:, 0]
            columns = (position_tensor < n_keys).nonzero()[:, 0]  # later keys are masked in every row of this block
            for head in indices:
                part = pattern[0, head][position_tensor[rows] - first][:, position_tensor[columns]]
                patterns[layer, head][rows[:, None], columns] = part.float().cpu()

        return observe

    observers: list[Hook] = [
        (hook_name(layer, "hook_pattern"), read(layer, indices)) for layer, indices in heads_by_layer(heads).items()
    ]
    model.observe(torch.cat((encoded_prompt.tokens, response)), observers, interventions, prompt=encoded_prompt)
    return torch.stack([patterns[layer, head] for layer, head in heads])
