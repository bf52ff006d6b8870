"""HELMET's prompts through FocusLens: one sample in, one record out, written as it is done."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Float
from torch import Tensor

from focuslens.batch import EncodedPrompt, Generation, PromptBatch
from focuslens.batching import BATCH_TOKENS, in_batches
from focuslens.evaluation import Setting
from focuslens.evaluation.records import RecordFile
from focuslens.evaluation.responding import respond
from focuslens.files import versions
from focuslens.heads import Head
from focuslens.helmet.checkout import Checkout
from focuslens.helmet.plan import Entry
from focuslens.helmet.samples import HelmetSample, read_samples, require_room, samples_digest, stop_tokens
from focuslens.masses import SINK
from focuslens.model import FocusModel
from focuslens.progress import progress_bar

if TYPE_CHECKING:
    from focuslens.masses import Parts

__all__ = ["Answering", "answer_entry", "entry_header", "model_for", "require_rooms"]

_LOG = logging.getLogger(__name__)


@dataclass(frozen=True)
class Answering:
    """What is done with each sample: a plain value, so that samples can be spread over processes.

    Attributes:
        settings: What every prompt is answered under.
        max_new_tokens: Of a response.
        heads: Heads whose attention to the sink is kept, in the rows that generation runs anyway.
    """

    settings: tuple[Setting, ...]
    max_new_tokens: int
    heads: tuple[Head, ...] = ()

    def __call__(self, model: FocusModel, sample: HelmetSample, budget: int = BATCH_TOKENS) -> dict[str, Any]:
        """The record of one sample: its responses under every setting, as JSON.

        Args:
            model: The model; its stop tokens end responses.
            sample: The prompt.
            budget: Tokens that are run at a time, copies of the prompt for several settings included.
        """
        batch = PromptBatch.of([EncodedPrompt(sample.tokens, {})])
        interventions = [setting.interventions for setting in self.settings]
        parts: Parts | None = _sink if self.heads else None
        results: dict[str, Any] = {}
        started = time.perf_counter()
        for answered in respond(
            model, batch, interventions, max_new_tokens=self.max_new_tokens, budget=budget, parts=parts
        ):
            setting, (response,) = self.settings[answered.setting], answered.responses
            sink = None if answered.masses is None else _of_heads(answered.masses[0], self.heads)
            results[setting.name] = {**_said(model, response), "sink": sink}
        return {
            "id": sample.id,
            "question": sample.question,
            "input_len": len(sample.tokens),
            "input_text": _shown(model, sample),
            "truncated": sample.truncated,
            "seconds": time.perf_counter() - started,
            "results": {setting.name: results[setting.name] for setting in self.settings},
        }


def _sink(batch: PromptBatch) -> Float[Tensor, "batch key 1"]:
    """The first tokens of every prompt."""
    parts = torch.zeros(len(batch), batch.width, 1)
    for row, padding in zip(parts, batch.padding, strict=True):
        row[padding : padding + SINK] = 1
    return parts


def _of_heads(masses: Float[Tensor, "layer head 1"], heads: Sequence[Head]) -> list[float | None]:
    """Of each head; ``None`` for a response without tokens."""
    found = [float(masses[layer, head, 0]) for layer, head in heads]
    return [None if math.isnan(one) else one for one in found]


def _said(model: FocusModel, response: Generation) -> dict[str, Any]:
    """A response as HELMET has it: white space kept, and the token that ended it counted."""
    tokens = [*response.tokens.tolist(), *([] if response.stop is None else [response.stop])]
    return {"output": model.tokenizer.decode(tokens, skip_special_tokens=True), "tokens": tokens}


def _shown(model: FocusModel, sample: HelmetSample) -> str:
    """What HELMET's result files keep of a prompt: its first and last 500 tokens."""
    decode = model.tokenizer.decode
    return f"{decode(sample.tokens[:500])} <skip> {decode(sample.tokens[-500:])}"


def model_for(model: FocusModel, entry: Entry) -> FocusModel:
    """The same model with the stop tokens of a task."""
    stops = stop_tokens(model, entry)
    if stops == model.stop_tokens:
        return model
    encoder = model.encoder
    return FocusModel(
        model.hooked,
        model.tokenizer,
        chat=encoder.chat,
        chat_template_kwargs=encoder.template_kwargs,
        stop_tokens=stops,
        name=model.name,
        revision=model.revision,
    )


def require_rooms(model: FocusModel, checkout: Checkout, entries: Sequence[Entry], kwargs: Mapping[str, Any]) -> None:
    """Refuse prompts that do not fit the model before any is run; looks into those tasks only that may have some.

    Raises:
        ValueError: If there are any.
    """
    for entry in entries:
        if entry.length > model.shape.n_ctx:
            data = _load(checkout, entry)
            require_room(entry, read_samples(checkout, entry, data, model.tokenizer, kwargs), model.shape.n_ctx)


def _load(checkout: Checkout, entry: Entry) -> dict[str, Any]:
    args = entry.args
    _LOG.info("%s: HELMET loads its data", entry.label)
    return checkout.load(args, entry.dataset, entry.file(args.test_files), entry.file(args.demo_files))


def entry_header(
    model: FocusModel, checkout: Checkout, entry: Entry, answering: Answering, samples: Sequence[HelmetSample]
) -> dict[str, Any]:
    """What made the records of one task."""
    return {
        "model": model.description,
        "helmet": {"files_sha256": checkout.digest},
        "data": {**entry.describe(), "samples": len(samples), "prompts_sha256": samples_digest(samples)},
        "settings": [setting.describe() for setting in answering.settings],
        "sink_heads": [list(head) for head in answering.heads],
        "seed": entry.args.seed,
        "versions": versions(),
    }


def answer_entry(
    model: FocusModel,
    checkout: Checkout,
    entry: Entry,
    answering: Answering,
    folder: Path,
    *,
    batch_tokens: int = BATCH_TOKENS,
    template_kwargs: Mapping[str, Any] | None = None,
    progress: bool | None = None,
) -> tuple[dict[str, Any], RecordFile]:
    """All samples of one task under every setting, on from where a killed run was; gives HELMET's data too.

    Args:
        model: The model, with the stop tokens of the task.
        checkout: HELMET.
        entry: The task.
        answering: What is done with each sample.
        folder: Where the records go, one JSON line a sample.
        batch_tokens: Tokens that are run at a time; halved when memory runs out.
        template_kwargs: Further arguments of the chat template.
        progress: Show a progress bar; by default where someone may watch, see :mod:`focuslens.progress`.

    Raises:
        ValueError: If a prompt does not fit the model's context, or the records there were made otherwise.
    """
    data = _load(checkout, entry)
    samples = read_samples(checkout, entry, data, model.tokenizer, template_kwargs)
    require_room(entry, samples, model.shape.n_ctx)
    store = RecordFile(folder / f"{entry.label}.jsonl", entry_header(model, checkout, entry, answering, samples))
    todo = [sample for sample in samples if sample.id not in store.records]
    budget = batch_tokens
    with progress_bar(entry.label, len(samples), done=len(samples) - len(todo), show=progress) as bar:
        for sample in todo:

            def run(indices: list[int], left: int, sample: HelmetSample = sample) -> dict[str, Any]:
                nonlocal budget
                budget = left
                return answering(model, sample, left)

            # One at a time: long prompts fill a batch alone, and each is on disk before the next is begun.
            for _, record in in_batches([len(sample.tokens)], budget, run, divisible=len(answering.settings) > 1):
                store.append([record])
            bar.update()
    return data, store
