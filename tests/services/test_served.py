"""The embedded model, steered and served by common tools, gives the same greedy responses everywhere."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import focuslens as fl

pytestmark = pytest.mark.slow

EMBEDDED = Path(fl.__file__).parent / "assets" / "demo"
HEADS = [fl.Head(1, head) for head in range(8)]
TOKENS = 24
# Without these limits, continuous batching allocates most of the available memory.
BLOCKS, BATCH = 64, 2048
ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}


@pytest.fixture(scope="module")
def model():
    return fl.FocusModel.demo(device="cpu")


@pytest.fixture(scope="module")
def questions():
    return fl.load_synthetic(100, split="test")


def steering(model: fl.FocusModel, site: Any) -> fl.FocusSteering:
    vectors = torch.randn(2, len(HEADS), model.shape.d_head, generator=torch.Generator().manual_seed(0))
    return fl.FocusSteering(fl.FocusDirections(HEADS, vectors[0], vectors[1], site), 1.0)


@pytest.fixture(scope="module", params=["projection", "rotary"])
def served(request, model, questions, tmp_path_factory):
    """A steered checkpoint, and the responses of the model steered with hooks."""
    site, directory = request.param, tmp_path_factory.mktemp("served") / request.param
    chosen = steering(model, site)
    (fl.fold if site == "projection" else fl.export)(EMBEDDED, chosen, directory)
    steered = fl.evaluate(model, questions, [chosen], max_new_tokens=TOKENS)
    plain = fl.evaluate(model, questions, max_new_tokens=TOKENS)
    changed = sum(a != b for a, b in zip(steered.responses, plain.responses, strict=True))
    assert changed >= 5  # a server that ignored the directions would fail
    return site, directory, steered


def test_plain_transformers(served, questions):
    _, directory, steered = served
    trust = {"trust_remote_code": True}
    loading: Any = AutoModelForCausalLM
    plain = loading.from_pretrained(directory, dtype=torch.float32, **trust).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, **trust)
    for sample, expected in zip(questions, steered.responses, strict=True):
        prompt = tokenizer(str(sample.prompt()), return_tensors="pt")
        done = plain.generate(**prompt, max_new_tokens=TOKENS, do_sample=False)
        text = tokenizer.decode(done[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)
        assert text.strip() == expected


@contextmanager
def server(directory: Path, log: Path, *more: str):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    command = [Path(sys.executable).with_name("transformers"), "serve", directory, "--device", "cpu"]
    options = ["--dtype", "float32", "--trust-remote-code", "--host", "127.0.0.1", "--port", str(port), *more]
    with log.open("w") as output:
        process = subprocess.Popen([*command, *options], stdout=output, stderr=output, env=ENVIRONMENT)
        try:
            address = f"http://127.0.0.1:{port}"
            wait_for(f"{address}/health", process, log)
            yield f"{address}/v1"
        finally:
            process.terminate()
            process.wait(30)


def wait_for(address: str, process: Any, log: Path, seconds: float = 180) -> None:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        assert process.poll() is None, log.read_text()
        try:
            urllib.request.urlopen(address, timeout=5)
        except OSError:
            time.sleep(0.3)
        else:
            return
    pytest.fail(f"no answer from the server in {seconds} s:\n{log.read_text()}")


def test_a_server_that_speaks_the_openai_protocol(served, questions, tmp_path):
    openai = pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    site, directory, steered = served
    # The server loads only classes of transformers. It must refuse the checkpoint rather than serve it unsteered.
    if site == "rotary":
        with (
            pytest.raises(AssertionError, match="no attribute SteeredLlamaForCausalLM"),
            server(directory, tmp_path / "log"),
        ):
            pass
        return
    with server(directory, tmp_path / "log") as address:
        client = openai.OpenAI(base_url=address, api_key="none")
        for sample, expected in zip(questions, steered.responses, strict=True):
            done = client.completions.create(
                model=str(directory), prompt=str(sample.prompt()), max_tokens=TOKENS, temperature=0
            )
            assert done.choices[0].text.strip() == expected


def test_a_chat_model_is_asked_through_chat_completions(checkpoint, load_model, samples, tmp_path):
    """The server renders the same messages: its prompts have the tokens, and its answers the text, of FocusLens."""
    openai = pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    chat = load_model("qwen2")
    assert chat.encoder.chat
    heads = [fl.Head(layer, head) for layer in range(3) for head in range(4)]
    vectors = torch.randn(2, len(heads), chat.shape.d_head, generator=torch.Generator().manual_seed(0))
    steered = fl.FocusSteering(fl.FocusDirections(heads, vectors[0], vectors[1], "projection"), 2.0)
    fl.fold(checkpoint("qwen2"), steered, tmp_path / "steered")
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "steered")
    changed = 0
    with server(tmp_path / "steered", tmp_path / "log") as address:
        client = openai.OpenAI(base_url=address, api_key="none")
        for sample in samples:
            name, prompt, text = str(tmp_path / "steered"), sample.prompt(), str(sample.prompt())
            tokens = chat.encode(prompt).tokens.tolist()
            messages = [{"role": "user", "content": text}]
            rendered = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=True)
            assert rendered["input_ids"] == tokens
            asked = {"model": name, "max_tokens": 8, "temperature": 0}
            done = client.chat.completions.create(messages=messages, **asked)
            assert done.usage.prompt_tokens == len(tokens)
            expected = chat.generate(prompt, [steered], max_new_tokens=8).text
            assert done.choices[0].message.content.strip() == expected
            changed += expected != chat.generate(prompt, max_new_tokens=8).text
            # The other address does not apply the template, so the model reads another prompt.
            raw = client.completions.create(prompt=text, **asked)
            assert raw.usage.prompt_tokens < len(tokens)
    assert changed


def test_a_server_that_batches_continuously(served, questions, tmp_path):
    """With eight concurrent clients and paged attention, each response equals that of the hooks in any batch."""
    openai = pytest.importorskip("openai")
    pytest.importorskip("uvicorn")
    site, directory, steered = served
    if site == "rotary":  # refused, see above
        return
    small = ["--cb-num-blocks", str(BLOCKS), "--cb-max-batch-tokens", str(BATCH)]
    with server(directory, tmp_path / "log", "--continuous-batching", *small, "--log-level", "info") as address:
        client = openai.OpenAI(base_url=address, api_key="none")

        def answer(sample: fl.MultiDocSample) -> str:
            done = client.completions.create(
                model=str(directory), prompt=str(sample.prompt()), max_tokens=TOKENS, temperature=0
            )
            return done.choices[0].text.strip()

        with ThreadPoolExecutor(8) as clients:
            answers = list(clients.map(answer, questions[:40]))
    assert answers == list(steered.responses[:40])
    assert "CB: True" in (tmp_path / "log").read_text()


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_continuous_batching_in_plain_transformers(attention, served, questions):
    """The server's continuous batching, called directly, also supports exported checkpoints."""
    from transformers import ContinuousBatchingConfig, GenerationConfig

    _, directory, steered = served
    trust = {"trust_remote_code": True}
    loading: Any = AutoModelForCausalLM
    plain = loading.from_pretrained(directory, dtype=torch.float32, attn_implementation=attention, **trust).eval()
    tokenizer: Any = AutoTokenizer.from_pretrained(directory, **trust)
    prompts = [tokenizer(str(sample.prompt())).input_ids for sample in questions[:8]]
    config = GenerationConfig(max_new_tokens=TOKENS, do_sample=False, eos_token_id=tokenizer.eos_token_id)
    small = ContinuousBatchingConfig(num_blocks=BLOCKS, max_batch_tokens=BATCH)
    done = plain.generate_batch(inputs=prompts, generation_config=config, continuous_batching_config=small)
    texts = {
        tuple(one.prompt_ids): tokenizer.decode(one.generated_tokens, skip_special_tokens=True) for one in done.values()
    }
    assert [texts[tuple(prompt)].strip() for prompt in prompts] == list(steered.responses[:8])


