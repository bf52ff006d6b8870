"""Products with shared keys and values that are written to where they are needed, against sums in double precision."""

from __future__ import annotations

from itertools import product
from typing import Any

import pytest
import torch

from focuslens.model import lean_products
from focuslens.model.attention import Segment
from focuslens.model.lean_attention import Tail
from focuslens.model.lean_products import Part, Scratch, written_mixture, written_products

SIZES = [*product((1, 2), (1, 3), (1, 2), (1, 3))]
"""Prompts, copies, key-value heads and query heads per key-value head."""


def parts_of(prompts: int, copies: int, kv: int, d_head: int, dtype: torch.dtype) -> list[Part]:
    """Columns of prompts, columns that two rows of a prompt share if there are any, and columns of single rows."""
    generator = torch.Generator().manual_seed(1)
    shared = [(prompts, copies, 7), (prompts, copies, 3), (prompts * copies, 1, 2)]
    made = []
    for n, times, columns in shared:
        keys, values = (torch.randn(n * kv, columns, d_head, generator=generator).to(dtype) for _ in range(2))
        made.append(Part(keys.mT, values, n, times))
    return made


def whole(parts: list[Part], kv: int, name: str) -> torch.Tensor:
    """Keys or values of all columns in double precision, ``[row kv column d_head]``."""
    tensors = [part.keys.mT if name == "keys" else part.values for part in parts]
    by_row = [
        x.double().view(part.prompts, kv, *x.shape[1:]).repeat_interleave(part.copies, dim=0)
        for x, part in zip(tensors, parts, strict=True)
    ]
    return torch.cat(by_row, dim=2)


@pytest.mark.parametrize("calls", [0, 16])
@pytest.mark.parametrize("d_head", [4, 20])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("prompts", "copies", "kv", "group"), SIZES)
def test_products_and_mixtures_are_sums_over_all_columns(
    prompts: int, copies: int, kv: int, group: int, dtype: Any, d_head: int, calls: int, monkeypatch: Any
) -> None:
    monkeypatch.setattr(lean_products, "_CALLS", calls)
    parts, rows = parts_of(prompts, copies, kv, d_head, dtype), prompts * copies
    queries = torch.randn(rows * kv, group, d_head, generator=torch.Generator().manual_seed(2))
    scratch = Scratch()
    for _ in range(2):  # the second time, the memory holds other numbers
        scores = written_products(scratch, queries, parts, kv)
        expected = torch.einsum("rkgd,rknd->rkgn", queries.view(rows, kv, group, -1).double(), whole(parts, kv, "keys"))
        torch.testing.assert_close(scores.double(), expected.flatten(1, 2).unsqueeze(2), atol=1e-5, rtol=1e-5)
        weights = torch.softmax(scores, dim=-1, out=scores).view(rows * kv, group, -1)
        mixed = written_mixture(weights, parts, kv)
        of_values = torch.einsum("rkgn,rknd->rkgd", expected.softmax(dim=-1), whole(parts, kv, "values"))
        torch.testing.assert_close(mixed.double(), of_values.flatten(0, 1), atol=1e-5, rtol=1e-5)
        scratch.take(scores, (rows * kv * group * 12,)).fill_(torch.nan)


def test_memory_is_used_again_and_renewed_for_more_numbers_and_other_types() -> None:
    scratch, like = Scratch(), torch.empty(0)
    first = scratch.take(like, (3, 100))
    assert scratch.take(like, (2, 50)).data_ptr() == first.data_ptr()
    assert scratch.take(like, (3, 105)).data_ptr() == first.data_ptr()  # of the next passes
    assert scratch.take(like, (3, 200)).shape == (3, 200)
    assert scratch.take(like.double(), (3, 2)).dtype == torch.float64


def test_products_are_written_to_their_places_and_not_copied(monkeypatch: Any) -> None:
    def refuse(*arguments: Any, **named: Any) -> None:
        raise AssertionError("products were made elsewhere")

    monkeypatch.setattr(lean_products, "products", refuse)
    monkeypatch.setattr(lean_products, "mixed", refuse)
    parts = parts_of(2, 3, 2, 20, torch.float32)
    scores = written_products(Scratch(), torch.randn(12, 2, 20), parts, 2)
    assert scores.shape == (6, 4, 1, 12)
    assert written_mixture(scores.view(12, 2, 12), parts, 2).shape == (12, 2, 20)


def test_queries_can_lie_in_memory_in_any_order() -> None:
    parts, queries = parts_of(2, 3, 1, 20, torch.float32), torch.randn(3, 20, 6).permute(2, 0, 1)
    scores = written_products(Scratch(), queries, parts, 1)
    torch.testing.assert_close(scores, written_products(Scratch(), queries.contiguous(), parts, 1))


def test_scores_that_a_hook_returned_are_left_as_they_are() -> None:
    kept: list[torch.Tensor] = []

    def averaged(scores: torch.Tensor) -> torch.Tensor:
        kept.append(scores.mean(dim=1, keepdim=True).expand_as(scores))
        return kept[-1]

    generator = torch.Generator().manual_seed(3)
    shared = [torch.randn(1, 2, 9, 4, generator=generator) for _ in range(2)]
    tail = Tail([Segment(*shared, copies=3)], 4, 0.5, {"hook_attn_scores": [averaged]})
    q, k, v = (torch.randn(3, 2, 4, generator=generator) for _ in range(3))
    z = tail.attend(q, k, v)
    keys, values = (
        torch.cat((x.expand(3, -1, -1, -1), y.unsqueeze(2)), dim=2) for x, y in zip(shared, (k, v), strict=True)
    )
    scores = torch.einsum("rhd,rhnd->rhn", q * 0.5, keys).mean(dim=1, keepdim=True).expand(-1, 2, -1)
    torch.testing.assert_close(kept[0].squeeze(2), scores)
    torch.testing.assert_close(z, torch.einsum("rhn,rhnd->rhd", scores.softmax(dim=-1), values))
