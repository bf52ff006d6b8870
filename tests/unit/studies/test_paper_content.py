"""Artefacts of a reproduction report the measured values, on the questions that they name."""

from __future__ import annotations

import csv
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.evaluation import Sweep, bootstrap_mean
from focuslens.evaluation.effects_of_documents import EffectKind
from focuslens.scores.retrieval_scores import RetrievalScores
from focuslens.studies.paper import (
    anatomy,
    attribution,
    budget,
    faithfulness,
    heads,
    paper_values,
    retrieval,
    run,
    split_softmax,
    steered_scores,
    steering,
    study,
)
from focuslens.studies.paper.artefact import Artefact, load_artefact, save_artefact
from tests.support.paper_runs import opened


@pytest.fixture
def made(checkpoint: Any, paper_files: Path, tmp_path: Path) -> study.Study:
    return opened(tmp_path, paper_files, checkpoint("llama"))


def made_up_sweeps(monkeypatch: Any, right: Any) -> list[tuple[str, str]]:
    """Replace sweeps with synthetic ones in which ``right(part, setting)`` of 30 questions are correct.

    Returns:
        A list to which each call of a sweep appends its key and part.
    """
    asked: list[tuple[str, str]] = []
    names = tuple(str(i) for i in range(30))

    def sweep(self: Any, key: str, part: str, settings: Any, questions: int | None = None) -> Sweep:
        asked.append((key, part))
        evaluations: dict[str, fl.Evaluation] = {}
        for one in settings:
            correct = tuple(i < right(part, one) for i in range(30))
            evaluations[one.name] = fl.Evaluation(names, names, names, correct, bootstrap_mean([*map(float, correct)]))
        return Sweep(tuple(settings), evaluations, {})

    monkeypatch.setattr(study.Study, "sweep", sweep)
    return asked


@pytest.mark.parametrize(
    ("module", "on_validation", "on_test"),
    [
        (steering, "steering alpha=2 k=3", "steering alpha=-1 k=1"),
        (split_softmax, "split-softmax contextual tau=0.1 k=3", "split-softmax contextual tau=1000 k=1"),
    ],
)
def test_settings_are_chosen_on_validation_and_reported_on_test(
    module: Any, on_validation: str, on_test: str, made: study.Study, monkeypatch: Any
):
    best = {"validation": on_validation, "test": on_test}

    def right(part: str, one: fl.Setting) -> int:
        return 25 if one.name == best[part] else 20 if one.name == best["validation"] else 10

    asked = made_up_sweeps(monkeypatch, right)
    chosen = module.run(made).tables[0]
    assert set(asked) == {(module.KEY, "validation"), (module.KEY, "test")}
    assert [row[1] for row in chosen.rows] == ["baseline", on_validation, on_test]
    assert [row[2] for row in chosen.rows] == pytest.approx([10 / 30, 20 / 30, 25 / 30])


def test_findings_of_directions_are_of_strengths_above_zero(made: study.Study, monkeypatch: Any):
    made_up_sweeps(monkeypatch, lambda part, one: 20 if one.parameters.get("alpha") == -1 else 10)
    found = steering.run(made).findings
    assert "steering alpha=2" in found[0].text
    assert found[0].verdict == "cannot be told"
    assert "alpha=-1" in found[1].text
    assert found[1].verdict == "does not hold"


@pytest.mark.parametrize(("right", "expected"), [(15, "holds"), (14, "cannot be told"), (3, "does not hold")])
def test_random_heads_matter_little_only_if_their_interval_says_so(
    right: int, expected: str, made: study.Study, monkeypatch: Any
):
    made_up_sweeps(monkeypatch, lambda part, one: right if one.parameters.get("heads") == "random" else 15)
    assert split_softmax.run(made).findings[-1].verdict == expected


def test_a_grid_on_fewer_questions_leaves_the_cases_on_all(made: study.Study):
    fewer = replace(made.settings.split_softmax, questions=1)
    few = study.Study(replace(made.settings, split_softmax=fewer), made.out, progress=False)
    one, every = few.samples("test", 1), few.samples("test")
    assert {sample.question_id for sample in one} == {every[0].question_id}
    assert len(one) < len(every)
    _, cases, grid = split_softmax.run(few).tables
    assert [row[0] for row in cases.rows] == ["baseline", "gold", "negative"]
    assert "gold" not in [row[0] for row in grid.rows]
    sweeps = [fl.load_sweep(path) for path in few.folder("split_softmax").glob("test-*.jsonl")]
    assert sorted(len(sweep["baseline"]) for sweep in sweeps) == [len(one), len(every)]


