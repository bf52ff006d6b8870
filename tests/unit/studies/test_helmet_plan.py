"""A checkout is imported without side effects, and configurations are checked before any model or data is opened."""

from __future__ import annotations

import logging
import random
import shutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import yaml

from focuslens.studies.helmet.checkout import open_checkout
from focuslens.studies.helmet.plan import read_plan
from focuslens.studies.helmet.tasks import CATEGORIES, NEEDLE_QA, TASKS, task_of
from tests.support.helmet_runs import STAND_IN, entries, load, write_data


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_data(tmp_path / "root")


def written(folder: Path, **changes: Any) -> str:
    content = yaml.safe_load((STAND_IN / "configs" / "pair.yaml").read_text()) | changes
    (folder / "own.yaml").write_text(yaml.safe_dump(content))
    return str(folder / "own.yaml")


def test_importing_leaves_python_as_it_was(monkeypatch):
    own = ModuleType("data")
    monkeypatch.setitem(sys.modules, "data", own)
    monkeypatch.setattr(logging.root, "handlers", [])  # with an existing handler, logging.basicConfig does nothing
    path, level = list(sys.path), logging.root.level
    bytecode = set(STAND_IN.rglob("*.pyc"))
    found = open_checkout(STAND_IN)
    assert found.modules["data"].load_data.__globals__["holds"].__module__ == "utils"
    assert sys.modules["data"] is own
    assert not {"utils", "arguments", "model_utils", "eval"} & set(sys.modules)
    assert (sys.path, logging.root.handlers, logging.root.level) == (path, [], level)
    assert logging.root.manager.disable == 0
    assert set(STAND_IN.rglob("*.pyc")) == bytecode
    assert open_checkout(STAND_IN).digest == found.digest


def test_a_checkout_that_is_none_is_named_with_the_remedy(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"nowhere is not a folder.*git clone.*--helmet"):
        open_checkout(tmp_path / "nowhere")
    part = shutil.copytree(STAND_IN, tmp_path / "part", ignore=shutil.ignore_patterns("eval.py"))
    with pytest.raises(FileNotFoundError, match=r"part has no eval\.py"):
        open_checkout(part)


def test_a_package_that_is_missing_is_named(tmp_path, monkeypatch):
    copy = shutil.copytree(STAND_IN, tmp_path / "copy")
    (copy / "utils.py").write_text("import pytrec_eval\n")
    monkeypatch.setitem(sys.modules, "pytrec_eval", None)
    with pytest.raises(ImportError, match=r"needs pytrec_eval.*focuslens\[helmet\].*pip install pytrec-eval-terrier"):
        open_checkout(copy)
    assert "utils" not in sys.modules


def test_a_configuration_is_split_into_tasks_with_options_of_their_own(root):
    _, (first, second) = entries(root, "--shots", "1")
    assert (first.task.name, first.length, first.max_new_tokens) == ("JSON KV", 160, 6)
    assert (second.task.name, second.length, second.max_new_tokens) == ("MK Needle", 120, 4)
    assert first.args.shots == second.args.shots == 1
    assert first.args.use_chat_template is False
    assert first.file(first.args.test_files) == str(root / "data/pairs.jsonl")
    assert first.file(first.args.demo_files) == ""
    assert first.label == "json_kv_pairs_in160"


def test_tasks_and_lengths_are_chosen(root, tmp_path):
    config = written(tmp_path, datasets="json_kv,json_kv", test_files="data/pairs.jsonl,data/pairs.jsonl")
    assert [one.length for one in entries(root, config=config, lengths=[120])[1]] == [120]
    assert [one.dataset for one in entries(root, tasks=["ruler_niah_mk_2"])[1]] == ["ruler_niah_mk_2"]
    with pytest.raises(ValueError, match=r"no task is left of configs/pair.yaml with --tasks json_kv and"):
        entries(root, tasks=["json_kv"], lengths=[120])
    with pytest.raises(ValueError, match=r"there is no task 'json_vk'; the paper's tasks begin with ruler_niah_mk_2"):
        entries(root, tasks=["json_vk"])


def test_what_the_paper_does_not_use_is_left_out_and_what_does_not_exist_refused(root, tmp_path):
    config = written(tmp_path, datasets="narrativeqa_7892,ruler_niah_mk_2")
    checkout = open_checkout(STAND_IN)
    plan = read_plan(checkout, [config], [], root=root)
    assert plan.left_out == ("narrativeqa_7892",)
    assert [one.dataset for one in plan.entries] == ["ruler_niah_mk_2"]
    config = written(tmp_path, datasets="html_to_tsv_0.5k,ruler_niah_mk_2")
    assert read_plan(checkout, [config], [], root=root).left_out == ("html_to_tsv_0.5k",)
    with pytest.raises(ValueError, match="there is no task 'kilt_nqq'"):
        entries(root, config=written(tmp_path, datasets="kilt_nqq,json_kv"))


