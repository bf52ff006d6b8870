"""Multi-document data as a lazy sequence: views, splits, and memory use."""

from __future__ import annotations

import gc
import gzip
import importlib
import json
import random
import sys
import tempfile
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from focuslens.data import MultiDocData, load_multidoc
from tests.support.multidoc_files import MAKERS, placed_record, retrieval_record, write


@pytest.fixture(params=[".jsonl", ".jsonl.gz"])
def suffix(request: pytest.FixtureRequest) -> str:
    return request.param


# --- a lazy sequence --------------------------------------------------------------------------------------------------


@pytest.fixture
def data(tmp_path: Path, suffix: str) -> MultiDocData:
    path = write(tmp_path / f"r{suffix}", map(retrieval_record, range(11)))
    return load_multidoc(path, num_documents=5, gold_positions=(0, 2, 4))


def ids(data: MultiDocData) -> list[str]:
    return [sample.id for sample in data]


def test_indexing_slicing_and_iterating_agree(data: MultiDocData) -> None:
    expected = [f"{i}@{p}" for i in range(11) for p in (0, 2, 4)]
    assert ids(data) == expected
    assert [data[i].id for i in range(-33, 33)] == expected * 2
    assert ids(data[4:20:3]) == expected[4:20:3]
    assert ids(data[::-1][2:5]) == expected[::-1][2:5]
    assert (len(data[4:20]), data[4:20].questions, data[5:5].questions) == (16, 6, 0)
    assert data[7] in data
    for out in (33, -34):
        with pytest.raises(IndexError, match=str(out)):
            data[out]


def test_reading_in_any_order_gives_the_same(data: MultiDocData) -> None:
    everything = list(data)
    order = list(range(33)) * 2
    random.Random(1).shuffle(order)
    assert [data[i] for i in order] == [everything[i] for i in order]


def test_description_is_json_and_tells_views_apart(data: MultiDocData, suffix: str) -> None:
    description = data.description
    assert json.loads(json.dumps(description)) == description
    assert description | {"sha256": ""} == {
        "file": f"r{suffix}",
        "sha256": "",
        "kind": "retrieval",
        "num_documents": 5,
        "gold_positions": [0, 2, 4],
        "seed": 42,
        "limit": None,
        "distractors": "random",
        "dropped_answers": 0,
        "selection": [],
        "questions": 11,
        "samples": 33,
    }
    train, test = data.split()
    views = [data, data[:3], data[3:6], train, test, train[:3], *data.split(seed=1), data.sample(3), data.sample(3, 1)]
    assert len({json.dumps(view.description) for view in views}) == len(views)
    assert data[:3].description == data[0:3].description


def test_repr_says_what_it_is(data: MultiDocData, suffix: str) -> None:
    assert repr(data[:4]) == (f"MultiDocData('r{suffix}': 4 samples of 2 questions, 5 documents, gold at (0, 2, 4))")


# --- splits -----------------------------------------------------------------------------------------------------------


def test_split_is_the_authors_permutation_of_the_lines(data: MultiDocData) -> None:
    lines = [str(i) for i in range(11)]
    random.seed(42)  # same as in the authors' generate_focus_dataset.py
    random.shuffle(lines)
    train, test = data.split()
    assert ids(train) == [f"{line}@{p}" for line in lines[:5] for p in (0, 2, 4)]
    assert ids(test) == [f"{line}@{p}" for line in lines[5:] for p in (0, 2, 4)]


