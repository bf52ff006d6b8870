"""Responses that one already has: texts, token ids or generations, as the tokens that a generation would have had."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeAlias

import torch
from jaxtyping import Int
from torch import Tensor

from focuslens.model.generation import Generation
from focuslens.util.checks import integers

if TYPE_CHECKING:
    from focuslens.model.execution import Executor
    from focuslens.model.focus_model import FocusModel
    from focuslens.prompts.batch import EncodedPrompt
    from focuslens.prompts.sample import MultiDocSample

__all__ = [
    "GivenResponse",
    "GivenResponses",
    "Response",
    "checked_response",
    "given_responses",
    "response_text",
    "response_tokens",
]

GivenResponse: TypeAlias = str | Generation | Tensor | Sequence[int]
"""A response: its text, its token ids, or the model's :class:`Generation`."""

GivenResponses: TypeAlias = Sequence[GivenResponse] | Mapping[str, GivenResponse]
"""Responses to samples, one per sample, or by the samples' ids."""

Response: TypeAlias = str | tuple[int, ...]
"""A checked response: its text or its token ids."""


def given_responses(
    responses: GivenResponses, samples: Sequence[MultiDocSample], executor: Executor
) -> tuple[Response, ...]:
    """Responses in the order of the samples, as texts or token ids.

    Raises:
        TypeError: If ``responses`` is neither a sequence nor a mapping, or a response is none.
        ValueError: If there is not one response per sample, or a token id is not in the model's vocabulary.
    """
    if isinstance(responses, Mapping):
        return tuple(
            checked_response(responses[name], f"responses[{name!r}]", executor.shape.d_vocab)
            for name in _matching(responses, [sample.id for sample in samples])
        )
    if isinstance(responses, str | bytes) or not isinstance(responses, Iterable):  # pyright: ignore[reportUnnecessaryIsInstance]
        raise TypeError(
            f"responses is {responses!r:.80}, a {type(responses).__name__}; it must be a list with one response per "
            "sample, such as ['a response'], or a dictionary from sample ids to responses"
        )
    given = list(responses)
    checked = [checked_response(one, f"responses[{i}]", executor.shape.d_vocab) for i, one in enumerate(given)]
    if len(checked) != len(samples):
        raise ValueError(f"there are {len(checked)} responses for {len(samples)} samples; give one per sample")
    return tuple(checked)


def _matching(by_id: Mapping[str, Any], names: Sequence[str]) -> Sequence[str]:
    """Ids of the samples, all of which have a response, while every response has a sample."""
    missing = [name for name in names if name not in by_id]
    if missing:
        raise ValueError(
            f"{len(missing)} of {len(names)} samples have no response, such as {missing[0]!r}; the responses have the "
            f"ids {_some(by_id)}"
        )
    unknown = [name for name in by_id if name not in set(names)]
    if unknown:
        raise ValueError(
            f"{len(unknown)} responses have ids of no sample, such as {unknown[0]!r}; the samples have the ids "
            f"{_some(names)}"
        )
    return names


def _some(names: Iterable[str]) -> str:
    listed = [repr(name) for name in names]
    return ", ".join(listed[:3]) + (f" and {len(listed) - 3} more" if len(listed) > 3 else "") if listed else "none"


def checked_response(response: Any, name: str, d_vocab: int) -> Response:
    """A response as a text or as token ids.

    Raises:
        TypeError: If it is neither a text nor a generation nor token ids.
        ValueError: If token ids have more than one row, or are not in the vocabulary.
    """
    if isinstance(response, str):
        return str(response)
    tokens = response.tokens if isinstance(response, Generation) else response
    if isinstance(tokens, Tensor):
        if tokens.ndim == 2 and len(tokens) == 1:
            tokens = tokens[0]
        if tokens.ndim != 1 or tokens.is_floating_point():
            raise ValueError(
                f"{name} is a tensor of the shape {tuple(tokens.shape)} and type {tokens.dtype}; token ids of one "
                "response are integers with one axis"
            )
        tokens = tokens.tolist()
    if isinstance(tokens, bytes | Mapping) or not hasattr(tokens, "__iter__"):
        raise TypeError(
            f"{name} is {response!r:.80}, a {type(response).__name__}; it must be a text, token ids or a Generation"
        )
    ids = tuple(integers(tokens, name))
    outside = [token for token in ids if not 0 <= token < d_vocab]
    if outside:
        raise ValueError(f"{name} has the token id {outside[0]}; the model's vocabulary has the ids 0 to {d_vocab - 1}")
    return ids


def response_tokens(model: FocusModel, prompt: EncodedPrompt, response: Response) -> Int[Tensor, "_"]:
    """Tokens of a response after a prompt, as a generation of the model has them.

    A text is tokenised together with the prompt, and a text of white space has no tokens. Token ids are taken as they
    are, up to the first stop token of the model.
    """
    if isinstance(response, str):
        if not response.strip():
            return torch.zeros(0, dtype=torch.long)
        return model.encoder.encode_response(prompt, response)
    return torch.tensor(_before_stop(model, response), dtype=torch.long)


def response_text(model: FocusModel, response: Response) -> str:
    """Text of a response: the text itself or, for token ids, the text of a generation with these tokens."""
    if isinstance(response, str):
        return response
    return str(model.tokenizer.decode(_before_stop(model, response), skip_special_tokens=True)).strip()


def _before_stop(model: FocusModel, tokens: Sequence[int]) -> list[int]:
    end = next((i for i, token in enumerate(tokens) if token in model.stop_tokens), None)
    return list(tokens[:end])
