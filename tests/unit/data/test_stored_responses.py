"""Responses that one already has: those of a sample's own row, and those of a file, found by id or question."""

from __future__ import annotations

import csv
import gzip
import json
from pathlib import Path
from typing import Any

import pytest

import focuslens as fl
from focuslens.data._rows import open_rows
from focuslens.data.stored_responses import matched_responses, responses_of_column, responses_of_file
from tests.support.multidoc_files import oracle_record, write

DOCUMENTS = (fl.Document("a", "river"), fl.Document("b", "stone"))
SAMPLES = [
    fl.MultiDocSample("Where is it?", ("x",), DOCUMENTS, 0, "q1"),
    fl.MultiDocSample("who  did it", ("x",), DOCUMENTS, None, "q2", "second"),
]
ROWS = [
    {"qid": i + 1, "id": i, "query": f"what is {word}?", "contexts": ["a", "b"], "answer": word, "response": f"{word}!"}
    for i, word in enumerate(("river", "stone", "door", "tower"))
]
RESPONSES = [row["response"] for row in ROWS]


def matched(rows: list[dict[str, Any]], column: str = "response") -> list[Any]:
    return matched_responses(open_rows(rows), column, SAMPLES)


def lines(path: Path, rows: Any) -> Path:
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


# Responses in the rows of the samples


@pytest.mark.parametrize("columns", [None, {"id": "qid"}, {"id": "id"}])
def test_a_response_is_that_of_the_sample_s_own_row(columns: Any, tmp_path: Path) -> None:
    path = lines(tmp_path / "own.jsonl", ROWS)
    samples = fl.load_samples(path, columns)
    assert responses_of_column("response", samples) == RESPONSES
    assert responses_of_column("response", samples[::-1]) == RESPONSES[::-1]
    _, half = samples.split()
    assert [f"what is {text[:-1]}?" for text in responses_of_column("response", half)] == [s.question for s in half]
    # The same file has the responses of the same rows.
    assert responses_of_file(path, samples, columns) == RESPONSES
    assert responses_of_file(f"{tmp_path}/../{tmp_path.name}/own.jsonl", samples[1:], columns) == RESPONSES[1:]


def test_rows_with_the_same_question_have_responses_of_their_own(tmp_path: Path) -> None:
    rows = [{"query": "which?", "contexts": [f"door {i}"], "response": f"door {i}"} for i in range(3)]
    path = lines(tmp_path / "own.jsonl", rows)
    samples = fl.load_samples(path)
    assert responses_of_column("response", samples) == ["door 0", "door 1", "door 2"]
    assert responses_of_file(path, samples) == ["door 0", "door 1", "door 2"]


def test_a_column_inside_objects_and_one_of_a_lost_in_the_middle_file(tmp_path: Path) -> None:
    nested = lines(tmp_path / "a.jsonl", [{**row, "said": {"text": row["response"]}} for row in ROWS])
    assert responses_of_column("said.text", fl.load_samples(nested)) == RESPONSES
    with pytest.raises(ValueError, match=r"a.jsonl, line 1: there is no column 'said.txt'; there are 'qid', 'id'"):
        responses_of_column("said.txt", fl.load_samples(nested))
    path = write(tmp_path / "oracle.jsonl", [{**oracle_record(i), "said": f"answer {i}"} for i in range(4)])
    data = fl.load_multidoc(path, num_documents=2, gold_positions=(0, 1))
    assert responses_of_column("said", data[3:7]) == ["answer 1", "answer 2", "answer 2", "answer 3"]


def test_a_row_without_a_response_is_named(tmp_path: Path) -> None:
    path = lines(tmp_path / "a.jsonl", [*ROWS[:2], {**ROWS[2], "response": None}])
    with pytest.raises(ValueError, match=r"a.jsonl, line 3: response is None; a response is a text, or a list of"):
        responses_of_column("response", fl.load_samples(path))
    with pytest.raises(ValueError, match="the samples are from no file"):
        responses_of_column("response", SAMPLES)


