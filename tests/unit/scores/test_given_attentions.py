"""Attentions that cannot be scored are refused with the reason, and patterns by hand have the scores by hand."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import focuslens as fl
from focuslens import document_scores_from_attentions, scores_from_attentions

PROMPT = fl.EncodedPrompt(
    torch.arange(6), {"document": ((2, 3), (3, 5)), "relevant": ((2, 3),), "irrelevant": ((3, 5),)}
)
SHORT = fl.EncodedPrompt(torch.arange(4), {"document": ((1, 2),), "irrelevant": ((1, 2),)})


def pattern(rows: int, keys: int, batch: int = 1, seed: int = 0) -> Tensor:
    """A causal attention pattern of two heads."""
    logits = torch.randn(batch, 2, rows, keys, generator=torch.Generator().manual_seed(seed))
    later = torch.arange(keys) > torch.arange(rows)[:, None] + keys - rows
    return logits.masked_fill(later, -torch.inf).softmax(dim=-1)


def layers(rows: int, keys: int, batch: int = 1) -> tuple[Tensor, ...]:
    return tuple(pattern(rows, keys, batch, seed) for seed in range(3))


def steps(width: int, n: int, batch: int = 1) -> tuple[tuple[Tensor, ...], ...]:
    return (layers(width, width, batch), *(layers(1, width + 1 + step, batch) for step in range(n)))


def test_the_sums_are_those_of_loops() -> None:
    given = layers(9, 9)
    scores = scores_from_attentions(given, PROMPT, response_lengths=[2])
    for layer, values in enumerate(given):
        for head in range(2):
            rows = values[0, head, 6:8].double()
            for kind, columns in (("relevant", [2]), ("irrelevant", [3, 4]), ("sink", [0, 1])):
                expected = sum(float(row[column]) for row in rows for column in columns) / 2
                assert float(getattr(scores, kind)[0, layer, head]) == pytest.approx(expected, abs=1e-6)
    documents = document_scores_from_attentions(given, PROMPT)
    assert documents.gold == (0,)
    expected = given[1][0, 1, 6:, 3:5].sum() / 3
    assert float(documents.scores[0][1, 1, 1]) == pytest.approx(float(expected), abs=1e-6)


def test_layers_with_a_window_keep_the_last_keys() -> None:
    whole = steps(6, 3)
    cut = [tuple(values if i else values[..., -4:] for i, values in enumerate(step)) for step in whole[1:]]
    scores = scores_from_attentions((whole[0], *cut), PROMPT)
    expected = scores_from_attentions(whole, PROMPT)
    assert torch.equal(scores.relevant[:, 1:], expected.relevant[:, 1:])
    # Of the document at 3 and 4, the windows of the columns 6, 7 and 8 reach back to the columns 3, 4 and 5.
    seen = [step[0][0, :, 0, columns].sum(dim=-1) for step, columns in zip(whole[1:], ([3, 4], [4], []), strict=True)]
    torch.testing.assert_close(scores.irrelevant[0, 0], torch.stack(seen).sum(dim=0) / 3)


def test_a_response_without_rows_has_no_score() -> None:
    for given in (layers(6, 6), steps(6, 0), steps(6, 2)):
        scores = scores_from_attentions(given, PROMPT, response_lengths=[0])
        assert all(getattr(scores, kind).isnan().all() for kind in ("relevant", "irrelevant", "irrelevant_max", "sink"))


def test_prompts_of_a_generation_are_padded_on_the_left() -> None:
    given = steps(6, 2, batch=2)
    together = scores_from_attentions(given, [PROMPT, SHORT])
    for step in given[1:]:
        assert step[0].shape[0] == 2
    expected = torch.stack([step[2][1, :, 0, 3] for step in given[1:]]).mean(dim=0)
    torch.testing.assert_close(together.irrelevant[1, 2], expected)
    mask = torch.tensor([[1] * 6, [0, 0, 1, 1, 1, 1]])
    again = scores_from_attentions(given, [PROMPT, SHORT], attention_mask=mask)
    assert torch.equal(together.irrelevant, again.irrelevant)


def without(given: Any, step: int, layer: int) -> Any:
    changed = [list(one) for one in given]
    changed[step][layer] = None
    return changed


CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "none": (None, {}, r"attentions is None; .*attn_implementation='eager'"),
    "empty": ((), {}, r"attentions is \(\); .*Fused attention"),
    "layers of none": ((None, None), {}, r"layer 0 of attentions is None; .*Fused attention"),
    "a step of none": (without(steps(6, 2), 1, 2), {}, r"step 1, layer 2 of attentions is None"),
    "an empty step": (((), ()), {}, r"step 0, attentions is \(\)"),
    "three axes": (tuple(one[0] for one in layers(8, 8)), {}, r"layer 0 of attentions has the shape \(2, 8, 8\)"),
    "beams": (steps(6, 2, batch=4), {}, "has 4 rows in its batch, and there are 1 prompts; .*Beams"),
    "other heads": ((pattern(8, 8), pattern(8, 8)[:, :1]), {}, r"the first layer has \(1, 2, 8\)"),
    "logits": (tuple(5 * one - 2 for one in layers(8, 8)), {}, "must be probabilities after the softmax"),
    "a cache": (layers(1, 8), {}, "1 rows and 8 keys for 1 tokens; the pass ran over a cache"),
    "a static cache": ((layers(6, 6), layers(1, 32)), {}, "step 1, layer 0 .* a static cache"),
    "assisted": ((layers(6, 6), layers(2, 8)), {}, "step 1 of attentions has 2 rows"),
    "too short": (layers(5, 5), {}, r"prompt 0 has 6 tokens, and the model was given 5 .*Check the BOS token"),
    "too long": (steps(7, 2), {}, "prompt 0 has 6 tokens, and the model was given 7 in its row; it must be as many"),
    "other tokens": (layers(8, 8), {"input_ids": torch.ones(1, 8).long()}, "are not those in input_ids"),
    "long lengths": (steps(6, 2), {"response_lengths": [3]}, r"response_lengths\[0\] is 3, .*one token more"),
    "negative lengths": (steps(6, 2), {"response_lengths": [-1]}, r"response_lengths\[0\] is -1"),
    "many lengths": (steps(6, 2), {"response_lengths": [1, 1]}, "there are 2 response_lengths for 1 prompts"),
    "mask": (layers(8, 8), {"attention_mask": torch.ones(1, 3)}, r"attention_mask has the shape \(1, 3\)"),
    "right": (
        steps(7, 2),
        {"attention_mask": torch.tensor([[1, 1, 1, 1, 1, 1, 0]])},
        "prompt 0 is padded on the right, .*padding_side = 'left'",
    ),
    "samples": (layers(8, 8), {"samples": []}, "there are 0 samples for 1 prompts"),
    "responses": (layers(8, 8), {"responses": ["a", "b"]}, "there are 2 responses for 1 prompts"),
}


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize("name", CASES)
def test_what_cannot_be_scored_is_named(name: str) -> None:
    attentions, settings, message = CASES[name]
    with pytest.raises(ValueError, match=message):
        scores_from_attentions(attentions, PROMPT, **settings)


@pytest.mark.usefixtures("unchecked")
def test_prompts_that_cannot_be_scored_are_named() -> None:
    with pytest.raises(ValueError, match="several prompts in one pass; give the attention_mask"):
        scores_from_attentions(layers(8, 8, batch=2), [PROMPT, SHORT])
    with pytest.raises(TypeError, match="a prompt is no EncodedPrompt, so its tokens are unknown; pass tokenizer="):
        scores_from_attentions(layers(8, 8), "a text")
    bare = fl.EncodedPrompt(torch.arange(6), {})
    with pytest.raises(ValueError, match="prompt 0 has no span 'document'"):
        document_scores_from_attentions(layers(8, 8), bare)
