"""llama.cpp's converter keeps the biases of a folded checkpoint. ``LLAMA_CPP`` names a copy of llama.cpp."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import focuslens as fl

LLAMA_CPP = os.environ.get("LLAMA_CPP")
CONVERT = """
import runpy, sys
sys.path[:0] = [".", "gguf-py"]
import conversion.base
# The embedded model's tokenizer is none that llama.cpp knows; only weights are looked at here.
conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"
runpy.run_path("convert_hf_to_gguf.py", run_name="__main__")
"""


@pytest.mark.skipif(not LLAMA_CPP, reason="LLAMA_CPP names no copy of llama.cpp")
def test_the_converter_keeps_the_biases(tmp_path):
    pytest.importorskip("gguf")
    model = fl.FocusModel.demo(device="cpu")
    vectors = torch.randn(2, 8, model.shape.d_head, generator=torch.Generator().manual_seed(0))
    directions = fl.FocusDirections([fl.Head(1, head) for head in range(8)], vectors[0], vectors[1], "projection")
    steering = fl.FocusSteering(directions, 1.0)
    folded = fl.fold(Path(fl.__file__).parent / "assets" / "demo", steering, tmp_path / "folded").directory
    command = [sys.executable, "-c", CONVERT, folded, "--outtype", "f32", "--outfile", tmp_path / "folded.gguf"]
    done = subprocess.run(command, cwd=LLAMA_CPP, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    loading: Any = AutoModelForCausalLM
    read = loading.from_pretrained(
        tmp_path, gguf_file="folded.gguf", config=AutoConfig.from_pretrained(folded), dtype=torch.float32
    )
    tokens = model.encode(fl.load_synthetic(1, split="test")[0].prompt()).tokens
    with torch.no_grad():
        logits = read(tokens[None]).logits[0]
        assert torch.equal(logits, loading.from_pretrained(folded, dtype=torch.float32)(tokens[None]).logits[0])
    assert (logits - model.logits(tokens)).abs().max() > 0.1
