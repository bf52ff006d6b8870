"""Cells and names of columns in tables of users: arrays, floats, parts that are left unread, and fields in objects."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest

import focuslens as fl
from focuslens.data.own_samples import load_samples
from focuslens.data.selection import own_form


def row(**changes: Any) -> dict[str, Any]:
    return {"question": "q?", "documents": ["one", "two", "three"], **changes}


def sample(columns: dict[str, Any] | None = None, **changes: Any) -> fl.MultiDocSample:
    return load_samples([row(**changes)], columns)[0]


@pytest.mark.parametrize(
    "values",
    [
        np.array(["one", "two, or so"]),
        np.array(["one" * 40, "it's two\nlines"], dtype=object),
        np.array([["A", "one"]]),
        np.array([["A", "one"], ["B", "two"]]),
        np.array([None, "one"], dtype=object),
        np.array([1932, 1933]),
        np.array([0.5, np.nan]),
        np.array([True, False]),
        [np.array(["one", "two"])],
    ],
    ids=repr,
)
def test_an_array_as_numpy_prints_it_is_refused_and_never_joined_to_one_text(values: Any, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for column in ("documents", "answers"):
        others = {"question": "q?", **({} if column == "documents" else {"documents": "one"})}
        pd.DataFrame([{**others, column: values}]).to_csv(path, index=False)
        with pytest.raises(
            ValueError, match=r"a.csv, line 2: the cell .*(as NumPy prints an array|is none in JSON); wr"
        ):
            load_samples(path)


def test_lists_and_tuples_that_pandas_wrote_are_read_and_texts_with_brackets_stay(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    for values in (["one's", 'two "2"'], ("one's", 'two "2"'), np.array(["one's"])):
        pd.DataFrame([{"question": "q?", "documents": values}]).to_csv(path, index=False)
        assert [document.text for document in load_samples(path)[0].documents] == list(values)
    for text in ("[1] A note.", "[sic] 'x' 'y'", "(a) one", "('x')", "[1 and 2]", "[12 13 and 14]", "(1932, 1933)"):
        assert sample(documents=text).documents == (fl.Document("", text),)


@pytest.mark.parametrize(
    ("column", "value", "expected"),
    [
        ("relevant_index", [0, 1], (0, 1)),
        ("gold_indices", [0, 1], (0, 1)),
        ("gold_index", [1, 0], (0, 1)),
        ("relevant_flag", [0, 1], (1,)),
        ("relevant_id", "1", (0,)),
        ("relevant_index", "1", (1,)),
        ("gold_index", "1", (1,)),
        ("relevant_title", "1", (0,)),
        ("relevant_text", "A", (1,)),
    ],
)
@pytest.mark.parametrize("named", [False, True])
def test_the_name_of_a_column_says_how_it_names_the_relevant_documents(
    column: str, value: Any, expected: tuple[int, ...], named: bool
) -> None:
    documents = [{"id": "1", "title": "1", "text": "a"}, {"id": "0", "title": "A", "text": "A"}]
    columns = {"relevant": column} if named else None
    assert sample(columns, documents=documents, **{column: value}).gold_indices == expected


def test_two_columns_of_relevant_documents_must_be_told_apart() -> None:
    with pytest.raises(ValueError, match=r"the columns 'relevant', 'relevant_id' can all be the relevant; name one of"):
        sample(relevant=0, relevant_id="a")


def test_indices_that_pandas_saved_as_floats_are_indices(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    table = [row(gold=gold, id=i) for gold, i in ((0, 7), (None, None), (2, 8))]
    pd.DataFrame(table).to_csv(path, index=False)
    assert "0.0" in path.read_text()
    for limit in (None, 1):
        data = load_samples(path, {"relevant": "gold"}, limit=limit)
        assert [one.gold_indices for one in data] == [(0,), (), (2,)][:limit]
        assert [one.question_id for one in data][::2] == ["7", "8"][: len(data)]
    for value in ("0.0", "0.0,2.0", [0.0, 2.0], [1.0, 0.0, 1.0]):
        expected = (0,) if value == "0.0" else (0, 2)
        assert sample(relevant=value).gold_indices == expected
    with_ids = [{"id": i, "text": f"text {i}"} for i in (7, 8)]
    assert sample(documents=with_ids, relevant=8.0).gold_indices == (1,)
    with pytest.raises(ValueError, match=r"no document is '²'"):
        sample(relevant="²")


@pytest.mark.parametrize("suffix", ["frame", ".csv", ".parquet", ".jsonl"])
def test_integers_beside_gaps_are_no_floats(suffix: str, tmp_path: Path) -> None:
    numbers = {"answer": [1932, None, 7], "id": [1, None, 3]}
    frame = pd.DataFrame({"question": ["q?"] * 3, "documents": ["a"] * 3, **numbers})
    path = tmp_path / f"a{suffix}"
    if suffix == ".csv":
        frame.to_csv(path, index=False)
    elif suffix == ".parquet":
        frame.to_parquet(path)
    elif suffix == ".jsonl":
        frame.to_json(path, orient="records", lines=True)
    source = frame if suffix == "frame" else path
    data = load_samples(source)
    assert [one.answers for one in data] == [("1932",), (), ("7",)]
    assert [one.question_id for one in data][::2] == ["1", "3"]
    assert load_samples(source, limit=1)[0].answers == ("1932",)


def test_a_decimal_of_a_table_stays_as_it_is_written(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("question,documents,answer\nq?,a,3.0\nr?,a,\ns?,a,2.5\n")
    assert [one.answers for one in load_samples(path)] == [("3.0",), (), ("2.5",)]


def test_a_part_can_be_left_unread(tmp_path: Path) -> None:
    documents = [{"id": "p", "title": "A", "heading": "B", "text": "a", "gold": True}]
    cells = {"documents": documents, "answers": "?", "relevant": "nothing", "qid": "i"}
    unread: dict[str, Any] = dict.fromkeys(("answers", "relevant", "id", "title", "document_id", "titles", "messages"))
    one = sample(unread, **cells)
    assert (one.answers, one.gold_indices, one.documents) == ((), (), (fl.Document("", "a"),))
    assert one.question_id != "i"
    assert sample({"relevant_id": None, "title": "title", "answers": None}, **cells).gold_indices == ()
    with pytest.raises(ValueError, match=r"no document is 'p'"):
        sample({"document_id": None, "title": None}, documents=documents, relevant="p")
    for part in ("question", "documents", "text"):
        with pytest.raises(ValueError, match=rf"columns\['{part}'\] is None, .* a sample needs its {part}; name a col"):
            sample({part: None})
    (tmp_path / "a.jsonl").write_text(json.dumps(row(answers="?")))
    data = load_samples(tmp_path / "a.jsonl", {"answers": None})
    assert data.description["columns"] == {"answers": None}
    assert list(load_samples(tmp_path / "a.jsonl", json.loads(json.dumps(data.description["columns"])))) == list(data)


def test_fields_of_documents_can_be_in_objects() -> None:
    documents = [{"page_content": "a", "metadata": {"title": "T", "key": i, "good": i == 1}} for i in range(2)]
    columns = {"title": "metadata.title", "document_id": "metadata.key", "relevant": "metadata.good"}
    one = sample(columns, documents=documents)
    assert one.documents == (fl.Document("T", "a"), fl.Document("T", "a"))
    assert one.gold_indices == (1,)
    by_id = sample({**columns, "text": "page_content", "relevant": "r"}, documents=documents, r=[0])
    assert by_id.gold_indices == (0,)
    assert sample({"text": "a.b", "title": "c.d"}, documents=[{"a.b": "x", "c.d": "y"}]).documents[0].text == "x"
    with pytest.raises(
        ValueError, match=r"documents\[0\] has no field 'metadata.name'; there are 'page_content', 'met"
    ):
        sample({"title": "metadata.name"}, documents=documents)


@pytest.mark.parametrize("name", ["a.jsonl", "a.jsonl.gz", "a.json"])
def test_blank_lines_are_skipped_and_counted_in_messages(name: str, tmp_path: Path) -> None:
    path = tmp_path / name

    def write(*lines: str) -> Path:
        text = "\n".join(lines).encode()
        path.write_bytes(gzip.compress(text) if name.endswith(".gz") else text)
        return path

    first, second = (json.dumps(row(question=question)) for question in ("one?", "two?"))
    for lines in ((first, second, ""), ("", first, " ", second, "\t", "", "")):
        data = load_samples(write(*lines))
        assert [one.question for one in data] == [one.question for one in data[:]] == ["one?", "two?"]
        assert [one.question for one in load_samples(path, limit=1)] == ["one?"]
        assert own_form(path) is not None
    with pytest.raises(ValueError, match=rf"{name}, line 4: the question in column 'question' is ''"):
        load_samples(write("", first, "", json.dumps(row(question=""))))
    with pytest.raises(ValueError, match=rf"{name} .*has no rows" if name != "a.json" else "a .json file holds a list"):
        load_samples(write("", ""))


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    frame = pd.DataFrame([["q?", "r?", ["a"]]], columns=pd.Index(["question", "question", "documents"]))
    with pytest.raises(ValueError, match=r"the data frame has two columns 'question'; give each column a name of its"):
        load_samples(frame)
    parquet = pytest.importorskip("pyarrow.parquet")
    table = pytest.importorskip("pyarrow").table([["q?"], ["r?"], ["a"]], names=["question", "question", "documents"])
    parquet.write_table(table, tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=r"a.parquet has two columns 'question'"):
        load_samples(tmp_path / "a.parquet")


# --- missing values and marks ---


@pytest.mark.parametrize("kind", ["list", "jsonl", "parquet"])
def test_nan_is_a_missing_value_in_every_source(kind: str, tmp_path: Path) -> None:
    """The text ``nan`` would be an answer that every response with "nan" in it contains."""
    rows = [row(answers=float("nan"), id=float("nan"), question=f"q {i}?") for i in range(6)]
    source: Any = rows
    if kind == "jsonl":
        source = tmp_path / "a.jsonl"
        source.write_text("".join(json.dumps(one) + "\n" for one in rows))
    elif kind == "parquet":
        source = tmp_path / "a.parquet"
        pd.DataFrame(rows).to_parquet(source)
    samples = load_samples(source)
    assert [one.answers for one in samples] == [()] * 6
    assert len({one.question_id for one in samples}) == 6


def test_nan_in_a_list_of_answers_is_left_out() -> None:
    assert sample(answers=["x", float("nan")]).answers == ("x",)


@pytest.mark.parametrize(
    ("given", "gold"),
    [
        ("0,1,0", (1,)), ("0;0;1", (2,)), ("1|0|1", (0, 2)), (["0", "1", "0"], (1,)), ("[0, 1, 0]", (1,)),
        ("0,2", (0, 2)), ("1", (1,)), ("0,1", (0, 1)), ([0, 0, 1], (2,)), ([2, 2, 2], (2,)),
    ],
)  # fmt: skip
def test_marks_can_be_texts(given: Any, gold: tuple[int, ...]) -> None:
    """As many zeros and ones as documents are marks, and other numbers are indices; as numbers and as texts alike."""
    assert sample(relevant=given).gold_indices == gold


@pytest.mark.parametrize("given", ["0,1", "1;0", ["0", "1"], [0, 0], [1, 1], "1,1"])
def test_marks_that_can_be_indices_are_refused_unless_they_are_named(given: Any) -> None:
    two: dict[str, Any] = {"documents": ["a", "b"]}
    with pytest.raises(ValueError, match="which can be indices or one mark per document"):
        sample(relevant=given, **two)
    numbers = [int(digit) for digit in str(given) if digit.isdigit()]
    by_flag = sample({"relevant_flag": "r"}, r=given, **two).gold_indices
    assert by_flag == tuple(i for i, number in enumerate(numbers) if number)
    assert sample({"relevant_index": "r"}, r=given, **two).gold_indices == tuple(sorted(set(numbers)))


def test_texts_that_are_ids_or_titles_are_no_marks() -> None:
    for name in ("id", "title"):
        documents = [{"text": "a", name: "1"}, {"text": "b", name: "x"}, {"text": "c", name: "0"}]
        with pytest.raises(ValueError, match=f"can be meant by its index or by its {name}"):
            sample(documents=documents, relevant=["1", "0", "0"])


def test_true_and_false_as_texts_are_marks_if_they_are_named() -> None:
    assert sample(relevant_flag=["true", "False", "true"]).gold_indices == (0, 2)


def test_a_field_that_marks_some_documents_only_is_refused() -> None:
    documents = [{"text": "a", "is_gold": True}, {"text": "b"}]
    with pytest.raises(ValueError, match="'is_gold' marks some documents, and document 1 has no such field"):
        sample(documents=documents)
