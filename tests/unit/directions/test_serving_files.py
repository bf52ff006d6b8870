"""Files that a folded or exported checkpoint copies from its base, and permitted output directories."""

from __future__ import annotations

import importlib
import json
import os
import shlex
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import AutoTokenizer

import focuslens as fl

HEADS = (fl.Head(0, 2), fl.Head(2, 1))
WRITERS: dict[str, Any] = {"projection": fl.fold, "rotary": fl.export}
tokenizer_at: Any = AutoTokenizer.from_pretrained


def steering(site: Any = "projection", provenance: Any = None) -> fl.FocusSteering:
    vectors = torch.randn(len(HEADS), 16, generator=torch.Generator().manual_seed(3))
    return fl.FocusSteering(fl.FocusDirections(HEADS, vectors, None, site, provenance), 1.0)


@pytest.fixture
def base(checkpoint, tmp_path) -> Path:
    """A copy of the tiny Llama that a test may change."""
    return shutil.copytree(checkpoint("llama"), tmp_path / "base")


@pytest.fixture(autouse=True)
def _modules_of_its_own(tmp_path_factory, monkeypatch):
    """Copy the code of checkpoints to a temporary cache instead of the user's cache."""
    import transformers.dynamic_module_utils as dynamic

    monkeypatch.setattr(dynamic, "HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))


# --- tokenizers ---


def mistral_tokenizer(directory: Path, samples: Any) -> None:
    """Write tokenizer files like those of Mistral 7B: normalizers insert spaces, and the declared class is Llama's."""
    tokenizer: Any = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    trainer = trainers.BpeTrainer(
        vocab_size=500, special_tokens=["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    )
    tokenizer.train_from_iterator([str(sample.prompt()) for sample in samples], trainer)
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    content = json.loads(tokenizer.to_str()) | {"pre_tokenizer": None}
    (directory / "tokenizer.json").write_text(json.dumps(content))
    config = {"tokenizer_class": "LlamaTokenizer", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    (directory / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("family", "site", "text"),
    [
        ("mistral", "projection", "the river</s>the stone of 1984"),
        ("mistral", "rotary", "the river</s>the stone of 1984"),
        ("qwen2", "rotary", "Document [12] of 1984, on the cafe\u0301"),
    ],
)
def test_the_tokenizer_is_the_bases(family, site, text, checkpoint, samples, tmp_path):
    base = shutil.copytree(checkpoint(family), tmp_path / "base")
    if family == "mistral":
        mistral_tokenizer(base, samples)
    out = WRITERS[site](base, steering(site), tmp_path / "out").directory
    expected = tokenizer_at(base)
    for trust in (True, False):
        found = tokenizer_at(out, trust_remote_code=trust)
        assert type(found) is type(expected)
        assert found(text).input_ids == expected(text).input_ids
        assert found.decode(found(text).input_ids) == expected.decode(expected(text).input_ids)
    shutil.copyfile(base / "tokenizer_config.json", out / "tokenizer_config.json")
    as_written = tokenizer_at(out, trust_remote_code=True)
    assert as_written(text).input_ids != expected(text).input_ids  # the text distinguishes the tokenizer classes


def test_the_rest_of_the_tokenizers_configuration_is_kept(base, tmp_path):
    written = json.loads((base / "tokenizer_config.json").read_text()) | {"model_max_length": 77}
    (base / "tokenizer_config.json").write_text(json.dumps(written))
    out = fl.fold(base, steering(), tmp_path / "out").directory
    found = json.loads((out / "tokenizer_config.json").read_text())
    assert {**found, "tokenizer_class": None} == {**written, "tokenizer_class": None}


def test_a_base_without_a_tokenizer_or_with_a_broken_one(base, tmp_path):
    (base / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match=r"the tokenizer of .*base cannot be opened"):
        fl.fold(base, steering(), tmp_path / "out")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (base / name).unlink()
    out = fl.fold(base, steering(), tmp_path / "out").directory
    assert not list(out.glob("tokenizer*"))


# --- other files ---


def test_directories_are_copied_unless_they_hold_weights(base, tmp_path, capsys):
    from focuslens.cli.main import main

    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ messages }}")
    (base / "original").mkdir()
    (base / "original" / "params.json").write_text("{}")
    (base / "original" / "consolidated.00.pth").write_bytes(b"other weights")
    (base / "vocabulary.txt").write_text("kept")
    training = ["optimizer.pt", "rng_state_0.pth", "scheduler.pt", "trainer_state.json", "training_args.bin"]
    for name in training:
        (base / name).write_bytes(b"of the training")
    (base / "pytorch_model.bin").write_bytes(b"other weights")
    steering().directions.save(tmp_path / "directions")
    named = ["fold", "--model", str(base), "--directions", str(tmp_path / "directions"), "--alpha", "1"]
    assert main([*named, "--out", str(tmp_path / "out")]) == 0
    said = capsys.readouterr().out
    assert "(unsteered copies of the weights): original/, pytorch_model.bin\n" in said
    assert f"left out (training states of the base model): {', '.join(training)}\n" in said
    out = tmp_path / "out"
    assert (out / "additional_chat_templates" / "tool_use.jinja").read_text() == "{{ messages }}"
    assert (out / "vocabulary.txt").read_text() == "kept"
    assert not any((out / name).exists() for name in [*training, "original", "pytorch_model.bin"])
    done = fl.export(base, steering("rotary"), tmp_path / "exported")
    assert done.left_out == ("original/", "pytorch_model.bin")
    assert done.training == tuple(training)


@pytest.mark.parametrize("mask", [0o002, 0o027])
@pytest.mark.parametrize("site", ["projection", "rotary"])
def test_permissions_follow_the_umask(site, mask, base, tmp_path):
    (base / "extra").mkdir()
    (base / "extra" / "text.txt").write_text("kept")
    before = os.umask(mask)
    try:
        out = WRITERS[site](base, steering(site), tmp_path / "out").directory
    finally:
        os.umask(before)
    modes = {path.name: path.stat().st_mode & 0o777 for path in (out, *out.rglob("*"))}
    whole = {name: (0o777 if name in ("out", "extra") else 0o666) & ~mask for name in modes}
    assert modes == whole


# --- output directories ---


@pytest.mark.parametrize("site", ["projection", "rotary"])
def test_where_it_cannot_be_written_is_refused_before_any_work(site, base, tmp_path, monkeypatch):
    for name in ("focuslens.directions.checkpoints.fold", "focuslens.directions.checkpoints.export"):
        monkeypatch.setattr(importlib.import_module(name), "open_checkpoint", lambda *_: pytest.fail("work was begun"))
    write, empty = WRITERS[site], tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "link").symlink_to(empty)
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("mine")
    for name in ("link", "dangling"):
        with pytest.raises(ValueError, match=f"{name} is a symbolic link"):
            write(base, steering(site), tmp_path / name)
    for place in (base / "steered", base / "deep" / "er", empty / ".." / "base" / "steered"):
        with pytest.raises(ValueError, match=r"lies inside .*base, the checkpoint that is read"):
            write(base, steering(site), place)
    with pytest.raises(FileExistsError, match="base is not an empty directory"):
        write(base, steering(site), base)
    with pytest.raises(FileExistsError, match="is not an empty directory"):
        write(base, steering(site), tmp_path / "file")
    with pytest.raises(FileExistsError, match=r"cannot be made: .*file is not a directory"):
        write(base, steering(site), tmp_path / "file" / "out")
    monkeypatch.chdir(empty)
    for place in (".", empty):
        with pytest.raises(ValueError, match="is the working directory"):
            write(base, steering(site), place)
    assert not list(empty.iterdir())
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "dangling", "empty", "file", "link"]


