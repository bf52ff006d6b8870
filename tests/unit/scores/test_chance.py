"""The chance level against loops over token positions, and heads whose attention is even."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

import focuslens as fl
from focuslens import ContextualScores, FocusModel, MultiDocSample
from focuslens.evaluation import DocumentScores
from focuslens.model.engine import Forgetting
from focuslens.prompts.batch import EncodedPrompt
from focuslens.scores.base import sink_and_documents
from focuslens.scores.chance import even_attention, even_masses, response_windows
from tests.support.checkpoints import WINDOW

KINDS = ("relevant", "irrelevant", "irrelevant_max", "sink")
RESPONSES = ("The silver lantern", "queen 42.", "naïve señor of the winter harbour bridge", "x")


def even_share(spans: Any, rows: range, window: int | None = None) -> float:
    """Share of even attention, summed key by key: each of a row's visible keys has the same weight."""
    members = {position for start, end in spans for position in range(start, end)}
    total = 0.0
    for row in rows:
        visible = [key for key in range(row + 1) if window is None or key > row - window]
        total += sum(1.0 for key in visible if key in members) / len(visible)
    return total / len(rows)


def by_loop(
    model: FocusModel, sample: MultiDocSample, case: Any, response: str, window: int | None
) -> dict[str, float]:
    """Scores of even attention, computed key by key."""
    prompt = model.encode(sample.prompt(case))
    n = len(prompt.tokens)
    rows = range(n, n + len(model.encoder.encode_response(prompt, response)))
    others = [even_share([span], rows, window) for span in prompt.spans["irrelevant"]]
    return {
        "relevant": even_share(prompt.spans["relevant"], rows, window),
        "irrelevant": sum(others),
        "irrelevant_max": max(others, default=0.0),
        "sink": even_share([(0, 2)], rows, window),
    }


def without_chance(scores: ContextualScores) -> ContextualScores:
    return dataclasses.replace(scores, chance=None)


# --- pure functions ---


@pytest.mark.parametrize("window", [None, 1, 4, 9, 50])
@pytest.mark.parametrize("rows", [range(3, 8), range(9, 10), range(10, 31)])
def test_even_masses_are_shares_of_the_visible_keys(window: int | None, rows: range) -> None:
    spans = [[(0, 2)], [(2, 5), (7, 8)], [(9, 10)], []]
    parts = torch.zeros(10, len(spans))
    for part, ranges in enumerate(spans):
        for start, end in ranges:
            parts[start:end, part] = 1
    found = even_masses(parts, torch.tensor(list(rows)), [None, window])
    for layer, limit in enumerate((None, window)):
        for part, ranges in enumerate(spans):
            assert float(found[layer, part]) == pytest.approx(even_share(ranges, rows, limit), abs=1e-6)


def test_measures_of_scores_made_by_hand() -> None:
    # One layer of two heads. Even attention gives the documents 0.2 and 0.6, and the other tokens 0.2.
    relevant, irrelevant = torch.tensor([[[0.3, 0.1]]]), torch.tensor([[[0.1, 0.3]]])
    chance = torch.tensor([[[0.2, 0.6, 0.4, 0.05]]])
    scores = ContextualScores(
        relevant, irrelevant, irrelevant / 2, 1 - relevant, "long", ("a",), ("x",), (True,), chance
    )
    expected = {
        "score": (0.3, 0.1),
        "chance": (0.2, 0.2),
        "excess": (0.1, -0.1),
        # Each head gives the documents 0.4, of whose tokens a quarter are relevant.
        "document_chance": (0.1, 0.1),
        "document_excess": (0.2, 0.0),
    }
    for by, values in expected.items():
        assert scores.measured("relevant", by)[0, 0].tolist() == pytest.approx(values, abs=1e-6)  # pyright: ignore[reportArgumentType]
        assert scores.mean(by=by)[0].tolist() == pytest.approx(values, abs=1e-6)  # pyright: ignore[reportArgumentType]
    assert scores.excess("sink")[0, 0].tolist() == pytest.approx([0.65, 0.85])
    assert scores.measured("irrelevant", "document_excess")[0, 0].tolist() == pytest.approx([-0.2, 0.0], abs=1e-6)
    assert scores.even_share() == pytest.approx({"row": 0.2, "documents": 0.25})
    assert [row.count for row in scores.sparsity((0.05,), by="excess")] == [1]
    frame = scores.to_frame()
    assert list(frame.columns) == ["layer", "head", *KINDS, "chance", "excess", "document_excess"]
    assert frame["document_excess"].tolist() == pytest.approx([0.2, 0.0], abs=1e-6)
    assert "document excess" in scores._repr_html_()