def test_table_1_holds_the_scores_of_held_out_questions(made: study.Study):
    artefact = heads.run(made)
    ranked = fl.contextual_scores(made.model, made.samples("train"), max_new_tokens=3)
    long, gold = (
        fl.contextual_scores(made.model, made.samples("test"), case, max_new_tokens=3) for case in ("long", "gold")
    )
    table = artefact.tables[1]
    assert [row[0] for row in table.rows] == [str(head) for head in ranked.ranking()[:5]]
    assert table.columns == paper_values.TABLE_1.columns  # the same columns, for a comparison side by side
    for row, head in zip(table.rows, ranked.ranking(), strict=False):
        cells = dict(zip(table.columns, row, strict=True))
        assert cells["R long"] == pytest.approx(float(long.mean()[head]), abs=1e-7)
        assert cells["IR max long"] == pytest.approx(float(long.mean("irrelevant_max")[head]), abs=1e-7)
        assert cells["sink gold"] == pytest.approx(float(gold.mean("sink")[head]), abs=1e-7)


def test_table_3_holds_the_scores_of_steered_heads_and_their_change(made: study.Study):
    few, many = steered_scores.run(made).tables
    top = steering.steerable(made)
    for table, k in ((few, 2), (many, 3)):
        focus = [fl.FocusSteering(made.directions, 1.0, top[:k])]
        after, before = (
            fl.contextual_scores(made.model, made.samples("test"), interventions=chosen, max_new_tokens=3)
            for chosen in (focus, [])
        )
        cells = dict(zip(table.columns, table.rows[0], strict=True))
        assert cells["head"] == str(top[0])
        for column, kind in (("R", "relevant"), ("IR max", "irrelevant_max"), ("sink", "sink")):
            now, then = (float(one.mean(kind)[top[0]]) for one in (after, before))
            assert cells[column] == pytest.approx(now, abs=1e-5)
            assert cells[f"{column} change"] == pytest.approx(now - then, abs=1e-5)


def test_figure_9_compares_the_best_of_both_kinds(made: study.Study, monkeypatch: Any):
    shape, ranking = made.model.shape, made.ranking
    copies = torch.zeros(2, shape.n_layers, shape.n_heads)
    for place, head in enumerate((ranking[0], ranking[-1], ranking[-2])):
        copies[0][head] = 0.9 - 0.1 * place
    copies[1] = 0.5  # this run does not count, because its recall is too low
    scores = RetrievalScores(copies, (1.0, 0.2), 0.5, ("a", "b"), ("x", "y"))
    monkeypatch.setattr(retrieval, "retrieval_in_chunks", lambda *arguments, **settings: scores)
    artefact = retrieval.run(made)
    (table,) = artefact.tables
    assert [row[2] for row in table.rows] == [str(ranking[0]), str(ranking[-1]), str(ranking[-2])]
    assert [row[3] for row in table.rows] == pytest.approx([0.9, 0.8, 0.7])
    assert [row[4] for row in table.rows] == [1, len(ranking), len(ranking) - 1]
    text = "Contextual heads are not the retrieval heads: 1 ["
    assert artefact.findings[0].text.startswith(text)
    # All needles of these files have the same question.
    assert [one.verdict for one in artefact.findings] == ["cannot be told"] * 2
    with (made.folder("retrieval") / "retrieval_heads.csv").open(newline="") as file:
        rows = {(int(row["layer"]), int(row["head"])): float(row["copy score"]) for row in csv.DictReader(file)}
    assert rows[ranking[-1]] == pytest.approx(0.8)
    with (made.folder("retrieval") / "overlap.csv").open(newline="") as file:
        both = [row for row in csv.DictReader(file) if row["contextual"] == row["retrieval"] == "1"]
    assert [(int(row["layer"]), int(row["head"])) for row in both] == [ranking[0]]


