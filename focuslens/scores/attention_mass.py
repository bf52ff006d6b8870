"""Attention from the rows of a response to parts of its prompt, summed per part as soon as a row is computed."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from einops import einsum
from jaxtyping import Float
from torch import Tensor

from focuslens.hooks import Hook, Intervention, hook_name
from focuslens.model.batching import RunOptions, map_batches
from focuslens.prompts.batch import EncodedPrompt, PromptBatch
from focuslens.prompts.prompt import Case, MultiDocSample
from focuslens.util.progress import progress_bar, track

if TYPE_CHECKING:
    from focuslens.heads import ModelShape
    from focuslens.model.execution import Executor
    from focuslens.model.focus_model import FocusModel

__all__ = [
    "SINK",
    "Parts",
    "ResponseMasses",
    "ResponseRun",
    "attention_to_parts",
    "response_masses",
    "sink_and_documents",
]

SINK = 2
"""Number of tokens in the attention sink. As in the paper's code, the sink is the first two tokens."""


def attention_to_parts(
    pattern: Float[Tensor, "batch head row key"], parts: Float[Tensor, "batch key part"]
) -> Float[Tensor, "batch head row part"]:
    """Attention summed over the keys of each part. ``parts`` is 1 where a key belongs to a part, and 0 elsewhere."""
    return einsum(pattern, parts, "batch head row key, batch key part -> batch head row part")


Parts: TypeAlias = Callable[[PromptBatch], Float[Tensor, "batch key part"]]
"""A function that maps a batch of prompts to masks of its keys: 1 where a key belongs to a part, and 0 elsewhere."""


def sink_and_documents(batch: PromptBatch) -> Float[Tensor, "batch key part"]:
    """Masks of the sink (column 0), the relevant document (column 1) and each irrelevant document (later columns)."""
    n_irrelevant = max(len(prompt.spans.get("irrelevant", ())) for prompt in batch.prompts)
    parts = torch.zeros(len(batch), batch.width, 2 + n_irrelevant)
    for row, prompt, padding in zip(parts, batch.prompts, batch.padding, strict=True):
        row[padding : padding + SINK, 0] = 1
        for start, end in prompt.spans.get("relevant", ()):
            row[padding + start : padding + end, 1] = 1
        for part, (start, end) in enumerate(prompt.spans.get("irrelevant", ()), start=2):
            row[padding + start : padding + end, part] = 1
    return parts


class ResponseMasses:
    """Collector of the attention from response rows to parts of the prompt, read by hooks on ``hook_pattern``.

    Args:
        shape: Numbers of layers and heads of the model.
        batch: The prompts.
        parts: Function that gives the parts of the prompts.
    """

    def __init__(self, shape: ModelShape, batch: PromptBatch, parts: Parts) -> None:
        self._parts = parts(batch)
        self._rows: list[list[Tensor]] = [[] for _ in range(shape.n_layers)]
        self._empty = torch.full((len(batch), shape.n_layers, shape.n_heads, self._parts.shape[2]), torch.nan)

    def hooks(self) -> list[Hook]:
        """Hooks that observe the passes over the response tokens. These passes must follow the prompt, in order."""
        return [(hook_name(layer, "hook_pattern"), self._observer(rows)) for layer, rows in enumerate(self._rows)]

    def _observer(self, rows: list[Tensor]) -> Any:
        def observe(pattern: Float[Tensor, "batch head row key"], hook: Any) -> None:
            n_rows, n_keys = pattern.shape[-2:]
            # This pass runs the last prompt token, which was held back. Its row is not part of the response.
            if n_keys - n_rows < self._parts.shape[1]:
                return
            self._parts = self._parts.to(pattern.device)
            on_prompt = pattern[..., : self._parts.shape[1]].float()
            rows.append(attention_to_parts(on_prompt, self._parts))

        return observe

    def means(self, lengths: Sequence[int]) -> Float[Tensor, "batch layer head part"]:
        """Mean attention from each response to each part.

        Response ``i`` has ``lengths[i]`` rows. An empty response gives NaN.
        """
        if not self._rows[0]:
            return self._empty.clone()
        device = self._rows[0][0].device  # layers may lie on several devices
        by_layer = torch.stack([torch.cat(rows, dim=2).to(device) for rows in self._rows], dim=1).cpu()
        n = torch.tensor(lengths)
        # The batch also computes rows after the end of a short response. Their weight is zero.
        weight = (torch.arange(by_layer.shape[3]) < n[:, None]) / n[:, None].clamp(min=1)
        by_part = einsum(by_layer, weight, "batch layer head row part, batch row -> batch layer head part")
        return torch.where((n > 0)[:, None, None, None], by_part, torch.nan)


