"""``--stop``, ``--no-stop`` and ``--stop-token``: what ends responses in a command and in lm-evaluation-harness."""

from __future__ import annotations

import argparse
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest
import yaml

import focuslens as fl
from focuslens.cli import options
from focuslens.cli.common import ModelOptions
from focuslens.cli.main import main
from focuslens.model.stop_strings import BASE_STOP_STRINGS


def parsed(*arguments: str) -> ModelOptions:
    parser = argparse.ArgumentParser()
    options.add_model(parser)
    return ModelOptions.of(parser.parse_args(arguments))


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((), None),
        (("--no-stop",), ()),
        (("--stop", "\\n"), ("\n",)),
        (("--stop", "Question:", "--stop", "\\n\\n", "--stop", "a\\\\n\\tb"), ("Question:", "\n\n", "a\\n\tb")),
    ],
)
def test_the_options_are_arguments_of_from_pretrained(arguments: tuple[str, ...], expected: Any) -> None:
    assert parsed(*arguments).arguments["stop_strings"] == expected


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "the stop string is empty; give --no-stop for no stop strings"),
        ("a\\x", "which is none of"),
        ("a\\", "which is none of"),
    ],
)
def test_other_texts_are_refused(text: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--stop", text)
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [((), None), (("--stop-token", "<|im_end|>", "--stop-token", "17"), ("<|im_end|>", 17))],
)
def test_stop_tokens_are_ids_or_tokens(arguments: tuple[str, ...], expected: Any) -> None:
    assert parsed(*arguments).arguments["stop_tokens"] == expected


def test_an_empty_stop_token_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        parsed("--stop-token", "")
    assert "the stop token is empty; give an id" in capsys.readouterr().err


def test_a_response_ends_at_the_token_that_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model, prompt = fl.FocusModel.demo(), fl.load_synthetic(1, num_documents=2)[0].prompt()
    whole = model.generate(prompt, max_new_tokens=20)
    third = int(whole.tokens[2])
    n = whole.tokens.tolist().index(third)
    wanted = ["generate", "--prompt", prompt, "--max-new-tokens", "20", "--stop-token"]
    assert main([*wanted, str(third), "--out", str(tmp_path / "cut")]) == 0
    cut = json.loads((tmp_path / "cut" / "generate.json").read_text())
    assert cut["model"]["stop_tokens"] == [third]
    assert cut["responses"][0]["response"] == model.generate(prompt, max_new_tokens=n).text != whole.text
    assert main([*wanted, "<|no such|>"]) == 1
    assert "stop_tokens has '<|no such|>', which is no single token of the vocabulary" in capsys.readouterr().err


def test_a_response_ends_at_the_string_that_was_given(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["generate", "--sample", "0", "--documents", "2", "--max-new-tokens", "20"]
    texts: dict[str, str] = {}
    for name, more in (("whole", []), ("cut", ["--stop", "a", "--stop", "e"])):
        assert main([*wanted, *more, "--out", str(tmp_path / name)]) == 0
        result = json.loads((tmp_path / name / "generate.json").read_text())
        texts[name] = result["responses"][0]["response"]
        assert result["model"].get("decoding", {}) == ({"stop_strings": ["a", "e"]} if more else {})
    assert texts["cut"] == min((texts["whole"].partition(letter)[0] for letter in "ae"), key=len).strip()
    assert texts["cut"] != texts["whole"]


def scored(directory: Path, response: str, answers: list[str]) -> float:
    """Score of a response, by the Python file of the task."""
    spec = importlib.util.spec_from_file_location("score", directory / "focuslens_multidoc_score.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.score({"answers": answers}, [response])["em"]


@pytest.mark.parametrize(
    ("name", "arguments", "expected"),
    [
        ("demo", [], ()),
        ("llama", [], BASE_STOP_STRINGS),
        ("llama_chat", [], ()),
        ("llama", ["--no-stop"], ()),
        ("demo", ["--stop", "\\n", "--stop", "Answer:"], ("\n", "Answer:")),
    ],
)
def test_a_task_has_the_models_stop_strings(
    name: str, arguments: list[str], expected: tuple[str, ...], checkpoint: Any, tmp_path: Path
) -> None:
    """A harness would end a response at a new line before the answer. The score cuts at white space instead."""
    pytest.importorskip("datasets")
    model = name if name == "demo" else str(checkpoint(name))
    wanted = ["harness", "--model", model, "--samples", "2", "--documents", "2", "--out", str(tmp_path), *arguments]
    assert main(wanted) == 0
    loader: Any = type("Loader", (yaml.SafeLoader,), {})
    loader.add_constructor("!function", lambda loader, node: node.value)
    task = yaml.load((tmp_path / "focuslens_multidoc.yaml").read_text(), Loader=loader)
    assert task["generation_kwargs"]["until"] == [text for text in expected if text != "\n"]
    assert json.loads((tmp_path / "focuslens_multidoc.json").read_text())["stop_strings"] == list(expected)
    assert scored(tmp_path, "\n\n Paris\nnot Rome", ["Paris"]) == 1
    assert scored(tmp_path, "\n\n Paris\nnot Rome", ["Rome"]) == ("\n" not in expected)


def test_helmets_own_options_end_responses_unless_others_are_given() -> None:
    from focuslens.cli import helmet

    parser = argparse.ArgumentParser()
    helmet.COMMAND.add_options(parser)
    assert helmet._model(parser.parse_args([])).arguments["stop_strings"] == ()
    assert helmet._model(parser.parse_args(["--stop", "\\n\\n"])).arguments["stop_strings"] == ("\n\n",)


def test_a_report_reopens_the_model_with_the_stop_tokens_of_the_run(checkpoint: Any) -> None:
    from focuslens.viz.run_report.samples import reopen_model

    directory = str(checkpoint("llama"))
    for tokens in ([17, 3], [], None):
        model = fl.FocusModel.from_pretrained(directory, device="cpu", stop_tokens=tokens)
        reopened = reopen_model(json.loads(json.dumps(model.description)), name=directory, device="cpu")
        assert reopened.stop_tokens == model.stop_tokens


def test_a_report_reopens_the_model_with_the_stop_strings_of_the_run(checkpoint: Any) -> None:
    from focuslens.viz.run_report.samples import reopen_model

    directory = str(checkpoint("llama"))
    for strings in (BASE_STOP_STRINGS, (), ("x",)):
        model = fl.FocusModel.from_pretrained(directory, device="cpu", stop_strings=strings)
        reopened = reopen_model(json.loads(json.dumps(model.description)), name=directory, device="cpu")
        assert reopened.decoding == model.decoding
        other = fl.FocusModel(model.backend, model.tokenizer, stop_strings=["y"])
        assert reopen_model(model.description, name=directory, device="cpu", given=other) is not other
