"""``focuslens attribute``: its numbers are those of the package, and its files hold every answer."""

from __future__ import annotations

import csv
import json
import re
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest

import focuslens as fl
from focuslens.cli.main import main
from tests.support import own_files
from tests.support.multidoc_files import oracle_record, write
from tests.support.pages import loads

HEADS = [[2, 1], [0, 3], [1, 0], [1, 2]]


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


@pytest.fixture
def ranking(tmp_path: Path) -> str:
    (tmp_path / "ranking.json").write_text(json.dumps({"heads": HEADS}))
    return str(tmp_path / "ranking.json")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "oracle.jsonl", [oracle_record(i) for i in range(6)])


@pytest.fixture
def options(checkpoint: Any, data: Path, ranking: str) -> list[str]:
    return [
        "attribute", "--model", str(checkpoint("llama")), "--data", str(data), "--documents", "3", "--gold-positions",
        "0,2", "--samples", "4", "--max-new-tokens", "4", "--heads", ranking, "--top-k", "2", "--quiet",
    ]  # fmt: skip


def expected(checkpoint: Any, data: Path, **settings: Any) -> tuple[list[fl.MultiDocSample], fl.AnswerSources]:
    whole = fl.load_multidoc(data, num_documents=3, gold_positions=(0, 2), seed=42)
    samples = list(whole.sample(4, 42))
    model = fl.FocusModel.from_pretrained(str(checkpoint("llama")), device="cpu")
    scores = fl.document_scores(model, samples, max_new_tokens=4, **settings)
    return samples, scores.sources([(2, 1), (0, 3)])


