"""Forms of HotpotQA, SQuAD, KILT and RGB, recognised by their fields or named."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import focuslens as fl
from focuslens.data.own_samples import load_samples
from tests.support import own_files

HOTPOTQA_TEXTS = [
    fl.Document("Ferry", "The ferry is slow. It crosses the harbour."),
    fl.Document("Bridge", "The bridge was opened in 1932. Ada Stone drew it."),
    fl.Document("Ada Stone", "Ada Stone was born in Leeds."),
]


def write(path: Path, content: Any) -> Path:
    path.write_text(json.dumps(content))
    return path


@pytest.mark.parametrize("rows", [own_files.HOTPOTQA, own_files.HOTPOTQA_HUB], ids=["original", "hub"])
@pytest.mark.parametrize("form", [None, "hotpotqa"])
def test_hotpotqa(rows: Any, form: Any, tmp_path: Path) -> None:
    data = load_samples(write(tmp_path / "a.json", rows), form=form)
    assert data.description["form"] == "hotpotqa"
    first, second = data
    assert first.documents == tuple(HOTPOTQA_TEXTS)
    assert (first.gold_indices, first.answers, first.question_id) == ((1, 2), ("Leeds",), "h1")
    assert first.prompt().part("relevant") == tuple(map(str, HOTPOTQA_TEXTS[1:]))
    assert (second.gold_indices, second.answers) == ((0,), ("yes",))


def test_hotpotqa_with_retrieved_paragraphs_says_that_facts_are_missing() -> None:
    row = {**own_files.HOTPOTQA[0], "context": own_files.HOTPOTQA[0]["context"][:2]}
    with pytest.warns(
        UserWarning, match="row 1: a relevant document is not among the documents of the row, as in 1 of 2"
    ):
        data = load_samples([row, own_files.HOTPOTQA[1]])
    assert data[0].gold_indices == (1,)


@pytest.mark.parametrize("form", [None, "squad"])
def test_squad(form: Any, tmp_path: Path) -> None:
    original = load_samples(write(tmp_path / "train-v2.0.json", own_files.SQUAD), form=form)
    hub = load_samples(own_files.SQUAD_HUB, form=form)
    assert list(original) == list(hub)
    assert original.description["form"] == hub.description["form"] == "squad"
    assert [(one.question_id, one.answers, one.gold_indices) for one in hub] == [
        ("s1", ("1932",), (0,)),
        ("s2", (), ()),
        ("s3", ("two crowns",), (0,)),
    ]
    assert hub[0].documents == (fl.Document("Harbour Bridge", "The bridge was opened in 1932 by the mayor."),)
    assert len(load_samples(tmp_path / "train-v2.0.json", limit=2)) == 2


def test_squad_names_the_question_of_an_article(tmp_path: Path) -> None:
    content = json.loads(json.dumps(own_files.SQUAD))
    content["data"][0]["paragraphs"][1]["qas"][0]["question"] = " "
    with pytest.raises(ValueError, match=r"a.json, entry 1, paragraphs\[1\], qas\[0\]: the field 'question' is ' '"):
        load_samples(write(tmp_path / "a.json", content))


def test_kilt_with_passages(tmp_path: Path) -> None:
    path = write(tmp_path / "a.json", own_files.KILT)
    for data in (load_samples(path), load_samples(path, {"documents": "ctxs"}, form="kilt")):
        (one,) = data
        assert [document.title for document in one.documents] == ["Ferry", "Bridge", "Bridge"]
        assert (one.gold_indices, one.answers, one.question_id) == ((1, 2), ("1932", "March 1932"), "k1")


def test_kilt_with_evidence_and_without_any_text() -> None:
    (one,) = load_samples(own_files.KILT_EVIDENCE)
    assert one.documents == (fl.Document("Toll", "The toll is two crowns. It was one crown before."),)
    assert one.gold_indices == (0,)
    bare = {name: value for name, value in own_files.KILT[0].items() if name != "ctxs"}
    with pytest.raises(ValueError, match="row 1: the provenance names pages and contains no text"):
        load_samples([bare])


def test_rgb() -> None:
    data = load_samples(own_files.RGB)
    assert data.description["form"] == "rgb"
    for row, one in zip(own_files.RGB, data, strict=True):
        texts = [document.text for document in one.documents]
        assert sorted(texts) == sorted(row["positive"] + row["negative"])
        assert {texts[i] for i in one.gold_indices} == set(row["positive"])
        assert one.question_id == str(row["id"])
    assert [one.answers for one in data] == [("green", "deep green"), ("red",), ("red",)]
    orders = {one.gold_indices for one in data}
    assert len(orders) > 1, "the relevant documents are at the same places in every sample"
    assert list(load_samples(own_files.RGB)) == list(data) != list(load_samples(own_files.RGB, seed=1))


@pytest.mark.usefixtures("unchecked")
def test_a_form_takes_no_columns_and_must_be_known() -> None:
    with pytest.raises(
        ValueError, match=r"columns names 'question', but the form 'rgb' has fields of its own, and takes"
    ):
        load_samples(own_files.RGB, {"question": "query"}, form="rgb")
    name: Any = "triviaqa"
    with pytest.raises(
        ValueError, match="form is 'triviaqa'; it must be one of columns, hotpotqa, squad, kilt, rgb, or"
    ):
        load_samples(own_files.RGB, form=name)
    with pytest.raises(
        ValueError, match="row 1: the field 'supporting_facts' is missing; there are 'context', 'id', 'query'"
    ) as raised:
        load_samples([{"context": [], **own_files.RGB[0]}], form="hotpotqa")
    assert "the form 'hotpotqa' was named; give form='columns' for columns of your own" in str(raised.value)
    assert "the list" in str(raised.value)


def test_columns_that_are_named_are_no_known_form() -> None:
    columns = {"question": "query", "documents": ["positive", "negative"]}
    row = {**own_files.RGB[0], "positive": "one", "negative": "two"}
    data = load_samples([row], columns)
    assert data.description["form"] == "columns"
    assert [document.text for document in data[0].documents] == ["one", "two"]


TEXTS = ["Ferries are slow.", "The bridge was opened in 1932."]
OWN_ROWS: dict[str, dict[str, Any]] = {
    "a list in SQuAD's context": {"question": "q?", "context": TEXTS, "answers": "1932", "relevant": 1},
    "the same in JSON": {"question": "q?", "context": json.dumps(TEXTS), "answers": "1932", "relevant": "1"},
    "placed answers to documents": {
        "question": "q?",
        "context": TEXTS,
        "answers": {"text": ["1932"], "answer_start": [25]},
        "relevant": 1,
    },
    "a text in KILT's output": {"input": "q?", "output": "1932", "contexts": TEXTS, "answer": "1932", "gold_index": 1},
    "texts in KILT's output": {"input": "q?", "output": ["1932"], "contexts": TEXTS, "answer": "1932", "gold_index": 1},
    "messages in KILT's output": {
        "input": "q?",
        "output": [{"role": "assistant", "content": "1932"}],
        "contexts": TEXTS,
        "answer": "1932",
        "gold_index": 1,
    },
    "KILT with a column of relevant documents": {
        "input": "q?",
        "output": [{"answer": "1942"}],
        "contexts": TEXTS,
        "answer": "1932",
        "gold_index": 1,
    },
    "counts in RGB's fields": {
        "query": "q?",
        "answer": "1932",
        "positive": 1,
        "negative": 0,
        "contexts": TEXTS,
        "relevant": [1],
    },
    "texts of contrast beside documents": {
        "query": "q?",
        "answer": "1932",
        "positive": ["yes"],
        "negative": ["no"],
        "contexts": TEXTS,
        "relevant": [1],
    },
    "facts of another kind": {
        "question": "q?",
        "context": TEXTS,
        "supporting_facts": "none",
        "answer": "1932",
        "relevant": 1,
    },
    "texts in SQuAD's paragraphs": {"query": "q?", "paragraphs": TEXTS, "answer": "1932", "relevant": 1},
}


@pytest.mark.parametrize("row", OWN_ROWS.values(), ids=OWN_ROWS)
def test_rows_whose_fields_have_other_shapes_are_columns_of_the_user(row: dict[str, Any]) -> None:
    (one,) = data = load_samples([row])
    assert data.description["form"] == "columns"
    assert [document.text for document in one.documents] == TEXTS
    assert (one.question, one.answers, one.gold_indices) == ("q?", ("1932",), (1,))


def test_a_table_with_lists_in_json_is_not_taken_for_squad(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text('question,context,answers,relevant\nq?,"[""one"", ""two""]",x,1\n')
    (one,) = load_samples(path)
    assert (one.documents, one.gold_indices) == ((fl.Document("", "one"), fl.Document("", "two")), (1,))


@pytest.mark.parametrize(
    ("form", "row", "changes", "message"),
    [
        ("squad", own_files.SQUAD_HUB[0], {"context": ["x"]}, r"the field 'context' is \['x'\]; it must be a text"),
        ("squad", own_files.SQUAD_HUB[0], {"answers": "x"}, "the field 'answers' is 'x'; it must be an object with"),
        ("squad", own_files.SQUAD_HUB[0], {"answers": '["x'}, "the field 'answers': the cell .* begins as a list"),
        ("kilt", own_files.KILT[0], {"output": "x"}, "the field 'output' is 'x'; it must be a list"),
        ("kilt", own_files.KILT[0], {"output": ["x"]}, r"the field 'output\[0\]' is 'x'; it must be an object with"),
        (
            "kilt",
            own_files.KILT[0],
            {"output": [{"provenance": ["x"]}]},
            r"""the field "output\[0\]\['provenance'\]" is \['x'\]; it must be a list of objects""",
        ),
        ("rgb", own_files.RGB[0], {"positive": 1}, "the field 'positive' is 1; it must be a list of texts"),
        ("rgb", own_files.RGB[0], {"negative": ["x", 2]}, r"the field 'negative' is \['x', 2\]; it must be a list"),
        ("rgb", own_files.RGB[0], {"answer": True}, "the field 'answer': the answer True is a bool"),
        (
            "hotpotqa",
            own_files.HOTPOTQA[0],
            {"context": [["A", [1]]]},
            r"the field 'context\[0\]' is \['A', \[1\]\]; it must be a pair of a title and a list of sentences",
        ),
        ("hotpotqa", own_files.HOTPOTQA[0], {"context": "x"}, "the field 'context' is 'x'; it must be a list of pairs"),
        (
            "hotpotqa",
            own_files.HOTPOTQA_HUB[0],
            {"context": {"title": ["A"], "sentences": []}},
            "the field 'context' is {.*}; it must be an object with as many lists of sentences as titles",
        ),
        (
            "hotpotqa",
            own_files.HOTPOTQA[0],
            {"supporting_facts": ["Ferry"]},
            r"the field 'supporting_facts\[0\]' is 'Ferry'; it must be a pair of a title and the number",
        ),
    ],
)
def test_a_named_form_that_does_not_fit_names_the_row_and_the_field(
    form: Any, row: dict[str, Any], changes: dict[str, Any], message: str
) -> None:
    broken = {**row, **changes}
    with pytest.raises(ValueError, match=f"the list, row 1: {message}"):
        load_samples([broken], form=form)
    # In a file whose first row has the form, the others must have it too.
    with pytest.raises(ValueError, match=f"the list, row 2: {message}"):
        load_samples([row, broken])


def test_a_later_row_of_another_shape_says_how_the_form_was_known() -> None:
    with pytest.raises(ValueError, match=r"\(the form 'rgb' was recognised by the first row; give form='columns' for"):
        load_samples([own_files.RGB[0], {**own_files.RGB[1], "positive": 1}])


def test_an_original_file_of_squad_can_begin_without_answers_and_names_a_broken_article(tmp_path: Path) -> None:
    content = json.loads(json.dumps(own_files.SQUAD))
    content["data"][0]["paragraphs"][0]["qas"].reverse()
    data = load_samples(write(tmp_path / "a.json", content))
    assert data.description["form"] == "squad"
    assert [one.gold_indices for one in data] == [(), (0,), (0,)]
    content["data"].append({"title": "T", "paragraphs": [{"context": "x"}]})
    with pytest.raises(ValueError, match=r"a.json, entry 2: the field 'paragraphs' is .*; as in the first article"):
        load_samples(write(tmp_path / "a.json", content))


def test_evidence_and_sentences_can_be_one_text() -> None:
    kilt = json.loads(json.dumps(own_files.KILT_EVIDENCE[0]))
    kilt["output"][0]["provenance"][0]["meta"]["evidence_span"] = "The toll is two crowns."
    assert load_samples([kilt])[0].documents == (fl.Document("Toll", "The toll is two crowns."),)
    hotpotqa = {**own_files.HOTPOTQA[1], "context": [["Ferry", "The ferry is slow."]]}
    assert load_samples([hotpotqa])[0].documents == (fl.Document("Ferry", "The ferry is slow."),)
