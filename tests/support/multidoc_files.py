"""Synthetic lost-in-the-middle files of each kind."""

from __future__ import annotations

import gzip
import json
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from focuslens.prompts.sample import MultiDocSample

Json = dict[str, Any]


def write(path: Path, records: Iterable[Json | str]) -> Path:
    lines = [record if isinstance(record, str) else json.dumps(record) for record in records]
    text = "".join(f"{line}\n" for line in lines).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def retrieval_record(i: int, passages: int = 9) -> Json:
    """A retrieval record in which every third passage contains the answer."""
    ctxs = [
        {
            "id": str(p),
            "title": f"T{i}.{p}",
            "text": f"text {i}.{p}",
            "score": "1.0",
            "hasanswer": p % 3 == 1,
        }
        for p in range(passages)
    ]
    gold = {"title": f"G{i}", "long_answer": "long", "chunked_long_answer": f"gold {i}", "short_answers": []}
    return {"question": f"question {i}", "answers": [f"answer {i}"], "ctxs": ctxs, "nq_annotated_gold": gold}


def placed_record(i: int, total: int = 6, gold: int = 2) -> Json:
    ctxs = [{"title": f"T{i}.{p}", "text": f"text {i}.{p}", "hasanswer": False, "isgold": False} for p in range(total)]
    ctxs[gold] = {"title": f"G{i}", "text": f"gold {i}", "hasanswer": True, "isgold": True}
    return {"question": f"question {i}", "answers": [f"answer {i}"], "ctxs": ctxs}


def oracle_record(i: int, text: str | None = None, answers: tuple[str, ...] | None = None) -> Json:
    gold = {"title": f"G{i}", "text": text or f"word{i}x gold", "hasanswer": True, "isgold": True}
    return {"question": f"question {i}", "answers": list(answers or (f"word{i}x",)), "ctxs": [gold]}


MAKERS: dict[str, Callable[[int], Json]] = {
    "retrieval": retrieval_record,
    "placed": placed_record,
    "oracle": oracle_record,
}


def titles(sample: MultiDocSample) -> list[str]:
    return [document.title for document in sample.documents]