def test_files_hold_the_sources_of_generated_answers(
    options: list[str], checkpoint: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main([*options, "--views", "1", "--out", str(out)]) == 0
    printed = capsys.readouterr().out
    assert f"the picture of the answers and their documents: {out / 'attribution.html'}" in printed
    assert "4 generated answers, by 2 heads of ranking.json" in printed
    samples, sources = expected(checkpoint, data)
    result = json.loads((out / "attribution.json").read_text())
    assert result["heads"] == HEADS[:2]
    assert [entry["id"] for entry in result["samples"]] == [sample.id for sample in samples]
    for entry, top, share, margin, shares, response in zip(
        result["samples"],
        sources.top,
        sources.top_shares,
        sources.margins,
        sources.shares,
        sources.responses,
        strict=True,
    ):
        assert top is not None
        assert (entry["document"], entry["response"]) == (top + 1, response)
        assert (entry["share"], entry["margin"]) == (pytest.approx(share), pytest.approx(margin))
        assert [one["share"] for one in entry["documents"]] == pytest.approx(shares.tolist())
        assert sum(one["share_of_tokens"] for one in entry["documents"]) == pytest.approx(1)
    with (out / "attribution.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 12
    assert [int(row["document"]) for row in rows if row["is_source"] == "1"] == [(top or 0) + 1 for top in sources.top]
    gold = [sample.gold_index == top for sample, top in zip(samples, sources.top, strict=True)]
    assert result["known"]["accuracy"]["mean"] == pytest.approx(sum(gold) / 4)
    page = (out / "attribution.html").read_text()
    assert not loads(page)
    assert 'href="views/001.html"' in page
    assert not loads((out / "views" / "001.html").read_text())
    assert sorted(path.name for path in out.iterdir()) == [
        "attribution.csv", "attribution.html", "attribution.json", "views",
    ]  # fmt: skip


@pytest.mark.parametrize("form", ["csv by question", "jsonl by id", "json by id", "tokens", "column"])
def test_given_answers_are_read_from_files(
    form: str, options: list[str], checkpoint: Any, data: Path, tmp_path: Path
) -> None:
    samples, _ = expected(checkpoint, data)
    texts = {sample.id: f"river {i} stone" for i, sample in enumerate(samples)}
    questions = {sample.id: sample.question for sample in samples}
    file = tmp_path / f"answers.{form.split()[0] if ' ' in form else 'jsonl'}"
    given: Any = [texts[sample.id] for sample in samples]
    if form == "csv by question":
        with file.open("w", newline="") as content:
            writer = csv.writer(content)
            writer.writerow(["response", "question"])
            writer.writerows((texts[name], questions[name]) for name in reversed(texts))
    elif form == "jsonl by id":
        file.write_text("".join(json.dumps({"id": name, "response": text}) + "\n" for name, text in texts.items()))
    elif form == "json by id":
        file.write_text(json.dumps(texts))
    elif form == "tokens":
        given = [[40 + i, 50, 60] for i in range(4)]
        file.write_text(
            "".join(json.dumps({"id": s.id, "tokens": t}) + "\n" for s, t in zip(samples, given, strict=True))
        )
    if form == "column":
        by_question = {questions[name]: text for name, text in texts.items()}
        records = [oracle_record(i) for i in range(6)]
        write(data, [{**record, "said": by_question.get(record["question"], "unused")} for record in records])
        source = ["--response-column", "said"]
    else:
        source = ["--responses", str(file)]
    out = tmp_path / "out"
    assert main([*options, *source, "--views", "0", "--out", str(out)]) == 0
    result = json.loads((out / "attribution.json").read_text())
    _, sources = expected(checkpoint, data, responses=given)
    assert result["responses"] == "given"
    assert [entry["response"] for entry in result["samples"]] == list(sources.responses)
    assert [entry["share"] for entry in result["samples"]] == pytest.approx(list(sources.top_shares))


def test_answers_in_a_table_with_two_columns_of_ids_are_those_of_their_rows(
    checkpoint: Any, ranking: str, tmp_path: Path
) -> None:
    rows = [
        {"qid": i + 1, "id": i, "query": f"what is {word}?", "contexts": ["river", "stone"], "response": f"{word}!"}
        for i, word in enumerate(("river", "stone", "door"))
    ]
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["attribute", "--model", str(checkpoint("llama")), "--data", str(data), "--heads", ranking, "--quiet"]
    for given in (["--response-column", "response"], ["--responses", str(data), "--columns", "id=qid"]):
        out = tmp_path / f"out{given[0]}"
        assert main([*common, *given, "--views", "0", "--out", str(out)]) == 0
        found = json.loads((out / "attribution.json").read_text())["samples"]
        assert [(one["question"], one["response"]) for one in found] == [
            (row["query"], row["response"]) for row in rows
        ]


def test_all_rows_of_a_table_are_answered_in_their_order_unless_fewer_are_asked_for(
    checkpoint: Any, ranking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # More rows than other commands take, and three rows with each question.
    rows = [{"query": f"what is {i // 3}?", "contexts": ["river", "stone"], "response": f"r{i}"} for i in range(102)]
    data = tmp_path / "own.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    common = ["attribute", "--model", str(checkpoint("llama")), "--data", str(data), "--heads", ranking, "--views", "0"]
    common += ["--response-column", "response", "--quiet", "--out", str(tmp_path / "out")]

    def answered(*options: str) -> list[str]:
        assert main([*common, *options]) == 0
        result = json.loads((tmp_path / "out" / "attribution.json").read_text())
        assert result["data"]["rows"] == 102
        return [one["response"] for one in result["samples"]]

    assert answered() == [row["response"] for row in rows]
    assert ": 102 given answers" in capsys.readouterr().out
    few = answered("--samples", "4")
    assert [int(text[1:]) for text in few] == sorted({int(text[1:]) for text in few})
    assert len(few) == 4
    assert ": 4 of 102 samples, given answers" in capsys.readouterr().out
    assert len(answered("--split", "test")) == 51
    assert ": 51 of 102 samples, given answers" in capsys.readouterr().out


def test_one_question_with_documents_in_files_needs_no_answer(
    checkpoint: Any, ranking: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    files = {"ferry": "The ferry leaves at nine.", "bakery": "The bakery sells bread.\n"}
    for name, text in files.items():
        (tmp_path / f"{name}.txt").write_text(text)
    documents = [word for name in files for word in ("--document", str(tmp_path / f"{name}.txt"))]
    command = ["attribute", "--model", str(checkpoint("llama_chat")), "--question", "When does it leave?", *documents]
    options = [*command, "--response", "At nine.", "--heads", ranking, "--top-k", "2", "--quiet", "--json"]
    assert main(options) == 0
    result = json.loads(capsys.readouterr().out)
    model = fl.FocusModel.from_pretrained(str(checkpoint("llama_chat")), device="cpu")
    sample = fl.MultiDocSample(
        "When does it leave?",
        ("x",),
        (fl.Document("ferry", "The ferry leaves at nine."), fl.Document("bakery", "The bakery sells bread.")),
        None,
    )
    sources = fl.document_scores(model, [sample], responses=["At nine."]).sources([(2, 1), (0, 3)])
    (entry,) = result["samples"]
    assert (entry["response"], entry["document"]) == ("At nine.", (sources.top[0] or 0) + 1)
    assert [one["title"] for one in entry["documents"]] == ["ferry", "bakery"]
    assert entry["share"] == pytest.approx(sources.top_shares[0])
    assert result["known"] is None
    assert result["data"] is None


def test_heads_are_ranked_on_other_data_if_there_is_no_ranking(options: list[str], data: Path, tmp_path: Path) -> None:
    other = write(tmp_path / "other.jsonl", [oracle_record(20 + i) for i in range(8)])
    place = options.index("--heads")
    without = options[:place] + options[place + 2 :]
    out = tmp_path / "out"
    ranked = ["--rank-on", str(other), "--rank-samples", "3", "--views", "0", "--out", str(out)]
    assert main([*without, *ranked]) == 0
    result = json.loads((out / "attribution.json").read_text())
    assert result["heads_from"]["scored_on"]["file"] == "other.jsonl"
    assert result["heads_from"]["scored_on"]["samples"] == 3
    assert [list(head) for head in fl.load_ranking(out / "heads.json")[:2]] == result["heads"]
    assert not (out / "unfinished_scores.jsonl").exists()


def test_the_template_words_one_question_and_the_prompts_that_rank_heads(
    checkpoint: Any, ranking: str, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = tmp_path / "template.yaml"
    file.write_text("instruction: Read these and reply.\nheading: '[{number}] '\n")
    template = fl.PromptTemplate.load(file)
    (tmp_path / "a.txt").write_text("The ferry leaves at nine.", encoding="utf-8-sig")  # the mark is no text
    (tmp_path / "b.txt").write_text("The bakery sells bread.")
    common = ["attribute", "--model", str(checkpoint("llama")), "--device", "cpu", "--template", str(file), "--quiet"]
    question = ["--question", "When?", "--document", str(tmp_path / "a.txt"), "--document", str(tmp_path / "b.txt")]
    assert main([*common, *question, "--response", "Nine.", "--heads", ranking, "--top-k", "2", "--json"]) == 0
    (entry,) = json.loads(capsys.readouterr().out)["samples"]
    documents = (fl.Document("a", "The ferry leaves at nine."), fl.Document("b", "The bakery sells bread."))
    model = fl.FocusModel.from_pretrained(str(checkpoint("llama")), device="cpu")

    def share(worded: fl.PromptTemplate | None) -> float | None:
        sample = fl.MultiDocSample("When?", (), documents, None, template=worded)
        return fl.document_scores(model, [sample], responses=["Nine."]).sources([(2, 1), (0, 3)]).top_shares[0]

    assert entry["share"] == pytest.approx(share(template))
    assert entry["share"] != pytest.approx(share(None))

    out = tmp_path / "out"
    ranked = ["--rank-on", str(data), "--rank-samples", "2", "--documents", "3", "--max-new-tokens", "3"]
    assert main([*common, *question, "--response", "Nine.", *ranked, "--views", "0", "--out", str(out)]) == 0
    result = json.loads((out / "attribution.json").read_text())
    assert result["heads_from"]["scored_on"]["template"] == template.describe()


OWN_COLUMNS = "question=ask,documents=one+two,relevant=gold"


def own_rows(**named: str) -> list[dict[str, Any]]:
    names = {"question": "question", "documents": "documents", "relevant": "relevant", **named}
    return [
        {names["question"]: f"what is {i}?", names["documents"]: [f"river {i}", "a stone"], names["relevant"]: 0}
        for i in range(3)
    ]


@pytest.mark.parametrize("form", ["usual names", "columns of --data", "csv", "hotpotqa", "json"])
def test_heads_are_ranked_on_every_form_of_a_table(form: str, checkpoint: Any, tmp_path: Path) -> None:
    own = tmp_path / "own.jsonl"
    own.write_text(json.dumps({"ask": "what?", "one": "river", "two": "stone", "gold": 1}) + "\n")
    data = ["--data", str(own), "--columns", OWN_COLUMNS]
    other = tmp_path / ("other.json" if form == "json" else "other.csv" if form == "csv" else "other.jsonl")
    if form == "usual names":
        rows = own_rows()
    elif form == "columns of --data":
        rows = [{"ask": f"what is {i}?", "one": f"river {i}", "two": "stone", "gold": i % 2} for i in range(3)]
    elif form == "hotpotqa":
        rows = own_files.HOTPOTQA
    else:
        rows = own_rows(documents="contexts", question="query", relevant="gold_index")
    if form == "json":
        other.write_text(json.dumps({"data": rows}, indent=1))
    elif form == "csv":
        lines = [f"{row['query']};{json.dumps(row['contexts'])};0" for row in rows]
        quoted = [line.replace('"', '""').replace(";[", ';"[').replace("];", ']";') for line in lines]
        other.write_text("\n".join(["query;contexts;gold_index", *quoted]) + "\n")
    else:
        other.write_text("".join(json.dumps(row) + "\n" for row in rows))
    command = ["attribute", "--model", str(checkpoint("llama")), *data, "--max-new-tokens", "3", "--quiet", "--views"]
    assert main([*command, "0", "--rank-on", str(other), "--out", str(tmp_path / "out")]) == 0
    result = json.loads((tmp_path / "out" / "attribution.json").read_text())
    ranked = result["heads_from"]["scored_on"]
    columns = OWN_COLUMNS if form == "columns of --data" else ""
    assert (ranked["file"], ranked["samples"]) == (other.name, len(rows))
    assert ",".join(f"{part}={name}" for part, name in ranked["columns"].items()) == columns
    assert ranked["form"] == ("hotpotqa" if form == "hotpotqa" else "columns")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"ask": "what?"}, "--rank-on: .*other.jsonl, line 1: no column has a usual name for the question; there are"),
        ({"question": "what?", "documents": ["a"]}, "no relevant document is known in .*other.jsonl, and heads are"),
    ],
)
def test_data_that_cannot_rank_heads_are_refused(
    row: Any, message: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(row) + "\n")
    place = options.index("--heads")
    assert main([*options[:place], *options[place + 2 :], "--rank-on", str(other)]) == 1
    assert re.search(message, capsys.readouterr().err)


@pytest.mark.parametrize(
    ("extra", "message"),
    [
        (["--document", "FILE"], "--document and --response belong to one question; give --question too"),
        (["--question", "who?"], "--question needs the documents that the answer can come from"),
        (["--question", "who?", "--document", "FILE"], "are both given; give one of them"),
        (["--responses", "FILE", "--response-column", "a"], "all give the answers; give one of them"),
        (["--response-column", "said"], "there is no column 'said'; there are 'question', 'answers', 'ctxs'"),
        (["--responses", "nowhere.csv"], "--responses: there is no file 'nowhere.csv'"),
        (["--responses", "FILE"], "has the suffix '.txt'; a table ends with .jsonl, .json, .csv"),
    ],
)
def test_options_that_do_not_fit_are_named(
    extra: list[str], message: str, options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text("a text")
    assert main([*options, *(str(tmp_path / "text.txt") if word == "FILE" else word for word in extra)]) == 1
    assert message in capsys.readouterr().err
