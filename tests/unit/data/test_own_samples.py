"""Samples of tables of users: columns, documents, relevant documents, formats, and errors that name the row."""

from __future__ import annotations

import csv
import gzip
import hashlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import focuslens as fl
from focuslens.data.own_samples import load_samples
from focuslens.data.selection import SampleSelection, own_form
from focuslens.prompts.template import PromptTemplate

ROWS: list[dict[str, Any]] = [
    {"query": "q one?", "contexts": ["first text", "second text"], "answer": "x", "gold": 1},
    {"query": "q two?", "contexts": ["third text", "fourth text", "fifth text"], "answer": ["y", "z"], "gold": [0, 2]},
    {"query": "q three?", "contexts": ["sixth text"], "answer": None, "gold": None},
]
COLUMNS: dict[str, Any] = {"question": "query", "documents": "contexts", "answers": "answer", "relevant": "gold"}
TITLED: list[dict[str, Any]] = [{"title": "A", "text": "one"}, {"title": "B", "text": "two"}]


def row(**changes: Any) -> dict[str, Any]:
    return {"question": "q?", "documents": ["one", "two", "three"], **changes}


def sample(columns: dict[str, Any] | None = None, **changes: Any) -> fl.MultiDocSample:
    return load_samples([row(**changes)], columns)[0]


