"""Settings of a reproduction: the paper's settings, and error messages that name each wrong setting."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from focuslens.studies.paper import settings as paper
from focuslens.studies.paper.study import Study

SHIPPED = Path(paper.__file__).parent


def test_the_papers_settings_are_in_its_models_files() -> None:
    found = paper.load_settings(paper.find_settings("llama-3.2-3b-instruct"))
    assert found.model == "meta-llama/Llama-3.2-3B-Instruct"
    assert found.data.documents == 20
    assert found.data.gold_positions == (1, 5, 10, 15, 20)
    assert found.data.every_position
    assert found.seed == 42
    assert found.split_softmax.taus == (0.1, 0.3, 0.6, 1.5, 1000.0)
    assert found.split_softmax.ks == (1, 5, 10, 20, 30, 50, 100, 150, 200, 300, 400, 500, 600)
    assert found.split_softmax.random_tau == 0.3
    assert (min(found.steering.alphas), max(found.steering.alphas)) == (-0.5, 1.0)
    assert {-0.2, 0.2, 0.4, 0.5, 1.0} <= {*found.steered_scores.few_alphas, *found.steered_scores.many_alphas}
    assert (found.directions.epochs, found.directions.learning_rate) == (10, 1e-3)
    assert (found.scores.top, found.max_new_tokens) == (5, 100)


def test_every_model_of_the_paper_has_a_file_and_the_defaults_are_the_papers() -> None:
    names = {file.stem for file in SHIPPED.glob("*.yaml")}
    models = {"llama-3.2-3b-instruct", "qwen2.5-7b-instruct", "ministral-8b-instruct-2410"}
    bases = {"llama-3.2-3b", "qwen2.5-7b"}
    real = {name for name in names if name.startswith(("smollm2-135m-instruct", "gemma-3-270m"))}
    assert names == {"demo", "demo-focus", *models, *bases, *real}
    for name in models | bases:
        found = paper.load_settings(paper.find_settings(name))
        assert found.name == name
        assert (found.directions.source == "train") == (name in models)
        for part in ("split_softmax", "steering", "steered_scores", "scores", "retrieval", "anatomy"):
            assert getattr(found, part) == getattr(paper.PaperSettings("x", "y"), part), (name, part)


def test_a_path_is_taken_as_it_is_and_an_unknown_name_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("name: own\nmodel: demo\n")
    assert paper.load_settings(paper.find_settings(str(file))).name == "own"
    with pytest.raises(FileNotFoundError, match=r"there is no file .*none\.yaml"):
        paper.find_settings(str(tmp_path / "none.yaml"))
    with pytest.raises(FileNotFoundError, match="no settings are called 'gpt'; there are"):
        paper.find_settings("gpt")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- a", r"it must be a mapping of settings"),
        ("model: demo", "lacks 'name'"),
        ("name: a\nmodel: demo\ntau: 1", "unknown setting 'tau'; there are name, model"),
        (
            "name: a\nmodel: demo\nsteering: {alpha: [1]}",
            "steering has an unknown setting 'alpha'; there are alphas, ks",
        ),
        ("name: a\nmodel: demo\nsteering: {alphas: 1}", r"alphas is 1; it must be a list"),
        ("name: a\nmodel: demo\nsteering: {ks: []}", r"ks is \[\]; it must be a list with at least one entry"),
        ("name: a\nmodel: demo\nsteering: {ks: [1.5]}", "ks is 1.5; it must have the type int"),
        ("name: a\nmodel: demo\nseed: true", "seed is True; it must have the type int"),
        ("name: a\nmodel: demo\ndirections: {site: both}", "site is 'both'; it must be one of rotary, projection"),
        ("name: a\nmodel: demo\ndirections: {heads: x}", "heads is 'x'; it must have the type int"),
        ("name: a\nmodel: demo\nmodel_options: 3", "model_options is 3; it must have the type"),
    ],
)
def test_what_is_wrong_is_named(text: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text(text)
    with pytest.raises(ValueError, match=message):
        paper.load_settings(file)


def test_whole_numbers_are_taken_for_others_and_nothing_for_all(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("name: a\nmodel: demo\nsteering: {alphas: [1, -2]}\ndirections: {heads: null}\ndata: {train: 5}")
    found = paper.load_settings(file)
    assert found.steering.alphas == (1.0, -2.0)
    assert isinstance(found.steering.alphas[0], float)
    assert found.directions.heads is None
    assert (found.data.train, found.data.test) == (5, None)


def test_the_data_can_name_a_prompt_template(tmp_path: Path) -> None:
    template = tmp_path / "template.yaml"
    template.write_text("instruction: Answer.\n")
    file = tmp_path / "own.yaml"
    file.write_text(
        f"name: a\nmodel: demo\ndata: {{file: synthetic, documents: 2, gold_positions: [1], template: {template}}}"
    )
    found = paper.load_settings(file)
    opened = Study(found, tmp_path).selection("test")
    assert opened.template is not None
    assert opened.template.describe() == {"instruction": "Answer."}
    assert Study(replace(found, data=replace(found.data, template=None)), tmp_path).selection("test").template is None
    template.write_text("instrucion: Answer.\n")
    with pytest.raises(ValueError, match="a template has no field 'instrucion'"):
        paper.load_settings(file)
    template.unlink()
    with pytest.raises(FileNotFoundError):
        paper.load_settings(file)