# Responses in a file of their own


@pytest.mark.parametrize(
    ("columns", "ids"),
    [(None, "qid"), ({"id": "qid"}, "qid"), ({"id": "id"}, "id")],
)
def test_a_file_is_matched_by_the_column_of_ids_that_the_samples_have(columns: Any, ids: str, tmp_path: Path) -> None:
    samples = fl.load_samples(lines(tmp_path / "own.jsonl", ROWS), columns)
    rows = [{"id": row["id"], "qid": row["qid"], "response": row["response"]} for row in reversed(ROWS)]
    assert responses_of_file(lines(tmp_path / "both.jsonl", rows), samples, columns) == RESPONSES
    rows = [{ids: row[ids], "response": row["response"]} for row in reversed(ROWS)]
    assert responses_of_file(lines(tmp_path / "one.jsonl", rows), samples, columns) == RESPONSES


def test_whole_floats_are_the_ids_of_a_file_of_integers(tmp_path: Path) -> None:
    rows = [{"id": i, "query": "which?", "contexts": [f"door {i}"]} for i in range(3)]
    samples = fl.load_samples(lines(tmp_path / "own.jsonl", rows))
    # A column of integers with a gap, as pandas writes it.
    given = [{"id": i, "response": f"door {i:.0f}"} for i in (2.0, 0.0, 1.0)]
    assert responses_of_file(lines(tmp_path / "a.jsonl", given), samples) == ["door 0", "door 1", "door 2"]


def test_ids_that_can_mean_two_columns_of_the_data_are_refused(tmp_path: Path) -> None:
    path = lines(tmp_path / "own.jsonl", ROWS)
    file = lines(tmp_path / "ids.jsonl", [{"id": row["id"], "response": row["response"]} for row in ROWS])
    with pytest.raises(
        ValueError, match=r"ids.jsonl has a row with the id '1' and another with '0', and the data have"
    ):
        responses_of_file(file, fl.load_samples(path))
    assert responses_of_file(file, fl.load_samples(path, {"id": "id"}), {"id": "id"}) == RESPONSES


def test_rows_with_the_same_question_and_other_ids_are_told_apart(tmp_path: Path) -> None:
    rows = [{"qid": f"k{i}", "query": "which?", "contexts": [f"door {i}"]} for i in range(3)]
    samples = fl.load_samples(lines(tmp_path / "own.jsonl", rows))
    given = [{"qid": f"k{i}", "query": "which?", "response": f"door {i}"} for i in (2, 0, 1)]
    assert responses_of_file(lines(tmp_path / "a.jsonl", given), samples) == ["door 0", "door 1", "door 2"]
    # The row of another id has the response to another sample.
    with pytest.raises(ValueError, match=r"has no row with the id 'k1@None' or 'k1', and none with the question"):
        responses_of_file(lines(tmp_path / "a.jsonl", given[:2]), samples)


def test_a_row_with_the_sample_s_id_and_another_question_is_refused(tmp_path: Path) -> None:
    rows = [{"id": i, "question": f"which door {i}?", "documents": ["a"]} for i in range(2)]
    samples = fl.load_samples(lines(tmp_path / "own.jsonl", rows))
    given = [{"id": i, "question": f"Which door {1 - i}", "response": "x"} for i in range(2)]
    with pytest.raises(
        ValueError, match=r"line 1: .* whose question is 'which door 0\?', and another .* 'Which door 1'"
    ):
        responses_of_file(lines(tmp_path / "a.jsonl", given), samples)
    # Many logs have the whole prompt as their input.
    given = [{"id": i, "input": "a whole prompt", "response": f"x{i}"} for i in range(2)]
    assert responses_of_file(lines(tmp_path / "a.jsonl", given), samples) == ["x0", "x1"]


