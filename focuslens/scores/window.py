"""Attention between the tokens of a window: some parts of a text, few enough to display, however long the text is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from focuslens.heads import check_heads
from focuslens.hooks import Intervention
from focuslens.prompts.batch import EncodedPrompt, SpanLike, disjoint
from focuslens.prompts.prompt import Span
from focuslens.scores.attention_mass import SINK
from focuslens.scores.contextual import attention_pattern

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel

__all__ = ["WindowAttention", "window_attention", "window_positions"]

_MAX_CELLS = 640_000
"""Maximum number of attention values, over all heads, that keeps a page below 5 MB."""


@dataclass(frozen=True, eq=False)
class WindowAttention:
    """Attention of some heads between the tokens of a window.

    Attributes:
        pattern: Attention from rows to columns. A row may sum to less than 1, because it leaves out tokens outside
            the window.
        head_names: Name of each head, such as ``L13H23``.
        tokens: Text of each token of the window.
        positions: Position of each token in the whole text.
        length: Number of tokens in the whole text, including the response.
        left_out: Number of requested tokens that were left out for lack of room.
        text: Text of the response.
    """

    pattern: Float[Tensor, "head position position"]
    head_names: tuple[str, ...]
    tokens: tuple[str, ...]
    positions: tuple[int, ...]
    length: int
    left_out: int = 0
    text: str = ""


def window_positions(spans: Sequence[Span], length: int, *, margin: int = 4, most: int = 128) -> tuple[list[int], int]:
    """Token positions of the sink and of spans with margins, and the number of positions that were left out.

    There are at most ``most`` positions. If this is not enough for all, the margins are dropped first, then tokens at
    the end of the longest part.

    Raises:
        ValueError: If a span does not lie in the text, or ``most`` is less than the number of parts.
    """
    for start, end in spans:
        if not 0 <= start < end <= length:
            raise ValueError(
                f"span ({start}, {end}) does not lie in a text of {length} tokens; "
                "a span is a half-open range with 0 <= start < end <= length"
            )
    bare_parts = disjoint([(0, min(SINK, length)), *spans])
    parts = disjoint([(max(0, start - margin), min(length, end + margin)) for start, end in bare_parts])
    if sum(end - start for start, end in parts) > most:
        parts = bare_parts
    n_requested = sum(end - start for start, end in parts)
    if len(parts) > most:
        raise ValueError(f"most is {most}, and there are {len(parts)} parts to show; most must be at least this number")
    lengths = [end - start for start, end in parts]
    while sum(lengths) > most:
        lengths[max(range(len(parts)), key=lambda i: lengths[i])] -= 1
    positions = [position for (start, _), n in zip(parts, lengths, strict=True) for position in range(start, start + n)]
    return positions, n_requested - len(positions)


def window_attention(
    model: FocusModel,
    prompt: str | EncodedPrompt,
    heads: Sequence[tuple[int, int]],
    around: Sequence[SpanLike] = ("relevant", "question"),
    *,
    margin: int = 4,
    most: int | None = None,
    response: str | None = None,
    interventions: Sequence[Intervention] = (),
    max_new_tokens: int = 100,
) -> WindowAttention:
    """Attention of some heads between the tokens of a window: parts of the prompt, the sink and the response.

    The model runs over the whole text. The rows of the chosen heads are read in blocks, and only the window is stored.

    Args:
        model: The model.
        prompt: The prompt.
        heads: The heads to read.
        around: Parts of the prompt to show: names, or half-open ranges of token positions.
        margin: Number of tokens to show on either side of each part.
        most: Maximum number of tokens to show; by default as many as a page with these heads has room for.
        response: The response; by default the model generates it.
        interventions: Interventions, applied in order.
        max_new_tokens: Maximum length of a generated response, in tokens.

    Raises:
        KeyError: If the prompt lacks a part that ``around`` names.
        ValueError: If a head or a range does not exist, or there are no heads.
    """
    head_list, encoded_prompt = check_heads(heads, model.shape.n_layers, model.shape.n_heads), model.encode(prompt)
    if not head_list:
        raise ValueError("there are no heads to read; give at least one, such as scores.top_heads(4)")
    if response is None:
        generated = model.generate(encoded_prompt, interventions, max_new_tokens=max_new_tokens)
        ids, text = generated.tokens, generated.text
    else:
        ids, text = model.encoder.encode_response(encoded_prompt, response), response.strip()
    n_prompt, length = len(encoded_prompt.tokens), len(encoded_prompt.tokens) + len(ids)
    spans = [span for part in around for span in encoded_prompt.resolve(part)]
    spans += [(n_prompt, length)] if len(ids) else []
    room = most if most is not None else min(160, int((_MAX_CELLS / len(head_list)) ** 0.5))
    positions, left_out = window_positions(spans, length, margin=margin, most=room)
    pattern = attention_pattern(model, encoded_prompt, ids, head_list, positions, interventions=interventions)
    texts = [*model.encoder.texts(encoded_prompt), *model.encoder.response_texts(encoded_prompt, ids)]
    return WindowAttention(
        pattern,
        tuple(str(head) for head in head_list),
        tuple(texts[position] for position in positions),
        tuple(positions),
        length,
        left_out,
        text,
    )
