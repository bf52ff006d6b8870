"""The comparison of sites: settings chosen on validation and reported on test, paired tests, and scores."""

from __future__ import annotations

import csv
import json
from math import comb
from pathlib import Path

import pytest

import focuslens as fl
from focuslens.evaluation import bootstrap_mean

compare_sites = pytest.importorskip("compare_sites", reason="the experiments are not here")

ALPHAS, KS = (1.0, 6.0), (1, 3)


def rows_of(path: Path) -> list[dict[str, str]]:
    with path.open(newline="") as file:
        return list(csv.DictReader(file))


def records_of(folder: Path, part: str) -> dict[str, list[bool]]:
    """Correctness of each sample by setting, from the sweep's result file."""
    (path,) = folder.glob(f"sites/{part}-*.jsonl")
    _, *lines = map(json.loads, path.read_text().splitlines())
    right: dict[str, list[bool]] = {}
    for line in sorted(lines, key=lambda line: line["id"]):
        for name, result in line["results"].items():
            right.setdefault(name, []).append(result["correct"])
    return right


def two_sided(a: int, b: int) -> float:
    return min(1.0, 2 * sum(comb(a + b, i) for i in range(min(a, b) + 1)) / 2 ** (a + b))


@pytest.mark.slow
def test_it_chooses_on_validation_and_reports_on_test(tmp_path, capsys):
    out = tmp_path / "out"
    options = ["--questions", "6", "--documents", "4", "--heads", "3", "--epochs", "1", "--top", "2", "--seed", "5"]
    options += ["--alphas", *map(str, ALPHAS), "--ks", *map(str, KS), "--out", str(out)]
    compare_sites.main(options)
    text = (out / "sites.md").read_text()
    assert capsys.readouterr().out.strip().endswith(text.strip())
    rows, validation, test = rows_of(out / "sites.csv"), records_of(out, "validation"), records_of(out, "test")
    assert len(validation) == 1 + 2 * len(ALPHAS) * len(KS)
    assert len(test) == 3
    chosen: dict[str, dict[str, str]] = {}
    for row in rows:
        site, alpha, k = row["site"], float(row["alpha"]), int(row["k"])
        name = "baseline" if site == "none" else f"{site} steering alpha={alpha:g} k={k}"
        right = (validation if row["part"] == "validation" else test)[name]
        assert float(row["em"]) == pytest.approx(sum(right) / 6)
        if row["part"] == "test" and site != "none":
            chosen[site] = row
    for site, row in chosen.items():
        tried = [one for one in rows if one["part"] == "validation" and one["site"] == site]
        # Ties must go to the milder setting: the smaller strength, then fewer heads.
        best = max(tried, key=lambda one: (float(one["em"]), -float(one["alpha"]), -int(one["k"])))
        assert (row["alpha"], row["k"]) == (best["alpha"], best["k"])
        assert best["chosen"] == "1"
    right = [test[f"{site} steering alpha={float(row['alpha']):g} k={row['k']}"] for site, row in chosen.items()]
    only = [sum(a and not b for a, b in zip(*pair, strict=True)) for pair in (right, right[::-1])]
    found = json.loads((out / "sites.json").read_text())
    between = found["projection less rotary"]
    assert list(chosen) == ["rotary", "projection"]
    assert between["difference"]["mean"] == pytest.approx((only[1] - only[0]) / 6)
    assert between["mcnemar"]["p_value"] == pytest.approx(two_sided(*only))
    model = fl.FocusModel.demo(device="cpu")
    every = fl.load_synthetic(30, num_documents=4, gold_positions=[0, 1, 2, 3], split="test", seed=5)
    samples = [every[4 * i + i % 4] for i in range(6)]
    plain = fl.contextual_scores(model, samples, max_new_tokens=26)
    for site, row in chosen.items():
        directions = fl.FocusDirections.load(out / "directions" / site)
        assert directions.digest == found["directions_sha256"][site]
        focus = fl.FocusSteering(directions, float(row["alpha"]), directions.heads[: int(row["k"])])
        steered = fl.contextual_scores(model, samples, interventions=[focus], max_new_tokens=26)
        shown = [one for one in rows_of(out / "scores.csv") if one["site"] == site and one["kind"] == "relevant"]
        assert [one["head"] for one in shown] == [str(head) for head in directions.heads[:2]]
        for one, (layer, head) in zip(shown, directions.heads, strict=False):
            change = (steered.relevant - plain.relevant)[:, layer, head]
            assert float(one["change"]) == pytest.approx(float(change[~change.isnan()].mean()), abs=1e-5)
            assert f"{float(one['change']):+.3f} [" in text


def test_a_strength_that_turns_attention_away_is_refused(capsys):
    with pytest.raises(SystemExit):
        compare_sites.parse(["--alphas", "-1"])
    assert "a negative one turns attention away" in capsys.readouterr().err


def test_the_sites_are_compared_on_the_same_samples():
    def evaluated(right: list[bool]) -> fl.Evaluation:
        names = tuple(f"s{i}" for i in range(len(right)))
        return fl.Evaluation(names, names, names, tuple(right), bootstrap_mean(right))

    settings = {site: fl.Setting(f"{site} best", parameters={"alpha": 1, "k": 1}) for site in ("rotary", "projection")}
    rotary = [True, True, False, False, False, False, False, True]
    projection = [True, False, True, True, True, True, True, True]  # one lost, five gained
    runs = {"rotary best": evaluated(rotary), "projection best": evaluated(projection)}
    sweep = fl.Sweep(tuple(settings.values()), runs, {})
    gain, test = compare_sites.Comparison(sweep, sweep, settings, []).between
    assert gain.mean == pytest.approx(4 / 8)
    assert (test.only_first, test.only_second) == (5, 1)  # the projection site is first
    assert test.p_value == pytest.approx(2 * (1 + 6) / 2**6)
