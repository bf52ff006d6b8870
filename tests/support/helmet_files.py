"""Small synthetic files in the format of HELMET's data, for every task of the paper that is not a recall task.

Data sets that HELMET loads from the Hugging Face hub are folders of the same name. HELMET must be run in their parent.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import yaml

__all__ = ["DATASETS", "write_hub_stand_ins", "write_kilt", "write_msmarco"]

_WORDS = ["river", "stone", "lantern", "harbour", "copper", "meadow", "winter", "garden", "bridge", "tower", "market"]

DATASETS: dict[str, tuple[str, str, int, int]] = {
    "kilt_nq": ("data/kilt/nq.jsonl", "data/kilt/nq_demos.jsonl", 1200, 12),
    "kilt_triviaqa": ("data/kilt/nq.jsonl", "data/kilt/nq_demos.jsonl", 1200, 12),
    "kilt_hotpotqa": ("data/kilt/nq.jsonl", "data/kilt/nq_demos.jsonl", 400, 12),
    "kilt_popqa_3": ("data/kilt/popqa.jsonl", "data/kilt/popqa_demos.jsonl", 1200, 12),
    "msmarco_rerank_psg": ("data/msmarco/test.jsonl", "data/msmarco/demos.jsonl", 3000, 20),
    "icl_trec_coarse_12shot_balance": ("", "", 1000, 8),
    "icl_trec_fine_12shot_balance": ("", "", 1000, 8),
    "icl_banking77_12shot_balance": ("", "", 1000, 8),
    "icl_clinic150_12shot_balance": ("", "", 1000, 8),
    "icl_nlu_12shot_balance": ("", "", 1000, 8),
    "infbench_qa_eng_600": ("", "", 1000, 10),
    "infbench_choice_eng_600": ("", "", 1000, 10),
}
"""Task name to test file, demonstration file, input length and response length.

HELMET truncates prompts only at the input length of ``kilt_hotpotqa``.
"""


def _text(rng: random.Random, n: int) -> str:
    return " ".join(rng.choice(_WORDS) for _ in range(n)).capitalize() + "."


def _write(path: Path, rows: list[dict[str, Any]]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def write_kilt(root: Path) -> None:
    """Write KILT questions with passages, and demonstrations. PopQA questions also have their subject's popularity."""
    rng = random.Random(1)

    def row(number: int, passages: int, popular: bool) -> dict[str, Any]:
        texts = [_text(rng, 12) for _ in range(passages)]
        contexts = [{"id": str(i), "title": _text(rng, 2), "text": text} for i, text in enumerate(texts)]
        found = {"id": f"q{number}", "question": f"Where is the {_text(rng, 2)[:-1].lower()}?"}
        found |= {"answers": [texts[0].split()[3], "nowhere"], "ctxs": contexts}
        return {**found, "s_pop": rng.choice([10, 500, 20000])} if popular else found

    for name, popular in (("nq", False), ("popqa", True)):
        # Each question appears twice, once per depth of its passage. The two samples have the same id.
        rows = [row(number, 6, popular) for number in range(6)]
        _write(root / f"data/kilt/{name}.jsonl", [one for one in rows for _ in range(2)])
        _write(root / f"data/kilt/{name}_demos.jsonl", [row(number, 2, popular) for number in range(50, 60)])


def write_msmarco(root: Path) -> None:
    """Write passages to rank, with their labels. Demonstrations have fewer passages per query."""
    rng = random.Random(2)

    def row(number: int, passages: int) -> dict[str, Any]:
        texts = [{"id": str(100 + i), "label": i % 4, "text": _text(rng, 10)} for i in range(passages)]
        return {"qid": f"q{number}", "query": _text(rng, 3), "ctxs": texts}

    _write(root / "data/msmarco/test.jsonl", [row(number, 12) for number in range(4)])
    _write(root / "data/msmarco/demos.jsonl", [row(number, 4) for number in range(20, 32)])


def _data_card(folder: Path, name: str, files: dict[str, str], labels: dict[str, int]) -> None:
    """Write the data card from which the datasets library reads classes and splits."""
    features: list[dict[str, Any]] = [{"name": "text", "dtype": "string"}]
    for label, n in labels.items():
        classes = {str(i): f"{label}-{i}" for i in range(n)}
        features.append({"name": label, "dtype": {"class_label": {"names": classes}}})
    splits = [{"split": split, "path": file} for split, file in files.items()]
    card: dict[str, Any] = {"configs": [{"config_name": name, "data_files": splits, "default": True}]}
    if labels:
        card["dataset_info"] = [{"config_name": name, "features": features}]
    (folder / "README.md").write_text(f"---\n{yaml.safe_dump(card)}---\n")


def _classes(folder: Path, name: str, splits: tuple[str, ...], labels: dict[str, int]) -> None:
    rng = random.Random(str(folder.name))
    files: dict[str, str] = {}
    for split in splits:
        rows = [
            {"text": _text(rng, 5), **{label: rng.randrange(n) for label, n in labels.items()}}
            for _ in range(40 if split == "train" else 6)
        ]
        files[split] = f"{split}.jsonl"
        _write(folder / files[split], rows)
    _data_card(folder, name, files, labels)


def write_hub_stand_ins(folder: Path, tokenizer: Any, shortest: int = 70_000) -> None:
    """Write folders that replace HELMET's data sets on the hub and the Llama 2 tokenizer that measures book lengths.

    Args:
        folder: Folder in which HELMET must be run.
        tokenizer: Tokenizer to save under Llama 2's name.
        shortest: Minimum length of a book in tokens. HELMET leaves out books of fewer than 65,536 tokens.
    """
    _classes(folder / "CogComp/trec", "default", ("train", "test"), {"coarse_label": 6, "fine_label": 50})
    _classes(folder / "PolyAI/banking77", "default", ("train", "test"), {"label": 77})
    _classes(folder / "clinc_oos", "plus", ("train", "validation"), {"intent": 151})
    _classes(folder / "xingkunliuxtracta/nlu_evaluation_data", "default", ("train",), {"label": 68})
    books = folder / "xinrongzhang2022/infinitebench"
    rng, files = random.Random(3), dict[str, str]()
    for split in ("longbook_qa_eng", "longbook_choice_eng"):
        rows: list[dict[str, Any]] = []
        for number in range(3):
            text = " ".join(_text(rng, 400) for _ in range(25))
            while len(tokenizer(text)["input_ids"]) < shortest:
                text = f"{text} {text}"
            options = [_text(rng, 2) for _ in range(4)]
            rows.append({"id": number, "context": text, "input": f"What is {number}?", "answer": [options[1]]})
            rows[-1]["options"] = options if "choice" in split else []
        files[split] = f"{split}.jsonl"
        _write(books / files[split], rows)
    _data_card(books, "default", files, {})
    tokenizer.save_pretrained(folder / "meta-llama/Llama-2-7b-hf")
