"""Samples and prompt templates. Samples are drawn with the global random state."""

import json
import random
from typing import Any

from utils import holds


class Rows:
    """Rows that are copied on each access."""

    def __init__(self, rows: list[dict[str, Any]]) -> None:
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def __getitem__(self, place: int) -> dict[str, Any]:
        return dict(self._rows[place])


def load_data(args: Any, dataset: str, path: str = "", demo_path: str = "") -> dict[str, Any]:
    if "nlu" in dataset:
        raise RuntimeError("Dataset scripts are no longer supported")
    with open(path) as file:
        rows = [json.loads(line) for line in file]
    if args.max_test_samples is not None:
        rows = random.sample(rows, min(args.max_test_samples, len(rows)))

    def post_process(output: dict[str, Any], row: dict[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
        said = output["output"]
        name = "ruler_recall" if "niah" in dataset else "substring_exact_match"
        return {name: holds(said, row["answer"]), "letters": len(said)}, {"parsed_output": said.strip()}

    asked = "Given:\n{context}\nThe key is {question}."
    return {
        "data": Rows(rows),
        "user_template": asked,
        "system_template": "Found:",
        "prompt_template": asked + "\nFound:",
        "post_process": post_process,
    }
