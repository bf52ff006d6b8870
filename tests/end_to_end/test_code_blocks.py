"""Run every code block of the README and docs, with stand-ins for the reader's models, data and folders."""

from __future__ import annotations

import contextlib
import io
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jaxtyping
import matplotlib.pyplot as plt
import pytest

import focuslens as fl
from focuslens.cli import main as cli
from tests.support.documented_code import Block, Command, Reader, blocks, commands, pages
from tests.support.multidoc_files import oracle_record, retrieval_record, write
from tests.support.paths import ROOT

LANGUAGES = {"bash", "given", "json", "python", "text", "yaml"}

NOT_RUN: dict[str, tuple[str, ...]] = {
    "docs/how-to/own-model.md": ("needs a GGUF file", "downloads a model"),
    "docs/how-to/other-libraries.md": ("needs nnsight",),
    "docs/how-to/cluster.md": ("needs a cluster; tests/services/test_ray.py starts one",),
    "docs/serving.md": ("needs the server; tests/services/test_served.py starts one",) * 2,
}
"""For each page, the reasons why its ``not run`` blocks are not run.

Add new reasons here, so that they are reviewed.
"""

FILES = (
    "nq-open-oracle.jsonl.gz",
    "nq-open-contriever-msmarco-retrieved-documents.jsonl.gz",
)
"""Lost-in-the-middle files that tests synthesize: oracle passages and retrieval results."""

TABLE = """query,contexts
who has the red boat,"[""Ana has a red boat."", ""Ben has a blue boat.""]"
who has the blue boat,"[""Ana has a red boat."", ""Ben has a blue boat.""]"
"""
"""The table of a reader."""

MODELS = {
    "PATH": "llama",
    "meta-llama/Llama-3.2-3B-Instruct": "llama_chat",
    "Qwen/Qwen2.5-7B-Instruct": "qwen2",
}
"""Model names and paths in the documentation, and the random checkpoint that replaces each."""

SMALLER = {"load_synthetic(20,": "load_synthetic(5,"}
"""Python calls in the documentation, and the smaller calls that replace them."""

_DATA = ["--samples", "3", "--documents", "3", "--gold-positions", "0,2"]
_RUN = [*_DATA, "--max-new-tokens", "3", "--device", "cpu", "--dtype", "float32"]
SMALL: dict[str, list[str]] = {
    "heads": _RUN,
    "train": [*_RUN, "--top-k", "3", "--epochs", "1"],
    "split-softmax": [*_RUN, "--tau", "0.1", "--k", "1"],
    "steer": [*_RUN, "--alpha=1", "--k", "1"],
    "generate": [*_RUN, "--top-k", "2"],
    "rerank": [*_RUN, "--top-k", "2", "--train-samples", "2"],
    "attribute": [*_RUN, "--top-k", "2", "--rank-on", FILES[0], "--rank-samples", "2", "--views", "1"],
    "fold": ["--top-k", "3"],
    "export": ["--top-k", "3"],
    "harness": _DATA,
    "report": ["--views", "1"],
}
"""Commands to run, with the options that are appended to each to keep its run small."""

PARSED = {
    "demo": "minutes; make demo",
    "focus": "minutes; tests/unit/cli/test_focus.py",
    "helmet": "needs HELMET; tests/end_to_end/test_helmet_command.py",
    "paper": "minutes; tests/end_to_end/test_paper.py",
    "published": "needs the authors' files; tests/unit/directions/test_published.py",
    "watch": "serves until Ctrl-C; tests/unit/viz/test_watch.py",
}
"""Commands that are only parsed here, with the reason or the test that runs them.

Commands with ``--ray`` are also only parsed. The test that runs them is tests/services/test_ray.py.
"""

OTHERS = {
    ".": "the environment of a release",
    ".venv/bin/python": "a release's build",
    ".venv/bin/twine": "uploads a release",
    "cd": "of a checkout of HELMET",
    "eval": "of a shell's start-up file; tests/unit/cli/test_completion.py",
    "bash": "a script of HELMET, which downloads",
    "git": "downloads, or changes a repository",
    "lm-eval": "tests/services/test_served.py",
    "python": "llama.cpp's converter (tests/services/test_gguf.py), and a release's check",
    "ray": "starts a cluster",
    "transformers": "starts a server; tests/services/test_served.py",
    "vllm": "needs a GPU",
}
"""Other programs that are not run here, with the reason or the test that runs them."""


@pytest.fixture(autouse=True)
def _as_for_users() -> Iterator[None]:
    """Let bad arguments reach the package's own errors instead of type checks. Close all figures after the test."""
    jaxtyping.config.update("jaxtyping_disable", True)
    yield
    jaxtyping.config.update("jaxtyping_disable", False)
    plt.close("all")


