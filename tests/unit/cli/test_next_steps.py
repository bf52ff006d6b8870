"""The command that each command names at its end: it can be pasted, and it can run."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from focuslens.cli.main import COMMANDS, _joined, _parser, main
from focuslens.cli.next_steps import next_command

WRITTEN = {"written": ["runs/a/x.json"]}


def step(line: str, **content: Any) -> str | None:
    words = _joined(shlex.split(line)[1:])
    return next_command(words, _parser().parse_args(words), content, COMMANDS)


@pytest.mark.parametrize(
    ("line", "content", "expected"),
    [
        (
            "focuslens heads --model 'my models/x' --dtype bfloat16 --case long --data q.jsonl --out runs/nq/heads -v",
            WRITTEN,
            "focuslens split-softmax --model 'my models/x' --dtype bfloat16 --data q.jsonl --heads "
            "runs/nq/heads/heads.json --out runs/nq/split-softmax",
        ),
        (
            "focuslens heads --mod=x --chat-template-arg 'a=b c' --chat-template-arg d=e --no-chat --split all",
            {},
            "focuslens split-softmax --mod=x --chat-template-arg 'a=b c' --chat-template-arg d=e --no-chat --out "
            "runs/split-softmax",
        ),
        ("focuslens split-softmax --model x --out 'my runs/s'", WRITTEN, "focuslens report 'my runs/s'"),
        (
            "focuslens split-softmax --model x --tau 0.1 --heads h.json --ray",
            {"heads": [[0, 1], [2, 3]]},
            "focuslens train --model x --heads h.json --ray --top-k 2 --out runs/directions",
        ),
        (
            "focuslens train --model x --heads h.json --top-k 2",
            {"written": ["runs/train/directions.safetensors"]},
            "focuslens steer --model x --heads h.json --directions runs/train --out runs/steer",
        ),
        ("focuslens steer --directions d --alpha -0.2,0.2 --out runs/s", WRITTEN, "focuslens report runs/s"),
        (
            "focuslens steer --model x --directions d --alpha -0.2,0.2",
            {},
            "focuslens generate --model x --directions d --sample 0",
        ),
        ("focuslens generate --model x --prompt 'a b'", {}, "focuslens heads --model x --out runs/heads"),
        (
            "focuslens generate --model x --sample 3 --split train --heads h.json",
            {"relevant": [2]},
            "focuslens generate --model x --sample 3 --split train --heads h.json --tau 0.3",
        ),
        (  # heads would be ranked on the sample itself
            "focuslens generate --model x --sample 3 --split train",
            {"relevant": [2]},
            "focuslens heads --model x --split train --out runs/heads",
        ),
        (
            "focuslens generate --model x --data q.csv --columns question=q --sample 3 --out runs/g",
            {"relevant": []},
            "focuslens attribute --model x --data q.csv --columns question=q --out runs/sources",
        ),
        (
            "focuslens generate --model x --data q.csv --sample 3 --tau 0.3",
            {"relevant": [1], "data": {"without_answers": 1}},
            "focuslens attribute --model x --data q.csv --out runs/sources",
        ),
        (
            "focuslens heads --model x --data q.csv --split all --out runs/heads",
            {"data": {"without_answers": 3}},
            "focuslens attribute --model x --data q.csv --heads runs/heads/heads.json --out runs/sources",
        ),
        (
            "focuslens train --model x --data q.csv --heads h.json --out runs/d",
            {"provenance": {"data": {"without_answers": 3}}},
            "focuslens generate --model x --data q.csv --heads h.json --directions runs/d --sample 0",
        ),
        (
            "focuslens rerank --model x --data q.csv",
            {"data": {"without_relevant": 3}},
            "focuslens attribute --model x --data q.csv --out runs/sources",
        ),
        (
            "focuslens rerank --model x --data q.csv --heads h.json",
            {"data": {"without_answers": 3}},
            "focuslens attribute --model x --data q.csv --heads h.json --out runs/sources",
        ),
        (
            "focuslens generate --model x --sample 3 --tau 0.3",
            {},
            "focuslens split-softmax --model x --out runs/split-softmax",
        ),
        ("focuslens rerank --model x --select ndcg", {}, "focuslens heads --model x --out runs/heads"),
        ("focuslens demo", WRITTEN, "focuslens demo --model smollm2-135m-instruct"),
        (
            "focuslens demo --model x",
            {"written": ["runs/demo-x/results.json"]},
            "focuslens heads --model x --data passages --documents 10 --distractors bm25 --out runs/heads",
        ),
        ("focuslens paper --out p", WRITTEN, "focuslens report p"),
        (
            "focuslens fold --model x --directions d --alpha 1 --out steered",
            WRITTEN,
            "focuslens generate --model steered --sample 0",
        ),
        ("focuslens harness --out t", WRITTEN, None),  # it prints a command of lm-eval itself
        ("focuslens models --fetch gemma-3-270m", {}, "focuslens demo --model gemma-3-270m"),
        ("focuslens watch .", {}, "focuslens report ."),
        ("focuslens watch nowhere/at/all", {}, None),
    ],
)
def test_the_next_command_has_the_users_own_options(line, content, expected):
    found = step(line, **content)
    assert found == expected
    if expected is not None:
        _parser().parse_args(_joined(shlex.split(expected)[1:]))


@pytest.mark.parametrize("site", ["rotary", "projection"])
@pytest.mark.parametrize("has_code", [True, False])
def test_an_exported_checkpoint_is_opened_with_its_code(site, has_code, tmp_path):
    """An export at the projection site has code too, unless the family can be folded."""
    config = {"model_type": "phi3", **({"auto_map": {}} if has_code else {})}
    (tmp_path / "config.json").write_text(json.dumps(config))
    line = f"focuslens export --model x --directions d --alpha 1 --site {site} --out {tmp_path}"
    code = " --trust-remote-code" if has_code else ""
    assert step(line, **WRITTEN) == f"focuslens generate --model {tmp_path}{code} --sample 0"


def test_a_report_is_opened():
    found = shlex.split(step("focuslens report runs", written=["my runs/report.html"]) or "")
    assert found[1:] == ["-m", "webbrowser", "-t", "my runs/report.html"]


def test_the_next_command_is_the_last_line_and_runs(tmp_path: Path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    small = ["--samples", "2", "--documents", "2", "--gold-positions", "0", "--max-new-tokens", "3", "--device", "cpu"]
    assert main(["heads", *small, "--out", "my runs/heads"]) == 0
    line = capsys.readouterr().err.splitlines()[-1]
    assert line.startswith("next: focuslens split-softmax --samples 2 ")
    assert line.endswith("--heads 'my runs/heads/heads.json' --out 'my runs/split-softmax'")
    assert main([*shlex.split(line)[2:], "--tau", "0.1", "--k", "1", "--quiet"]) == 0
    assert (tmp_path / "my runs/split-softmax/split_softmax.json").is_file()
    assert "next:" not in capsys.readouterr().err


ROWS = [{"question": f"what is {i}?", "documents": [f"river {i}", "a stone"]} for i in range(4)]


@pytest.mark.parametrize(
    ("command", "more", "steps"),
    [
        (["generate", "--sample", "0"], {}, ["attribute"]),
        (["generate", "--sample", "0", "--split", "all"], {"relevant": 0}, ["heads", "attribute"]),
        (["train", "--epochs", "1"], {"relevant": 0}, ["generate", "attribute"]),
    ],
)
def test_the_next_commands_on_a_table_without_answers_run(
    command: list[str], more: dict[str, int], steps: list[str], checkpoint: Any, tmp_path: Path, monkeypatch, capsys
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("own.jsonl").write_text("".join(json.dumps({**row, **more}) + "\n" for row in ROWS))
    Path("ranking.json").write_text(json.dumps({"heads": [[2, 1], [0, 3]]}))
    small = ["--model", str(checkpoint("llama")), "--data", "own.jsonl", "--max-new-tokens", "3", "--device", "cpu"]
    heads = [] if "--split" in command else ["--heads", "ranking.json"]
    assert main([*command, *small, *heads]) == 0
    for name in steps:
        words = shlex.split(capsys.readouterr().err.splitlines()[-1])
        assert words[:3] == ["next:", "focuslens", name]
        assert main(words[2:]) == 0
