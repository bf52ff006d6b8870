"""Code blocks of the README and docs, run in a reader's order, with stand-ins for the reader's models and devices."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
import shlex
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from sybil import Document, Region
from sybil.parsers.markdown.lexers import DirectiveInHTMLCommentLexer, FencedCodeBlockLexer

from tests.support.paths import ROOT

__all__ = ["Block", "Command", "Reader", "blocks", "commands", "pages"]

_TITLE = re.compile(r'title="([^"]+)"')


def pages() -> list[Path]:
    """Paths of the README and of every page below docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced code block, or setup code in a comment ``<!-- given: ... -->`` (state that the reader has already).

    Attributes:
        page: Path of the page.
        line: Line of the opening fence, counted from 1.
        language: Language of the fence, or ``given``.
        title: Title of the fence. An output block has the title ``prints``, or the name of the error that the block
            before it raises.
        source: Content of the block.
        not_run: Reason for not running the block, from a comment ``<!-- not run: why -->`` directly before it.
    """

    page: Path
    line: int
    language: str
    title: str | None
    source: str
    not_run: str | None = None

    @property
    def place(self) -> str:
        """Page and line, for error messages."""
        return f"{self.page.name}, line {self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a shell block, without its comment."""

    place: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.words)


def blocks(page: Path) -> list[Block]:
    """Code blocks of a page, in order.

    Raises:
        ValueError: If no block follows a ``not run`` comment.
    """
    found: list[Block] = []
    why, ended = None, 0
    document = Document.parse(str(page), _regions)
    for example in document.examples():
        language, _, info = str(example.region.lexemes["language"]).partition(" ")
        if why is not None and (language == "not-run" or document.text[ended : example.start].strip("-> \n")):
            raise ValueError(f"{page}: no block follows '<!-- not run: {why} -->'")
        if language == "not-run":
            why, ended = info, example.end
            continue
        title = _TITLE.search(info)
        found.append(Block(page, example.line, language, title and title[1], str(example.parsed), why))
        why = None
    if why is not None:
        raise ValueError(f"{page}: no block follows '<!-- not run: {why} -->'")
    return found


def _regions(document: Document) -> Iterator[Region]:
    for region in FencedCodeBlockLexer(r"[^\n]+")(document):
        yield _example(region, str(region.lexemes["language"]))
    for region in DirectiveInHTMLCommentLexer("given")(document):
        yield _example(region, "given")
    for region in DirectiveInHTMLCommentLexer("not run")(document):
        yield _example(region, f"not-run {region.lexemes['arguments']}")


def _example(region: Region, language: str) -> Region:
    lexemes: dict[str, Any] = {**region.lexemes, "language": language}
    return Region(region.start, region.end, parsed=region.lexemes["source"], evaluator=lambda _: None, lexemes=lexemes)


def commands(block: Block) -> list[Command]:
    """Commands of a shell block.

    A trailing backslash continues a line, ``&&`` joins commands, and ``#`` begins a comment.
    """
    found: list[Command] = []
    for line in block.source.replace("\\\n", " ").splitlines():
        lexer = shlex.shlex(line, posix=True, punctuation_chars="&()")
        lexer.whitespace_split = True
        words: list[str] = []
        for word in [*lexer, "&&"]:
            if word == "&&":
                found += [Command(block.place, tuple(words))] if words else []
                words = []
            elif word not in ("(", ")"):
                words.append(word)
    return found


class Reader:
    """Runs all code blocks of a page in order, in one namespace and one folder.

    Args:
        replaced: Replacements for a reader's models and devices, by name. In Python blocks the name is a quoted string.
            In shell blocks it is a word.
        smaller: Replacements, by source text, for sizes in Python blocks that would take minutes.
        run_command: Function that runs a shell command.
    """

    def __init__(
        self, replaced: Mapping[str, str], smaller: Mapping[str, str], run_command: Callable[[Command], None]
    ) -> None:
        self.replaced, self.smaller, self.run_command = replaced, smaller, run_command
        self.namespace: dict[str, Any] = {"__name__": "page"}

    def read(self, page: Path) -> None:
        """Run all blocks of a page, and compare the printed output and raised errors with the page."""
        everything = blocks(page)
        for block, following in zip(everything, [*everything[1:], None], strict=True):
            if block.not_run is None and block.language in ("bash", "given", "python"):
                said = following if following is not None and following.language == "text" else None
                output = self._output(block, said.title if said else "prints")
                if said is not None and not _same(said.source, output):
                    pytest.fail(f"{said.place}: the page says\n\n{said.source}\nbut this comes out:\n\n{output}")

    def _output(self, block: Block, title: str | None) -> str:
        """Printed output of a block or, if the title names an error, the message of the error that it raises."""
        printed = io.StringIO()
        with contextlib.redirect_stdout(printed):
            if title == "prints":
                self._run(block)
                return printed.getvalue()
            try:
                self._run(block)
            except Exception as error:
                if type(error).__name__ != title:
                    raise
                return str(error.args[0] if isinstance(error, KeyError) else error)
        return pytest.fail(f"{block.place}: no {title} is raised")

    def _run(self, block: Block) -> None:
        if block.language == "bash":
            for command in commands(block):
                words = tuple(self.replaced.get(word, word) for word in command.words)
                self.run_command(Command(command.place, words))
            return
        source = block.source
        for name, stand_in in self.replaced.items():
            source = source.replace(f'"{name}"', repr(stand_in))
        for size, small in self.smaller.items():
            source = source.replace(size, small)
        # Keep the page's line numbers for tracebacks.
        exec(compile("\n" * block.line + source, str(block.page), "exec"), self.namespace)


def _same(said: str, output: str) -> bool:
    """Whether two texts are equal up to white space and the text that ``...`` replaces."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(said.strip() + "\n", output.strip() + "\n", flags)
