"""Causal effect of each document on a response: the fall of the response's log-probability without the document."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any, Literal, TypeAlias, get_args

import torch
from einops import rearrange
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from focuslens.evaluation.document_choices import Choices
from focuslens.evaluation.faithfulness import Faithfulness, compare_effects
from focuslens.hooks import Intervention
from focuslens.interventions.ablation import HeadAblation
from focuslens.model.batching import BATCH_TOKENS, RunOptions, map_batches, require_fitting
from focuslens.model.execution import Executor, executor_for
from focuslens.model.generation import Prefix
from focuslens.prompts.answers import answered_right, require_samples
from focuslens.prompts.batch import EncodedPrompt, PromptBatch
from focuslens.prompts.gold import Gold, gold_documents
from focuslens.prompts.rewriting import removed_documents
from focuslens.prompts.sample import MultiDocSample
from focuslens.prompts.spans import require_spans
from focuslens.scores.document_scores import Attribution, DocumentScores, rank_documents
from focuslens.scores.given_responses import GivenResponses, Response, given_responses, response_text, response_tokens
from focuslens.scores.question_scores import QuestionScores
from focuslens.util.frames import rows_frame
from focuslens.util.progress import progress_bar, track

if TYPE_CHECKING:
    import pandas as pd

    from focuslens.model.focus_model import FocusModel

__all__ = ["DocumentEffects", "EffectKind", "document_effects"]

EffectKind: TypeAlias = Literal["knockout", "removal"]
"""Kind of ablation of a document: block the attention of all heads to the document, or remove it from the prompt."""

_ABLATED = "ablated document"
"""Name of the span whose attention is blocked. Each copy of a prompt has another document in it."""

_NUMBERS_PER_TOKEN = 2048
"""Maximum number of attention scores and logits of all copies, per layer and per token of the batch budget."""


@dataclass(frozen=True, eq=False)
class DocumentEffects:
    """Fall of each response's log-probability when one document is ablated, per document.

    An effect above zero means that the response is less probable without the document.

    Attributes:
        effects: Fall of the log-probability of the whole response, ``[document]`` in prompt order, in nats. All effects
            of a sample with an empty response are NaN.
        log_probabilities: Log-probability of each response without ablation, summed over its tokens.
        n_tokens: Number of tokens of each response, without the stop token.
        by: Kind of ablation.
        gold: Index of the gold document per sample, a tuple of several, or ``None`` for none.
        sample_ids: ``MultiDocSample.id`` of each sample.
        question_ids: ``MultiDocSample.question_id`` of each sample.
        responses: The response of each sample.
        correct: Whether each response contains an accepted answer.
    """

    effects: tuple[Float[Tensor, "_"], ...]
    log_probabilities: tuple[float, ...]
    n_tokens: tuple[int, ...]
    by: EffectKind
    gold: tuple[Gold, ...]
    sample_ids: tuple[str, ...]
    question_ids: tuple[str, ...]
    responses: tuple[str, ...]
    correct: tuple[bool, ...]

    def __len__(self) -> int:
        return len(self.effects)

    def __repr__(self) -> str:
        return f"DocumentEffects({self.by}: {len(self)} samples, {sum(self.correct)} answered right)"

    def per_token(self) -> list[Float[Tensor, "_"]]:
        """Mean effect per token of the response, one tensor ``[document]`` per sample."""
        return [effects / max(n, 1) for effects, n in zip(self.effects, self.n_tokens, strict=True)]

    def to_frame(self) -> pd.DataFrame:
        """Data frame with one row per sample and document. The response's log-probability is that without ablation."""
        names = ("sample_id", "question_id", "document", "is_gold", "effect", "log_probability", "n_tokens")
        columns = zip(
            self.sample_ids,
            self.question_ids,
            self.gold,
            self.effects,
            self.log_probabilities,
            self.n_tokens,
            strict=True,
        )
        rows: list[dict[str, Any]] = [
            dict(
                zip(
                    names,
                    (sample, question, document, document in gold_documents(gold), effect, log_probability, n),
                    strict=True,
                )
            )
            for sample, question, gold, effects, log_probability, n in columns
            for document, effect in enumerate(effects.tolist())
        ]
        return rows_frame(rows, {"effect": "nats", "log_probability": "nats"}, names)

    def attribution(self, *, correct: bool | None = None, seed: int = 0) -> Attribution:
        """Rank the documents of each sample by effect, and return the ranks of the gold documents.

        Samples without a gold document and samples with an empty response are left out.

        Args:
            correct: Samples to use: ``True`` for those with a correct response, ``False`` for those with a wrong
                response, ``None`` for all.
            seed: Random seed of the bootstrap.

        Raises:
            ValueError: If all samples are left out.
        """
        return rank_documents(self._used(self.effects, correct), self.gold, self.question_ids, seed=seed)

    def faithfulness(
        self,
        ranking: DocumentScores | QuestionScores | Choices | DocumentEffects,
        heads: Iterable[tuple[int, int]] | None = None,
        *,
        correct: bool | None = None,
        per_token: bool = False,
        seed: int = 0,
    ) -> Faithfulness:
        """Compare the effect of the document that a ranking attributes each response to with those of the others.

        Samples with an empty response and samples with a single document are left out.

        Args:
            ranking: Scores of the documents of the same samples: the attention of the response or of the question,
                shares of self-focus, or effects of another kind.
            heads: Heads whose scores are averaged (:class:`DocumentScores`) or summed (:class:`QuestionScores`).
            correct: Samples to use, as in :meth:`attribution`.
            per_token: Whether to compare mean effects per token of the response.
            seed: Random seed of the bootstrap.

        Raises:
            ValueError: If the ranking is of other samples or responses, if heads are missing, do not exist or have no
                use, or if all samples are left out.
        """
        scores = self._scores(ranking, heads)
        effects = self._used(self.per_token() if per_token else self.effects, correct)
        return compare_effects(scores, effects, self.sample_ids, self.question_ids, seed=seed)

    def _used(self, effects: Sequence[Float[Tensor, "_"]], correct: bool | None) -> list[Float[Tensor, "_"]]:
        """Effects of the samples to use. Those of all other samples are NaN."""
        return [
            values if correct in (None, is_right) else torch.full_like(values, torch.nan)
            for values, is_right in zip(effects, self.correct, strict=True)
        ]

    def _scores(
        self,
        ranking: DocumentScores | QuestionScores | Choices | DocumentEffects,
        heads: Iterable[tuple[int, int]] | None,
    ) -> Sequence[Float[Tensor, "_"]]:
        if ranking.sample_ids != self.sample_ids:
            raise ValueError(
                "the ranking is of other samples than the effects, or of the same samples in another order; compute "
                "both from the same list of samples"
            )
        if isinstance(ranking, DocumentScores | DocumentEffects) and ranking.responses != self.responses:
            raise ValueError(
                "the ranking is of other responses than the effects; pass responses=scores.responses to "
                "fl.document_effects"
            )
        if isinstance(ranking, QuestionScores):
            return ranking.of(heads)
        if isinstance(ranking, DocumentScores):
            if heads is None:
                raise ValueError(
                    "heads is None; DocumentScores are per head, so give heads, such as scores.top_heads(4)"
                )
            return ranking.of(heads)
        if heads is not None:
            raise ValueError(f"heads has no use with {type(ranking).__name__}, whose ranking is not per head")
        if isinstance(ranking, DocumentEffects):
            return ranking.effects
        return [torch.tensor(choice.shares, dtype=torch.float64) for choice in ranking.choices]


