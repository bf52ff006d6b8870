"""Sample selections: the same samples for all callers and versions, and a JSON description that can be reopened."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from focuslens.cli.main import main
from focuslens.data import load_multidoc
from focuslens.data import selection as selections
from focuslens.data.selection import SampleSelection, open_selections
from focuslens.data.synthetic import load_synthetic
from focuslens.prompts.sample import prompts_digest
from focuslens.studies.helmet import demo
from focuslens.studies.paper.settings import DataSettings, PaperSettings
from focuslens.studies.paper.study import Study
from focuslens.viz.run_report.samples import UnavailableError, reopen_samples
from tests.support.multidoc_files import oracle_record, placed_record, retrieval_record, write

PARTS = ("train", "validation", "test")


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    return {
        "oracle": write(folder / "oracle.jsonl", map(oracle_record, range(24))),
        "placed": write(folder / "placed.jsonl", map(placed_record, range(24))),
        "retrieval": write(folder / "retrieval.jsonl.gz", map(retrieval_record, range(24))),
    }


def digest(samples: Any) -> str:
    return prompts_digest(samples)[:16]


def data_of_command(out: Path, *options: str) -> dict[str, Any]:
    """Description of a command's samples, from its output file."""
    assert main(["harness", *options, "--out", str(out)]) == 0
    return json.loads((out / "focuslens_multidoc.json").read_text())["data"]


# The digests of the prompts were computed before the class SampleSelection existed.


@pytest.mark.parametrize(
    ("kind", "split", "expected"),
    [
        ("oracle", "train", "993747412382f2d5"),
        ("oracle", "test", "71a9a3e16f64bf34"),
        ("oracle", "all", "cd11076aca2a1878"),
        ("placed", "train", "68b1958ae6aa91d2"),
        ("placed", "test", "78074d1da361df59"),
        ("retrieval", "train", "05735d42429d65de"),
        ("retrieval", "test", "068e07e656925cff"),
        ("retrieval", "all", "4f7fd4a0916b9bfc"),
    ],
)
def test_samples_of_a_command_on_a_file(kind, split, expected, files, tmp_path):
    options = ["--split", split, "--documents", "5", "--gold-positions", "0,2", "--samples", "7", "--seed", "3"]
    data = data_of_command(tmp_path, "--data", str(files[kind]), *options)
    assert data["prompts_sha256"][:16] == expected
    assert (data["file"], data["kind"], data["questions"], data["part"]) == (files[kind].name, kind, 7, split)
    assert len(data["sha256"]) == 64
    assert reopen_samples({"data": data}, files[kind]) == list(SampleSelection.reopen(data, files[kind]).open())


def test_a_command_takes_all_questions_where_there_are_fewer_than_asked_for(files, tmp_path):
    data = data_of_command(tmp_path, "--data", str(files["oracle"]), "--split", "train", "--documents", "5")
    assert data["prompts_sha256"][:16] == "34e220e225f3307b"
    assert (data["questions"], data["samples"]) == (12, 12)


@pytest.mark.parametrize(
    ("split", "options", "expected"),
    [
        ("train", ["--documents", "6", "--samples", "7", "--seed", "3"], "adfee130dbe4e427"),
        ("test", ["--documents", "6", "--samples", "7", "--seed", "3"], "268100041e57192d"),
        ("train", ["--gold-positions", "0,4", "--samples", "5"], "37d1f39012f28116"),
        ("test", ["--gold-positions", "0,4", "--samples", "5"], "38d8fbb1ac033fb4"),
    ],
)
def test_samples_of_a_command_on_the_synthetic_corpus(split, options, expected, tmp_path):
    data = data_of_command(tmp_path, "--split", split, *options)
    assert data["prompts_sha256"][:16] == expected
    assert len(reopen_samples({"data": data})) == data["samples"]


def test_validation_samples_of_the_demo():
    samples = SampleSelection(gold_positions=(0, 4), part="validation", questions=5).open()
    assert digest(samples) == "f8f0739d3af78edf"


@pytest.mark.parametrize(
    ("every_position", "validation", "n", "expected"),
    [
        (True, None, None, ("b3d64a3ec35ec57f", "54b2ff00d4d86dc5", "ffc45bb6ae49ebee")),
        (True, 11, 4, ("6a58b585efa767ac", "42fbacfbe22b2d43", "d59c60e5fb0e7452")),
        (False, None, None, ("31387bd4ab429d8d", "e57f9facf4ee8d33", "d1b2e7466671f35d")),
        (False, 3, 4, ("afda854760bc2e61", "e57f9facf4ee8d33", "3e4b19da52f6a9ff")),
        (False, 11, None, ("d8522945d969dee5", "4974db13bbd3860a", "d1b2e7466671f35d")),
    ],
)
def test_samples_of_the_paper_on_a_file(every_position, validation, n, expected, files, tmp_path):
    data = DataSettings(str(files["retrieval"]), 5, (1, 3, 5), every_position, n, validation, n)
    assert_parts(Study(PaperSettings("x", "demo", data=data, seed=5), tmp_path), expected, files["retrieval"])


