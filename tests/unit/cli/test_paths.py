"""Paths in options are checked before the work. A message names the option, and says what would be right."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from focuslens.cli import options, output
from focuslens.cli.main import COMMANDS, _parser, main
from tests.support.multidoc_files import oracle_record, write

REQUIRED = {
    "fold": ["--model", "a/b", "--directions", "a/b", "--alpha", "1"],
    "export": ["--model", "a/b", "--directions", "a/b", "--alpha", "1"],
    "steer": ["--directions", "a/b"],
    "generate": ["--sample", "0"],
    "helmet make-recall": ["--lengths", "8", "--tokenizer", "demo"],
    "report": ["."],
    "watch": ["."],
    "published": ["."],
}
DIRECTORY_COMMANDS = [
    *(name for name in COMMANDS if name not in ("report", "watch", "models", "cache")),
    "helmet make-recall",
]


@pytest.fixture(autouse=True)
def _in_a_folder_of_its_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a-file").touch()
    Path("a-folder").mkdir()


@pytest.fixture
def refused(monkeypatch, capsys):
    """Function that runs a command which must fail before its work, and returns the one line that it prints."""

    def run(command: str, *arguments: str, status: int = 1) -> str:
        monkeypatch.setattr(output, "carry_out", lambda *_: pytest.fail("the command began its work"))
        capsys.readouterr()
        try:
            found = main([*command.split(), *REQUIRED.get(command, ()), *arguments])
        except SystemExit as stop:
            found = stop.code
        said = capsys.readouterr().err
        assert (found, said.count("\n")) == (status, 1), said
        return said

    return run


@pytest.mark.parametrize("command", DIRECTORY_COMMANDS)
def test_an_output_directory_that_cannot_be_is_known_before_the_work(command, refused):
    assert "--out: 'a-file' is a file; name a directory for the results" in refused(command, "--out", "a-file")
    said = refused(command, "--out", "a-file/in/it")
    assert "--out: 'a-file' is a file, so there can be no 'a-file/in/it'; name another" in said
    assert "argument --out: the path is empty; name one, or leave" in refused(command, "--out", "", status=2)
    assert sorted(path.name for path in Path().iterdir()) == ["a-file", "a-folder"]


def test_an_output_file_that_cannot_be_is_known_before_the_work(refused):
    assert "--out: 'a-folder' is a directory; name a file" in refused("report", "--out", "a-folder")
    assert "--out: 'a-file' is a file, so there can be no 'a-file/x'" in refused(
        "report", "--out", "a-file/x/page.html"
    )
    assert "argument --out: the path is empty" in refused("report", "--out=", status=2)


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="needs a file system that nobody can write to")
def test_a_folder_that_cannot_be_written_to(refused):
    assert "--out: '/proc' cannot be written to" in refused("heads", "--out", "/proc/results/here")
    assert "; name another" in refused("report", "--out", "/proc/page.html")


def test_default_folders_that_cannot_be_written_to(monkeypatch, capsys):
    Path("runs").touch()
    monkeypatch.setattr("focuslens.cli.common.ModelOptions.open", lambda _: pytest.fail("the command began its work"))
    assert main(["demo"]) == 1
    assert "without --out, results go to runs/demo: 'runs' is a file" in capsys.readouterr().err
    for arguments, path in (
        (["demo", "--model", "smollm2-135m-instruct"], "runs/demo-smollm2-135m-instruct"),
        (["train"], "runs/train"),
        (["paper"], "runs/paper/demo"),
        (["helmet", "--helmet", "a-folder", "--config", "demo"], "runs/helmet/demo"),
    ):
        assert main(arguments) == 1
        assert f"without --out, results go to {path}: 'runs' is a file" in capsys.readouterr().err


@pytest.mark.parametrize("command", ["split-softmax", "steer", "train", "generate", "fold", "export"])
def test_a_ranking_is_checked_before_the_work(command, refused):
    assert "--heads: there is no file 'nofile.json'" in refused(command, "--out", "o", "--heads", "nofile.json")
    assert "--heads: 'a-folder' is a directory; name a file in it" in refused(
        command, "--out", "o", "--heads", "a-folder"
    )
    assert "--heads: a-file is not a ranking of heads: it is not JSON" in refused(
        command, "--out", "o", "--heads", "a-file"
    )
    Path("other.json").write_text(json.dumps({"heads": [[1, True]]}))
    said = refused(command, "--out", "o", "--heads", "other.json")
    assert "--heads: other.json is not a ranking of heads: expected JSON [[layer, head], ...]" in said
    assert "argument --heads: the path is empty" in refused(command, "--out", "o", "--heads", "", status=2)


@pytest.mark.parametrize(
    ("command", "arguments", "message"),
    [
        ("heads", ["--data", "nofile"], "--data: there is no file 'nofile'; the multi-document QA files come from"),
        ("heads", ["--data", "a-folder"], "--data: 'a-folder' is a directory; name a file in it"),
        ("heads", ["--data", "a-file"], "--data: a-file is empty; it must hold one JSON object per line"),
        ("harness", ["--data", "other", "--out", "o"], "--data: other, line 1: "),
        ("report", ["--data", "nofile"], "--data: there is no file 'nofile'"),
        ("paper", ["--data", "nofile"], "--data: there is no file 'nofile'"),
        ("paper", ["--haystack", "nowhere"], "--haystack: there is no directory 'nowhere'"),
        ("paper", ["--haystack", "a-file"], "--haystack: 'a-file' is a file; name a directory"),
        ("paper", ["--model", "nofile.yaml"], "--model: there is no file 'nofile.yaml'"),
        ("heads", ["--model", "./nowhere"], "--model: there is no directory './nowhere'; a model is a local directory"),
        ("heads", ["--model", "a-folder"], "--model: the directory 'a-folder' holds no config.json"),
        ("generate", ["--directions", "a-file"], "--directions: 'a-file' is a file; name the directory that holds it"),
        (
            "generate",
            ["--directions", "./no"],
            "--directions: there is no directory './no'; directions are a directory",
        ),
        ("helmet", ["--directions", "no"], "--directions: there is no directory 'no'"),
        ("helmet", ["--ranking", "nofile"], "--ranking: there is no file 'nofile'"),
        ("helmet make-recall", ["--out", "o", "--haystack", "no"], "--haystack: there is no directory 'no'"),
    ],
)
def test_an_input_is_checked_before_the_work(command, arguments, message, refused):
    Path("other").write_text("not JSON\n")
    assert message in refused(command, *arguments)


def test_other_inputs_are_checked_before_the_model_is_opened(monkeypatch, capsys):
    monkeypatch.setattr("focuslens.cli.common.ModelOptions.open", lambda _: pytest.fail("the command began its work"))
    assert main(["generate", "--prompt", "@nofile"]) == 1
    assert "--prompt: there is no file 'nofile'" in capsys.readouterr().err
    assert main(["helmet", "--helmet", "nowhere", "--config", "demo"]) == 1
    assert "nowhere is not a folder, so it is not a checkout of HELMET" in capsys.readouterr().err
    assert main(["published", "nowhere"]) == 1
    assert "DIR: there is no directory 'nowhere'" in capsys.readouterr().err
    # Directions in another format are refused before the model is opened.
    assert main(["generate", "--sample", "0", "--directions", "a-folder"]) == 1
    assert "a-folder holds no directions.safetensors" in capsys.readouterr().err


def test_paths_that_can_be_used_pass(tmp_path):
    data = write(tmp_path / "oracle.jsonl", [oracle_record(0)])
    Path("heads.json").write_text("[[0, 1]]")
    given = ["steer", "--directions", "user/name", "--heads", "heads.json", "--data", str(data), "--out", "new/folder"]
    from focuslens.cli.paths import check_paths

    check_paths(_parser().parse_args(given))
    check_paths(_parser().parse_args(["heads", "--out", "."]))
    assert not Path("new").exists()
    assert options.path(".") == Path()


@pytest.mark.parametrize("buffered", [True, False])
@pytest.mark.parametrize("arguments", ["--help", "--version", "steer --help", "--print-completion bash", "nothing", ""])
def test_a_closed_pipe_ends_a_command_quietly(arguments, buffered):
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONUNBUFFERED"}
    reader, writer = os.pipe()
    os.close(reader)
    stdout, stderr = (subprocess.PIPE, writer) if arguments == "nothing" else (writer, subprocess.PIPE)
    command = [sys.executable, *([] if buffered else ["-u"]), "-m", "focuslens", *arguments.split()]
    run = subprocess.run(command, stdout=stdout, stderr=stderr, env=environment, text=True)
    os.close(writer)
    assert (run.returncode, run.stdout or "", run.stderr or "") == (141, "", "")


def test_a_closed_pipe_while_a_command_runs(monkeypatch, capfd):
    def print_results(*_: object) -> None:
        raise BrokenPipeError(32, "Broken pipe")

    monkeypatch.setattr(output, "carry_out", print_results)
    assert main(["heads"]) == 1  # both streams have readers, so another pipe broke
    assert re.match(r"focuslens heads: a connection to another process broke \(.*Broken pipe\)", capfd.readouterr().err)
    monkeypatch.setattr(output, "_is_closed", lambda stream: stream is sys.stdout)
    assert main(["heads"]) == 141
    assert capfd.readouterr().err == ""
