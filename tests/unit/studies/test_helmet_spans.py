"""Spans of HELMET's prompts: found in the text that HELMET tokenises, and the same ranges of its tokens."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

import focuslens as fl
from focuslens.studies.helmet.by_task import value_of
from focuslens.studies.helmet.declared import WINDOW, Declared
from focuslens.studies.helmet.samples import read_samples
from focuslens.studies.helmet.spans import character_spans
from focuslens.studies.helmet.tasks import task_of
from tests.support.helmet_runs import entries, load, write_data


def parts(text: str, item: dict[str, Any]) -> dict[str, list[str]]:
    return {name: [text[start:end] for start, end in spans] for name, spans in character_spans(text, item).items()}


@pytest.mark.parametrize("name", ["llama", "llama_chat", "qwen2"])
def test_the_context_and_the_question_are_found_in_the_tokens(name: str, tmp_path: Path, load_model: Any) -> None:
    tokenizer = load_model(name).tokenizer
    chat = "True" if name == "llama_chat" else "False"
    checkout, both = entries(write_data(tmp_path / "root"), "--use_chat_template", chat)
    for entry in both:
        data = load(checkout, entry)
        samples = read_samples(checkout, entry, data, tokenizer)
        assert any(sample.truncated for sample in samples) == (entry is both[1])
        for place, sample in enumerate(samples):
            row = data["data"][place]
            decoded = {
                span: [tokenizer.decode(sample.tokens[start:end]).strip() for start, end in ranges]
                for span, ranges in sample.spans.items()
            }
            assert list(decoded) == ["context", "question"]
            assert row["question"] in decoded["question"][0]
            assert len(decoded["question"][0]) <= len(row["question"]) + 1  # a token can contain the full stop
            (context,) = decoded["context"]
            assert row["context"].startswith(context) if sample.truncated else context == row["context"]


def test_documents_are_the_passages_with_their_headings() -> None:
    passages = [{"title": "A", "text": "one."}, {"title": "B", "text": "two."}, {"title": "C", "text": "three."}]
    context = "\n\n".join(f"Document (Title: {one['title']}): {one['text']}" for one in passages)
    item = {"context": context, "question": "which?", "ctxs": passages}
    shot = "Document (Title: A): one.\n\nQuestion: which?\nAnswer: x\n\n"
    text = f"{shot}{context}\n\nQuestion: which?\nAnswer:"
    assert parts(text, item) == {"context": [context], "question": ["which?"], "document": context.split("\n\n")}
    cut = context[: context.index("three")]
    text = f"{shot}{cut}\n\nQuestion: which?\nAnswer:"
    assert parts(text, {**item, "context": cut})["document"] == context.split("\n\n")[:2]


def test_a_question_in_other_words_is_all_text_after_the_context() -> None:
    text = "Is it red? Read.\nThe sky.\n\nNow answer.\n"
    assert parts(text, {"context": "The sky.", "question": "Is it red?"})["question"] == ["Now answer."]
    assert parts(text, {"context": "The sea.", "question": "Is it red?"}) == {}
    assert parts(text, {"question": "Is it red?"}) == {}


def test_self_focus_chooses_documents_where_there_are_documents() -> None:
    declared = Declared({"name": "a", "kind": "self_focus", "heads": [[0, 1]], "tau": 0.1}, "file, entry 1")
    for dataset, expected in (("kilt_nq", "document"), ("msmarco_rerank_psg", "document"), ("json_kv", WINDOW)):
        task = task_of(dataset)
        assert task is not None
        setting = declared.setting(task, None)
        (focus,) = setting.interventions
        assert isinstance(focus, fl.SelfFocus)
        assert focus.parts == expected == setting.parameters["parts"]


def test_a_value_of_the_task_goes_before_that_of_its_category() -> None:
    task = task_of("icl_nlu")
    assert task is not None
    assert value_of({"other": 1, "ICL": 2, "nlu": 3}, task) == 3
    assert value_of({"other": 1, "icl": 2}, task) == 2
    assert value_of({"other": 1, "rag": 2}, task) == 1
