"""``focuslens helmet``: the way from a stand-in checkout and a checkpoint to result tables, and recall data sets."""

from __future__ import annotations

import csv
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.cli.main import main
from focuslens.studies.helmet.steering import paper_settings, ranked_heads, require_named
from tests.support.helmet_runs import STAND_IN, write_data

HEADS = (fl.Head(2, 1), fl.Head(0, 2), fl.Head(1, 3))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_data(tmp_path / "root")


def directions_of(model: fl.FocusModel) -> fl.FocusDirections:
    shape = {name: getattr(model.shape, name) for name in ("n_layers", "n_heads", "n_key_value_heads", "d_head")}
    query = 4 * torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
    return fl.FocusDirections(HEADS, query, provenance={"model": model.description, "shape": shape})


@pytest.fixture
def options(root: Path, checkpoint: Any, load_model: Any, tmp_path: Path) -> list[str]:
    directions_of(load_model("llama")).save(tmp_path / "directions")
    named = ["--helmet", str(STAND_IN), "--config", "configs/pair.yaml", "--data", str(root), "--quiet"]
    model = ["--model", str(checkpoint("llama")), "--dtype", "float32", "--device", "cpu"]
    return ["helmet", *named, *model, "--directions", str(tmp_path / "directions"), "--out", str(tmp_path / "out")]


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def test_from_a_checkout_to_tables(options, tmp_path, capsys):
    assert main([*options, "--heads", "1,3", "--alpha", "-0.5,0.5", "--sink-heads", "2"]) == 0
    said, out = capsys.readouterr().out, tmp_path / "out"
    names = ["baseline", "1_-0.5", "1_0.5", "3_-0.5", "3_0.5"]
    assert "JSON KV under 160 tokens, 5 samples: baseline" in said
    assert "MK Needle under 120 tokens, 5 samples; HELMET cut" in said
    assert [row["setting"] for row in rows_of(out / "tables" / "tasks_160.csv")] == names
    assert list(rows_of(out / "tables" / "sink_120.csv")[0]) == ["setting", "MK Needle", "STD"]
    assert {row["column"] for row in rows_of(out / "tables" / "figures.csv")} == {
        "JSON KV", "MK Needle", "Recall", "Overall Average"
    }  # fmt: skip
    record = json.loads((out / "helmet.json").read_text())
    assert record["sink_heads"] == [[2, 1], [0, 2]]
    assert [setting["name"] for setting in record["settings"]] == names
    assert [len(setting["interventions"][0]["heads"]) for setting in record["settings"][1:]] == [1, 1, 3, 3]
    assert [setting["interventions"][0]["alpha"] for setting in record["settings"][1:]] == [-0.5, 0.5, -0.5, 0.5]
    assert {"model", "helmet", "tasks", "seed", "versions", "facts"} <= record.keys()
    page = (out / "index.html").read_text()
    assert "Tasks under 160 tokens" in page
    assert "Table 13 of arXiv 2503.23306" in page
    folder = options[options.index("--model") + 1]
    assert (out / "tables.md").read_text().startswith(f"# HELMET, on {Path(folder).name}\n")
    written = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert len(list((out / "output").rglob("*.score"))) == 10
    assert main([*options, "--heads", "1,3", "--alpha=-0.5,0.5", "--sink-heads", "2"]) == 0  # all results are reused
    again = {path: path.read_bytes() for path in out.rglob("*") if path.is_file()}
    assert again == written


def test_without_directions_only_the_baseline_is_run(options, tmp_path, capsys):
    place = options.index("--directions")
    assert main([*options[:place], *options[place + 2 :], "--tasks", "json_kv", "--max-test-samples", "2"]) == 0
    assert "JSON KV under 160 tokens, 2 samples: baseline" in capsys.readouterr().out
    assert [row["setting"] for row in rows_of(tmp_path / "out/tables/tasks_160.csv")] == ["baseline"]
    assert not (tmp_path / "out/tables/sink_160.csv").exists()


SETTINGS = """
- {name: self-focus, kind: self_focus, heads: 2, tau: {json_kv: 0.1, recall: 0.5}, window: 8}
- {name: bias, kind: logit_bias, span: context, bias: 1}
"""


