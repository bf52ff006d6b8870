"""Prompts, metrics and ``eval.py`` of a real HELMET checkout, in the directory that ``HELMET_DIR`` names."""

from __future__ import annotations

import importlib.util
import json
import logging
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import AutoTokenizer

import focuslens as fl
from focuslens.cli.main import main
from focuslens.directions.checkpoints import fold
from focuslens.studies.helmet.answering import Answering, answer_entry, answering_for, declared_penalty
from focuslens.studies.helmet.checkout import Checkout, open_checkout
from focuslens.studies.helmet.plan import Entry, read_plan
from focuslens.studies.helmet.recall import make_recall
from focuslens.studies.helmet.results import write_results
from focuslens.studies.helmet.samples import read_samples, stop_tokens
from focuslens.studies.helmet.tasks import TASKS
from tests.support import helmet_eval, helmet_files
from tests.support.checkpoints import CHECKPOINTS, build_checkpoint
from tests.support.helmet_eval import stand_in_for_pkg_resources

HELMET = os.environ.get("HELMET_DIR", "")
pytestmark = pytest.mark.skipif(not HELMET, reason="HELMET_DIR names no checkout of HELMET")
RECALL = ("ruler_niah_mk_2", "ruler_niah_mk_3", "ruler_niah_mv", "json_kv")
EVERY = (*RECALL, *helmet_files.DATASETS)


@pytest.fixture(scope="module")
def checkout() -> Checkout:
    return open_checkout(HELMET)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: Any) -> dict[str, Path]:
    """A base checkpoint and one with a chat template.

    HELMET does not use flash attention if the path contains "yarn".
    """
    root = tmp_path_factory.mktemp("yarn")
    return {name: build_checkpoint(name, root / f"yarn-{name}") for name in ("llama", "llama_chat")}


@pytest.fixture(scope="module")
def world(tmp_path_factory: Any, folders: dict[str, Path]) -> Path:
    """Data for all sixteen tasks: recall data sets, and synthetic files in HELMET's format for the other tasks."""
    root, tokenizer = tmp_path_factory.mktemp("world"), AutoTokenizer.from_pretrained(folders["llama"])
    made = make_recall(tokenizer, root, [1200], samples=4)
    helmet_files.write_kilt(root)
    helmet_files.write_msmarco(root)
    helmet_files.write_hub_stand_ins(root, tokenizer)
    config = yaml.safe_load(made.config.read_text())
    for dataset, (test, demos, length, new_tokens) in helmet_files.DATASETS.items():
        values = (dataset, test, demos, length, new_tokens)
        names = ("datasets", "test_files", "demo_files", "input_max_length", "generation_max_length")
        config |= {name: f"{config[name]},{value}" for name, value in zip(names, values, strict=True)}
    (root / "all.yaml").write_text(yaml.safe_dump({**config, "max_test_samples": 3}))
    return root


@pytest.fixture
def inside(world: Path, monkeypatch: Any) -> None:
    """Run HELMET in the folder that contains the stand-ins for hub data sets."""
    monkeypatch.chdir(world)


def entry_of(checkout: Checkout, world: Path, dataset: str, *options: str) -> Entry:
    named = ["--model_name_or_path", "yarn", "--output_dir", "out", *options]
    plan = read_plan(checkout, [str(world / "all.yaml")], named, root=world)
    assert [entry.dataset for entry in plan.entries] == list(EVERY)
    return plan.entries[EVERY.index(dataset)]


def load(checkout: Checkout, entry: Entry) -> dict[str, Any]:
    args = entry.args
    return checkout.load(args, entry.dataset, entry.file(args.test_files), entry.file(args.demo_files))


