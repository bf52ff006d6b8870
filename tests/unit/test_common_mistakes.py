"""Common mistakes of new users, and the error messages for them, in Python and on the command line.

A command prints one line on standard error and never a traceback. Its exit status is 1, or 2 if the command line itself
is invalid.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import pytest
import torch
import transformers
from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError, RevisionNotFoundError

import focuslens as fl
from focuslens.cli.main import main
from tests.support.multidoc_files import oracle_record, write

SHAPE = {"n_layers": 3, "n_heads": 4, "n_key_value_heads": 2, "d_head": 16}
GOLD = fl.MultiDocSample("who?", ("Ann",), (fl.Document("a", "Ann did it."), fl.Document("b", "Bob did.")), 0)
NO_GOLD = fl.MultiDocSample("who?", ("Ann",), GOLD.documents, None, "other")


@pytest.fixture(autouse=True)
def _closed_figures():
    yield
    plt.close("all")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "oracle.jsonl", [oracle_record(i) for i in range(12)])


@pytest.fixture
def small(checkpoint: Any, data: Path) -> list[str]:
    """Options for a quick run of a command."""
    return [
        "--model", str(checkpoint("llama")), "--data", str(data), "--documents", "2", "--gold-positions", "0,1",
        "--samples", "2", "--max-new-tokens", "3",
    ]  # fmt: skip


@pytest.fixture
def refused(capsys: pytest.CaptureFixture[str]):
    """Function that runs a failing command with ``--quiet`` and returns its one-line error message."""

    def run(*arguments: str, status: int = 1) -> str:
        capsys.readouterr()
        try:
            found = main([*arguments, "--quiet"])
        except SystemExit as stop:
            found = stop.code
        said = capsys.readouterr().err
        assert found == status
        assert said.count("\n") == 1, said
        assert said.startswith(f"focuslens {arguments[0]}: ")
        return said

    return run


@pytest.fixture
def model(load_model: Any) -> fl.FocusModel:
    return load_model("llama")


def directions(folder: Path, heads: Any = ((1, 0), (2, 1)), d_head: int = 16, **settings: Any) -> str:
    return str(fl.FocusDirections(heads, torch.randn(len(heads), d_head), **settings).save(folder / "directions"))


# 1. A missing model


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nobody/no-such-model", "there is no directory 'nobody/no-such-model', and the hub cannot be reached"),
        ("./no/such/directory", "there is no directory './no/such/directory'; a model is a local directory or a name"),
        ("a/b/c", "there is no directory 'a/b/c', and a name on the hub has the form OWNER/NAME"),
    ],
)
def test_a_model_that_is_nowhere(name, message, refused):
    with pytest.raises(FileNotFoundError, match=message):
        fl.FocusModel.from_pretrained(name)
    assert message in refused("heads", "--model", name)


def test_a_directory_that_is_no_checkpoint(checkpoint, tmp_path, refused):
    half = tmp_path / "half"
    half.mkdir()
    message = f"the directory '{half}' holds no config.json; a model's directory holds config.json, a tokenizer"
    with pytest.raises(FileNotFoundError, match=message):
        fl.FocusModel.from_pretrained(str(half))
    assert message in refused("heads", "--model", str(half))
    shutil.copy(checkpoint("llama") / "config.json", half)
    assert "holds no tokenizer (tokenizer.json); save it beside the weights" in refused("heads", "--model", str(half))
    with pytest.raises(FileNotFoundError, match="a name on the hub; the directory that holds it may be meant"):
        fl.FocusModel.from_pretrained(str(half / "config.json"))


# 2. A model that the hub does not provide


@pytest.mark.parametrize(
    ("cause", "kind", "message"),
    [
        (
            GatedRepoError,
            PermissionError,
            "'someone/model' is gated: ask for access at https://huggingface.co/someone/",
        ),
        (RepositoryNotFoundError, FileNotFoundError, "there is no model 'someone/model' on the hub, and no such direc"),
        (RevisionNotFoundError, FileNotFoundError, "'someone/model' has no revision 'main2' on the hub; name a branch"),
    ],
)
def test_a_model_that_the_hub_does_not_give(cause, kind, message, monkeypatch, refused):
    """The message names the hub's error, which transformers wraps in a multi-line ``OSError``."""

    class Response:
        headers: dict[str, str] = {}  # noqa: RUF012
        status_code = 403
        request = None

    def from_pretrained(name: str, **settings: Any):
        try:
            raise cause("403 Client Error", response=Response())
        except cause as error:
            raise OSError("You are trying to access a gated repo.\nMake sure to have access to it.\n") from error

    monkeypatch.setattr(transformers.AutoTokenizer, "from_pretrained", from_pretrained)
    with pytest.raises(kind, match=message):
        fl.FocusModel.from_pretrained("someone/model", revision="main2")
    assert message in refused("heads", "--model", "someone/model", "--revision", "main2")