def test_settings_without_a_label_have_values_by_task(options, tmp_path, capsys):
    (tmp_path / "settings.yaml").write_text(SETTINGS)
    more = ["--heads", "1", "--alpha", "JSON KV=0.5,other=-1", "--settings", str(tmp_path / "settings.yaml")]
    assert main([*options, *more]) == 0
    assert "JSON KV under 160 tokens, 5 samples: baseline" in capsys.readouterr().out
    out = tmp_path / "out"
    names = ["baseline", "1_by-task", "self-focus", "bias"]
    assert [row["setting"] for row in rows_of(out / "tables" / "tasks_160.csv")] == names
    record = json.loads((out / "helmet.json").read_text())
    assert "settings" not in record
    applied = {
        task: {setting["name"]: setting["interventions"] for setting in settings}
        for task, settings in record["settings_by_task"].items()
    }
    assert {task: own["1_by-task"][0]["alpha"] for task, own in applied.items()} == {"JSON KV": 0.5, "MK Needle": -1}
    assert {task: own["self-focus"][0]["tau"] for task, own in applied.items()} == {"JSON KV": 0.1, "MK Needle": 0.5}
    focus, bias = applied["JSON KV"]["self-focus"][0], applied["JSON KV"]["bias"][0]
    assert (focus["parts"], focus["by"], focus["heads"]) == (8, [[2, 1], [0, 2]], [[2, 1], [0, 2]])
    assert (bias["bias"], bias["span"], bias["heads"]) == (1, "context", None)
    assert record["facts"]["self-focus"] == ("JSON KV: heads 2, tau 0.1, parts 8; MK Needle: heads 2, tau 0.5, parts 8")
    assert "bias" not in record["facts"]
    (file,) = (path for path in (out / "output").rglob("json_kv*.json") if path.parent.name.endswith("-self-focus"))
    origin = json.loads(file.read_text())["focuslens"]
    assert origin["setting"] == "self-focus"
    assert next(one for one in origin["settings"] if one["name"] == "self-focus")["interventions"][0]["tau"] == 0.1


@pytest.mark.parametrize(
    ("more", "settings", "message"),
    [
        (["--alpha", "json_kv=1"], "", "there is no value for MK Needle in json_kv; name the task (ruler_niah_mk_2)"),
        (["--alpha", "colour=1"], "", "there is no task and no category 'colour'; categories are recall, rag"),
        ([], "name: a", "must be a list of settings"),
        ([], "- {name: a, kind: b}", "entry 1 has the kind 'b'; it must be one of self_focus"),
        ([], "- {kind: logit_bias}", "entry 1 has the name ''"),
        ([], "- {name: 1_0.2, kind: logit_bias}", "entry 1 has the name 10.2, which must be a text"),
        ([], "- {name: '1_0.2', kind: logit_bias, bias: 1, span: context}", "has a setting '1_0.2'"),
        ([], SETTINGS + SETTINGS, "has the name 'self-focus' twice"),
        ([], "- {name: a, kind: self_focus, heads: 9, tau: 0.1}", "heads is 9; it must be 1 to 3"),
        ([], "- {name: a, kind: self_focus, heads: 2}", "for JSON KV: give either tau"),
        (
            [],
            "- {name: a, kind: self_focus, heads: 2, tau: 1, parts: document}",
            "parts is 'document'; it must be a nu",
        ),
        ([], "- {name: a, kind: logit_bias, bias: 1}", "span is None; it must be context or question"),
        ([], "- {name: a, kind: logit_bias, bias: {red: 1}, span: context}", "no category 'red'"),
        ([], "- {name: a, kind: logit_bias, bias: 1, colour: 1, span: context}", "colour"),
        ([], "- [", "is not a YAML file"),
    ],
)
def test_a_wrong_settings_file_is_refused(more, settings, message, options, tmp_path, capsys):
    if settings:
        (tmp_path / "settings.yaml").write_text(settings)
        more = [*more, "--settings", str(tmp_path / "settings.yaml")]
    assert main([*options, "--heads", "1", *more]) == 1
    assert message in capsys.readouterr().err


