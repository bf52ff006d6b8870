"""The documentation's table of families with attention of their own. ``FOCUSLENS_WRITE_TABLES=1`` writes it anew."""

from __future__ import annotations

import os
from itertools import groupby

import pytest

from tests.support.families import FAMILIES, generation_gap, logit_gap, open_family, score_gap, split_gap, steering_gap
from tests.support.paths import ROOT

PAGE = ROOT / "docs" / "architectures.md"
START, END = "<!-- table of families: written by a test -->\n", "<!-- end of the table of families -->\n"
HEADER = ("Family", "heads", "loads", "fused", "scores", "split-softmax", "steering")


def shown(kinds: tuple[str, ...]) -> str:
    return "; ".join(
        f"{kind}" if n == 1 else f"{n} x {kind}" for kind, n in ((kind, len(list(of))) for kind, of in groupby(kinds))
    )


def cells_of(name: str, directory: object) -> tuple[str, ...]:
    family = open_family(name, directory)  # type: ignore[arg-type]
    assert generation_gap(family) == 0
    steering = max(steering_gap(family, site) for site in ("rotary", "projection"))
    gaps = {"loads": logit_gap(family), "scores": score_gap(family), "split": split_gap(family), "steering": steering}
    limits = {"loads": 1e-4, "scores": 1e-4, "split": 1e-3, "steering": 1e-3}
    assert {key: gap for key, gap in gaps.items() if gap > limits[key]} == {}
    loads, *others = (f"yes, {gap:.0e}" for gap in gaps.values())
    return name, shown(FAMILIES[name]), loads, "no" if family.model.slow_attention else "yes", *others


@pytest.mark.slow
def test_the_documentation_lists_what_works_on_each_family(tmp_path_factory: pytest.TempPathFactory) -> None:
    """The numbers of the page are those of the machine that wrote it. Other machines round in another way."""
    rows = [cells_of(name, tmp_path_factory.mktemp("family")) for name in FAMILIES]
    head, rest = PAGE.read_text().split(START)
    old, tail = rest.split(END)
    lines = [f"| {' | '.join(cells)} |" for cells in (HEADER, ["---"] * len(HEADER), *rows)]
    if os.environ.get("FOCUSLENS_WRITE_TABLES"):
        PAGE.write_text(head + START + "\n" + "\n".join(lines) + "\n\n" + END + tail)
        return

    def without_numbers(row: str) -> list[str]:
        return [cell.split(", 0")[0].split(", ")[0] if "yes" in cell else cell for cell in row.split(" | ")]

    listed = [row for row in old.splitlines() if row.startswith("|")]
    assert [without_numbers(row.strip("| ")) for row in listed] == [without_numbers(row.strip("| ")) for row in lines]