# 3. An unsupported architecture


def changed_config(checkpoint: Any, folder: Path, **changes: Any) -> str:
    shutil.copytree(checkpoint("llama"), folder)
    config = json.loads((folder / "config.json").read_text())
    del config["max_position_embeddings"]  # the configurations of some model types have no such field and reject it
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return str(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "new_thing"}, "has the type 'new_thing', which this version of transformers does not know; a"),
        (
            {"model_type": "bert", "architectures": ["BertForMaskedLM"]},
            "has the architecture BertForMaskedLM, a model that generates no text; it must be a decoder-only language",
        ),
        (
            {"model_type": "t5", "architectures": ["T5ForConditionalGeneration"]},
            "has the architecture T5ForConditionalGeneration, an encoder-decoder model; it must be a decoder-only",
        ),
        (
            {"model_type": "xlnet", "architectures": ["XLNetLMHeadModel"], "d_head": 16},
            "has the architecture XLNetLMHeadModel, for which TransformerLens has no adapter; Llama, Mistral, Qwen2",
        ),
    ],
)
def test_an_architecture_that_cannot_be_read(changes, message, checkpoint, tmp_path, refused):
    name = changed_config(checkpoint, tmp_path / "other", **changes)
    with pytest.raises(ValueError, match=message):
        fl.FocusModel.from_pretrained(name)
    assert message in refused("heads", "--model", name)


# 4. Missing or wrong data


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            None,
            "there is no file '{path}'; the multi-document QA files come from https://github.com/nelson-liu/lost-in",
        ),
        ("question,answer\nwho,Ann\n", "{path}, line 1: broken JSON (Expecting value"),
        ('[{"question": "who"}]\n', '{path}, line 1: the line is [{{"question": "who"}}]; it must be a JSON'),
        ('{"question": "who", "answers": ["Ann"]}\n', "{path}, line 1: the field 'ctxs' is missing; there are 'ques"),
        ("", "{path} is empty; it must hold one JSON object per line"),
        ("/", "'{path}' is a directory; name a file in it, such as *.jsonl.gz"),
    ],
)
def test_data_that_are_not_what_they_should_be(content, message, checkpoint, tmp_path, refused):
    path = tmp_path / "given"
    if content == "/":
        path.mkdir()
    elif content is not None:
        path.write_text(content)
    message = message.format(path=path)
    with pytest.raises((ValueError, OSError)) as caught:
        fl.load_multidoc(path, num_documents=2, gold_positions=[0])
    assert message in str(caught.value)
    assert message in refused("heads", "--model", str(checkpoint("llama")), "--data", str(path))


# 5. Samples without a relevant document, or other objects in place of samples