def own_model(checkout: Checkout, folder: Path, entry: Entry, monkeypatch: Any) -> Any:
    """HELMET's model class, opened by HELMET's code."""
    monkeypatch.setitem(sys.modules, "pkg_resources", stand_in_for_pkg_resources())
    return checkout.modules["model_utils"].HFModel(
        str(folder),
        temperature=0.0,
        top_p=1.0,
        max_length=entry.length,
        generation_max_length=entry.max_new_tokens,
        do_sample=False,
        stop_newline=entry.args.stop_newline,
        use_chat_template=entry.args.use_chat_template,
        system_message=entry.args.system_message,
        torch_compile=False,
        torch_dtype=torch.float32,
    )


def collect_results(checkout: Checkout, monkeypatch: Any) -> Any:
    """HELMET's script that collects results, imported as a module."""
    spec = importlib.util.spec_from_file_location("collect_results", checkout.root / "scripts" / "collect_results.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "collect_results", module)  # its dataclass looks the module up in sys.modules
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    spec.loader.exec_module(module)
    return module


def test_importing_leaves_python_as_it_was():
    before, path, handlers = set(sys.modules), list(sys.path), list(logging.root.handlers)
    found = open_checkout(HELMET)
    assert found.modules["data"].load_data.__module__ == "data"
    assert not {"data", "utils", "arguments", "model_utils", "eval"} & (set(sys.modules) - before)
    assert sys.path == path
    assert logging.root.handlers == handlers
    assert not list(Path(HELMET).rglob("__pycache__"))


def test_tasks_and_figures_are_those_of_helmets_own_tables(checkout, monkeypatch):
    known = collect_results(checkout, monkeypatch).dataset_to_metrics
    for task in TASKS:
        shown = next(figures for name, figures in known.items() if name in task.dataset)
        assert shown == [task.metric]


@pytest.mark.parametrize("name", ["llama", "llama_chat"])
@pytest.mark.parametrize("dataset", EVERY)
@pytest.mark.usefixtures("inside")
def test_prompts_are_helmets_byte_for_byte(dataset, name, checkout, world, folders, monkeypatch):
    options = ["--use_chat_template", str(name == "llama_chat"), "--stop_newline", "True"]
    entry = entry_of(checkout, world, dataset, *options)
    theirs = own_model(checkout, folders[name], entry, monkeypatch)
    data = load(checkout, entry)
    model = fl.FocusModel.from_pretrained(str(folders[name]), chat=False, device="cpu", stop_strings=())
    samples = read_samples(checkout, entry, data, model.tokenizer)
    again = load(checkout, entry)
    # For KILT, HELMET draws questions. Each question has two samples, one per depth of its passage.
    assert len(samples) == len(again["data"]) == (6 if dataset.startswith("kilt") else 3)
    assert len({sample.question for sample in samples}) == 3
    for place, sample in enumerate(samples):
        inputs = theirs.prepare_inputs(again["data"][place], again)
        assert sample.tokens.tolist() == inputs.input_ids[0].tolist()
        assert model.tokenizer.decode(sample.tokens) == theirs.tokenizer.decode(inputs["input_ids"][0])
        assert len(sample.tokens) <= entry.length - entry.max_new_tokens + 2
    assert any(sample.truncated for sample in samples) == (dataset == "kilt_hotpotqa")
    vars(entry.args)["model_name_or_path"] = str(folders[name])
    assert set(stop_tokens(model.tokenizer, model.stop_tokens, entry)) == set(theirs.stop_token_ids)


@pytest.mark.parametrize("dataset", EVERY)
@pytest.mark.usefixtures("inside")
def test_metrics_are_helmets_on_the_same_outputs(dataset, checkout, world, folders, tmp_path):
    entry = entry_of(checkout, world, dataset, "--tag", "v1")
    model = fl.FocusModel.from_pretrained(str(folders["llama"]), chat=False, device="cpu", stop_strings=(), n_ctx=4096)
    answering = Answering((fl.Setting("baseline"),), entry.max_new_tokens)
    data, store = answer_entry(model, checkout, entry, answering, tmp_path / "records")
    # Outputs are correct, partly correct or wrong. All outputs of a random model would be wrong.
    for place, record in enumerate(store.records.values()):
        answer = data["data"][place]["answer"]
        right = answer if isinstance(answer, str) else answer[0]
        record["results"]["baseline"]["output"] = f" {right}" if place < 2 else " nothing\nof it"
    scores = write_results(checkout, entry, data, store, model.tokenizer, tmp_path / "output")
    fresh, found = load(checkout, entry), list[float]()
    for place, record in enumerate(store.records.values()):
        item = fresh["data"][place]
        said = fresh["system_template"].format(**item) + record["results"]["baseline"]["output"]
        metrics, _ = fresh["post_process"]({"output": said}, item)
        found.append(100 * float(metrics[entry.task.metric]))
    assert list(scores.values["baseline"]) == found
    assert max(found) > min(found)
    (score,) = (tmp_path / "output" / "yarn-baseline").glob("*.score")
    assert json.loads(score.read_text())[entry.task.metric] == pytest.approx(sum(found) / len(found))
    content = json.loads(score.with_suffix("").read_text())
    assert content["focuslens"]["model"] == model.description


@pytest.mark.usefixtures("inside")
def test_responses_are_those_of_helmets_model_where_a_checkpoint_penalises_repetition(
    checkout, world, folders, tmp_path, monkeypatch
):
    folder = shutil.copytree(folders["llama"], tmp_path / "yarn-penalised")
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "repetition_penalty": 1.3}))
    entry = entry_of(checkout, world, "kilt_nq", "--stop_newline", "True", "--generation_max_length", "30")
    theirs = own_model(checkout, folder, entry, monkeypatch)
    executor = fl.FocusModel.from_pretrained(str(folder), chat=False, device="cpu", stop_strings=(), n_ctx=4096)
    penalty = declared_penalty(executor)
    answering = answering_for(executor, entry, (fl.Setting("baseline"),), (), penalty)
    data, store = answer_entry(executor, checkout, entry, answering, tmp_path / "records")
    plain, changed = replace(answering, repetition_penalty=1.0), 0
    samples = read_samples(checkout, entry, data, executor.tokenizer)
    for record, sample in zip(store.records.values(), samples, strict=True):
        said = theirs.generate(theirs.prepare_inputs(data["data"][int(record["id"])], data))
        found = record["results"]["baseline"]
        assert (found["output"], len(found["tokens"])) == (said["output"], said["output_len"])
        assert (record["input_len"], record["input_text"]) == (said["input_len"], said["input_text"])
        changed += list(plain(executor, [sample])) != [("baseline", [found])]
    assert changed


