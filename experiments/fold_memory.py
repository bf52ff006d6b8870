"""Fold a sharded checkpoint of random weights in a separate process, and print the peak memory of that process.

    python experiments/fold_memory.py --gigabytes 8 --work /tmp/fold

The checkpoint is a Llama with random bfloat16 weights, in shards of about 2 GB. The original and the folded checkpoint
are deleted at the end.
"""

from __future__ import annotations

import argparse
import json
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

import torch
from safetensors.torch import save_file

import focuslens as fl

D_MODEL, D_MLP, HEADS, KEY_VALUE_HEADS, VOCABULARY = 4096, 14336, 32, 8, 32000
D_HEAD = D_MODEL // HEADS
SHAPES = {
    "self_attn.q_proj.weight": (D_MODEL, D_MODEL),
    "self_attn.k_proj.weight": (KEY_VALUE_HEADS * D_HEAD, D_MODEL),
    "self_attn.v_proj.weight": (KEY_VALUE_HEADS * D_HEAD, D_MODEL),
    "self_attn.o_proj.weight": (D_MODEL, D_MODEL),
    "mlp.gate_proj.weight": (D_MLP, D_MODEL),
    "mlp.up_proj.weight": (D_MLP, D_MODEL),
    "mlp.down_proj.weight": (D_MODEL, D_MLP),
    "input_layernorm.weight": (D_MODEL,),
    "post_attention_layernorm.weight": (D_MODEL,),
}
SHARD = 2_000_000_000


def random_numbers(shape: tuple[int, ...]) -> torch.Tensor:
    # Random sign and mantissa bits of bfloat16 numbers give magnitudes from 2 ** -8 to 2 ** -7. Drawing bits is faster
    # than drawing normally distributed numbers.
    return (torch.randint(0, 2**16, shape, dtype=torch.int32) & 0x807F | 0x3B80).to(torch.uint16).view(torch.bfloat16)


def make(directory: Path, gigabytes: float) -> int:
    """Write the random checkpoint, and return its number of layers."""
    layer = 2 * sum(torch.Size(shape).numel() for shape in SHAPES.values())
    ends = 2 * 2 * VOCABULARY * D_MODEL
    n_layers = max(1, round((gigabytes * 1e9 - ends) / layer))
    tensors = {f"model.layers.{i}.{name}": shape for i in range(n_layers) for name, shape in SHAPES.items()}
    tensors |= {"model.embed_tokens.weight": (VOCABULARY, D_MODEL), "lm_head.weight": (VOCABULARY, D_MODEL)}
    tensors |= {"model.norm.weight": (D_MODEL,)}
    places, shard, size, number = dict[str, str](), dict[str, torch.Tensor](), 0, 0
    for name, shape in tensors.items():
        shard[name] = random_numbers(shape)
        size += shard[name].nbytes
        places[name] = f"model-{number:05d}.safetensors"
        if size > SHARD or name == "model.norm.weight":
            save_file(shard, directory / places[name], metadata={"format": "pt"})
            shard, size, number = {}, 0, number + 1
    (directory / "model.safetensors.index.json").write_text(json.dumps({"metadata": {}, "weight_map": places}))
    config = {
        "model_type": "llama",
        "architectures": ["LlamaForCausalLM"],
        "dtype": "bfloat16",
        "hidden_size": D_MODEL,
        "intermediate_size": D_MLP,
        "num_hidden_layers": n_layers,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KEY_VALUE_HEADS,
        "vocab_size": VOCABULARY,
        "max_position_embeddings": 8192,
    }
    (directory / "config.json").write_text(json.dumps(config))
    return n_layers


def peak_gib() -> float:
    # getrusage is unsuitable here, because a child process inherits the peak of its parent.
    (kib,) = re.findall(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    return int(kib) / 2**20


def fold(source: Path, out: Path, n_layers: int) -> None:
    """Fold directions for twenty heads into a checkpoint, and print the peak memory of this process."""
    heads = [fl.Head(i % n_layers, i) for i in range(20)]
    vectors = torch.randn(2, len(heads), D_HEAD)
    steering = fl.FocusSteering(fl.FocusDirections(heads, vectors[0], vectors[1], "projection"), 0.3)
    write, _ = fl.fold, fl.FocusModel  # loads these lazy imports now, so that their memory is not counted as folding
    before = peak_gib()
    started = time.perf_counter()
    write(source, steering, out)
    seconds = time.perf_counter() - started
    print(f"{seconds:.1f} s; memory at most {peak_gib():.2f} GiB, of it {before:.2f} before folding")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gigabytes", type=float, default=8.0)
    parser.add_argument("--work", type=Path, required=True, help="an empty or new directory with room for it twice")
    parser.add_argument("--folding", type=int, help=argparse.SUPPRESS)
    args = parser.parse_args()
    source, out = args.work / "base", args.work / "folded"
    if args.folding is not None:
        fold(source, out, args.folding)
        return
    source.mkdir(parents=True)
    n_layers = make(source, args.gigabytes)
    size = sum(path.stat().st_size for path in source.iterdir())
    print(f"{n_layers} layers, {size / 1e9:.2f} GB in {len(list(source.glob('*.safetensors')))} shards")
    try:
        subprocess.run([sys.executable, __file__, "--work", args.work, "--folding", str(n_layers)], check=True)
    finally:
        shutil.rmtree(source)
        shutil.rmtree(out, ignore_errors=True)


if __name__ == "__main__":
    main()
