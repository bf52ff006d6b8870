"""Weights of a HookedTransformer are stored in the layout that a pass uses.

The results are bit-identical, and a pass copies no weights.
"""

from __future__ import annotations

import pytest
import torch

pytest.importorskip("transformer_lens.HookedTransformer", reason="TransformerLens 4 has no HookedTransformer")

from torch.utils._python_dispatch import TorchDispatchMode
from transformer_lens import HookedTransformer

from focuslens import FocusModel
from focuslens.model.backends.hooked import HookedBackend

NAMES = ("llama", "qwen2", "qwen3", "mistral_window")


class Copies(TorchDispatchMode):
    """Sizes of the tensors copied within this mode."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: list[int] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func in (torch.ops.aten.clone.default, torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            self.sizes.append(args[0].numel())
        return func(*args, **(kwargs or {}))


def plain(model: FocusModel) -> HookedTransformer:
    """A copy of a model in TransformerLens's layout, where each weight is contiguous in its own shape."""
    with torch.no_grad():
        copy = HookedTransformer(model.hooked.cfg)
        copy.load_state_dict(model.hooked.state_dict())
    return copy.eval()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("name", NAMES)
def test_the_same_bits_come_out(name, dtype, load_model):
    hooked, tokens = plain(load_model(name, "hooked", dtype=dtype)), torch.arange(5, 45)[None]
    before, weights = hooked(tokens), {key: value.clone() for key, value in hooked.state_dict().items()}
    HookedBackend(hooked)
    assert torch.equal(hooked(tokens), before)
    after = hooked.state_dict()
    assert list(after) == list(weights)
    assert all(torch.equal(after[key], value) for key, value in weights.items())


def largest_copy(backend: HookedBackend) -> int:
    """Size of the largest tensor copied when one token is decoded after a prompt."""
    cache, mask = backend.new_cache(1), torch.ones(1, 9, dtype=torch.long)
    backend.forward(torch.arange(5, 13)[None], mask[:, :8], cache, last_only=True)
    with Copies() as copies, torch.no_grad():
        backend.forward(torch.tensor([[5]]), mask, cache, last_only=True)
    return max(copies.sizes)


@pytest.mark.parametrize("name", NAMES)
def test_a_decoded_token_copies_no_weights(name, load_model):
    hooked = plain(load_model(name, "hooked"))
    backend = HookedBackend(hooked)
    named = hooked.named_parameters()
    smallest = min(weight.numel() for name, weight in named if name.split(".")[-1].lstrip("_").startswith("W_"))
    assert largest_copy(backend) < smallest
    for block in hooked.blocks:
        block.mlp.W_in.data = block.mlp.W_in.data.contiguous()  # layout of TransformerLens
    assert largest_copy(backend) >= smallest


def test_weights_that_share_memory_go_on_sharing_it(load_model):
    hooked = plain(load_model("llama", "hooked"))
    first, second = hooked.blocks[0].mlp, hooked.blocks[1].mlp
    second.W_in.data = first.W_in.data
    HookedBackend(hooked)
    assert first.W_in.data_ptr() == second.W_in.data_ptr()
    assert first.W_in.is_contiguous()


def test_a_second_model_of_the_same_weights_leaves_them_alone(load_model):
    hooked = plain(load_model("llama", "hooked"))
    HookedBackend(hooked)
    lies = {name: (weight.data_ptr(), weight.stride()) for name, weight in hooked.named_parameters()}
    HookedBackend(hooked)
    assert {name: (weight.data_ptr(), weight.stride()) for name, weight in hooked.named_parameters()} == lies


def test_an_mlp_that_has_no_gate_keeps_its_weights_as_they_are():
    from transformer_lens import HookedTransformerConfig

    torch.manual_seed(0)
    cfg = HookedTransformerConfig(
        n_layers=1, d_model=16, n_ctx=32, d_head=8, n_heads=2, d_mlp=24, d_vocab=50, act_fn="gelu", device="cpu"
    )
    hooked, tokens = HookedTransformer(cfg).eval(), torch.arange(5, 25)[None]
    before = hooked(tokens)
    HookedBackend(hooked)
    assert hooked.blocks[0].mlp.W_in.is_contiguous()
    assert torch.equal(hooked(tokens), before)
