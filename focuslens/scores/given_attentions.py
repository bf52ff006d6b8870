"""Contextual scores from attention patterns that a plain Hugging Face model returned (``output_attentions=True``)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from einops import einsum, reduce
from jaxtyping import Bool, Float
from torch import Tensor

from focuslens.prompts.answers import answered_right
from focuslens.prompts.batch import EncodedPrompt, PromptBatch, PromptInput, is_one_prompt
from focuslens.prompts.encoder import PromptEncoder
from focuslens.prompts.gold import Gold
from focuslens.prompts.sample import MultiDocSample
from focuslens.prompts.spans import require_spans
from focuslens.scores.base import SCORED_SPANS, Parts, each_document, scores_of_parts, sink_and_documents, sink_parts
from focuslens.scores.contextual_scores import ContextualScores
from focuslens.scores.document_scores import DocumentScores

__all__ = ["document_scores_from_attentions", "scores_from_attentions"]


def scores_from_attentions(
    attentions: Sequence[Any],
    prompts: PromptInput | Sequence[PromptInput],
    *,
    tokenizer: Any | None = None,
    chat: bool = False,
    attention_mask: Tensor | None = None,
    input_ids: Tensor | None = None,
    response_lengths: Sequence[int] | None = None,
    samples: Sequence[MultiDocSample] | None = None,
    responses: Sequence[str] | None = None,
) -> ContextualScores:
    """Compute contextual scores (equation 1) from attention patterns of a plain Hugging Face model.

    The scores are those of :func:`contextual_scores`: ``S_C = mean_i sum_{j in C} W[i, j]``, where ``i`` runs over the
    rows of the response tokens and ``j`` over the tokens of a part of the prompt. The patterns have one of two forms:

    * **One pass** over prompt and response: ``model(ids, output_attentions=True).attentions``, one tensor
      ``[batch head row key]`` per layer.
    * **Generation**: ``model.generate(ids, output_attentions=True, return_dict_in_generate=True).attentions``, one such
      tuple per step. The first step has the rows of the prompt, and step ``t`` has the row of response token ``t - 1``.
      There is no row of the last token, so ``n`` new tokens have ``n - 1`` rows. The last token often is the EOS token,
      which is not scored. Otherwise generate one token more.

    In gpt-oss, each head has a sink that is not a key. If the rows of any head lack more than a hundredth to one, what
    rows lack counts as sink, as in :func:`contextual_scores`.

    Args:
        attentions: The patterns. Eager attention returns them (``attn_implementation="eager"``).
        prompts: The prompts, with the spans ``relevant`` and ``irrelevant``: an :class:`EncodedPrompt`, whose spans are
            ranges of tokens, or a text with spans, such as ``sample.prompt()``, with its tokenizer. One prompt, or one
            per row of the batch.
        tokenizer: Fast tokenizer of the prompts that are texts.
        chat: Whether the tokenizer's chat template was applied to prompts that are texts.
        attention_mask: Mask ``[batch key]`` that the model was given: 1 for tokens, 0 for padding. It is needed for a
            batch of one pass. By default, the prompts of a generation are padded on the left.
        input_ids: Tokens ``[batch key]`` that the model was given. If they are given, they are compared with the
            prompts, so that spans are those of the very tokens.
        response_lengths: Number of tokens of each response, without an EOS token and padding; by default all tokens
            after the prompt that have rows.
        samples: The sample of each prompt, for ids and answers; by default, prompts are numbered.
        responses: Text of each response. With ``samples``, they tell which responses are correct; without them, no
            response counts as correct.

    Raises:
        ValueError: If patterns are missing, as with fused attention, or have other shapes, if the mask or the lengths
            do not fit them, or if the tokens are not those of the prompts.
        TypeError: If a prompt is a text without a tokenizer.
    """
    encoded = _encoded(prompts, tokenizer, chat)
    for i, prompt in enumerate(encoded):
        if not any(prompt.spans.get(name) for name in SCORED_SPANS):
            raise ValueError(
                f"prompt {i} has neither a span 'relevant' nor a span 'irrelevant', whose attention is scored; its "
                f"spans are {', '.join(map(repr, prompt.spans)) or 'none'}"
            )
    if samples is not None and len(samples) == len(encoded):
        # The prompts may be those of the gold documents alone.
        require_spans(samples, encoded, ("relevant",))
    by_part = _masses(attentions, encoded, sink_and_documents, attention_mask, input_ids, response_lengths)
    scores = scores_of_parts(by_part)
    scores["relevant"][[i for i, prompt in enumerate(encoded) if not prompt.spans.get("relevant")]] = torch.nan
    labels = _Labels.of(len(encoded), samples, responses)
    return ContextualScores(
        **scores, case="long", sample_ids=labels.ids, responses=labels.responses, correct=labels.correct
    )


def document_scores_from_attentions(
    attentions: Sequence[Any],
    prompts: PromptInput | Sequence[PromptInput],
    *,
    tokenizer: Any | None = None,
    chat: bool = False,
    attention_mask: Tensor | None = None,
    input_ids: Tensor | None = None,
    response_lengths: Sequence[int] | None = None,
    samples: Sequence[MultiDocSample] | None = None,
    responses: Sequence[str] | None = None,
) -> DocumentScores:
    """Compute the scores of each document from attention patterns of a plain Hugging Face model.

    The scores are those of :func:`document_scores`. The prompts have the span ``document``, with one range per
    document. The gold documents are the ranges of the span ``relevant``, if there are any. All arguments are those of
    :func:`scores_from_attentions`.
    """
    encoded = _encoded(prompts, tokenizer, chat)
    for i, prompt in enumerate(encoded):
        if not prompt.spans.get("document"):
            raise ValueError(f"prompt {i} has no span 'document', whose ranges are the documents to score")
    by_part = _masses(attentions, encoded, each_document, attention_mask, input_ids, response_lengths)
    labels = _Labels.of(len(encoded), samples, responses)
    return DocumentScores(
        tuple(masses[..., : len(prompt.spans["document"])] for masses, prompt in zip(by_part, encoded, strict=True)),
        tuple(_gold(prompt) for prompt in encoded),
        labels.ids,
        labels.questions,
        labels.responses,
        labels.correct,
    )


def _encoded(prompts: Any, tokenizer: Any, chat: bool) -> list[EncodedPrompt]:
    listed = [prompts] if is_one_prompt(prompts) else list(prompts)
    if not all(isinstance(prompt, EncodedPrompt) for prompt in listed) and tokenizer is None:
        raise TypeError(
            "a prompt is no EncodedPrompt, so its tokens are unknown; pass tokenizer=..., or "
            "fl.EncodedPrompt(tokens, {'relevant': ((start, end),), 'irrelevant': (...)})"
        )
    encoder = None if tokenizer is None else PromptEncoder(tokenizer, chat)
    return [prompt if encoder is None else encoder.encode(prompt) for prompt in listed]


def _gold(prompt: EncodedPrompt) -> Gold:
    """Indices of the documents that are ranges of the span ``relevant``."""
    documents = prompt.spans["document"]
    places = tuple(documents.index(span) for span in prompt.spans.get("relevant", ()) if span in documents)
    return places if len(places) > 1 else next(iter(places), None)


@dataclass(frozen=True)
class _Labels:
    """Ids, texts and outcomes of the scored responses."""

    ids: tuple[str, ...]
    questions: tuple[str, ...]
    responses: tuple[str, ...]
    correct: tuple[bool, ...]

    @classmethod
    def of(cls, n: int, samples: Sequence[MultiDocSample] | None, responses: Sequence[str] | None) -> _Labels:
        for name, given in (("samples", samples), ("responses", responses)):
            if given is not None and len(given) != n:
                raise ValueError(f"there are {len(given)} {name} for {n} prompts; give one per prompt")
        texts = ("",) * n if responses is None else tuple(responses)
        if samples is None:
            ids = tuple(f"prompt {i}" for i in range(n))
            return cls(ids, ids, texts, (False,) * n)
        correct = (False,) * n if responses is None else tuple(answered_right(list(texts), list(samples)))
        return cls(tuple(s.id for s in samples), tuple(s.question_id for s in samples), texts, correct)


@dataclass(frozen=True, eq=False)
class _Pass:
    """Patterns of one forward pass by layer. ``first`` is the column of its first row in the padded batch."""

    first: int
    layers: tuple[Float[Tensor, "batch head row _"], ...]

    @property
    def n_rows(self) -> int:
        return self.layers[0].shape[2]


def _masses(
    attentions: Sequence[Any],
    prompts: Sequence[EncodedPrompt],
    parts: Parts,
    attention_mask: Tensor | None,
    input_ids: Tensor | None,
    response_lengths: Sequence[int] | None,
) -> Float[Tensor, "batch layer head part"]:
    """Mean attention from the rows of each response to each part of its prompt; NaN without a row."""
    passes = _passes(attentions, len(prompts))
    generated = isinstance(attentions[0], list | tuple)
    columns = _Columns.of(passes, prompts, attention_mask, input_ids, is_generation=generated)
    rows, lengths = columns.response_rows(response_lengths)
    weights = rows / lengths.clamp(min=1)[:, None]
    batch = PromptBatch.of(prompts)
    masks = parts(batch)
    # The last part is the whole row.
    by_key = torch.nn.functional.pad(columns.placed(batch, masks), (0, 1), value=1.0)
    sums = [torch.zeros(()) for _ in passes[0].layers]
    for one in passes:
        weight = weights[:, one.first : one.first + one.n_rows]
        if not bool(weight.any()):
            continue
        for layer, pattern in enumerate(one.layers):
            start = one.first + one.n_rows - pattern.shape[3]
            keys = by_key[:, start : start + pattern.shape[3]].to(pattern.device)
            read = einsum(
                pattern.float(), keys, weight.to(pattern.device), "b head row key, b key part, b row -> b head part"
            )
            sums[layer] = sums[layer] + read.cpu()
    shape = (len(prompts), passes[0].layers[0].shape[1], by_key.shape[2])
    by_part = torch.stack([total.expand(shape) for total in sums], dim=1)
    by_part = torch.where((lengths > 0)[:, None, None, None], by_part, torch.nan)
    lacking = 1 - by_part[..., -1:]
    if bool((lacking > _SINK_MASS).any()):
        return by_part[..., :-1] + lacking * sink_parts(masks, batch)[:, None, None]
    return by_part[..., :-1]


_SINK_MASS = 0.01
"""A head whose rows lack more than this to one has a sink. Rounding to bfloat16 takes less than half of it."""


@dataclass(frozen=True, eq=False)
class _Columns:
    """Columns in the padded batch of each prompt's tokens and of the tokens after it, and the number of columns."""

    prompt: tuple[Tensor, ...]
    after: tuple[Tensor, ...]
    width: int

    @classmethod
    def of(
        cls,
        passes: Sequence[_Pass],
        prompts: Sequence[EncodedPrompt],
        attention_mask: Tensor | None,
        input_ids: Tensor | None,
        *,
        is_generation: bool,
    ) -> _Columns:
        width = passes[-1].first + passes[-1].n_rows
        mask = _mask(passes[0].n_rows, width, prompts, attention_mask, is_generation=is_generation)
        prompt_columns, after = list[Tensor](), list[Tensor]()
        for i, prompt in enumerate(prompts):
            columns, n = mask[i].nonzero()[:, 0], len(prompt.tokens)
            n_given = int(mask[i, : passes[0].n_rows].sum())
            if n_given < n or (is_generation and n_given != n):
                wanted = "as many" if is_generation else "at least as many"
                raise ValueError(
                    f"prompt {i} has {n} tokens, and the model was given {n_given} in its row; it must be {wanted}. "
                    "Check the BOS token and the chat template"
                )
            prompt_columns.append(columns[:n])
            after.append(columns[n:])
            _require_tokens(i, prompt, columns[:n], input_ids)
        return cls(tuple(prompt_columns), tuple(after), width)

    def response_rows(self, lengths: Sequence[int] | None) -> tuple[Bool[Tensor, "batch key"], Tensor]:
        """Whether each column is a row of the response, and the number of these rows."""
        given = [len(columns) for columns in self.after] if lengths is None else list(lengths)
        if len(given) != len(self.after):
            raise ValueError(f"there are {len(given)} response_lengths for {len(self.after)} prompts; give one each")
        rows = torch.zeros(len(self.after), self.width, dtype=torch.bool)
        for i, (columns, n) in enumerate(zip(self.after, given, strict=True)):
            if not 0 <= n <= len(columns):
                raise ValueError(
                    f"response_lengths[{i}] is {n}, and there are rows of {len(columns)} tokens after the prompt. "
                    "generate computes no row of its last token; generate one token more"
                )
            rows[i, columns[:n]] = True
        return rows, torch.tensor(given)

    def placed(self, batch: PromptBatch, parts: Float[Tensor, "batch key part"]) -> Float[Tensor, "batch column part"]:
        """Key masks of the parts, moved from the columns of ``batch`` to those of the patterns."""
        moved = torch.zeros(len(batch), self.width, parts.shape[2])
        for row, columns, values, padding in zip(moved, self.prompt, parts, batch.padding, strict=True):
            row[columns] = values[padding:]
        return moved