def write_jsonl(path: Path, rows: Any) -> Path:
    text = "".join(json.dumps(entry) + "\n" for entry in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def write_csv(path: Path, rows: list[dict[str, Any]]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(
            {name: json.dumps(value) if isinstance(value, list) else value for name, value in entry.items()}
            for entry in rows
        )
    return path


def check_rows(data: Any) -> None:
    assert [one.question for one in data] == ["q one?", "q two?", "q three?"]
    assert [[document.text for document in one.documents] for one in data] == [entry["contexts"] for entry in ROWS]
    assert [one.answers for one in data] == [("x",), ("y", "z"), ()]
    assert [one.gold_indices for one in data] == [(1,), (0, 2), ()]
    assert [one.gold_index for one in data] == [1, 0, None]


# Formats


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json", "lines.json", "a.csv", "a.parquet"])
def test_every_format_gives_the_same_samples(name: str, tmp_path: Path) -> None:
    path, rows = (
        tmp_path / name,
        [{**entry, "answer": np.ravel(entry["answer"]).tolist() if entry["answer"] else None} for entry in ROWS],
    )
    if path.suffix == ".parquet":
        table = [
            {**entry, "gold": np.ravel(entry["gold"]).tolist() if entry["gold"] is not None else []} for entry in rows
        ]
        pd.DataFrame(table).to_parquet(path)
    elif name == "a.json":
        path.write_text(json.dumps(rows, indent=1))
    elif path.suffix == ".csv":
        write_csv(path, rows)
    else:
        write_jsonl(path, rows)
    check_rows(load_samples(path, COLUMNS))
    assert len(load_samples(path, COLUMNS, limit=2)) == 2


def test_objects_of_python_give_the_same_samples() -> None:
    datasets = pytest.importorskip("datasets")
    table = [
        {
            **entry,
            "answer": np.ravel(entry["answer"]).tolist() if entry["answer"] else [],
            "gold": np.ravel(entry["gold"]).tolist() if entry["gold"] is not None else [],
        }
        for entry in ROWS
    ]
    for source in (ROWS, pd.DataFrame(ROWS), datasets.Dataset.from_list(table)):
        check_rows(load_samples(source, COLUMNS))
    with pytest.raises(TypeError, match=r"source is a DatasetDict with 'train'; give one of them, such as source\['tr"):
        load_samples(datasets.DatasetDict(train=datasets.Dataset.from_list(table)), COLUMNS)


def test_a_table_with_semicolons_or_tabs_and_text_in_quotes(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('\ufeffquestion;doc;answer\n"who;\nwhere?";"says ""yes""";x\n', encoding="utf-8")
    (one,) = load_samples(path, {"documents": "doc"})
    assert (one.question, one.documents[0].text, one.answers) == ("who;\nwhere?", 'says "yes"', ("x",))
    tabs = tmp_path / "a.tsv"
    tabs.write_text("question\tdoc\nwho?\tone, two\n")
    assert load_samples(tabs, {"documents": "doc"})[0].documents == (fl.Document("", "one, two"),)


def test_a_long_cell_is_read_and_the_limit_of_the_module_is_left(tmp_path: Path) -> None:
    limit = csv.field_size_limit()
    path = write_csv(tmp_path / "a.csv", [{"question": "q?", "doc": "word " * 60_000}])
    assert len(load_samples(path, {"documents": "doc"})[0].documents[0].text) == 300_000
    assert csv.field_size_limit() == limit


def test_without_pyarrow_a_parquet_file_says_what_to_install(tmp_path: Path, monkeypatch: Any) -> None:
    path = tmp_path / "a.parquet"
    pd.DataFrame([{"question": "q?", "documents": ["one"]}]).to_parquet(path)
    monkeypatch.setitem(sys.modules, "pyarrow.parquet", None)
    with pytest.raises(
        ImportError, match=r"Parquet files are read with pyarrow, which is missing; pip install pyarrow"
    ):
        load_samples(path)


# Documents


@pytest.mark.parametrize(
    "documents",
    [
        TITLED,
        [["A", "one"], ["B", ["two"]]],
        {"title": ["A", "B"], "text": ["one", "two"]},
        json.dumps(TITLED),
        str(TITLED),
        [{"page_title": "A", "contents": "one"}, {"page_title": "B", "contents": "two"}],
    ],
)
def test_documents_of_every_form(documents: Any) -> None:
    assert sample(documents=documents).documents == (fl.Document("A", "one"), fl.Document("B", "two"))


def test_fields_of_documents_can_be_named() -> None:
    documents = [{"content": "no", "body": "yes", "h": "head"}]
    with pytest.raises(
        ValueError, match=r"row 1: documents\[0\] has several fields that can be its text: 'content', 'bo"
    ):
        sample(documents=documents)
    assert sample({"text": "body", "title": "h"}, documents=documents).documents == (fl.Document("head", "yes"),)
    with pytest.raises(ValueError, match=r"documents\[0\] has no field 'bodi'; there are 'content', 'body', 'h'"):
        sample({"text": "bodi"}, documents=documents)
    with pytest.raises(ValueError, match=r"documents\[0\] has no field with a usual name for its text; there are 'x'"):
        sample(documents=[{"x": "one"}])


@pytest.mark.parametrize("names", ["d1+d2+d3", ["d1", "d2", "d3"]])
def test_documents_in_several_columns_of_which_some_are_empty(names: Any) -> None:
    cells = {"question": "q?", "d1": "one", "d2": "", "d3": "three", "t1": "T1", "t2": "T2", "t3": "T3"}
    columns = {"documents": names, "titles": ["t1", "t2", "t3"], "relevant": "r"}
    for relevant in (2, "d3", "T3", "three"):
        (one,) = load_samples([{**cells, "r": relevant}], columns)
        assert one.documents == (fl.Document("T1", "one"), fl.Document("T3", "three"))
        assert one.gold_indices == (1,)
    with pytest.raises(ValueError, match=r"document 1 is relevant, but its column is empty in this row"):
        load_samples([{**cells, "r": 1}], columns)


def test_a_column_with_a_plus_sign_or_dots_in_its_name_is_that_column() -> None:
    (one,) = load_samples([{"question": "q?", "a+b": ["one"], "c.d": "x"}], {"documents": "a+b", "answers": "c.d"})
    assert (one.documents[0].text, one.answers) == ("one", ("x",))
    (two,) = load_samples([{"question": "q?", "docs": ["one"], "c": {"d": ["x"]}}], {"answers": "c.d"})
    assert two.answers == ("x",)


def test_titles_of_their_own_column() -> None:
    titles = ["A", None, "C"]
    assert [d.title for d in sample({"titles": "heads"}, heads=titles).documents] == ["A", "", "C"]
    with pytest.raises(ValueError, match=r"row 1: there are 2 titles for 3 documents; give one per document"):
        sample({"titles": "heads"}, heads=["A", "B"])


@pytest.mark.parametrize("documents", [None, "", [], {}])
def test_a_row_without_documents_is_refused(documents: Any) -> None:
    with pytest.raises(ValueError, match=r"the list, row 1: there are no documents; a sample needs at least one"):
        sample(documents=documents)


def test_a_text_that_begins_with_a_bracket_is_a_document_and_a_broken_list_is_refused() -> None:
    assert sample(documents="[Music] and then").documents == (fl.Document("", "[Music] and then"),)
    with pytest.raises(ValueError, match=r"begins as a list, but is none in JSON"):
        sample(documents='["one", "two')


# Relevant documents

WITH_IDS = [
    {"id": f"p{i}", "title": title, "text": text}
    for i, (title, text) in enumerate([("A", "a"), ("B", "b"), ("B", "c")])
]


@pytest.mark.parametrize(
    ("relevant", "expected"),
    [
        (1, (1,)),
        (1.0, (1,)),
        ("1", (1,)),
        ([2, 0], (0, 2)),
        ("0,2", (0, 2)),
        ("[0, 2]", (0, 2)),
        ([False, True, True], (1, 2)),
        ([0, 1, 0], (1,)),
        ("p2", (2,)),
        (["p0", "p2"], (0, 2)),
        ("A", (0,)),
        ("B", (1, 2)),
        ("c", (2,)),
        (None, ()),
        ("", ()),
        ([], ()),
        (float("nan"), ()),
    ],
)
def test_relevant_documents_of_every_form(relevant: Any, expected: tuple[int, ...]) -> None:
    frame = pd.DataFrame([{"question": "q?", "documents": WITH_IDS, "relevant": relevant}])
    assert load_samples(frame)[0].gold_indices == expected


def test_flags_in_the_documents_mark_the_relevant_ones() -> None:
    documents = [{"text": "a", "is_supporting": False}, {"text": "b", "is_supporting": True}]
    assert sample(documents=documents).gold_indices == (1,)
    other = [{"text": "a", "good": 1}, {"text": "b", "good": 0}]
    assert sample(documents=other).gold_indices == ()
    assert sample({"relevant": "good"}, documents=other).gold_indices == (0,)


@pytest.mark.parametrize(
    ("relevant", "message"),
    [
        (3, "no document is 3; there are the indices 0 to 2, the ids 'p0', 'p1', 'p2' and the titles 'A', 'B', 'B'"),
        (["A", "D"], "no document is 'D'"),
        ([True, False], "there must be one true or false for each of the 3 documents"),
    ],
)
def test_a_relevant_document_that_is_not_there_is_refused(relevant: Any, message: str) -> None:
    with pytest.raises(ValueError, match=f"the list, row 1: .*{message}"):
        sample(documents=WITH_IDS, relevant=relevant)


def test_a_value_that_can_mean_two_documents_is_refused_until_its_kind_is_named() -> None:
    documents = [{"id": "1", "text": "a"}, {"id": "0", "text": "b"}]
    with pytest.raises(
        ValueError, match=r"can be meant by its index or by its id; give the column the name 'relevant_index' or"
    ):
        sample(documents=documents, relevant="1")
    assert sample({"relevant_index": "r"}, documents=documents, r="1").gold_indices == (1,)
    assert sample({"relevant_id": "r"}, documents=documents, r=1).gold_indices == (0,)
    with pytest.raises(ValueError, match=r"are \[1, 0\], which can be indices or one mark per document"):
        sample(documents=["a", "b"], relevant=[1, 0])
    assert sample({"relevant_flag": "r"}, documents=["a", "b"], r=[1, 0]).gold_indices == (0,)
    assert sample({"relevant_index": "r"}, documents=["a", "b"], r=[1, 0]).gold_indices == (0, 1)
    assert sample(documents=["a"], relevant=[1]).gold_indices == (0,)


# Answers, ids and messages


@pytest.mark.parametrize(
    ("answers", "expected"),
    [
        ("x", ("x",)),
        (["x", "y", "x"], ("x", "y")),
        ({"text": ["x"], "answer_start": [0]}, ("x",)),
        ([{"text": "x"}, {"answer": "y"}], ("x", "y")),
        ('["x", "y"]', ("x", "y")),
        (1932, ("1932",)),
        (None, ()),
        ([], ()),
    ],
)
def test_answers_of_every_form(answers: Any, expected: tuple[str, ...]) -> None:
    assert sample(answers=answers).answers == expected


def test_answers_that_match_everything_are_dropped_with_a_warning_or_refused() -> None:
    with pytest.warns(
        UserWarning, match=r"dropped 1 accepted answer\(s\), empty after normalisation \(first: '!', row 1"
    ):
        assert sample(answers=["!", "x"]).answers == ("x",)
    with pytest.raises(
        ValueError, match=r"row 1: no usable answer.*columns=\{'answers': None\} \(--columns answers=\) l"
    ):
        sample(answers=["!"])
    assert sample({"answers": None}, answers=["!"]).answers == ()
    with pytest.raises(ValueError, match=r"row 1: the answer True is a bool"):
        sample(answers=True)


def test_ids_group_rows_and_every_sample_has_an_id_of_its_own() -> None:
    rows = [row(qid="a", relevant=0), row(qid="a", relevant=1), row(qid="a", relevant=1), row(question="r?", qid="b")]
    data = load_samples(rows)
    assert [one.id for one in data] == ["a@0", "a@1", "a@1/2", "b@None"]
    assert data.questions == 2
    assert data[2].name == "1/2"
    train, test = data.split()
    assert {one.question_id for one in train}.isdisjoint(one.question_id for one in test)
    without = load_samples([row(), row(), row(question="r?")])
    assert without.questions == 2
    assert without[0].question_id == hashlib.sha256(b"q?").hexdigest()[:16]


def test_a_draw_can_take_all_samples_of_its_questions() -> None:
    data = load_samples([row(question=f"{i // 2}?", documents=[f"text {i}"]) for i in range(8)])
    drawn = [data.sample(n, 3, per_question=False) for n in range(1, 9)]
    whole = [one.documents[0].text for one in drawn[-1]]
    assert sorted(whole) == [f"text {i}" for i in range(8)]
    assert all(one.questions == (len(one) + 1) // 2 for one in drawn)
    for one in drawn:
        assert [sample.documents[0].text for sample in one] == whole[: len(one)]
    assert [sample.documents[0].text for sample in drawn[3].in_order()] == sorted(whole[:4])
    for n in (0, 9):
        with pytest.raises(ValueError, match=f"n is {n}; it must be 1 to 8, the number of samples"):
            data.sample(n, per_question=False)


def test_a_drawn_selection_of_a_table_keeps_its_order_if_asked(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row(question=f"{i}?", documents=[f"text {i}"]) for i in range(8)])
    drawn = SampleSelection("a.jsonl", part="all", questions=5, own=own_form(path), path=path)
    ordered = replace(drawn, in_order=True)
    names = [one.documents[0].text for one in drawn.open()]
    assert names != sorted(names)
    assert [one.documents[0].text for one in ordered.open()] == sorted(names)
    assert "in_order" not in drawn.describe()
    for selection in (drawn, ordered):
        described = json.loads(json.dumps(selection.describe()))
        assert list(SampleSelection.reopen(described, path).open()) == list(selection.open())


def test_messages_of_a_row_stand_before_the_prompt() -> None:
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    one = sample({"messages": "history"}, history=json.dumps(messages))
    assert one.prompt().conversation.messages == tuple(messages)


# Views and descriptions


def test_a_description_names_the_file_and_views_are_described(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    template = PromptTemplate(instruction="Answer.")
    data = load_samples(path, COLUMNS, template=template)
    assert data.description == {
        "file": "a.jsonl",
        "sha256": hashlib.sha256(path.read_bytes()).hexdigest(),
        "form": "columns",
        "columns": COLUMNS,
        "seed": 42,
        "limit": None,
        "template": {"instruction": "Answer."},
        "dropped_answers": 0,
        "selection": [],
        "rows": 3,
        "questions": 3,
        "samples": 3,
    }
    assert [one.question for one in data[::-1][:2]] == ["q three?", "q two?"]
    assert data[1:].description["selection"] == [{"step": "slice", "start": 1, "stop": 3, "by": 1}]
    assert "Answer." in data[0].prompt()
    assert repr(data) == "OwnData('a.jsonl': 3 samples of 3 questions, form 'columns')"
    assert "q two?" in data._repr_html_()
    assert load_samples(ROWS, COLUMNS).description["in_memory"] is True
    with pytest.raises(ValueError, match="the samples were given in Python, as a list, and not in a file"):
        SampleSelection.reopen({"prompts_sha256": "0"})


def test_the_number_of_documents_keeps_the_relevant_ones() -> None:
    rows = [row(documents=[f"d{i}" for i in range(6)], relevant=[5, 3])]
    (one,) = load_samples(rows, num_documents=3)
    assert [document.text for document in one.documents] == ["d0", "d3", "d5"]
    assert one.gold_indices == (1, 2)
    with pytest.raises(ValueError, match=r"row 1: 2 documents are relevant, but num_documents is 1; give at least 2"):
        load_samples(rows, num_documents=1)


# Errors


def test_a_wrong_column_says_which_there_are(tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(
        ValueError, match=r"a.jsonl, line 1: there is no column 'quest'; there are 'query', 'contexts', "
    ):
        load_samples(path, {"question": "quest"})
    with pytest.raises(ValueError, match=r"columns names the part 'quesion'; there are question, documents, answers"):
        load_samples(path, {"quesion": "query"})
    with pytest.raises(
        ValueError, match=r"line 1: no column has a usual name for the documents; there are 'question', 'x'"
    ):
        load_samples(write_jsonl(path, [{"question": "q?", "x": 1}]))
    with pytest.raises(ValueError, match=r"the columns 'question', 'query' can all be the question; name one of them"):
        load_samples([row(query="r?")])
    with pytest.raises(ValueError, match=r"columns names 'relevant' and 'relevant_id'"):
        load_samples(ROWS, {"relevant": "gold", "relevant_id": "gold"})


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2: broken JSON"),
        ("[1]", r"line 2: the line is \[1\]; it must be a JSON object"),
        ('{"question": "", "documents": ["x"]}', "line 2: the question in column 'question' is ''"),
        ('{"question": 3, "documents": ["x"]}', "line 2: the question in column 'question' is 3"),
        ('{"documents": ["x"]}', "line 2: no column has a usual name for the question"),
        ('{"question": "q?", "documents": ["x", 3]}', r"line 2: documents\[1\] is 3; a document is a text, a dict"),
        ('{"question": "q?", "documents": ["x", " "]}', r"line 2: documents\[1\]: a document has neither a title nor"),
    ],
)
def test_a_bad_row_is_named_with_its_file_and_line(line: str, message: str, tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "a.jsonl", [row()])
    path.write_text(f"{path.read_text()}{line}\n{json.dumps(row())}\n")
    with pytest.raises(ValueError, match=f"a.jsonl, {message}"):
        load_samples(path)


def test_a_bad_row_of_a_table_is_named_with_the_line_on_which_it_begins(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('question,doc\n"q\none?",x\nr?,y,z\n')
    with pytest.raises(ValueError, match=r"a.csv, line 4: the row has 3 cells, and the header has 2 columns"):
        load_samples(path, {"documents": "doc"})
    path.write_text('question,doc\n"q\none?",x\n"r\ns?",\n')
    with pytest.raises(ValueError, match=r"a.csv, line 4: there are no documents"):
        load_samples(path, {"documents": "doc"})
    path.write_text("question,question\na,b\n")
    with pytest.raises(ValueError, match=r"a.csv has two columns 'question'"):
        load_samples(path)


@pytest.mark.usefixtures("unchecked")
def test_sources_of_other_kinds_are_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"there is no file 'nofile.jsonl'"):
        load_samples("nofile.jsonl")
    with pytest.raises(IsADirectoryError):
        load_samples(tmp_path)
    other = tmp_path / "a.txt"
    other.write_text("x")
    with pytest.raises(ValueError, match=r"has the suffix '.txt'; a table ends with .jsonl, .json, .csv"):
        load_samples(other)
    for source in (3, None, iter([])):
        with pytest.raises(TypeError, match=r"give the path of a file"):
            load_samples(source)
    with pytest.raises(TypeError, match=r"source\[1\] is 'x', a str"):
        load_samples([row(), "x"])
    empty = tmp_path / "a.jsonl"
    empty.write_text("")
    with pytest.raises(ValueError, match=r"a.jsonl has no rows"):
        load_samples(empty)
    for name in ("limit", "num_documents"):
        nothing: dict[str, Any] = {name: 0}
        with pytest.raises(ValueError, match=rf"{name} is 0; it must be at least 1"):
            load_samples([row()], **nothing)