@pytest.mark.usefixtures("inside")
def test_helmets_own_script_reads_the_files(checkout, world, folders, tmp_path, monkeypatch):
    entry = entry_of(checkout, world, "json_kv", "--tag", "v1")
    model = fl.FocusModel.from_pretrained(str(folders["llama"]), chat=False, device="cpu", stop_strings=(), n_ctx=4096)
    answering = Answering((fl.Setting("baseline"),), entry.max_new_tokens)
    data, store = answer_entry(model, checkout, entry, answering, tmp_path / "records")
    for record in store.records.values():
        record["results"]["baseline"]["output"] = data["data"][int(record["id"])]["answer"]
    write_results(checkout, entry, data, store, model.tokenizer, tmp_path / "output")
    monkeypatch.chdir(tmp_path)
    asked = collect_results(checkout, monkeypatch).arguments()
    asked.update({"tag": "v1", "output_dir": "output/yarn-baseline", "dataset": "json_kv", "shots": 2})
    asked.update({"test_name": Path(entry.args.test_files).stem, "input_max_length": 1200, "max_test_samples": 3})
    assert asked.get_averaged_metric() == {"substring_exact_match": 100.0}


def test_the_embedded_model_can_do_its_own_set_by_helmets_loader(tmp_path, capsys):
    named = ["--helmet", HELMET, "--config", "demo", "--lengths", "700", "--max-test-samples", "12", "--quiet"]
    assert main(["helmet", *named, "--device", "cpu", "--out", str(tmp_path)]) == 0
    assert "Map" not in capsys.readouterr().err  # the datasets library shows no progress bar
    (score,) = (tmp_path / "output" / "demo-baseline").glob("*.score")
    assert json.loads(score.read_text())["substring_exact_match"] > 60


