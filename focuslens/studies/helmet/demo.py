"""HELMET task for the embedded demo model, with questions from the synthetic corpus that the model was trained on."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from focuslens.data.selection import SampleSelection
from focuslens.data.synthetic import Split, build_tokenizer, spread_positions
from focuslens.prompts.sample import MultiDocSample
from focuslens.studies.helmet.recall import Recall, Rows, write_sets
from focuslens.studies.helmet.tasks import NEEDLE_QA

__all__ = ["DEMO_LENGTHS", "make_demo"]

DEMO_LENGTHS = (768, 1400)
"""Maximum lengths of a prompt and its response together, in tokens. They leave room for about 10 and 20 documents.

A prompt in the demo model's training data has at most 20 documents.
"""

_NEW_TOKENS = 26
_FEWEST, _MOST = 2, 20
_RESERVE = 220
"""Tokens reserved for HELMET's wording and the question.

The number is high because the demo tokenizer splits most words of HELMET's wording into several tokens.
"""


def make_demo(
    out: str | Path, lengths: Sequence[int] = DEMO_LENGTHS, *, samples: int = 100, split: Split = "test", seed: int = 42
) -> Recall:
    """Write questions about facts in documents, and a HELMET configuration that runs them.

    Each sample is a question from the synthetic corpus. The samples cycle through five depths of the gold document.
    Each prompt has as many documents as fit into the length, up to 20. HELMET's loader for RULER (``ruler_qa_1``) reads
    the samples and adds instructions. Prompts end with the words after which the demo model generates an answer.

    Args:
        out: Folder for ``data/ruler/qa_1``, ``configs/demo.yaml`` and ``demo.json``.
        lengths: Maximum lengths of a prompt and its response together, in tokens.
        samples: Number of samples per length.
        split: Split of the corpus.
        seed: Seed of the corpus.

    Raises:
        ValueError: If a length has no room for two documents.
    """
    tokenizer = build_tokenizer()
    sets: list[tuple[str, str, int, int, Rows]] = []
    for length in lengths:
        rows = _fitting(tokenizer, length, samples, split, seed)
        sets.append((NEEDLE_QA.dataset, f"data/ruler/qa_1/validation_{length}.jsonl", length, _NEW_TOKENS, rows))
    origin = {"corpus": "synthetic", "split": split, "samples": samples, "seed": seed, "lengths": list(lengths)}
    return write_sets(tokenizer, Path(out), "demo", sets, origin, shots=0)


def _fitting(tokenizer: Any, length: int, samples: int, split: Split, seed: int) -> Rows:
    """Samples with as many documents as fit into the length."""
    room = length - _NEW_TOKENS - _RESERVE

    def rows_of(documents: int, n: int) -> tuple[Rows, int]:
        rows = [_row(index, sample) for index, sample in enumerate(_questions(n, documents, split, seed))]
        return rows, max(len(tokenizer(row["context"])["input_ids"]) for row in rows)

    document_tokens = rows_of(_FEWEST, 5)[1] / _FEWEST  # estimated tokens per document
    for documents in range(min(_MOST, max(_FEWEST, int(1.2 * room / document_tokens))), _FEWEST - 1, -1):
        if rows_of(documents, 5)[1] <= room:
            rows, most = rows_of(documents, samples)
            if most <= room:
                return rows
    raise ValueError(f"length {length} has room for {room} tokens of documents, and {_FEWEST} documents have more")


def _questions(samples: int, documents: int, split: Split, seed: int) -> Sequence[MultiDocSample]:
    positions = spread_positions(documents)
    return SampleSelection(
        num_documents=documents, gold_positions=positions, part=split, questions=samples, seed=seed
    ).open()


def _row(index: int, sample: MultiDocSample) -> dict[str, Any]:
    """Sample for HELMET's loader. The documents have the same format as in the model's training data."""
    _, documents, _ = str(sample.prompt("long")).split("\n\n")
    depth = 0.0 if sample.gold_index is None else sample.gold_index / max(1, len(sample.documents) - 1)
    return {
        "index": index,
        "id": sample.question_id,  # two people can have the same name, so the text of a question is not unique
        "context": documents,
        "question": sample.question,
        "answer": list(sample.answers),
        "depth": depth,
    }