def test_lm_evaluation_harness(served, questions, tmp_path):
    pytest.importorskip("lm_eval")
    site, directory, steered = served
    fl.write_harness_task(questions, tmp_path / "task", "reading", max_new_tokens=TOKENS)
    trust = ",trust_remote_code=True" if site == "rotary" else ""
    command = [sys.executable, "-m", "lm_eval", "run", "--model", "hf", "--device", "cpu", "--batch_size", "1"]
    options = ["--model_args", f"pretrained={directory},dtype=float32{trust}", "--include_path", tmp_path / "task"]
    written = ["--tasks", "reading", "--log_samples", "--output_path", tmp_path / "out"]
    done = subprocess.run([*command, *options, *written], env=ENVIRONMENT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    assert json.loads(results.read_text())["results"]["reading"]["em,none"] == pytest.approx(steered.em.mean)
    (samples,) = (tmp_path / "out").rglob("samples_*.jsonl")
    said = {entry["doc"]["id"]: entry["resps"][0][0] for entry in map(json.loads, samples.read_text().splitlines())}
    assert [said[key].strip() for key in steered.sample_ids] == list(steered.responses)


def test_the_command_that_is_printed_runs_as_it_is(served, tmp_path, monkeypatch, capsys):
    """The printed command works for paths with spaces, quotes and commas."""
    pytest.importorskip("lm_eval")
    from focuslens.cli.main import main

    site, directory, _ = served
    odd = shutil.copytree(directory, tmp_path / "it's, a 'model'")
    monkeypatch.chdir(tmp_path)
    options = ["--samples", "6", "--documents", "5", "--max-new-tokens", str(TOKENS), "--out", "my task, 1"]
    assert main(["harness", "--model", odd.name, *options]) == 0
    (command,) = (line for line in capsys.readouterr().out.splitlines() if line.startswith("lm-eval"))
    assert ("trust_remote_code" in command) == (site == "rotary")
    assert "--apply_chat_template" not in command
    scripts = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    elsewhere = {**ENVIRONMENT, "PATH": scripts, "HF_HOME": str(tmp_path / "home")}
    done = subprocess.run(
        f"{command} --output_path out", shell=True, cwd=tmp_path, env=elsewhere, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    (results,) = (tmp_path / "out").rglob("results_*.json")
    found = json.loads(results.read_text())
    assert found["n-samples"]["focuslens_multidoc"]["effective"] == 6
    samples = fl.load_synthetic(30, num_documents=5, gold_positions=range(5), split="test", seed=42)
    samples = [samples[5 * i + i % 5] for i in range(6)]
    model = fl.FocusModel.demo(device="cpu")
    expected = fl.evaluate(model, samples, [steering(model, site)], max_new_tokens=TOKENS).em.mean
    assert found["results"]["focuslens_multidoc"]["em,none"] == pytest.approx(expected)


def test_the_command_writes_the_samples_of_steer(model, tmp_path, capsys):
    from focuslens.cli.main import main

    options = ["--samples", "3", "--seed", "7", "--documents", "4", "--max-new-tokens", "5"]
    assert main(["harness", *options, "--out", str(tmp_path / "task"), "--name", "mine"]) == 0
    assert "--include_path" in capsys.readouterr().out
    lines = [json.loads(line) for line in (tmp_path / "task" / "mine.jsonl").read_text().splitlines()]
    steering(model, "rotary").directions.save(tmp_path / "directions")
    steer = ["steer", "--directions", str(tmp_path / "directions"), "--alpha", "1", "--k", "1", "--heads"]
    (tmp_path / "heads.json").write_text(json.dumps({"heads": [list(head) for head in HEADS]}))
    assert main([*steer, str(tmp_path / "heads.json"), *options, "--out", str(tmp_path / "steer")]) == 0
    _, *records = (tmp_path / "steer" / "steering.jsonl").read_text().splitlines()
    assert {line["id"] for line in lines} == {json.loads(record)["id"] for record in records}
    assert len(lines) == 3
    assert "max_gen_toks: 5" in (tmp_path / "task" / "mine.yaml").read_text()
    assert json.loads((tmp_path / "task" / "mine.json").read_text())["data"]["samples"] == 3


def test_a_task_that_cannot_be_is_refused(questions, tmp_path):
    with pytest.raises(ValueError, match="no samples"):
        fl.write_harness_task([], tmp_path)
    with pytest.raises(ValueError, match="'a-b' is not a valid name of a task"):
        fl.write_harness_task(questions, tmp_path, "a-b")
    assert not list(tmp_path.iterdir())
