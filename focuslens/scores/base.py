"""Attention from response rows to parts of the prompt. Each row is summed per part as soon as it is computed."""

from __future__ import annotations

import time
from collections.abc import Callable, Collection, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from einops import einsum, reduce
from jaxtyping import Float
from torch import Tensor

from focuslens.hooks import Hook, Intervention, RowHook, checked_interventions, hook_name
from focuslens.model.batching import Pace, PlanRecord, RunOptions, map_parts, require_fitting
from focuslens.prompts.batch import EncodedPrompt, PromptBatch
from focuslens.prompts.sample import Case, MultiDocSample
from focuslens.prompts.spans import require_spans
from focuslens.scores.given_responses import Response, response_text, response_tokens
from focuslens.util.progress import progress_bar, track

if TYPE_CHECKING:
    from focuslens.heads import ModelShape
    from focuslens.model.execution import Executor
    from focuslens.model.focus_model import FocusModel

__all__ = [
    "KINDS",
    "SCORED_SPANS",
    "SINK",
    "Parts",
    "ResponseMasses",
    "ResponseRun",
    "attention_to_parts",
    "each_document",
    "response_masses",
    "scores_of_parts",
    "sink_and_documents",
    "sink_parts",
]

KINDS = ("relevant", "irrelevant", "irrelevant_max", "sink")
"""Kinds of contextual score, by part of the prompt.

The parts are the relevant document, all irrelevant documents together, the irrelevant document with the most attention,
and the sink.
"""

SCORED_SPANS = ("relevant", "irrelevant")
"""Spans of which contextual scores consist."""

SINK = 2
"""Number of tokens in the attention sink. The sink is the first two tokens, as in the code of "Focus Directions"."""


def attention_to_parts(
    pattern: Float[Tensor, "batch head row key"], parts: Float[Tensor, "batch key part"]
) -> Float[Tensor, "batch head row part"]:
    """Sum attention over the keys of each part. ``parts`` is 1 for keys in the part, and 0 for all other keys."""
    return einsum(pattern, parts, "batch head row key, batch key part -> batch head row part")


Parts: TypeAlias = Callable[[PromptBatch], Float[Tensor, "batch key part"]]
"""Function that returns the key masks of a batch, one per part: 1 for keys in the part, and 0 for all other keys."""


def sink_and_documents(batch: PromptBatch) -> Float[Tensor, "batch key part"]:
    """Key masks of the sink (part 0), the relevant document (part 1) and each irrelevant document (parts 2 and up)."""
    n_irrelevant = max(len(prompt.spans.get("irrelevant", ())) for prompt in batch.prompts)
    parts = torch.zeros(len(batch), batch.width, 2 + n_irrelevant)
    for row, prompt, padding in zip(parts, batch.prompts, batch.padding, strict=True):
        row[padding : padding + SINK, 0] = 1
        for start, end in prompt.spans.get("relevant", ()):
            row[padding + start : padding + end, 1] = 1
        for part, (start, end) in enumerate(prompt.spans.get("irrelevant", ()), start=2):
            row[padding + start : padding + end, part] = 1
    return parts


def each_document(batch: PromptBatch) -> Float[Tensor, "batch key part"]:
    """Key masks of the documents: one part per document, in prompt order."""
    n_documents = max(len(prompt.spans["document"]) for prompt in batch.prompts)
    parts = torch.zeros(len(batch), batch.width, n_documents)
    for row, prompt, padding in zip(parts, batch.prompts, batch.padding, strict=True):
        for part, (start, end) in enumerate(prompt.spans["document"]):
            row[padding + start : padding + end, part] = 1
    return parts


def scores_of_parts(by_part: Float[Tensor, "batch layer head part"]) -> dict[str, Float[Tensor, "batch layer head"]]:
    """Scores of every kind from the attention to the parts of :func:`sink_and_documents`."""
    others = by_part[..., 2:]
    irrelevant = reduce(others, "batch layer head part -> batch layer head", "sum")
    largest = reduce(others, "batch layer head part -> batch layer head", "max") if others.shape[-1] else irrelevant
    sink, relevant = by_part[..., 0], by_part[..., 1]
    # Without irrelevant documents, the sum is zero even for an empty response, whose scores must be NaN.
    irrelevant, largest = (torch.where(sink.isnan(), sink, score) for score in (irrelevant, largest))
    return {"relevant": relevant, "irrelevant": irrelevant, "irrelevant_max": largest, "sink": sink}