@pytest.fixture
def reader(checkpoint: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Reader:
    """A reader whose current folder contains the files that the pages mention."""
    monkeypatch.chdir(tmp_path)
    write(tmp_path / FILES[0], [oracle_record(i) for i in range(40)])
    write(tmp_path / FILES[1], [retrieval_record(i, passages=30) for i in range(20)])
    (tmp_path / "my.csv").write_text(TABLE)
    directories = {name: str(checkpoint(model)) for name, model in MODELS.items()}
    return Reader({**directories, "cuda": "cpu", "bfloat16": "float32"}, SMALLER, run_command)


def run_command(command: Command) -> None:
    """Run or parse a ``focuslens`` command. Check that any other command exists, or is in :data:`OTHERS`."""
    program, *words = command.words
    if program == "focuslens":
        run_focuslens(command, words)
    elif program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(), flags=re.MULTILINE), command
    elif program == "pip":
        check_installation(command)
    elif program == "python" and words[0].startswith("experiments/"):
        assert (ROOT / words[0]).is_file(), f"{command.place}: {command}"
    else:
        assert program in OTHERS, f"{command.place}: {command} is neither run nor known"


def run_focuslens(command: Command, words: list[str]) -> None:
    said = io.StringIO()
    if words[0] in PARSED or "--ray" in words:
        try:
            with contextlib.redirect_stderr(said):
                cli._parser().parse_args(cli._joined(words))
        except SystemExit:
            pytest.fail(f"{command.place}: {command}: {said.getvalue()}")
        return
    with contextlib.redirect_stderr(said):
        status = cli.main([*words, *_small(words)])
    assert status == 0, f"{command.place}: {command}: {said.getvalue()}"


def _small(words: list[str]) -> list[str]:
    """Options that keep the run of a command small."""
    options = SMALL[words[0]]
    if "--columns" not in words:
        return options
    # A table of the reader has documents of its own.
    place = options.index("--gold-positions")
    return [*options[:place], *options[place + 2 :]]


def check_installation(command: Command) -> None:
    """Check that every extra in a ``pip install`` command exists."""
    section = (ROOT / "pyproject.toml").read_text().split("[project.optional-dependencies]")[1].split("\n[")[0]
    known = set(re.findall(r"^(\w+) =", section, flags=re.MULTILINE))
    for word in command.words:
        for extras in re.findall(r"^(?:\.|focuslens)\[(.*)\]$", word):
            assert set(extras.split(",")) <= known, f"{command.place}: {command}"


def identifier(page: Path) -> str:
    return page.relative_to(ROOT).as_posix()


WITH_CODE = [page for page in pages() if blocks(page)]
SLOW = ("README.md", "docs/how-to/attribution.md")
"""Pages whose blocks take more processor time than a test that is not slow."""


@pytest.mark.parametrize(
    "page",
    [pytest.param(page, marks=pytest.mark.slow) if identifier(page) in SLOW else page for page in WITH_CODE],
    ids=identifier,
)
def test_every_block_of_a_page_runs_and_says_what_the_page_says(page: Path, reader: Reader) -> None:
    reader.read(page)


def test_blocks_that_are_not_run_are_those_that_were_agreed() -> None:
    reasons = {identifier(page): tuple(block.not_run for block in blocks(page) if block.not_run) for page in pages()}
    assert {page: given for page, given in reasons.items() if given} == NOT_RUN


def test_every_block_has_a_language_and_every_output_a_title() -> None:
    for page in WITH_CODE:
        for block in blocks(page):
            assert block.language in LANGUAGES, block.place
            assert (block.title is not None) == (block.language == "text"), block.place
        fences = re.findall(r"^ *```(.*)$", page.read_text(), flags=re.MULTILINE)
        assert all(fences[::2]), f"{page}: a block has no language"
        assert not any(fences[1::2]), f"{page}: a block does not end"


def test_every_name_that_the_pages_mention_exists() -> None:
    for page in pages():
        for name in re.findall(r"\bfl\.([A-Za-z_]\w*(?:\.[A-Za-z_]\w*)*)", page.read_text()):
            value: Any = fl
            for part in name.split("."):
                assert hasattr(value, part), f"{page}: fl.{name} does not exist"
                value = getattr(value, part)


def test_what_is_excused_is_still_in_the_pages() -> None:
    written = [command.words for page in WITH_CODE for block in blocks(page) for command in shell(block)]
    programs, ours = {words[0] for words in written}, {words[1] for words in written if words[0] == "focuslens"}
    assert set(OTHERS) <= programs
    assert set(PARSED) | set(SMALL) == ours


def shell(block: Block) -> list[Command]:
    return commands(block) if block.language == "bash" and block.not_run is None else []