def test_rows_are_found_by_id_question_id_and_question() -> None:
    rows: list[dict[str, Any]] = [
        {"id": "q1@0", "question": "where is it", "response": "one"},
        {"id": "7", "question": "Who did it?", "response": "two"},
    ]
    assert matched(rows) == ["one", "two"]
    rows[1] = {"id": "q2", "response": "two"}
    assert matched(rows) == ["one", "two"]
    # The same answer twice is one answer.
    assert matched([*rows, rows[1]]) == ["one", "two"]


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        (
            [{"id": "q1@0", "response": "a"}],
            r"the list has no row with the id 'q2@second' or 'q2', and none with the questio",
        ),
        (
            [{"id": "q1@0", "response": "a"}, {"id": "q2", "response": "b"}, {"id": "q2", "response": "c"}],
            r"the list has 2 rows with different responses for sample 'q2@second'; give each row the sample's id",
        ),
        ([{"id": "q1", "response": None}, {"id": "q2", "response": "b"}], r"list, row 1: response is None; a response"),
        ([{"id": "q1", "response": [1, "a"]}], r"list, row 1: response is \[1, 'a'\]; a response is a text, or a list"),
    ],
)
def test_rows_that_do_not_fit_are_refused(rows: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        matched(rows)


def test_a_response_is_no_question() -> None:
    rows = [{"id": "1", "question": "other", "response": "Where is it?"}, {"id": "q2", "response": "b"}]
    with pytest.raises(ValueError, match="no row with the id 'q1@0'"):
        matched(rows)


# Files


def test_files_of_every_format_have_the_same_responses(tmp_path: Path) -> None:
    rows = [{"id": "q1", "response": "a, “b”"}, {"id": "q2", "response": "c\nd\u2028e"}]
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    (tmp_path / "a.jsonl").write_text(text + "\n", encoding="utf-8")
    (tmp_path / "a.jsonl.gz").write_bytes(gzip.compress(text.encode()))
    (tmp_path / "a.json").write_text(json.dumps(rows))
    (tmp_path / "data.json").write_text(json.dumps({"data": rows}))
    (tmp_path / "ids.json").write_text(json.dumps({row["id"]: row["response"] for row in rows}))
    for name, delimiter in (("a.csv", ","), ("semicolons.csv", ";"), ("a.tsv", "\t")):
        with (tmp_path / name).open("w", encoding="utf-8-sig", newline="") as file:
            writer = csv.writer(file, delimiter=delimiter)
            writer.writerows([["id", "response"], *(row.values() for row in rows)])
    for path in tmp_path.iterdir():
        assert responses_of_file(path, SAMPLES) == ["a, “b”", "c\nd\u2028e"], path
    (tmp_path / "ids.csv").write_text('id,tokens\nq1,"[1, 2]"\nq2,[3]\n')
    assert responses_of_file(tmp_path / "ids.csv", SAMPLES) == [[1, 2], [3]]
    (tmp_path / "ids.json").write_text('{"q1": [1, 2], "q2": "x"}')
    assert responses_of_file(tmp_path / "ids.json", SAMPLES) == [[1, 2], "x"]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.csv", b"id,answer\nq1,x\n", "has no column 'response' and none 'tokens'; there are 'id', 'answer'"),
        ("a.csv", b"id,tokens\nq1,x\n", "a.csv, line 2: tokens is 'x'; a response is a text, or a list of token ids"),
        ("a.jsonl", b'{"id": 1\n', "a.jsonl, line 1: broken JSON"),
        ("a.json", b"[1, 2]", "a.json, entry 1 is 1; it must be a JSON object"),
        ("a.csv", b"id,response\nq1,\xff\n", "is not in UTF-8"),
        ("a.txt", b"x", "a.txt has the suffix '.txt'; a table ends with .jsonl, .json, .csv"),
    ],
)
def test_other_files_are_refused(name: str, content: bytes, message: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        responses_of_file(tmp_path / name, SAMPLES)
