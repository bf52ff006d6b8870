"""Invalid lost-in-the-middle files, and their error messages."""

from __future__ import annotations

import inspect
import json
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from focuslens.data import load_multidoc
from focuslens.data.positions import spread_positions
from focuslens.data.synthetic import load_synthetic
from focuslens.util.notes import MinorWarning
from tests.support.multidoc_files import MAKERS, Json, oracle_record, placed_record, retrieval_record, write


@pytest.fixture(params=[".jsonl", ".jsonl.gz"])
def suffix(request: pytest.FixtureRequest) -> str:
    return request.param


def drop(*keys: str | int) -> Callable[[Json], Json]:
    return change(*keys, value=None, remove=True)


def change(*keys: str | int, value: object, remove: bool = False) -> Callable[[Json], Json]:
    def edit(record: Json) -> Json:
        target: Any = record
        for key in keys[:-1]:
            target = target[key]
        if remove:
            del target[keys[-1]]
        else:
            target[keys[-1]] = value
        return record

    return edit


BAD: list[tuple[str, Callable[[Json], Json | str], str]] = [
    *[(kind, lambda r: json.dumps(r)[:-5], "broken JSON") for kind in MAKERS],
    *[(kind, lambda _: "[1, 2]", r"the line is \[1, 2\]; it must be a JSON object") for kind in MAKERS],
    *[(kind, drop(name), f"'{name}' is missing") for kind in MAKERS for name in ("question", "answers", "ctxs")],
    *[(kind, drop("ctxs", 0, "text"), r"'text' is missing in ctxs\[0\]") for kind in MAKERS],
    *[
        (kind, change("ctxs", 0, "title", value=7), r"'title' in ctxs\[0\] is 7; it must be a string")
        for kind in MAKERS
    ],
    *[
        (kind, change("ctxs", 0, value={"text": " "}), r"ctxs\[0\]: a document has neither a title nor a text")
        for kind in MAKERS
    ],
    *[(kind, change("question", value="  "), "'question' is empty") for kind in MAKERS],
    *[(kind, change("question", value=3), "'question' is 3; it must be a string") for kind in MAKERS],
    *[(kind, change("answers", value="Paris"), "'answers' is \"Paris\"; it must be a list") for kind in MAKERS],
    *[(kind, change("answers", value=["Paris", 3]), r"answers\[1\] is 3") for kind in MAKERS],
    *[(kind, change("answers", value=["The", "!!!"]), r"no usable answer in \['The', '!!!'\]") for kind in MAKERS],
    *[(kind, change("answers", value=[]), r"no usable answer in \[\]") for kind in MAKERS],
    *[(kind, change("ctxs", value=[]), "'ctxs' is empty") for kind in MAKERS],
    *[(kind, change("ctxs", 0, value="x"), r'ctxs\[0\] is "x"') for kind in MAKERS],
    ("retrieval", drop("ctxs", 4, "hasanswer"), r"'hasanswer' is missing in ctxs\[4\]"),
    ("retrieval", change("ctxs", 4, "hasanswer", value="no"), "it must be true or false"),
    ("retrieval", drop("nq_annotated_gold"), "no gold passage: the field 'nq_annotated_gold' is missing"),
    ("retrieval", change("nq_annotated_gold", "title", value=7), "'title' in nq_annotated_gold is 7"),
    ("retrieval", drop("nq_annotated_gold", "chunked_long_answer"), "'chunked_long_answer' is missing"),
    ("retrieval", lambda r: r | {"ctxs": r["ctxs"][:4]}, "there are 3 distractors, but num_documents=5 needs 4"),
    ("placed", drop("ctxs", 4, "isgold"), r"'isgold' is missing in ctxs\[4\]"),
    ("placed", change("ctxs", 2, "isgold", value=False), "no gold passage"),
    ("placed", change("ctxs", 4, "isgold", value=True), r"more than one gold passage: .* ctxs \[2, 4\]"),
    ("placed", lambda r: r | {"ctxs": r["ctxs"][:4]}, "there are 3 distractors, but num_documents=5 needs 4"),
    ("oracle", change("ctxs", 0, "isgold", value=False), "no gold passage"),
    ("oracle", lambda r: r | {"ctxs": r["ctxs"] * 2}, "2 passages in 'ctxs'"),
]


