"""The demo from end to end on the embedded model, with few samples."""

from __future__ import annotations

import json
import re

import pytest

from focuslens.cli import _parser

FILES = ("results.json", "report.html", "head_map.png", "split_softmax.png", "steering.png", "losses.png")


@pytest.fixture(scope="module")
def demo(tmp_path_factory):
    """The directory of one small demo run."""
    from focuslens.commands.demo import DemoSettings, run

    out = tmp_path_factory.mktemp("demo")
    settings = DemoSettings(
        scored=3, trained=2, chosen=2, tested=3, taus=(0.1, 1000), ks=(1, 2), alphas=(-0.5, 0.5), steered=(2,),
        trained_heads=2, epochs=2, max_new_tokens=16,
    )  # fmt: skip
    run(_parser().parse_args(["demo", "--out", str(out)]), settings)
    return out


def test_the_demo_writes_results_figures_directions_and_a_report(demo):
    for name in FILES:
        assert (demo / name).stat().st_size > 1000
    assert (demo / "directions" / "directions.json").exists()


def test_results_name_what_made_them_and_agree_with_the_records(demo):
    results = json.loads((demo / "results.json").read_text())
    assert {"model", "data", "seed", "versions", "demo"} <= results.keys()
    lines = [json.loads(line) for line in (demo / "split_softmax.jsonl").read_text().splitlines()[1:]]
    assert len(lines) == 3
    for row in results["split_softmax"]:
        correct = [line["results"][row["name"]]["correct"] for line in lines]
        assert row["em"] == pytest.approx(sum(correct) / len(correct))
        assert row["em_low"] <= row["em"] <= row["em_high"]
    assert results["chosen_on_validation"] in {row["name"] for row in results["steering"]}


def test_the_report_loads_nothing_from_the_network_and_holds_a_circuitsvis_view(demo):
    page = (demo / "report.html").read_text()
    assert not re.search(r"""(?:src|href)\s*=\s*["']?(?:https?:)?//""", page)
    assert "CircuitsVis" in page or "circuitsvis" in page
    assert "data:image/png;base64," in page