def test_the_order_by_excess_can_differ_from_the_order_by_score() -> None:
    # Layer 0 sees the whole prompt, and layer 1 the half of it without most of the relevant document.
    relevant = torch.tensor([[[0.3, 0.05], [0.25, 0.02]]])
    chance = torch.zeros(1, 2, 4)
    chance[0, :, 0] = torch.tensor([0.28, 0.1])
    rest = torch.zeros_like(relevant)
    scores = ContextualScores(relevant, rest, rest, rest, "long", ("a",), ("x",), (True,), chance)
    assert scores.ranking() == [(0, 0), (1, 0), (0, 1), (1, 1)]
    assert scores.ranking("excess") == [(1, 0), (0, 0), (1, 1), (0, 1)]
    assert scores.top_heads(1, by="excess") == [(1, 0)]
    assert scores.top_heads(1) == [(0, 0)]


def test_samples_without_a_score_have_no_excess_and_do_not_count() -> None:
    relevant = torch.tensor([0.4, math.nan]).reshape(2, 1, 1)
    rest = torch.tensor([0.2, 0.6]).reshape(2, 1, 1)
    chance = torch.tensor([[0.1, 0.3, 0.2, 0.1], [0.0, 0.9, 0.5, 0.1]])[:, None]
    scores = ContextualScores(relevant, rest, rest, rest, "long", ("a", "b"), ("x", "y"), (True, True), chance)
    assert scores.excess().flatten().isnan().tolist() == [False, True]
    assert float(scores.mean(by="chance")) == pytest.approx(0.1)
    assert float(scores.mean(by="excess")) == pytest.approx(0.3)
    assert scores.even_share() == pytest.approx({"row": 0.1, "documents": 0.25})
    # Without a gold document, all of the documents' attention is on the irrelevant ones.
    assert scores.measured("irrelevant", "document_excess")[1].item() == pytest.approx(0.0, abs=1e-6)
    assert without_chance(scores).even_share() is None
    chosen = scores.where([False, True], "wrong")
    assert chosen.chance is not None
    assert torch.equal(chosen.chance, chance[[1]])


@pytest.mark.usefixtures("unchecked")
def test_what_cannot_be_measured_is_refused(load_model: Any, samples: list[MultiDocSample]) -> None:
    scores = fl.contextual_scores(load_model("llama"), samples[:1], responses=["x"])
    with pytest.raises(ValueError, match="by is 'gain'; it must be one of score, chance, excess, document_chance"):
        scores.mean(by="gain")  # pyright: ignore[reportArgumentType]
    with pytest.raises(ValueError, match="'document_excess' is of documents, and the sink is none; use 'excess'"):
        scores.measured("sink", "document_excess")
    with pytest.raises(ValueError, match=r"'excess' needs the chance level.*scores.with_chance\(model, samples\)"):
        without_chance(scores).excess()
    with pytest.raises(ValueError, match="1 of 1 scored samples are not in samples, such as 'q0@2'"):
        scores.with_chance(load_model("llama"), samples[1:])
    by_document = dataclasses.replace(fl.document_scores(load_model("llama"), samples[:1], max_new_tokens=1), chance=())
    with pytest.raises(ValueError, match="'excess' needs the chance level"):
        by_document.of([(0, 0)], by="excess")


# --- prompts of models, with and without a chat template and windows ---


@pytest.mark.parametrize(
    ("name", "case", "window"),
    [("llama", case, None) for case in ("long", "gold", "negative")]
    + [("llama_chat", "long", None), ("mistral_window", "long", WINDOW)],
)
def test_chance_is_that_of_a_loop_over_positions(
    name: str, case: Any, window: int | None, load_model: Any, samples: list[MultiDocSample]
) -> None:
    model = load_model(name)
    expected = [by_loop(model, *pair, window) for pair in zip(samples, [case] * 4, RESPONSES, strict=True)]
    assert len({len(model.encode(sample.prompt(case)).tokens) for sample in samples}) > 2  # so that batches are padded
    for batch_tokens in (1, 600):
        scores = fl.contextual_scores(model, samples, case, responses=RESPONSES, batch_tokens=batch_tokens)
        assert scores.chance is not None
        assert scores.chance.shape == (4, 3, 4)
        for i, by_kind in enumerate(expected):
            for kind, value in enumerate(by_kind.values()):
                assert scores.chance[i, :, kind].tolist() == pytest.approx([value] * 3, abs=1e-6)
        torch.testing.assert_close(
            scores.excess(), scores.relevant - torch.tensor([one["relevant"] for one in expected])[:, None, None]
        )


