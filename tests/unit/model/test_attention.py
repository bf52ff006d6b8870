"""Tensor functions of the attention engine against a direct computation of attention."""

from __future__ import annotations

import pytest
import torch
from einops import repeat

from focuslens.model.attention import (
    LayerCache,
    Segment,
    attend_causally,
    attend_explicitly,
    row_blocks,
    trim,
    visible_keys,
)

CPU = torch.device("cpu")


def random(*shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(sum(shape)), dtype=torch.float64)


def written_out(q, k, v, visible, scale):
    """The output ``softmax(q k^T * scale) v``, with ``q [batch row head d]`` and one ``k`` and ``v`` per query head."""
    logits = torch.einsum("brhd,bkhd->bhrk", q, k) * scale
    return torch.einsum("bhrk,bkhd->brhd", logits.masked_fill(~visible, -torch.inf).softmax(-1), v)


def inputs(batch=2, n_keys=11, n_rows=11, group=3, kv=2, d=4):
    q = random(batch, n_rows, kv * group, d)
    k, v = random(batch, n_keys, kv, d), random(batch, n_keys + 1, kv, d)[:, 1:]
    ours = LayerCache()
    ours.append(k, v)
    k, v = (repeat(x, "b key kv d -> b key (kv group) d", group=group) for x in (k, v))
    return q, ours.segments, k, v


@pytest.mark.parametrize("window", [None, 1, 4, 30])
@pytest.mark.parametrize("padding", [None, (0, 0), (0, 5), (3, 11)])
def test_prompts_through_the_kernel_are_attention_written_out(window, padding):
    q, (segment,), k, v = inputs()
    left = torch.tensor(padding or (0, 0))
    mask = (torch.arange(11) >= left[:, None]).long()
    expected = written_out(q, k, v, visible_keys(11, 11, mask, window, CPU), 0.3)
    z = attend_causally(q, segment, padding, window, 0.3)
    for i, start in enumerate(left.tolist()):
        torch.testing.assert_close(z[i, start:], expected[i, start:])
        assert (z[i, :start] == 0).all()


@pytest.mark.parametrize("pieces", [(11,), (4, 6, 1)])
def test_rows_over_several_segments_are_attention_written_out(pieces):
    q, (segment,), k, v = inputs(n_rows=3)
    cut = zip(segment.keys.split(pieces, dim=2), segment.values.split(pieces, dim=2), strict=True)
    visible = visible_keys(3, 11, None, None, CPU)
    z = attend_explicitly(q, [Segment(*one) for one in cut], visible, 0.3)
    torch.testing.assert_close(z, written_out(q, k, v, visible, 0.3))


def test_copies_share_the_keys_of_their_prompt():
    _, (segment,), k, v = inputs(batch=2, n_rows=2)
    copies = random(6, 2, 6, 4)
    shared, own = segment._replace(copies=3), LayerCache((segment._replace(copies=3),))
    new_k, new_v = random(6, 2, 2, 4), random(6, 2, 2, 4) + 1
    own.append(new_k, new_v)
    assert own.segments[0].keys.data_ptr() == segment.keys.data_ptr()
    visible = visible_keys(2, 13, None, None, CPU)
    k, v = (repeat(x, "b key h d -> (b copy) key h d", copy=3) for x in (k, v))
    new_k, new_v = (repeat(x, "b key kv d -> b key (kv group) d", group=3) for x in (new_k, new_v))
    expected = written_out(copies, torch.cat((k, new_k), 1), torch.cat((v, new_v), 1), visible, 0.5)
    torch.testing.assert_close(attend_explicitly(copies, own.segments, visible, 0.5), expected)
    assert LayerCache((segment,)).shared(3).segments[0].copies == shared.copies
    assert LayerCache((shared,)).shared(2).segments[0].copies == 6


def test_what_is_seen_can_be_changed():
    q, segments, k, v = inputs(n_rows=2)
    visible = visible_keys(2, 11, None, None, CPU)
    seen = {}

    def keep(name, change):
        def hook(tensor):
            seen[name] = tensor
            return change(tensor)

        return hook

    z = attend_explicitly(q, segments, visible, 0.3, keep("scores", lambda s: s * 2), keep("pattern", lambda p: p * 3))
    assert seen["scores"].shape == seen["pattern"].shape == (2, 6, 2, 11)
    assert seen["scores"][0, 0, 0, 10] == -torch.inf
    torch.testing.assert_close(z, 3 * written_out(q, k, v, visible, 0.6))
    nothing = attend_explicitly(q, segments, visible, 0.3, lambda s: torch.full_like(s, -torch.inf))
    assert (nothing == 0).all()


def test_half_precision_rows_are_computed_in_float32():
    q, segments, k, v = inputs(n_rows=2)
    half = [part._replace(keys=part.keys.bfloat16(), values=part.values.bfloat16()) for part in segments]
    dtypes = []
    z = attend_explicitly(q.bfloat16(), half, None, 0.3, None, lambda p: dtypes.append(p.dtype) or p)
    assert (z.dtype, dtypes) == (torch.bfloat16, [torch.float32])
    every = torch.ones(1, 1, 2, 11, dtype=torch.bool)
    rounded_q, rounded_k, rounded_v = (x.bfloat16().double() for x in (q, k, v))
    exact = written_out(rounded_q, rounded_k, rounded_v, every, 0.3)
    torch.testing.assert_close(z.double(), exact, rtol=2**-8, atol=1e-6)


def test_a_cache_that_grows_leaves_the_one_it_came_from_alone():
    one = LayerCache()
    one.append(random(1, 300, 2, 4), random(1, 300, 2, 4))
    before = one.segments
    other = one.shared(1)
    for _ in range(3):
        other.append(random(1, 1, 2, 4), random(1, 1, 2, 4))
    assert one.segments == before
    assert (one.columns, other.columns) == (300, 303)
    # A long segment is not copied to append a token.
    assert [part.columns for part in other.segments] == [300, 3]


def test_trim_and_blocks_by_hand(monkeypatch):
    parts = [Segment(random(1, 1, n, 2), random(1, 1, n, 2)) for n in (3, 4)]
    assert [[part.columns for part in trim(parts, n)] for n in (2, 3, 5, 7)] == [[2], [3], [3, 2], [3, 4]]
    monkeypatch.setattr("focuslens.model.attention.BLOCK", 20)
    assert row_blocks(7, 10) == [(0, 2), (2, 4), (4, 6), (6, 7)]
    assert row_blocks(2, 100) == [(0, 1), (1, 2)]


def test_visible_keys_by_hand():
    mask = torch.tensor([[0, 1, 1, 1]])
    padded = visible_keys(4, 4, mask, None, CPU)[0, 0].int().tolist()
    assert padded == [[1, 0, 0, 0], [0, 1, 0, 0], [0, 1, 1, 0], [0, 1, 1, 1]]
    last_two = visible_keys(2, 4, None, 2, CPU)[0, 0].int().tolist()
    assert last_two == [[0, 1, 1, 0], [0, 0, 1, 1]]
