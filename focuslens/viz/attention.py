"""Self-contained pages that show the attention between tokens, drawn with circuitsvis."""

from __future__ import annotations

import re
from collections.abc import Sequence
from html import escape

import numpy as np
from circuitsvis.attention import attention_heads
from jaxtyping import Float
from torch import Tensor

from focuslens.scores.window_attention import WindowAttention
from focuslens.viz.arrays import as_array, require_kind
from focuslens.viz.page import asset, page
from focuslens.viz.view import AttentionView, visible

__all__ = ["attention_view", "token_view"]

_DECIMALS = 3
# Placeholder for "<" in the tokens that circuitsvis writes into a script, because a token "</script>" would end the
# script. `_script` replaces the placeholder.
_LESS_THAN = "\ue000"


def token_view(window: WindowAttention, *, title: str = "", max_value: float | None = None) -> AttentionView:
    """Attention between the tokens of a window, as a page in the form of :func:`attention_view`.

    Args:
        window: Attention in the window, from :func:`focuslens.window_attention`.
        title: The page's title; the default contains the response.
        max_value: Attention that is drawn in full colour; the default is the largest attention in the window.
    """
    require_kind(window, WindowAttention, "window", "fl.window_attention(model, prompt, heads)")
    notes = (f"{window.left_out} tokens of the chosen spans did not fit and are left out.",) * bool(window.left_out)
    return attention_view(
        window.tokens,
        window.pattern,
        window.head_names,
        places=window.positions,
        max_tokens=len(window.tokens),
        max_value=max_value,
        title=title or f"Attention between tokens: {window.text or 'the prompt'}",
        notes=notes,
    )


def attention_view(
    tokens: Sequence[str],
    pattern: Float[np.ndarray, "head query key"] | Float[Tensor, "head query key"],
    head_names: Sequence[str],
    *,
    places: Sequence[int] | None = None,
    window: tuple[int, int] | None = None,
    max_tokens: int = 128,
    max_value: float | None = None,
    title: str = "Attention between tokens",
    notes: Sequence[str] = (),
) -> AttentionView:
    """Attention patterns of some heads, token by token, as a circuitsvis page.

    The page has a small map of each head, and a large map of one head. The size of a pattern grows with the square of
    the number of tokens. The page therefore shows only part of a long text, and states the range of the tokens shown.
    Values are rounded to three decimals.

    Args:
        tokens: Text of every token.
        pattern: Attention of each head. If there are fewer rows than tokens, the rows belong to the last tokens, and
            the rows of earlier tokens are drawn empty.
        head_names: Name of each head, such as ``L13H23``.
        places: Position of each token in the whole text, if ``tokens`` is only a part of the text.
        window: Range of the tokens to show, ``[start, end)``; the default is the last ``max_tokens`` tokens.
        max_tokens: Maximum number of tokens to show.
        max_value: Attention that is drawn in full colour; the default is the largest attention shown.
        title: The page's title.
        notes: Additional sentences for the page.

    Raises:
        ValueError: If the shapes do not match, if the pattern contains NaN, infinite or negative numbers, or if the
            window does not lie in the text or is longer than ``max_tokens``.
    """
    values = _as_array(pattern)
    n_heads, n_rows, n_tokens = values.shape
    if n_tokens != len(tokens) or not 0 < n_rows <= n_tokens:
        raise ValueError(
            f"pattern has shape {values.shape} [head query key] for {len(tokens)} tokens; "
            "it needs one key for each token, and no more queries than tokens"
        )
    if n_heads != len(head_names):
        raise ValueError(f"pattern holds {n_heads} heads and there are {len(head_names)} head names; name each head")
    if places is not None and len(places) != n_tokens:
        raise ValueError(f"there are {len(places)} places for {n_tokens} tokens; give each token its place")
    start, end = _window(window, n_tokens, max_tokens)
    square = np.zeros((n_heads, end - start, end - start))
    first = max(start, n_tokens - n_rows)
    if first < end:
        rows = slice(first - (n_tokens - n_rows), end - (n_tokens - n_rows))
        square[:, first - start :] = values[:, rows, start:end]
    script = _script(tokens[start:end], square, head_names, max_value or float(square.max()) or 1.0)
    sentences = [_note((start, end), n_tokens, n_rows, None if places is None else places[start:end]), *notes]
    note = " ".join(map(escape, sentences))
    body = f'<h1>{escape(title)}</h1>\n<p>{note}</p>\n<main id="view">\n{script}\n</main>'
    scripts = (asset("circuitsvis.js"), asset("height.js"))
    return AttentionView(page(title, body, css=asset("circuitsvis.css"), scripts=scripts), title)


