"""Options, output and files of the command, on a tiny checkpoint and on the embedded model."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch

import focuslens as fl
from focuslens.cli import main as cli
from focuslens.cli.main import main
from focuslens.prompts.sample import prompts_digest
from focuslens.util import record_file
from tests.support.tiers import first_quick

COMMANDS = ("demo", "heads", "split-softmax", "train", "steer", "generate")


@pytest.fixture(autouse=True)
def _closed_figures():
    """Close the figures of each command, because pyplot keeps them open."""
    yield
    plt.close("all")


@pytest.fixture
def tiny_checkpoint(checkpoint):
    """Directory of a random Llama with grouped queries."""
    return checkpoint("llama")


@pytest.fixture
def small(tiny_checkpoint, oracle_file):
    """Options for a quick run of any command."""
    return [
        "--model", str(tiny_checkpoint), "--data", str(oracle_file), "--documents", "3", "--gold-positions", "0,2",
        "--samples", "2", "--max-new-tokens", "4", "--batch-tokens", "600",
    ]  # fmt: skip


@pytest.fixture(scope="session")
def oracle_file(tmp_path_factory):
    """Synthetic questions in the format of the oracle file."""
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
    of_others = () if command == "demo" else ("--model", "--data")
    for option in (*of_others, "--device", "--dtype", "--seed", "--out", f"example: focuslens {command}"):
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
    train, test = fl.load_multidoc(small[3], num_documents=3, gold_positions=[0, 2]).split(seed=42)
    chosen = train.sample(2, 42)
    assert result["samples"] == [sample.id for sample in chosen]
    assert not set(result["samples"]) & {sample.id for sample in test}
    assert result["data"]["prompts_sha256"] == prompts_digest(chosen)
    assert (tmp_path / "head_map.png").read_bytes().startswith(b"\x89PNG")


def test_heads_shows_the_chance_level_and_can_rank_by_the_excess(small, tmp_path, capsys):
    assert main(["heads", *small, "--out", str(tmp_path / "raw"), "--top", "3"]) == 0
    printed = capsys.readouterr().out
    raw = json.loads((tmp_path / "raw" / "heads.json").read_text())
    for row in raw["scores"]:
        assert row["excess"] == pytest.approx(row["relevant"] - row["chance"], abs=1e-6)
    assert len({row["chance"] for row in raw["scores"]}) == 1  # no layer has a window
    assert raw["chance"]["row"] == pytest.approx(raw["scores"][0]["chance"], abs=1e-6)
    assert raw["chance"]["row"] < raw["chance"]["documents"] < 1
    assert f"would give the relevant document {raw['chance']['row']:.3f} of a row" in printed
    assert [row["count"] for row in raw["sparsity_of_excess"]] == [
        sum(row["excess"] > threshold for row in raw["scores"]) for threshold in (0.2, 0.1, 0.05)
    ]
    best = f"{raw['heads'][0][0]}/{raw['heads'][0][1]}"
    low, high = raw["excess_intervals"][best]
    assert low - 1e-6 <= raw["scores"][0]["excess"] <= high + 1e-6
    assert "ranked_by" not in raw
    for by in ("excess", "document-excess"):
        assert main(["heads", *small, "--out", str(tmp_path / by), "--top", "3", "--by", by]) == 0
        result, name = json.loads((tmp_path / by / "heads.json").read_text()), by.replace("-", "_")
        assert result["ranked_by"] == name
        assert [row[name] for row in result["scores"]] == sorted((row[name] for row in raw["scores"]), reverse=True)
        assert [[row["layer"], row["head"]] for row in result["scores"]] == result["heads"]
        assert fl.load_ranking(tmp_path / by / "heads.json") == [tuple(head) for head in result["heads"]]


def test_heads_of_windows_are_marked_and_left_out(checkpoint, oracle_file, tmp_path, capsys):
    options = ["--model", str(checkpoint("qwen2_window")), "--data", str(oracle_file), "--documents", "3"]
    options += ["--gold-positions", "0,2", "--samples", "1", "--max-new-tokens", "2"]
    assert main(["heads", *options, "--out", str(tmp_path)]) == 0
    assert "window 24" in capsys.readouterr().out
    result = json.loads((tmp_path / "heads.json").read_text())
    assert result["kinds"] == ["full", "window 24", "window 24"]
    assert len(result["heads"]) == 12
    assert main(["heads", *options, "--out", str(tmp_path / "whole"), "--whole-prompt"]) == 0
    assert "window 24" not in capsys.readouterr().out
    seeing = json.loads((tmp_path / "whole" / "heads.json").read_text())["heads"]
    assert seeing == [head for head in result["heads"] if head[0] == 0]
    none = ["--model", str(checkpoint("mistral_window")), *options[2:]]
    assert main(["heads", *none, "--whole-prompt"]) == 1
    assert "--whole-prompt leaves no head" in capsys.readouterr().err


def test_documents_are_fewer_where_the_context_is_short(tiny_checkpoint, oracle_file, capsys):
    common = ["--model", str(tiny_checkpoint), "--data", str(oracle_file), "--samples", "1", "--max-new-tokens", "2"]
    assert main(["heads", *common, "--split", "all", "--n-ctx", "220"]) == 0
    assert "do not fit the model's context of 220 tokens" in capsys.readouterr().err
    assert main(["heads", *common, "--split", "all", "--n-ctx", "20"]) == 1
    assert "prompts of one document" in capsys.readouterr().err


def test_the_budget_of_a_batch_reaches_training(small, tmp_path, capsys, monkeypatch):
    assert main(["heads", *small, "--out", str(tmp_path)]) == 0
    heads = ["--heads", str(tmp_path / "heads.json"), "--top-k", "1", "--out", str(tmp_path / "directions")]

    def refuse(max_new_tokens, batch_tokens, progress):
        raise ValueError(f"a budget of {batch_tokens}")

    monkeypatch.setattr("focuslens.directions.training.RunOptions", refuse)
    assert main(["train", *small, *heads, "--batch-tokens", "77"]) == 1
    assert "a budget of 77" in capsys.readouterr().err


def test_train_then_steer_then_generate(small, tmp_path, capsys):
    directions = tmp_path / "directions"
    assert main(["train", *small, "--top-k", "3", "--epochs", "2", "--out", str(directions)]) == 0
    assert (directions / "directions.safetensors").exists()
    assert not (directions / "checkpoint.pt").exists()
    out = tmp_path / "steer"
    steer = ["steer", *small, "--directions", str(directions), "--alpha=-20,20", "--k", "1,3", "--out", str(out)]
    assert main(steer) == 0
    result = json.loads((out / "steering.json").read_text())
    assert [row["name"] for row in result["settings"]] == [
        "baseline",
        *(f"steering alpha={alpha} k={k}" for alpha in (-20, 20) for k in (1, 3)),
    ]
    header, *records = [json.loads(line) for line in (out / "steering.jsonl").read_text().splitlines()]
    assert result["data"] == header["header"]["data"]
    scored_on = result["ranking"]["scored_on"]
    train, test = fl.load_multidoc(small[3], num_documents=3, gold_positions=[0, 2]).split(seed=42)
    assert {record["id"] for record in records} == {sample.id for sample in test.sample(2, 42)}
    assert scored_on["prompts_sha256"] == prompts_digest(train.sample(2, 42)) != result["data"]["prompts_sha256"]
    before = (out / "steering.jsonl").read_bytes()
    assert main(steer) == 0  # resumes with nothing left to run
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
        (["steer", "--directions", "no/such"], "no/such"),
    ],
)
def test_what_cannot_be_done_is_said_in_one_line_with_status_1(options, message, tiny_checkpoint, capsys):
    model = [] if "--model" in options else ["--model", str(tiny_checkpoint)]
    assert main([*options, *model]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert "Traceback" not in error


@pytest.fixture
def directions(tmp_path):
    """Directory of random directions for two heads of the tiny checkpoint."""
    return str(fl.FocusDirections([(1, 0), (2, 1)], torch.randn(2, 16)).save(tmp_path / "random-directions"))


@pytest.mark.parametrize(
    "error",
    [
        MemoryError("memory ran out on a single prompt of 7,000 tokens (no room)"),
        torch.OutOfMemoryError("CUDA out of memory.\nTried to allocate 2.00 GiB"),
        RuntimeError("MPS backend out of memory"),
        MemoryError(),
    ],
)
def test_memory_that_runs_out_is_said_in_one_line_with_status_1(error, monkeypatch, capsys):
    def run(args):
        raise error

    monkeypatch.setattr(cli, "_run", run)
    assert main(["heads"]) == 1
    said = capsys.readouterr().err
    assert said.count("\n") == 1
    assert said.startswith("focuslens heads: " + (" ".join(str(error).split()) or "memory ran out"))
    assert "; shorter prompts and --dtype bfloat16 need less" in said


def test_a_defect_is_not_taken_for_memory_that_ran_out(monkeypatch):
    def run(args):
        raise RuntimeError("shapes do not match")

    monkeypatch.setattr(cli, "_run", run)
    with pytest.raises(RuntimeError, match="shapes do not match"):
        main(["heads"])


def test_help_version_and_completion_need_no_torch():
    code = (
        "import sys\n"
        "from contextlib import suppress\n"
        "from focuslens.cli.main import main\n"
        "main(['--version']), main([])\n"
        "for arguments in (['heads', '--help'], ['--print-completion', 'bash']):\n"
        "    with suppress(SystemExit):\n"
        "        main(arguments)\n"
        "heavy = {'torch', 'transformers', 'transformer_lens', 'pandas'} & sys.modules.keys()\n"
        "sys.exit(f'imported: {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_options_of_train_reach_the_training(small, tmp_path):
    (tmp_path / "heads.json").write_text("[[2, 1], [0, 3], [1, 0]]")
    options = ["--heads", str(tmp_path / "heads.json"), "--top-k", "2", "--out", str(tmp_path)]
    options += ["--epochs", "3", "--learning-rate", "0.02", "--site", "projection", "--prompts", "gold", "--seed", "7"]
    assert main(["train", *small, *options]) == 0
    written = json.loads((tmp_path / "directions.json").read_text())
    expected = {"epochs": 3, "learning_rate": 0.02, "site": "projection", "prompts": "gold", "seed": 7}
    assert expected.items() <= written["provenance"]["settings"].items()
    assert len(written["provenance"]["losses"]) == 3
    assert written["site"] == "projection"
    assert written["heads"] == [[2, 1], [0, 3]]


@pytest.mark.parametrize("objective", ["score", "answer"])
def test_the_rank_and_the_objective_reach_the_training(objective, small, tmp_path, capsys):
    (tmp_path / "heads.json").write_text("[[2, 1], [0, 3]]")
    options = ["--heads", str(tmp_path / "heads.json"), "--epochs", "2", "--learning-rate", "0.05"]
    options += ["--rank", "2", "--objective", objective, "--out", str(tmp_path / "out")]
    assert main(["train", *small, *options]) == 0
    made = fl.FocusDirections.load(tmp_path / "out")
    assert (made.rank, made.provenance["settings"]["objective"]) == (2, objective)
    printed = capsys.readouterr().out
    if objective == "answer":
        first, last = made.provenance["answer_losses"]
        assert f"loss per response token in the first and last epoch of training: {first:.3f} -> {last:.3f}" in printed
    else:
        assert "relevant contextual score in the first and last epoch" in printed
    directions = ["--directions", str(tmp_path / "out"), "--alpha", "1", "--k", "2"]
    assert main(["steer", *small, *directions]) == 0
    assert main(["report", str(tmp_path / "out")]) == 0


def test_the_memory_for_activations_reaches_the_training(small, tmp_path, monkeypatch):
    asked = []

    def stop(*args, memory_gb, **settings):
        asked.append(memory_gb)
        raise KeyboardInterrupt

    monkeypatch.setattr("focuslens.directions.training.train_focus_directions", stop)
    train = ["train", *small, "--out", str(tmp_path)]
    assert main([*train, "--memory-gb", "0.5"]) == main(train) == 130
    assert asked == [0.5, 4.0]


@pytest.mark.parametrize(
    ("command", "killed_at"),
    first_quick([("heads", 2), ("split-softmax", 4), ("train", 2), ("train", 4), ("split-softmax", 2)], 2),
)
def test_an_interrupted_command_goes_on_where_it_was(command, killed_at, small, tmp_path, capsys, monkeypatch):
    options = {"train": ["--top-k", "2", "--epochs", "1"], "split-softmax": ["--tau", "0.1", "--k", "1"]}
    asked = [command, *small, "--batch-tokens", "1", *options.get(command, [])]
    assert main([*asked, "--out", str(tmp_path / "whole")]) == 0
    decode, decoded = fl.FocusModel.decode, []

    def dying(self, *args, **settings):
        decoded.append(1)
        if len(decoded) == fatal:
            raise KeyboardInterrupt
        return decode(self, *args, **settings)

    monkeypatch.setattr(fl.FocusModel, "decode", dying)
    monkeypatch.setattr(record_file, "_PART_SECONDS", 0.0)
    fatal = 10**6
    assert main([*asked, "--out", str(tmp_path / "counted")]) == 0
    needed, fatal = len(decoded), killed_at
    decoded.clear()
    assert main([*asked, "--out", str(tmp_path / "killed")]) == 130
    assert capsys.readouterr().err.endswith(f"focuslens {command}: interrupted; the same command resumes here\n")
    fatal = 10**6
    assert main([*asked, "--out", str(tmp_path / "killed")]) == 0
    assert len(decoded) == needed + 1  # what was finished is not run again
    files = [sorted(path.name for path in (tmp_path / name).iterdir()) for name in ("whole", "killed")]
    assert files[0] == files[1]
    for name in files[0]:
        if not name.endswith(".png"):
            assert (tmp_path / "whole" / name).read_bytes() == (tmp_path / "killed" / name).read_bytes(), name


def test_what_an_interruption_means_without_a_directory(small, capsys, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr(fl.FocusModel, "decode", interrupted)
    assert main(["heads", *small]) == 130
    assert "nothing was written. With --out, an interrupted command can be resumed" in capsys.readouterr().err


def test_directions_say_what_chose_their_heads(small, tmp_path):
    ranking = tmp_path / "heads.json"
    ranking.write_text("[[2, 1], [0, 3], [1, 0]]")
    written = []
    for options in (["--heads", str(ranking)], ["--top-k", "1"]):
        assert main(["train", *small, *options, "--epochs", "1", "--out", str(tmp_path)]) == 0
        written.append(json.loads((tmp_path / "directions.json").read_text()))
    from_file, scored = (one["provenance"]["ranking"] for one in written)
    assert from_file == {"file": "heads.json", "sha256": hashlib.sha256(ranking.read_bytes()).hexdigest()}
    assert written[0]["heads"] == [[2, 1], [0, 3], [1, 0]]
    assert scored["scored_on"]["prompts_sha256"] == written[1]["provenance"]["data"]["prompts_sha256"]


def test_where_all_heads_are_trained_none_is_scored_and_the_best_are_printed(small, tmp_path, monkeypatch, capsys):
    def score(*args):
        raise AssertionError("heads were scored")

    monkeypatch.setattr("focuslens.cli.rankings.score_samples", score)
    monkeypatch.setattr("focuslens.cli.train._PRINTED", 4)
    assert main(["train", *small, "--epochs", "2", "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "directions.json").read_text())
    assert written["heads"] == [[layer, head] for layer in range(3) for head in range(4)]
    assert written["provenance"]["ranking"] == {"all_heads": 12}
    last = {f"L{layer}H{head}": -loss for (layer, head), loss in zip(*losses_of(written), strict=True)}
    printed = [line.split() for line in capsys.readouterr().out.splitlines() if line.startswith("  L")]
    assert [line[0] for line in printed] == sorted(last, key=lambda head: -last[head])[:4]
    assert [line[-1] for line in printed] == [f"{last[line[0]]:.3f}" for line in printed]


def losses_of(written):
    return written["heads"], written["provenance"]["losses"][-1]


def test_the_positions_that_are_steered_are_those_asked_for(small, directions, tmp_path):
    options = ["--directions", directions, "--alpha", "1", "--k", "1", "--out", str(tmp_path)]
    for positions, given in (("response", ["--positions", "response"]), ("all", [])):
        assert main(["steer", *small, *options, *given]) == 0
        header = json.loads((tmp_path / "steering.jsonl").read_text().splitlines()[0])["header"]
        assert header["settings"][1]["interventions"][0]["positions"] == positions
        (tmp_path / "steering.jsonl").unlink()


def test_generate_writes_its_responses_and_what_made_them(small, directions, tmp_path, capsys):
    options = ["--sample", "1", "--directions", directions, "--tau", "0.3", "--out", str(tmp_path)]
    assert main(["generate", *small, *options, "--alpha", "20", "--top-k", "2"]) == 0
    written = json.loads((tmp_path / "generate.json").read_text())
    sample = fl.load_multidoc(small[3], num_documents=3, gold_positions=[0, 2]).split(seed=42)[1].sample(2, 42)[1]
    assert (written["sample"], written["case"], written["answers"]) == (sample.id, "long", list(sample.answers))
    assert {"command", "model", "data", "seed", "versions"} <= written.keys()
    names = ["baseline", "split-softmax tau=0.3 k=2", "steering alpha=20 k=2"]
    assert [one["name"] for one in written["responses"]] == names
    printed = capsys.readouterr().out
    for one in written["responses"]:
        assert one["correct"] == fl.sub_exact_match(one["response"], sample.answers)
        assert f"{one['name']} [{'right' if one['correct'] else 'wrong'}]: {one['response']}" in printed
    baseline, split, steered = written["responses"]
    assert (baseline["interventions"], baseline["ranking"]) == ([], None)
    assert split["interventions"][0]["tau"] == 0.3
    assert steered["interventions"][0]["alpha"] == 20
    assert "scored_on" in split["ranking"]


def test_generate_steers_by_a_fifth_and_all_heads_that_there_are_unless_it_is_told(small, directions, tmp_path):
    assert main(["generate", *small, "--sample", "0", "--directions", directions, "--out", str(tmp_path)]) == 0
    steered = json.loads((tmp_path / "generate.json").read_text())["responses"][1]
    assert steered["name"] == "steering alpha=0.2 k=2"
    assert steered["interventions"][0]["alpha"] == 0.2
    assert sorted(steered["interventions"][0]["heads"]) == [[1, 0], [2, 1]]


def test_generate_writes_the_prompt_where_there_is_no_sample(tiny_checkpoint, tmp_path):
    options = ["--model", str(tiny_checkpoint), "--max-new-tokens", "3", "--prompt", "Who is it?"]
    assert main(["generate", *options, "--out", str(tmp_path)]) == 0
    written = json.loads((tmp_path / "generate.json").read_text())
    assert (written["prompt"], written["data"]) == ("Who is it?", None)
    assert [(one["name"], one["correct"]) for one in written["responses"]] == [("baseline", None)]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("x=false", False),
        ("x=null", None),
        ("x=3", 3),
        ('x=["a"]', ["a"]),
        ("x=26 Jul 2024", "26 Jul 2024"),
        ("x=", ""),
    ],
)
def test_values_of_the_chat_template_are_json_or_text(text: str, value: Any) -> None:
    from focuslens.cli.options import chat_argument

    assert chat_argument(text) == ("x", value)
