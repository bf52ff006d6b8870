"""The command: options, output and files, on a tiny checkpoint and on the embedded model."""

from __future__ import annotations

import json

import pytest

from focuslens.cli import main

COMMANDS = ("demo", "heads", "split-softmax", "train", "steer", "generate")


@pytest.fixture
def tiny_checkpoint(checkpoint):
    """A random grouped-query Llama."""
    return checkpoint("llama")


@pytest.fixture
def small(tiny_checkpoint, oracle_file):
    """Options that make any command quick."""
    return [
        "--model", str(tiny_checkpoint), "--data", str(oracle_file), "--documents", "3", "--gold-positions", "0,2",
        "--samples", "2", "--max-new-tokens", "4", "--batch-tokens", "600",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def oracle_file(tmp_path_factory):
    """Questions in the form of the oracle file."""
    path = tmp_path_factory.mktemp("data") / "oracle.jsonl"
    lines = []
    for i in range(48):
        gold = {"title": f"Town {i}", "text": f"The mayor of town {i} is Person{i}.", "hasanswer": True, "isgold": True}
        lines.append(json.dumps({"question": f"who is mayor of town {i}", "answers": [f"Person{i}"], "ctxs": [gold]}))
    path.write_text("\n".join(lines) + "\n")
    return path


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_explains_itself_with_an_example(command, capsys):
    with pytest.raises(SystemExit) as stop:
        main([command, "--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0
    for option in ("--model", "--data", "--device", "--dtype", "--seed", "--out", f"example: focuslens {command}"):
        assert option in text


def test_without_a_command_the_help_is_shown_and_the_status_is_2(capsys):
    assert main([]) == 2
    text = capsys.readouterr().out
    assert all(command in text for command in COMMANDS)
    assert main(["--version"]) == 0
    assert capsys.readouterr().out.startswith("focuslens 0.")


def test_heads_prints_four_scores_and_sparsity_and_writes_them(small, tmp_path, capsys):
    assert main(["heads", *small, "--out", str(tmp_path), "--top", "3"]) == 0
    printed = capsys.readouterr().out
    for word in ("relevant", "irrelevant", "irrelevant_max", "sink", "> 0.2:", "> 0.1:", "> 0.05:"):
        assert word in printed
    result = json.loads((tmp_path / "heads.json").read_text())
    assert len(result["heads"]) == len(result["scores"])
    assert result["scores"][0]["relevant"] == max(row["relevant"] for row in result["scores"])
    assert result["data"]["num_documents"] == 3
    assert {"model", "data", "seed", "versions"} <= result.keys()
    assert (tmp_path / "head_map.png").read_bytes().startswith(b"\x89PNG")


def test_documents_are_fewer_where_the_context_is_short(tiny_checkpoint, oracle_file, capsys):
    common = ["--model", str(tiny_checkpoint), "--data", str(oracle_file), "--samples", "1", "--max-new-tokens", "2"]
    assert main(["heads", *common, "--split", "all", "--n-ctx", "220"]) == 0
    assert "do not fit the model's context of 220 tokens" in capsys.readouterr().out
    assert main(["heads", *common, "--split", "all", "--n-ctx", "20"]) == 1
    assert "prompts of one document" in capsys.readouterr().err


def test_the_budget_of_a_batch_reaches_training(small, tmp_path, capsys):
    assert main(["heads", *small, "--out", str(tmp_path)]) == 0
    heads = ["--heads", str(tmp_path / "heads.json"), "--top-k", "1", "--out", str(tmp_path / "directions")]
    assert main(["train", *small, *heads, "--batch-tokens", "0"]) == 1
    assert "batch_tokens is 0" in capsys.readouterr().err


def test_train_then_steer_then_generate(small, tmp_path, capsys):
    directions = tmp_path / "directions"
    assert main(["train", *small, "--top-k", "3", "--epochs", "2", "--out", str(directions)]) == 0
    assert (directions / "directions.safetensors").exists()
    assert not (directions / "checkpoint.pt").exists()
    out = tmp_path / "steer"
    steer = ["steer", *small, "--directions", str(directions), "--alpha=-20,20", "--k", "1,3", "--out", str(out)]
    assert main(steer) == 0
    rows = json.loads((out / "steering.json").read_text())["settings"]
    assert [row["name"] for row in rows] == [
        "baseline",
        *(f"steering alpha={alpha} k={k}" for alpha in (-20, 20) for k in (1, 3)),
    ]
    before = (out / "steering.jsonl").read_bytes()
    assert main(steer) == 0  # resumes with nothing to do
    assert (out / "steering.jsonl").read_bytes() == before
    capsys.readouterr()
    generate = ["generate", *small, "--sample", "1", "--directions", str(directions), "--alpha", "20", "--top-k", "3"]
    assert main([*generate, "--tau", "0.3"]) == 0
    printed = capsys.readouterr().out
    assert "baseline [" in printed
    assert "split-softmax tau=0.3 k=3 [" in printed
    assert "steering alpha=20 k=3 [" in printed


def test_split_softmax_uses_a_ranking_and_draws_random_heads_outside_it(small, tmp_path):
    ranking = tmp_path / "heads.json"
    ranking.write_text("[[1, 0], [0, 3], [2, 1]]")
    options = ["--heads", str(ranking), "--tau", "0.1,1000", "--k", "1,2", "--exclude-top", "3", "--out", str(tmp_path)]
    assert main(["split-softmax", *small, *options]) == 0
    result = json.loads((tmp_path / "split_softmax.json").read_text())
    assert result["heads"] == [[1, 0], [0, 3]]
    names = [row["name"] for row in result["settings"]]
    assert names[:3] == ["baseline", "gold", "negative"]
    assert "split-softmax random tau=0.3 k=2" in names
    header = json.loads((tmp_path / "split_softmax.jsonl").read_text().splitlines()[0])["header"]
    drawn = [one["interventions"][0]["heads"] for one in header["settings"] if "random" in one["name"]]
    assert all(head not in [[1, 0], [0, 3], [2, 1]] for heads in drawn for head in heads)


def test_generate_answers_a_prompt_from_a_file(tiny_checkpoint, tmp_path, capsys):
    (tmp_path / "prompt.txt").write_text("Question: who is it? Answer:")
    options = ["--model", str(tiny_checkpoint), "--max-new-tokens", "3", "--prompt", f"@{tmp_path / 'prompt.txt'}"]
    assert main(["generate", *options]) == 0
    assert capsys.readouterr().out.startswith("baseline: ")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["heads", "--model", "no/such/directory"], "no/such/directory"),
        (["heads", "--data", "missing.jsonl"], "missing.jsonl"),
        (["demo", "--data", "other.jsonl"], "the demo runs the embedded model"),
        (["steer", "--directions", "no/such"], "no/such"),
        (["heads", "--dtype", "float99"], "float99"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_with_status_1(options, message, tiny_checkpoint, capsys):
    model = [] if "--model" in options or options[0] == "demo" else ["--model", str(tiny_checkpoint)]
    assert main([*options, *model]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error
