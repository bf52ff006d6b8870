"""The page of real models, which shows the published results."""

from __future__ import annotations

import gzip
import json

import numpy as np
import real_models_page
from real_models_page import PAGE, RESULTS, agreement, filled, tables


def test_the_page_has_the_tables_of_the_published_results():
    page = PAGE.read_text()
    assert filled(page) == page
    assert set(real_models_page.re.findall(r"<!-- table: ([a-z0-9-]+) -->", page)) == set(tables())


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
