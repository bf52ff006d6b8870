"""The anatomy of a direction against loops over explicit rotation matrices, Hugging Face's keys, and real logits."""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor
from transformers import AutoModelForCausalLM

import focuslens as fl
from focuslens.directions.anatomy import (
    collect_keys,
    decompose,
    decompose_heads,
    frequency_energy,
    logit_bias,
    position_bias,
    token_preferences,
)
from focuslens.model.rotary import Rotary

SCALE = 0.37
D_HEAD = 8
LAYOUTS = pytest.mark.parametrize(
    ("adjacent_pairs", "rotary_dim"), [(False, 8), (True, 8), (False, 4), (True, 6)], ids=str
)


def angle(position: int, pair: int, rotary_dim: int) -> float:
    return position * 50.0 ** (-2 * pair / rotary_dim)


def make_rotary(adjacent_pairs: bool, rotary_dim: int, n_ctx: int = 40) -> Rotary:
    pairs = rotary_dim // 2
    angles = torch.tensor(
        [[angle(pos, pair, rotary_dim) for pair in range(pairs)] for pos in range(n_ctx)], dtype=torch.float64
    )
    angles = angles.repeat_interleave(2, dim=1) if adjacent_pairs else torch.cat((angles, angles), dim=1)
    return Rotary(angles.cos(), angles.sin(), adjacent_pairs, None, lambda x: 1000 * x)