def test_sixteen_tasks_in_five_categories():
    assert len(TASKS) == 16
    assert CATEGORIES == ("Recall", "RAG", "Re-ranking", "ICL", "Long QA", "Facts")
    found = task_of("icl_nlu_510shot_balance")
    assert found is not None
    assert found.name == "NLU"
    assert task_of("ruler_qa_1") is NEEDLE_QA
    assert task_of("alce_asqa_345") is None


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"test_files": "data/pairs.jsonl"}, "has 2 data sets and 1 test_files"),
        ({"input_max_length": "160,120,80"}, "has 2 data sets and 3 input_max_length"),
        ({"generation_max_length": "160"}, "leaves no room for a prompt"),
        ({"do_sample": True}, "option do_sample = True is not supported: responses are greedy"),
        ({"datasets": "json_kv,json_kv", "test_files": "a.jsonl,a.jsonl", "input_max_length": 160}, "more than once"),
    ],
)
def test_configurations_that_cannot_be_run_are_refused(changes, message, root, tmp_path):
    with pytest.raises(ValueError, match=message):
        entries(root, config=written(tmp_path, **changes))


def test_a_task_that_two_configurations_have_at_one_length_is_refused_before_it_is_run(root, tmp_path):
    (root / "data" / "longer.jsonl").write_text((root / "data" / "pairs.jsonl").read_text())
    other = written(tmp_path, test_files="data/longer.jsonl,data/needles.jsonl", input_max_length="160,90")
    message = r"JSON KV under 160 tokens is in .* more than once \(json_kv_pairs_in160 and json_kv_longer_in160\)"
    with pytest.raises(ValueError, match=message):
        read_plan(open_checkout(STAND_IN), ["configs/pair.yaml", other], [], root=root)
    plan = read_plan(open_checkout(STAND_IN), ["configs/pair.yaml", other], [], root=root, lengths=[120, 90])
    assert [one.length for one in plan.entries] == [120, 90]


@pytest.mark.parametrize("content", ["", "- json_kv\n", "datasets: [\n"])
def test_what_is_no_configuration_is_named(content, root, tmp_path):
    (tmp_path / "own.yaml").write_text(content)
    before = list(sys.argv)
    with pytest.raises(ValueError, match=r"own\.yaml.*(names no data sets|is a YAML file of names and values)"):
        entries(root, config=str(tmp_path / "own.yaml"))
    assert sys.argv == before


def test_one_length_may_stand_for_all(root, tmp_path):
    _, found = entries(root, config=written(tmp_path, input_max_length=200, generation_max_length=8))
    assert [(one.length, one.max_new_tokens) for one in found] == [(200, 8), (200, 8)]


def test_missing_files_are_named_with_the_remedy(root, tmp_path):
    with pytest.raises(FileNotFoundError, match=r"no configuration configs/none.yaml.*it has configs/pair.yaml"):
        entries(root, config="configs/none.yaml")
    (root / "data" / "needles.jsonl").unlink()
    with pytest.raises(
        FileNotFoundError, match=r"of ruler_niah_mk_2 are missing: there is no data/needles.jsonl in .*make-recall"
    ):
        entries(root)


def test_options_that_helmet_refuses_are_told_in_its_words(root):
    before = list(sys.argv)
    with pytest.raises(
        ValueError, match=r"HELMET's own parser refuses the options: .*unrecognized arguments: --color=1"
    ):
        entries(root, "--color=1")
    assert sys.argv == before


def test_data_are_drawn_as_helmet_draws_them_and_others_chance_goes_on(root):
    checkout, (entry, _) = entries(root)
    random.seed(1)
    np.random.seed(1)  # noqa: NPY002
    state = random.getstate()
    data = load(checkout, entry)
    assert random.getstate() == state
    random.seed(42)
    wanted = random.sample(range(8), 5)
    assert [row["answer"][1] for row in data["data"]] == list(map(str, wanted))


def test_data_that_cannot_be_loaded_are_named_with_the_remedy(root, tmp_path):
    (root / "data" / "pairs.jsonl").write_text('{"question": ')
    checkout, (entry, _) = entries(root)
    with pytest.raises(ValueError, match=r"cannot load the data of json_kv \(JSONDecodeError.*cut off"):
        load(checkout, entry)
    config = written(tmp_path, datasets="icl_nlu_5shot_balance,json_kv", test_files=",data/pairs.jsonl")
    checkout, (entry, _) = entries(root, config=config)
    with pytest.raises(ValueError, match=r"icl_nlu_5shot_balance \(RuntimeError.*hub: pip install 'datasets<4'"):
        load(checkout, entry)
