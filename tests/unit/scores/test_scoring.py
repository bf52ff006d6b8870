"""Contextual scores of patterns worked out by hand, and of models against loops over whole patterns."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any, cast

import pytest
import torch

from focuslens import (
    ContextualScores,
    Document,
    FocusModel,
    HeadAblation,
    MultiDocSample,
    SplitSoftmax,
    contextual_scores,
    contextual_scores_by_case,
)
from focuslens.scores.base import attention_to_parts
from focuslens.scores.contextual_scores import attention_pattern

KINDS = ("relevant", "irrelevant", "irrelevant_max", "sink")


def made_scores(**changes: Any) -> ContextualScores:
    """Scores of two layers with two heads for three samples. The second sample has no response."""
    relevant = torch.tensor([[[0.4, 0.1], [0.0, 0.3]], [[math.nan] * 2] * 2, [[0.2, 0.5], [0.02, 0.1]]])
    fields: dict[str, Any] = {
        "relevant": relevant,
        "irrelevant": relevant / 2,
        "irrelevant_max": relevant / 4,
        "sink": 1 - relevant,
        "case": "long",
        "sample_ids": ("a@0", "b@1", "c@2"),
        "responses": ("x", "", "y"),
        "correct": (True, False, False),
    }
    return ContextualScores(**{**fields, **changes})


# --- pure functions ---


def test_attention_is_summed_over_parts() -> None:
    pattern = torch.tensor([[[[0.1, 0.2, 0.3, 0.4], [0.5, 0.25, 0.125, 0.125]]]])  # 1 head, 2 rows, 4 keys
    parts = torch.tensor([[[1.0, 0.0], [0.0, 1.0], [0.0, 1.0], [0.0, 0.0]]])  # part 0: key 0, part 1: keys 1 and 2
    expected = torch.tensor([[[[0.1, 0.5], [0.5, 0.375]]]])
    torch.testing.assert_close(attention_to_parts(pattern, parts), expected)


def test_means_leave_out_samples_without_a_response() -> None:
    scores = made_scores()
    torch.testing.assert_close(scores.mean(), torch.tensor([[0.3, 0.3], [0.01, 0.2]]))
    torch.testing.assert_close(scores.mean("sink"), torch.tensor([[0.7, 0.7], [0.99, 0.8]]))
    assert len(scores) == 3


def test_heads_are_ranked_by_mean_relevant_score() -> None:
    scores = made_scores()
    assert scores.ranking() == [(0, 0), (0, 1), (1, 1), (1, 0)]
    assert scores.top_heads(2) == [(0, 0), (0, 1)]
    assert scores.top_heads(0) == []
    for k in (-1, 5):
        with pytest.raises(ValueError, match=f"k is {k}; the model has 4 heads"):
            scores.top_heads(k)


def test_controls_are_other_heads() -> None:
    scores = made_scores()
    assert set(scores.random_heads(2, exclude=scores.top_heads(2))) == {(1, 0), (1, 1)}
    assert scores.random_heads(3, seed=1) == scores.random_heads(3, seed=1)


def test_sparsity_counts_heads_above_each_threshold() -> None:
    above_a_fifth, above_a_tenth = made_scores().sparsity((0.21, 0.1))
    assert (above_a_fifth.count, above_a_fifth.fraction, above_a_fifth.layers) == (2, 0.5, (0, 0))
    assert (above_a_tenth.count, above_a_tenth.fraction, above_a_tenth.layers) == (3, 0.75, (0, 1))


def test_the_table_has_a_row_a_head_best_first() -> None:
    frame = made_scores().to_frame()
    assert list(frame.columns) == ["layer", "head", *KINDS]
    assert frame[["layer", "head"]].to_numpy().tolist() == [[0, 0], [0, 1], [1, 1], [1, 0]]
    assert frame["relevant"].tolist() == pytest.approx([0.3, 0.3, 0.2, 0.01])
    assert frame["irrelevant_max"].tolist() == pytest.approx([0.075, 0.075, 0.05, 0.0025])


def test_some_of_the_samples() -> None:
    chosen = made_scores().where([False, False, True], "wrong")
    assert (chosen.case, chosen.sample_ids, chosen.responses, chosen.correct) == ("wrong", ("c@2",), ("y",), (False,))
    assert torch.equal(chosen.relevant, made_scores().relevant[[2]])
    nothing = made_scores().where([False] * 3, "wrong")
    assert nothing.sink.shape == (0, 2, 2)
    with pytest.raises(ValueError, match="none of the 0 samples of case 'wrong' has a response"):
        nothing.mean()


def test_means_of_nothing_are_refused() -> None:
    with pytest.raises(ValueError, match="kind is 'relvant'; it must be one of relevant, irrelevant, irrelevant_max"):
        made_scores().mean("relvant")
    unanswered = made_scores(relevant=torch.full((3, 2, 2), math.nan))
    with pytest.raises(ValueError, match="none of the 3 samples of case 'long' has a response and a relevant"):
        unanswered.ranking()


# --- on a model ---


def test_a_pattern_to_look_at_is_the_models_own(model: FocusModel, samples: list[MultiDocSample]) -> None:
    encoded = model.encode(samples[3].prompt("gold"))
    response, n = torch.tensor([40, 50]), len(encoded.tokens)
    heads, positions = [(2, 3), (0, 1), (2, 0)], [0, 30, n - 1, n, n + 1]
    seen: dict[int, torch.Tensor] = {}
    split = SplitSoftmax([(0, 1)], 0.0)
    for interventions in ([], [split]):
        hooks = [hook for one in interventions for hook in one.hooks(model, encoded)]
        observers: list[Any] = [
            (f"blocks.{i}.attn.hook_pattern", lambda w, hook, i=i: seen.update({i: w[0].detach().clone()}))
            for i in (0, 2)
        ]
        tokens = torch.cat((encoded.tokens, response))
        model.hooked.run_with_hooks(tokens[None], fwd_hooks=[*hooks, *observers])
        found = attention_pattern(
            model, samples[3].prompt("gold"), response, heads, positions, interventions=interventions
        )
        assert found.shape == (3, 5, 5)
        for place, (layer, head) in enumerate(heads):
            for i, row in enumerate(positions):
                for j, column in enumerate(positions):
                    expected = float(seen[layer][head, row, column])
                    assert float(found[place, i, j]) == pytest.approx(expected, abs=1e-5)
    ((start, end),) = encoded.spans["relevant"]
    inside = attention_pattern(model, encoded, response, [(0, 1)], range(n + 2), interventions=[split])
    torch.testing.assert_close(inside[0, n - 1 :, start:end].sum(dim=-1), torch.ones(3))
    assert inside[0, n - 2, start:end].sum() < 0.9


def by_hand(model: FocusModel, sample: MultiDocSample, case: Any, response: list[int]) -> dict[str, torch.Tensor]:
    """Scores [layer head] from equation 1, computed in loops over the whole pattern of one pass."""
    encoded = model.encode(sample.prompt(case))
    n = len(encoded.tokens)
    patterns: dict[int, torch.Tensor] = {}
    observers: list[Any] = [
        (f"blocks.{layer}.attn.hook_pattern", lambda w, hook, layer=layer: patterns.update({layer: w[0].double()}))
        for layer in range(model.shape.n_layers)
    ]
    model.observe(torch.cat((encoded.tokens, torch.tensor(response))), observers)
    scores = {kind: torch.zeros(model.shape.n_layers, model.shape.n_heads).double() for kind in KINDS}
    for layer, pattern in patterns.items():
        rows = pattern[:, n : n + len(response)]

        def mass(spans: Any, rows: torch.Tensor = rows) -> torch.Tensor:
            total = torch.zeros(rows.shape[0]).double()
            for start, end in spans:
                for row in range(rows.shape[1]):
                    total += rows[:, row, start:end].sum(dim=-1) / rows.shape[1]
            return total

        scores["relevant"][layer] = mass(encoded.spans["relevant"])
        others = [mass([span]) for span in encoded.spans["irrelevant"]]
        scores["irrelevant"][layer] = sum(others, torch.zeros(rows.shape[0]))
        scores["irrelevant_max"][layer] = torch.stack([*others, torch.zeros(rows.shape[0]).double()]).amax(dim=0)
        scores["sink"][layer] = mass([(0, 2)])
    return scores


@pytest.fixture
def model(tiny_model: FocusModel) -> FocusModel:
    return FocusModel(tiny_model.hooked, tiny_model.tokenizer, stop_strings=(), stop_tokens=())


@pytest.mark.parametrize("case", ["long", "gold", "negative"])
def test_scores_are_mean_attention_of_the_response_rows(
    model: FocusModel, samples: list[MultiDocSample], case: Any
) -> None:
    chosen = samples[:3] if case == "long" else samples[:1]
    scores = contextual_scores(model, chosen, case, max_new_tokens=3, batch_tokens=600)
    for place, sample in enumerate(chosen):
        response = model.generate(sample.prompt(case), max_new_tokens=3)
        assert scores.responses[place] == response.text
        expected = by_hand(model, sample, case, response.tokens.tolist())
        for kind in KINDS:
            found = getattr(scores, kind)[place].double()
            torch.testing.assert_close(found, expected[kind], rtol=1e-4, atol=1e-5)
    assert scores.case == case
    assert scores.sample_ids == tuple(sample.id for sample in chosen)
    assert (scores.relevant.max() > 0.01) == (case != "negative")
    assert (scores.irrelevant.max() > 0.01) == (case != "gold")


def test_given_responses_are_scored_as_they_are(model: FocusModel, samples: list[MultiDocSample]) -> None:
    texts = ["copper river", " \n", f"It is {samples[2].answers[0].upper()}."]
    scores = contextual_scores(model, samples[:3], responses=texts, batch_tokens=600)
    assert scores.responses == tuple(texts)
    assert scores.correct == (False, False, True)
    encoded = model.encode(samples[0].prompt("long"))
    tokens = model.encoder.encode_response(encoded, texts[0]).tolist()
    expected = by_hand(model, samples[0], "long", tokens)
    torch.testing.assert_close(scores.relevant[0].double(), expected["relevant"], rtol=1e-4, atol=1e-5)
    for kind in KINDS:
        assert getattr(scores, kind)[1].isnan().all()
        assert not getattr(scores, kind)[[0, 2]].isnan().any()
    assert not scores.mean().isnan().any()


def test_responses_that_are_all_empty_give_no_scores(model: FocusModel, samples: list[MultiDocSample]) -> None:
    scores = contextual_scores(model, samples[:2], "gold", responses=["", " "], batch_tokens=600)
    assert scores.relevant.isnan().all()
    assert scores.relevant.shape == (2, 3, 4)
    assert scores.correct == (False, False)


def test_batches_change_no_score(model: FocusModel, samples: list[MultiDocSample]) -> None:
    responses = ["copper", "a much longer response about the river", "stone", "the harbour"]
    alone, together = (contextual_scores(model, samples, responses=responses, batch_tokens=n) for n in (1, 600))
    for kind in KINDS:
        torch.testing.assert_close(getattr(alone, kind), getattr(together, kind), rtol=1e-4, atol=1e-5)
    generated = [contextual_scores(model, samples, max_new_tokens=4, batch_tokens=n) for n in (1, 600)]
    assert generated[0].responses == generated[1].responses


def test_scores_see_interventions(model: FocusModel, samples: list[MultiDocSample]) -> None:
    plain = contextual_scores(model, samples[:1], responses=["copper river"])
    raised = contextual_scores(
        model, samples[:1], responses=["copper river"], interventions=[SplitSoftmax([(0, 1)], 0)]
    )
    torch.testing.assert_close(raised.relevant[0, 0, 1], torch.tensor(1.0))
    assert plain.relevant[0, 0, 1] < 0.9
    torch.testing.assert_close(raised.relevant[0, 0, [0, 2, 3]], plain.relevant[0, 0, [0, 2, 3]])
    # An ablation of every head changes the response, and therefore the scores.
    silent = HeadAblation([(layer, head) for layer in range(3) for head in range(4)])
    other = contextual_scores(model, samples[:1], max_new_tokens=4, interventions=[silent])
    assert other.responses[0] == model.generate(samples[0].prompt(), [silent], max_new_tokens=4).text
    assert other.responses != contextual_scores(model, samples[:1], max_new_tokens=4).responses


def answered_with(sample: MultiDocSample, answers: tuple[str, ...], identity: str) -> MultiDocSample:
    return dataclasses.replace(sample, answers=answers, question_id=identity)


def test_cases_split_by_outcome(model: FocusModel, samples: list[MultiDocSample]) -> None:
    sample = samples[0]
    long, gold = (model.generate(sample.prompt(case), max_new_tokens=4).text for case in ("long", "gold"))
    assert long != gold
    # One sample with four different answers: in both responses, in one of them, or in neither.
    chosen = [
        answered_with(sample, (long, gold), "both"),
        answered_with(sample, (gold,), "gold alone"),
        answered_with(sample, (long,), "long alone"),
        answered_with(sample, ("nothing of the kind",), "neither"),
    ]
    by_case = contextual_scores_by_case(model, chosen, max_new_tokens=4, batch_tokens=600)
    assert {case: scores.sample_ids for case, scores in by_case.items()} == {
        "long": ("both@2", "gold alone@2", "long alone@2", "neither@2"),
        "gold": ("both@2", "gold alone@2", "long alone@2", "neither@2"),
        "correct": ("both@2",),
        "wrong": ("gold alone@2",),
    }
    assert by_case["long"].correct == (True, False, True, False)
    assert by_case["gold"].correct == (True, True, False, False)
    assert all(scores.case == case for case, scores in by_case.items())
    assert torch.equal(by_case["wrong"].relevant, by_case["long"].relevant[[1]])
    for case in ("correct", "wrong"):
        one = contextual_scores(model, chosen, case, max_new_tokens=4, batch_tokens=600)
        assert one.sample_ids == by_case[case].sample_ids
        assert torch.equal(one.relevant, by_case[case].relevant)
    given = contextual_scores(model, chosen, "correct", responses=[gold] * 4, max_new_tokens=4, batch_tokens=600)
    assert given.sample_ids == ("both@2", "gold alone@2")


def test_irrelevant_documents_may_be_none(model: FocusModel) -> None:
    sample = MultiDocSample("where?", ("here",), (Document("one", "the only one"),), 0, "q")
    scores = contextual_scores(model, [sample], responses=["copper"])
    assert not scores.irrelevant.any()
    assert not scores.irrelevant_max.any()
    assert scores.relevant.max() > 0.01


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_scored_is_refused(model: FocusModel, samples: list[MultiDocSample]) -> None:
    with pytest.raises(ValueError, match="case is 'short'; it must be one of long, gold, negative, correct, wrong"):
        contextual_scores(model, samples, cast("Any", "short"))
    with pytest.raises(ValueError, match="there are no samples to score"):
        contextual_scores(model, [])
    with pytest.raises(ValueError, match="there are 1 responses for 4 samples; give one per sample"):
        contextual_scores(model, samples, responses=["x"])
    with pytest.raises(ValueError, match="batch_tokens is 0; it must be at least 1"):
        contextual_scores(model, samples, batch_tokens=0)


# --- result files ---


@pytest.mark.parametrize("case", ["long", "correct"])
def test_a_killed_scoring_goes_on_to_the_same_scores_and_the_same_bytes(
    load_model: Any, samples: list[MultiDocSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: Any
) -> None:
    model = load_model("llama")
    answered = [dataclasses.replace(sample, answers=("e",)) for sample in samples]
    options: dict[str, Any] = {"max_new_tokens": 3, "batch_tokens": 1}
    plain = contextual_scores(model, answered, case, **options)
    whole = contextual_scores(model, answered, case, out=tmp_path / "whole.jsonl", **options)
    assert_equal(whole, plain)
    decode, fatal, decoded = FocusModel.decode, 2, list[int]()

    def dying(self: Any, *args: Any, **settings: Any) -> Any:
        decoded.append(1)
        if len(decoded) == fatal:
            raise KeyboardInterrupt
        return decode(self, *args, **settings)

    path = tmp_path / "killed.jsonl"
    with monkeypatch.context() as patch:
        patch.setattr(FocusModel, "decode", dying)
        for fatal in (2, 5, 10**6):
            decoded.clear()
            if fatal < 10**6 and (fatal <= len(samples) or case == "correct"):
                with pytest.raises(KeyboardInterrupt):
                    contextual_scores(model, answered, case, out=path, **options)
            else:
                assert_equal(contextual_scores(model, answered, case, out=path, **options), plain)
    assert path.read_bytes() == (tmp_path / "whole.jsonl").read_bytes()
    decoded.clear()
    monkeypatch.setattr(FocusModel, "decode", dying)
    assert_equal(contextual_scores(model, answered, case, out=path, **options), plain)
    assert decoded == []
    others: list[dict[str, Any]] = [{"max_new_tokens": 2}, {"interventions": [SplitSoftmax([(0, 0)], 0.1)]}]
    for changes in others:
        with pytest.raises(ValueError, match="holds results of a different run"):
            contextual_scores(model, answered, case, out=path, **{**options, **changes})


def assert_equal(one: ContextualScores, other: ContextualScores) -> None:
    for kind in KINDS:
        torch.testing.assert_close(getattr(one, kind), getattr(other, kind), rtol=0, atol=0, equal_nan=True)
    for name in ("case", "sample_ids", "responses", "correct"):
        assert getattr(one, name) == getattr(other, name)


def test_scores_of_two_samples_with_one_id_are_not_written(
    load_model: Any, samples: list[MultiDocSample], tmp_path: Path
) -> None:
    with pytest.raises(ValueError, match="occurs more than once; results are stored by id"):
        contextual_scores(load_model("llama"), [samples[0]] * 2, out=tmp_path / "s.jsonl", max_new_tokens=1)


def test_a_response_that_is_missing_is_not_generated(load_model: Any, samples: list[MultiDocSample]) -> None:
    with pytest.raises(TypeError, match="responses"):
        contextual_scores(load_model("llama"), samples[:2], responses=["river", None])  # pyright: ignore[reportArgumentType]


def test_scores_are_the_same_in_inference_mode(load_model: Any, samples: list[MultiDocSample]) -> None:
    model = load_model("llama")
    expected = contextual_scores(model, samples[:2], max_new_tokens=2)
    with torch.inference_mode():
        found = contextual_scores(model, samples[:2], max_new_tokens=2)
    assert_equal(found, expected)