def document_effects(
    model: FocusModel | Executor,
    samples: Iterable[MultiDocSample],
    *,
    responses: GivenResponses | None = None,
    by: EffectKind = "knockout",
    max_new_tokens: int = 100,
    batch_tokens: int = BATCH_TOKENS,
    progress: bool | None = None,
) -> DocumentEffects:
    """Fall of the log-probability of each response to a long prompt, when one document after the other is ablated.

    With ``by="knockout"``, the attention of all heads to the document is blocked in the rows that produce the response
    (:class:`HeadAblation`). All documents share one run of the prompt. Tokens after the document still hold information
    from it. With ``by="removal"``, the prompt is written and run anew without the document. The other documents keep
    their numbers.

    Args:
        model: The model, or an executor that runs the model in other processes, such as :class:`RayPool`.
        samples: The samples.
        responses: Response to each sample, as in :func:`document_scores`. By default, the tokens are those of the
            model's greedy response.
        by: Kind of ablation: ``knockout`` or ``removal``.
        max_new_tokens: Maximum length of a generated response, in tokens.
        batch_tokens: Maximum number of prompt tokens per batch; halved when memory runs out.
        progress: Whether to show a progress bar; :mod:`focuslens.util.progress` describes the default.

    Raises:
        ValueError: If there are no samples, if the number of responses differs, if ``by`` is unknown, or if a prompt
            does not fit the context.
    """
    if by not in get_args(EffectKind):
        raise ValueError(f"by is {by!r}; it must be one of {', '.join(get_args(EffectKind))}")
    executor, sample_list = executor_for(model), require_samples(samples)
    options = RunOptions(max_new_tokens, batch_tokens, progress)
    given = None if responses is None else given_responses(responses, sample_list, executor)
    prompts = [executor.encode(sample.prompt()) for sample in track(sample_list, "tokenising", show=options.progress)]
    require_spans(sample_list, prompts, ("document",))
    names, lengths = [sample.id for sample in sample_list], [len(prompt.tokens) for prompt in prompts]
    require_fitting(names, lengths, executor.shape.n_ctx)
    items = list(zip(prompts, given or [None] * len(prompts), strict=True))
    run = partial(_measure, by=by, max_new_tokens=options.max_new_tokens)
    measured: dict[int, _Measured] = {}
    with progress_bar(f"effects ({by})", len(items), show=options.progress) as bar:
        for batch, results in map_batches(executor, run, items, names, lengths, options.batch_tokens, divisible=True):
            measured.update(zip(batch, results, strict=True))
            bar.update(len(batch))
    return _collected(sample_list, [measured[i] for i in range(len(items))], by)


