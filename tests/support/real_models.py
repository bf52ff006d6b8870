"""Known models as GGUF files, read without FocusLens's conversion."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import torch
from gguf import GGUFReader
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM

if TYPE_CHECKING:
    from focuslens import MultiDocSample

__all__ = ["digit_splitting_tokenizer", "gguf_model", "prompt_of_length"]


def gguf_model(path: Path) -> Any:
    """The model that transformers itself makes of a GGUF file, in float32."""
    load: Any = cast("Any", AutoModelForCausalLM).from_pretrained
    return load(path.parent, gguf_file=path.name, dtype=torch.float32).eval()


def digit_splitting_tokenizer(path: Path) -> Tokenizer:
    """Tokenizer of a GGUF file under the rules of SmolLM2's original ``tokenizer.json``.

    The rules are written out here, and the file gives vocabulary, merges and control tokens.
    """
    fields = GGUFReader(path).fields
    tokens, types, merges = (fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "token_type", "merges"))
    control = [i for i, kind in enumerate(types) if kind == 3]
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    digits = {"type": "Digits", "individual_digits": True}
    rules = {
        "version": "1.0",
        "added_tokens": [{"id": i, "content": tokens[i], **flags} for i in control],
        "normalizer": None,
        "pre_tokenizer": {"type": "Sequence", "pretokenizers": [digits, byte_level]},
        "post_processor": None,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "vocab": {token: i for i, token in enumerate(tokens)},
            "merges": [merge.split(" ") for merge in merges],
        },
    }
    return Tokenizer.from_str(json.dumps(rules))


def prompt_of_length(n_documents: int) -> MultiDocSample:
    """A sample from NQ-Open with the given number of documents, or a synthetic one where there is no such file.

    A document has about 130 tokens in NQ-Open, and about 60 in the synthetic corpus, which gives twice as many.
    """
    from focuslens import load_multidoc, load_synthetic
    from tests.support.paths import SHARED_DATA

    oracle, gold = SHARED_DATA / "nq-open-oracle.jsonl.gz", n_documents // 2
    if oracle.exists():
        return load_multidoc(oracle, num_documents=n_documents, gold_positions=[gold], limit=1)[0]
    return load_synthetic(1, num_documents=2 * n_documents, gold_positions=[2 * gold])[0]