def _require_tokens(i: int, prompt: EncodedPrompt, columns: Tensor, input_ids: Tensor | None) -> None:
    if input_ids is not None and not torch.equal(input_ids.cpu()[i, columns], prompt.tokens):
        raise ValueError(
            f"the tokens of prompt {i} are not those in input_ids, so its spans would be those of other tokens; check "
            "the BOS token and the chat template"
        )


def _mask(
    n_rows: int, width: int, prompts: Sequence[EncodedPrompt], given: Tensor | None, *, is_generation: bool
) -> Bool[Tensor, "batch column"]:
    """Whether each column is a token. Tokens that were generated always are."""
    mask = torch.ones(len(prompts), width, dtype=torch.bool)
    if given is None:
        if len(prompts) > 1 and not is_generation:
            raise ValueError(
                "there are several prompts in one pass; give the attention_mask that the model was given, which tells "
                "tokens from padding"
            )
        # Prompts of a generation are padded on the left, to the length of the longest.
        longest = max(len(prompt.tokens) for prompt in prompts)
        if is_generation and longest == n_rows:
            for row, prompt in zip(mask, prompts, strict=True):
                row[: n_rows - len(prompt.tokens)] = False
        return mask
    if given.ndim != 2 or len(given) != len(prompts) or given.shape[1] not in (n_rows, width):
        raise ValueError(
            f"attention_mask has the shape {tuple(given.shape)}; it must be [{len(prompts)}, {n_rows}], one column per "
            "token that the model was given"
        )
    mask[:, : given.shape[1]] = given.cpu().bool()
    padded = (~mask[:, n_rows - 1]).nonzero()[:, 0].tolist() if is_generation else []
    if padded:
        raise ValueError(
            f"prompt {padded[0]} is padded on the right, and generate continues after the padding; pad on the left: "
            "tokenizer.padding_side = 'left'"
        )
    return mask