_Measured: TypeAlias = tuple[str, int, list[float]]
"""Text of a response, its number of tokens, and its log-probability without ablation and without each document."""


def _collected(samples: Sequence[MultiDocSample], measured: Sequence[_Measured], by: EffectKind) -> DocumentEffects:
    responses, n_tokens, log_probabilities = zip(*measured, strict=True)
    values = [torch.tensor(row, dtype=torch.float64) for row in log_probabilities]
    return DocumentEffects(
        tuple(row[0] - row[1:] for row in values),
        tuple(float(row[0]) for row in values),
        n_tokens,
        by,
        tuple(sample.gold for sample in samples),
        tuple(sample.id for sample in samples),
        tuple(sample.question_id for sample in samples),
        responses,
        answered_right(responses, samples),
    )


@torch.no_grad()
def _measure(
    model: FocusModel,
    items: Sequence[tuple[EncodedPrompt, Response | None]],
    budget: int,
    *,
    by: EffectKind,
    max_new_tokens: int,
) -> list[_Measured]:
    """Log-probabilities of the responses to a batch of prompts. Without given responses, the model generates them."""
    prefix = model.prefill([prompt for prompt, _ in items], hold_last=True)
    given = [(prompt, response) for prompt, response in items if response is not None]
    if given:
        texts = [response_text(model, response) for _, response in given]
        tokens = [response_tokens(model, prompt, response) for prompt, response in given]
    else:
        generations = model.decode(prefix, max_new_tokens=max_new_tokens)
        texts, tokens = [item.text for item in generations], [item.tokens for item in generations]
    values = _knocked_out(model, prefix, tokens, budget) if by == "knockout" else _removed(model, prefix, tokens)
    counts = [len(prompt.resolve("document")) for prompt, _ in items]
    rows = [row[: 1 + n].tolist() for row, n in zip(values, counts, strict=True)]
    return list(zip(texts, map(len, tokens), rows, strict=True))


def _knocked_out(
    model: FocusModel, prefix: Prefix, tokens: Sequence[Int[Tensor, "_"]], budget: int
) -> Float[Tensor, "batch lane"]:
    """Log-probability of each response with no blocked document (lane 0), and with one blocked document per lane."""
    heads = [(layer, head) for layer in range(model.shape.n_layers) for head in range(model.shape.n_heads)]
    knockout = HeadAblation(heads, "knockout", span=_ABLATED)
    n_lanes = 1 + max(len(prompt.resolve("document")) for prompt in prefix.batch.prompts)
    size = _lanes_per_pass(model, prefix, max(map(len, tokens)), budget)
    values: list[Tensor] = []
    for start in range(0, n_lanes, size):
        lanes = range(start, min(start + size, n_lanes))
        marked = tuple(_marked(prompt, lane) for prompt in prefix.batch.prompts for lane in lanes)
        copies = replace(model.copies(prefix, len(lanes)), batch=PromptBatch(marked))
        copied = _log_probabilities(model, copies, [ids for ids in tokens for _ in lanes], [knockout])
        values.append(rearrange(copied, "(prompt lane) -> prompt lane", lane=len(lanes)))
    return torch.cat(values, dim=1)


