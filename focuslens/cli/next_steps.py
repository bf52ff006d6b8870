"""The next sensible command after a command, with the user's own model and data, ready to be pasted into a shell."""

from __future__ import annotations

import argparse
import json
import logging
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from focuslens.cli.command import Command, Parser

__all__ = ["next_command", "note_next"]

_LOG = logging.getLogger(__name__)

_NEVER = frozenset({"help", "out", "heads", "split", "json", "verbose", "quiet"})
"""Options that are never carried over to another command."""


def note_next(words: Sequence[str], args: argparse.Namespace, content: Mapping[str, Any], commands: Commands) -> None:
    """Print the next command as a note, if there is one.

    Args:
        words: Command line of the command that has finished, from the command's name on.
        args: Its parsed options.
        content: Content of its result files.
        commands: All commands, by name.
    """
    line = next_command(words, args, content, commands)
    if line is not None:
        _LOG.info("next: %s", line)


def next_command(
    words: Sequence[str], args: argparse.Namespace, content: Mapping[str, Any], commands: Commands
) -> str | None:
    """The next command as one line for a shell; ``None`` if there is none. The arguments are those of note_next."""
    step = _STEPS.get(args.command)
    line = None if step is None else step(_Run(list(words), args, content, commands))
    return None if line is None else shlex.join(line)


Commands = Mapping[str, Command]


@dataclass(frozen=True)
class _Run:
    """A command that has finished."""

    words: Sequence[str]
    args: argparse.Namespace
    content: Mapping[str, Any]
    commands: Commands

    @property
    def out(self) -> Path | None:
        """Folder that the command wrote to; ``None`` if it only printed results."""
        given = getattr(self.args, "out", None)
        if given is not None:
            return Path(given)
        written = self.content.get("written", ())
        return Path(written[0]).parent if written else None

    def to(self, command: str, *more: str, also: Sequence[str] = (), leave: Sequence[str] = ()) -> list[str]:
        """Command line of another command, with those options of this one that the other one has too.

        Args:
            command: Name of the other command.
            more: Further words.
            also: Names of options that are carried over, too.
            leave: Names of options that are not carried over.
        """
        left_out = (_NEVER - {*also}) | {*leave}
        own, theirs = _options_of(self.commands[self.args.command]), _options_of(self.commands[command])
        known = {action.dest for action in theirs.values()} - left_out
        return ["focuslens", command, *_carried(self.words[1:], own, known), *more]

    def beside(self, name: str) -> str:
        """Folder for the results of the next command: beside this command's, or in ``runs``."""
        out = self.out
        if out is None or not out.name:
            return str(Path("runs") / name)
        return str(out.with_name(name if out.name != name else f"{name}-2"))

    def lacks(self, name: str) -> bool:
        """Whether no sample of the user's table has ``answers``, or a known ``relevant`` document."""
        data: Mapping[str, Any] = self.content.get("data") or self.content.get("provenance", {}).get("data") or {}
        without = int(data.get(f"without_{name}", 0))
        return without > 0 and without >= int(data.get("samples", 0))

    def attribute(self, *more: str) -> list[str]:
        """Command that needs neither answers nor relevant documents."""
        return self.to("attribute", *more, "--out", self.beside("sources"), also=["heads"])

    def report(self) -> list[str] | None:
        """Command that shows all results on one page; ``None`` if nothing was written."""
        return None if self.out is None else ["focuslens", "report", str(self.out)]


def _options_of(command: Command) -> dict[str, argparse.Action]:
    """Options of a command, by all their names."""
    parser = Parser(add_help=False)
    command.add_options(parser)
    return {name: action for action in parser._actions for name in action.option_strings}


def _carried(words: Sequence[str], options: Mapping[str, argparse.Action], known: set[str]) -> list[str]:
    """The words of those options, values included, whose destination is ``known``."""
    carried, rest = list[str](), list(words)
    while rest:
        word = rest.pop(0)
        name, equals, _ = word.partition("=")
        action = _option(name, options)
        if action is None:
            continue
        values = [] if equals else _values(action, rest)
        del rest[: len(values)]
        if action.dest in known:
            carried += [word, *values]
    return carried


def _option(name: str, options: Mapping[str, argparse.Action]) -> argparse.Action | None:
    """Option of a name, which can be abbreviated."""
    if not name.startswith("--") or name in options:
        return options.get(name)
    matches = {id(action): action for full, action in options.items() if full.startswith(name)}
    return next(iter(matches.values())) if len(matches) == 1 else None


