"""The code blocks of README and docs: found, and run as a reader would run them, on stand-ins for what a reader has."""

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
    """README and everything below docs."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block, or one in a comment ``<!-- given: ... -->`` (what the reader has before the next block).

    Attributes:
        page: Where it stands.
        line: Of its fence, counted from 1.
        language: Of the fence, or ``given``.
        title: Of the fence: for output ``prints``, or the name of the error that the block before it raises.
        source: What is in it.
        not_run: Why it is not run; from a comment ``<!-- not run: why -->`` right before it.
    """

    page: Path
    line: int
    language: str
    title: str | None
    source: str
    not_run: str | None = None

    @property
    def place(self) -> str:
        """For messages."""
        return f"{self.page.name}, line {self.line}"


@dataclass(frozen=True)
class Command:
    """One command of a shell block, without its comment."""

    place: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return shlex.join(self.words)


def blocks(page: Path) -> list[Block]:
    """A page's blocks in order.

    Raises:
        ValueError: If a comment says of nothing that it is not run.
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
    """The commands of a shell block: lines that end in a backslash go on, ``&&`` joins two, ``#`` begins a comment."""
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
    """Reads a page from its top: one namespace, one folder.

    Args:
        replaced: What stands, as a string in Python and as a word in the shell, for what a reader has: models, devices.
        smaller: What stands in Python for sizes that would take minutes.
        run_command: Runs a command of the shell.
    """

    def __init__(
        self, replaced: Mapping[str, str], smaller: Mapping[str, str], run_command: Callable[[Command], None]
    ) -> None:
        self.replaced, self.smaller, self.run_command = replaced, smaller, run_command
        self.namespace: dict[str, Any] = {"__name__": "page"}

    def read(self, page: Path) -> None:
        """Run everything, and compare what is said to be printed or raised with what is."""
        everything = blocks(page)
        for block, following in zip(everything, [*everything[1:], None], strict=True):
            if block.not_run is None and block.language in ("bash", "given", "python"):
                said = following if following is not None and following.language == "text" else None
                output = self._output(block, said.title if said else "prints")
                if said is not None and not _same(said.source, output):
                    pytest.fail(f"{said.place}: the page says\n\n{said.source}\nbut this comes out:\n\n{output}")

    def _output(self, block: Block, title: str | None) -> str:
        """What a block prints or, if the title names an error, the message of that error."""
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
        # Lines as in the page, for tracebacks.
        exec(compile("\n" * block.line + source, str(block.page), "exec"), self.namespace)


def _same(said: str, output: str) -> bool:
    """Whether two texts are the same but for white space, and for what ``...`` stands for."""
    flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
    return doctest.OutputChecker().check_output(said.strip() + "\n", output.strip() + "\n", flags)