@pytest.mark.parametrize(("kind", "spoil", "message"), BAD)
def test_a_bad_line_is_refused_by_its_number(
    tmp_path: Path, kind: str, spoil: Callable[[Json], Json | str], message: str
) -> None:
    records: list[Json | str] = [MAKERS[kind](i) for i in range(8)]
    records[2] = spoil(MAKERS[kind](2))
    path = write(tmp_path / "bad.jsonl", records)
    with pytest.raises(ValueError, match=message) as caught:
        load_multidoc(path, num_documents=5, gold_positions=(0, 4))
    assert str(caught.value).startswith(f"{path}, line 3: ")


@pytest.mark.parametrize("line", [1, 8])
@pytest.mark.parametrize("kind", MAKERS)
def test_the_first_and_the_last_line_are_checked_too(tmp_path: Path, suffix: str, kind: str, line: int) -> None:
    records: list[Json | str] = [MAKERS[kind](i) for i in range(8)]
    load_multidoc(write(tmp_path / f"good{suffix}", records), num_documents=5, gold_positions=(0, 4))
    for bad, message in (("{", "broken JSON"), ({"question": "?"}, "is missing")):
        records[line - 1] = bad
        path = write(tmp_path / f"bad{suffix}", records)
        with pytest.raises(ValueError, match=message) as caught:
            load_multidoc(path, num_documents=5, gold_positions=(0, 4))
        assert str(caught.value).startswith(f"{path}, line {line}: ")


@pytest.mark.parametrize("kind", MAKERS)
def test_blank_lines_are_skipped_and_counted_in_messages(tmp_path: Path, suffix: str, kind: str) -> None:
    records: list[Json | str] = [MAKERS[kind](i) for i in range(8)]
    plain = load_multidoc(write(tmp_path / f"plain{suffix}", records), num_documents=5, gold_positions=(0, 4))
    spaced = write(tmp_path / f"spaced{suffix}", ["", *records[:3], " ", *records[3:], "", ""])
    assert list(load_multidoc(spaced, num_documents=5, gold_positions=(0, 4))) == list(plain)
    broken = write(tmp_path / f"broken{suffix}", ["", *records[:3], " ", "{", *records[3:]])
    with pytest.raises(ValueError, match=f"broken{suffix}, line 6: broken JSON"):
        load_multidoc(broken, num_documents=5, gold_positions=(0, 4))


def test_a_bad_line_beyond_the_limit_is_read_only_in_an_oracle_file(tmp_path: Path) -> None:
    for kind, maker in MAKERS.items():
        path = write(tmp_path / f"{kind}.jsonl", [*map(maker, range(8)), "broken"])
        if kind == "oracle":
            with pytest.raises(ValueError, match="line 9: broken JSON"):
                load_multidoc(path, num_documents=5, gold_positions=(0,), limit=3)
        else:
            assert load_multidoc(path, num_documents=5, gold_positions=(0,), limit=3).questions == 3


def test_too_few_oracle_lines(tmp_path: Path) -> None:
    path = write(tmp_path / "o.jsonl", map(oracle_record, range(4)))
    with pytest.raises(ValueError, match=r"line 1: there are 3 distractors, .*num_documents=20 needs 19; .*at most 4"):
        load_multidoc(path)


@pytest.mark.parametrize(
    "damage", [lambda b: b[:-30], lambda b: b[:-8] + bytes(8), lambda b: b[:30] + b"?" * 9 + b[39:]]
)
def test_a_damaged_gzip_stream_is_refused(tmp_path: Path, damage: Callable[[bytes], bytes]) -> None:
    path = write(tmp_path / "r.jsonl.gz", map(retrieval_record, range(30)))
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match=r"r\.jsonl\.gz, line \d+: the gzip stream is damaged"):
        load_multidoc(path, num_documents=5, gold_positions=(0,))


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    path.write_bytes(json.dumps(retrieval_record(0)).encode() + b'\n{"question": "\xff"}\n')
    with pytest.raises(ValueError, match="line 2: broken JSON"):
        load_multidoc(path, num_documents=2, gold_positions=(0,))