@pytest.mark.slow
def test_evaluation_by_helmet_and_by_focuslens_gives_the_same_tokens(checkout, tmp_path, monkeypatch):
    """HELMET and FocusLens generate the same tokens in the four recall tasks at 8k, with a random model of 4 layers.

    The settings are the baseline and a direction, which is folded into the checkpoint for HELMET.
    """
    make, tokenizer = CHECKPOINTS["llama"]
    sizes = {"num_hidden_layers": 4, "max_position_embeddings": 8192}
    monkeypatch.setitem(CHECKPOINTS, "llama", (lambda: make(**sizes), tokenizer))
    plain = build_checkpoint("llama", tmp_path / "yarn-plain")
    made = make_recall(AutoTokenizer.from_pretrained(plain), tmp_path, [8192], samples=4)
    generator = torch.Generator().manual_seed(5)
    heads = [(1, 0), (1, 3), (2, 2), (3, 1)]
    query, key = (torch.randn(4, 16, generator=generator) for _ in range(2))
    directions = fl.FocusDirections(heads, query, key, "projection")
    directions.save(tmp_path / "directions")
    fold(plain, fl.FocusSteering(directions, 0.7), tmp_path / "yarn-folded")
    theirs = {
        name: by_helmet(checkout, tmp_path / f"yarn-{name}", made.config, tmp_path) for name in ("plain", "folded")
    }
    options = ["--helmet", HELMET, "--config", str(made.config), "--data", str(tmp_path), "--model", str(plain)]
    options += ["--dtype", "float32", "--device", "cpu", "--directions", str(tmp_path / "directions"), "--heads", "4"]
    out = ["--alpha", "0.7", "--max-test-samples", "2", "--out", str(tmp_path / "ours"), "--quiet"]
    assert main(["helmet", *options, *out]) == 0
    for name, setting in (("plain", "baseline"), ("folded", "4_0.7")):
        tokens, results = theirs[name]
        assert all(7000 < row["input_len"] <= 8192 for result in results for row in result["data"])
        assert recorded(tmp_path / "ours" / "records", setting) == tokens
        ours = results_of(tmp_path / "ours" / "output" / f"yarn-plain-{setting}")
        assert [one["data"] for one in ours] == [one["data"] for one in results]
        assert [one["averaged_metrics"] for one in ours] == [one["averaged_metrics"] for one in results]
    assert theirs["plain"][0] != theirs["folded"][0]


def recorded(folder: Path, setting: str) -> list[list[int]]:
    """Recorded tokens of all responses, in task order."""
    lines = [line for dataset in RECALL for file in folder.glob(f"{dataset}_*") for line in read_lines(file)[1:]]
    return [line["results"][setting]["tokens"] for line in lines]


def read_lines(file: Path) -> list[Any]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def results_of(folder: Path) -> list[dict[str, Any]]:
    """HELMET's result files, in task order."""
    files = [file for dataset in RECALL for file in folder.glob(f"{dataset}_*.json")]
    assert len(files) == len(RECALL)
    return [json.loads(file.read_text()) for file in files]


def by_helmet(checkout: Checkout, model: Path, config: Path, folder: Path) -> tuple[list[list[int]], list[Any]]:
    """Tokens that ``eval.py`` generates in all tasks, and the result files that it writes."""
    tokens, out = folder / f"{model.name}.jsonl", folder / f"out-{model.name}"
    options = ["--config", str(config), "--model_name_or_path", str(model), "--output_dir", str(out), "--tag", "v1"]
    options += ["--max_test_samples", "2", "--no_bf16", "--no_cuda", "--no_torch_compile", "--num_workers", "0"]
    script = Path(helmet_eval.__file__)
    run = subprocess.run(
        [sys.executable, str(script), str(checkout.root), str(tokens), *options],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
        check=False,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return read_lines(tokens), results_of(out)
