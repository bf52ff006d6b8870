"""The page of a reproduction, and the files with its pictures and numbers."""

from __future__ import annotations

import csv
import re
from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np

from focuslens.evaluation import Interval
from focuslens.studies.paper.artefact import Artefact, Finding, keep_curves, keep_heads, save_artefact
from focuslens.studies.paper.page import write_index
from focuslens.viz import Curve, Table, head_map, sweep_curves


def read(path: Path) -> list[list[str]]:
    with path.open(newline="") as file:
        return list(csv.reader(file))


def test_a_figures_numbers_lie_beside_it(tmp_path: Path):
    open_before = plt.get_fignums()
    lines = [Curve("a", (4.0, 1.0), (0.25, 1 / 3), (0.2, 0.3), (0.3, 0.4))]
    levels = {"none": Interval(0.5, 0.4, 0.6, 0.95)}
    axes = sweep_curves(lines, levels, x_label="heads", y_label="exact match")
    keep_curves(axes, tmp_path / "lines.png", lines, levels)
    assert read(tmp_path / "lines.csv") == [
        ["line", "heads", "exact match", "low", "high"],
        ["none", "", "0.5", "0.4", "0.6"],
        ["a", "4.0", "0.25", "0.2", "0.3"],
        ["a", "1.0", "0.3333333333333333", "0.3", "0.4"],
    ]
    scores = np.array([[0.5, 0.25], [0.0, 0.125]])
    keep_heads(head_map(scores), tmp_path / "map.png", {"score": scores, "best": (scores > 0.2).astype(int)})
    assert read(tmp_path / "map.csv") == [
        ["layer", "head", "score", "best"],
        ["0", "0", "0.5", "1"],
        ["0", "1", "0.25", "1"],
        ["1", "0", "0.0", "0"],
        ["1", "1", "0.125", "0"],
    ]
    assert {path.name for path in tmp_path.iterdir()} == {"lines.png", "lines.csv", "map.png", "map.csv"}
    assert plt.get_fignums() == open_before


def test_the_page_begins_with_the_papers_findings(tmp_path: Path):
    scores = np.ones((2, 2))
    keep_heads(head_map(scores), tmp_path / "a" / "map.png", {"score": scores})
    long = Table("many", ("x",), tuple((i,) for i in range(60)))
    first = Artefact(
        "a",
        "Heads & more",
        "Figure 2",
        (Finding("one < two", "holds"), Finding("three", "does not hold"), Finding("only said")),
        (("A map.", "map.png"),),
        (Table("few", ("x", "p"), ((1, 0.00001),)), long),
        (Table("theirs", ("x",), ((1,),)),),
    )
    second = Artefact("b", "Others", "beyond the paper", (Finding("four", "cannot be told"), Finding("five", "holds")))
    third = Artefact("c", "Nothing judged", "beyond the paper", (Finding("six"),))
    for one in (first, second, third):
        save_artefact(tmp_path / one.key, one, {})
    write_index(tmp_path / "index.html", "t", {"seed": "1"}, [first, second, third])
    page = (tmp_path / "index.html").read_text()
    summary, *sections = page.split("<section")[1:]
    counts = re.findall(r'<span class="verdict \w+">([a-z ]+)</span> (\d)', summary)
    assert counts == [("holds", "2"), ("does not hold", "1"), ("cannot be told", "1")]
    assert re.findall(r'<h3><a href="(.*?)">(.*?)</a>', summary) == [("#a", "Heads &amp; more"), ("#b", "Others")]
    assert "one &lt; two" in summary
    assert "only said" not in summary
    assert "only said" in sections[0]
    assert "six" in sections[2]
    # Every linked file exists.
    links = [link for link in re.findall(r'href="(.*?)"', page) if not link.startswith("#")]
    assert links == ["a/map.csv", "a/table_1.csv", "a/table_2.csv"]
    assert all((tmp_path / link).is_file() for link in links)
    assert page.count('<div class="long">') == 1
    assert '<td class="number">1e-05</td>' in page
    assert page.count('class="reported"') == 1
