"""The page of real models, which shows the published results."""

from __future__ import annotations

import gzip
import json

import numpy as np
import real_models_page
from real_models_page import PAGE, RESULTS, ROOT, agreement, chosen_setting, controls, filled, sweeps, tables


def test_the_page_has_the_tables_of_the_published_results():
    page = PAGE.read_text()
    assert filled(page, tables()) == page
    assert set(real_models_page.re.findall(r"<!-- table: ([a-z0-9-]+) -->", page)) == set(tables())


def test_the_readme_has_the_figures_of_the_published_results():
    folder = RESULTS / real_models_page.FIRST
    cases = next(sweep for sweep in sweeps(folder, "test") if "gold" in sweep.evaluations)
    test, setting = sweeps(folder, "test")[0], chosen_setting(folder)
    assert setting is not None
    best, baseline = test[setting.name], test["baseline"]
    random = next(other for kind, other in controls(test, setting, setting.parameters["k"]) if kind == "random heads")
    counts = best.compare(baseline)
    for said in (
        f"{cases['baseline'].em.mean:.3f} with all documents, and {cases['gold'].em.mean:.3f} with the relevant "
        f"document alone ({len(cases['gold'])} questions)",
        f"rises from {baseline.em.mean:.3f} to {best.em.mean:.3f} on {len(best)} test questions "
        f"({counts.only_first} answers gained, {counts.only_second} lost, p = {counts.p_value:.1e}), and random heads "
        f"give {test[random.name].em.mean:.3f}.",
    ):
        assert said in " ".join((ROOT / "README.md").read_text().split())


def test_published_results_hold_no_questions_and_no_responses():
    for path in RESULTS.glob("*/*.jsonl.gz"):
        _, *records = gzip.decompress(path.read_bytes()).decode().splitlines()
        for record in map(json.loads, records):
            assert all(result["response"] == "" for result in record["results"].values())
    for path in RESULTS.glob("*/*.json"):
        assert "who " not in path.read_text()


def test_agreement_of_rankings():
    first = np.array([[4.0, 3.0, 2.0, 1.0] * 10])
    first = first + np.arange(40) / 1000
    assert agreement(first, first) == (1.0, 1.0, 1.0)
    correlation, top10, top20 = agreement(first, -first)
    assert correlation == -1.0
    assert (top10, top20) == (0.0, 0.0)
