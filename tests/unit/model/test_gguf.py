"""Models from GGUF files: the same logits, tokens and settings as the checkpoint's, or an error that names the file."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import focuslens as fl
from focuslens.model.sources import gguf_conversion
from focuslens.model.sources.gguf_conversion import converted_gguf
from tests.support.gguf_files import write_gguf
from tests.support.hard_text import HARD_TEXT


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder."""
    monkeypatch.setenv("FOCUSLENS_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def gguf(checkpoint, tmp_path):
    """``gguf("llama", "Q8_0")`` writes a checkpoint as a GGUF file."""

    def write(name: str, kind: str = "F32", **settings: Any) -> Path:
        return write_gguf(checkpoint(name), tmp_path / f"{name}.{kind}.gguf", kind, **settings)

    return write


def opened(path: Path, **settings: Any) -> fl.FocusModel:
    return fl.FocusModel.from_pretrained(str(path), device="cpu", **settings)


# The model of the file


@pytest.mark.parametrize(
    "name", ["llama", "llama_tied", "llama_rope", "llama_linear", "llama_bias", "mistral", "qwen2", "qwen3"]
)
def test_a_file_in_float32_gives_the_checkpoints_logits_and_tokens(name, gguf, load_model, samples, cache):
    """The rotary scale of ``llama_rope`` is a tensor in the file, that of ``llama_linear`` an entry. transformers reads
    neither, and neither the width of heads of ``qwen3``."""
    model, original = opened(gguf(name)), load_model(name)
    assert model.encode(HARD_TEXT).tokens.tolist() == original.encode(HARD_TEXT).tokens.tolist()
    prompt = samples[0].prompt()
    torch.testing.assert_close(model.logits(prompt), original.logits(prompt), atol=2e-3, rtol=0)
    assert model.stop_tokens == original.stop_tokens
    assert model.encoder.chat == original.encoder.chat
    assert model.shape.n_ctx == original.shape.n_ctx


@pytest.mark.parametrize("kind", ["F16", "BF16", "Q8_0", "Q4_1"])
def test_quantised_weights_are_those_that_transformers_reads(kind, gguf, samples, cache):
    path = gguf("qwen2", kind)
    plain = (
        cast("Any", AutoModelForCausalLM)
        .from_pretrained(str(path.parent), gguf_file=path.name, dtype=torch.float32)
        .eval()
    )
    model = opened(path)
    tokens = model.encode(samples[0].prompt()).tokens
    with torch.no_grad():
        expected = plain(tokens[None]).logits[0]
    torch.testing.assert_close(model.logits(tokens), expected, atol=1e-3, rtol=0)
    assert model.description["gguf"]["quantization"] == kind


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_weights_are_opened_in_each_dtype(dtype, gguf, cache):
    model = opened(gguf("llama", "Q8_0"), dtype=dtype)
    assert model.hooked.cfg.dtype == getattr(torch, dtype)
    assert len(model.generate("where is the river?", max_new_tokens=3).tokens) <= 3


def test_the_description_names_the_file_its_digest_and_its_quantisation(gguf, cache):
    import hashlib

    path = gguf("llama", "Q8_0")
    model = opened(path)
    assert model.name == "llama.Q8_0.gguf"
    digest = hashlib.sha256(path.read_bytes()).hexdigest()
    assert model.description["gguf"] == {"file": path.name, "sha256": digest, "quantization": "Q8_0"}
    assert str(path.parent) not in json.dumps(model.description)


def test_a_gguf_file_in_a_directory_is_named_by_an_argument(gguf, cache):
    path = gguf("llama")
    model = opened(path.parent, gguf_file=path.name)
    assert model.name == path.name


def test_a_gguf_file_on_the_hub_is_named_by_an_argument(gguf, cache, monkeypatch):
    asked: list[tuple[str, str, str | None]] = []

    def download(name: str, file: str, revision: str | None = None) -> str:
        asked.append((name, file, revision))
        return str(gguf("llama"))

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    model = fl.FocusModel.from_pretrained("owner/tiny", gguf_file="tiny.gguf", revision="main", device="cpu")
    assert asked == [("owner/tiny", "tiny.gguf", "main")]
    assert (model.name, model.revision) == ("tiny.gguf", "main")


def test_without_a_hub_the_error_names_the_model(cache):
    with pytest.raises(FileNotFoundError, match="there is no directory 'owner/tiny', and the hub cannot be reached"):
        fl.FocusModel.from_pretrained("owner/tiny", gguf_file="tiny.gguf", device="cpu")


def test_the_stop_tokens_are_those_of_texts_turns_and_messages(gguf, cache):
    path = gguf("qwen2", entries={"tokenizer.ggml.eot_token_id": 4, "tokenizer.ggml.eom_token_id": 1})
    assert opened(path).stop_tokens == (1, 4)


def test_split_softmax_and_folding_work_on_the_converted_model(gguf, samples, cache, tmp_path):
    path = gguf("llama")
    model = opened(path)
    heads = [fl.Head(1, 0), fl.Head(2, 3)]
    scores = fl.contextual_scores(model, samples, max_new_tokens=2)
    directions = fl.train_focus_directions(model, samples, heads, epochs=1, max_new_tokens=2, site="projection")
    steered = fl.FocusSteering(directions, 0.5, heads)
    expected = model.generate(samples[0].prompt(), [steered], max_new_tokens=4)
    from focuslens.directions.checkpoints import fold

    folded = opened(fold(path, steered, tmp_path / "folded").directory)
    assert len(scores) == len(samples)
    assert folded.generate(samples[0].prompt(), max_new_tokens=4).tokens.tolist() == expected.tokens.tolist()


# Tokenizers


@pytest.mark.parametrize(
    ("rule", "pieces"),
    [
        ("gpt-2", ["I", "'m", "Ġ", "123", "45", "Ġ½", "ĠA"]),
        ("smollm", ["I", "'m", "Ġ", "1", "2", "3", "4", "5", "Ġ", "½", "ĠA"]),
        ("qwen2", ["I", "'m", "Ġ", "1", "2", "3", "4", "5", "Ġ", "½", "ĠA"]),
        ("llama-bpe", ["I", "'m", "Ġ", "123", "45", "Ġ", "½", "ĠA"]),
    ],
)
def test_text_is_split_by_the_files_rule(rule, pieces, gguf):
    """The pieces before merges. Digits are where the rules differ most."""
    from focuslens.model.sources.gguf_file import read_gguf
    from focuslens.model.sources.gguf_vocabulary import gguf_tokenizer

    tokenizer = gguf_tokenizer(read_gguf(gguf("llama", rule=rule))).backend_tokenizer
    split = [piece for piece, _ in tokenizer.pre_tokenizer.pre_tokenize_str("I'm 12345 ½ A")]  # type: ignore[union-attr]
    expected = [piece.replace("½", "Â½") for piece in pieces]
    assert split == expected if rule != "gpt-2" else "".join(split) == "I'mĠ12345ĠÂ½ĠA"


def test_control_tokens_are_matched_whole_and_left_out_of_text(gguf, load_model, cache):
    model, original = opened(gguf("qwen2")), load_model("qwen2")
    text = "a<|im_start|>b</s> <pad>"
    tokens = model.tokenizer(text).input_ids
    assert tokens == original.tokenizer(text).input_ids
    assert model.tokenizer.decode(tokens, skip_special_tokens=True) == "ab "


# Refusals


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rule": "unheard-of"}, "splits text by the rule 'unheard-of'"),
        ({"entries": {"tokenizer.ggml.model": "rwkv"}}, "vocabulary of the kind 'rwkv', which cannot be rebuilt"),
        ({"entries": {"tokenizer.ggml.merges": None}}, "contains no merges"),
        ({"entries": {"tokenizer.ggml.tokens": None}}, "contains no vocabulary"),
        ({"entries": {"llama.rope.scaling.type": "yarn"}}, "has llama.rope.scaling.type='yarn', which a LlamaConfig"),
        ({"entries": {"llama.attention.sliding_window": 64}}, "has llama.attention.sliding_window=64"),
        ({"entries": {"llama.rope.dimension_count": 8}}, "has llama.rope.dimension_count=8"),
        (
            {"entries": {"general.architecture": "mammoth"}},
            "architecture 'mammoth', which this version of transformers",
        ),
        ({"entries": {"split.count": 3}}, "is one of 3 parts"),
        ({"tensors": {"blk.1.ffn_up.weight": None}}, "does not hold the weights|another model would be computed"),
        ({"tensors": {"blk.1.attn_sinks": np.ones(4, "f4")}}, "holds [0-9,]+ weights and a LlamaForCausalLM"),
        ({"tensors": {"rope_freqs.weight": np.full(8, 3.0, "f4")}}, "factors .* that are not those of Llama 3.1"),
    ],
)
def test_a_file_that_cannot_be_expressed_is_refused_and_leaves_nothing(settings, message, gguf, cache):
    path = gguf("llama", **settings)
    with pytest.raises(ValueError, match=message) as raised:
        opened(path)
    assert path.name in str(raised.value)
    assert not [entry for entry in (cache / "gguf").iterdir() if entry.is_dir()]