def test_samples_without_a_relevant_document(model, recwarn):
    split = fl.SplitSoftmax([(0, 0)], 0.3)
    with pytest.raises(ValueError, match=r"1 of 1 samples have no relevant document \(gold_index is None\)"):
        fl.evaluate(model, [NO_GOLD], [split], max_new_tokens=2)
    with pytest.warns(UserWarning, match="1 of 2 samples have no relevant document .* does not change those samples"):
        fl.evaluate(model, [NO_GOLD, GOLD], [split], max_new_tokens=2)
    assert len(fl.evaluate(model, [NO_GOLD], max_new_tokens=2)) == 1
    with pytest.raises(ValueError, match="has a response and a relevant document"):
        fl.contextual_scores(model, [NO_GOLD], max_new_tokens=2).ranking()
    with pytest.raises(ValueError, match="the question 'who\\?' has no gold document, so it has no 'gold' prompt"):
        NO_GOLD.prompt("gold")
    with pytest.raises(ValueError, match="none of the 1 samples has a gold document and a response"):
        fl.train_focus_directions(model, [NO_GOLD], [(0, 0)], max_new_tokens=2)
    with pytest.raises(ValueError, match="gold_index is 2, but there are 2 documents: it must be 0 to 1, or None"):
        fl.MultiDocSample("who?", ("Ann",), GOLD.documents, 2)


def test_samples_that_are_none(model, unchecked):
    for work in (fl.evaluate, fl.contextual_scores, fl.train_focus_directions):
        with pytest.raises(TypeError, match=r"samples is one MultiDocSample; give a list of them: \[sample\]"):
            work(model, GOLD)  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError, match=r"samples contain a str; they must be MultiDocSample\(question, answers"):
            work(model, ["who?"])  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError, match=r"model is a str; it must be a FocusModel: fl.FocusModel.from_pretrained"):
            work("gpt2", [GOLD])  # pyright: ignore[reportArgumentType]
        with pytest.raises(
            TypeError, match=r"samples is 'nq.jsonl'; it must be a list of MultiDocSample, such as fl.l"
        ):
            work(model, "nq.jsonl")  # pyright: ignore[reportArgumentType]
        with pytest.raises(TypeError, match=r"samples is None; it must be a list of MultiDocSample"):
            work(model, None)  # pyright: ignore[reportArgumentType]


def test_a_line_without_its_gold_passage(checkpoint, tmp_path, refused):
    record = oracle_record(0)
    record["ctxs"][0]["isgold"] = record["ctxs"][0]["hasanswer"] = False
    path = write(tmp_path / "oracle.jsonl", [record])
    said = refused("heads", "--model", str(checkpoint("llama")), "--data", str(path), "--documents", "1")
    assert f"{path}, line 1: " in said
    assert "gold" in said


# 6. Prompts that are too long


def test_prompts_that_are_too_long(model, small, refused):
    n_ctx = model.shape.n_ctx
    with pytest.raises(ValueError, match=f"tokens do not fit the model's context of {n_ctx}; shorten the prompt, or"):
        model.generate("word " * (n_ctx + 1))
    said = refused("heads", *small, "--n-ctx", "60")
    assert (
        "tokens, and the model's context has 60, and those of 1 more do not fit either; leave such samples out" in said
    )
    said = refused("heads", *small[:2], "--samples", "1", "--n-ctx", "20")
    assert "prompts of one document have up to " in said
    assert "lower --max-new-tokens, or raise --n-ctx" in said


def test_nothing_is_run_before_a_prompt_that_is_too_long_is_named(load_model, samples, monkeypatch):
    lengths = [len(load_model("llama").encode(sample.prompt("long")).tokens) for sample in samples]
    model = load_model("llama", n_ctx=max(lengths) - 1)
    longest = samples[lengths.index(max(lengths))]
    monkeypatch.setattr(type(model.backend), "forward", lambda *_, **__: pytest.fail("the model ran"))
    for work in (fl.evaluate, fl.contextual_scores, fl.document_scores, fl.train_focus_directions):
        with pytest.raises(ValueError, match=f"prompt of sample {longest.id} "):
            work(model, samples, max_new_tokens=2)


