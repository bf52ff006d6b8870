"""Tokens of HELMET's samples, prepared by HELMET's model class for Hugging Face checkpoints."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from jaxtyping import Int
from torch import Tensor

from focuslens.prompts.prompt import Span
from focuslens.studies.helmet.checkout import Checkout
from focuslens.studies.helmet.plan import Entry
from focuslens.studies.helmet.spans import RecordingTokenizer
from focuslens.util.progress import track

__all__ = ["HelmetSample", "read_samples", "require_room", "require_template", "samples_digest", "stop_tokens"]

_QUESTION = ("qid", "id", "question")
"""Fields that identify a sample's question. Several samples can have the same question at different depths."""

_NEWLINES = ("\n", "Ċ", "ĊĊ", "<0x0A>")
"""Newline tokens of different tokenizers. With HELMET's option ``stop_newline``, these tokens end a response."""


@dataclass(frozen=True, eq=False)
class HelmetSample:
    """One sample of HELMET's data, with its prompt as tokens.

    Attributes:
        id: Index of the sample in HELMET's data, as text.
        question: Identifier of the question, equal for all samples with the same question.
        tokens: Tokens of the prompt, as in HELMET's ``HFModel``.
        truncated: Whether HELMET truncated the sample's context to fit the input length.
        spans: Token ranges of the context, of its documents and of the question; see
            :func:`~focuslens.studies.helmet.spans.character_spans`.
    """

    id: str
    question: str
    tokens: Int[Tensor, "pos"]
    truncated: bool
    spans: Mapping[str, tuple[Span, ...]] = field(default_factory=dict[str, tuple[Span, ...]])


@dataclass(frozen=True)
class _Reader:
    """Stand-in for HELMET's ``HFModel``, with the attributes that HELMET's code reads when it prepares a sample."""

    tokenizer: Any
    max_length: int
    generation_max_length: int
    use_chat_template: bool
    system_message: str | None


def read_samples(
    checkout: Checkout,
    entry: Entry,
    data: Mapping[str, Any],
    tokenizer: Any,
    template_kwargs: Mapping[str, Any] | None = None,
) -> list[HelmetSample]:
    """All samples of one task, prepared by HELMET's code.

    Args:
        checkout: Checkout of HELMET.
        entry: The task.
        data: HELMET's data for the task.
        tokenizer: The model's tokenizer.
        template_kwargs: Keyword arguments of the chat template beyond those that HELMET sets. For example, Llama
            3's template puts today's date into the prompt unless ``date_string`` is given.

    Raises:
        ValueError: If HELMET has no samples for the task, or the length leaves no room for a sample's context.
    """
    if template_kwargs:
        tokenizer = copy.copy(tokenizer)
        tokenizer.apply_chat_template = partial(tokenizer.apply_chat_template, **template_kwargs)
    args, recording = entry.args, RecordingTokenizer(tokenizer)
    reader = _Reader(recording, entry.length, entry.max_new_tokens, args.use_chat_template, args.system_message)
    samples: list[HelmetSample] = []
    for place in track(range(len(data["data"])), f"prompts of {entry.label}"):
        item = dict(data["data"][place])
        question = next((str(item[name]) for name in _QUESTION if item.get(name) not in (None, "")), str(place))
        full_context = item.get("context")
        try:
            tokens = checkout.prepare(reader, item, data).input_ids[0]
        except IndexError as error:  # raised if HELMET has to cut more tokens than the context has
            raise ValueError(
                f"sample {place} of {entry.dataset} has no room for any context under {entry.length} tokens, of which "
                f"{entry.max_new_tokens} are for the response: HELMET's wording around the context takes the rest; "
                "leave the length out (--lengths), or have fewer examples (--helmet-arg shots=0)"
            ) from error
        is_cut = item.get("context") != full_context
        samples.append(HelmetSample(str(place), question, tokens, is_cut, recording.spans(tokens, item)))
    if not samples:
        raise ValueError(f"HELMET found no samples for {entry.dataset} in {entry.args.test_files or 'the hub'}")
    return samples


def samples_digest(samples: Sequence[HelmetSample]) -> str:
    """SHA-256 of the ids, questions and tokens of samples, which identifies a set of samples in result files."""
    digest = hashlib.sha256()
    for sample in samples:
        digest.update(f"{sample.id} {sample.question} {len(sample.tokens)}".encode())
        digest.update(sample.tokens.numpy().tobytes())
    return digest.hexdigest()


def require_template(entry: Entry, tokenizer: Any) -> None:
    """Refuse HELMET's option ``use_chat_template`` if the tokenizer has no chat template.

    Raises:
        ValueError: If the option is set and the tokenizer has no chat template.
    """
    if entry.args.use_chat_template and not getattr(tokenizer, "chat_template", None):
        raise ValueError(
            f"{entry.dataset} is configured with the chat template, and the model's tokenizer has none, like those of "
            "base models; give --use-chat-template False to run it without one"
        )


def require_room(entry: Entry, samples: Sequence[HelmetSample], n_ctx: int) -> None:
    """Refuse prompts that leave no room in the model's context for a response of maximum length.

    Raises:
        ValueError: If the longest prompt and a response of maximum length exceed the context.
    """
    longest = max(samples, key=lambda sample: len(sample.tokens))
    needed = len(longest.tokens) + entry.max_new_tokens
    if needed > n_ctx:
        raise ValueError(
            f"sample {longest.id} of {entry.dataset} has {len(longest.tokens)} tokens and may generate "
            f"{entry.max_new_tokens} more, and the model's context has {n_ctx}: leave out the length {entry.length} "
            f"(--lengths), or open the model with --n-ctx {needed} or more, if its positions allow it"
        )


def stop_tokens(tokenizer: Any, own: Sequence[int], entry: Entry) -> tuple[int, ...]:
    """Tokens that end a response: the stop tokens in ``own`` and, with HELMET's option ``stop_newline``, newlines."""
    if not entry.args.stop_newline:
        return tuple(own)
    ids = {tokenizer.convert_tokens_to_ids(token) for token in _NEWLINES} | set(own)
    if "llama" in str(entry.args.model_name_or_path).lower():  # for Llama, HELMET excludes the unknown token
        ids.discard(tokenizer.unk_token_id)
    return tuple(sorted(token for token in ids if token is not None))