def _note(window: tuple[int, int], n_tokens: int, n_rows: int, places: Sequence[int] | None) -> str:
    """Sentences that explain the rows and columns, and state which tokens the page shows."""
    start, end = window
    note = "Rows are query tokens, columns are key tokens."
    if places is not None:
        note += (
            f" The page shows tokens {_ranges(places)} of the text, numbered from 0. Attention to other tokens is left "
            "out, so rows may sum to less than 1."
        )
    else:
        note += " The number in brackets is the token's position."
        if window != (0, n_tokens):
            note += (
                f" The page shows tokens {start} to {end - 1} of 0 to {n_tokens - 1}, and positions count from the "
                "first token shown. Attention to other tokens is left out, so rows may sum to less than 1."
            )
    if n_rows < n_tokens:
        note += f" Rows before token {n_tokens - n_rows} were not computed and stay empty."
    return note


def _ranges(places: Sequence[int]) -> str:
    """Positions as text, with consecutive positions joined into ranges, such as ``0 to 1, 44 to 90``."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def _as_array(attention: np.ndarray | Tensor) -> Float[np.ndarray, "head row column"]:
    array = as_array(attention, "pattern", "head query key").astype(np.float64)
    if not (np.isfinite(array).all() and (array >= 0).all()):
        raise ValueError(
            "attention holds NaN, infinite or negative numbers; it must be probabilities, after the softmax"
        )
    return array


def _window(window: tuple[int, int] | None, n_tokens: int, max_tokens: int) -> tuple[int, int]:
    start, end = window or (max(0, n_tokens - max_tokens), n_tokens)
    if not 0 <= start < end <= n_tokens:
        raise ValueError(f"window ({start}, {end}) is not inside {n_tokens} tokens: 0 <= start < end <= {n_tokens}")
    if end - start > max_tokens:
        raise ValueError(
            f"window ({start}, {end}) holds {end - start} tokens, more than max_tokens = {max_tokens}; "
            "choose a shorter window, or raise max_tokens (the page grows with the square of the window's length)"
        )
    return start, end


def _script(
    tokens: Sequence[str], square: Float[np.ndarray, "head query key"], head_names: Sequence[str], max_value: float
) -> str:
    """HTML fragment of the circuitsvis view, including its JavaScript. The same arguments give the same fragment."""
    rounded = np.round(square, _DECIMALS)
    # Most rounded values are zero. Writing "0" instead of "0.0" makes the page smaller.
    numbers = [[[0 if x == 0 else x for x in row] for row in head] for head in rounded.tolist()]
    source = attention_heads(
        attention=numbers,
        tokens=[visible(token).replace("<", _LESS_THAN) for token in tokens],
        attention_head_names=[name.replace("<", _LESS_THAN) for name in head_names],
        max_value=max_value,
        min_value=0.0,
    ).local_src
    # In the JSON, the placeholder is the escape "\ue000". JavaScript reads the escape "\u003c" as "<", but the HTML
    # parser does not.
    source = source.replace(r"\ue000", r"\u003c")
    return re.sub(r"circuits-vis-[0-9a-f-]{13}", "attention", source)