# 7. Heads that do not exist


@pytest.mark.parametrize(
    ("heads", "message"),
    [
        ([3, 5], "3 is not a head; heads are (layer, head) pairs, both counted from 0, such as [(12, 3), (14, 0)]"),
        ((1, 0), "1 is not a head; heads are (layer, head) pairs"),
        (["L1H0"], "'L1H0' is not a head; heads are (layer, head) pairs"),
        ([(0.5, 1)], "(0.5, 1) is not a head; heads are"),
        (3, "heads is 3; heads are (layer, head) pairs"),
    ],
)
def test_heads_that_are_no_pairs(heads, message, unchecked):
    for make in (
        lambda: fl.SplitSoftmax(heads, 0.3),
        lambda: fl.HeadAblation(heads),
        lambda: fl.FocusDirections(heads, torch.zeros(1, 16)),
    ):
        with pytest.raises(TypeError) as caught:
            make()
        assert message in str(caught.value)


def test_heads_that_the_model_does_not_have(model, small, tmp_path, refused):
    message = r"head \(3, 0\) does not exist: the model has layers 0 to 2 with heads 0 to 3"
    with pytest.raises(ValueError, match=message):
        model.generate(GOLD.prompt(), [fl.SplitSoftmax([(3, 0)], 0.3)])
    (tmp_path / "ranking.json").write_text("[[3, 0]]")
    options = ["--heads", str(tmp_path / "ranking.json"), "--tau", "0.3", "--k", "1"]
    assert "head (3, 0) does not exist" in refused("split-softmax", *small, *options)
    (tmp_path / "ranking.json").write_text("[3, 5]")
    assert "ranking.json is not a ranking of heads" in refused("split-softmax", *small, *options)


# 8. Parts that the prompt does not have


def test_a_part_that_the_prompt_does_not_have(model):
    with pytest.raises(KeyError, match=r"this prompt has no span 'documents'; it has \['document', .*'relevant'\]"):
        model.generate(GOLD.prompt(), [fl.SplitSoftmax([(0, 0)], 0.3, span="documents")])
    with pytest.raises(KeyError, match="this prompt is a plain text and has no span 'relevant'; give sample"):
        model.generate("Who did it?", [fl.SplitSoftmax([(0, 0)], 0.3)])


def test_a_prompt_without_parts_on_the_command_line(small, refused):
    said = refused("generate", *small[:2], "--prompt", "Who did it?", "--tau", "0.3")
    assert (
        "the text of --prompt has none; give --sample with --case long or gold, or in Python fl.Prompt(text, spa"
        in said
    )


# 9. Directions for another model or another site


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"d_head": 8}, "directions have d_head = 8, the model has 16: they belong to a different model"),
        (
            {"heads": ((9, 0),)},
            "directions are of another model: head (9, 0) does not exist: the model has layers 0 to 2",
        ),
        (
            {"provenance": {"shape": {**SHAPE, "n_layers": 32}}},
            "directions are of a model with n_layers = 32, this one has 3",
        ),
    ],
)
def test_directions_of_another_model(settings, message, model, small, tmp_path, refused):
    source = directions(tmp_path, **settings)
    with pytest.raises(ValueError) as caught:  # noqa: PT011
        model.generate("Who?", [fl.FocusSteering(fl.FocusDirections.load(source), 0.3)])
    assert message in str(caught.value)
    assert message in refused("steer", *small, "--directions", source, "--k", "1")
    assert message in refused("generate", *small, "--sample", "0", "--directions", source)


def test_directions_of_heads_that_a_ranking_does_not_name(small, tmp_path, refused):
    (tmp_path / "ranking.json").write_text("[[0, 0]]")
    said = refused("steer", *small, "--directions", directions(tmp_path), "--heads", str(tmp_path / "ranking.json"))
    assert "has directions of 2 heads, none of which the ranking names; rank all heads" in said


