"""Result files remain usable after a kill at any byte."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.util.record_file import RecordFile, read_records
from focuslens.util.refused_runs import OtherResultsError
from tests.support.multidoc_files import oracle_record, write

HEADER = {"model": {"name": "a"}, "settings": [{"tau": 0.3}], "seed": 0}
RECORDS: list[dict[str, Any]] = [
    {"id": "q1@0", "text": "plain"},
    {"id": "q2@1", "text": "naïve 東京 🦊"},
    {"id": "q3@2", "text": 'quoted " line\nbreak and \u2028 and \r'},
]


def finished(path: Path) -> RecordFile:
    file = RecordFile(path, HEADER)
    for record in RECORDS:
        file.append([record])
    return file


def test_a_header_and_one_line_a_record(tmp_path: Path) -> None:
    path = tmp_path / "new" / "directory" / "results.jsonl"
    file = finished(path)
    assert file.records == {record["id"]: record for record in RECORDS}
    lines = path.read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert [json.loads(line) for line in lines] == [{"header": HEADER}, *RECORDS]


def test_nothing_is_written_before_the_first_record(tmp_path: Path) -> None:
    RecordFile(tmp_path / "results.jsonl", HEADER)
    assert list(tmp_path.iterdir()) == []


def test_records_written_together_are_separate_lines(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    RecordFile(path, HEADER).append(RECORDS)
    again = RecordFile(path, HEADER)
    assert list(again.records.values()) == RECORDS


def test_killed_at_any_byte_nothing_is_lost_or_repeated(tmp_path: Path) -> None:
    whole = tmp_path / "whole.jsonl"
    finished(whole)
    content = whole.read_bytes()
    ends = [i + 1 for i, byte in enumerate(content) if byte == ord("\n")]
    path = tmp_path / "killed.jsonl"
    for length in range(len(content) + 1):
        path.write_bytes(content[:length])
        file = RecordFile(path, HEADER)
        # Number of whole lines before the cut, minus the header.
        survivors = max(0, sum(end <= length for end in ends) - 1)
        assert list(file.records.values()) == RECORDS[:survivors], length
        for record in RECORDS[survivors:]:
            file.append([record])
        assert path.read_bytes() == content, length


def test_records_are_on_disk_before_append_returns(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "results.jsonl"
    sizes: list[int] = []
    monkeypatch.setattr(os, "fsync", lambda handle: sizes.append(os.fstat(handle).st_size))
    RecordFile(path, HEADER).append(RECORDS[:1])
    assert sizes == [path.stat().st_size]


@pytest.mark.parametrize(
    ("header", "message"),
    [
        ({**HEADER, "seed": 1}, r"\(seed differ; seed was 0, is now 1\)"),
        ({"model": HEADER["model"], "seed": 0}, r"\(settings differ; settings was \[\{\"tau\": 0.3\}\], is now null"),
        ({**HEADER, "extra": True}, r"\(extra differ; extra was null, is now true\)"),
        ({**HEADER, "seed": 1, "model": "b"}, r"\(model, seed differ; model was"),
    ],
)
def test_a_file_of_another_run_is_refused_and_left_alone(tmp_path: Path, header: dict[str, Any], message: str) -> None:
    path = tmp_path / "results.jsonl"
    finished(path)
    content = path.read_bytes() + b'{"id": "half'
    path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        RecordFile(path, header)
    assert path.read_bytes() == content


def test_a_long_difference_is_shortened(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    finished(path)
    with pytest.raises(ValueError, match=r"is now \"x{110,116}\.\.\.\);"):
        RecordFile(path, {**HEADER, "seed": "x" * 1000})


def test_tuples_in_a_header_are_lists_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    RecordFile(path, {"span": (1, 2)}).append(RECORDS)
    assert len(RecordFile(path, {"span": (1, 2)}).records) == 3


@pytest.mark.parametrize(
    "content",
    [
        b"not json\n",
        b'{"id": "q1"}\n{"id": "q2"}\n',
        b"[1, 2]\n",
        b'{"header": 3}\n',
        b"notes without a line break",
        b'{"results": [1, 2]}',
    ],
)
def test_a_file_that_is_something_else_is_refused_and_left_alone(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "precious.json"
    path.write_bytes(content)
    with pytest.raises(ValueError, match=r"precious\.json"):
        RecordFile(path, HEADER)
    assert path.read_bytes() == content


def test_a_broken_line_in_the_middle_is_named(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    finished(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([lines[0], lines[1], b'{"id": \n', lines[3]]))
    with pytest.raises(ValueError, match=r"results.jsonl.*line 3"):
        RecordFile(path, HEADER)


# --- identity of runs ---


def test_other_weights_and_another_template_are_another_model(load_model, samples, tmp_path, monkeypatch):
    loaded = load_model("llama_chat")
    path = tmp_path / "results.jsonl"

    def run(**settings):
        model = fl.FocusModel(loaded.hooked, loaded.tokenizer, name="same", **settings)
        return fl.evaluate(model, samples[:1], max_new_tokens=2, out=path)

    run()
    run()
    with pytest.raises(OtherResultsError, match="results of a different run"):
        run(chat_template_kwargs={"date_string": "26 Jul 2024"})
    with pytest.raises(OtherResultsError, match="results of a different run"):
        run(stop_tokens=())
    # The text of the template also matters, not only its arguments, because Llama 3's template writes today's date.
    with monkeypatch.context() as patch:
        patch.setattr(loaded.tokenizer, "chat_template", f"26 Jul {loaded.tokenizer.chat_template}")
        with pytest.raises(OtherResultsError, match=r"model\.prompt_format was"):
            run()
    weight = next(loaded.hooked.parameters())
    with torch.no_grad():
        weight.mul_(1.01)
    try:
        with pytest.raises(OtherResultsError, match="results of a different run"):
            run()
    finally:
        with torch.no_grad():
            weight.div_(1.01)


def test_a_directory_is_the_same_model_however_it_is_named(checkpoint, monkeypatch):
    directory = checkpoint("llama")
    monkeypatch.chdir(directory.parent)
    names = (str(directory), directory.name, f"./{directory.name}")
    described = [fl.FocusModel.from_pretrained(name, device="cpu").description for name in names]
    assert described[0] == described[1] == described[2]


def test_data_from_a_file_are_named_without_being_told(load_model, tmp_path):
    data = fl.load_multidoc(
        write(tmp_path / "oracle.jsonl", [oracle_record(i) for i in range(4)]), num_documents=1, gold_positions=[0]
    )
    out = tmp_path / "results.jsonl"
    fl.evaluate(load_model("llama"), data[:1], max_new_tokens=1, out=out)
    header = json.loads(out.read_text().splitlines()[0])["header"]
    assert header["data"]["file"] == "oracle.jsonl"
    assert header["data"]["sha256"] != header["data"]["prompts_sha256"]


def test_a_difference_is_named_where_it_is(tmp_path: Path) -> None:
    long = {"a": "x" * 200, "weights": "one"}
    RecordFile(tmp_path / "r.jsonl", {"model": long}).append([{"id": "q"}])
    with pytest.raises(OtherResultsError, match=r'model\.weights was "one", is now "two"'):
        RecordFile(tmp_path / "r.jsonl", {"model": {**long, "weights": "two"}})


def test_a_run_with_another_choice_of_distractors_is_refused(load_model, tmp_path: Path) -> None:
    path, out = write(tmp_path / "oracle.jsonl", [oracle_record(i) for i in range(6)]), tmp_path / "results.jsonl"
    random, similar = (
        fl.load_multidoc(path, num_documents=2, gold_positions=[0], limit=1, distractors=choice)
        for choice in ("random", "bm25")
    )
    fl.evaluate(load_model("llama"), random, max_new_tokens=1, out=out)
    with pytest.raises(OtherResultsError, match=r'data\.distractors was "random", is now "bm25"'):
        fl.evaluate(load_model("llama"), similar, max_new_tokens=1, out=out)


def test_a_header_without_a_choice_of_distractors_means_random_ones(tmp_path: Path) -> None:
    data = {"file": "o", "seed": 1}
    RecordFile(tmp_path / "r.jsonl", {"data": data}).append([{"id": "q"}])
    assert RecordFile(tmp_path / "r.jsonl", {"data": {**data, "distractors": "random"}}).records == {"q": {"id": "q"}}
    for other in ({"distractors": "bm25"}, {"distractors": "bm25", "seed": 2}):
        with pytest.raises(OtherResultsError, match=r'data\.distractors was "random", is now "bm25"'):
            RecordFile(tmp_path / "r.jsonl", {"data": {**data, **other}})
    with pytest.raises(OtherResultsError, match=r"data\.seed was 1, is now 2"):
        RecordFile(tmp_path / "r.jsonl", {"data": {"file": "o", "seed": 2, "distractors": "random"}})


def test_half_a_header_of_other_results_is_that(tmp_path: Path) -> None:
    (tmp_path / "r.jsonl").write_bytes(b'{"header": {"seed": 1, "mod')
    with pytest.raises(OtherResultsError):
        RecordFile(tmp_path / "r.jsonl", {"seed": 2})


@pytest.mark.parametrize(
    ("name", "message"), [("", "is a directory"), ("taken/r.jsonl", "is a file, so there can be no"), (".", "is a dir")]
)
def test_a_path_that_cannot_be_written_is_refused_before_any_work(
    name: str, message: str, tmp_path: Path, load_model, samples, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("taken").write_text("x")
    model = load_model("llama")
    monkeypatch.setattr(type(model), "decode", lambda *_, **__: pytest.fail("the model ran"))
    for work in (fl.evaluate, fl.contextual_scores):
        with pytest.raises(ValueError, match=message):
            work(model, samples, out=name)


@pytest.mark.parametrize("header", [HEADER, {**HEADER, "seed": 1}])
def test_two_runs_at_once_do_not_share_a_file(tmp_path: Path, header: Any) -> None:
    path = tmp_path / "r.jsonl"
    one, other = RecordFile(path, HEADER), RecordFile(path, header)
    one.append(RECORDS[:1])
    content = path.read_bytes()
    with pytest.raises(OtherResultsError, match=r"r\.jsonl was changed by another process since this run opened it"):
        other.append(RECORDS[1:])
    assert path.read_bytes() == content
    one.append(RECORDS[1:])
    assert list(RecordFile(path, HEADER).records) == [record["id"] for record in RECORDS]


def test_a_sample_counts_once(tmp_path: Path) -> None:
    path = tmp_path / "r.jsonl"
    finished(path)
    lines = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(b"".join([*lines, lines[1]]))
    assert [record["id"] for record in read_records(path)[1]] == [record["id"] for record in RECORDS]


def test_a_corrected_relevant_document_is_another_run(load_model, samples, tmp_path: Path) -> None:
    out, model = tmp_path / "r.jsonl", load_model("llama")
    named = [dataclasses.replace(sample, name=f"n{i}") for i, sample in enumerate(samples)]
    corrected = [dataclasses.replace(sample, gold_index=0) for sample in named]
    assert named != corrected
    for work in (fl.evaluate, fl.contextual_scores):
        out.unlink(missing_ok=True)
        work(model, named, max_new_tokens=1, out=out)
        with pytest.raises(OtherResultsError, match="data differ"):
            work(model, corrected, max_new_tokens=1, out=out)


def test_another_configuration_or_vocabulary_is_another_model(checkpoint, samples, tmp_path: Path) -> None:
    directory, out = Path(shutil.copytree(checkpoint("llama"), tmp_path / "model")), tmp_path / "r.jsonl"

    def run() -> None:
        model = fl.FocusModel.from_pretrained(str(directory), device="cpu")
        fl.evaluate(model, samples[:1], max_new_tokens=1, out=out)

    run()
    run()
    config = json.loads((directory / "config.json").read_text())
    (directory / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 1e-2}))
    with pytest.raises(OtherResultsError, match=r"model\.config was"):
        run()
    (directory / "config.json").write_text(json.dumps(config))
    run()
    vocabulary = json.loads((directory / "tokenizer.json").read_text())
    vocabulary["model"]["merges"] = vocabulary["model"]["merges"][:-20]
    (directory / "tokenizer.json").write_text(json.dumps(vocabulary))
    with pytest.raises(OtherResultsError, match=r"prompt_format|prompts_sha256|model differ"):
        run()
    # Reports would look here for the model of the same weights and configuration.
    shutil.rmtree(directory)