class ResponseMasses:
    """Collector of attention from response rows to parts of the prompt. Hooks on ``hook_pattern`` read the rows.

    The heads of some layers have a sink: one further logit that takes part in the softmax and has no key (gpt-oss). Its
    mass counts to the part that consists of the first tokens, the attention sink.

    Args:
        shape: Sizes of the model, including its numbers of layers and heads.
        batch: The prompts.
        parts: Function that returns the key masks of the parts.
        sink_layers: Layers whose heads have a sink.
    """

    def __init__(self, shape: ModelShape, batch: PromptBatch, parts: Parts, sink_layers: Collection[int] = ()) -> None:
        self._parts, self._sink_layers = parts(batch), frozenset(sink_layers)
        self._is_sink = sink_parts(self._parts, batch) if self._sink_layers else None
        self._rows: list[list[Tensor]] = [[] for _ in range(shape.n_layers)]
        self._empty = torch.full((len(batch), shape.n_layers, shape.n_heads, self._parts.shape[2]), torch.nan)

    def hooks(self) -> list[Hook]:
        """Hooks for the forward passes over the response tokens. The passes must follow the prompt, in token order."""
        return [
            (hook_name(layer, "hook_pattern"), self._observer(rows, layer in self._sink_layers))
            for layer, rows in enumerate(self._rows)
        ]

    def _observer(self, rows: list[Tensor], has_sinks: bool) -> Any:
        def read(pattern: Float[Tensor, "batch head row key"]) -> None:
            n_rows, n_keys = pattern.shape[-2:]
            # If the first row is in the prompt, this pass runs the last prompt token, which the prefill held back. That
            # row is not part of the response.
            if n_keys - n_rows < self._parts.shape[1]:
                return
            if self._parts.device != pattern.device:
                self._parts = self._parts.to(pattern.device)
            on_prompt = pattern[..., : self._parts.shape[1]].float()
            masses = (on_prompt.flatten(1, 2) @ self._parts).unflatten(1, on_prompt.shape[1:3])
            if has_sinks and self._is_sink is not None:
                rest = 1 - pattern.float().sum(dim=-1, keepdim=True)
                masses = masses + rest * self._is_sink.to(masses)[:, None, None]
            rows.append(masses)

        return RowHook(lambda pattern, hook: read(pattern), read, reads=True)

    def means(self, lengths: Sequence[int]) -> Float[Tensor, "batch layer head part"]:
        """Mean attention from the rows of each response to each part, per head.

        ``lengths[i]`` is the number of rows of response ``i``. The means of an empty response are NaN.
        """
        if not self._rows[0]:
            return self._empty.clone()
        device = self._rows[0][0].device  # layers can be on different devices
        by_layer = torch.stack([torch.cat(rows, dim=2).to(device) for rows in self._rows], dim=1).cpu()
        n = torch.tensor(lengths)
        # A batch also contains rows after the end of a shorter response. The weight of these rows is zero.
        weight = (torch.arange(by_layer.shape[3]) < n[:, None]) / n[:, None].clamp(min=1)
        by_part = einsum(by_layer, weight, "batch layer head row part, batch row -> batch layer head part")
        return torch.where((n > 0)[:, None, None, None], by_part, torch.nan)


def sink_parts(parts: Float[Tensor, "batch key part"], batch: PromptBatch) -> Float[Tensor, "batch part"]:
    """1 for parts that consist of the prompt's first token, and at most of further tokens of the sink; 0 for others."""
    columns, padding = torch.arange(parts.shape[1]), torch.tensor(batch.padding)[:, None]
    first = einsum(parts, (columns == padding).float(), "batch key part, batch key -> batch part")
    later = einsum(parts, (columns >= padding + SINK).float(), "batch key part, batch key -> batch part")
    return ((first > 0) & (later == 0)).float()


def response_masses(
    model: FocusModel,
    prompts: Sequence[EncodedPrompt],
    parts: Parts,
    responses: Sequence[Response] | None,
    interventions: Sequence[Intervention],
    max_new_tokens: int,
) -> tuple[Float[Tensor, "batch layer head part"], list[str]]:
    """Mean attention from each response in a batch to each part of its prompt, and the texts of the responses.

    If ``responses`` is ``None``, the model generates the responses, and the attention is read during generation.
    Otherwise, the attention is read in an additional forward pass over ``responses``.
    """
    prefix = model.prefill(prompts, interventions, hold_last=True)
    masses = ResponseMasses(model.shape, prefix.batch, parts, model.sink_layers)
    if responses is None:
        generated = model.decode(prefix, interventions, max_new_tokens=max_new_tokens, observers=masses.hooks())
        lengths = [len(response.tokens) for response in generated]
        return masses.means(lengths), [response.text for response in generated]
    tokens = [response_tokens(model, prompt, response) for prompt, response in zip(prompts, responses, strict=True)]
    lengths = [len(ids) for ids in tokens]
    if any(lengths):
        padded_tokens = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        is_token = torch.arange(padded_tokens.shape[1]) < torch.tensor(lengths)[:, None]
        model.extend(prefix, padded_tokens, interventions, masses.hooks(), mask=is_token.long())
    return masses.means(lengths), [response_text(model, response) for response in responses]


