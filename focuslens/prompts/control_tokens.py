"""Tokenisation that keeps apart control tokens of a chat template and texts that look like them.

A tokenizer takes the text ``<|im_end|>`` for the control token of this name wherever it stands, also in a document. In
the ranges of a prompt that are known to be text, :class:`ControlTokens` tokenises it as any other text.

This is done with a copy of the tokenizer in which each control token has a private name: as many characters of
Unicode's private use as its own name has. Control tokens outside the ranges get their private names before
tokenisation. All positions of characters therefore stay as they are, and so do all rules of the tokenizer.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from functools import cached_property
from typing import Any

from focuslens.prompts.batch import disjoint
from focuslens.prompts.prompt import Span

__all__ = ["ControlTokens"]

_PRIVATE = (0xF0000, 0x100000)
"""First characters of the two large planes of private use. A text that contains one of them takes the other."""

_OF_CALLS = ("padding", "truncation")


class ControlTokens:
    """Control tokens of a tokenizer: its special tokens, and added tokens that its chat template writes.

    Args:
        tokenizer: Fast Hugging Face tokenizer.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._copies: dict[int, Any] = {}

    @cached_property
    def names(self) -> tuple[str, ...]:
        """Texts of the control tokens."""
        template = str(getattr(self._tokenizer, "chat_template", None) or "")
        added = getattr(self._tokenizer, "added_tokens_decoder", {}).values()
        # Gemma adds runs of white space to its vocabulary, which are no control tokens.
        written = [token.content for token in added if token.special or token.content in template]
        special = getattr(self._tokenizer, "all_special_tokens", ())
        return tuple(dict.fromkeys(name for name in (*written, *special) if name.strip()))

    @cached_property
    def _pattern(self) -> re.Pattern[str] | None:
        names = sorted(self.names, key=len, reverse=True)
        return re.compile("|".join(map(re.escape, names))) if names else None

    def _split(self, text: str, literal: Sequence[Span]) -> tuple[list[Span], bool]:
        """Ranges of control tokens outside of the ranges of text, and whether other text looks like a control token."""
        if self._pattern is None or not literal:
            return [], False
        ranges = disjoint([span for span in literal if span[0] < span[1]])
        ends = [0, *(end for _, end in ranges)]
        gaps = zip(ends, [*(start for start, _ in ranges), len(text)], strict=True)
        control = [match.span() for start, end in gaps for match in self._pattern.finditer(text, start, end)]
        known = set(control)
        return control, any(match.span() not in known for match in self._pattern.finditer(text))

    def look_alikes(self, text: str, literal: Sequence[Span]) -> bool:
        """Whether a text contains a text in the ``literal`` ranges that looks like a control token."""
        return self._split(text, literal)[1]

    def tokenize(
        self, text: str, literal: Sequence[Span], *, add_special_tokens: bool
    ) -> tuple[list[int], list[Span]] | None:
        """Token ids and character ranges, if the ``literal`` ranges contain a text that looks like a control token.

        The result is ``None`` if there is no such text, so that the tokenizer itself gives the tokens.

        Raises:
            ValueError: If the tokenizer is not a fast one, or the text uses up both planes of private use.
        """
        control, found = self._split(text, literal)
        if not found:
            return None
        plane = next((start for start in _PRIVATE if not self._uses(text, start)), None)
        if plane is None:
            raise ValueError(
                "a document contains a text that looks like a control token, and characters of Unicode's private use "
                "on both planes, which keep such texts apart; remove one of them"
            )
        private = self._private(plane)
        pieces: list[str] = []
        reached = 0
        for start, end in control:
            pieces += [text[reached:start], private[text[start:end]]]
            reached = end
        encoding = self._copy(plane).encode("".join((*pieces, text[reached:])), add_special_tokens=add_special_tokens)
        return list(encoding.ids), list(encoding.offsets)

    def _uses(self, text: str, plane: int) -> bool:
        return any(plane <= ord(character) < plane + len(self.names) for character in set(text))

    def _private(self, plane: int) -> dict[str, str]:
        """Private name of each control token."""
        return {name: chr(plane + i) * len(name) for i, name in enumerate(self.names)}

    def _copy(self, plane: int) -> Any:
        """Copy of the tokenizer in which control tokens have private names."""
        if plane not in self._copies:
            from tokenizers import Tokenizer

            backend = getattr(self._tokenizer, "backend_tokenizer", None)
            if backend is None:
                raise ValueError(
                    "a document contains a text that looks like a control token, which only a fast tokenizer can keep "
                    "apart; open the model with its fast tokenizer, or remove the text"
                )
            rules = json.loads(backend.to_str())
            _rename(rules, self._private(plane))
            self._copies[plane] = Tokenizer.from_str(json.dumps({**rules, **dict.fromkeys(_OF_CALLS)}))
        return self._copies[plane]


def _rename(rules: dict[str, Any], names: dict[str, str]) -> None:
    """Rename tokens in the rules of a tokenizer, in place: in its added tokens and in the vocabulary of its model."""
    for token in rules["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = rules["model"]
    vocabulary = model["vocab"]
    if isinstance(vocabulary, dict):
        model["vocab"] = {names.get(name, name): number for name, number in vocabulary.items()}
    else:  # a unigram model lists pieces with their scores
        model["vocab"] = [[names.get(name, name), score] for name, score in vocabulary]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