@pytest.mark.parametrize(
    ("every_position", "n", "expected"),
    [
        (True, 2, ("93dd604b5700ef2c", "caff63cc81c74488", "4e0e2e8fc5659697")),
        (True, None, ("837987fe920286f9", "caff63cc81c74488", "d623e2ad6d879131")),
        (False, 2, ("391d2b6093f74ee1", "0123e3cac22354a2", "4c00286d7089e051")),
        (False, None, ("870660fea6e25ace", "0123e3cac22354a2", "f847c6ceff195883")),
    ],
)
def test_samples_of_the_paper_on_the_synthetic_corpus(every_position, n, expected, tmp_path):
    data = DataSettings("synthetic", 4, (1, 3), every_position, n, 3, n)
    assert_parts(Study(PaperSettings("x", "demo", data=data, seed=5), tmp_path), expected)


def assert_parts(study: Study, expected: tuple[str, ...], file: Path | None = None) -> None:
    """Check that the study's parts and the parts reopened for the report are the expected samples."""
    assert tuple(digest(study.samples(part)) for part in PARTS) == expected
    for part in PARTS:
        samples = study.samples(part)
        described = {**study.selection(part).describe(), "prompts_sha256": prompts_digest(samples)}
        assert str(file) not in described["file"]
        assert reopen_samples({"data": json.loads(json.dumps(described))}, file) == list(samples)


def test_samples_of_helmets_demo():
    assert digest(demo._questions(7, 8, "test", 42)) == "c4a26ce981a047cd"
    assert digest(demo._questions(3, 20, "train", 1)) == "87e96216b32f6a26"


# Reopening from JSON


@pytest.mark.parametrize(
    "selection",
    [
        SampleSelection(),
        SampleSelection(num_documents=3, gold_positions=(0, 2), part="train", questions=4, every_position=True),
        SampleSelection("a.jsonl", part="validation", validation=0.2, seed=7, limit=9),
        SampleSelection("a.jsonl", part="all", steps=({"step": "sample", "n": 3, "seed": 1},)),
        SampleSelection("a.jsonl", distractors="bm25"),
    ],
)
def test_a_selection_survives_its_description(selection: SampleSelection):
    described = json.loads(json.dumps(selection.describe()))
    assert SampleSelection.reopen(described) == selection
    assert SampleSelection.reopen(described).describe() == selection.describe()


def test_a_view_of_a_file_is_opened_again_from_its_own_description(files):
    whole = load_multidoc(files["retrieval"], num_documents=5, gold_positions=(0, 2, 4), seed=3, limit=20)
    train, test = whole.split(0.7, seed=1)
    placed = load_multidoc(files["placed"], num_documents=6, gold_positions=None)
    similar = load_multidoc(files["oracle"], num_documents=6, gold_positions=(0, 3), distractors="bm25")
    assert list(SampleSelection.reopen(similar[5:9].description, files["oracle"]).open()) == list(similar[5:9])
    for view in (whole, train, test[1:9:2], train.sample(5, 2), test[::-1], test[::-2][1:4].sample(2), placed[:7]):
        described = json.loads(json.dumps(view.description))
        file = files["placed" if view.description["kind"] == "placed" else "retrieval"]
        assert list(SampleSelection.reopen(described, file).open()) == list(view)


@pytest.mark.parametrize(
    "description",
    [
        {},
        {"file": "synthetic", "split": "test", "num_documents": 3, "gold_positions": [0], "seed": 42},
        {"part": "test", "file": "a", "documents": 3, "gold_positions": [1], "every_position": True},
        {"file": "a", "num_documents": 3, "gold_positions": [0], "seed": 4, "limit": None, "selection": ["[0:3:1]"]},
        {
            "file": "a",
            "num_documents": 3,
            "gold_positions": [0],
            "seed": 4,
            "limit": None,
            "selection": [{"step": "sort"}],
        },
    ],
)
def test_a_description_of_another_form_is_refused_by_name(description: dict[str, Any]):
    with pytest.raises(ValueError, match="not in the form that this version writes"):
        SampleSelection.reopen(description)
    with pytest.raises(UnavailableError, match="cannot be opened again: the description is not in the form"):
        reopen_samples({"data": description})


def test_a_description_without_a_choice_of_distractors_means_random_ones(files):
    data = load_multidoc(files["oracle"], num_documents=5, gold_positions=(0, 2))
    for description in (data.description, SampleSelection("o", 5, (0, 2), part="all", every_position=True).describe()):
        assert description.pop("distractors") == "random"
        assert list(SampleSelection.reopen(description, files["oracle"]).open()) == list(data)