def _values(action: argparse.Action, rest: Sequence[str]) -> list[str]:
    """Words that are values of an option."""
    if action.nargs is None:
        return list(rest[:1])
    if action.nargs == 0:
        return []
    values: list[str] = []
    for word in rest:
        if word.startswith("-") or (action.nargs == "?" and values):
            break
        values.append(word)
    return values


# Steps


def _after_heads(run: _Run) -> list[str]:
    ranking = () if run.out is None else ("--heads", str(run.out / "heads.json"))
    if run.lacks("answers"):
        return run.attribute(*ranking)
    return run.to("split-softmax", *ranking, "--out", run.beside("split-softmax"))


def _after_split_softmax(run: _Run) -> list[str]:
    heads = max(1, len(run.content.get("heads", ())))
    train = run.to("train", "--top-k", str(heads), "--out", run.beside("directions"), also=["heads"])
    return run.report() or train


def _after_train(run: _Run) -> list[str]:
    directions = str(run.out or "runs/train")
    if run.lacks("answers"):
        return run.to("generate", "--directions", directions, "--sample", "0", also=["heads"])
    return run.to("steer", "--directions", directions, "--out", run.beside("steer"), also=["heads"])


def _after_steer(run: _Run) -> list[str]:
    sample = ("--sample", "0")
    return run.report() or run.to("generate", *sample, also=["heads"], leave=["alpha"])


def _after_generate(run: _Run) -> list[str]:
    args = run.args
    if args.prompt is not None:
        return run.to("heads", "--out", run.beside("heads"))
    if not run.content.get("relevant", [0]):
        return run.attribute()
    if args.tau is None and args.directions is None and args.case != "negative":
        if args.heads is None and args.split in ("train", "all"):  # heads must be ranked on other samples
            return run.to("heads", "--out", run.beside("heads"), also=["split"])
        return run.to("generate", "--tau", "0.3", also=["heads", "split"])
    if run.lacks("answers"):
        return run.report() or run.attribute()
    return run.report() or run.to("split-softmax", "--out", run.beside("split-softmax"), also=["heads"], leave=["tau"])


def _after_rerank(run: _Run) -> list[str]:
    if run.lacks("relevant") or (run.args.heads is not None and run.lacks("answers")):
        return run.attribute()
    if run.args.heads is None:
        return run.to("heads", "--out", run.beside("heads"))
    return run.to("split-softmax", "--out", run.beside("split-softmax"), also=["heads"])


def _after_demo(run: _Run) -> list[str]:
    if run.args.model == "demo":
        return ["focuslens", "demo", "--model", "smollm2-135m-instruct"]
    data = () if run.args.data is not None else ("--data", "passages")
    return run.to("heads", *data, "--documents", "10", "--distractors", "bm25", "--out", run.beside("heads"))


def _after_checkpoint(run: _Run) -> list[str]:
    written = Path(run.args.out) / "config.json"
    needs_code = written.is_file() and "auto_map" in json.loads(written.read_text(encoding="utf-8"))
    code = ("--trust-remote-code",) if needs_code else ()
    return ["focuslens", "generate", "--model", str(run.args.out), *code, "--sample", "0"]


def _after_models(run: _Run) -> list[str]:
    if run.args.fetch is not None:
        return ["focuslens", "demo", "--model", run.args.fetch]
    return ["focuslens", "demo", "--model", str(run.content["models"][0]["name"])]


def _open_page(run: _Run) -> list[str] | None:
    pages = [path for path in run.content.get("written", ()) if str(path).endswith(".html")]
    return [Path(sys.executable).name, "-m", "webbrowser", "-t", pages[0]] if pages else None


_STEPS: Mapping[str, Callable[[_Run], list[str] | None]] = {
    "demo": _after_demo,
    "heads": _after_heads,
    "split-softmax": _after_split_softmax,
    "train": _after_train,
    "steer": _after_steer,
    "generate": _after_generate,
    "rerank": _after_rerank,
    "attribute": _open_page,
    "focus": _Run.report,
    "fold": _after_checkpoint,
    "export": _after_checkpoint,
    "paper": _Run.report,
    "helmet": _open_page,
    "report": _open_page,
    "watch": lambda run: ["focuslens", "report", str(run.args.directory)] if run.args.directory.is_dir() else None,
    "models": _after_models,
}
"""Step after each command. ``harness`` itself prints the command that runs its task."""