def _lanes_per_pass(model: FocusModel, prefix: Prefix, n_rows: int, budget: int) -> int:
    """Number of copies of the prompts per pass. Copies without shared keys and values count with all their tokens."""
    batch, shape = prefix.batch, model.shape
    numbers = len(batch) * max(1, n_rows) * (shape.n_heads * (batch.width + n_rows) + shape.d_vocab)
    size = budget * _NUMBERS_PER_TOKEN // numbers
    if not prefix.is_shared:
        size = min(size, budget // (len(batch) * batch.width))
    return max(1, size)


def _marked(prompt: EncodedPrompt, lane: int) -> EncodedPrompt:
    """The prompt with document ``lane - 1`` as the ablated span. The span is empty if there is no such document."""
    return replace(
        prompt, spans={**prompt.spans, _ABLATED: prompt.resolve("document")[lane - 1 : lane] if lane else ()}
    )


def _removed(model: FocusModel, prefix: Prefix, tokens: Sequence[Int[Tensor, "_"]]) -> Float[Tensor, "batch lane"]:
    """Log-probability of each response to its whole prompt (lane 0), and to the prompt without a document per lane."""
    prompts = prefix.batch.prompts
    counts = [len(prompt.resolve("document")) for prompt in prompts]
    values = torch.full((len(prompts), 1 + max(counts)), torch.nan, dtype=torch.float64)
    values[:, 0] = _log_probabilities(model, prefix, tokens)
    for document in range(max(counts)):
        rows = [i for i, n in enumerate(counts) if document < n]
        rewritten = [_without(model, prompts[i], document) for i in rows]
        shorter = model.prefill(rewritten, hold_last=True)
        values[rows, 1 + document] = _log_probabilities(model, shorter, [tokens[i] for i in rows])
    return values


def _without(model: FocusModel, prompt: EncodedPrompt, document: int) -> EncodedPrompt:
    """The prompt without a document, its heading and the white space before the next one."""
    others = [i for i in range(len(prompt.characters["document"])) if i != document]
    return model.encoder.rewritten(prompt, removed_documents(prompt, others))


def _log_probabilities(
    model: FocusModel,
    prefix: Prefix,
    tokens: Sequence[Int[Tensor, "_"]],
    interventions: Sequence[Intervention] = (),
) -> Float[Tensor, "batch"]:
    """Log-probability of each row's response, teacher-forced and summed over its tokens; NaN for an empty response.

    Args:
        model: The model.
        prefix: Prefix whose last prompt tokens were held back.
        tokens: Tokens of each response.
        interventions: Interventions on the rows that produce the response.
    """
    lengths, targets = torch.tensor([len(ids) for ids in tokens]), pad_sequence(list(tokens), batch_first=True)
    is_token = torch.arange(targets.shape[1]) < lengths[:, None]
    if not targets.shape[1]:
        return torch.full((len(tokens),), torch.nan, dtype=torch.float64)
    started = model.completed(prefix, interventions)
    assert started.logits is not None
    values = [_of_targets(started.logits[:, None], targets[:, :1])]
    if targets.shape[1] > 1:
        mask = is_token[:, :-1].long()
        logits, _ = model.extend(started, targets[:, :-1], interventions, mask=mask)
        values.append(_of_targets(logits, targets[:, 1:]))
    sums = torch.where(is_token, torch.cat(values, dim=1), 0.0).sum(dim=1)
    return torch.where(lengths > 0, sums, torch.nan)


def _of_targets(
    logits: Float[Tensor, "batch row d_vocab"], targets: Int[Tensor, "batch row"]
) -> Float[Tensor, "batch row"]:
    """Log-probability of one token per row, in float64 on the CPU."""
    logits = logits.float()
    chosen = logits.gather(-1, targets.to(logits.device)[..., None])[..., 0]
    return chosen.cpu().double() - logits.logsumexp(dim=-1).cpu().double()
