"""Commands report impossible requests before they start, keep existing files, and use other heads as a control."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import matplotlib.pyplot as plt
import pytest
import torch

from focuslens import ContextualScores, Document, FocusDirections, FocusModel, MultiDocSample, load_ranking
from focuslens.cli import demo, sweeps
from focuslens.cli.common import SampleOptions, open_samples
from focuslens.cli.main import _parser, main
from focuslens.cli.rankings import count_heads, score_intervals
from focuslens.data.multidoc import load_multidoc
from focuslens.data.synthetic import spread_positions
from focuslens.heads import Head
from tests.support.multidoc_files import oracle_record, placed_record, write

MODEL = ["--documents", "2", "--samples", "2", "--max-new-tokens", "3"]


@pytest.fixture(autouse=True)
def _closed_figures():
    """Close the figures of each command, because pyplot keeps them open."""
    yield
    plt.close("all")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--sample", "-1", "--documents", "2"], "there is no sample -1"),
        (["generate", "--prompt", "x", "--device", "nowhere"], "device is 'nowhere', which is not available"),
        (["heads", "--model", "/nowhere/at/all"], "there is no directory '/nowhere/at/all'"),
        (["steer", "--directions", "runs/a/b/direction_relevant"], "there is no directory 'runs/a/b/direction_rele"),
        (["steer", "--directions", "./nothing"], "there is no directory './nothing'"),
        (["heads", "--split", "all"], "--split all is for data files; the synthetic corpus has train, validation and"),
    ],
)
def test_what_is_not_there_is_named(arguments, message, capsys):
    assert main([*arguments, *MODEL] if arguments[0] != "generate" else arguments) == 1
    assert message in capsys.readouterr().err


def test_a_sample_beyond_the_last_is_named(tmp_path, capsys):
    file = write(tmp_path / "oracle.jsonl", [oracle_record(i) for i in range(8)])
    assert main(["generate", "--sample", "3000", "--data", str(file), "--documents", "2"]) == 1
    assert "there is no sample 3000" in capsys.readouterr().err


def test_a_ranking_that_is_no_json_names_the_file(tmp_path, capsys):
    (tmp_path / "heads.json").write_text("")
    assert main(["split-softmax", "--heads", str(tmp_path / "heads.json"), *MODEL]) == 1
    assert "heads.json is not a ranking of heads: it is not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(("options", "shown"), [([], False), (["-v"], True)])
def test_a_dropped_answer_is_a_detail(options, shown, tmp_path, capsys):
    records = [oracle_record(i) for i in range(16)]
    records[0]["answers"].append("*")
    file = write(tmp_path / "oracle.jsonl", records)
    assert main(["heads", *MODEL, "--data", str(file), "--samples", "16", *options, "--json"]) == 0
    out, err = capsys.readouterr()
    assert ("accepted answer(s), empty after normalisation" in err) == shown
    assert json.loads(out)["data"]["dropped_answers"] == 1


def without(library, monkeypatch):
    for name in [name for name in sys.modules if name.startswith("focuslens.viz")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, library, None)


@pytest.mark.parametrize("library", ["circuitsvis", "matplotlib"])
@pytest.mark.parametrize(
    ("command", "written"),
    [
        (["heads"], ["heads.json"]),
        (["split-softmax", "--k", "1", "--tau", "0.1"], ["split_softmax.json", "split_softmax.jsonl"]),
        (["train", "--epochs", "1"], ["directions.json", "directions.safetensors"]),
    ],
)
def test_results_are_written_without_figures(command, written, library, tmp_path, monkeypatch, capsys):
    without(library, monkeypatch)
    assert main([*command, *MODEL, "--out", str(tmp_path / "out"), "--json"]) == 0
    out, err = capsys.readouterr()
    (line,) = [line for line in err.splitlines() if "focuslens[viz]" in line]
    assert line.startswith("warning: figures are left out: ")
    assert f"{library!r} is missing: pip install 'focuslens[viz]'" in line
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == written
    assert sorted(Path(path).name for path in json.loads(out)["written"]) == written


@pytest.mark.parametrize("library", ["circuitsvis", "matplotlib"])
@pytest.mark.parametrize("command", [["report"], ["paper", "--model", "demo", "--out"]])
def test_pages_name_the_extra_before_any_work(command, library, tmp_path, monkeypatch, capsys):
    without(library, monkeypatch)
    assert main([*command, str(tmp_path)]) == 1
    assert f"{library!r} is missing: pip install 'focuslens[viz]'" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_without_figures_a_command_needs_nothing_to_draw_with(monkeypatch, capsys):
    without("matplotlib", monkeypatch)
    assert main(["split-softmax", *MODEL, "--k", "1", "--tau", "0.1"]) == 0
    assert "split-softmax random tau=0.3 k=1" in capsys.readouterr().out


def test_intervals_of_scores_draw_questions_and_leave_out_what_has_no_response():
    relevant = torch.tensor([0.0, 0.2, 1.0, math.nan]).reshape(4, 1, 1).repeat(1, 1, 2)
    asked = [
        MultiDocSample(q, ("a",), (Document("t", "x"),), i, q) for i, q in ((0, "p"), (0, "q"), (0, "r"), (0, "s"))
    ]
    asked[1] = replace(asked[1], question_id="p", name="other")
    ids = tuple(one.id for one in asked)
    scores = ContextualScores(relevant, relevant, relevant, relevant, "long", ids, ("x",) * 4, (True,) * 4)
    found = score_intervals(scores, asked, [Head(0, 1), Head(0, 0)], seed=0, most=1)
    # There are two questions: p with scores 0 and 0.2, and r with score 1. Bootstrap means are 0.1 for p and p, 1 for r
    # and r, and 0.4 for one of each.
    assert list(found) == ["0/1"]
    assert found["0/1"] == pytest.approx([0.1, 1.0])
    level = torch.zeros(4, 1, 4)
    level[..., 0] = 0.25
    above = score_intervals(replace(scores, chance=level), asked, [Head(0, 1)], seed=0, by="excess")
    assert above["0/1"] == pytest.approx([-0.15, 0.75])


def test_the_demo_offers_only_what_it_uses(capsys):
    for option in ("--samples", "--documents", "--split", "--batch-tokens"):
        with pytest.raises(SystemExit):
            _parser().parse_args(["demo", option, "1"])
    settings = demo.run_settings(_parser().parse_args(["demo", "--dtype", "float64"]), demo.DemoSettings())
    assert (settings.model.name, settings.samples.file, settings.model.dtype) == ("demo", "synthetic", "float64")


def test_controls_are_outside_every_contextual_set_of_the_sweep(load_model, caplog):
    model = load_model("llama")
    ranking = [Head(layer, head) for layer in range(3) for head in range(4)]
    settings = sweeps.controls(model, ranking, [2, 7], tau=0.3, exclude=1, seed=0)
    assert [setting.parameters["k"] for setting in settings] == [2]
    chosen = settings[0].interventions[0].heads
    assert chosen
    assert not set(ranking[:7]) & set(chosen)
    assert "no random heads for --k 7: 5 heads are left beside the 7 best" in caplog.text


def test_a_demo_sets_the_records_of_another_demo_aside(tmp_path, monkeypatch, capsys):
    from focuslens.cli.common import Samples
    from focuslens.data.synthetic import load_synthetic
    from focuslens.evaluation import Setting
    from focuslens.model.focus_model import FocusModel

    path, sizes = tmp_path / "sweep.jsonl", replace(demo.DemoSettings(), max_new_tokens=3)
    samples = Samples(load_synthetic(1, num_documents=1, gold_positions=[0]), {})
    settings = demo.run_settings(_parser().parse_args(["demo", "--seed", "1"]), sizes)
    first_run = demo._Demo(settings, sizes, tmp_path, FocusModel.demo(device="cpu"))
    first = first_run.sweep(samples, [Setting("baseline")], "sweep")
    content = path.read_text()
    second_run = replace(first_run, settings=replace(settings, seed=2))
    second_run.sweep(samples, [Setting("baseline")], "sweep")
    assert (tmp_path / "sweep.1.jsonl").read_text() == content
    assert json.loads(path.read_text().splitlines()[0])["header"]["seed"] == 2
    assert len(first["baseline"]) == 1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--alpha", "0.4", "--sample", "0"], "--alpha 0.4 is the strength of directions; name the directions"),
        (
            ["--top-k", "4", "--sample", "0"],
            "--top-k 4 chooses heads for an intervention, and no intervention is given",
        ),
        (["--tau", "0.3", "--prompt", "x"], "the text of --prompt has none; give --sample with --case long or gold"),
        (
            ["--tau", "0.3", "--sample", "0", "--case", "negative"],
            "a prompt of --case negative has none; give",
        ),
    ],
)
def test_generate_refuses_what_it_would_ignore_before_it_opens_anything(options, message, capsys):
    assert main(["generate", "--model", "no/such/directory", *options]) == 1
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["heads", "--top", "13"], "--top 13: there are 12 heads to choose from; give a number from 1 to 12"),
        (["train", "--top-k", "13"], "--top-k 13: there are 12 heads"),
        (["generate", "--sample", "0", "--tau", "0.3", "--top-k", "13"], "--top-k 13: there are 12 heads"),
    ],
)
def test_a_number_of_heads_that_there_is_not_is_refused_before_any_is_scored(
    arguments, message, checkpoint, tmp_path, monkeypatch, capsys
):
    scored = []
    for module in ("rankings", "heads"):
        monkeypatch.setattr(f"focuslens.cli.{module}.score_samples", lambda *args: scored.append(args))
    options = ["--model", str(checkpoint("llama")), "--n-ctx", "4096", "--out", str(tmp_path / "out"), *MODEL]
    assert main([*arguments, *options]) == 1
    assert message in capsys.readouterr().err
    assert not scored


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["heads", "--samples", "-3"], "argument --samples: -3 is less than 1"),
        (["heads", "--documents", "0"], "argument --documents: 0 is less than 1"),
        (
            ["heads", "--dtype", "float8"],
            "argument --dtype: 'float8' is not one of float32, bfloat16, float16, float64",
        ),
        (["heads", "--top", "0"], "argument --top: 0 is less than 1"),
        (["heads", "--n-ctx", "x"], "argument --n-ctx: 'x' is not a whole number"),
        (["train", "--top-k", "-1"], "argument --top-k: -1 is less than 1"),
        (["train", "--batch-tokens", "0"], "argument --batch-tokens: 0 is less than 1"),
        (["steer", "--directions", "x", "--k", "1,0"], "argument --k: 0 is less than 1"),
        (["report", "runs", "--views", "-1"], "argument --views: -1 is less than 0"),
    ],
)
def test_a_number_out_of_range_is_refused_by_the_option_that_was_typed(arguments, message, capsys):
    with pytest.raises(SystemExit, match="2"):
        main(arguments)
    (line,) = capsys.readouterr().err.splitlines()
    assert f"focuslens {arguments[0]}: {message}" in line


@pytest.mark.parametrize(
    "arguments", [["report", "nowhere"], ["heads", "--dtype", "float8"], ["heads", "--documents", "0"]]
)
def test_what_is_wrong_is_said_before_anything_heavy_is_imported(arguments):
    code = (
        "import sys; from focuslens.cli.main import main\n"
        f"try:\n    status = main({arguments})\nexcept SystemExit as stop:\n    status = stop.code\n"
        "assert status in (1, 2)\n"
        "assert not {'torch', 'transformer_lens', 'pandas', 'matplotlib'} & set(sys.modules)\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize("command", ["train", "generate"])
def test_no_more_heads_are_asked_for_than_a_ranking_names(command, checkpoint, tmp_path, capsys):
    (tmp_path / "heads.json").write_text("[[1, 0], [0, 3]]")
    options = ["--model", str(checkpoint("llama")), "--n-ctx", "4096", "--out", str(tmp_path / "out"), *MODEL]
    options += ["--heads", str(tmp_path / "heads.json"), "--top-k", "3"]
    assert main([command, *(["--sample", "0", "--tau", "0.3"] if command == "generate" else []), *options]) == 1
    assert "--top-k 3: there are 2 heads to choose from; give a number from 1 to 2" in capsys.readouterr().err
    with pytest.raises(ValueError, match="no heads to choose from: the ranking is empty, or no head of it has a dir"):
        count_heads("--top-k", None, 0)


def test_halves_of_a_file_share_no_question(tmp_path):
    file = write(tmp_path / "oracle.jsonl", [oracle_record(i) for i in range(30)])
    options = ["heads", "--data", str(file), "--documents", "2"]
    ids = {}
    for split in ("train", "test", "all"):
        data = open_samples(SampleOptions.of(_parser().parse_args([*options, "--split", split])), "test")
        ids[split] = {sample.question_id for sample in data.samples}
    train, test = load_multidoc(file, num_documents=2, gold_positions=[0, 1]).split(seed=42)
    assert ids["train"] == {sample.question_id for sample in train}
    assert ids["test"] == {sample.question_id for sample in test}
    assert not ids["train"] & ids["test"]
    assert ids["all"] == ids["train"] | ids["test"] == set(map(str, range(30)))


def test_all_prompts_of_a_command_have_as_many_documents_as_fit_the_longer_half(
    checkpoint, load_model, tmp_path, capsys
):
    """Both halves use the number of documents that fits the half with longer documents, here the test half.

    Prompts of the training half alone would fit 20 documents.
    """
    records = [placed_record(i, total=20) for i in range(8)]
    file = write(tmp_path / "placed.jsonl", records)
    for sample in load_multidoc(file, gold_positions=[0]).split(seed=42)[1]:
        for document in records[int(sample.question_id)]["ctxs"]:
            document["text"] += " harbour" * 50
    write(file, records)
    options = ["--model", str(checkpoint("llama")), "--data", str(file), "--n-ctx", "500", "--max-new-tokens", "4"]

    def longest(half, documents):
        data = load_multidoc(file, num_documents=documents, gold_positions=spread_positions(documents))
        return max(len(load_model("llama").encode(sample.prompt()).tokens) for sample in data.split(seed=42)[half])

    assert longest(0, 20) <= 496
    assert longest(1, 5) <= 496 < longest(1, 7)
    assert main(["heads", *options, "--out", str(tmp_path)]) == 0
    assert json.loads((tmp_path / "heads.json").read_text())["data"]["num_documents"] == 5
    capsys.readouterr()
    assert main(["split-softmax", *options, "--tau", "0.1", "--k", "1", "--out", str(tmp_path)]) == 0
    result = json.loads((tmp_path / "split_softmax.json").read_text())
    assert result["data"]["num_documents"] == result["ranking"]["scored_on"]["num_documents"] == 5
    assert capsys.readouterr().err.count("5 documents per prompt: more do not fit") == 1
    assert main(["train", *options, "--top-k", "1", "--epochs", "1", "--out", str(tmp_path)]) == 0
    provenance = json.loads((tmp_path / "directions.json").read_text())["provenance"]
    assert provenance["data"]["num_documents"] == provenance["ranking"]["scored_on"]["num_documents"] == 5
    assert capsys.readouterr().err.count("5 documents per prompt: more do not fit") == 1
    steer = ["steer", *options, "--directions", str(tmp_path), "--alpha", "1", "--k", "1", "--out", str(tmp_path)]
    assert main(steer) == 0
    result = json.loads((tmp_path / "steering.json").read_text())
    assert result["data"]["num_documents"] == result["ranking"]["scored_on"]["num_documents"] == 5
    assert capsys.readouterr().err.count("5 documents per prompt: more do not fit") == 1


def test_heads_for_a_prompt_are_ranked_on_as_many_documents_as_fit(checkpoint, load_model, tmp_path, capsys):
    file = write(tmp_path / "placed.jsonl", [placed_record(i, total=20) for i in range(4)])
    query = torch.ones(1, load_model("llama").shape.d_head)
    FocusDirections(heads=[(0, 0)], query=query, key=None, site="rotary").save(tmp_path / "directions")
    options = ["--model", str(checkpoint("llama")), "--data", str(file), "--n-ctx", "300", "--max-new-tokens", "4"]
    assert main(["generate", *options, "--prompt", "who?", "--directions", str(tmp_path / "directions")]) == 0
    assert "documents per prompt: more do not fit" in capsys.readouterr().err


def test_everything_is_read_where_everything_is_used(tmp_path, checkpoint, capsys):
    """With ``--split all``, a file with one question works, although one question cannot be split into halves."""
    file = write(tmp_path / "placed.jsonl", [placed_record(0, total=20)])
    options = ["--model", str(checkpoint("llama")), "--data", str(file), "--n-ctx", "500", "--max-new-tokens", "4"]
    assert main(["heads", *options, "--split", "all"]) == 0
    assert main(["heads", *options]) == 1
    assert "leaves one part empty" in capsys.readouterr().err


@pytest.mark.parametrize(("form", "name"), [("qrhead", "qrheads.yaml"), ("duoattention", "duoattention")])
def test_heads_writes_the_ranking_in_the_form_of_another_program(form, name, tmp_path, capsys):
    command = ["heads", *MODEL, "--ranking-form", form, "--top", "3"]
    assert main(command) == 1
    assert f"--ranking-form {form} writes a file; give --out" in capsys.readouterr().err
    assert main([*command, "--out", str(tmp_path), "--json"]) == 0
    assert str(tmp_path / name) in json.loads(capsys.readouterr().out)["written"]
    shape = FocusModel.demo(device="cpu").shape
    best, written = load_ranking(tmp_path / "heads.json"), load_ranking(tmp_path / name, shape=shape)
    if form == "qrhead":
        assert written == best[:3]
    else:
        group = shape.n_heads // shape.n_key_value_heads
        assert len(written) == len(best)
        assert written[0] == (best[0].layer, best[0].head // group * group)