def test_directions_for_another_site(checkpoint, tmp_path, unchecked, refused):
    source = directions(tmp_path, provenance={"shape": SHAPE})
    named = ["--model", str(checkpoint("llama")), "--directions", source, "--alpha", "0.3"]
    said = refused("fold", *named, "--out", str(tmp_path / "steered"))
    assert "the directions act at the rotary site" in said
    assert "train with site='projection' to fold" in said
    with pytest.raises(ValueError, match="site is 'rot'; it must be one of rotary, projection"):
        fl.FocusDirections([(0, 0)], torch.zeros(1, 16), site="rot")  # pyright: ignore[reportArgumentType]
    shutil.rmtree(source)
    Path(source).mkdir()
    assert "holds no directions.safetensors; is it a directory written by" in refused(
        "fold", *named, "--out", str(tmp_path / "steered")
    )


# 10. A chat template that a base model does not have


def test_a_chat_template_that_there_is_not(checkpoint, small, refused):
    message = "chat=True, but the tokenizer has no chat template; use chat=False for a base model"
    with pytest.raises(ValueError, match=message):
        fl.FocusModel.from_pretrained(str(checkpoint("llama")), device="cpu", chat=True)
    assert message in refused("heads", *small, "--chat")


# 11. Extras that are not installed


def without(monkeypatch: pytest.MonkeyPatch, package: str, *modules: str) -> None:
    for name in [name for name in sys.modules if name.split(".")[0] == package or name.startswith(modules)]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, package, None)


def test_an_extra_that_is_not_installed(small, tmp_path, monkeypatch, refused):
    with monkeypatch.context() as missing:
        without(missing, "circuitsvis", "focuslens.viz")
        assert "pip install 'focuslens[viz]'" in refused("report", str(tmp_path))
        without(missing, "matplotlib", "focuslens.viz", "focuslens.studies.paper")
        assert "pip install 'focuslens[viz]'" in refused("paper")
    with monkeypatch.context() as missing:
        without(missing, "rouge_score", "focuslens.scores.rouge")
        assert "pip install 'focuslens[rouge]'" in refused("paper", "--only", "retrieval")
    with monkeypatch.context() as missing:
        missing.setitem(sys.modules, "ray", None)
        assert "pip install 'focuslens[ray]'" in refused("heads", *small, "--ray")
        with pytest.raises(ImportError, match=r"needs Ray, and 'ray' is missing: pip install 'focuslens\[ray\]'"):
            fl.RayPool("demo")


# 12. An output path with results of another run


def test_a_place_that_holds_other_results(model, small, tmp_path, refused):
    out, again = str(tmp_path / "out"), ["--directions", directions(tmp_path), "--k", "1"]
    assert main(["steer", *small, *again, "--alpha", "0.2", "--out", out, "-q"]) == 0
    message = "steering.jsonl holds results of a different run (settings differ; "
    assert message in refused("steer", *small, *again, "--alpha", "0.4", "--out", out)
    fl.evaluate(model, [GOLD], max_new_tokens=2, out=tmp_path / "run.jsonl")
    with pytest.raises(
        ValueError, match=r"run.jsonl holds results of a different run \(max_new_tokens differ.*delete it"
    ):
        fl.evaluate(model, [GOLD], max_new_tokens=3, out=tmp_path / "run.jsonl")


def test_a_checkpoint_is_written_into_no_other(checkpoint, tmp_path, refused):
    source = directions(tmp_path, provenance={"shape": SHAPE}, site="projection")
    named = ["--model", str(checkpoint("llama")), "--directions", source, "--alpha", "0.3", "--out", str(tmp_path)]
    assert f"{tmp_path} is not an empty directory; name a new one" in refused("fold", *named)


# 13. Numbers on the command line