def test_a_window_that_ends_after_the_documents_leaves_no_chance(
    load_model: Any, samples: list[MultiDocSample]
) -> None:
    model = load_model("mistral_window")
    response = " ".join(["winter harbour bridge"] * 12)
    scores = fl.contextual_scores(model, samples[:1], responses=[response])
    ends = by_loop(model, samples[0], "long", response, WINDOW)
    assert ends["relevant"] == 0
    assert not scores.excess().any()
    assert not scores.measured("relevant", "document_excess").any()


def test_several_relevant_ranges_count_together(load_model: Any) -> None:
    model = load_model("llama")
    spans = {"relevant": ((4, 9), (20, 26)), "irrelevant": ((10, 18), (27, 29)), "document": ((4, 9), (10, 18))}
    prompts = [
        EncodedPrompt(torch.arange(3, 3 + n), spans, "copper river")  # the text gives the response its tokens only
        for n in (30, 41)
    ]
    masses = even_attention(model, prompts, ["stone", "the harbour"], sink_and_documents)
    for prompt, response, found in zip(prompts, ("stone", "the harbour"), masses, strict=True):
        n = len(prompt.tokens)
        rows = range(n, n + len(model.encoder.encode_response(prompt, response)))
        parts = [[(0, 2)], spans["relevant"], *([span] for span in spans["irrelevant"])]
        assert found[0].tolist() == pytest.approx([even_share(part, rows) for part in parts], abs=1e-6)


def test_chance_of_documents_is_that_of_a_loop(load_model: Any, samples: list[MultiDocSample]) -> None:
    for name, window in (("llama_chat", None), ("mistral_window", WINDOW)):
        model = load_model(name)
        scores = fl.document_scores(model, samples, max_new_tokens=4, batch_tokens=600)
        for sample, response, found, scored in zip(
            samples, scores.responses, scores.chance, scores.scores, strict=True
        ):
            prompt = model.encode(sample.prompt())
            n = len(prompt.tokens)
            rows = range(n, n + max(1, len(model.encoder.encode_response(prompt, response))))
            expected = [even_share([span], rows, window) for span in prompt.spans["document"]]
            assert found.shape == (3, len(sample.documents))
            assert found[1].tolist() == pytest.approx(expected, abs=1e-6)
            assert scored.shape[2] == found.shape[1]


# --- heads whose attention is even ---


@pytest.fixture(scope="module")
def even_model(checkpoint: Any, tmp_path_factory: pytest.TempPathFactory) -> FocusModel:
    """The tiny random Llama with queries of zero in layer 0, so that all heads of this layer have even attention."""
    return made_even(checkpoint("llama"), tmp_path_factory.mktemp("even"))


def made_even(source: Path, target: Path) -> FocusModel:
    hf: Any = AutoModelForCausalLM.from_pretrained(source)
    projection = hf.model.layers[0].self_attn.q_proj
    projection.weight.data.zero_()
    if projection.bias is not None:
        projection.bias.data.zero_()
    hf.save_pretrained(target)
    tokenizer: Any = AutoTokenizer.from_pretrained(source)
    tokenizer.save_pretrained(target)
    return FocusModel.from_pretrained(str(target), backend="bridge", device="cpu", stop_strings=())


def test_a_head_with_even_attention_has_no_excess_and_is_never_contextual_by_it(
    even_model: FocusModel, samples: list[MultiDocSample]
) -> None:
    # With one short distractor, the relevant document has most of the documents' tokens.
    few = [dataclasses.replace(one, documents=one.documents[:3], gold_index=min(one.gold_index or 0, 2), name=str(i))
           for i, one in enumerate(samples)]  # fmt: skip
    scores = fl.contextual_scores(even_model, few, responses=RESPONSES, batch_tokens=600)
    for kind in KINDS:
        assert scores.excess(kind)[:, 0].abs().max() < 1e-6
        assert scores.excess(kind)[:, 1:].abs().max() > 0.02
    assert scores.measured(by="document_excess")[:, 0].abs().max() < 1e-6
    # The raw score counts every even head as contextual. The excess counts none.
    assert scores.mean()[0].min() > 0.1
    (raw,), (above,) = scores.sparsity((0.1,)), scores.sparsity((0.001,), by="excess")
    assert raw.layers is not None
    assert raw.layers[0] == 0
    assert above.count > 0
    assert above.layers is not None
    assert above.layers[0] == 1
    for by in ("excess", "document_excess"):
        (positive,) = scores.sparsity((1e-6,), by=by)
        assert all(head.layer > 0 for head in scores.top_heads(positive.count, by=by))


