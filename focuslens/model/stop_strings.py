"""Stop strings: texts that end a response, such as the new line after a base model's answer."""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Sequence
from typing import Any, cast

__all__ = ["BASE_STOP_STRINGS", "ResponseText", "checked_stop_strings", "default_stop_strings", "text_before_stop"]

BASE_STOP_STRINGS = ("\n", "Question:")
"""Stop strings of base models. After an answer, they go on, often with a question of their own."""

_INCOMPLETE = "\ufffd"
"""Character that tokenizers write for the first bytes of a character whose other bytes are in later tokens."""

_WINDOW = 16
"""Maximum number of tokens that are decoded together until they end with a whole character."""


def default_stop_strings(tokenizer: Any, chat: bool | None) -> tuple[str, ...]:
    """Stop strings of a checkpoint that declares none: :data:`BASE_STOP_STRINGS`, or none if prompts are chat messages.

    Args:
        tokenizer: The tokenizer, which can have a chat template.
        chat: Whether prompts are put into the chat template; ``None`` if they are wherever there is one.
    """
    is_chat = bool(getattr(tokenizer, "chat_template", None)) if chat is None else chat
    return () if is_chat else BASE_STOP_STRINGS


def checked_stop_strings(strings: object) -> tuple[str, ...]:
    """Stop strings as a tuple.

    Raises:
        TypeError: If they are not a sequence of texts.
        ValueError: If one of them is empty.
    """
    if isinstance(strings, str) or not isinstance(strings, Sequence):
        raise TypeError(f"stop_strings is {strings!r}; give a list of texts, such as ['\\n'], or [] for none")
    for text in cast("Sequence[object]", strings):
        if not isinstance(text, str):
            raise TypeError(f"stop_strings has {text!r}, a {type(text).__name__}; every stop string must be a text")
        if not text:
            raise ValueError("stop_strings has an empty text, which every response contains; give [] for none")
    return tuple(cast("Sequence[str]", strings))


def text_before_stop(text: str, strings: Sequence[str]) -> str:
    """The text of a response before the first stop string, without white space at its ends.

    A stop string does not count if it lies in the white space at the beginning of the text. An answer can therefore
    follow a new line.
    """
    end = _stop_index(text, strings, 0)
    return text[:end].strip()


def _stop_index(text: str, strings: Sequence[str], n_searched: int) -> int | None:
    """Index of the first stop string that is neither in the searched text nor in the white space at the beginning.

    The first ``n_searched`` characters were searched before. The result is ``None`` if there is no such stop string.
    """
    # A stop string must contain this character or a later one.
    first = max(n_searched, len(text) - len(text.lstrip()))
    places = [text.find(string, max(0, first + 1 - len(string))) for string in strings]
    return min((place for place in places if place >= 0), default=None)


class ResponseText:
    """Text of one response, which is decoded token by token and searched for stop strings.

    The response ends at the first token with which its text contains a stop string. Its text ends before that string.
    Its tokens are those whose text begins before the string, so a token with the end of the answer and the beginning of
    the string is one of them. If only white space precedes the string, the response is empty. A stop string does not
    count if it lies in the white space at the beginning of the response.

    Each token is decoded together with the tokens since the last whole character, and with the tokens of that
    character, because a tokenizer can strip a space at the beginning of a text. Only the new part is searched.

    Args:
        tokenizer: Tokenizer of the checkpoint.
        strings: The stop strings.

    Attributes:
        text: Text so far, up to the last whole character; up to the stop string once :attr:`ended` is true.
        length: Number of tokens so far; once :attr:`ended` is true, of tokens whose text begins before the stop string.
        ended: Whether the text contains a stop string.
    """

    def __init__(self, tokenizer: Any, strings: Sequence[str]) -> None:
        self.text = ""
        self.length = 0
        self.ended = False
        self._tokenizer, self._strings = tokenizer, tuple(strings)
        # Index in the text at which each token begins.
        self._starts: list[int] = []
        # Last tokens, and the number of characters at the beginning of their text that belong to ``text``.
        self._window: list[int] = []
        self._n_known = 0
        # Number of tokens in the window that end with a whole character.
        self._n_whole = 0

    def append(self, token: int) -> bool:
        """Append a token, and return whether the text now contains a stop string."""
        self._starts.append(len(self.text))
        self.length += 1
        window = [*self._window, token]
        decoded = self._decode(window)
        new = decoded[self._n_known :]
        if not new:  # a special token, which is no part of the text
            return False
        whole, n_searched = new.rstrip(_INCOMPLETE), len(self.text)
        self.text += whole
        self._n_known += len(whole)
        end = _stop_index(self.text, self._strings, n_searched) if whole else None
        if end is not None:
            self._cut(end)
        self._window = window
        if len(whole) == len(new) or len(window) > _WINDOW:
            self._forget(self._n_whole)
        return self.ended

    def _decode(self, tokens: list[int]) -> str:
        return cast("str", self._tokenizer.decode(tokens, skip_special_tokens=True))

    def _forget(self, n: int) -> None:
        """Remove the first ``n`` tokens of the window, which now ends with a whole character."""
        self._window = self._window[n:][-_WINDOW // 2 :]
        self._n_whole = len(self._window)
        self._n_known = len(self._decode(self._window).rstrip(_INCOMPLETE))

    def _cut(self, end: int) -> None:
        """End the response before a stop string at the index ``end``."""
        self.text, self.ended = self.text[:end], True
        self.length = bisect_left(self._starts, end) if self.text.strip() else 0