def _passes(attentions: Any, n_prompts: int) -> list[_Pass]:
    """The patterns of each forward pass, checked.

    Raises:
        ValueError: If patterns are missing or have other shapes.
    """
    steps: list[Any] = list(cast("Sequence[Any]", attentions)) if isinstance(attentions, list | tuple) else []
    if not steps:
        raise ValueError(f"attentions is {attentions!r:.60}; {_EAGER}")
    is_generation = isinstance(steps[0], list | tuple)
    passes: list[_Pass] = []
    for step, layers in enumerate(steps if is_generation else [steps]):
        patterns = _checked(layers, f"step {step}, " if is_generation else "", n_prompts)
        first = passes[-1].first + passes[-1].n_rows if passes else 0
        passes.append(_Pass(first, patterns))
        _require_rows(passes, is_generation=is_generation)
    return passes


_EAGER = (
    "it must be a tuple of patterns [batch, head, row, key], one per layer. Fused attention (sdpa, flash) returns "
    "none: load the model with attn_implementation='eager', and pass output_attentions=True"
)


def _checked(layers: Any, place: str, n_prompts: int) -> tuple[Tensor, ...]:
    if not isinstance(layers, list | tuple) or not layers:
        raise ValueError(f"{place}attentions is {layers!r:.60}; {_EAGER}")
    shape: tuple[int, ...] = ()
    for layer, pattern in enumerate(cast("Sequence[Any]", layers)):
        where = f"{place}layer {layer}"
        if not isinstance(pattern, Tensor):
            raise ValueError(f"{where} of attentions is {pattern!r:.60}; {_EAGER}")
        if pattern.ndim != 4:
            raise ValueError(f"{where} of attentions has the shape {tuple(pattern.shape)}; {_EAGER}")
        shape = shape or tuple(pattern.shape[:3])
        if pattern.shape[0] != n_prompts:
            raise ValueError(
                f"{where} of attentions has {pattern.shape[0]} rows in its batch, and there are {n_prompts} prompts; "
                "give one prompt per row. Beams and several returned sequences cannot be scored"
            )
        if tuple(pattern.shape[:3]) != shape:
            raise ValueError(
                f"{where} of attentions has the shape {tuple(pattern.shape)}, and the first layer has {shape} and its "
                "keys; all layers need the same number of heads and rows"
            )
        total = reduce(pattern[:, :, -1].float(), "batch head key -> batch head", "sum")
        if float(pattern[:, :, -1].min()) < -1e-3 or float(total.max()) > 1.02:
            raise ValueError(
                f"the last row of {where} of attentions sums to {float(total.max()):.3g}; it must be probabilities "
                "after the softmax, whose sum is 1 at most"
            )
    return tuple(cast("Sequence[Tensor]", layers))


def _require_rows(passes: Sequence[_Pass], *, is_generation: bool) -> None:
    """Check the rows and keys of the last pass. Layers with a window may keep fewer keys than there are columns."""
    one, step = passes[-1], len(passes) - 1
    columns = one.first + one.n_rows
    if step and one.n_rows != 1:
        raise ValueError(
            f"step {step} of attentions has {one.n_rows} rows; generate has one row per step after the first (without "
            "assisted decoding)"
        )
    for layer, pattern in enumerate(one.layers):
        n_keys = pattern.shape[3]
        if n_keys == columns or (step and n_keys < columns):
            continue
        where = f"step {step}, layer {layer}" if is_generation else f"layer {layer}"
        reason = (
            "the pass ran over a cache; run prompt and response in one pass, or give all steps of generate"
            if n_keys > columns and not step
            else "a static cache has keys that are no tokens; use the default cache"
        )
        raise ValueError(
            f"{where} of attentions has {one.n_rows} rows and {n_keys} keys for {columns} tokens; {reason}"
        )