def test_the_budget_is_that_of_the_steered_heads_on_validation_prompts(made: study.Study):
    folder, steered = made.folder("anatomy"), steering.steerable(made)[:2]
    piece = budget.piece(made, steering.steerable(made), folder)
    (table,) = piece.tables
    assert [row[0] for row in table.rows] == ["0", "1"]
    moved: dict[str, float] = {}
    for row, alpha in zip(table.rows, (0.0, 1.0), strict=True):
        focus = [fl.FocusSteering(made.directions, alpha, steered)] if alpha else []
        samples = made.samples("validation")[:2]
        means = fl.attention_budget(made.model, samples, interventions=focus, max_new_tokens=3).mean(steered)
        shares = dict(zip(table.columns[1:], row[1:], strict=True))
        assert shares == pytest.approx(means, abs=1e-5)
        assert sum(map(float, row[1:])) == pytest.approx(1, abs=1e-5)
        moved = {part: share - moved.get(part, 0.0) for part, share in means.items()}
    best = max(moved, key=lambda part: moved[part])
    assert f"to {best} ({moved[best]:+.3f} [" in piece.findings[0].text
    with (folder / "budget.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["line"] == "relevant"]
    assert [float(row["strength alpha"]) for row in rows] == [0.0, 1.0]
    assert all(float(row["low"]) <= float(row["share of attention"]) <= float(row["high"]) for row in rows)


def test_sites_and_rows_are_compared_on_scores_too(made: study.Study):
    table = anatomy.run(made).tables[-1]
    assert table.columns[-4:] == ("R", "IR", "IR max", "sink")
    rows = {row[0]: row for row in table.rows}
    k = min(2, len(steering.steerable(made)))
    chosen = steering.steerable(made)[:k]
    compared: list[tuple[str, Any, Any]] = [
        (f"rotary, response, alpha=1 k={k}", "rotary", "response"),
        (f"projection, all, alpha=1 k={k}", "projection", "all"),
    ]
    for name, site, positions in compared:
        focus = fl.FocusSteering(made.directions_at(site), 1.0, chosen, positions)
        scores = fl.contextual_scores(made.model, made.samples("validation"), interventions=[focus], max_new_tokens=3)
        expected = sum(float(scores.mean()[head]) for head in chosen) / k
        assert rows[name][-4] == pytest.approx(expected, abs=1e-5)


def test_numbers_of_heads_beyond_the_most_that_are_attributed(made: study.Study, tmp_path: Path, monkeypatch: Any):
    file = tmp_path / "tiny.yaml"
    file.write_text(file.read_text().replace("ks: [1, 3, 500]", "ks: [9, 12]"))
    monkeypatch.setattr(attribution, "_MOST", 4)
    large = study.Study(run_settings(file), tmp_path / "out", progress=False)
    assert {row[1] for row in attribution.run(large).tables[0].rows} == {4, 12}


def test_effects_are_those_of_the_answers_that_heads_attribute(made: study.Study):
    artefact = faithfulness.run(made)
    compared, gold = artefact.tables
    kinds: list[tuple[EffectKind, int]] = [("knockout", 3), ("removal", 2)]
    for by, n in kinds:
        samples = made.samples("test", n)
        assert len(samples) == n
        scores = fl.document_scores(made.model, samples, max_new_tokens=3)
        # Random responses can have other tokens than their text, whose effects are measured.
        effects = fl.document_effects(made.model, samples, by=by, responses=scores.responses).effects
        tops = [int(values.argmax()) for values in scores.of(made.ranking[:2])]
        own = [float(values[top]) for values, top in zip(effects, tops, strict=True)]
        others = [(float(values.sum()) - one) / 2 for values, one in zip(effects, own, strict=True)]
        rows = {
            (row[1], row[3]): dict(zip(compared.columns, row, strict=True)) for row in compared.rows if row[0] == by
        }
        cells = rows["contextual", "all"]
        assert (cells["k"], cells["samples"]) == (2, n)
        assert cells["attributed"] == pytest.approx(sum(own) / n, abs=1e-4)
        assert cells["others"] == pytest.approx(sum(others) / n, abs=1e-4)
        first = [int(values.argmax()) == s.gold_index for values, s in zip(effects, samples, strict=True)]
        (row,) = [row for row in gold.rows if row[:2] == (by, "all")]
        assert row[3] == pytest.approx(sum(first) / n)
    assert [finding.text.split()[0] for finding in artefact.findings if finding.verdict] == ["Blocking", "Removing"]
    assert "of 2 samples" in artefact.findings[-1].text


def run_settings(file: Path) -> Any:
    from focuslens.studies.paper.settings import load_settings

    return load_settings(file)


def test_a_missing_haystack_is_found_before_the_work(made: study.Study, tmp_path: Path):
    empty = tmp_path / "empty"
    empty.mkdir()
    lacking = study.Study(made.settings, made.out, haystack=empty, progress=False)
    said: list[str] = []
    with pytest.raises(FileNotFoundError, match=r"needles\.jsonl.*--haystack"):
        run.reproduce(lacking, say=said.append)
    assert said == []


def test_a_killed_artefact_is_not_taken_for_the_one_that_was_there(made: study.Study, monkeypatch: Any):
    run.reproduce(made, ["heads"])
    assert (made.folder("heads") / "artefact.json").is_file()
    other = study.Study(replace(made.settings, seed=1), made.out, progress=False)

    def killed(one: Any) -> Any:
        (one.folder("heads") / "head_map.png").write_bytes(b"of other settings")
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(heads, "run", killed)
        with pytest.raises(KeyboardInterrupt):
            run.reproduce(other, ["heads"])
    said: list[str] = []
    run.reproduce(made, ["heads"], say=said.append)
    assert said[0] == "heads ..."
    assert (made.folder("heads") / "head_map.png").stat().st_size > 1000


def test_directions_never_stand_beside_a_description_of_others(made: study.Study, monkeypatch: Any):
    first = made.directions
    changed = replace(made.settings, directions=replace(made.settings.directions, heads=2))
    other = study.Study(changed, made.out, progress=False)

    def killed(path: Path, content: Any) -> None:
        raise KeyboardInterrupt

    assert other.ranking  # The ranking is written before the files that follow from it.
    with monkeypatch.context() as patched:
        patched.setattr(study, "write_json", killed)
        with pytest.raises(KeyboardInterrupt):
            study.Study.directions_at(other, "rotary")
    again = study.Study(made.settings, made.out, progress=False)
    assert again.directions.digest == first.digest


def test_results_without_a_choice_of_distractors_are_those_of_random_ones(made: study.Study):
    header = made.header("heads", *heads.SECTIONS)
    assert header["settings"]["data"]["distractors"] == "random"
    old = json.loads(json.dumps(header))
    del old["settings"]["data"]["distractors"]
    folder = made.out / "old"
    save_artefact(folder, Artefact("heads", "title", "Figure 2"), old)
    assert load_artefact(folder, header) == Artefact("heads", "title", "Figure 2")
    assert study._short(old) == study._short(header)
    other = {**header, "settings": {**header["settings"], "data": {**old["settings"]["data"], "distractors": "bm25"}}}
    assert load_artefact(folder, other) is None
    assert study._short(old) != study._short(other)


def test_other_essays_make_other_results(made: study.Study, paper_files: Path, tmp_path: Path):
    before = made.header("retrieval", *retrieval.SECTIONS)
    copy = tmp_path / "essays"
    copy.mkdir()
    for path in paper_files.glob("*"):
        (copy / path.name).write_bytes(path.read_bytes())
    (copy / "essay.txt").write_text("Another. " * 100)
    moved = study.Study(made.settings, made.out, haystack=copy, progress=False)
    assert moved.header("retrieval", *retrieval.SECTIONS) != before
    assert moved.header("heads", *heads.SECTIONS) == made.header("heads", *heads.SECTIONS)


def test_other_directions_in_the_same_folder_make_other_results(made: study.Study, tmp_path: Path):
    folder = made.directions.save(tmp_path / "given")
    settings = replace(made.settings, directions=replace(made.settings.directions, source=str(folder)))
    before = study.Study(settings, made.out, progress=False).header("steering", *steering.SECTIONS)
    given = made.directions
    fl.FocusDirections(given.heads, -given.query, None, given.site).save(folder)
    after = study.Study(settings, made.out, progress=False).header("steering", *steering.SECTIONS)
    assert before != after
    assert json.loads(json.dumps(before))["directions_sha256"] == given.digest


def test_intervals_are_over_questions_and_leave_out_what_is_missing(made: study.Study, monkeypatch: Any):
    copies = [replace(one, question_id=f"q{i // 2}") for i, one in enumerate(made.samples("test"))]
    monkeypatch.setattr(study.Study, "samples", lambda self, part: copies)
    values = torch.tensor([0.1, 0.2, float("nan"), 0.9])
    found = made.interval("test", values, [one.id for one in copies])
    assert found == bootstrap_mean(values[[0, 1, 3]].tolist(), groups=["q0", "q0", "q1"], seed=made.settings.seed)
    assert found != bootstrap_mean(values[[0, 1, 3]].tolist(), seed=made.settings.seed)
    assert made.interval("test", values[[2]], [copies[2].id]) is None


def test_heads_are_shown_beside_the_score_of_even_attention(made: study.Study):
    artefact = heads.run(made)
    train, test = made.samples("train"), made.samples("test")
    ranked, long = (fl.contextual_scores(made.model, part, max_new_tokens=3) for part in (train, test))
    counts, _, every, chance = artefact.tables
    for row in counts.rows:
        for count, by in zip(row[-2:], ("excess", "document_excess"), strict=True):
            assert count == int((ranked.mean(by=by) > float(row[0])).sum())  # pyright: ignore[reportArgumentType]
    assert every.columns[-3:] == ("chance", "excess", "document_excess")
    assert [row[0] for row in chance.rows] == [str(head) for head in ranked.ranking()[:5]]
    for row, head in zip(chance.rows, ranked.ranking(), strict=False):
        cells = dict(zip(chance.columns, row, strict=True))
        assert cells["R"] == pytest.approx(float(long.mean()[head]), abs=1e-6)
        assert cells["chance"] == pytest.approx(float(long.mean(by="chance")[head]), abs=1e-6)
        excess = long.mean(by="excess")[head]
        assert cells["excess"] == pytest.approx(float(excess), abs=1e-6)
        assert float(cells["excess low"]) <= float(excess) + 1e-6
        assert float(excess) <= float(cells["excess high"]) + 1e-6
    means, excess = ranked.mean(), ranked.mean(by="excess")
    below = int(((means > 0.1) & (excess <= 0)).sum())
    assert f"relevant score above 0.1, {below} are at or below chance" in artefact.findings[-1].text
    assert artefact.findings[-1].verdict == ""
    with (made.folder("heads") / "excess_map.csv").open(newline="") as file:
        rows = {(int(row["layer"]), int(row["head"])): float(row["excess"]) for row in csv.DictReader(file)}
    assert rows[ranked.ranking()[0]] == pytest.approx(float(excess[ranked.ranking()[0]]), abs=1e-6)
    stored = json.loads((made.out / "ranking.json").read_text())
    assert stored["chance"] == pytest.approx(ranked.even_share(), abs=1e-6)
    assert fl.load_ranking(made.out / "ranking.json") == ranked.ranking()


def test_documents_are_also_ranked_by_excess_and_by_even_attention(made: study.Study):
    raw, by_excess = attribution.run(made).tables
    scores = fl.document_scores(made.model, made.samples("test"), max_new_tokens=3)
    assert [row[:4] for row in by_excess.rows[: len(raw.rows)]] == [row[:4] for row in raw.rows]
    (first,) = [row for row in by_excess.rows if row[:3] == ("all", len(made.ranking), "all")]
    assert first[4] == pytest.approx(scores.attribution(made.ranking, by="excess").accuracy.mean)
    longest = [
        max(enumerate(made.model.encode(sample.prompt()).spans["document"]), key=lambda one: one[1][1] - one[1][0])[0]
        == sample.gold_index
        for sample in made.samples("test")
    ]
    (even,) = [row for row in by_excess.rows if row[0] == "even attention" and row[2] == "all"]
    assert float(even[4]) <= sum(longest) / len(longest) + 1e-9  # ties count against the gold document