@pytest.mark.parametrize("size", [3, 20, 5000, -1000])
def test_a_file_that_is_cut_off_is_refused(size, gguf, cache):
    path = gguf("llama")
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(ValueError, match=r"is not a GGUF file|cannot be read .* it may be cut off"):
        opened(path)


def test_other_files_are_no_gguf_files(tmp_path, cache):
    (tmp_path / "page.gguf").write_text("<html>")
    with pytest.raises(ValueError, match="is not a GGUF file: it begins with b'<htm'"):
        opened(tmp_path / "page.gguf")
    with pytest.raises(FileNotFoundError, match=r"there is no file '.*nowhere.gguf'"):
        opened(tmp_path / "nowhere.gguf")


def test_a_part_of_a_split_model_is_refused_by_its_name(gguf, tmp_path, cache):
    part = gguf("llama").rename(tmp_path / "tiny-00001-of-00003.gguf")
    with pytest.raises(ValueError, match="is one of 3 parts of a model; a single file is needed: llama-gguf-split"):
        opened(part)


def test_a_full_disk_is_noticed_before_the_conversion(gguf, cache, monkeypatch):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 10, 0))  # type: ignore[attr-defined]
    with pytest.raises(OSError, match=r"needs 0.0 GB in .* set FOCUSLENS_CACHE to a folder on a larger disk"):
        opened(gguf("llama"))


