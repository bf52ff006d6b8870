"""Values of the cells of a user's table: lists and objects that are written as a text."""

from __future__ import annotations

import ast
import io
import json
import re
import tokenize
from collections.abc import Mapping
from typing import Any, cast

__all__ = ["decoded", "listed_names", "text_of_number", "value_at", "whole"]

_NUMBER = r"(?:[-+]?(?:\d+\.?\d*|\.\d+)(?:e[-+]?\d+)?|[-+]?inf|nan|None|True|False)"
_PRINTED = re.compile(
    rf"\[\s*(?:{_NUMBER}(?:\s+{_NUMBER})+\s*\]$|(?:{_NUMBER}\s+)+['\"\[{{]|(?:array|list)\()", re.ASCII
)
"""Beginning of an array of numbers as NumPy prints it, such as ``[0 2]``, or of one with numbers first."""

_BETWEEN = (tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)


def listed_names(names: Any) -> str:
    """Names of columns or fields, for a message."""
    return ", ".join(repr(name) for name in names) or "none"


def whole(value: Any) -> Any:
    """The value, with a whole float as an integer: pandas keeps a column of integers with gaps as floats."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def text_of_number(value: Any) -> str:
    """A text, or a number as a text: ``7`` for 7 and 7.0."""
    return str(whole(value))


def value_at(fields: Mapping[str, Any], name: str) -> Any:
    """Value of a field. A name with dots, such as ``metadata.title``, leads into objects.

    Raises:
        KeyError: If there is no such field.
    """
    if name in fields:
        return fields[name]
    value: Any = fields
    for step in name.split("."):
        value = decoded(value)
        if not isinstance(value, Mapping):
            raise KeyError(name)
        value = cast("Mapping[str, Any]", value)[step]
    return value


def decoded(value: Any) -> Any:
    """The value of a cell. A text that is a list or an object in JSON, or in Python's notation, is taken for it.

    Raises:
        ValueError: If a text begins as such a list, and is none, or is a printed array of NumPy.
    """
    if not isinstance(value, str):
        return value
    text = value.strip()
    if text[:1] not in ("[", "{", "("):
        return value
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = _in_python(text)
    if isinstance(content, list | dict):
        return cast("Any", content)
    begins = text[1:].lstrip()[:1] in ('"', "'", "{", "[")
    if text[0] == "(":
        # A text may well begin with a parenthesis, as in "(1, 2)".
        return list(cast("tuple[Any, ...]", content)) if begins and isinstance(content, tuple) else value
    if text.endswith("]") and _PRINTED.match(text):
        raise _printed(text)
    if begins:
        raise ValueError(f"the cell {text!r:.60} begins as a list, but is none in JSON; write it with json.dumps")
    return value


def _in_python(text: str) -> Any:
    """The value of a text in Python's notation, in which pandas writes lists into CSV files; ``None`` if it is none."""
    try:
        content = ast.literal_eval(text)
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        return None
    if isinstance(content, list | dict | tuple) and _has_neighbours(text):
        raise _printed(text)
    return content


def _has_neighbours(text: str) -> bool:
    """Whether two texts stand side by side without a comma. Python joins them to one text."""
    before = tokenize.OP
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type in _BETWEEN:
            continue
        if token.type == before == tokenize.STRING:
            return True
        before = token.type
    return False


def _printed(text: str) -> ValueError:
    return ValueError(
        f"the cell {text!r:.60} has values without commas between them, as NumPy prints an array; write lists in JSON, "
        "as in frame[column] = frame[column].map(lambda values: json.dumps(list(values)))"
    )
