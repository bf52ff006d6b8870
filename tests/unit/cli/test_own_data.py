"""Commands on tables of users, and with templates of users; reports and resumed runs open the same samples again."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest

import focuslens as fl
from focuslens.cli import own_data
from focuslens.cli.main import main
from focuslens.data._views import checked_parts
from focuslens.data.own_samples import load_samples
from focuslens.data.selection import SampleSelection, own_form
from focuslens.prompts.sample import prompts_digest
from focuslens.prompts.template import PromptTemplate
from focuslens.viz.run_report.samples import UnavailableError, reopen_samples
from tests.support import own_files
from tests.support.multidoc_files import oracle_record, placed_record, write

COLUMNS = "question=query,documents=doc1+doc2,answers=answer,relevant=gold"


@pytest.fixture
def table(tmp_path: Path) -> Path:
    path = tmp_path / "own.csv"
    lines = [f"colour of door {i}?,Door {i} is red.,Window {i} is grey.,red,0" for i in range(6)]
    path.write_text("\n".join(["query,doc1,doc2,answer,gold", *lines]) + "\n")
    return path


def run_heads(checkpoint: Any, data: Path, out: Path, *options: str) -> dict[str, Any]:
    model = ["--model", str(checkpoint("llama")), "--device", "cpu", "--max-new-tokens", "2"]
    assert main(["heads", *model, "--data", str(data), *options, "--out", str(out)]) == 0
    return json.loads((out / "heads.json").read_text())


def test_heads_of_a_table_and_its_samples_opened_again(checkpoint: Any, table: Path, tmp_path: Path) -> None:
    result = run_heads(checkpoint, table, tmp_path / "out", "--columns", COLUMNS, "--split", "all")
    data = load_samples(table, own_data.columns(COLUMNS)).sample(6)
    assert result["samples"] == [one.id for one in data]
    assert result["data"]["prompts_sha256"] == prompts_digest(data)
    assert (result["data"]["file"], result["data"]["form"]) == ("own.csv", "columns")
    assert reopen_samples({"data": result["data"]}, table) == list(data)
    with pytest.raises(UnavailableError, match=r"the samples are those of own.csv, which is not here; give its path"):
        reopen_samples({"data": result["data"]})
    table.write_text(table.read_text().replace("red", "blue"))
    with pytest.raises(UnavailableError, match="their prompts differ"):
        reopen_samples({"data": result["data"]}, table)


def test_rows_with_the_same_question_are_all_used_and_rows_that_are_left_out_are_counted(
    checkpoint: Any, tmp_path: Path, capsys: Any
) -> None:
    path = tmp_path / "own.jsonl"
    rows = [{"question": f"door {i // 3}?", "documents": [f"red {i}", "b"], "relevant": 0} for i in range(12)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    whole = run_heads(checkpoint, path, tmp_path / "all", "--split", "all")
    assert len(whole["samples"]) == whole["data"]["rows"] == 12
    assert "12 samples of" not in capsys.readouterr().err
    half = run_heads(checkpoint, path, tmp_path / "half")
    assert len(half["samples"]) == 6
    assert len({name.partition("@")[0] for name in half["samples"]}) == 2  # questions stay together
    assert f"6 of 12 samples of {path}; --samples and --split choose them" in capsys.readouterr().err
    for result in (whole, half):
        assert [one.id for one in reopen_samples({"data": result["data"]}, path)] == result["samples"]


def test_a_template_of_a_file_is_in_the_description(checkpoint: Any, tmp_path: Path) -> None:
    data = write(tmp_path / "oracle.jsonl", map(oracle_record, range(12)))
    file = tmp_path / "template.yaml"
    file.write_text("instruction: Answer from these.\nheading: '[{number}] '\n")
    template = PromptTemplate.load(file)
    common = ["--documents", "2", "--samples", "2"]
    result = run_heads(checkpoint, data, tmp_path / "out", *common, "--template", str(file))
    assert result["data"]["template"] == template.describe()
    (first, *_) = reopen_samples({"data": result["data"]}, data)
    assert first.template == template
    assert first.prompt().startswith("Answer from these.\n\n[1] (Title: G")
    plain = run_heads(checkpoint, data, tmp_path / "plain", *common)
    assert "template" not in plain["data"]
    assert plain["data"]["prompts_sha256"] != result["data"]["prompts_sha256"]


def test_a_sweep_of_a_table_resumes_and_reports(checkpoint: Any, table: Path, tmp_path: Path, capsys: Any) -> None:
    ranking = tmp_path / "ranking.json"
    ranking.write_text(json.dumps({"heads": [[1, 0], [0, 1]]}))
    out = tmp_path / "out"
    command = ["split-softmax", "--model", str(checkpoint("llama")), "--device", "cpu", "--data", str(table)]
    command += ["--columns", COLUMNS, "--heads", str(ranking), "--tau", "0.3", "--k", "1", "--max-new-tokens", "2"]
    assert main([*command, "--out", str(out)]) == 0
    lines = (out / "split_softmax.jsonl").read_bytes()
    assert len(lines.splitlines()) == 1 + 3
    (out / "split_softmax.jsonl").write_bytes(b"".join(lines.splitlines(keepends=True)[:2]))
    assert main([*command, "--out", str(out)]) == 0
    resumed = (out / "split_softmax.jsonl").read_bytes()
    assert sorted(resumed.splitlines()) == sorted(lines.splitlines())
    capsys.readouterr()
    assert main(["report", str(out), "--data", str(table), "--device", "cpu", "--views", "1"]) == 0
    assert "opened again" not in capsys.readouterr().out
    header = json.loads(lines.splitlines()[0])["header"]
    assert reopen_samples(header, table) == list(load_samples(table, own_data.columns(COLUMNS)).split()[1].sample(3))


def test_evaluations_of_a_table_without_answers_are_refused_before_a_model_is_opened(
    checkpoint: Any, table: Path, tmp_path: Path, capsys: Any
) -> None:
    columns = COLUMNS.replace("answers=answer,", "answers=none,")
    table.write_text(table.read_text().replace("answer,gold", "answer,gold,none").replace(",0\n", ",0,\n"))
    command = ["--device", "cpu", "--data", str(table), "--columns", columns, "--max-new-tokens", "2"]
    assert main(["heads", *command, "--model", str(checkpoint("llama"))]) == 0
    assert "3 long prompts without accepted answers" in capsys.readouterr().out
    ranking = tmp_path / "ranking.json"
    ranking.write_text(json.dumps({"heads": [[1, 0]]}))
    assert main(["split-softmax", *command, "--model", "none/such", "--heads", str(ranking), "--k", "1"]) == 1
    has = "has both accepted answers (0 have) and a relevant document (3 have); measure attention alone"
    assert f"none of the 3 samples in the part 'test' of own.csv {has}" in capsys.readouterr().err
    assert main(["steer", *command, "--model", "none/such", "--directions", str(tmp_path), "--k", "1"]) == 1
    assert "of own.csv has accepted answers; measure attention alone" in capsys.readouterr().err
    harness = ["harness", *command[2:], "--model", "none/such", "--out", str(tmp_path / "task")]
    assert main(harness) == 1
    assert "of own.csv has accepted answers; measure attention alone" in capsys.readouterr().err


def test_a_sweep_leaves_out_rows_without_answers_or_relevant_documents(
    checkpoint: Any, table: Path, tmp_path: Path, capsys: Any
) -> None:
    lines = table.read_text().splitlines()
    lines[1] = lines[1].removesuffix("red,0") + ",0"  # no answer
    lines[2] = lines[2].removesuffix("0")  # no relevant document
    table.write_text("\n".join(lines) + "\n")
    (tmp_path / "ranking.json").write_text(json.dumps({"heads": [[1, 0], [0, 1]]}))
    command = ["split-softmax", "--model", str(checkpoint("llama")), "--device", "cpu", "--data", str(table)]
    command += ["--columns", COLUMNS, "--heads", str(tmp_path / "ranking.json"), "--tau", "0.3", "--k", "1"]
    command += ["--split", "all", "--max-new-tokens", "2", "--out"]
    assert main([*command, str(tmp_path / "out")]) == 0
    said = f"4 of 6 samples of {table}; --samples and --split choose them; 2 without accepted answers or a relevant"
    assert f"{said} document left out" in capsys.readouterr().err
    header = json.loads((tmp_path / "out" / "split_softmax.jsonl").read_text().splitlines()[0])["header"]
    whole = load_samples(table, own_data.columns(COLUMNS))
    assert {one.question for one in reopen_samples(header, table)} == {one.question for one in whole[2:]}
    assert main([*command, str(tmp_path / "two"), "--samples", "2"]) == 0
    assert len(json.loads((tmp_path / "two" / "split_softmax.json").read_text())["settings"]) > 0
    header = json.loads((tmp_path / "two" / "split_softmax.jsonl").read_text().splitlines()[0])["header"]
    kept = whole.having("answers", "relevant")
    assert reopen_samples(header, table) == list(kept.sample(2, per_question=False))
    assert list(SampleSelection.reopen(kept.description, table).open()) == list(whole[2:])
    assert [one.question for one in whole.having("answers")] == [one.question for one in whole[1:]]
    with pytest.raises(ValueError, match="'gold' is no part that samples lack; the parts are answers, relevant"):
        checked_parts(["gold"])
    for damaged in ({"having": [["x"]]}, {"having": "answers"}, {"selection": [{"step": "having", "parts": None}]}):
        with pytest.raises(ValueError, match="part"):
            SampleSelection.reopen({**header["data"], **damaged}, table)


def test_a_table_in_which_nothing_is_missing_is_described_as_ever(
    checkpoint: Any, table: Path, tmp_path: Path, capsys: Any
) -> None:
    (tmp_path / "ranking.json").write_text(json.dumps({"heads": [[1, 0], [0, 1]]}))
    command = ["split-softmax", "--model", str(checkpoint("llama")), "--device", "cpu", "--data", str(table)]
    command += ["--columns", COLUMNS, "--heads", str(tmp_path / "ranking.json"), "--tau", "0.3", "--k", "1"]
    assert main([*command, "--max-new-tokens", "2", "--out", str(tmp_path / "out")]) == 0
    assert "left out" not in capsys.readouterr().err
    header = json.loads((tmp_path / "out" / "split_softmax.jsonl").read_text().splitlines()[0])["header"]
    assert "having" not in header["data"]


def test_heads_says_how_many_rows_rank_them(checkpoint: Any, table: Path, capsys: Any) -> None:
    lines = table.read_text().splitlines()
    lines[1] = lines[1].removesuffix("red,0") + ","
    lines[2] = lines[2].removesuffix("0")
    table.write_text("\n".join(lines) + "\n")
    command = ["heads", "--model", str(checkpoint("llama")), "--device", "cpu", "--data", str(table)]
    assert main([*command, "--columns", COLUMNS, "--split", "all", "--max-new-tokens", "2"]) == 0
    counted = (
        r"6 long prompts, \d of 5 with accepted answers answered correctly; 4 with a relevant document rank the heads"
    )
    assert re.search(counted, capsys.readouterr().out)


def test_generate_and_rerank_take_a_table(checkpoint: Any, table: Path, tmp_path: Path, capsys: Any) -> None:
    path = tmp_path / "own.jsonl"
    path.write_text("".join(f'{{"question": "door {i}?", "documents": ["a red", "b blue"]}}\n' for i in range(4)))
    model = ["--model", str(checkpoint("llama")), "--device", "cpu", "--max-new-tokens", "2"]
    assert main(["generate", *model, "--data", str(path), "--sample", "1"]) == 0
    assert "answers: -\nbaseline: " in capsys.readouterr().out
    ranking = tmp_path / "ranking.json"
    ranking.write_text(json.dumps({"heads": [[1, 0]]}))
    out = tmp_path / "out"
    assert (
        main(["rerank", *model, "--data", str(path), "--heads", str(ranking), "--top-k", "1", "--out", str(out)]) == 0
    )
    assert "no relevant document is known" in capsys.readouterr().out
    result = json.loads((out / "rerank.json").read_text())
    assert result["ranks"] == {}
    assert [sorted(one["order"]) for one in result["samples"]] == [[0, 1], [0, 1]]
    assert (
        main(["rerank", *model, "--data", str(table), "--columns", COLUMNS, "--heads", str(ranking), "--top-k", "1"])
        == 0
    )
    assert "BM25" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (
            ["--columns", "question=quest,documents=doc1"],
            "--data: .*own.csv, line 2: there is no column 'quest'; there",
        ),
        (["--form", "rgb"], "--data: .*line 2: the field 'positive' is missing; there are 'query', 'doc1', 'doc2', "),
        (["--columns", COLUMNS, "--gold-positions", "0"], "--gold-positions is for lost-in-the-middle files, and"),
        (["--columns", COLUMNS, "--distractors", "bm25"], "--distractors is for lost-in-the-middle files, and"),
        ([], "--data: .*line 2: no column has a usual name for the documents; there are 'query', 'doc1'"),
        (["--columns", COLUMNS, "--template", "no.yaml"], "--template: there is no file 'no.yaml'"),
    ],
)
def test_wrong_options_are_errors_of_one_line(options: Any, message: str, table: Path, capsys: Any) -> None:
    import re

    assert main(["heads", "--data", str(table), *options]) == 1
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1


def test_columns_are_parsed_or_refused(capsys: Any) -> None:
    assert own_data.columns("question=a, documents=b+c") == {"question": "a", "documents": "b+c"}
    assert own_data.columns("answers=,id=a") == {"answers": None, "id": "a"}
    for text, message in (("question", "'question' is not PART=COLUMN"), ("id=a,id=b", "'id' is named twice")):
        with pytest.raises(SystemExit):
            main(["heads", "--columns", text])
        assert message in capsys.readouterr().err
    assert main(["heads", "--columns", "question=a"]) == 1
    assert "columns and forms are those of a file of your own, and 'synthetic' is none" in capsys.readouterr().err


def test_files_are_recognised(tmp_path: Path) -> None:
    assert own_form("synthetic") is None
    assert own_form("passages") is None
    for name, record in (("oracle.jsonl", oracle_record), ("placed.jsonl", placed_record)):
        assert own_form(write(tmp_path / name, map(record, range(3)))) is None
    for name, rows in (("hotpotqa", own_files.HOTPOTQA), ("kilt", own_files.KILT), ("rgb", own_files.RGB)):
        path = tmp_path / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        form = own_form(path)
        assert form is not None
        assert form.form == name
    nested = tmp_path / "squad.json"
    nested.write_text(json.dumps(own_files.SQUAD))
    form = own_form(nested)
    assert form is not None
    assert form.form == "squad"
    passages = tmp_path / "dpr.jsonl"
    passages.write_text(json.dumps({"question": "q?", "answers": ["x"], "ctxs": [{"title": "a", "text": "b"}]}) + "\n")
    form = own_form(passages)
    assert form is not None
    assert form.form == "columns"


def test_samples_of_python_cannot_be_opened_again_from_a_file() -> None:
    data = load_samples([{"question": "q?", "documents": ["a"]}])
    with pytest.raises(UnavailableError, match="the samples were given in Python, as the list, and not in a file"):
        reopen_samples({"data": dict(data.description)})


def test_a_description_of_views_is_opened_again(table: Path) -> None:
    data = load_samples(table, own_data.columns(COLUMNS), template=PromptTemplate(cue=""), seed=3, num_documents=1)
    drawn = (data.sample(3, per_question=False), data.split()[0].sample(2, 7, per_question=False).in_order())
    for view in (data, data.split()[1], data.sample(4, 1)[::-1], data[1:5].split(0.25, 2)[1], *drawn):
        description = json.loads(json.dumps(view.description))
        assert list(SampleSelection.reopen(description, table).open()) == list(view)
    assert isinstance(data[0], fl.MultiDocSample)