def test_generated_responses_of_an_even_head_are_close_to_chance(
    even_model: FocusModel, samples: list[MultiDocSample]
) -> None:
    """A generated response can have other tokens than its text, which changes chance by an ``n``-th per token."""
    scores = fl.contextual_scores(even_model, samples, max_new_tokens=6, batch_tokens=600)
    n = min(len(even_model.encode(sample.prompt()).tokens) for sample in samples)
    assert scores.excess()[:, 0].abs().max() < 0.3 * 6 / n
    assert scores.chance is not None
    assert float(scores.chance[..., 0].min()) > 0.05


def test_documents_of_an_even_head_rank_by_length_and_not_by_excess(
    even_model: FocusModel, samples: list[MultiDocSample]
) -> None:
    scores = fl.document_scores(even_model, samples, max_new_tokens=6, batch_tokens=600)
    assert isinstance(scores, DocumentScores)
    for sample, raw, excess in zip(samples, scores.of([(0, 1)]), scores.measured("document_excess"), strict=True):
        spans = even_model.encode(sample.prompt()).spans["document"]
        lengths = torch.tensor([end - start for start, end in spans])
        assert lengths[raw.argmax()] == lengths.max()
        assert excess[0].abs().max() < 1e-6
    ranked = scores.attribution([(1, 0)], by="excess")
    by_hand = [
        int((values - chance[1]).argmax()) for values, chance in zip(scores.of([(1, 0)]), scores.chance, strict=True)
    ]
    assert ranked.top == tuple(by_hand)
    assert ranked.top != scores.attribution([(0, 1)]).top


# --- results without the chance level, and result files ---


def test_chance_can_be_added_later_for_samples_in_any_order(load_model: Any, samples: list[MultiDocSample]) -> None:
    model = load_model("llama")
    scores = fl.contextual_scores(model, samples, responses=RESPONSES, batch_tokens=600)
    assert scores.chance is not None
    added = without_chance(scores).with_chance(model, samples[::-1])
    assert isinstance(added, ContextualScores)
    assert added.chance is not None
    assert torch.equal(added.chance, scores.chance)
    by_document = fl.document_scores(model, samples, max_new_tokens=2)
    again = dataclasses.replace(by_document, chance=()).with_chance(model, iter(samples))
    assert all(torch.equal(one, other) for one, other in zip(again.chance, by_document.chance, strict=True))
    nothing = without_chance(scores).where([False] * 4, "wrong").with_chance(model, samples)
    assert nothing.chance is not None
    assert nothing.chance.shape == (0, 3, 4)
    assert list(without_chance(scores).to_frame().columns) == ["layer", "head", *KINDS]


def test_scores_of_a_file_have_the_same_chance_and_the_file_does_not_hold_it(
    load_model: Any, samples: list[MultiDocSample], tmp_path: Path
) -> None:
    model, path = load_model("llama"), tmp_path / "scores.jsonl"
    first = fl.contextual_scores(model, samples, max_new_tokens=3, out=path)
    assert "chance" not in path.read_text()
    again = fl.contextual_scores(model, samples, max_new_tokens=3, out=path)
    values: list[Tensor] = [one.chance for one in (first, again) if one.chance is not None]
    assert len(values) == 2
    assert torch.equal(*values)


def test_windows_are_those_of_the_rows_of_responses(load_model: Any, backend: str, monkeypatch: Any) -> None:
    assert response_windows(load_model("llama", backend)) == (None, None, None)
    model = load_model("mistral_window", backend)
    assert response_windows(model) == (WINDOW, WINDOW, WINDOW)
    # Hugging Face's ``generate`` can drop keys of layers without a window, which later rows then do not see.
    cache = model.backend.new_cache(1, 1)
    cache.forgetting = Forgetting(1, (8, None, WINDOW + 8))
    monkeypatch.setattr(type(model.backend), "new_cache", lambda self, batch, n_prompt=0: cache)
    assert response_windows(model) == (8, WINDOW, WINDOW)
