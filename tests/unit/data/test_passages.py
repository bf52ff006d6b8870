"""The passages that ship with the package: form, answers, and samples."""

from __future__ import annotations

import gzip
import json
import re
import string
import sys
from pathlib import Path
from typing import Any

import pytest

import focuslens
from focuslens.data import load_multidoc
from focuslens.prompts.answers import normalize_answer
from focuslens.prompts.sample import Document
from tests.support.paths import ROOT

ASSET = Path(focuslens.__file__).parent / "assets" / "passages.jsonl.gz"
RECORDS: list[dict[str, Any]] = [json.loads(line) for line in gzip.decompress(ASSET.read_bytes()).splitlines()]
PASSAGES: list[dict[str, Any]] = [record["ctxs"][0] for record in RECORDS]


def contains(text: str, phrase: str) -> bool:
    """Whether the text contains the phrase as whole words, regardless of case."""
    return re.search(rf"(?<!\w){re.escape(phrase)}(?!\w)", text, re.IGNORECASE) is not None


def normalised(text: str) -> str:
    """Text after the normalisation that scores responses, between spaces, so that whole words can be searched for."""
    return f" {normalize_answer(text)} "


def repeated(values: list[str]) -> set[str]:
    return {value for value in values if values.count(value) > 1}


@pytest.fixture
def packing(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setattr(sys, "path", [str(ROOT / "experiments"), *sys.path])
    return pytest.importorskip("pack_passages", reason="the experiments are not here")


def test_there_are_144_records_of_one_gold_passage():
    assert len(RECORDS) == 144
    for record in RECORDS:
        assert set(record) == {"question", "answers", "ctxs"}
        (passage,) = record["ctxs"]
        assert set(passage) == {"title", "text", "hasanswer", "isgold"}
        assert passage["hasanswer"] is passage["isgold"] is True


def test_passages_have_70_to_110_words():
    lengths = {passage["title"]: len(passage["text"].split()) for passage in PASSAGES}
    assert {title: length for title, length in lengths.items() if not 70 <= length <= 110} == {}


def test_titles_texts_and_questions_are_unique():
    assert repeated([passage["title"].lower() for passage in PASSAGES]) == set()
    assert repeated([passage["text"] for passage in PASSAGES]) == set()
    assert repeated([record["question"] for record in RECORDS]) == set()


def test_questions_have_the_style_of_natural_questions():
    allowed = set(string.ascii_lowercase + string.digits + " '-")
    for record in RECORDS:
        assert set(record["question"]) <= allowed, record["question"]


def test_texts_consist_of_printable_ascii_characters():
    for record, passage in zip(RECORDS, PASSAGES, strict=True):
        for text in (record["question"], *record["answers"], passage["title"], passage["text"]):
            assert text.isascii(), text
            assert text.isprintable(), text
            assert text == " ".join(text.split())


def test_first_answers_stand_in_their_own_passages_verbatim():
    for record, passage in zip(RECORDS, PASSAGES, strict=True):
        answer = record["answers"][0]
        assert re.search(rf"(?<!\w){re.escape(answer)}(?!\w)", passage["text"]), answer


def test_answers_stand_in_no_other_passage():
    texts = [f"{passage['title']} {passage['text']}" for passage in PASSAGES]
    words = [normalised(text) for text in texts]
    for own, record in enumerate(RECORDS):
        for answer in record["answers"]:
            pattern = re.compile(rf"(?<!\w){re.escape(answer)}(?!\w)", re.IGNORECASE)
            holders = {i for i, text in enumerate(texts) if pattern.search(text)}
            holders |= {i for i, text in enumerate(words) if normalised(answer) in text}
            assert holders <= {own}, (answer, [PASSAGES[i]["title"] for i in holders])


def test_answers_stand_neither_in_the_question_nor_in_the_title():
    for record, passage in zip(RECORDS, PASSAGES, strict=True):
        for answer in record["answers"]:
            assert len(answer) >= 4  # shorter answers are substrings of many responses
            assert normalised(answer) not in normalised(record["question"])
            assert normalised(answer) not in normalised(passage["title"])


def test_answers_stand_at_the_beginning_in_the_middle_and_at_the_end():
    thirds = [0, 0, 0]
    for record, passage in zip(RECORDS, PASSAGES, strict=True):
        thirds[3 * passage["text"].index(record["answers"][0]) // len(passage["text"])] += 1
    assert min(thirds) >= 20, thirds


@pytest.mark.parametrize("num_documents", [10, 20])
def test_samples_have_the_right_documents_and_spans(num_documents: int):
    data = load_multidoc(ASSET, num_documents=num_documents, gold_positions=(0, num_documents // 2))
    assert data.questions == 144
    known = {Document(passage["title"], passage["text"]) for passage in PASSAGES}
    for sample in data:
        prompt, record = sample.prompt("long"), RECORDS[int(sample.question_id)]
        assert (sample.question, list(sample.answers)) == (record["question"], record["answers"])
        assert len(set(sample.documents)) == num_documents
        assert set(sample.documents) <= known
        assert sample.gold_index is not None
        gold = sample.documents[sample.gold_index]
        assert gold == Document(record["ctxs"][0]["title"], record["ctxs"][0]["text"])
        for part, document in zip(prompt.part("document"), sample.documents, strict=True):
            assert document.title in part
            assert document.text in part
        assert prompt.part("relevant") == (prompt.part("document")[sample.gold_index],)
        assert record["answers"][0] in prompt.part("relevant")[0]
        assert not any(contains(part, answer) for part in prompt.part("irrelevant") for answer in sample.answers)


def test_most_distractors_by_bm25_are_of_the_group_of_the_question(packing: Any):
    """With ten documents, up to seven of the nine distractors can be of the group of the question."""
    groups = packing.read_groups(packing.SOURCE.read_text(encoding="utf-8")).values()
    group_of = {record["ctxs"][0]["title"]: i for i, records in enumerate(groups) for record in records}
    counts = [
        sum(group_of[document.title] == group_of[sample.documents[0].title] for document in sample.documents[1:])
        for sample in load_multidoc(ASSET, num_documents=10, gold_positions=(0,), distractors="bm25")
    ]
    assert len(counts) == 144
    assert sum(counts) / len(counts) >= 6
    assert min(counts) >= 3


# --- the source -------------------------------------------------------------------------------------------------------


def test_the_asset_was_packed_from_its_source(packing: Any):
    """The contents are compared and not the bytes, because versions of zlib compress differently."""
    packed = packing.pack(packing.SOURCE.read_text(encoding="utf-8"))
    assert gzip.decompress(packed) == gzip.decompress(ASSET.read_bytes())


def test_the_source_has_18_groups_of_8_passages(packing: Any):
    groups = packing.read_groups(packing.SOURCE.read_text(encoding="utf-8"))
    assert [len(records) for records in groups.values()] == [8] * 18
    assert [record for records in groups.values() for record in records] == RECORDS


def test_the_header_of_the_asset_has_no_time_and_no_file_name():
    header = ASSET.read_bytes()[:10]
    assert header[:3] == b"\x1f\x8b\x08"
    assert header[3] == 0  # flags: no name, no comment
    assert header[4:8] == bytes(4)  # time


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("# T\n? q\n= a\ntext a", "before the first heading"),
        ("## G\n\n# T\n? q\ntext", "no passage"),
        ("## G\n\n# T\n? q\n= a", "no passage"),
        ("## G\n\n## G", "two groups"),
    ],
)
def test_a_broken_source_is_refused(packing: Any, source: str, message: str):
    with pytest.raises(ValueError, match=message):
        packing.read_groups(source)