def test_a_command_chooses_distractors_by_bm25_and_says_so(files, tmp_path):
    options = ["--data", str(files["oracle"]), "--documents", "5", "--split", "all", "--samples", "24"]
    similar, random = (
        data_of_command(tmp_path / choice, *options, "--distractors", choice) for choice in ("bm25", "random")
    )
    assert (similar["distractors"], random["distractors"]) == ("bm25", "random")
    assert set(similar["left_out"]) == {"answers", "near_duplicates"}
    assert "left_out" not in random
    assert data_of_command(tmp_path / "default", *options) == random
    expected = load_multidoc(files["oracle"], num_documents=5, distractors="bm25").sample(24)
    assert similar["prompts_sha256"] == prompts_digest(expected) != random["prompts_sha256"]
    assert reopen_samples({"data": similar}, files["oracle"]) == list(expected)


def test_commands_refuse_bm25_where_data_have_distractors_of_their_own(files, tmp_path, capsys):
    for name, message in (
        ("synthetic", "the synthetic corpus has distractors of its own: leave --distractors out"),
        (str(files["placed"]), "placed.jsonl is of the kind 'placed', and has distractors of its own"),
        (str(files["retrieval"]), "retrieval.jsonl.gz is of the kind 'retrieval', and has distractors of its own"),
    ):
        assert main(["heads", "--data", name, "--distractors", "bm25", "--out", str(tmp_path)]) == 1
        assert message in capsys.readouterr().err
    with pytest.raises(SystemExit):
        main(["heads", "--distractors", "tfidf"])
    assert "invalid choice: 'tfidf'" in capsys.readouterr().err


def test_the_paper_takes_distractors_by_bm25_from_its_settings(files, tmp_path):
    data = DataSettings(str(files["oracle"]), 5, (1, 5), True, 4, 3, 4, "bm25")
    study = Study(PaperSettings("x", "demo", data=data, seed=5), tmp_path)
    whole = load_multidoc(files["oracle"], num_documents=5, gold_positions=(0, 4), seed=5, distractors="bm25")
    by_id = {sample.id: sample for sample in whole}
    for part in PARTS:
        samples = study.samples(part)
        assert samples
        assert list(samples) == [by_id[sample.id] for sample in samples]
        assert study.selection(part).describe()["distractors"] == "bm25"
    other = replace(study, settings=replace(study.settings, data=replace(data, distractors="random")))
    assert other.samples("test") != study.samples("test")


# Opening


def test_a_file_that_several_selections_share_is_scanned_once(files, monkeypatch):
    scans: list[Any] = []

    def load(*arguments: Any, **settings: Any) -> Any:
        scans.append(arguments)
        return load_multidoc(*arguments, **settings)

    monkeypatch.setattr(selections, "load_multidoc", load)
    shared = [
        SampleSelection("o", 5, (0, 4), part=part, validation=2, questions=2, path=files["oracle"]) for part in PARTS
    ]
    opened = open_selections([*shared, SampleSelection(num_documents=2, questions=1)])
    assert len(scans) == 1
    assert [len(samples) for samples in opened] == [2, 2, 2, 1]
    questions = [sample.question_id for samples in opened for sample in samples]
    assert len(set(questions)) == len(questions)


def test_without_a_number_a_part_of_a_file_is_whole_and_of_the_corpus_a_hundred(files):
    half = SampleSelection("o", 5, (0, 4), every_position=True, path=files["oracle"]).open()
    assert list(half) == list(load_multidoc(files["oracle"], num_documents=5, gold_positions=(0, 4)).split()[1])
    assert list(SampleSelection(num_documents=1).open()) == load_synthetic(100, num_documents=1, gold_positions=(0,))


@pytest.mark.parametrize(
    ("selection", "message"),
    [
        (SampleSelection(part="all"), "the synthetic corpus has the parts train, validation and test"),
        (SampleSelection("o", 5, (0,), part="validation"), "validation is 0; set it to the number"),
        (SampleSelection("o", 5, (0,), questions=0), "n is 0"),
        (SampleSelection(distractors="bm25"), "distractors is 'bm25', but the synthetic corpus has distractors of its"),
    ],
)
def test_parts_that_are_not_there_are_refused(selection: SampleSelection, message: str, files):
    with pytest.raises(ValueError, match=message):
        replace(selection, path=files["oracle"]).open()


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_part_is_refused():
    part: Any = "half"
    with pytest.raises(ValueError, match="part is 'half'; it must be one of train, validation, test, all"):
        SampleSelection(part=part)


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_choice_of_distractors_is_refused():
    choice: Any = "tfidf"
    with pytest.raises(ValueError, match="distractors is 'tfidf'; it must be one of random, bm25"):
        SampleSelection(distractors=choice)
