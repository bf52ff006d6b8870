"""A set for the embedded model, which knows only its own corpus: questions about facts, in a form of HELMET's."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from focuslens.data.selection import SampleSelection
from focuslens.data.synthetic import Split, build_tokenizer, spread_positions
from focuslens.prompts.prompt import MultiDocSample
from focuslens.studies.helmet.recall import Recall, Rows, write_sets
from focuslens.studies.helmet.tasks import NEEDLE_QA

__all__ = ["DEMO_LENGTHS", "make_demo"]

DEMO_LENGTHS = (768, 1400)
"""Tokens of prompt and response: about ten documents, and the twenty that the model was trained on at most."""

_NEW_TOKENS = 26
_FEWEST, _MOST = 2, 20
_RESERVE = 220
"""Tokens that HELMET's wording, of which the corpus has few words, and the question take."""


def make_demo(
    out: str | Path, lengths: Sequence[int] = DEMO_LENGTHS, *, samples: int = 100, split: Split = "test", seed: int = 42
) -> Recall:
    """Write questions about facts among documents, as many (at most 20) as fit each length, and their configuration.

    Each sample is a question of the synthetic corpus, the gold document at five depths in turn. HELMET's loader for
    RULER reads them (``ruler_qa_1``), writes its own instructions around them, and ends in the words after which the
    embedded model answers.

    Args:
        out: The folder that gets ``data/ruler/qa_1``, ``configs/demo.yaml`` and ``demo.json``.
        lengths: Tokens of prompt and response together.
        samples: Of each length.
        split: Of the corpus.
        seed: Of the corpus.

    Raises:
        ValueError: If not even two documents fit a length.
    """
    tokenizer = build_tokenizer()
    sets: list[tuple[str, str, int, int, Rows]] = []
    for length in lengths:
        rows = _fitting(tokenizer, length, samples, split, seed)
        sets.append((NEEDLE_QA.dataset, f"data/ruler/qa_1/validation_{length}.jsonl", length, _NEW_TOKENS, rows))
    made = {"corpus": "synthetic", "split": split, "samples": samples, "seed": seed, "lengths": list(lengths)}
    return write_sets(tokenizer, Path(out), "demo", sets, made, shots=0)


def _fitting(tokenizer: Any, length: int, samples: int, split: Split, seed: int) -> Rows:
    """The samples with as many documents as fit the length."""
    room = length - _NEW_TOKENS - _RESERVE

    def rows_of(documents: int, n: int) -> tuple[Rows, int]:
        rows = [_row(index, one) for index, one in enumerate(_questions(n, documents, split, seed))]
        return rows, max(len(tokenizer(row["context"])["input_ids"]) for row in rows)

    taken = rows_of(_FEWEST, 5)[1] / _FEWEST  # of one document, about
    for documents in range(min(_MOST, max(_FEWEST, int(1.2 * room / taken))), _FEWEST - 1, -1):
        if rows_of(documents, 5)[1] <= room:
            rows, most = rows_of(documents, samples)
            if most <= room:
                return rows
    raise ValueError(f"length {length} has room for {room} tokens of documents, and {_FEWEST} of them have more")


def _questions(samples: int, documents: int, split: Split, seed: int) -> Sequence[MultiDocSample]:
    positions = spread_positions(documents)
    return SampleSelection(
        num_documents=documents, gold_positions=positions, part=split, questions=samples, seed=seed
    ).open()


def _row(index: int, sample: MultiDocSample) -> dict[str, Any]:
    """What HELMET's loader reads; the documents stand as they do in the prompts that the model was trained on."""
    _, documents, _ = str(sample.prompt("long")).split("\n\n")
    depth = 0.0 if sample.gold_index is None else sample.gold_index / max(1, len(sample.documents) - 1)
    return {
        "index": index,
        "id": sample.question_id,  # two people of one name are asked about in the same words
        "context": documents,
        "question": sample.question,
        "answer": list(sample.answers),
        "depth": depth,
    }
