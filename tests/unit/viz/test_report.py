"""``focuslens report`` shows the content of the result files, and names what is missing."""

from __future__ import annotations

import csv
import json
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from focuslens.cli.main import main
from focuslens.prompts.sample import prompts_digest
from focuslens.studies.paper.settings import PaperSettings
from focuslens.studies.paper.study import Study
from focuslens.viz import Section, Table, save_figure, write_sections
from focuslens.viz.run_report import Sources, examples, reading, write_run_report
from focuslens.viz.run_report.reading import read_run
from focuslens.viz.run_report.samples import UnavailableError, reopen_samples
from focuslens.viz.run_report.sections import ReportFolder
from tests.support.pages import Elements, data_of, stands_alone
from tests.support.recorded_runs import BECAME, judge

STEERED = "steering alpha=2 k=3"
SPLIT = "split-softmax contextual tau=0.1 k=2"


@pytest.fixture(scope="module")
def run(recorded_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The recorded run with its report. The data file is in another folder."""
    folder = tmp_path_factory.mktemp("reported") / "run"
    shutil.copytree(recorded_run / "out", folder)
    assert main(["report", str(folder), "--data", str(recorded_run / "oracle.jsonl"), "--title", "A <run>"]) == 0
    return folder


@pytest.fixture
def copy(recorded_run: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(recorded_run / "out", tmp_path / "out"))


def page_of(folder: Path) -> str:
    return (folder / "report.html").read_text(encoding="utf-8")


def views_of(html: str) -> list[str]:
    return [frame["srcdoc"] or "" for frame in Elements(html).named("iframe")]


def records_of(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()[1:]]


def table(html: str, caption: str) -> list[list[str]]:
    """Cell texts by row, including the header row, of the first table whose caption starts with ``caption``."""
    for one in re.findall(r"<table>(.*?)</table>", html, flags=re.DOTALL):
        if Elements(one).text.startswith(caption):
            rows = re.findall(r"<tr>(.*?)</tr>", one, flags=re.DOTALL)
            return [[Elements(cell).text for cell in re.findall(r"<t[hd][^>]*>.*?</t[hd]>", row)] for row in rows]
    raise AssertionError(f"no table {caption!r}")


# Runs


def test_a_report_stands_alone_and_says_what_made_it(run: Path, recorded_run: Path):
    html = page_of(run)
    assert stands_alone(html)
    text = Elements(html).text
    header = json.loads((run / "steer" / "steering.jsonl").read_text().splitlines()[0])["header"]
    assert str(recorded_run) not in text
    for said in (
        "A <run>",
        f"model: {header['model']['backend']}",
        header["model"]["weights"],
        "oracle.jsonl",
        header["data"]["prompts_sha256"][:16],
        f"torch {header['versions']['torch']}",
    ):
        assert said in text, said
    seed = re.search(r"<dt>seed</dt><dd>(.*?)</dd>", html)
    assert seed
    assert seed.group(1) == "42"
    assert sorted(one.name for one in run.iterdir() if one.is_file()) == ["report.html"]


def test_findings_are_those_of_the_records(run: Path):
    text = Elements(page_of(run)).text
    # Samples 1 and 3 are correct without the setting, and samples 0, 2 and 3 with it.
    assert re.search(
        r"On 4 test samples of 4 questions exact match is 0\.500 \[0\.000, 1\.000\] with all documents", text
    )
    assert (
        f"Focus directions: {STEERED}, chosen on the same questions, which makes the result optimistic, gives" in text
    )
    assert "0.750 [0.250, 1.000] against 0.500 [0.000, 1.000] without; 2 samples became right, 1 wrong" in text
    assert "(exact McNemar p = 1)" in text
    heads = json.loads((run / "heads" / "heads.json").read_text())
    best = heads["scores"][0]
    low, high = heads["intervals"][f"{best['layer']}/{best['head']}"]
    assert f"L{best['layer']}H{best['head']} gives most, {best['relevant']:.3f} [{low:.3f}, {high:.3f}]" in text
    assert low <= best["relevant"] <= high
    above = sum(row["relevant"] > 0.1 for row in heads["scores"])
    assert f"Of 12 heads {above} give more than a tenth" in text
    losses = np.array(json.loads((run / "train" / "directions.json").read_text())["provenance"]["losses"])
    gain = float((losses[0] - losses[-1]).mean())
    assert f"raised their relevant score on the training prompts by {gain:.3f} [" in text


def test_scores_are_shown_beside_the_chance_level(run: Path):
    heads, html = json.loads((run / "heads" / "heads.json").read_text()), page_of(run)
    rows = table(html, "Contextual scores (share of the response")
    assert rows[0][-3:] == ["chance", "excess", "document excess"]
    for row, scores in zip(rows[1:], heads["scores"], strict=False):
        assert float(row[-2]) == pytest.approx(scores["relevant"] - scores["chance"], abs=6e-4)
    text = Elements(html).text
    above = [row for row in heads["scores"] if row["relevant"] > 0.1]
    best = max(heads["scores"], key=lambda row: row["excess"])
    low, high = heads["excess_intervals"][f"{best['layer']}/{best['head']}"]
    assert f"Even attention would give {heads['chance']['row']:.3f} to the relevant document" in text
    assert (
        f"Of the {len(above)} heads above a tenth, {sum(row['excess'] > 0 for row in above)} are above chance" in text
    )
    name = f"L{best['layer']}H{best['head']}"
    assert f"{name} exceeds it most, by {best['excess']:.3f} [{low:.3f}, {high:.3f}]" in text
    assert "Dots mark scores above chance" in html


def test_a_file_of_an_earlier_version_is_shown_without_the_chance_level(copy: Path):
    path = copy / "heads" / "heads.json"
    content = json.loads(path.read_text())
    for name in ("chance", "sparsity_of_excess", "excess_intervals"):
        del content[name]
    kept = ("layer", "head", "relevant", "irrelevant", "irrelevant_max", "sink")
    content["scores"] = [{name: row[name] for name in kept} for row in content["scores"]]
    path.write_text(json.dumps(content))
    write_run_report(copy, sources=Sources(views=0))
    html = page_of(copy)
    assert table(html, "Contextual scores (share of the response")[0] == [
        "case", "samples", "head", "relevant", "irrelevant", "irrelevant max", "sink",
    ]  # fmt: skip
    assert "Even attention" not in html
    assert "Dots mark" not in html


def test_tables_hold_every_setting_with_its_interval(run: Path):
    html = page_of(run)
    records = records_of(run / "steer" / "steering.jsonl")
    rows = table(html[html.index(">Focus directions, test questions</h2>") :], "Exact match with its 95 % interval")
    assert rows[0] == ["setting", "exact match", "low", "high", "gained", "lost", "p"]
    assert [row[0] for row in rows[1:]] == list(records[0]["results"])
    for name, em, low, high, *_ in rows[1:]:
        right = [record["results"][name]["correct"] for record in records]
        assert float(em) == pytest.approx(sum(right) / len(right), abs=5e-4)
        assert float(low) <= float(em) <= float(high)
    said = table(html, "Responses to: question")
    assert [row[0] for row in said[1:]] == ["baseline", "split-softmax tau=0.1 k=2"]


def test_every_figure_has_a_link_to_its_numbers(run: Path):
    html = page_of(run)
    pictures = [image["alt"] for image in Elements(html).named("img")]
    assert len(pictures) == 4
    links = re.findall(r'</figure>\s*<p class="data"><a href="([^"]+)">The numbers of this figure', html)
    assert len(links) == 4
    for link in links:
        assert (run / link).is_file(), link
        assert (run / link).with_suffix(".png").is_file()
    (drawn,) = [link for link in links if "steering" in link]
    with (run / drawn).open() as file:
        rows = {row["name"]: row for row in csv.DictReader(file)}
    assert (rows[STEERED]["alpha"], rows[STEERED]["k"], rows[STEERED]["em"]) == ("2.0", "3.0", "0.75")
    assert 'href="steer/steering.jsonl"' in html


# Changed samples


def test_samples_that_changed_are_shown_with_what_was_said(run: Path):
    html = page_of(run)
    records = records_of(run / "steer" / "steering.jsonl")
    rows = table(html, f"steering.jsonl: answers that {STEERED} changed")
    assert [row[0] for row in rows[1:]] == ["right", "right", "wrong"]
    expected = [place for place, (before, after) in BECAME.items() if after and not before] + [1]
    for row, place in zip(rows[1:], expected, strict=True):
        record = records[place]
        assert row[2] == ", ".join(record["answers"])
        assert (row[3], row[4], row[5]) == (
            record["results"]["baseline"]["response"],
            STEERED,
            record["results"][STEERED]["response"],
        )


def test_attention_is_that_of_the_answers_in_the_records(run: Path):
    """The report reruns the recorded responses, because it finds the model, samples and directions of the run."""
    html = page_of(run)
    compared = [data_of(view) for view in views_of(html) if 'id="data"' in view]
    assert len(compared) == 6  # for each of two sweeps, two samples that became right and one that became wrong
    told = re.findall(r"<figcaption>Became (right|wrong) under (.*?)\. Question: ", html)
    assert told == [(became, setting) for setting in (STEERED, SPLIT) for became in ("right", "right", "wrong")]
    records = {"steering": records_of(run / "steer" / "steering.jsonl")}
    records["split"] = records_of(run / "split-softmax" / "split_softmax.jsonl")
    for place, data, (_, setting) in zip((0, 2, 1) * 2, compared, told, strict=True):
        record = records["steering" if setting == STEERED else "split"][place]
        for panel, name in zip(data["panels"], ("baseline", setting), strict=True):
            assert panel["name"] == name
            assert "".join(panel["response"][1:]).strip() == record["results"][name]["response"]
    # The only other views are two of circuitsvis.
    assert sum("CircuitsVis" in view for view in views_of(html)) == 2
    assert all(stands_alone(view) for view in views_of(html))


def test_a_report_is_the_same_for_the_same_run(run: Path, recorded_run: Path, tmp_path: Path):
    before = page_of(run)
    sources = Sources(data=recorded_run / "oracle.jsonl")
    write_run_report(run, sources=sources, title="A <run>")
    assert page_of(run) == before
    elsewhere, _ = write_run_report(run, tmp_path / "deep" / "page.html", sources=Sources(views=0))
    assert sorted(one.suffix for one in (tmp_path / "deep" / "page_files").iterdir()) == [".csv"] * 4 + [".png"] * 4
    (link,) = re.findall(r'href="([^"]+steering.jsonl)"', elsewhere.read_text())
    assert (elsewhere.parent / link).resolve() == (run / "steer" / "steering.jsonl").resolve()


# Missing files


def test_without_views_no_model_is_opened(copy: Path, monkeypatch: pytest.MonkeyPatch, capsys):
    from focuslens import FocusModel

    monkeypatch.setattr(FocusModel, "from_pretrained", None)
    assert main(["report", str(copy), "--views", "0"]) == 0
    out = capsys.readouterr().out
    assert "No attention views: none were requested." in out
    assert not views_of(page_of(copy))


def test_a_missing_data_file_is_said_and_what_would_help(copy: Path, monkeypatch, tmp_path: Path, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["report", str(copy)]) == 0
    out, html = capsys.readouterr().out, page_of(copy)
    said = "the samples are those of oracle.jsonl, which is not here; give its path with --data"
    assert out.count(said) == 2
    assert html.count(said) == 2
    assert not views_of(html)
    # The answers are still shown, with the ids of the samples.
    rows = table(html, f"steering.jsonl: answers that {STEERED} changed")
    assert rows[0] == ["became", "sample", "before", "setting", "after"]
    assert rows[1][1] == records_of(copy / "steer" / "steering.jsonl")[0]["id"]


def test_other_data_of_the_same_name_are_not_taken_for_the_run_s(copy: Path, recorded_run: Path, tmp_path: Path):
    other = tmp_path / "oracle.jsonl"
    other.write_text((recorded_run / "oracle.jsonl").read_text().replace("x gold", "x golden"))
    _, missing = write_run_report(copy, sources=Sources(data=other))
    assert any("are not those of the run (their prompts differ)" in one for one in missing)
    other.write_text("{}\n")
    _, missing = write_run_report(copy, sources=Sources(data=other))
    assert any("the samples cannot be drawn from oracle.jsonl as it is here" in one for one in missing)


def test_a_missing_model_is_said(copy: Path, recorded_run: Path, checkpoint: Any):
    sources = Sources(model_name="/nowhere/at/all", data=recorded_run / "oracle.jsonl")
    _, missing = write_run_report(copy, sources=sources)
    assert sum("no attention views, since the model is" in one and "--model" in one for one in missing) == 2
    other = Sources(model_name=str(checkpoint("llama_mha")), data=recorded_run / "oracle.jsonl")
    _, missing = write_run_report(copy, sources=other)
    assert sum("is not the one of the run: its weights" in one for one in missing) == 2
    assert table(page_of(copy), "steering.jsonl: answers")[0][2] == "accepted"


def test_missing_directions_are_said(copy: Path, recorded_run: Path):
    shutil.rmtree(copy / "train")
    _, missing = write_run_report(copy, sources=Sources(data=recorded_run / "oracle.jsonl"))
    assert [one for one in missing if "directions with the digest" in one and "into the run's folder" in one], missing
    assert len(views_of(page_of(copy))) == 4  # split-softmax needs no directions


def test_a_sample_that_cannot_be_looked_at_is_said_with_the_reason(copy: Path, recorded_run: Path):
    def no_room(*args: Any, **kwargs: Any) -> Any:
        raise ValueError("the prompt has 9 tokens and the context 8")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(examples, "response_attention", no_room)
        _, missing = write_run_report(copy, sources=Sources(data=recorded_run / "oracle.jsonl"))
    silent = [one for one in missing if "no attention view of" in one]
    assert len(silent) >= 2
    assert all("since the prompt has 9 tokens and the context 8" in one for one in silent)


def test_a_run_that_was_stopped_is_reported_as_far_as_it_got(copy: Path):
    path = copy / "steer" / "steering.jsonl"
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:4]))
    _, missing = write_run_report(copy, sources=Sources(views=0))
    assert "3 of 4 samples are done; the same command goes on with the others." in missing
    assert "On 3 test samples of 3 questions" in Elements(page_of(copy)).text


def test_files_that_cannot_be_read_are_named(copy: Path):
    (copy / "heads" / "heads.json").write_text("{")
    (copy / "train" / "directions.safetensors").unlink()
    write_run_report(copy, sources=Sources(views=0))
    text = Elements(page_of(copy)).text
    assert "heads/heads.json could not be read: Expecting property name" in text
    assert "train/directions.json could not be read" in text


def test_one_command_s_folder_is_a_run_too(copy: Path):
    for name, said in (
        ("heads", "This run compares no settings on the same samples"),
        ("train", "This run compares no settings"),
        ("generate", "This run compares no settings"),
    ):
        page, missing = write_run_report(copy / name)
        assert any(one.startswith(said) for one in missing), name
        assert stands_alone(page.read_text())


def test_results_of_one_kind_are_told_apart_by_their_folders(tmp_path: Path, copy: Path):
    for name in ("first", "second"):
        shutil.copytree(copy / "heads", tmp_path / "runs" / name)
    shutil.copytree(copy / "train", tmp_path / "runs", dirs_exist_ok=True)
    shutil.copytree(copy / "train", tmp_path / "runs" / "more")
    page, _ = write_run_report(tmp_path / "runs", sources=Sources(views=0))
    titles = [Elements(one).text for one in re.findall(r"<h2>.*?</h2>", page.read_text())]
    assert [title for title in titles if title.startswith("Contextual heads")] == [
        "Contextual heads (first/heads.json)",
        "Contextual heads (second/heads.json)",
    ]
    assert [title for title in titles if title.startswith("The directions")] == [
        "The directions (runs)",
        "The directions (more)",
    ]


def test_results_are_found_below_and_what_lies_too_deep_is_said(tmp_path: Path, copy: Path):
    deep = tmp_path / "runs" / "paper" / "model" / "heads"
    deep.mkdir(parents=True)
    artefact = {"key": "heads", "title": "Heads", "header": {"model": {"name": "m"}}}
    (deep / "artefact.json").write_text(json.dumps(artefact))
    far = tmp_path / "runs" / "1" / "2" / "3" / "4" / "5" / "6"
    far.mkdir(parents=True)
    (far / "heads.json").write_text("{}")
    files = read_run(tmp_path / "runs")
    assert [one.path for one in files.artefacts] == [deep]
    assert [path for path, _ in files.unread] == [far]
    (copy / "empty").mkdir()
    (copy / "empty" / "heads.json").write_text(json.dumps({"scores": [], "case": "long", "samples": []}))
    assert [why for path, why in read_run(copy).unread if path.name == "heads.json"] == ["it has no scores"]


def test_a_folder_of_very_many_files_is_said_to_be_cut_off(monkeypatch: pytest.MonkeyPatch, copy: Path):
    monkeypatch.setattr(reading, "_AT_MOST", 0)
    (copy / "steer" / "below").mkdir()
    files = read_run(copy)
    assert "more than 0 files" in dict(files.unread)[copy]
    assert files.sweeps


def test_nothing_changed_is_said(copy: Path):
    judge(copy / "steer" / "steering.jsonl", STEERED, dict.fromkeys(range(4), (False, False)))
    _, missing = write_run_report(copy / "steer")
    assert missing == ["steering.jsonl: no answer changed, so there is no sample to show."]


def test_what_the_chosen_setting_never_made_wrong_the_worst_did(copy: Path):
    became = {0: (False, True), 1: (True, True), 2: (True, True), 3: (True, True)}
    judge(copy / "steer" / "steering.jsonl", STEERED, became)
    write_run_report(copy / "steer", sources=Sources(views=0))
    rows = table(page_of(copy / "steer"), f"steering.jsonl: answers that {STEERED} changed; it made no answer wrong")
    assert [row[0] for row in rows[1:]] == ["right", "wrong", "wrong", "wrong"]
    assert rows[2][3] == "steering alpha=-1 k=1"
    assert " without; 1 sample became right, 0 wrong" in Elements(page_of(copy / "steer")).text


def test_folders_without_results_are_refused(tmp_path: Path, capsys):
    assert main(["report", str(tmp_path / "none")]) == 1
    assert "there is no folder" in capsys.readouterr().err
    (tmp_path / "other.json").write_text("{}")
    (tmp_path / "lines.jsonl").write_text("{}\n")
    assert main(["report", str(tmp_path)]) == 1
    assert "holds no results: no records of a sweep (.jsonl), heads.json" in capsys.readouterr().err


# Settings chosen on validation questions


def test_a_setting_chosen_on_validation_questions_is_the_one_reported(copy: Path, tmp_path: Path):
    folder = tmp_path / "both"
    folder.mkdir()
    text = (copy / "steer" / "steering.jsonl").read_text()
    for name, part in (("steering", "test"), ("validation", "validation")):
        header, *lines = text.splitlines()
        content = json.loads(header)
        content["header"]["data"]["part"] = part
        (folder / f"{name}.jsonl").write_text("".join(f"{line}\n" for line in [json.dumps(content), *lines]))
    judge(folder / "validation.jsonl", "steering alpha=-1 k=3", dict.fromkeys(range(4), (False, True)))
    write_run_report(folder, sources=Sources(views=0))
    found = Elements(page_of(folder)).text
    assert "steering alpha=-1 k=3, chosen on validation questions, gives 0.000 [0.000, 0.000] against 0.500" in found
    assert "Focus directions, validation questions, on which settings were chosen" in found
    assert found.count("exact match is") == 1
    table(page_of(folder), "steering.jsonl: answers that steering alpha=-1 k=3 changed")


# Folder of a paper reproduction


def paper_folder(folder: Path) -> Path:
    """A folder with one artefact in the format of ``focuslens paper``."""
    from focuslens.viz import head_map

    own = folder / "heads"
    save_figure(head_map(np.eye(2)), own / "head_map.png")
    (own / "table_1.csv").write_text("a\n1\n")
    content = {
        "header": {"artefact": "heads", "model": {"name": "tiny"}, "versions": {"torch": "2"}},
        "key": "heads",
        "title": "Contextual heads",
        "paper": "Figure 2",
        "findings": [["Few heads read.", "holds"], ["A sentence.", ""]],
        "figures": [["The map.", "head_map.png"]],
        "tables": [{"caption": "Scores", "columns": ["a"], "rows": [[1]]}],
        "reported": [{"caption": "As reported", "columns": ["b"], "rows": [[0.5]]}],
    }
    (own / "artefact.json").write_text(json.dumps(content))
    (folder / "index.html").write_text("<p>the paper's own page")
    return folder


def test_a_paper_s_artefacts_are_gathered(tmp_path: Path):
    page, missing = write_run_report(paper_folder(tmp_path / "paper"))
    text = Elements(page.read_text()).text
    for said in ("Contextual heads (Figure 2)", "Few heads read. [holds]", "A sentence.", "As reported", "index.html"):
        assert said in text, said
    assert 'href="heads/table_1.csv"' in page.read_text()
    assert missing[0].startswith("This run compares no settings")


@pytest.mark.parametrize("every_position", [False, True])
def test_a_paper_s_questions_are_found_again(every_position: bool, tmp_path: Path):
    content = {"name": "x", "model": "demo", "seed": 3}
    data = {"file": "synthetic", "documents": 3, "gold_positions": [1, 3], "every_position": every_position}
    data |= {"train": 2, "validation": 2, "test": 3}
    settings = load(tmp_path, {**content, "data": data})
    expected = Study(settings, tmp_path).samples("test")
    described = {**Study(settings, tmp_path).selection("test").describe(), "prompts_sha256": prompts_digest(expected)}
    assert reopen_samples(json.loads(json.dumps({"data": described, "seed": 3}))) == list(expected)
    with pytest.raises(UnavailableError, match="not those of the run"):
        reopen_samples({"data": {**described, "prompts_sha256": "0"}, "seed": 3})


def load(folder: Path, content: dict[str, Any]) -> PaperSettings:
    from focuslens.studies.paper.settings import load_settings

    (folder / "x.yaml").write_text(json.dumps(content))
    return load_settings(folder / "x.yaml")


# Layout of the page


def test_sections_stand_in_their_order_and_long_tables_scroll(tmp_path: Path):
    long = Table("long", ("n",), tuple((i,) for i in range(40)))
    sections = [
        Section("one", "One & only", findings=("a <b>",), tables=(long,), links=(("x", "a b.csv"),)),
        Section("two", "Two", missing=("nothing <here>",)),
    ]
    html = write_sections(tmp_path / "r.html", title="T", facts={"f": "1"}, sections=sections).read_text()
    headings = [Elements(one).text for one in re.findall(r"<h2>.*?</h2>", html)]
    assert headings == ["Findings", "One & only", "Two", "How it was made"]
    assert '<a href="#one">One &amp; only</a>' in html
    assert html.count('<div class="long">') == 1
    assert 'href="a%20b.csv"' in html
    assert "nothing <here>" in Elements(html).text
    with pytest.raises(ValueError, match="key of a section is 'a b'"):
        Section("a b", "x")


def test_parts_whose_paths_differ_have_names_that_differ(tmp_path: Path):
    """Different paths give different figure names, because all figures are in one folder."""
    paths = ("a/b.json", "a-b.json", "a_b.json", "a/b/c.json", "a-b/c.json", "a/b-c.json")
    paths += ("a b.json", "a+b.json", "a-b-2.json", "a-b.jsonl", "A-B.json", "a+/b.json")
    for path in paths:
        (tmp_path / path).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / path).touch()
    folder = ReportFolder(tmp_path / "report.html", tmp_path)
    names = [folder.name(tmp_path / path) for path in paths]
    assert len({name.casefold() for name in names}) == len(paths)
    assert names[:2] == ["a--b", "a-b"]
    assert [folder.name(tmp_path / path) for path in paths] == names
    assert folder.name(tmp_path) == "run"
