"""Tables of ``docs/focus.md`` out of the published results in ``experiments/focus``.

python experiments/focus_page.py          # print the tables
python experiments/focus_page.py --write  # put them into the page, between its comments
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from real_models_page import filled, markdown

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "experiments" / "focus"
PAGE = ROOT / "docs" / "focus.md"

CONDITIONS = {
    "demo-focus": "Embedded model, 20 documents",
    "smollm2-135m-instruct": "SmolLM2-135M-Instruct, 10 documents, BM25",
    "smollm2-135m-instruct-20": "SmolLM2-135M-Instruct, 20 documents, BM25",
    "gemma-3-270m": "Gemma 3 270M (base), 10 documents, BM25",
}
"""Title of each settings file of ``focuslens focus`` that was run."""


def main(argv: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", action="store_true", help="put the tables into docs/focus.md")
    args = parser.parse_args(argv)
    if args.write:
        PAGE.write_text(filled(PAGE.read_text(), tables()))
    else:
        for name, text in tables().items():
            print(f"## {name}\n\n{text}\n")


def tables() -> dict[str, str]:
    """Markdown by name: the methods, the choosers and the findings of each run."""
    found = {
        name: json.loads((RESULTS / name / "focus.json").read_text())
        for name in CONDITIONS
        if (RESULTS / name / "focus.json").is_file()
    }
    texts: dict[str, str] = {}
    for name, content in found.items():
        artefact: Mapping[str, Any] = content
        methods, choosers = artefact["tables"][:2]
        texts[f"{name}-methods"] = _methods(methods)
        texts[f"{name}-choosers"] = markdown(
            choosers["columns"], [[_number(cell) for cell in row] for row in choosers["rows"]]
        )
        texts[f"{name}-findings"] = "\n".join(
            f"- *{verdict}*: {text}" if verdict else f"- {text}" for text, verdict in artefact["findings"]
        )
    return texts


def _methods(table: Mapping[str, Any]) -> str:
    place = {name: i for i, name in enumerate(table["columns"])}

    def of(row: Sequence[Any], name: str) -> Any:
        return row[place[name]]

    rows = [
        (
            str(of(row, "method")),
            str(of(row, "setting")),
            f"{of(row, 'exact match'):.3f} [{of(row, 'low'):.3f}, {of(row, 'high'):.3f}]",
            f"{of(row, 'gained')}, {of(row, 'lost')}",
            _p(of(row, "p")),
            str(of(row, "extra work")),
            _number(of(row, "choice")),
            _number(of(row, "seconds")),
        )
        for row in table["rows"]
    ]
    columns = ("method", "setting", "exact match", "gained, lost", "p", "extra work", "choice", "seconds")
    return markdown(columns, rows)


def _p(value: Any) -> str:
    return value if isinstance(value, str) else f"{value:.2g}"


def _number(value: Any) -> str:
    return f"{value:.3f}" if isinstance(value, float) else str(value)


if __name__ == "__main__":
    main()