def test_a_number_of_heads_needs_a_ranking(options, tmp_path, capsys):
    (tmp_path / "settings.yaml").write_text(SETTINGS)
    place = options.index("--directions")
    few = [*options[:place], *options[place + 2 :], "--settings", str(tmp_path / "settings.yaml")]
    assert main(few) == 1
    assert "heads is 2, a number of best heads; give --ranking" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (["--helmet", "nowhere"], "nowhere is not a folder, so it is not a checkout of HELMET: git clone"),
        (["--config", "configs/no.yaml"], "there is no configuration configs/no.yaml"),
        (["--data", "nowhere"], "the data of json_kv are missing: there is no data/pairs.jsonl in"),
        (["--tasks", "json"], "there is no task 'json'; the paper's tasks begin with"),
        (["--n-ctx", "110"], "--n-ctx 1"),
        (["--heads", "10"], "k is 10; it must be 1 to 3"),
        (["--directions", "nowhere"], "there is no directory 'nowhere'"),
        (["--helmet-arg", "colour=red"], "unrecognized arguments: --colour=red"),
        (["--helmet-arg", "do_sample=True"], "do_sample = True is not supported"),
        (["--config", "demo", "configs/pair.yaml"], "--config demo generates its data"),
        (["--sink-heads", "-1"], "--sink-heads is -1"),
        (["--heads", "2,2"], "--heads has a number twice: 2,2"),
        (["--alpha", "0.2,0.5,0.2"], "--alpha has a number twice: 0.2,0.5,0.2"),
        (["--use-chat-template", "True"], "--use-chat-template False"),
        (["--ray-workers", "2"], "--ray-workers 2 needs --ray"),
    ],
)
def test_what_is_wrong_is_named_with_the_remedy(more, message, options, capsys):
    assert main([*options, *more]) == 1
    assert message in capsys.readouterr().err


def test_a_checkout_and_a_configuration_must_be_named(capsys):
    assert main(["helmet", "--model", "demo"]) == 1
    assert "name a checkout of princeton-nlp/HELMET with --helmet" in capsys.readouterr().err


def test_directions_of_another_model_act_when_it_is_named(options, checkpoint, capsys):
    options[options.index("--model") + 1] = str(checkpoint("llama_bias"))
    assert main(options) == 1
    said = capsys.readouterr().err
    assert "to use them all the same, give --directions-of" in said
    assert "the directions belong to the model llama0" in said
    assert main([*options, "--directions-of", "someone/else"]) == 1
    assert "--directions-of names 'someone/else'" in capsys.readouterr().err
    few = ["--tasks", "json_kv", "--max-test-samples", "1", "--alpha", "0.2"]
    assert main([*options, "--directions-of", "llama0", *few]) == 0


def test_directions_of_another_directory_of_the_same_name_are_refused(load_model):
    one, other = load_model("llama"), load_model("llama_bias")
    first, second = (fl.FocusModel(model.hooked, model.tokenizer, name="checkpoint-100") for model in (one, other))
    directions = fl.FocusDirections([(0, 1)], torch.randn(1, 16), provenance={"model": first.description})
    require_named(directions, first, None)
    with pytest.raises(ValueError, match="the directions belong to the model checkpoint-100"):
        require_named(directions, second, None)
    require_named(directions, second, "checkpoint-100")


def test_published_directions_need_a_ranking_and_know_their_model_by_name(load_model):
    model = load_model("llama")
    query = torch.randn(12, 16)
    every = [fl.Head(layer, head) for layer in range(3) for head in range(4)]
    published = fl.FocusDirections(every, query, provenance={"source": "published files, owner_Some-Model-Instruct"})
    with pytest.raises(ValueError, match=r"name a ranking with --ranking.*relevant_heads.json"):
        ranked_heads(published, None)
    assert ranked_heads(published, [fl.Head(7, 0), *HEADS]) == list(HEADS)
    with pytest.raises(ValueError, match="share no head"):
        ranked_heads(published, [fl.Head(7, 0)])
    with pytest.raises(
        ValueError, match=r"belong to the model owner/Some-Model-Instruct.*--directions-of owner/Some-Model-Instruct"
    ):
        require_named(published, model, None)
    require_named(published, model, "owner/Some-Model-Instruct")
    own = fl.FocusModel(model.hooked, model.tokenizer, name="owner/Some-Model-Instruct")
    require_named(published, own, None)
    require_named(fl.FocusDirections(every, query), model, None)  # directions of unknown origin are not checked


