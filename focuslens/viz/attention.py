"""Attention patterns to look at: between tokens (circuitsvis) and onto whole documents; both stand alone offline."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path

import numpy as np
import torch
from circuitsvis.attention import attention_heads
from einops import einsum, reduce
from jaxtyping import Float
from torch import Tensor

from focuslens.files import write_atomically
from focuslens.prompts import Span
from focuslens.viz.page import inner_page, page

__all__ = ["AttentionView", "attention_view", "document_view", "pool_attention"]

_DECIMALS = 3
_LONGEST_TOKEN = 24
# Stands for "<" while circuitsvis writes the tokens into a script, where "</script>" would end it: see `_script`.
_LESS_THAN = "\ue000"
_VISIBLE = str.maketrans({"\n": "⏎", "\t": "⇥", "\r": "␍"})

_TOKENS_CSS = """
body { margin: 0; padding: 8px; background: #fff; color: #111; font: 14px/1.45 system-ui, sans-serif }
p { margin: 0 0 4px; color: #444 }
"""
_UNITS_CSS = """
:root { color-scheme: light dark; --ink: #16202a; --paper: #fff; --line: #d5dae0; --heat: 0 92 175 }
@media (prefers-color-scheme: dark) { :root { --ink: #e6e9ec; --paper: #14181d; --line: #3a424b; --heat: 60 150 235 } }
body { margin: 0; padding: 8px; background: var(--paper); color: var(--ink); font: 13px/1.35 system-ui, sans-serif }
.scroll { overflow-x: auto; margin: 0 0 12px }
table { border-collapse: collapse }
td, th { border: 1px solid var(--line); padding: 2px 5px; font-weight: normal; text-align: left }
td { min-width: 2.4em; text-align: right; font-variant-numeric: tabular-nums;
     background: rgb(var(--heat) / calc(var(--a) * 100%)) }
td.strong { color: #fff }
thead th { writing-mode: vertical-rl; transform: rotate(180deg); max-height: 14em; white-space: nowrap }
tbody th { position: sticky; left: 0; background: var(--paper); white-space: nowrap }
.marked { font-weight: bold; text-decoration: underline }
summary { cursor: pointer; padding: 4px 0; font-weight: bold }
"""


@dataclass(frozen=True)
class AttentionView:
    """A picture of attention that is one HTML page and loads nothing from the network.

    Leave it as the last value of a notebook's cell to see it there, or :meth:`save` it and open the file.

    Args:
        html: The complete page.
        title: What it shows, as plain text.
        height: The height, in CSS pixels, at which it is shown inside another page.
    """

    html: str
    title: str = "Attention"
    height: int = 900

    def __repr__(self) -> str:
        return f"AttentionView({self.title!r}, {len(self.html):,} characters of HTML)"

    def _repr_html_(self) -> str:
        return inner_page(self.html, title=self.title, height=self.height)

    def save(self, path: str | Path) -> Path:
        """Write the page to a file, whole or not at all, and return its path."""
        path = Path(path)
        write_atomically(path, self.html.encode())
        return path


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
) -> AttentionView:
    """Attention patterns of some heads, token by token: a map to choose heads from and one head in full (circuitsvis).

    A pattern's size grows with the square of the tokens, so a part of a long text is shown, and the page says which.
    Values are rounded to three decimals.

    Args:
        tokens: Text of every token.
        pattern: Attention of each head. Where there are fewer rows than tokens, they are those of the last tokens, and
            the others stay empty.
        head_names: A name for each head, such as ``L13H23``.
        places: Where each token stands in the whole text, if these are only some of its tokens.
        window: Tokens to show, ``[start, end)``; by default the last ``max_tokens``.
        max_tokens: The most tokens to show.
        max_value: Attention drawn in full colour; by default the largest in the part shown.
        title: The page's title.

    Raises:
        ValueError: If the shapes do not fit each other, the pattern holds NaN or negative numbers, or the window is not
            inside the text or longer than ``max_tokens``.
    """
    values = _as_array(pattern)
    n_heads, n_rows, n_tokens = values.shape
    if n_tokens != len(tokens) or not 0 < n_rows <= n_tokens:
        raise ValueError(
            f"pattern has shape {values.shape} [head query key] for {len(tokens)} tokens; "
            "it needs one key for each token, and no more queries than that"
        )
    if n_heads != len(head_names):
        raise ValueError(f"pattern holds {n_heads} heads and there are {len(head_names)} head names; give one for each")
    start, end = _window(window, n_tokens, max_tokens)
    square = np.zeros((n_heads, end - start, end - start))
    first = max(start, n_tokens - n_rows)
    if first < end:
        rows = slice(first - (n_tokens - n_rows), end - (n_tokens - n_rows))
        square[:, first - start :] = values[:, rows, start:end]
    if places is not None and len(places) != n_tokens:
        raise ValueError(f"there are {len(places)} places for {n_tokens} tokens; give each token its place")
    script = _script(tokens[start:end], square, head_names, max_value or float(square.max()) or 1.0)
    note = "Rows are the tokens that look, columns the tokens looked at; the number in brackets is the token's place."
    if places is not None:
        note = (
            "Rows are the tokens that look, columns the tokens looked at. Shown are tokens "
            f"{_ranges(places[start:end])} of the text, numbered here from 0; attention to the others is left out, so "
            "rows may sum to less than 1."
        )
    elif (start, end) != (0, n_tokens):
        note += (
            f" Shown are tokens {start} to {end - 1} of 0 to {n_tokens - 1}, and the places count from the first of "
            "them; attention to the others is left out, so rows may sum to less than 1."
        )
    if n_rows < n_tokens:
        note += f" Rows before token {n_tokens - n_rows} were not computed and stay empty."
    return AttentionView(page(title, f"<p>{note}</p>\n{script}", css=_TOKENS_CSS), title)


def _ranges(places: Sequence[int]) -> str:
    """``0 to 1, 44 to 90`` for runs of neighbouring places."""
    runs: list[list[int]] = []
    for place in places:
        if runs and place == runs[-1][-1] + 1:
            runs[-1].append(place)
        else:
            runs.append([place])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 1 else str(run[0]) for run in runs)


def document_view(
    labels: Sequence[str],
    attention: Float[np.ndarray, "head response unit"] | Float[Tensor, "head response unit"],
    head_names: Sequence[str],
    *,
    response: Sequence[str] | None = None,
    marked: Sequence[int] = (),
    title: str = "Attention of the response to the parts of the prompt",
) -> AttentionView:
    """How much each response token attends to whole parts of the prompt; see :func:`pool_attention`.

    One table has a row for every head, averaged over the response (for a document, its contextual score: equation 1 of
    "Focus Directions"); below it, each head opens to one row for every response token. Plain HTML without a script:
    light, however long the prompt is.

    Args:
        labels: The units' names, such as ``sink``, ``Document [1]``, ``question``.
        attention: Attention of each head, from each row that is a response token, summed over each unit.
        head_names: A name for each head.
        response: Text of the response tokens.
        marked: Units to mark, such as the relevant document.
        title: The page's title.

    Raises:
        ValueError: If the shapes do not fit each other, there is no response token, a marked unit does not exist, or
            the attention holds NaN or negative numbers.
    """
    values = _as_array(attention)
    expected = (len(head_names), len(response) if response is not None else values.shape[1], len(labels))
    if values.shape != expected or not values.size:
        raise ValueError(
            f"attention has shape {values.shape}; for these names "
            f"it must be {expected} [head response unit], and none of them 0"
        )
    for unit in marked:
        if not 0 <= unit < len(labels):
            raise ValueError(f"marked unit {unit} does not exist: there are {len(labels)}, counted from 0")
    rows = [f"{place} {_visible(text)}" for place, text in enumerate(response or [""] * expected[1])]
    means = reduce(values, "head response unit -> head unit", "mean")
    note = "Share of attention, averaged over the response tokens." + " ★ marks the relevant part." * bool(marked)
    body = f"<p>{note}</p>\n{_heat_table(labels, head_names, means, marked)}"
    for name, head_values in zip(head_names, values, strict=True):
        table = _heat_table(labels, rows, head_values, marked)
        body += f"<details><summary>{escape(name)}, token by token</summary>\n{table}</details>\n"
    height = min(900, 220 + 46 * len(head_names))
    return AttentionView(page(title, body, css=_UNITS_CSS), title, height)


def pool_attention(rows: Float[Tensor, "head query key"], spans: Sequence[Span]) -> Float[Tensor, "head query unit"]:
    """Attention summed over spans of keys: documents become units. Sums are at least of float32 precision.

    Args:
        rows: Attention of each head from some query rows.
        spans: Half-open token ranges, one a unit; they may overlap and need not cover everything.

    Raises:
        ValueError: If a span is empty, reversed, or not inside the keys.
    """
    n_keys = rows.shape[-1]
    member = torch.zeros(n_keys, len(spans), dtype=torch.promote_types(rows.dtype, torch.float32), device=rows.device)
    for unit, (start, end) in enumerate(spans):
        if not 0 <= start < end <= n_keys:
            raise ValueError(
                f"span {unit} = ({start}, {end}) does not lie in {n_keys} keys; "
                "a span is a half-open range with 0 <= start < end <= keys"
            )
        member[start:end, unit] = 1
    return einsum(rows.to(member.dtype), member, "head query key, key unit -> head query unit")


def _as_array(attention: np.ndarray | Tensor) -> Float[np.ndarray, "head row column"]:
    array = attention.detach().to("cpu", torch.float64).numpy() if isinstance(attention, Tensor) else attention
    array = np.asarray(array, dtype=np.float64)
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
            "choose a shorter one, or raise max_tokens (the page grows with its square)"
        )
    return start, end


def _script(
    tokens: Sequence[str], square: Float[np.ndarray, "head query key"], head_names: Sequence[str], max_value: float
) -> str:
    """The circuitsvis view with its code inside, as an HTML fragment that is the same for the same input."""
    rounded = np.round(square, _DECIMALS)
    # A pattern is mostly zeros, and "0" is a third of "0.0".
    numbers = [[[0 if x == 0 else x for x in row] for row in head] for head in rounded.tolist()]
    source = attention_heads(
        attention=numbers,
        tokens=[_visible(token).replace("<", _LESS_THAN) for token in tokens],
        attention_head_names=[name.replace("<", _LESS_THAN) for name in head_names],
        max_value=max_value,
        min_value=0.0,
    ).local_src
    # JSON writes the stand-in as an escape; this one means "<" to JavaScript and nothing to the HTML parser.
    source = source.replace(r"\ue000", r"\u003c")
    return re.sub(r"circuits-vis-[0-9a-f-]{13}", "attention", source)


def _visible(token: str) -> str:
    """A token as one short line: line breaks as signs, the end of a long one cut off."""
    text = token.translate(_VISIBLE)
    return text if len(text) <= _LONGEST_TOKEN else text[: _LONGEST_TOKEN - 1] + "…"


def _heat_table(
    labels: Sequence[str],
    rows: Sequence[str],
    values: Float[np.ndarray, "row unit"],
    marked: Sequence[int],
) -> str:
    top = float(values.max()) or 1.0

    def cell(value: float) -> str:
        share = value / top
        strong = ' class="strong"' if share > 0.55 else ""
        return f'<td style="--a:{share:.2f}"{strong}>{value:.{_DECIMALS - 1}f}</td>'

    def heading(unit: int, label: str) -> str:
        return f'<th class="marked">{escape(label)} ★</th>' if unit in marked else f"<th>{escape(label)}</th>"

    head = "".join(heading(unit, label) for unit, label in enumerate(labels))
    body = "".join(
        f"<tr><th>{escape(name)}</th>{''.join(map(cell, line))}</tr>\n"
        for name, line in zip(rows, values.tolist(), strict=True)
    )
    return f'<div class="scroll"><table><thead><tr><th></th>{head}</tr></thead><tbody>\n{body}</tbody></table></div>\n'