def response_masses(
    model: FocusModel,
    prompts: Sequence[EncodedPrompt],
    parts: Parts,
    responses: Sequence[str] | None,
    interventions: Sequence[Intervention],
    max_new_tokens: int,
) -> tuple[Float[Tensor, "batch layer head part"], list[str]]:
    """Attention from the responses of a batch to the parts of their prompts, and the texts of the responses.

    If ``responses`` is ``None``, the model generates them, and the attention is read during generation. Given responses
    take one more forward pass.
    """
    prefix = model.prefill(prompts, interventions, hold_last=True)
    masses = ResponseMasses(model.shape, prefix.batch, parts)
    if responses is None:
        generated = model.decode(prefix, interventions, max_new_tokens=max_new_tokens, observers=masses.hooks())
        lengths = [len(response.tokens) for response in generated]
        return masses.means(lengths), [response.text for response in generated]
    no_tokens = torch.zeros(0, dtype=torch.long)
    tokens = [
        model.encoder.encode_response(prompt, response) if response.strip() else no_tokens
        for prompt, response in zip(prompts, responses, strict=True)
    ]
    lengths = [len(ids) for ids in tokens]
    if any(lengths):
        padded_tokens = torch.nn.utils.rnn.pad_sequence(tokens, batch_first=True)
        is_token = torch.arange(padded_tokens.shape[1]) < torch.tensor(lengths)[:, None]
        model.extend(prefix, padded_tokens, interventions, masses.hooks(), mask=is_token.long())
    return masses.means(lengths), list(responses)


@dataclass(frozen=True, eq=False)
class ResponseRun:
    """A run over samples that measures how much attention their responses pay to parts of their prompts.

    Attributes:
        executor: Executor that runs the batches.
        samples: The samples, in any order.
        case: Case of the prompt to run for each sample.
        options: Response length, batch size and progress bars.
        interventions: Interventions, applied in order.
        responses: One given response per sample. With ``None``, the model generates the responses.
    """

    executor: Executor
    samples: Sequence[MultiDocSample]
    case: Case
    options: RunOptions
    interventions: Sequence[Intervention] = ()
    responses: Sequence[str] | None = None

    def masses(
        self, parts: Parts, label: str
    ) -> Generator[tuple[list[int], Float[Tensor, "batch layer head part"], list[str]]]:
        """Measure the samples in batches of prompts of similar length, shortest first.

        Args:
            parts: Function that gives the parts of the prompts. An executor in another process needs to pickle it.
            label: Text of the progress bar.

        Yields:
            For each batch, the indices of its samples, their attention to each part, and their responses.
        """
        n, show = len(self.samples), self.options.progress
        prompts = [
            self.executor.encode(sample.prompt(self.case)) for sample in track(self.samples, "tokenising", show=show)
        ]
        items = list(zip(prompts, [None] * n if self.responses is None else self.responses, strict=True))
        names, lengths = [sample.id for sample in self.samples], [len(prompt.tokens) for prompt in prompts]
        run = partial(
            _run_batch,
            parts=parts,
            interventions=tuple(self.interventions),
            max_new_tokens=self.options.max_new_tokens,
        )
        with progress_bar(label, n, show=show) as bar:
            for indices, (masses, responses) in map_batches(
                self.executor, run, items, names, lengths, self.options.batch_tokens
            ):
                yield indices, masses, responses
                bar.update(len(indices))


@torch.no_grad()
def _run_batch(
    model: FocusModel,
    items: Sequence[tuple[EncodedPrompt, str | None]],
    budget: int,
    parts: Parts,
    interventions: Sequence[Intervention],
    max_new_tokens: int,
) -> tuple[Float[Tensor, "batch layer head part"], list[str]]:
    """Run :func:`response_masses` on a batch. Either all prompts have a given response, or none has one."""
    prompts, responses = [prompt for prompt, _ in items], [response for _, response in items if response is not None]
    return response_masses(model, prompts, parts, responses or None, interventions, max_new_tokens)