def test_sink_scores_are_of_the_best_heads_whether_they_can_be_steered_or_not(options, tmp_path, capsys):
    (tmp_path / "heads.json").write_text(json.dumps([[1, 0], [0, 2], [2, 1], [0, 0]]))
    few = ["--tasks", "json_kv", "--max-test-samples", "1", "--ranking", str(tmp_path / "heads.json")]
    assert main([*options, *few, "--heads", "2", "--sink-heads", "3"]) == 0
    record = json.loads((tmp_path / "out" / "helmet.json").read_text())
    assert record["sink_heads"] == [[1, 0], [0, 2], [2, 1]]
    assert record["settings"][1]["interventions"][0]["heads"] == [[0, 2], [2, 1]]
    (tmp_path / "heads.json").write_text(json.dumps([[9, 0], [0, 2]]))
    assert main([*options, *few, "--heads", "1"]) == 1
    assert "head (9, 0) does not exist" in capsys.readouterr().err


@pytest.mark.parametrize("option", [("--heads", "2"), ("--alpha", "0.2"), ("--directions-of", "someone")])
def test_options_of_directions_without_any_are_refused(option, options, capsys):
    place = options.index("--directions")
    assert main([*options[:place], *options[place + 2 :], *option]) == 1
    assert f"{option[0]} is an option of --directions" in capsys.readouterr().err


def test_a_checkpoints_repetition_penalty_is_applied_and_recorded_unless_another_is_asked_for(options, tmp_path):
    folder = Path(options[options.index("--model") + 1])
    penalised = shutil.copytree(folder, tmp_path / "penalised")
    (penalised / "generation_config.json").write_text(json.dumps({"eos_token_id": 2, "repetition_penalty": 1.3}))
    options[options.index("--model") + 1] = str(penalised)
    few = ["--tasks", "json_kv", "--max-test-samples", "1", "--directions-of", folder.name]
    for more, penalty in (([], 1.3), (["--repetition-penalty", "1"], 1)):
        assert main([*options, *few, *more, "--out", str(tmp_path / f"{penalty}")]) == 0
        (store,) = (tmp_path / f"{penalty}" / "records").glob("*.jsonl")
        assert json.loads(store.read_text().splitlines()[0])["header"]["repetition_penalty"] == penalty
        assert f"repetition penalty of {penalty}" in (tmp_path / f"{penalty}" / "tables.md").read_text()


def test_settings_are_named_as_in_the_paper(load_model):
    model = load_model("llama")
    directions = directions_of(model)
    names = [one.name for one in paper_settings(model, directions, HEADS, [1, 2], [-0.2, 0.2])]
    assert names == ["baseline", "1_-0.2", "1_0.2", "2_-0.2", "2_0.2"]
    other = load_model("llama_mha")
    with pytest.raises(ValueError, match="n_key_value_heads = 2, this one has 4"):
        paper_settings(other, directions, HEADS, [1], [0.2])


def test_recall_sets_from_the_command(tmp_path, capsys):
    out = tmp_path / "recall"
    made = ["helmet", "make-recall", "--lengths", "2000", "--tokenizer", "demo", "--out", str(out), "--samples", "2"]
    assert main(made) == 0
    said = capsys.readouterr().out
    assert "data/ruler/niah_multikey_2/validation_2000.jsonl: 2 samples, contexts of up to 1," in said
    assert f"--config {out / 'configs' / 'recall.yaml'} --data {out}" in said
    (tmp_path / "essays").mkdir()
    (tmp_path / "essays" / "one.txt").write_text("A queen reads. ")
    more = ["--haystack", str(tmp_path / "essays"), "--needle", "{key} {kind} {value}.", "--reserve", "200"]
    assert main([*made, *more]) == 0
    text = (out / "data/ruler/niah_multivalue/validation_2000.jsonl").read_text()
    assert "A queen reads. A queen reads." in text
    with pytest.raises(SystemExit):
        main([*made[:-2], "--samples", "0"])
    assert "argument --samples: 0 is less than 1" in capsys.readouterr().err


def test_the_embedded_models_own_set_goes_the_same_way(tmp_path, capsys):
    out = tmp_path / "demo"
    named = ["--helmet", str(STAND_IN), "--config", "demo", "--lengths", "700", "--max-test-samples", "2", "--quiet"]
    assert main(["helmet", *named, "--out", str(out)]) == 0
    assert "Needle QA under 700 tokens, 2 samples: baseline" in capsys.readouterr().out
    (record, _) = [json.loads(line) for line in next((out / "records").glob("*")).read_text().splitlines()][1:]
    assert "Document [1](Title: " in record["input_text"]
    assert not record["truncated"]


def test_numbers_below_zero_may_follow_an_option(capsys):
    assert main(["helmet", "--alpha", "-0.2,0.2"]) == 1
    assert "name a checkout" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["helmet", "-0.2"])