def test_a_strength_below_zero_needs_no_equals_sign(small, tmp_path, capsys):
    (tmp_path / "ranking.json").write_text("[[1, 0], [2, 1]]")
    options = ["--directions", directions(tmp_path), "--heads", str(tmp_path / "ranking.json")]
    assert main(["steer", *small, *options, "--alpha", "-0.2,.5", "--k", "1", "--json"]) == 0
    assert [row.get("alpha") for row in json.loads(capsys.readouterr().out)["settings"]] == [None, -0.2, 0.5]
    assert main(["generate", *small, *options, "--sample", "0", "--alpha", "-2e-1", "--json"]) == 0
    steered = json.loads(capsys.readouterr().out)["responses"][1]
    assert steered["interventions"][0]["alpha"] == -0.2


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            ["steer", "--alpha", "0,2;1"],
            "argument --alpha: '0,2;1' is not numbers separated by commas, such as -0.2,0.2",
        ),
        (["steer", "--k", "0.5"], "argument --k: '0.5' is not whole numbers separated by commas, such as 10,20"),
        (["generate", "--alpha", "strong"], "argument --alpha: invalid float value: 'strong'"),
        (["heads", "--case", "right"], "argument --case: invalid choice: 'right' (choose from "),
        (["heads", "--modle", "x"], "focuslens heads: unrecognized arguments: --modle x"),
    ],
)
def test_a_command_line_that_is_wrong(arguments, message, refused):
    assert message in refused(*arguments, *(["--directions", "x"] if arguments[0] == "steer" else []), status=2)


def test_gold_positions_that_are_no_documents(monkeypatch, refused):
    monkeypatch.setattr("focuslens.cli.common.ModelOptions.open", lambda _: pytest.fail("the command began its work"))
    said = refused("heads", "--documents", "3", "--gold-positions", "0,4,9")
    assert "--gold-positions 4,9 is outside of the documents: with --documents 3, positions are 0 to 2; leave" in said
    assert "--gold-positions 20 is outside of the documents" in refused("heads", "--gold-positions", "20")
    assert "--gold-positions -1 is outside of the documents" in refused("heads", "--gold-positions", "-1")


# 14. Answers that every text contains


def test_answers_that_normalise_to_nothing(model, data, small, refused):
    message = (
        "the answer 'The' is empty after normalisation, so it would match every prediction; an answer needs at least"
    )
    with pytest.raises(ValueError, match=message):
        fl.evaluate(model, [fl.MultiDocSample("who?", ("The",), GOLD.documents, 0)])
    record = oracle_record(0)
    record["answers"] = ["The"]
    write(data, [record, *(oracle_record(i) for i in range(1, 12))])
    said = refused("heads", *small)
    assert f"{data}, line 1: " in said
    assert "normalise" in said


# 15. A missing device


@pytest.mark.parametrize("device", ["cuda:99", "gpu"])
def test_a_device_that_is_not_there(device, checkpoint, small, refused):
    message = f"device is '{device}', which is not available"
    with pytest.raises(ValueError, match=f"{message}.*; available: cpu"):
        fl.FocusModel.from_pretrained(str(checkpoint("llama")), device=device)
    assert message in refused("heads", *small, "--device", device)


@pytest.mark.parametrize("window", [True, "4", 2.5])
def test_a_configuration_with_a_value_of_another_type(window, checkpoint, tmp_path, refused):
    folder = shutil.copytree(checkpoint("mistral"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": window}))
    message = f"the configuration of '{folder}' is not valid: Validation error for field 'sliding_window'"
    with pytest.raises(ValueError, match=message):
        fl.FocusModel.from_pretrained(str(folder))
    assert message in refused("heads", "--model", str(folder))


@pytest.mark.parametrize("window", [0, -1])
def test_a_window_without_keys(window, checkpoint, tmp_path, refused):
    folder = shutil.copytree(checkpoint("mistral"), tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "sliding_window": window}))
    assert f"sliding_window is {window} in the configuration of" in refused("heads", "--model", str(folder))
