"""Responses of a FocusLens model to HELMET's prompts, recorded sample by sample."""

from __future__ import annotations

import logging
import math
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.evaluation import Setting
from focuslens.evaluation.recorded_runs import RecordedRun, Task, count_passes
from focuslens.evaluation.responses import respond
from focuslens.heads import Head
from focuslens.model.batching import BATCH_TOKENS
from focuslens.model.decoding_settings import DecodingSettings
from focuslens.model.execution import Executor
from focuslens.model.focus_model import FocusModel
from focuslens.model.generation import Generation
from focuslens.prompts.batch import EncodedPrompt, PromptBatch
from focuslens.scores.base import SINK
from focuslens.studies.helmet.checkout import Checkout
from focuslens.studies.helmet.plan import Entry
from focuslens.studies.helmet.samples import (
    HelmetSample,
    read_samples,
    require_room,
    require_template,
    samples_digest,
    stop_tokens,
)
from focuslens.util.files import versions
from focuslens.util.record_file import RecordFile

if TYPE_CHECKING:
    from focuslens.scores.base import Parts

__all__ = ["Answering", "answer_entry", "answering_for", "declared_penalty", "entry_header", "require_askable"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answering:
    """Picklable callable that answers one sample under every setting; see :class:`Answer`.

    Attributes:
        settings: Settings under which every prompt is answered.
        max_new_tokens: Maximum length of a response, in tokens.
        heads: Heads whose attention to the sink is recorded during generation.
        stop_tokens: Tokens that end a response; ``None`` means the model's own stop tokens.
        repetition_penalty: Penalty on tokens that the prompt or the response already contains; 1 means no penalty.
    """

    settings: tuple[Setting, ...]
    max_new_tokens: int
    heads: tuple[Head, ...] = ()
    stop_tokens: tuple[int, ...] | None = None
    repetition_penalty: float = 1.0

    def _decoding(self, model: FocusModel) -> DecodingSettings:
        """The checkpoint's decoding settings, with the stop tokens and the penalty of this task."""
        stops = model.stop_tokens if self.stop_tokens is None else self.stop_tokens
        return replace(model.decoding, stop_tokens=stops, repetition_penalty=self.repetition_penalty)

    def __call__(
        self,
        model: FocusModel,
        samples: Sequence[HelmetSample],
        budget: int = BATCH_TOKENS,
        skip: frozenset[str] = frozenset(),
        share: float = 1.0,
    ) -> Generator[tuple[str, list[dict[str, Any]]]]:
        """Answer one sample, and yield the name and the result of each setting.

        Args:
            model: The model.
            samples: The only sample.
            budget: Maximum number of prompt tokens per pass. The prompt counts once per setting in the pass.
            skip: Names of settings whose results are not needed.
            share: Fraction of the settings to run in one pass.
        """
        (sample,) = samples
        parts: Parts | None = _sink if self.heads else None
        for answered in respond(
            model,
            PromptBatch.of([EncodedPrompt(sample.tokens, sample.spans)]),
            [setting.interventions for setting in self.settings],
            max_new_tokens=self.max_new_tokens,
            budget=budget,
            parts=parts,
            decoding=self._decoding(model),
            skip={index for index, setting in enumerate(self.settings) if setting.name in skip},
            most=max(1, int(share * len(self.settings))),
        ):
            setting, (response,) = self.settings[answered.setting], answered.responses
            sink = None if answered.masses is None else _of_heads(answered.masses[0], self.heads)
            yield setting.name, [{**_output(model, response), "sink": sink}]


def _sink(batch: PromptBatch) -> Float[Tensor, "batch key 1"]:
    """Mask of the sink: the first ``SINK`` tokens of every prompt, not counting padding."""
    parts = torch.zeros(len(batch), batch.width, 1)
    for row, padding in zip(parts, batch.padding, strict=True):
        row[padding : padding + SINK] = 1
    return parts


def _of_heads(masses: Float[Tensor, "layer head 1"], heads: Sequence[Head]) -> list[float | None]:
    """Attention mass of each head in ``heads``, or ``None`` for each head if the response is empty."""
    values = [float(masses[layer, head, 0]) for layer, head in heads]
    return [None if math.isnan(value) else value for value in values]


def _output(model: FocusModel, response: Generation) -> dict[str, Any]:
    """Text and tokens of a response, in HELMET's form: white space is not stripped, and the stop token is kept.

    If a stop string ended the response, the text ends before the string, without white space at its ends.
    """
    if response.finished and response.stop is None:
        return {"output": response.text, "tokens": response.tokens.tolist()}
    tokens = [*response.tokens.tolist(), *([] if response.stop is None else [response.stop])]
    return {"output": model.tokenizer.decode(tokens, skip_special_tokens=True), "tokens": tokens}


def _record(sample: HelmetSample, results: Mapping[str, Any], *, tokenizer: Any) -> dict[str, Any]:
    """Record of a sample as JSON values."""
    return {
        "id": sample.id,
        "question": sample.question,
        "input_len": len(sample.tokens),
        "input_text": _excerpt(tokenizer, sample),
        "truncated": sample.truncated,
        "results": dict(results),
    }


def _excerpt(tokenizer: Any, sample: HelmetSample) -> str:
    """Text of the first and last 500 tokens of a prompt, as in HELMET's result files."""
    decode = tokenizer.decode
    return f"{decode(sample.tokens[:500])} <skip> {decode(sample.tokens[-500:])}"


def require_askable(
    executor: Executor, checkout: Checkout, entries: Sequence[Entry], template_kwargs: Mapping[str, Any] | None = None
) -> None:
    """Refuse tasks that the model cannot run, before any task starts.

    Prompts are read only for tasks whose length exceeds the model's context.

    Raises:
        ValueError: If a prompt does not fit the model's context, or the tokenizer lacks a chat template that a task
            needs.
    """
    for entry in entries:
        require_template(entry, executor.tokenizer)
    for entry in entries:
        if entry.length > executor.shape.n_ctx:
            samples = read_samples(checkout, entry, _load(checkout, entry), executor.tokenizer, template_kwargs)
            require_room(entry, samples, executor.shape.n_ctx)


def _load(checkout: Checkout, entry: Entry) -> dict[str, Any]:
    args = entry.args
    _LOG.info("%s: HELMET loads its data", entry.label)
    return checkout.load(args, entry.dataset, entry.file(args.test_files), entry.file(args.demo_files))


def declared_penalty(executor: Executor) -> float:
    """Repetition penalty in the checkpoint's generation config. HELMET's model class applies this penalty too."""
    (penalty,) = executor.map(_declared_penalty, [()])
    return penalty


def _declared_penalty(model: FocusModel) -> float:
    return model.decoding.repetition_penalty


def answering_for(
    executor: Executor, entry: Entry, settings: Sequence[Setting], heads: Sequence[Head], penalty: float = 1.0
) -> Answering:
    """:class:`Answering` for one task. HELMET's options set the maximum length and the stop tokens of responses."""
    ends = stop_tokens(executor.tokenizer, executor.description["stop_tokens"], entry)
    return Answering(tuple(settings), entry.max_new_tokens, tuple(heads), ends, penalty)


def entry_header(
    executor: Executor, checkout: Checkout, entry: Entry, answering: Answering, samples: Sequence[HelmetSample]
) -> dict[str, Any]:
    """Origin of one task's records, as JSON values."""
    ends = {} if answering.stop_tokens is None else {"stop_tokens": list(answering.stop_tokens)}
    return {
        "model": {**executor.description, **ends},
        "helmet": {"files_sha256": checkout.digest},
        "data": {**entry.describe(), "samples": len(samples), "prompts_sha256": samples_digest(samples)},
        "settings": [setting.describe() for setting in answering.settings],
        "sink_heads": [list(head) for head in answering.heads],
        "repetition_penalty": answering.repetition_penalty,
        "seed": entry.args.seed,
        "versions": versions(),
    }


def answer_entry(
    executor: Executor,
    checkout: Checkout,
    entry: Entry,
    answering: Answering,
    folder: Path,
    *,
    batch_tokens: int = BATCH_TOKENS,
    template_kwargs: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> tuple[dict[str, Any], RecordFile]:
    """Answer all samples of one task under every setting, or resume a killed run.

    Args:
        executor: Executor of the model.
        checkout: Checkout of HELMET.
        entry: The task.
        answering: Callable that answers each sample.
        folder: Folder for the file of records, which has one JSON line per sample.
        batch_tokens: Maximum number of prompt tokens per batch; halved when memory runs out.
        template_kwargs: Further keyword arguments of the chat template.
        progress: Whether to show a progress bar; :mod:`focuslens.util.progress` describes the default.

    Returns:
        HELMET's data for the task, and the records.

    Raises:
        ValueError: If a prompt does not fit the model's context, or the records in ``folder`` have a different origin.
    """
    data = _load(checkout, entry)
    samples = read_samples(checkout, entry, data, executor.tokenizer, template_kwargs)
    require_room(entry, samples, executor.shape.n_ctx)
    store = RecordFile(folder / f"{entry.label}.jsonl", entry_header(executor, checkout, entry, answering, samples))
    todo = [sample for sample in samples if sample.id not in store.records]
    tasks = [
        Task(
            sample.id,
            sample,
            len(sample.tokens),
            store.parts.get(sample.id, {}),
            f"sample {sample.id} of {entry.dataset}",
        )
        for sample in todo
    ]
    # Each sample runs alone, because a long prompt fills a batch. Records are written as soon as samples finish.
    run = RecordedRun(
        executor,
        answering,
        tuple(setting.name for setting in answering.settings),
        partial(_record, tokenizer=executor.tokenizer),
        store,
        1 + count_passes(setting.interventions for setting in answering.settings),
        answering.max_new_tokens,
        alone=True,
    )
    for _ in run.run(tasks, batch_tokens, entry.label, n_done=len(samples) - len(todo), show=progress):
        pass
    return data, store