# The cache


def test_a_file_is_converted_once_and_its_copy_not_at_all(gguf, cache, tmp_path, monkeypatch):
    path = gguf("llama")
    first = converted_gguf(path)
    monkeypatch.setattr(gguf_conversion, "_convert", lambda *_: pytest.fail("converted again"))
    assert converted_gguf(path) == first
    assert converted_gguf(shutil.copy(path, tmp_path / "copy.gguf")) == first


def test_a_conversion_under_earlier_rules_is_made_again(gguf, cache):
    path = gguf("llama")
    target = converted_gguf(path)
    origin = json.loads((target / "gguf.json").read_text())
    (target / "gguf.json").write_text(json.dumps({**origin, "rules": 0}))
    (target / "model.safetensors").unlink()
    assert (converted_gguf(path) / "model.safetensors").is_file()


CONVERT = (
    "import sys; from focuslens.model.sources.gguf_conversion import converted_gguf; print(converted_gguf(sys.argv[1]))"
)


def start(path: Path, **settings: Any) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-c", CONVERT, str(path)], text=True, **settings)


def contents(directory: Path) -> dict[str, bytes]:
    return {file.name: file.read_bytes() for file in sorted(directory.iterdir())}


@pytest.mark.slow
def test_two_processes_at_once_get_one_conversion(gguf, cache):
    path = gguf("llama")
    environment = {**os.environ, "FOCUSLENS_CACHE": str(cache)}
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "env": environment}
    results = [run.communicate(timeout=120) for run in [start(path, **pipes) for _ in range(2)]]
    assert len({out.strip() for out, _ in results}) == 1
    assert sum("converting llama.F32.gguf (F32) once" in err for _, err in results) == 1


