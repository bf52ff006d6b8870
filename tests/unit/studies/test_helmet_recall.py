"""Recall data sets: the fields that HELMET's loaders read, unique answers, and the requested lengths."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from focuslens.data.synthetic import build_tokenizer
from focuslens.studies.helmet.demo import make_demo
from focuslens.studies.helmet.recall import make_recall, wording_tokens


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: Any) -> Any:
    from tests.support.checkpoints import CHATML, _tokenizer

    return _tokenizer(bos=True, chat_template=CHATML)


def rows_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def made(tokenizer: Any, tmp_path_factory: Any) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    out = tmp_path_factory.mktemp("recall")
    config = yaml.safe_load(make_recall(tokenizer, out, [1500, 2500], samples=7).config.read_text())
    names = [f"{name}@{length}" for name, length in zip(*columns(config, "datasets", "input_max_length"), strict=True)]
    files = config["test_files"].split(",")
    return out, {name: rows_of(out / file) for name, file in zip(names, files, strict=True)}


def columns(config: dict[str, Any], *names: str) -> list[list[str]]:
    return [str(config[name]).split(",") for name in names]


def test_the_configuration_names_four_sets_at_every_length(made):
    out, sets = made
    config = yaml.safe_load((out / "configs" / "recall.yaml").read_text())
    assert list(sets) == [
        f"{name}@{length}"
        for name in ("ruler_niah_mk_2", "ruler_niah_mk_3", "ruler_niah_mv", "json_kv")
        for length in (1500, 2500)
    ]
    assert columns(config, "generation_max_length") == [["50", "50", "100", "100", "50", "50", "100", "100"]]
    assert columns(config, "demo_files") == [[""] * 8]
    assert (out / "data/ruler/niah_multikey_2/validation_1500.jsonl").is_file()
    assert all(len(rows) == 7 for rows in sets.values())
    record = json.loads((out / "recall.json").read_text())
    assert {"seed", "samples", "tokenizer", "versions", "files_sha256"} <= record.keys()


@pytest.mark.parametrize("length", [1500, 2500])
def test_needles_are_told_once_and_only_the_key_tells_them_apart(length, made, tokenizer):
    for name, kind in (("ruler_niah_mk_2", "number"), ("ruler_niah_mk_3", "uuid")):
        rows = made[1][f"{name}@{length}"]
        for row in rows:
            lines = row["context"].split("\n")
            (value,) = row["answer"]
            asked = f"For {row['query']} the special magic {kind} is {value}."
            assert lines.count(asked) == 1
            assert row["context"].count(value) == row["context"].count(row["query"]) == 1
            assert row["type_needle_v"] == kind
            assert len({line.split(" the special")[0] for line in lines}) == len(lines) > 3
            assert row["depth"] == pytest.approx(lines.index(asked) / (len(lines) - 1), abs=1e-3)
        assert len({row["depth"] for row in rows}) > 3


def test_several_values_of_one_key_stand_in_a_text(made):
    for row in made[1]["ruler_niah_mv@2500"]:
        assert len(set(row["answer"])) == 4
        assert row["context"].count(row["query"]) == 4
        assert row["type_needle_v"] == "numbers"
        for value in row["answer"]:
            assert row["context"].count(f"For {row['query']} the special magic number is {value}.") == 1
        assert row["context"].count("The old road") > 0


def test_json_pairs_are_an_object_with_demonstrations_of_its_own(made):
    rows = made[1]["json_kv@2500"]
    for row in rows:
        pairs = json.loads(row["context"])
        assert pairs[row["question"]] == row["answer"]
        assert len(pairs) == row["num_kvs"]
        assert list(pairs).index(row["question"]) == round(row["depth"] * (len(pairs) - 1))
        assert len(row["demos"]) == 2
        assert all(pairs[key] == value and key != row["question"] for key, value in row["demos"])
    assert len({row["num_kvs"] for row in rows}) == 1
    assert [row["depth"] for row in rows] == [0, 0.2, 0.4, 0.6, 0.8, 1, 0]
    assert (made[0] / f"data/json_kv/test_k{rows[0]['num_kvs']}_dep6.jsonl").is_file()


def test_contexts_fill_what_a_length_leaves_and_no_more(made, tokenizer):
    wording = wording_tokens(tokenizer)
    for name, rows in made[1].items():
        dataset, length = name.split("@")
        room = int(length) - wording - (100 if dataset in ("ruler_niah_mk_3", "json_kv") else 50)
        for row in rows:
            taken = len(tokenizer(row["context"], add_special_tokens=False)["input_ids"])
            # The question, the examples and one further haystack piece need the remaining tokens.
            assert room - 420 < taken < room, name


def test_pieces_that_take_more_tokens_together_than_apart_are_left_away_until_the_rest_fits(tmp_path):
    def growing(text: str, **_: Any) -> dict[str, Any]:
        n = len(text) // 4
        return {"input_ids": range(n + n // 40)}

    made = make_recall(growing, tmp_path, [3000], samples=2, reserve=100)
    for file, most in made.files.items():
        new_tokens = 100 if "multikey_3" in file or "json_kv" in file else 50
        assert 2400 < most <= 3000 - 100 - new_tokens


def test_the_same_seed_makes_the_same_files_and_another_makes_others(tokenizer, tmp_path):
    first, again, other = (
        make_recall(tokenizer, tmp_path / name, [1500], samples=2, seed=seed)
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    )
    assert first.files == again.files
    for file in first.files:
        assert (tmp_path / "a" / file).read_bytes() == (tmp_path / "b" / file).read_bytes()
    both = set(first.files) & set(other.files)
    assert len(both) > 2
    for file in both:
        assert (tmp_path / "a" / file).read_bytes() != (tmp_path / "c" / file).read_bytes()


def test_own_wording_and_own_haystack(tokenizer, tmp_path):
    needle, text = "{value} is what the {kind} of {key} is!", "A wagon rolls. Who knows? The baker sings!"
    made = make_recall(tokenizer, tmp_path, [1500], samples=1, needle=needle, haystack=text, reserve=300)
    (row,) = rows_of(tmp_path / [*made.files][2])
    assert all(f"{value} is what the number of {row['query']} is!" in row["context"] for value in row["answer"])
    assert row["context"].count("A wagon rolls.") > 3  # a short text is repeated
    assert "The old road" not in row["context"]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"samples": 0}, "samples is 0"),
        ({"lengths": []}, "give at least one"),
        ({"lengths": [900, 900]}, "each once"),
        ({"needle": "the {key} is {value}"}, "has no {kind}"),
        ({"reserve": -1}, "reserve is -1"),
        ({"haystack": "  \n"}, "has no sentence"),
        ({"lengths": [300], "reserve": 10}, "length 300 is too short for this tokenizer"),
        ({"lengths": [2500, 2501]}, "length 2501 has room for as many JSON pairs as another length"),
        ({"lengths": [600]}, r"the needles take \d+ tokens of this tokenizer, and the length is too short"),
    ],
)
def test_what_cannot_be_made_is_refused(change, message, tokenizer, tmp_path):
    settings: dict[str, Any] = {"lengths": [1500], "samples": 1, **change}
    with pytest.raises(ValueError, match=message):
        make_recall(tokenizer, tmp_path, settings.pop("lengths"), **settings)
    assert not list(tmp_path.iterdir())


def test_the_embedded_models_set_holds_its_questions_among_as_many_documents_as_fit(tmp_path):
    tokenizer = build_tokenizer()
    made = make_demo(tmp_path, [700, 1400], samples=10)
    config = yaml.safe_load(made.config.read_text())
    assert config["datasets"] == "ruler_qa_1,ruler_qa_1"
    assert config["shots"] == 0
    counts: list[int] = []
    for file, length in zip(made.files, (700, 1400), strict=True):
        rows = rows_of(tmp_path / file)
        assert len({row["question"] for row in rows}) == len({row["id"] for row in rows}) == 10
        for row in rows:
            lines = row["context"].split("\n")
            assert [line.split("(")[0] for line in lines] == [f"Document [{i + 1}]" for i in range(len(lines))]
            gold = lines[round(row["depth"] * (len(lines) - 1))]
            assert row["answer"][0] in gold
            assert len(tokenizer(row["context"])["input_ids"]) < length - 200
        assert len({row["depth"] for row in rows}) == 5
        counts.append(len(rows[0]["context"].split("\n")))
    assert counts[0] < counts[1]
    with pytest.raises(ValueError, match="length 300 has room for"):
        make_demo(tmp_path, [300])
