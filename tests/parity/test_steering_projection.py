"""Steering at the projection site against Hugging Face checkpoints with the vectors as biases.

``d_Q`` is added to the bias of ``q_proj`` for its query head, and ``d_K`` to the bias of ``k_proj`` for its key-value
head. The steered model is therefore an ordinary checkpoint. In families with query and key norms (Qwen3), the bias is
added before the norm.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

import focuslens as fl
from tests.support.reference import ReferenceModel, gap, prompt_text

SEPARATE = [(0, 0), (0, 3), (1, 1), (2, 2)]
"""Heads that do not share a key-value head. Query heads 0 and 1 use the first key-value head, 2 and 3 the second."""

SHARING = [(0, 1), (0, 0), (1, 2), (1, 3), (2, 0)]
"""Heads that include two pairs with a shared key-value head."""

ALPHA = 0.6
TOLERANCE = 1e-3
"""Tolerance of logits. 1e-4 is measured on ``HookedTransformer`` (rotary tables), 1e-5 on the bridge."""

FAMILIES = pytest.mark.parametrize("name", ["llama", "llama_bias", "llama_mha", "qwen2", "qwen3", "mistral"])


def random_vectors(n: int, d_head: int, seed: int) -> Tensor:
    return 2 * torch.randn(n, d_head, generator=torch.Generator().manual_seed(seed))


def with_biases(hf: ReferenceModel, added: dict[str, dict[tuple[int, int], Tensor]], directory: Path) -> Any:
    """The checkpoint with vectors added to the biases of ``q_proj`` and ``k_proj``, saved and loaded again.

    ``added`` maps a projection's name to a dictionary from ``(layer, head of that projection)`` to a vector. Mistral
    has no setting for biases, so its model is changed in memory.
    """
    config, state = hf.eager.config.__class__.from_dict(hf.eager.config.to_dict()), dict(hf.eager.state_dict())
    d_head, d_model = getattr(config, "head_dim", None) or config.hidden_size // 4, config.hidden_size
    sizes = {"q": 4 * d_head, "k": config.num_key_value_heads * d_head, "v": config.num_key_value_heads * d_head}
    for layer in range(config.num_hidden_layers):
        for part, size in (*sizes.items(), ("o", d_model)):
            name = f"model.layers.{layer}.self_attn.{part}_proj.bias"
            if part != "o" or config.model_type != "qwen2":
                state.setdefault(name, torch.zeros(size))
            for (where, head), vector in added.get(f"{part}_proj", {}).items():
                if where == layer:
                    state[name] = state[name].clone()
                    state[name][head * d_head : (head + 1) * d_head] += vector
    if config.model_type == "mistral":
        steered = AutoModelForCausalLM.from_config(config, attn_implementation="eager")
        for layer in steered.model.layers:
            for part in ("q", "k", "v", "o"):
                linear: nn.Linear = getattr(layer.self_attn, f"{part}_proj")
                linear.bias = nn.Parameter(torch.zeros(linear.out_features))
        steered.load_state_dict(state)
        return steered.eval()
    if config.model_type != "qwen2":
        config.attention_bias = True
    AutoModelForCausalLM.from_config(config).save_pretrained(directory, state_dict=state)
    return AutoModelForCausalLM.from_pretrained(directory, attn_implementation="eager").eval()


def logits_of(model: Any, tokens: Tensor) -> Tensor:
    with torch.no_grad():
        return model(tokens[None], use_cache=False).logits[0]


def generate(model: Any, tokens: Tensor, n: int) -> list[int]:
    with torch.no_grad():
        out = model.generate(
            tokens[None], attention_mask=torch.ones_like(tokens)[None], max_new_tokens=n, do_sample=False,
            eos_token_id=1, pad_token_id=2,
        )  # fmt: skip
    made = out[0, len(tokens) :].tolist()
    return made[:-1] if made[-1] == 1 else made


@FAMILIES
def test_a_steered_model_is_a_checkpoint_with_biases(name, backend, load_model, reference, samples, tmp_path):
    model, hf = load_model(name, backend), reference(name)
    n, d_head, group = len(SEPARATE), model.shape.d_head, 1 if name == "llama_mha" else 2
    query, key = random_vectors(n, d_head, 1), random_vectors(n, d_head, 2)
    steered = with_biases(
        hf,
        {
            "q_proj": {head: ALPHA * vector for head, vector in zip(SEPARATE, query, strict=True)},
            "k_proj": {
                (layer, head // group): ALPHA * vector for (layer, head), vector in zip(SEPARATE, key, strict=True)
            },
        },
        tmp_path,
    )
    steering = fl.FocusSteering(fl.FocusDirections(SEPARATE, query, key, site="projection"), ALPHA)
    tokens = [hf.ids(prompt_text(sample, "long")) for sample in samples[:2]]
    expected = logits_of(steered, tokens[0])
    assert gap(model.logits(tokens[0], [steering]), expected) < TOLERANCE
    assert gap(expected, hf.logits(tokens[0])) > 0.5
    # Both vectors act at this site, unlike at the rotary site.
    alone = fl.FocusSteering(fl.FocusDirections(SEPARATE, query, site="projection"), ALPHA)
    without_keys = with_biases(
        hf, {"q_proj": {head: ALPHA * vector for head, vector in zip(SEPARATE, query, strict=True)}}, tmp_path / "query"
    )
    assert gap(model.logits(tokens[0], [alone]), logits_of(without_keys, tokens[0])) < TOLERANCE
    assert gap(logits_of(without_keys, tokens[0]), expected) > 0.3
    responses = model.generate([sample.prompt("long") for sample in samples[:2]], [steering], max_new_tokens=6)
    wanted = [generate(steered, one, 6) for one in tokens]
    assert [response.tokens.tolist() for response in responses] == wanted
    assert all(hf.generate(one, 6) != made for one, made in zip(tokens, wanted, strict=True))


@pytest.mark.parametrize("name", ["llama", "qwen2", "qwen3"])
def test_heads_of_one_group_share_their_key_vector_once(name, backend, load_model, reference, samples, tmp_path):
    """If two heads of a group have the same ``d_K``, it is added once."""
    model, hf = load_model(name, backend), reference(name)
    d_head = model.shape.d_head
    query, shared = random_vectors(len(SHARING), d_head, 3), random_vectors(3, d_head, 4)
    key = shared[[0, 0, 1, 1, 2]]
    biases = {
        "q_proj": {head: ALPHA * vector for head, vector in zip(SHARING, query, strict=True)},
        "k_proj": {(0, 0): ALPHA * shared[0], (1, 1): ALPHA * shared[1], (2, 0): ALPHA * shared[2]},
    }
    tokens = hf.ids(prompt_text(samples[3], "long"))
    expected = logits_of(with_biases(hf, biases, tmp_path), tokens)
    steering = fl.FocusSteering(fl.FocusDirections(SHARING, query, key, site="projection"), ALPHA)
    assert gap(model.logits(tokens, [steering]), expected) < TOLERANCE
    biases["k_proj"] = {place: 2 * vector for place, vector in biases["k_proj"].items()}
    assert gap(logits_of(with_biases(hf, biases, tmp_path), tokens), expected) > 0.3


def test_different_key_vectors_of_one_group_are_averaged(backend, load_model, reference, samples, tmp_path):
    model, hf = load_model("llama", backend), reference("llama")
    query, key = random_vectors(2, 16, 3), random_vectors(2, 16, 4)
    heads = [(1, 3), (1, 2)]
    biases = {
        "q_proj": {(1, 3): ALPHA * query[0], (1, 2): ALPHA * query[1]},
        "k_proj": {(1, 1): ALPHA * (key[0] + key[1]) / 2},
    }
    tokens = hf.ids(prompt_text(samples[3], "long"))
    expected = logits_of(with_biases(hf, biases, tmp_path), tokens)
    steering = fl.FocusSteering(fl.FocusDirections(heads, query, key, site="projection"), ALPHA)
    assert gap(model.logits(tokens, [steering]), expected) < TOLERANCE
    assert gap(expected, hf.logits(tokens)) > 0.1


@pytest.mark.parametrize("name", ["llama", "qwen3"])
def test_steering_the_response_leaves_the_prompts_queries_and_keys(name, backend, load_model, reference, samples):
    """With ``positions="response"``, the biases act from the row of the last prompt token on.

    In the reference, module hooks add the biases.
    """
    model, hf = load_model(name, backend), reference(name)
    d_head = model.shape.d_head
    query, key = random_vectors(len(SEPARATE), d_head, 5), random_vectors(len(SEPARATE), d_head, 6)
    prompt = hf.ids(prompt_text(samples[0], "long"))
    tokens = torch.cat((prompt, torch.tensor([70, 300, 5])))

    def bias(part: str, layer: int) -> Any:
        def add(module: Any, inputs: Any, output: Tensor) -> Tensor:
            output = output.clone()
            for i, (where, head) in enumerate(SEPARATE):
                place, vector = (head, query[i]) if part == "q" else (head // 2, key[i])
                if where == layer:
                    output[:, len(prompt) - 1 :, place * d_head : (place + 1) * d_head] += ALPHA * vector
            return output

        return add

    handles = [
        getattr(layer.self_attn, f"{part}_proj").register_forward_hook(bias(part, i))
        for i, layer in enumerate(hf.eager.model.layers)
        for part in "qk"
    ]
    try:
        expected = hf.logits(tokens)
    finally:
        for handle in handles:
            handle.remove()
    directions = fl.FocusDirections(SEPARATE, query, key, site="projection")
    steering = fl.FocusSteering(directions, ALPHA, positions="response")
    plain = hf.logits(tokens)
    assert gap(model.logits(tokens, [steering], prompt=samples[0].prompt("long")), expected) < TOLERANCE
    changed = (expected - plain).abs().amax(dim=-1)
    assert changed[: len(prompt) - 1].max() == 0
    assert changed[len(prompt) - 1 :].min() > 0.1
