"""Changes of attention by both parts of a direction, against the patterns of the steered model."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import focuslens as fl

HEADS = [(2, 3), (0, 1), (2, 0)]


@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("site", ["rotary", "projection"])
def test_changes_are_those_of_the_steered_patterns(load_model: Any, samples: Any, site: Any, rank: int) -> None:
    tiny = load_model("llama")
    model = fl.FocusModel(tiny.hooked, tiny.tokenizer, stop_strings=(), stop_tokens=())
    generator = torch.Generator().manual_seed(0)
    query, key = (torch.randn(3, 16, generator=generator) for _ in range(2))
    u, v = (torch.randn(3, 16, 2, generator=generator) / 3 for _ in range(2))
    parts: dict[str, Any] = {"u": u, "v": v} if rank else {}
    made = fl.FocusDirections(HEADS, query, key if site == "projection" else None, site, **parts)
    constant = fl.FocusDirections(HEADS, query, made.key, site)
    chosen = [sample for sample in samples if sample.gold_index is not None][:2]
    table = fl.attention_shift(model, chosen, made, 0.5, max_new_tokens=3)
    assert list(table.columns) == ["layer", "head", "part", "before", "constant", "question"]
    assert len(table) == 12
    torch.testing.assert_close(
        torch.tensor(table.groupby(["layer", "head"], sort=False)["before"].sum().to_numpy()), torch.ones(3).double()
    )
    for layer, head in HEADS:
        rows = table[(table["layer"] == layer) & (table["head"] == head)].set_index("part")
        own = [[], [fl.FocusSteering(constant, 0.5, [(layer, head)])], [fl.FocusSteering(made, 0.5, [(layer, head)])]]
        before, shifted, both = (attention(model, chosen, interventions, layer, head) for interventions in own)
        for i, part in enumerate(("sink", "relevant", "irrelevant")):
            before_, constant_, question_ = (float(x) for x in rows.loc[part, ["before", "constant", "question"]])
            assert before_ == pytest.approx(float(before[i]), abs=1e-5)
            assert constant_ == pytest.approx(float(shifted[i] - before[i]), abs=1e-5)
            assert question_ == pytest.approx(float(both[i] - shifted[i]), abs=1e-5)
        assert bool((rows["question"].abs() > 1e-4).any()) == (rank > 0)


def attention(model: fl.FocusModel, samples: Any, interventions: Any, layer: int, head: int) -> torch.Tensor:
    """Mean attention of the response rows of one head to the sink, the gold document, and the other documents."""
    means: list[torch.Tensor] = []
    for sample in samples:
        prompt = model.encode(sample.prompt())
        response = model.generate(sample.prompt("gold"), max_new_tokens=3).tokens
        seen: list[torch.Tensor] = []
        name = f"blocks.{layer}.attn.hook_pattern"
        observer: Any = (name, lambda x, hook, seen=seen: seen.append(x[0, head].clone()))
        tokens = torch.cat((prompt.tokens, response))
        model.observe(tokens, [observer], interventions)
        rows = seen[0][len(prompt.tokens) :].mean(dim=0)
        documents = [
            sum(float(rows[a:b].sum()) for a, b in prompt.spans.get(part, ())) for part in ("relevant", "irrelevant")
        ]
        means.append(torch.tensor([float(rows[:2].sum()), *documents]))
    return torch.stack(means).mean(dim=0)


def test_samples_without_a_gold_document_are_refused(load_model: Any, samples: Any) -> None:
    model = load_model("llama")
    without = fl.MultiDocSample("q", ("a",), samples[0].documents, None)
    made = fl.FocusDirections(HEADS, torch.zeros(3, 16))
    with pytest.raises(ValueError, match="no sample has a gold document and a response"):
        fl.attention_shift(model, [without], made)
