"""Attention between the tokens of a window, which is a selection of tokens that is small enough to display."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from jaxtyping import Float
from torch import Tensor

from focuslens.heads import check_heads
from focuslens.hooks import Intervention, checked_interventions
from focuslens.prompts.batch import EncodedPrompt, SpanLike, disjoint
from focuslens.prompts.prompt import Span
from focuslens.scores.base import SINK
from focuslens.scores.contextual_scores import attention_pattern

if TYPE_CHECKING:
    from focuslens.model.focus_model import FocusModel

__all__ = ["WindowAttention", "window_attention", "window_positions"]

_MAX_CELLS = 640_000
"""Maximum number of attention values on a page, over all heads. This maximum keeps the page below 5 MB."""


@dataclass(frozen=True, eq=False)
class WindowAttention:
    """Attention of some heads between the tokens of a window, which is a selection of tokens of the whole text.

    Attributes:
        pattern: Attention from each window token (row) to each window token (column). A row can sum to less than 1,
            because attention to tokens outside the window is left out.
        head_names: Name of each head, such as ``L13H23``.
        tokens: Text of each window token.
        positions: Position of each window token in the whole text.
        length: Number of tokens in the whole text, including the response.
        left_out: Number of requested tokens that did not fit into the window, not counting margins.
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
    """Select the token positions of a window: the sink and all spans, each with ``margin`` tokens on both sides.

    The window contains at most ``most`` tokens. If the spans with their margins do not fit, the margins are dropped. If
    the spans still do not fit, tokens are removed from the end of the longest span. Overlapping spans are merged.

    Returns:
        The positions in ascending order, and the number of tokens that were removed from the ends of spans.

    Raises:
        ValueError: If a span is not inside the text, or if ``most`` is less than the number of spans, including
            the sink, after merging.
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
    """Attention of some heads between the tokens of a window: the sink, spans of the prompt, and the response.

    The model runs on the whole text. Attention rows are read in blocks, and only the values inside the window are
    stored.

    Args:
        model: The model.
        prompt: The prompt.
        heads: The heads to read.
        around: Spans of the prompt to include, each given by name or as a half-open range of token positions.
        margin: Number of tokens to include on each side of a span.
        most: Maximum number of tokens in the window. The default is 160, or less if there are many heads.
        response: The text of the response; if ``None``, the model generates the response.
        interventions: Interventions, applied in order.
        max_new_tokens: Maximum length of a generated response, in tokens.

    Raises:
        KeyError: If the prompt does not have a span named in ``around``.
        ValueError: If ``heads`` is empty or contains a head that does not exist, if a range is not inside the prompt,
            or if ``most`` is less than the number of spans, including the sink and the response.
        TypeError: If ``interventions`` is not a sequence of interventions.
    """
    interventions = checked_interventions(interventions)
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
