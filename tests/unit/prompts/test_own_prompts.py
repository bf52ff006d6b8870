"""Samples with prompts of their own, whose spans are missing: every score and attribution says so."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.directions.activations import LayerHeads, sample_rows
from focuslens.prompts.batch import EncodedPrompt
from focuslens.prompts.spans import require_spans

DOCUMENTS = (fl.Document("", "Ada came."), fl.Document("", "Bob left."))
SPANS: dict[str, list[tuple[int, int]]] = {
    "document": [(0, 9), (10, 19)],
    "relevant": [(0, 9)],
    "irrelevant": [(10, 19)],
    "question": [(20, 29)],
}
CHANGES: dict[str, Any] = {}


class Own(fl.MultiDocSample):
    """Sample whose spans are those of the test."""

    def prompt(self, case: Any = "long") -> fl.Prompt:
        spans = {name: ranges for name, ranges in {**SPANS, **CHANGES}.items() if ranges is not None}
        text = f"{self.documents[0].text}\n{self.documents[1].text}\n{'who came?':<10}{self.question}\n"
        return fl.Prompt(text, spans)


SAMPLE = Own("who came?", ("Ada",), DOCUMENTS, 0, question_id="own")


@pytest.fixture(autouse=True)
def _whole() -> None:
    CHANGES.clear()


def split_softmax(model: Any, samples: Any) -> Any:
    return fl.evaluate(model, samples, [fl.SplitSoftmax([(1, 0)], tau=0.5)], max_new_tokens=2)


def rows(model: Any, samples: Any) -> Any:
    groups = LayerHeads.group([(1, 0)], model.shape)
    return sample_rows(model, samples[0], torch.tensor([5]), groups, "long", "rotary")


def choices(model: Any, samples: Any) -> Any:
    return fl.choices(model, samples, fl.SelfFocus([(1, 0)], tau=0.5), max_new_tokens=2)


FUNCTIONS: list[tuple[Callable[[Any, Any], Any], str]] = [
    (lambda model, samples: fl.contextual_scores(model, samples, max_new_tokens=2), "relevant"),
    (lambda model, samples: fl.contextual_scores(model, samples, responses=["Ada"]), "relevant"),
    (lambda model, samples: fl.contextual_scores(model, samples, max_new_tokens=2), "irrelevant"),
    (lambda model, samples: fl.document_scores(model, samples, max_new_tokens=2), "document"),
    (lambda model, samples: fl.attention_budget(model, samples, max_new_tokens=2), "relevant"),
    (lambda model, samples: fl.attention_budget(model, samples, max_new_tokens=2), "irrelevant"),
    (lambda model, samples: fl.attention_budget(model, samples, max_new_tokens=2), "question"),
    (lambda model, samples: fl.document_effects(model, samples, max_new_tokens=2), "document"),
    (lambda model, samples: fl.question_scores(model, samples), "document"),
    (lambda model, samples: fl.question_scores(model, samples), "question"),
    (choices, "document"),
    (split_softmax, "relevant"),
    (rows, "relevant"),
]


@pytest.mark.parametrize(("function", "name"), FUNCTIONS, ids=[f"{i}-{name}" for i, (_, name) in enumerate(FUNCTIONS)])
def test_a_span_that_is_missing_or_misspelt_is_named(
    function: Callable[[Any, Any], Any], name: str, load_model: Any
) -> None:
    model = load_model("llama")
    function(model, [SAMPLE])
    for missing in (None, []):
        CHANGES.update({name: missing, "relevent": [(0, 9)]})
        with pytest.raises(
            ValueError, match=f"the long prompt of sample 'own@0' has no span '{name}'; its spans, w"
        ) as e:
            function(model, [SAMPLE])
        assert "'relevent' (1)" in str(e.value)
        assert f"fl.Prompt(text, {{'{name}': [(start, end)]}})" in str(e.value)


def test_every_document_needs_a_range(load_model: Any) -> None:
    CHANGES["document"] = [(0, 9)]
    with pytest.raises(ValueError, match=r"'own@0' has 1 ranges in the span 'document', for 2 documents"):
        fl.document_scores(load_model("llama"), [SAMPLE], max_new_tokens=2)


def test_the_chance_level_needs_the_same_spans(load_model: Any) -> None:
    model = load_model("llama")
    scores, documents = (
        function(model, [SAMPLE], max_new_tokens=2) for function in (fl.contextual_scores, fl.document_scores)
    )
    CHANGES.update(relevant=None, document=None)
    with pytest.raises(ValueError, match="has no span 'relevant'"):
        scores.with_chance(model, [SAMPLE])
    with pytest.raises(ValueError, match="has no span 'document'"):
        documents.with_chance(model, [SAMPLE])


def test_given_attentions_need_a_span() -> None:
    attentions = [torch.full((1, 2, 6, 6), 1 / 6)]
    tokens = torch.arange(4)
    with pytest.raises(
        ValueError, match=r"prompt 0 has neither a span 'relevant' nor a span 'irrelevant'.* are 'relev"
    ):
        fl.scores_from_attentions(attentions, EncodedPrompt(tokens, {"relevent": ((2, 3),)}))
    unknown = EncodedPrompt(tokens, {"irrelevant": ((2, 3),)})
    assert fl.scores_from_attentions(attentions, unknown).relevant.isnan().all()
    with pytest.raises(ValueError, match="the long prompt of sample 'own@0' has no span 'relevant'; its spans"):
        fl.scores_from_attentions(attentions, unknown, samples=[SAMPLE])


def test_the_spans_that_a_prompt_needs_depend_on_its_documents() -> None:
    def check(case: Any, gold: int | None, spans: Any, *names: str) -> None:
        sample = fl.MultiDocSample("who came?", ("Ada",), DOCUMENTS, gold)
        require_spans([sample], [EncodedPrompt(torch.arange(9), spans)], names, case)

    one = ((0, 1),)
    check("gold", 0, {"relevant": one, "document": one}, "relevant", "irrelevant", "document")
    check("negative", 0, {"irrelevant": one, "document": one}, "relevant", "irrelevant", "document")
    check("long", None, {"irrelevant": one}, "relevant", "irrelevant")
    with pytest.raises(ValueError, match=r"the gold prompt of sample .* has no span 'relevant'"):
        check("gold", 0, {"irrelevant": one}, "relevant")
    with pytest.raises(ValueError, match="its spans, with their numbers of ranges, are none"):
        check("long", 0, {}, "relevant")
