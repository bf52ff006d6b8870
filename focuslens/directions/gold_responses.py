"""Responses to gold prompts, on which directions are trained. A killed run keeps the responses of finished batches."""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from jaxtyping import Int
from torch import Tensor

from focuslens.model.batching import Pace, RunOptions, map_parts
from focuslens.prompts.batch import EncodedPrompt
from focuslens.prompts.sample import Case, MultiDocSample, prompts_digest
from focuslens.util.files import versions
from focuslens.util.progress import progress_bar, track
from focuslens.util.record_file import RecordFile

if TYPE_CHECKING:
    from focuslens.model.execution import Executor
    from focuslens.model.focus_model import FocusModel

__all__ = ["gold_responses", "response_limits", "responses_path"]


def responses_path(checkpoint: str | Path) -> Path:
    """File of the responses of a training run, beside the run's checkpoint."""
    path = Path(checkpoint)
    return path.with_name(f"{path.stem}.responses.jsonl")


def response_limits(
    executor: Executor, samples: Sequence[MultiDocSample], prompts: Case, options: RunOptions
) -> list[tuple[MultiDocSample, int]]:
    """Samples with a gold document, and the maximum length of the response to each, in tokens.

    A response must fit into the context after the training prompt, whose case is ``prompts``.

    Raises:
        ValueError: If a training prompt leaves no room for a response.
    """
    answerable = [sample for sample in samples if sample.gold_index is not None]
    return [
        (sample, _response_limit(executor, sample, prompts, options.max_new_tokens))
        for sample in track(answerable, "tokenising", show=options.progress)
    ]


def gold_responses(
    executor: Executor,
    samples: Sequence[tuple[MultiDocSample, int]],
    prompts: Case,
    options: RunOptions,
    checkpoint: str | Path | None,
) -> tuple[list[MultiDocSample], list[Int[Tensor, "response"]]]:
    """Samples with a nonempty response to their gold prompt, and the response tokens.

    Args:
        executor: Executor that generates the responses.
        samples: Training samples, and the maximum length of the response to each, from :func:`response_limits`.
        prompts: Case of the training prompts.
        options: Options for the response length, the batch size and the progress bars.
        checkpoint: Checkpoint of the training run. Responses are written beside it, and read from there.
    """
    answerable = [sample for sample, _ in samples]
    encoded = [executor.encode(sample.prompt("gold")) for sample in answerable]
    limits = [limit for _, limit in samples]
    store = None if checkpoint is None else _open_responses(checkpoint, executor, answerable, prompts, options)
    responses = _generate(executor, answerable, list(zip(encoded, limits, strict=True)), options, store)
    usable = [i for i, response in enumerate(responses) if len(response)]
    return [answerable[i] for i in usable], [responses[i] for i in usable]


def _generate(
    executor: Executor,
    samples: Sequence[MultiDocSample],
    items: Sequence[tuple[EncodedPrompt, int]],
    options: RunOptions,
    store: RecordFile | None,
) -> list[Int[Tensor, "response"]]:
    """Response tokens to each prompt. Responses in ``store`` are not generated again."""
    # Ids of records contain the index, because two training samples can be the same.
    ids = [f"{i} {sample.id}" for i, sample in enumerate(samples)]
    done = {} if store is None else {name: record["tokens"] for name, record in store.records.items()}
    todo = [i for i, name in enumerate(ids) if name not in done]
    names, lengths = [samples[i].id for i in todo], [len(items[i][0].tokens) for i in todo]
    work = 1 + len(todo) * options.max_new_tokens / max(1, sum(lengths))
    pace = None if store is None else Pace.of(executor, store, work, options.batch_tokens)
    with progress_bar("gold responses", len(samples), done=len(samples) - len(todo), show=options.progress) as bar:
        for batch, (responses, seconds) in map_parts(
            executor, _run_batch, [items[i] for i in todo], names, lengths, options.batch_tokens, pace=pace
        ):
            new = [(ids[todo[i]], tokens) for i, tokens in zip(batch, responses, strict=True)]
            done.update(new)
            if store is not None and pace is not None:
                store.append([{"id": name, "tokens": tokens} for name, tokens in new])
                pace.measure(len(batch) * lengths[batch[-1]], seconds)
            bar.update(len(batch))
    return [torch.tensor(done[name], dtype=torch.long) for name in ids]


def _run_batch(
    model: FocusModel, items: Sequence[tuple[EncodedPrompt, int]], budget: int, share: float = 1.0
) -> tuple[list[list[int]], float]:
    """Responses to a batch of prompts, truncated to the limit of each prompt, and the duration in seconds."""
    started = time.monotonic()
    generations = model.generate([prompt for prompt, _ in items], max_new_tokens=max(limit for _, limit in items))
    tokens = [made.tokens[:limit].tolist() for made, (_, limit) in zip(generations, items, strict=True)]
    return tokens, time.monotonic() - started


def _open_responses(
    checkpoint: str | Path, executor: Executor, samples: Sequence[MultiDocSample], prompts: Case, options: RunOptions
) -> RecordFile:
    header = {
        "model": executor.description,
        "data": {"samples": len(samples), "prompts_sha256": [prompts_digest(samples, c) for c in ("gold", prompts)]},
        "max_new_tokens": options.max_new_tokens,
        "versions": versions(),
    }
    return RecordFile(responses_path(checkpoint), header)


def _response_limit(executor: Executor, sample: MultiDocSample, prompts: Case, max_new_tokens: int) -> int:
    """Maximum response length in tokens: ``max_new_tokens``, or less if the training prompt leaves less room."""
    room = executor.shape.n_ctx - len(executor.encode(sample.prompt(prompts)).tokens)
    if room < 1:
        raise ValueError(
            f"the {prompts} prompt of sample {sample.id} leaves no room for a response in the model's context of "
            f"{executor.shape.n_ctx} tokens; leave it out, use fewer documents, or a larger n_ctx"
        )
    return min(max_new_tokens, room)