@pytest.mark.slow
def test_a_killed_conversion_leaves_no_checkpoint_and_the_next_one_has_the_same_bytes(gguf, cache, tmp_path):
    path = gguf("llama")
    whole = contents(converted_gguf(path))
    shutil.rmtree(cache)
    run = start(path, env={**os.environ, "FOCUSLENS_CACHE": str(cache)}, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 60
    while not list(cache.glob("gguf/.*.*")) and time.monotonic() < deadline:  # the draft
        time.sleep(0.01)
    run.send_signal(signal.SIGKILL)
    run.wait()
    assert not [entry for entry in (cache / "gguf").iterdir() if entry.is_dir() and not entry.name.startswith(".")]
    assert contents(converted_gguf(path)) == whole
    assert not list(cache.glob("gguf/.*.*"))


# Commands


def test_the_heads_command_takes_a_file(gguf, cache, tmp_path, capsys):
    from focuslens.cli.main import main

    path, out = gguf("llama", "Q8_0"), tmp_path / "heads"
    assert main(["heads", "--model", str(path), "--samples", "2", "--documents", "3", "--out", str(out)]) == 0
    result = json.loads((out / "heads.json").read_text())
    assert result["model"]["gguf"]["quantization"] == "Q8_0"
    assert result["model"]["name"] == path.name


def test_commands_refuse_what_is_no_gguf_file_in_one_line(tmp_path, cache, capsys):
    from focuslens.cli.main import main

    (tmp_path / "cut.gguf").write_bytes(b"GG")
    assert main(["heads", "--model", str(tmp_path / "cut.gguf")]) == 1
    assert "is not a GGUF file" in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_cache_is_listed_and_cleared(gguf, cache, capsys):
    from focuslens.cli.main import main

    digest = converted_gguf(gguf("llama", "Q8_0")).name
    assert main(["cache"]) == 0
    assert f"llama.Q8_0.gguf (Q8_0) sha256 {digest[:12]}" in capsys.readouterr().out
    assert main(["cache", "--clear", "elsewhere"]) == 1
    assert "the cache has no 'elsewhere'; it holds llama.Q8_0.gguf (Q8_0)" in capsys.readouterr().err
    assert main(["cache", "--clear", digest[:8]]) == 0
    assert not (cache / "gguf" / digest).exists()


def test_an_entry_that_is_being_written_is_not_cleared(gguf, cache):
    from filelock import FileLock

    from focuslens.model.sources.cached import clear_cache

    target = converted_gguf(gguf("llama"))
    with FileLock(target.with_suffix(".lock")):
        removed, kept = clear_cache()
    assert [entry.path for entry in kept] == [target]
    assert target.is_dir()
    assert target not in [entry.path for entry in removed]


def test_transformers_reads_the_converted_checkpoint_without_this_package(gguf, samples, cache):
    model = opened(gguf("qwen3"))
    directory = converted_gguf(gguf("qwen3"))
    plain = cast("Any", AutoModelForCausalLM).from_pretrained(directory).eval()
    tokenizer = cast("Any", AutoTokenizer).from_pretrained(directory)
    text = tokenizer.apply_chat_template(
        [{"role": "user", "content": str(samples[0].prompt())}], tokenize=False, add_generation_prompt=True
    )
    tokens = tokenizer(text, return_tensors="pt", add_special_tokens=False)
    answer = plain.generate(**tokens, max_new_tokens=5, do_sample=False)[0, tokens.input_ids.shape[1] :]
    expected = model.generate(samples[0].prompt(), max_new_tokens=5)
    assert answer.tolist()[: len(expected.tokens)] == expected.tokens.tolist()
