"""Activations that training reads from a forward pass, against loops and against the model's attention pattern."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from focuslens import FocusModel, MultiDocSample
from focuslens.directions.activations import LayerHeads, capture_rows, measured_scores, row_scores


@pytest.mark.parametrize("window", [None, 1, 3, 100])
def test_row_scores_are_the_mean_mass_on_the_span(window: int | None) -> None:
    generator = torch.Generator().manual_seed(0)
    queries = torch.randn(3, 2, 4, generator=generator, dtype=torch.float64)
    keys = torch.randn(9, 2, 4, generator=generator, dtype=torch.float64)
    rows, span, scale = [5, 7, 8], {0, 4, 6, 7}, 0.37
    expected: list[float] = []
    for head in range(2):
        masses: list[float] = []
        for place, row in enumerate(rows):
            first = 0 if window is None else max(0, row - window + 1)
            weights = {
                key: math.exp(scale * sum(float(queries[place, head, d] * keys[key, head, d]) for d in range(4)))
                for key in range(first, row + 1)
            }
            masses.append(sum(w for key, w in weights.items() if key in span) / sum(weights.values()))
        expected.append(sum(masses) / len(masses))
    relevant = torch.tensor([key in span for key in range(9)])
    result = row_scores(queries, keys, torch.tensor(rows), relevant, scale, window)
    assert result.tolist() == pytest.approx(expected, abs=1e-12)
    assert (len({round(score, 6) for score in expected}) == 1) == (window == 1)


def test_chosen_heads_are_grouped_by_layer_with_the_keys_they_read(load_model: Any) -> None:
    model: FocusModel = load_model("llama")  # 4 query heads: heads 0 and 1 read key-value head 0, heads 2 and 3 head 1
    heads = [(2, 3), (0, 1), (2, 0), (2, 2), (1, 3)]
    assert LayerHeads.group(heads, model.shape) == [
        LayerHeads(layer=0, heads=(1,), places=(1,), key_value_heads=(0,), reads=(0,)),
        LayerHeads(layer=1, heads=(3,), places=(4,), key_value_heads=(1,), reads=(0,)),
        LayerHeads(layer=2, heads=(3, 0, 2), places=(0, 2, 3), key_value_heads=(0, 1), reads=(1, 0, 1)),
    ]


@pytest.mark.parametrize("name", ["llama", "qwen3", "mistral_window"])
def test_captured_rows_give_the_scores_the_model_makes(
    name: str, backend: str, load_model: Any, samples: list[MultiDocSample]
) -> None:
    model: FocusModel = load_model(name, backend)
    prompt, response = model.encode(samples[2].prompt("long")), torch.tensor([40, 50, 60])
    groups = LayerHeads.group([(1, 2), (0, 3), (1, 0)], model.shape)
    captured = capture_rows(model, prompt, response, groups, "rotary")
    n = len(prompt.tokens)
    ((start, end),) = prompt.spans["relevant"]
    assert captured.rows.tolist() == [n, n + 1, n + 2]
    assert captured.relevant.nonzero().flatten().tolist() == list(range(start, end))
    assert {layer: tuple(q.shape) for layer, q in captured.queries.items()} == {
        0: (3, 1, model.shape.d_head),
        1: (3, 2, model.shape.d_head),
    }
    assert captured.nbytes == 4 * model.shape.d_head * (3 * (1 + 2) + (n + 3) * (1 + 2))

    # The reference sums the patterns seen at hook_pattern in a loop.
    seen: dict[int, torch.Tensor] = {}

    def keep(layer: int) -> Any:
        def observe(pattern: torch.Tensor, hook: Any) -> None:
            seen[layer] = pattern[0].clone()

        return observe

    model.observe(torch.cat((prompt.tokens, response)), [(f"blocks.{i}.attn.hook_pattern", keep(i)) for i in (0, 1)])
    by_measurement = measured_scores(model, prompt, response, groups)
    for group in groups:
        scores = row_scores(
            captured.queries[group.layer], captured.keys[group.layer][:, list(group.reads)], captured.rows,
            captured.relevant, model.backend.scale(group.layer), model.backend.window(group.layer),
        )  # fmt: skip
        for place, head in enumerate(group.heads):
            expected = sum(float(seen[group.layer][head, row, start:end].sum()) for row in range(n, n + 3)) / 3
            assert float(scores[place]) == pytest.approx(expected, abs=1e-5)
            assert float(by_measurement[group.layer][place]) == pytest.approx(expected, abs=1e-6)
    assert any(float(scores.max()) > 1e-3 for scores in by_measurement.values())


def test_captured_rows_differ_by_site(load_model: Any, samples: list[MultiDocSample]) -> None:
    model: FocusModel = load_model("llama")
    prompt, response = model.encode(samples[3].prompt("gold")), torch.tensor([40])
    groups = LayerHeads.group([(1, 2)], model.shape)
    rotary, projection = (capture_rows(model, prompt, response, groups, site) for site in ("rotary", "projection"))
    turned = model.backend.rotary(1, len(prompt.tokens) + 1).query(projection.queries[1], rotary.rows)
    torch.testing.assert_close(turned, rotary.queries[1], rtol=1e-4, atol=1e-4)
    assert not torch.allclose(projection.queries[1], rotary.queries[1], atol=0.1)


def test_an_empty_response_is_refused(load_model: Any, samples: list[MultiDocSample]) -> None:
    model: FocusModel = load_model("llama")
    prompt = model.encode(samples[3].prompt("gold"))
    with pytest.raises(ValueError, match="the response has no tokens"):
        capture_rows(model, prompt, torch.zeros(0, dtype=torch.long), LayerHeads.group([(0, 0)], model.shape), "rotary")