def test_an_empty_and_a_missing_file(tmp_path: Path, suffix: str) -> None:
    with pytest.raises(ValueError, match="is empty"):
        load_multidoc(write(tmp_path / f"empty{suffix}", []))
    (tmp_path / "zero.jsonl.gz").touch()
    with pytest.raises(ValueError, match="is empty"):
        load_multidoc(tmp_path / "zero.jsonl.gz")
    with pytest.raises(FileNotFoundError, match=r"nowhere\.jsonl.*lost-in-the-middle"):
        load_multidoc(tmp_path / "nowhere.jsonl")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_documents": 0, "gold_positions": (0,)}, "num_documents is 0"),
        (
            {"num_documents": 3, "gold_positions": (0, 4, 9)},
            "gold_positions 4,9 is outside of the documents: with num_documents 3, positions are 0 to 2; leave "
            "gold_positions out for 0,1,2",
        ),
        ({"num_documents": 5, "gold_positions": (0, -1)}, "gold_positions -1 is outside"),
        ({"num_documents": 5, "gold_positions": (0, 5)}, "gold_positions 5 is outside"),
        ({"num_documents": 5, "gold_positions": (0, 4, 0)}, "repeats"),
        ({"num_documents": 5, "gold_positions": ()}, "gold_positions is empty"),
        ({"num_documents": 5, "gold_positions": (0,), "limit": 0}, "limit is 0"),
    ],
)
def test_options_out_of_range_are_refused(tmp_path: Path, options: Json, message: str) -> None:
    path = write(tmp_path / "r.jsonl", [retrieval_record(0)])
    with pytest.raises(ValueError, match=message):
        load_multidoc(path, **options)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_documents": "3"}, "num_documents is '3', a str; it must be an integer"),
        ({"num_documents": 3.0}, "num_documents is 3.0, a float; it must be an integer"),
        ({"num_documents": True}, "num_documents is True, a bool; it must be an integer"),
        ({"gold_positions": 3}, "gold_positions is 3; it must be a sequence of integers"),
        ({"gold_positions": "0,1"}, "gold_positions is '0,1'; it must be a sequence of integers"),
        ({"gold_positions": (0, "1")}, r"gold_positions\[1\] is '1', a str; it must be an integer"),
        ({"limit": 1.5}, "limit is 1.5, a float; it must be an integer"),
        ({"seed": "1"}, "seed is '1', a str; it must be an integer"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_options_of_another_type_are_refused(tmp_path: Path, options: Json, message: str) -> None:
    path = write(tmp_path / "r.jsonl", [retrieval_record(0)])
    with pytest.raises(TypeError, match=message):
        load_multidoc(path, **options)
    if not {"limit", "seed"} & set(options):
        with pytest.raises(TypeError, match=message):
            load_synthetic(3, **options)


def test_default_positions_are_spread_over_the_documents_there_are(tmp_path: Path) -> None:
    path = write(tmp_path / "r.jsonl", [retrieval_record(0)])
    for documents, positions in ((20, [0, 4, 9, 14, 19]), (3, [0, 1, 2]), (1, [0])):
        if documents < 4:
            data = load_multidoc(path, num_documents=documents)
            assert [sample.gold_index for sample in data] == data.description["gold_positions"] == positions
        assert list(spread_positions(documents)) == positions
    assert inspect.signature(load_multidoc).parameters["gold_positions"].default == "spread"


def test_unusable_answers_are_dropped_aloud_where_others_remain(tmp_path: Path) -> None:
    records = list(map(placed_record, range(4)))
    records[1]["answers"] = ["The", "Paris", "*"]
    records[3]["answers"] = ["!", "Rome"]
    path = write(tmp_path / "p.jsonl", records)
    with pytest.warns(UserWarning, match=r"dropped 3 accepted answer.*'The', line 2") as caught:
        data = load_multidoc(path, num_documents=5, gold_positions=(0,))
    assert len(caught) == 1
    assert [sample.answers for sample in data] == [("answer 0",), ("Paris",), ("answer 2",), ("Rome",)]
    assert data.description["dropped_answers"] == 3


def test_dropped_answers_are_told_once_per_file(tmp_path: Path) -> None:
    records = [MAKERS["retrieval"](i) for i in range(8)]
    for record in records[2:]:
        record["answers"].append("*")
    path = write(tmp_path / "r.jsonl", records)
    for limit, told in ((3, MinorWarning), (3, None), (8, UserWarning), (8, None), (3, None)):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            data = load_multidoc(path, num_documents=5, gold_positions=(0,), limit=limit)
        assert [one.category for one in caught] == ([] if told is None else [told])
        assert data.description["dropped_answers"] == limit - 2


@pytest.mark.parametrize("kind", MAKERS)
def test_answers_dropped_beyond_the_limit_do_not_count(tmp_path: Path, kind: str) -> None:
    records = [MAKERS[kind](i) for i in range(8)]
    for i in (3, 5):
        records[i]["answers"].append("*")
    path = write(tmp_path / "x.jsonl", records)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        clean = load_multidoc(path, num_documents=5, gold_positions=(0,), limit=3)
    assert clean.description["dropped_answers"] == 0
    with pytest.warns(UserWarning, match="dropped 1 accepted"):
        load_multidoc(path, num_documents=5, gold_positions=(0,), limit=4)