# --- errors, and the origin of directions ---


@pytest.mark.parametrize("site", ["projection", "rotary"])
def test_what_is_no_plain_causal_language_model_is_refused_by_name(site, base, tmp_path):
    from safetensors.torch import load_file, save_file

    config = json.loads((base / "config.json").read_text())
    refused = {
        "is a LlamaForSequenceClassification; of the type 'llama' only a LlamaForCausalLM can be": {
            "architectures": ["LlamaForSequenceClassification"]
        },
        "the weights of .*base are quantized": {"quantization_config": {"bits": 4}},
        "has its own code": {"auto_map": {"AutoModelForCausalLM": "x.y"}},
        r"has no model.layers.3.self_attn.q_proj.weight": {"num_hidden_layers": 4},
    }
    for message, change in refused.items():
        (base / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(ValueError, match=message):
            WRITERS[site](base, steering(site), tmp_path / "out")
    (base / "config.json").write_text(json.dumps({k: v for k, v in config.items() if k != "architectures"}))
    WRITERS[site](base, steering(site), tmp_path / "silent")
    weights = load_file(base / "model.safetensors")
    packed = {name.replace("q_proj", "qkv_proj"): tensor for name, tensor in weights.items()}
    save_file(packed, base / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"has no model.layers.0.self_attn.q_proj.weight"):
        WRITERS[site](base, steering(site), tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["base", "silent"]


SHAPE = {"n_layers": 3, "n_heads": 4, "n_key_value_heads": 2, "d_head": 16}


@pytest.mark.parametrize("site", ["projection", "rotary"])
def test_directions_of_another_model_are_warned_of_and_recorded(site, base, tmp_path):
    made = {
        "model": {"name": "somebody/their-model", "revision": "abc"},
        "shape": SHAPE,
        "data": {"file": "questions.jsonl", "samples": 7},
        "losses": [[-0.1, -0.2]],
    }
    chosen = steering(site, made)
    with pytest.warns(
        UserWarning, match=r"made on `somebody/their-model` at `abc` \(n_layers = 3.*`.*base` \(n_layers"
    ):
        out = WRITERS[site](base, chosen, tmp_path / "out").directory
    card, record = (out / "README.md").read_text(), json.loads((out / "focuslens.json").read_text())
    assert "made on `somebody/their-model` at `abc`" in card
    assert "on 7 samples of `questions.jsonl`" in card
    assert f"Base: `{base.name}`" in card
    assert "the directions may be of another model" in card
    assert record["directions"] == {name: value for name, value in made.items() if name != "losses"}
    other = steering(site, {**made, "shape": {**SHAPE, "n_layers": 5}})
    with (
        pytest.warns(UserWarning, match=r"made on `somebody/their-model` at `abc` \(n_layers = 5"),
        pytest.raises(ValueError, match="directions are of a model with n_layers = 5, this one has 3"),
    ):
        WRITERS[site](base, other, tmp_path / "other")


@pytest.mark.parametrize(
    "provenance",
    [
        {},
        {"model": {"name": "BASE"}},
        {"model": {"name": "somebody/base"}},
        {"source": "published files, somebody_base"},
    ],
)
def test_directions_of_the_same_model_or_of_an_unknown_one_are_not_warned_of(provenance, base, tmp_path, monkeypatch):
    known = json.loads(json.dumps(provenance).replace("BASE", str(base)))
    monkeypatch.chdir(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for source, out in ((base, "absolute"), (Path("base"), "relative")):
            card = (fl.fold(source, steering(provenance=known), out).directory / "README.md").read_text()
            assert ("their model is not recorded" in card) == (not provenance)
            assert "may be of another model" not in card


# --- the hub ---

COMMIT = "0123456789abcdef0123456789abcdef01234567"
COPIES = ("pytorch_model.bin", "consolidated.safetensors", "model.fp16.safetensors", "model-Q4.gguf", "optimizer.pt")


@pytest.fixture
def hub(checkpoint, tmp_path, monkeypatch):
    """A stand-in for ``snapshot_download``. Its repository has sharded weights and many other copies of the weights."""
    import huggingface_hub
    from huggingface_hub.utils import filter_repo_objects
    from transformers import AutoModelForCausalLM

    remote, fetched = tmp_path / "remote", list[tuple[str, str | None]]()
    shutil.copytree(checkpoint("llama"), remote, ignore=shutil.ignore_patterns("*.safetensors"))
    model: Any = AutoModelForCausalLM.from_pretrained(checkpoint("llama"))
    model.save_pretrained(remote, max_shard_size="60KB")
    for name in (*COPIES, "original/consolidated.00.pth", "original/params.json", "onnx/model.onnx"):
        (remote / name).parent.mkdir(exist_ok=True)
        (remote / name).write_bytes(b"another copy")

    def download(name, *, revision=None, allow_patterns=None, ignore_patterns=None):
        assert name == "somebody/theirs"
        local = tmp_path / "snapshots" / COMMIT
        names = [str(path.relative_to(remote)) for path in remote.rglob("*") if path.is_file()]
        for one in filter_repo_objects(names, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            fetched.append((one, revision))
            (local / one).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(remote / one, local / one)
        return str(local)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    return remote, fetched


@pytest.mark.parametrize("site", ["projection", "rotary"])
def test_of_the_hub_only_what_makes_the_model_is_fetched(site, hub, tmp_path):
    remote, fetched = hub
    done = WRITERS[site]("somebody/theirs", steering(site), tmp_path / "out", revision="main")
    names = [name for name, _ in fetched]
    shards = {path.name for path in remote.glob("model-0*.safetensors")}
    assert len(shards) > 3
    assert {name for name in names if name.endswith(".safetensors")} == shards
    assert not {*COPIES, "onnx/model.onnx"} & set(names)
    assert not [name for name in names if name.startswith("original/")]
    assert {"config.json", "tokenizer.json", "model.safetensors.index.json"} <= set(names)
    assert {revision for name, revision in fetched if name in shards} == {COMMIT}  # from the same commit
    assert done.left_out == ()
    record = json.loads((done.directory / "focuslens.json").read_text())
    assert (record["base"], record["revision"], record["commit"]) == ("somebody/theirs", "main", COMMIT)
    assert f"Base: `somebody/theirs`, commit `{COMMIT}`." in (done.directory / "README.md").read_text()


def test_the_one_file_of_the_hub_comes_before_an_index(hub, checkpoint, tmp_path):
    remote, fetched = hub
    shutil.copyfile(checkpoint("llama") / "model.safetensors", remote / "model.safetensors")
    fl.fold("somebody/theirs", steering(), tmp_path / "out")
    assert [name for name, _ in fetched if name.endswith(".safetensors")] == ["model.safetensors"]


def test_what_is_refused_is_refused_before_its_weights_are_fetched(hub, tmp_path):
    remote, fetched = hub
    config = json.loads((remote / "config.json").read_text())
    (remote / "config.json").write_text(json.dumps(config | {"model_type": "gemma2"}))
    with pytest.raises(ValueError, match="of the type 'gemma2'"):
        fl.fold("somebody/theirs", steering(), tmp_path / "out")
    assert not [name for name, _ in fetched if name.endswith(".safetensors")]


# --- the printed lm-eval command ---


@pytest.mark.parametrize(("name", "chat"), [("qwen2", True), ("llama", False)])
def test_the_printed_command_is_read_by_lm_eval_as_it_was_meant(name, chat, checkpoint, tmp_path, monkeypatch, capsys):
    pytest.importorskip("lm_eval")
    from lm_eval._cli.harness import HarnessCLI

    from focuslens.cli.main import main

    shutil.copytree(checkpoint(name), tmp_path / "a, 'b' 1")
    monkeypatch.chdir(tmp_path)
    assert main(["harness", "--model", "a, 'b' 1", "--samples", "2", "--documents", "2", "--out", "my tasks"]) == 0
    program, *words = shlex.split(capsys.readouterr().out.splitlines()[-1])
    assert program == "lm-eval"
    read: Any = HarnessCLI()._parser.parse_args(words)
    assert read.model_args == {"pretrained": str(tmp_path / "a, 'b' 1"), "dtype": "float32"}
    assert read.include_path == str(tmp_path / "my tasks")
    assert read.tasks in ("focuslens_multidoc", ["focuslens_multidoc"])
    assert bool(getattr(read, "apply_chat_template", False)) == chat