def matrix(position: int, adjacent_pairs: bool, rotary_dim: int) -> np.ndarray:
    """The rotation matrix ``R(p)``, with one two-by-two rotation per pair of dimensions."""
    made = np.eye(D_HEAD)
    for pair in range(rotary_dim // 2):
        i, j = (2 * pair, 2 * pair + 1) if adjacent_pairs else (pair, pair + rotary_dim // 2)
        turn = angle(position, pair, rotary_dim)
        made[i, i], made[i, j] = np.cos(turn), -np.sin(turn)
        made[j, i], made[j, j] = np.sin(turn), np.cos(turn)
    return made


def draw(*shape: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def biases(
    direction: Tensor, contents: Tensor, positions: list[int], adjacent_pairs: bool, rotary_dim: int
) -> np.ndarray:
    """The bias ``b(p, kappa)`` as [pos key], computed one product at a time."""
    return np.array(
        [
            [
                SCALE * float(direction.numpy() @ matrix(p, adjacent_pairs, rotary_dim) @ content)
                for content in contents.numpy()
            ]
            for p in positions
        ]
    )


def test_energy_of_hand_worked_vectors():
    vectors = torch.tensor([[3.0, 0.0, 4.0, 0.0], [0.0, 1.0, 1.0, 1.0]])
    assert frequency_energy(vectors).tolist() == [[1.0, 0.0], pytest.approx([1 / 3, 2 / 3])]
    assert frequency_energy(vectors, adjacent_pairs=True).tolist() == [[0.36, 0.64], pytest.approx([1 / 3, 2 / 3])]
    # The last column is the energy of dimensions that are not rotated.
    assert frequency_energy(vectors, rotary_dim=2).tolist() == [[0.36, 0.64], pytest.approx([1 / 3, 2 / 3])]
    assert frequency_energy(10 * vectors).tolist() == frequency_energy(vectors).tolist()


@given(
    seed=st.integers(0, 100),
    layout=st.sampled_from([(False, 8), (True, 8), (False, 4), (True, 6)]),
    pos=st.integers(0, 1000),
)
def test_a_rotation_moves_no_energy_between_pairs(seed: int, layout: tuple[bool, int], pos: int):
    vectors = draw(3, D_HEAD, seed=seed)
    turned = vectors @ torch.from_numpy(matrix(pos, *layout)).T
    before, after = (
        frequency_energy(x, adjacent_pairs=layout[0], rotary_dim=layout[1]).numpy() for x in (vectors, turned)
    )
    np.testing.assert_allclose(before, after, atol=1e-12)
    np.testing.assert_allclose(before.sum(axis=1), 1)
    assert before.shape == (3, layout[1] // 2 + (layout[1] < D_HEAD))


@pytest.mark.parametrize("rotary_dim", [3, 0, 10])
def test_energy_refuses_what_has_none(rotary_dim: int):
    with pytest.raises(ValueError, match=f"rotary_dim is {rotary_dim}; .* from 2 to d_head = 8"):
        frequency_energy(draw(2, 8), rotary_dim=rotary_dim)
    with pytest.raises(ValueError, match="vector 1 is zero"):
        frequency_energy(torch.tensor([[1.0, 0.0], [0.0, 0.0]]))


@LAYOUTS
def test_parts_are_those_of_a_double_loop(adjacent_pairs: bool, rotary_dim: int):
    direction, contents = draw(D_HEAD, seed=1), draw(7, D_HEAD, seed=2) + 0.5
    positions = [0, 3, 4, 11, 30, 31]
    table = biases(direction, contents, positions, adjacent_pairs, rotary_dim)
    by_position, by_content = table.mean(axis=1), table.mean(axis=0)
    parts = decompose(direction, contents, torch.tensor(positions), make_rotary(adjacent_pairs, rotary_dim), SCALE)
    assert parts.total == pytest.approx(table.var(), rel=1e-12)
    assert parts.content == pytest.approx(by_content.var(), rel=1e-12)
    assert parts.position == pytest.approx(by_position.var(), rel=1e-12)
    rest = table - by_position[:, None] - by_content[None] + table.mean()
    assert parts.interaction == pytest.approx(np.square(rest).mean(), rel=1e-12)
    assert parts.total == parts.content + parts.position + parts.interaction
    assert min(parts.content, parts.position, parts.interaction) > 0.01


def test_parts_vanish_where_there_is_nothing_to_vary():
    rotary, positions = make_rotary(False, 4), torch.arange(9)
    direction, contents = draw(D_HEAD, seed=1), draw(7, D_HEAD, seed=2)
    unrotated = direction * (torch.arange(D_HEAD) >= 4)
    parts = decompose(unrotated, contents, positions, rotary, SCALE)
    assert parts.position < 1e-28
    assert parts.interaction < 1e-28
    assert parts.content == pytest.approx(float((contents @ unrotated).var(correction=0)) * SCALE**2)
    one = decompose(direction, contents[:1], positions, rotary, SCALE)
    assert (one.content, one.interaction) == (0, 0)
    assert one.position > 0.01
    there = decompose(direction, contents, positions[:1], rotary, SCALE)
    assert (there.position, there.interaction) == (0, 0)
    doubled = decompose(-2 * direction, contents, positions, rotary, SCALE)
    assert doubled.total == pytest.approx(4 * decompose(direction, contents, positions, rotary, SCALE).total)


@LAYOUTS
def test_biases_are_those_of_written_out_matrices(adjacent_pairs: bool, rotary_dim: int):
    direction, contents = draw(D_HEAD, seed=3), draw(6, D_HEAD, seed=4)
    positions, rotary = [5, 0, 39, 5, 17, 2], make_rotary(adjacent_pairs, rotary_dim)
    table = biases(direction, contents, positions, adjacent_pairs, rotary_dim)
    at = torch.tensor(positions)
    np.testing.assert_allclose(logit_bias(direction, contents, at, rotary, SCALE), np.diag(table), atol=1e-12)
    fixed = position_bias(direction, contents.mean(dim=0), rotary, at, SCALE)
    np.testing.assert_allclose(fixed, table.mean(axis=1), atol=1e-12)


@LAYOUTS
def test_token_preferences_average_positions_and_occurrences(adjacent_pairs: bool, rotary_dim: int):
    direction, contents = draw(D_HEAD, seed=3), draw(7, D_HEAD, seed=4)
    tokens, positions = [9, 4, 9, 4, 2, 9, 30], [1, 8, 22]
    by_key = biases(direction, contents, positions, adjacent_pairs, rotary_dim).mean(axis=0)
    expected = {token: by_key[[i for i, one in enumerate(tokens) if one == token]].mean() for token in (4, 9)}
    frame = token_preferences(
        direction,
        contents,
        torch.tensor(tokens),
        make_rotary(adjacent_pairs, rotary_dim),
        torch.tensor(positions),
        SCALE,
        min_count=2,
    )
    assert list(frame.columns) == ["token", "count", "mean_bias"]
    assert frame["token"].tolist() == sorted(expected, key=lambda token: -expected[token])
    assert frame["count"].tolist() == [tokens.count(token) for token in frame["token"]]
    np.testing.assert_allclose(frame["mean_bias"], [expected[token] for token in frame["token"]], atol=1e-12)


def test_half_precision_tables_are_read_as_they_are():
    """The bias is computed in double precision from the rounded cosines that a half-precision model rotates by."""
    exact = make_rotary(False, 8)
    coarse = replace(exact, cos=exact.cos.bfloat16(), sin=exact.sin.bfloat16())
    as_doubles = replace(exact, cos=coarse.cos.double(), sin=coarse.sin.double())
    arguments = (draw(D_HEAD, seed=1), draw(7, D_HEAD, seed=2), torch.arange(7))
    ours = logit_bias(*arguments, coarse, SCALE)
    assert torch.equal(ours, logit_bias(*arguments, as_doubles, SCALE))
    assert not torch.allclose(ours, logit_bias(*arguments, exact, SCALE), atol=1e-5)


def test_what_does_not_fit_is_refused(unchecked: None):
    direction, contents, rotary = draw(D_HEAD), draw(3, D_HEAD), make_rotary(False, 8)
    none = torch.tensor([], dtype=torch.long)
    with pytest.raises(ValueError, match="positions go from 0 to 40; the rotary tables have 0 to 39"):
        decompose(direction, contents, torch.arange(41), rotary, SCALE)
    with pytest.raises(ValueError, match="positions go from -1 to 2"):
        position_bias(direction, contents[0], rotary, torch.tensor([2, -1]), SCALE)
    with pytest.raises(ValueError, match="no positions"):
        decompose(direction, contents, none, rotary, SCALE)
    with pytest.raises(ValueError, match="no keys"):
        decompose(direction, contents[:0], torch.arange(3), rotary, SCALE)
    with pytest.raises(ValueError, match="2 positions for 3 keys"):
        logit_bias(direction, contents, torch.arange(2), rotary, SCALE)
    with pytest.raises(ValueError, match="2 tokens for 3 keys"):
        token_preferences(direction, contents, torch.arange(2), rotary, torch.arange(2), SCALE)


HEADS = [fl.Head(1, 3), fl.Head(0, 0), fl.Head(1, 0), fl.Head(1, 2)]
FIRST = HEADS[2]


def hugging_face_keys(directory: Any, token_lists: list[Tensor], layer: int) -> Tensor:
    """Keys before rotation [key kv_head d_head]: the output of ``k_norm`` if the model has one, else of ``k_proj``."""
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.float32)
    attention = model.model.layers[layer].self_attn
    seen: list[Tensor] = []
    made = getattr(attention, "k_norm", attention.k_proj)
    made.register_forward_hook(lambda module, inputs, output: seen.append(output))
    for tokens in token_lists:
        model(tokens[None])
    return torch.cat([one.reshape(one.shape[1], -1, attention.head_dim) for one in seen])


@pytest.mark.parametrize("name", ["llama", "llama_mha", "qwen2", "qwen3"])
def test_keys_are_what_enters_the_rotation(name: str, backend: str, load_model, checkpoint, samples):
    model = load_model(name, backend)
    prompts = [sample.prompt("gold") for sample in samples[:3]]
    token_lists = [model.encode(prompt).tokens for prompt in prompts]
    keys = collect_keys(model, prompts, HEADS)
    assert list(keys) == HEADS
    for layer in (0, 1):
        expected = hugging_face_keys(checkpoint(name), token_lists, layer)
        for head in (head for head in keys if head.layer == layer):
            read = head.head // (4 // expected.shape[1])
            torch.testing.assert_close(keys[head].contents, expected[:, read], rtol=1e-4, atol=1e-4)
            assert torch.equal(keys[head].token_ids, torch.cat(token_lists))
            assert keys[head].positions.tolist() == [i for tokens in token_lists for i in range(len(tokens))]


def test_a_draw_of_keys_is_part_of_all_of_them(backend: str, load_model, samples):
    model, prompts = load_model("llama", backend), [sample.prompt("gold") for sample in samples]
    everything = collect_keys(model, prompts, HEADS)
    lengths = [len(model.encode(prompt).tokens) for prompt in prompts]
    places = {}
    for i, position in enumerate(everything[FIRST].positions.tolist()):
        places.setdefault((position, int(everything[FIRST].token_ids[i])), []).append(i)
    some = collect_keys(model, prompts, HEADS, max_keys=sum(lengths) // 2)
    for head, keys in some.items():
        assert keys.contents.shape == (sum(lengths) // 2, 16)
        for content, token, position in zip(keys.contents, keys.token_ids, keys.positions, strict=True):
            candidates = everything[head].contents[places[int(position), int(token)]]
            assert (candidates - content).abs().amax(dim=1).min() < 1e-5
    # About half of each prompt's keys are drawn.
    drawn = np.split(some[FIRST].positions.numpy(), np.flatnonzero(np.diff(some[FIRST].positions.numpy()) < 0) + 1)
    assert [len(one) / n for one, n in zip(drawn, lengths, strict=True)] == pytest.approx([0.5] * 4, abs=0.2)
    again, other = (collect_keys(model, prompts, HEADS, max_keys=40, seed=seed) for seed in (0, 1))
    assert not torch.equal(again[FIRST].positions, other[FIRST].positions)
    (alone,) = collect_keys(model, prompts, [(0, 1)], max_keys=40, seed=0).values()
    assert torch.equal(again[FIRST].positions, alone.positions)


def test_no_pattern_is_looked_at_and_no_prompt_run_for_nothing(load_model, samples, monkeypatch):
    model = load_model("llama", "bridge")
    names: list[str] = []
    observe = model.observe

    def spy(tokens: Tensor, observers: Any) -> None:
        names.extend(name for name, _ in observers)
        observe(tokens, observers)

    monkeypatch.setattr(model, "observe", spy)
    (keys,) = collect_keys(model, [sample.prompt("gold") for sample in samples], [(2, 1)], max_keys=1).values()
    assert keys.contents.shape == (1, 16)
    assert names == ["blocks.2.attn.hook_k"]


def test_keys_need_prompts_and_heads_that_exist(load_model):
    model = load_model("llama")
    with pytest.raises(ValueError, match="0 prompts and 1 heads"):
        collect_keys(model, [], [(0, 0)])
    with pytest.raises(ValueError, match="1 prompts and 0 heads"):
        collect_keys(model, ["river"], [])
    with pytest.raises(ValueError, match=re.escape("head (0, 4) does not exist")):
        collect_keys(model, ["river"], [(0, 4)])
    with pytest.raises(ValueError, match="max_keys is 0"):
        collect_keys(model, ["river"], [(0, 0)], max_keys=0)


@pytest.mark.parametrize("name", ["llama", "llama_rope", "qwen2", "qwen3"])
def test_the_bias_is_the_change_of_the_models_own_logits(name: str, backend: str, load_model, samples):
    """Steering with plain hooks changes every logit of the lower triangle by ``alpha * b``, for any query."""
    model, prompt, alpha = load_model(name, backend), samples[0].prompt("gold"), -0.7
    directions = fl.FocusDirections(HEADS, 2 * draw(4, model.shape.d_head, seed=5, dtype=torch.float32))
    keys = collect_keys(model, [prompt], HEADS)
    tokens = model.to_tokens(prompt)
    n = tokens.shape[1]
    for layer in (0, 1):
        heads = [head for head in directions.heads if head.layer == layer]
        point = f"blocks.{layer}.attn.hook_attn_scores"
        steering = fl.FocusSteering(directions, alpha, heads=heads).hooks(model, prompt)
        plain, steered = (attention_scores(model, tokens, point, hooks) for hooks in ([], steering))
        change, seen = steered - plain, torch.ones(n, n).tril().bool()
        rotary, scale = model.backend.rotary(layer, n), model.backend.scale(layer)
        for head in heads:
            (vector,) = directions.select([head]).query
            bias = alpha * logit_bias(vector, keys[head].contents, keys[head].positions, rotary, scale)
            expected = bias[None].expand(n, n)[seen].float()
            torch.testing.assert_close(change[head.head][seen], expected, rtol=1e-3, atol=2e-3)
            assert expected.std() > 1
        others = [head for head in range(4) if (layer, head) not in heads]
        assert change[others][:, seen].abs().max() == 0


def attention_scores(model: fl.FocusModel, tokens: Tensor, point: str, hooks: Any) -> Tensor:
    kept: list[Tensor] = []

    def keep(scores: Tensor, hook: Any) -> None:
        kept.append(scores[0].clone())

    with torch.no_grad():
        model.hooked.run_with_hooks(tokens, fwd_hooks=[*hooks, (point, keep)])
    return kept[0]


def test_every_head_is_decomposed_with_its_own_keys(load_model, samples):
    model = load_model("qwen3", "bridge")
    directions = fl.FocusDirections([*HEADS, (2, 2)], draw(5, 24, seed=6, dtype=torch.float32))
    keys = collect_keys(model, [sample.prompt("gold") for sample in samples], HEADS, max_keys=30)
    frame = decompose_heads(model, directions, keys)
    assert list(zip(frame["layer"], frame["head"], strict=True)) == HEADS
    for row, (head, own) in zip(frame.to_dict("records"), keys.items(), strict=True):
        rotary = replace(model.backend.rotary(head[0], 200), key_norm=None)
        (vector,) = directions.select([head]).query
        at = [torch.full((30,), position) for position in range(int(own.positions.max()) + 1)]
        rotated = torch.stack([rotary.key(own.contents[:, None], positions)[:, 0] for positions in at])
        table = (rotated.double() @ vector.double()) / 24**0.5
        assert row["total"] == pytest.approx(float(table.var(correction=0)), rel=1e-5)
        assert row["position"] == pytest.approx(float(table.mean(dim=1).var(correction=0)), rel=1e-5)
        in_place = table[own.positions, torch.arange(30)]
        assert row["in_place"] == pytest.approx(float(in_place.var(correction=0)), rel=1e-5)
    there = decompose_heads(model, directions, keys, torch.tensor([500]))
    assert there["position"].abs().max() == 0
    assert there["in_place"].tolist() == frame["in_place"].tolist()


def test_directions_of_the_other_site_or_another_model_are_refused(load_model):
    model = load_model("llama")
    keys = collect_keys(model, ["river stone"], [(0, 0)])
    with pytest.raises(ValueError, match="'projection' site"):
        decompose_heads(model, fl.FocusDirections([(0, 0)], draw(1, 16), site="projection"), keys)
    with pytest.raises(ValueError, match="no direction for L0H0"):
        decompose_heads(model, fl.FocusDirections([(0, 1)], draw(1, 16)), keys)
    with pytest.raises(ValueError, match="d_head = 8, the model has 16"):
        decompose_heads(model, fl.FocusDirections([(0, 0)], draw(1, 8)), keys)


def test_token_preferences_can_show_the_text(load_model):
    model = load_model("llama")
    ((head, keys),) = collect_keys(model, ["river stone river", "the river"], [(0, 0)]).items()
    rotary, scale = model.backend.rotary(0, 50), model.backend.scale(0)
    frame = token_preferences(
        draw(16), keys.contents, keys.token_ids, rotary, torch.arange(50), scale, 2, tokenizer=model.tokenizer
    )
    assert len(frame) >= 2
    assert frame["text"].tolist() == [model.tokenizer.decode([token]) for token in frame["token"]]
    assert frame["mean_bias"].is_monotonic_decreasing
    assert token_preferences(draw(16), keys.contents, keys.token_ids, rotary, torch.arange(50), scale, 99).empty
    assert head == (0, 0)
