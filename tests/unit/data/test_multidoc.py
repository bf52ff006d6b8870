"""Contents of the samples of lost-in-the-middle files."""

from __future__ import annotations

import gzip
import hashlib
import json
import random
import re
import string
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from focuslens.data import _dropped, load_multidoc
from focuslens.prompts.sample import Document
from tests.support.multidoc_files import MAKERS, Json, oracle_record, placed_record, retrieval_record, titles, write
from tests.support.paths import SHARED_DATA

DATA = SHARED_DATA
ORACLE = DATA / "nq-open-oracle.jsonl.gz"
needs_data = pytest.mark.skipif(not ORACLE.is_file(), reason=f"{ORACLE} is not there")


@pytest.fixture(params=[".jsonl", ".jsonl.gz"])
def suffix(request: pytest.FixtureRequest) -> str:
    return request.param


# --- retrieval results ------------------------------------------------------------------------------------------------


def test_retrieval_takes_the_first_wrong_passages_and_inserts_the_annotated_gold(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"r{suffix}", map(retrieval_record, range(3)))
    data = load_multidoc(path, num_documents=5, gold_positions=(0, 3, 4))
    assert len(data) == 9
    for n, sample in enumerate(data):
        i, position = n // 3, (0, 3, 4)[n % 3]
        assert (sample.question, sample.answers) == (f"question {i}", (f"answer {i}",))
        assert (sample.gold_index, sample.question_id, sample.id) == (position, str(i), f"{i}@{position}")
        assert sample.documents[position] == Document(f"G{i}", f"gold {i}")
        wrong = {
            Document(f"T{i}.{p}", f"text {i}.{p}") for p in (0, 2, 3, 5)
        }  # passages 1 and 4 contain the answer, 6 is the fifth wrong passage
        assert len(sample.documents) == 5
        assert set(sample.documents) - {sample.documents[position]} == wrong


