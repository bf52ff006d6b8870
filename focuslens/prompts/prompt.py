"""Text of a prompt, with the character ranges of named spans."""

from __future__ import annotations

import operator
from collections.abc import Iterable, Mapping
from typing import Any, TypeAlias, cast

from focuslens.util.checks import checked_text, is_range

__all__ = ["Prompt", "Span"]

Span: TypeAlias = tuple[int, int]
"""Half-open range ``[start, end)`` of characters or of tokens."""


def _ranges(name: Any, ranges: Any) -> tuple[Span, ...]:
    """The ranges of a span as pairs of Python's integers."""
    wanted = "it must be a list of ranges (start, end) of characters, such as [(0, 4)]"
    if not isinstance(name, str):
        raise TypeError(f"spans has the name {name!r}, a {type(name).__name__}; a name is a string")
    if is_range(ranges):
        raise TypeError(f"the span {name!r} is one range, {ranges!r}; {wanted}: {{{name!r}: [{ranges!r}]}}")
    if isinstance(ranges, str) or not isinstance(ranges, Iterable):
        raise TypeError(f"the span {name!r} is {ranges!r}; {wanted}")
    listed = list(cast("Iterable[Any]", ranges))
    for i, pair in enumerate(listed):
        if not is_range(pair):
            raise TypeError(f"the span {name!r} has {pair!r} at index {i}; {wanted}")
    return tuple((operator.index(start), operator.index(end)) for start, end in listed)


class Prompt(str):
    """Text of a prompt, with the character ranges of named spans.

    A ``Prompt`` is a ``str`` that can be used like any other string. ``spans`` maps the name of each span to half-open
    character ranges. Prompts of :class:`MultiDocSample` have the spans ``instruction``, ``question``, ``document`` (all
    documents, in order), ``relevant`` (the gold document) and ``irrelevant`` (all other documents). If a prompt does
    not contain the gold document, ``relevant`` has no ranges. Other prompts may use any span names. Interventions and
    scores refer to spans by name.
    """

    spans: Mapping[str, tuple[Span, ...]]

    def __new__(cls, text: str, spans: Mapping[str, Iterable[Span]] | None = None) -> Prompt:
        """Create a prompt with named spans.

        Args:
            text: The text of the prompt.
            spans: Half-open character ranges of ``text``, by span name.

        Raises:
            TypeError: If ``text`` is no string, or ``spans`` is no mapping from names to lists of ranges.
            ValueError: If a range is empty, reversed, or not inside the text.
        """
        prompt = super().__new__(cls, checked_text(text, "text"))
        if not isinstance(spans, Mapping | None):  # pyright: ignore[reportUnnecessaryIsInstance]
            raise TypeError(f"spans is {spans!r:.80}; it must map names to lists of ranges: {{'relevant': [(0, 4)]}}")
        prompt.spans = {name: _ranges(name, ranges) for name, ranges in (spans or {}).items()}
        for name, ranges in prompt.spans.items():
            for start, end in ranges:
                if not 0 <= start < end <= len(text):
                    raise ValueError(
                        f"span {name!r} = ({start}, {end}) does not lie in a text of {len(text)} characters; "
                        "a span is a half-open range with 0 <= start < end <= length"
                    )
        return prompt

    def __getnewargs__(self) -> tuple[str, Mapping[str, tuple[Span, ...]]]:  # type: ignore[override]
        return (str(self), self.spans)

    @property
    def text(self) -> str:
        """The prompt as a plain ``str``."""
        return str(self)

    def __str__(self) -> str:
        return str.__str__(self)

    def part(self, name: str) -> tuple[str, ...]:
        """Text of each range of the span ``name``.

        Raises:
            KeyError: If the prompt does not have a span with this name.
        """
        if name not in self.spans:
            raise KeyError(f"this prompt has no span {name!r}; it has {sorted(self.spans)}")
        return tuple(self[start:end] for start, end in self.spans[name])
