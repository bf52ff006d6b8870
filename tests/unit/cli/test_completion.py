"""Completion in a real shell.

The printed script is sourced, and its function is called in the way that the shell calls it.
"""

from __future__ import annotations

import shutil
import subprocess
import sys

import pytest
import shtab

from focuslens.cli.completion import SHELLS
from focuslens.cli.main import COMMANDS, main


def printed(shell: str, capsys: pytest.CaptureFixture[str]) -> str:
    with pytest.raises(SystemExit) as stop:
        main(["--print-completion", shell])
    assert stop.value.code == 0
    return capsys.readouterr().out


@pytest.fixture
def complete(capsys, tmp_path):
    """Function that returns bash's completions for a command line whose cursor is at the end."""
    bash = shutil.which("bash")
    if bash is None:
        pytest.skip("there is no bash")
    (tmp_path / "completion.bash").write_text(printed("bash", capsys))
    asked = (
        'source "$1"; shift; COMP_WORDS=("$@"); COMP_CWORD=$(($# - 1)); COMP_LINE="$*"; COMP_POINT=${#COMP_LINE}\n'
        "function=$(complete -p focuslens | sed -E 's/.*-F ([^ ]+).*/\\1/')\n"
        '"$function" focuslens "${COMP_WORDS[COMP_CWORD]}"\n'
        'printf "%s\\n" "${COMPREPLY[@]}"\n'
    )

    def offered(*words: str) -> list[str]:
        command = [bash, "--norc", "-c", asked, "bash", str(tmp_path / "completion.bash"), "focuslens", *words]
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
        assert done.stderr == ""
        return done.stdout.split()

    return offered


def test_bash_completes_commands(complete):
    assert set(complete("")) >= set(COMMANDS)
    assert complete("sp") == ["split-softmax"]
    assert "make-recall" in complete("helmet", "")


def test_bash_completes_the_options_of_a_command(complete):
    assert {"--model", "--data", "--directions", "--alpha", "--positions", "--json", "--quiet"} <= set(
        complete("steer", "--")
    )
    assert complete("steer", "--pos") == ["--positions"]
    assert "--directions" not in complete("heads", "--")
    assert complete("helmet", "make-recall", "--tok") == ["--tokenizer"]


def test_bash_completes_values_and_files(complete, tmp_path):
    assert complete("steer", "--positions", "") == ["all", "response"]
    assert complete("heads", "--backend", "h") == ["hooked"]
    (tmp_path / "questions.jsonl").touch()
    (tmp_path / "quarry").mkdir()
    assert complete("heads", "--data", "que") == ["questions.jsonl"]
    assert complete("heads", "--out", "qu") == ["quarry"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_every_command_and_the_options_that_all_have_are_in_each_shells_script(shell, capsys):
    script = printed(shell, capsys)
    for name in COMMANDS:
        assert name in script
    for option in ("json", "verbose", "quiet"):
        assert script.count(option) >= len(COMMANDS)


@pytest.mark.parametrize("shell", ["zsh", "fish"])
def test_the_other_shells_read_their_script(shell, capsys, tmp_path):
    binary = shutil.which(shell)
    if binary is None:
        pytest.skip(f"there is no {shell}")
    file = tmp_path / f"completion.{shell}"
    file.write_text(printed(shell, capsys))
    subprocess.run([binary, "-n", str(file)], check=True)


def test_every_command_has_a_function_to_run_and_an_example_of_its_own():
    assert len(COMMANDS) == 19
    assert len({command.run for command in COMMANDS.values()}) == 19
    for name, command in COMMANDS.items():
        assert command.example.startswith(f"focuslens {name} ")


def test_the_shells_are_those_of_the_library():
    assert list(SHELLS) == shtab.SUPPORTED_SHELLS


def test_completion_is_printed_quickly_enough_for_a_shells_start():
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "focuslens", "--print-completion", "bash"],
        capture_output=True,
        text=True,
        check=True,
    )
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "focuslens" in imported
    assert not imported & {"torch", "numpy", "pandas", "transformers", "transformer_lens"}