@given(st.floats(0.1, 0.9), st.integers(0, 99), st.integers(0, 20), st.integers(24, 33))
@settings(max_examples=30, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_split_keeps_questions_together(data: MultiDocData, fraction: float, seed: int, start: int, stop: int) -> None:
    view = data[start:stop]
    if view.questions * fraction < 1:
        return
    train, test = view.split(fraction, seed)
    assert sorted(ids(train) + ids(test)) == sorted(ids(view))
    assert not {s.question_id for s in train} & {s.question_id for s in test}
    assert abs(train.questions - fraction * view.questions) < 1
    again = view.split(fraction, seed)
    assert (ids(again[0]), ids(again[1])) == (ids(train), ids(test))


def test_split_rounds_down_but_not_for_floating_point(tmp_path: Path) -> None:
    path = write(tmp_path / "p.jsonl", map(placed_record, range(100)))
    data = load_multidoc(path, num_documents=2, gold_positions=(0,))
    assert 100 * 0.29 < 29
    assert [data.split(f)[0].questions for f in (0.29, 0.285, 0.999)] == [29, 28, 99]


@pytest.mark.parametrize("fraction", [0.0, 1.0, -0.5, 1.5, 0.05, float("nan")])
def test_split_refuses_an_empty_side(data: MultiDocData, fraction: float) -> None:
    with pytest.raises(ValueError, match="fraction"):
        data.split(fraction)
    with pytest.raises(ValueError, match="1 question"):
        data[:3].split()


# --- sampling ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("n", [1, 2, 3, 7, 11])
def test_sample_takes_different_questions_evenly(data: MultiDocData, n: int) -> None:
    for seed in range(10):
        drawn = list(data.sample(n, seed))
        assert len({sample.question_id for sample in drawn}) == n
        positions = Counter(sample.gold_index for sample in drawn)
        assert max(positions.values()) - min(positions[p] for p in (0, 2, 4)) <= 1
        assert ids(data.sample(n, seed)) == [sample.id for sample in drawn]
        assert ids(data.sample(11, seed))[:n] == [sample.id for sample in drawn]
    assert len({tuple(ids(data.sample(n, seed))) for seed in range(20)}) > 5
    if n == 1:
        assert {data.sample(1, seed)[0].gold_index for seed in range(40)} == {0, 2, 4}


def test_sample_of_a_view_stays_in_it(data: MultiDocData) -> None:
    train, _ = data.split()
    assert set(ids(train.sample(5))) <= set(ids(train))
    assert set(ids(data[1::3].sample(11))) == {f"{i}@2" for i in range(11)}


@pytest.mark.parametrize("n", [0, -1, 12])
def test_sample_refuses_more_than_there_is(data: MultiDocData, n: int) -> None:
    with pytest.raises(ValueError, match="1 to 11"):
        data.sample(n)


# --- memory and files -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("kind", "distractors"), [*((kind, "random") for kind in MAKERS), ("oracle", "bm25")])
def test_the_file_is_never_in_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, distractors: Any
) -> None:
    monkeypatch.setattr("focuslens.data._distractors._CACHED_PASSAGES", 4)
    monkeypatch.setattr("focuslens.data._source._CACHED_RECORDS", dict.fromkeys(MAKERS, 4))
    path, size = tmp_path / "big.jsonl.gz", 0
    with gzip.open(path, "wt", compresslevel=1) as file:
        for i in range(60):
            record = MAKERS[kind](i)
            for passage in record["ctxs"]:
                passage["text"] += " " + "f" * (112_000 // len(record["ctxs"]))
            size += file.write(json.dumps(record) + "\n")
    assert size > 6_000_000  # 100 kB per line

    importlib.import_module("bm25s")  # its own memory does not count
    tracemalloc.start()
    data = load_multidoc(path, num_documents=2, gold_positions=(0,), distractors=distractors)
    assert all(len(sample.documents) == 2 for sample in data)
    kept, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert kept < 1_500_000
    assert peak < 3_000_000


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="looks at /proc")
@pytest.mark.filterwarnings("error::ResourceWarning", "error::pytest.PytestUnraisableExceptionWarning")
def test_the_temporary_file_goes_with_the_last_view(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(scratch))
    path = write(tmp_path / "r.jsonl.gz", map(retrieval_record, range(3)))

    def held() -> list[str]:
        gc.collect()
        links = [str(link.readlink()) for link in Path("/proc/self/fd").iterdir() if link.is_symlink()]
        return [link for link in links if link.startswith((str(scratch), str(path)))]

    data = load_multidoc(path, num_documents=5, gold_positions=(0,))
    view = data[1:].split()[1]
    assert len(held()) == 1
    del data
    assert view[0].documents
    del view
    assert held() == []
    assert list(scratch.iterdir()) == []


def test_after_close_nothing_new_is_read(tmp_path: Path, suffix: str) -> None:
    path = write(tmp_path / f"r{suffix}", map(retrieval_record, range(3)))
    data = load_multidoc(path, num_documents=5, gold_positions=(0,))
    data.close()
    data.close()
    with pytest.raises(ValueError, match="closed"):
        list(data[:3])


def test_a_gzip_file_by_any_name_is_unpacked(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl.gz", map(retrieval_record, range(3)))
    expected = list(load_multidoc(path, num_documents=5, gold_positions=(1,)))
    renamed = path.rename(tmp_path / "r.txt")
    assert list(load_multidoc(str(renamed), num_documents=5, gold_positions=(1,))) == expected


def test_a_last_line_without_an_end_is_a_line(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", map(retrieval_record, range(3)))
    path.write_bytes(path.read_bytes().rstrip(b"\n"))
    assert load_multidoc(path, num_documents=5, gold_positions=(1,))[2].question == "question 2"