@dataclass(frozen=True, eq=False)
class ResponseRun:
    """A run over samples that measures the attention from each response to parts of its prompt.

    Attributes:
        executor: Executor that runs the batches.
        samples: The samples, in any order.
        case: Case of the prompts: ``long``, ``gold`` or ``negative``.
        options: Options for the response length, the batch size and the progress bars.
        interventions: Interventions, applied in order.
        responses: One response per sample, checked by :func:`given_responses`; if ``None``, the model generates the
            responses.
    """

    executor: Executor
    samples: Sequence[MultiDocSample]
    case: Case
    options: RunOptions
    interventions: Sequence[Intervention] = ()
    responses: Sequence[Response] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "interventions", checked_interventions(self.interventions))

    def masses(
        self,
        parts: Parts,
        label: str,
        *,
        needs: Collection[str],
        skip: Collection[str] = (),
        record: PlanRecord | None = None,
    ) -> Generator[tuple[list[int], Float[Tensor, "batch layer head part"], list[str]]]:
        """Run the samples in batches of similar prompt length, shortest prompts first.

        Args:
            parts: Function that returns the key masks of the parts. An executor with other processes needs a picklable
                function.
            label: Text of the progress bar.
            needs: Spans that the parts consist of; see :func:`require_spans`.
            skip: Ids of samples that are not run.
            record: File to which the caller writes each batch. Batches then take about a minute at most.

        Yields:
            For each batch: the indices of the samples, the mean attention from each response to each part, and the
            texts of the responses.

        Raises:
            ValueError: If a prompt lacks a span, or does not fit the context.
        """
        show, executor = self.options.progress, self.executor
        todo = [i for i, sample in enumerate(self.samples) if sample.id not in skip]
        samples = [self.samples[i] for i in todo]
        prompts = [executor.encode(sample.prompt(self.case)) for sample in track(samples, "tokenising", show=show)]
        require_spans(samples, prompts, needs, self.case)
        items = [
            (prompt, None if self.responses is None else self.responses[i])
            for i, prompt in zip(todo, prompts, strict=True)
        ]
        names, lengths = [sample.id for sample in samples], [len(prompt.tokens) for prompt in prompts]
        require_fitting(names, lengths, executor.shape.n_ctx)
        run = partial(
            _run_batch,
            parts=parts,
            interventions=tuple(self.interventions),
            max_new_tokens=self.options.max_new_tokens,
        )
        work = 1 + len(todo) * self.options.max_new_tokens / max(1, sum(lengths))
        pace = None if record is None else Pace.of(executor, record, work, self.options.batch_tokens)
        n = len(self.samples)
        with progress_bar(label, n, done=n - len(todo), show=show) as bar:
            for batch, (masses, responses, seconds) in map_parts(
                executor, run, items, names, lengths, self.options.batch_tokens, pace=pace
            ):
                if pace is not None:
                    pace.measure(len(batch) * lengths[batch[-1]], seconds)
                yield [todo[i] for i in batch], masses, responses
                bar.update(len(batch))


@torch.no_grad()
def _run_batch(
    model: FocusModel,
    items: Sequence[tuple[EncodedPrompt, Response | None]],
    budget: int,
    share: float = 1.0,
    *,
    parts: Parts,
    interventions: Sequence[Intervention],
    max_new_tokens: int,
) -> tuple[Float[Tensor, "batch layer head part"], list[str], float]:
    """Run :func:`response_masses` on a batch, and return its results and its duration in seconds.

    Either every item contains a response, or every response is ``None``.
    """
    started = time.monotonic()
    prompts, responses = [prompt for prompt, _ in items], [response for _, response in items if response is not None]
    masses, texts = response_masses(model, prompts, parts, responses or None, interventions, max_new_tokens)
    return masses, texts, time.monotonic() - started