def test_retrieval_shuffles_for_every_question_and_position(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", (retrieval_record(i, 60) for i in range(3)))

    def orders(**options: Any) -> list[list[str]]:
        samples = load_multidoc(path, num_documents=20, gold_positions=(0, 10, 19), **options)
        return [[title.split(".")[1] for title in titles(s) if "." in title] for s in samples]

    found = orders()
    assert len(set(map(tuple, found))) == 9
    assert [sorted(order, key=int) for order in found] == [sorted(found[0], key=int)] * 9
    assert sorted(found[0], key=int) not in found
    assert orders() == found
    assert orders(limit=2) == found[:6]
    assert orders(seed=43) != found


def test_a_sample_does_not_depend_on_the_other_positions_asked_for(tmp_path: Path) -> None:
    for name, maker in MAKERS.items():
        path = write(tmp_path / f"{name}.jsonl", map(maker, range(12)))
        alone = load_multidoc(path, num_documents=5, gold_positions=[3])
        several = load_multidoc(path, num_documents=5, gold_positions=(1, 3))
        assert list(alone) == list(several[1::2])


def test_uniform_over_orders(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", (retrieval_record(i, 4) for i in range(300)))
    firsts = Counter(titles(s)[0].split(".")[1] for s in load_multidoc(path, num_documents=4, gold_positions=(3,)))
    assert set(firsts) == {"0", "2", "3"}
    assert all(abs(count - 100) < 5 * (300 * 1 / 3 * 2 / 3) ** 0.5 for count in firsts.values())


# --- placed -----------------------------------------------------------------------------------------------------------


def test_placed_keeps_the_order_of_the_file(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"p{suffix}", map(placed_record, range(2)))
    data = load_multidoc(path, num_documents=6, gold_positions=None)
    assert [titles(sample) for sample in data] == [
        ["T0.0", "T0.1", "G0", "T0.3", "T0.4", "T0.5"],
        ["T1.0", "T1.1", "G1", "T1.3", "T1.4", "T1.5"],
    ]
    assert [sample.gold_index for sample in data] == [2, 2]
    assert data.description["gold_positions"] is None


def test_placed_with_fewer_documents_and_other_positions(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [placed_record(0)])
    as_it_is = load_multidoc(path, num_documents=4, gold_positions=None)
    assert titles(as_it_is[0]) == ["T0.0", "T0.1", "G0", "T0.3"]
    moved = load_multidoc(path, num_documents=4, gold_positions=(3, 0))
    assert [titles(sample) for sample in moved] == [["T0.0", "T0.1", "T0.3", "G0"], ["G0", "T0.0", "T0.1", "T0.3"]]
    assert [sample.gold_index for sample in moved] == [3, 0]
    assert titles(load_multidoc(path, num_documents=1, gold_positions=(0,))[0]) == ["G0"]


def test_placed_gold_may_differ_from_line_to_line(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", [placed_record(0, gold=4), placed_record(1, gold=0)])
    data = load_multidoc(path, num_documents=6, gold_positions=None)
    assert [sample.gold_index for sample in data] == [4, 0]
    with pytest.raises(ValueError, match=r"p\.jsonl, line 1: the gold passage is at 4.*at least 5 documents"):
        load_multidoc(path, num_documents=4, gold_positions=None)


@pytest.mark.parametrize("maker", [retrieval_record, oracle_record])
def test_only_placed_files_can_leave_the_gold_where_it_is(tmp_path: Path, maker: Callable[[int], Json]) -> None:
    path = write(tmp_path / "x.jsonl", map(maker, range(30)))
    with pytest.raises(ValueError, match="gold_positions is None"):
        load_multidoc(path, num_documents=2, gold_positions=None)


# --- oracle -----------------------------------------------------------------------------------------------------------


def test_oracle_draws_gold_passages_of_other_questions(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"o{suffix}", map(oracle_record, range(60)))
    samples = list(load_multidoc(path, num_documents=10, gold_positions=(0, 5)))
    chosen: Counter[str] = Counter()
    reordered = 0
    for first, second in zip(samples[::2], samples[1::2], strict=True):
        gold = f"G{first.question_id}"
        assert titles(first)[0] == titles(second)[5] == gold
        assert len(set(first.documents)) == 10
        assert set(first.documents) == set(second.documents)  # the same distractors at every position ...
        reordered += titles(first)[1:] != [title for title in titles(second) if title != gold]  # ... reordered
        chosen.update(titles(first)[1:])
    assert reordered > 50
    assert len(chosen) == 60  # every passage is drawn about nine times
    assert max(chosen.values()) <= 25
    again, other = (load_multidoc(path, num_documents=10, gold_positions=(0, 5), seed=seed) for seed in (42, 1))
    assert list(again[:9]) == samples[:9]
    assert [set(sample.documents) for sample in other[:9]] != [set(sample.documents) for sample in samples[:9]]


def test_a_limit_leaves_an_oracle_file_all_its_distractors(tmp_path: Path) -> None:
    path = write(tmp_path / "o.jsonl", map(oracle_record, range(40)))
    whole, limited = (load_multidoc(path, num_documents=20, limit=limit) for limit in (None, 2))
    assert list(limited) == list(whole[:10])
    assert limited.questions == 2


def test_oracle_never_draws_an_answer_the_gold_or_a_passage_twice(tmp_path: Path) -> None:
    records = [
        oracle_record(0, "the capital is Paris", ("Paris!", "City of Light")),
        oracle_record(1, "PARIS is old"),  # the answer in a different case
        oracle_record(2, "a city of the light"),  # the second answer after normalization
        oracle_record(3, "comparison"),  # contains "paris" inside a word
        oracle_record(4, "fine one"),
        oracle_record(5, "fine two"),
        oracle_record(6, "the fine one"),
        oracle_record(7, "fine three"),
    ]
    records[6]["ctxs"][0]["title"] = "G4"  # now the same passage as 4
    records.append(json.loads(json.dumps(records[0])) | {"question": "another", "answers": ["nowhere"]})
    records[7]["ctxs"][0]["title"] = "Paris"  # now the title contains the answer
    path = write(tmp_path / "o.jsonl", records)
    for seed in range(30):
        data = load_multidoc(path, num_documents=3, gold_positions=(0,), seed=seed)
        assert set(titles(data[0])[1:]) == {"G4", "G5"}
        assert titles(data[8])[0] == "G0"
        assert "G0" not in titles(data[8])[1:]
    # A passage with a whole-word answer is never drawn. Passage 3, with the answer inside a word, is used when others
    # run out.
    more = load_multidoc(path, num_documents=4, gold_positions=(0,), limit=1)
    assert set(titles(more[0])) == {"G0", "G3", "G4", "G5"}
    with pytest.raises(ValueError, match=r"line 1: there are 3 distractors, but num_documents=5 needs 4"):
        load_multidoc(path, num_documents=5, gold_positions=(0,), limit=1)


def norm(text: str) -> str:
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(word for word in re.split(r"\s+", kept) if word not in {"a", "an", "the", ""})


@needs_data
def test_the_real_oracle_file(recwarn: pytest.WarningsRecorder, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(_dropped, "_told", {})  # Another test may have read the file in this process.
    data = load_multidoc(ORACLE)
    lines = [json.loads(line) for line in gzip.decompress(ORACLE.read_bytes()).splitlines()]
    assert (len(data), data.questions) == (2655 * 5, 2655)
    # One of the question's three answers is "*", which is dropped.
    assert [str(w.message) for w in recwarn if "line 1452" in str(w.message) and "'*'" in str(w.message)]
    assert data.description["dropped_answers"] == 1
    assert data[1451 * 5].answers == ("a rotationally symmetric saltire", "the symbol \u00d7")
    assert data.description["sha256"] == hashlib.sha256(ORACLE.read_bytes()).hexdigest()

    for n in random.Random(0).sample(range(len(data)), 50):
        sample, line = data[n], lines[n // 5]
        gold = line["ctxs"][0]
        position = (0, 4, 9, 14, 19)[n % 5]
        assert sample.gold_index == position
        assert sample.question == line["question"]
        assert sample.documents[position] == Document(gold["title"], gold["text"])
        others = [document for i, document in enumerate(sample.documents) if i != position]
        assert len(set(others)) == 19
        answers = [norm(answer) for answer in sample.answers]
        assert sample.answers == ("S",) or not any(a in norm(f"{d.title} {d.text}") for a in answers for d in others)
        assert sample.prompt("long").part("relevant") == (f"(Title: {gold['title']}) {gold['text']}",)

    # The answer to "which English alphabet" is "S". Every passage contains the letter, but no distractor contains the
    # word.
    for document in data[1840 * 5].documents[1:]:
        assert "s" not in norm(f"{document.title} {document.text}").split()


def test_lines_that_ask_the_same_question_stay_together(tmp_path: Path) -> None:
    """If one file contains a question at several gold positions, a split keeps the question on one side."""
    records = [placed_record(i, gold=gold) for gold in (0, 3) for i in range(10)]
    data = load_multidoc(write(tmp_path / "both.jsonl", records), num_documents=6, gold_positions=None)
    assert (len(data), data.questions) == (20, 10)
    train, test = data.split()
    assert len(train) == len(test) == 10
    assert not {sample.question for sample in train} & {sample.question for sample in test}
    assert {sample.question_id for sample in data} == {str(i) for i in range(10)}
    assert len({sample.id for sample in data}) == 20
    # Duplicate lines with the same question and gold position are separate samples.
    again = load_multidoc(write(tmp_path / "again.jsonl", records[:3] * 2), num_documents=6, gold_positions=(0, 2))
    assert (len({sample.id for sample in again}), again.questions) == (12, 3)


def test_titles_under_another_name_are_not_lost(tmp_path: Path) -> None:
    record = oracle_record(0)
    record["ctxs"][0]["Title"] = record["ctxs"][0].pop("title")
    write(tmp_path / "file.jsonl", [record])
    with pytest.raises(ValueError, match="has the field 'Title' and no 'title'; name the field of titles 'title'"):
        load_multidoc(tmp_path / "file.jsonl", num_documents=2)


@pytest.mark.parametrize("title", [None, "", "missing"])
@pytest.mark.parametrize("kind", MAKERS)
def test_passages_without_a_title_are_their_texts(tmp_path: Path, kind: str, title: str | None) -> None:
    records = [MAKERS[kind](i) for i in range(8)]
    for record in records:
        for passage in (*record["ctxs"], *filter(None, [record.get("nq_annotated_gold")])):
            if title == "missing":
                del passage["title"]
            else:
                passage["title"] = title
    for sample in load_multidoc(write(tmp_path / "untitled.jsonl", records), num_documents=5, gold_positions=(0, 4)):
        assert titles(sample) == [""] * 5
        assert "Title" not in sample.prompt()
        assert sample.prompt().part("document") == tuple(document.text for document in sample.documents)
