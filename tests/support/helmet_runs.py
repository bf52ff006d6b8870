"""Small data and run configurations for ``helmet_stand_in``, a stand-in for a HELMET checkout."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from focuslens.studies.helmet.checkout import Checkout, open_checkout
from focuslens.studies.helmet.plan import Entry, read_plan

__all__ = ["STAND_IN", "entries", "load", "write_data"]

STAND_IN = Path(__file__).parent / "helmet_stand_in"


def write_data(root: Path) -> Path:
    """Write eight samples per task. Every question has two contexts, and the second context is longer."""
    (root / "data").mkdir(parents=True)
    for name, answer in (("pairs", "castle"), ("needles", "queen")):
        rows = [
            {
                "question": f"garden {number // 2}",
                "context": " ".join(["The river runs to the harbour."] * (4 + 3 * (number % 2)))
                + f" {answer} {number}",
                "answer": [answer, str(number)],
            }
            for number in range(8)
        ]
        (root / "data" / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return root


def entries(
    root: Path, *options: str, config: str = "configs/pair.yaml", **chosen: Any
) -> tuple[Checkout, list[Entry]]:
    """The stand-in checkout, and the entries of its run plan for one configuration."""
    checkout = open_checkout(STAND_IN)
    named = ["--model_name_or_path", "tiny/model", "--output_dir", "out", *options]
    return checkout, list(read_plan(checkout, [config], named, root=root, **chosen).entries)


def load(checkout: Checkout, entry: Entry) -> dict[str, Any]:
    """Data that the checkout loads for an entry."""
    args = entry.args
    return checkout.load(args, entry.dataset, entry.file(args.test_files), entry.file(args.demo_files))
