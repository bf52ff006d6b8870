"""llama.cpp's converter keeps the biases of a folded checkpoint, and llama.cpp reads them.

``LLAMA_CPP`` names a copy of llama.cpp, whose converter runs. ``llama-cpp-python`` runs llama.cpp itself.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import focuslens as fl

LLAMA_CPP = os.environ.get("LLAMA_CPP")
CONVERT = """
import runpy, sys
sys.path[:0] = [".", "gguf-py"]
import conversion.base, conversion.llama
{patch}
runpy.run_path("convert_hf_to_gguf.py", run_name="__main__")
"""
# The embedded model's tokenizer is none that llama.cpp knows; only weights are looked at here.
NAMED = 'conversion.base.TextModel.get_vocab_base_pre = lambda self, tokenizer: "gpt-2"'
WITHOUT = "conversion.llama.LlamaModel.set_vocab = lambda self: self._set_vocab_none()"

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not LLAMA_CPP, reason="LLAMA_CPP names no copy of llama.cpp"),
]


def steering_of(model: fl.FocusModel) -> fl.FocusSteering:
    vectors = torch.randn(2, 8, model.shape.d_head, generator=torch.Generator().manual_seed(0))
    directions = fl.FocusDirections([fl.Head(1, head) for head in range(8)], vectors[0], vectors[1], "projection")
    return fl.FocusSteering(directions, 1.0)


def converted(steering: fl.FocusSteering, directory: Path, patch: str) -> Path:
    """The embedded model with directions folded in, as the file ``folded.gguf`` beside the folded checkpoint."""
    folded = fl.fold(Path(fl.__file__).parent / "assets" / "demo", steering, directory / "folded").directory
    code = CONVERT.format(patch=patch)
    command = [sys.executable, "-c", code, folded, "--outtype", "f32", "--outfile", directory / "folded.gguf"]
    done = subprocess.run(command, cwd=LLAMA_CPP, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return folded


def test_the_converter_keeps_the_biases(tmp_path):
    pytest.importorskip("gguf")
    model = fl.FocusModel.demo(device="cpu")
    folded = converted(steering_of(model), tmp_path, NAMED)
    loading: Any = AutoModelForCausalLM
    read = loading.from_pretrained(
        tmp_path, gguf_file="folded.gguf", config=AutoConfig.from_pretrained(folded), dtype=torch.float32
    )
    tokens = model.encode(fl.load_synthetic(1, split="test")[0].prompt()).tokens
    with torch.no_grad():
        logits = read(tokens[None]).logits[0]
        assert torch.equal(logits, loading.from_pretrained(folded, dtype=torch.float32)(tokens[None]).logits[0])
    assert (logits - model.logits(tokens)).abs().max() > 0.1


class LlamaCpp:
    """A GGUF file in llama.cpp, which runs token ids in float32. The file may have no vocabulary."""

    def __init__(self, path: Path) -> None:
        self.lib: Any = pytest.importorskip("llama_cpp.llama_cpp")
        self.lib.llama_backend_init()
        self.model = self.lib.llama_model_load_from_file(str(path).encode(), self.lib.llama_model_default_params())
        assert self.model
        self.d_vocab = self.lib.llama_vocab_n_tokens(self.lib.llama_model_get_vocab(self.model))

    def generate(self, tokens: list[int], n: int, stops: tuple[int, ...]) -> tuple[list[int], torch.Tensor]:
        """Greedy response without stop tokens, and the logits after the prompt."""
        settings = self.lib.llama_context_default_params()
        settings.n_ctx = settings.n_batch = settings.n_ubatch = 2048
        settings.n_threads = settings.n_threads_batch = 1
        settings.type_k = settings.type_v = 0  # keys and values in float32
        settings.flash_attn_type = 0
        context = self.lib.llama_init_from_model(self.model, settings)
        response, first, new = list[int](), torch.empty(0), tokens
        for _ in range(n):
            ids = (self.lib.llama_token * len(new))(*new)
            assert self.lib.llama_decode(context, self.lib.llama_batch_get_one(ids, len(new))) == 0
            row = self.lib.llama_get_logits_ith(context, -1)
            logits = torch.from_numpy(np.ctypeslib.as_array(row, shape=(self.d_vocab,)).copy())
            first = first if response else logits
            new = [int(logits.argmax())]
            if new[0] in stops:
                break
            response += new
        self.lib.llama_free(context)
        return response, first


def test_llama_cpp_gives_focuslens_steered_responses(tmp_path):
    model = fl.FocusModel.demo(device="cpu")
    steering = steering_of(model)
    converted(steering, tmp_path, WITHOUT)
    other = LlamaCpp(tmp_path / "folded.gguf")
    unsteered = 0
    for sample in fl.load_synthetic(20, split="test"):
        prompt = model.encode(sample.prompt())
        response, logits = other.generate(prompt.tokens.tolist(), 12, model.stop_tokens)
        assert response == model.generate(prompt, [steering], max_new_tokens=12).tokens.tolist()
        torch.testing.assert_close(logits, model.logits(prompt, [steering])[-1], atol=1e-2, rtol=0)
        unsteered += response == model.generate(prompt, max_new_tokens=12).tokens.tolist()
    assert unsteered < 20
