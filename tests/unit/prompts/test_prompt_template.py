"""Prompts of templates of users: text, exact spans, YAML files, chat parts, and errors."""

from __future__ import annotations

import dataclasses
import json
import pickle
import string
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import focuslens as fl
from focuslens.data import load_multidoc
from focuslens.prompts.encoder import PromptEncoder
from focuslens.prompts.prompt import Conversation
from focuslens.prompts.rewriting import removed_documents
from focuslens.prompts.sample import prompts_digest
from tests.support.multidoc_files import placed_record, write
from tests.support.tokenizer_families import family_tokenizer

XML = fl.PromptTemplate(
    instruction="Use {these}:",
    heading='<doc n="{number}">\n',
    document="<title>{title}</title>\n{text}",
    untitled="{text}",
    footer="\n</doc>",
    separator="\n---\n",
    gap="\n\n",
    question="Q: {question}",
    cue="\nA:",
)
DOCUMENTS = (fl.Document("One", "first"), fl.Document("", "second"), fl.Document("Three", "third {x} {title}"))
SAMPLE = fl.MultiDocSample("who {is} it?", ("a",), DOCUMENTS, None, gold_indices=(0, 2), template=XML)

TEXT = """Use {these}:

<doc n="1">
<title>One</title>
first
</doc>
---
<doc n="2">
second
</doc>
---
<doc n="3">
<title>Three</title>
third {x} {title}
</doc>

Q: who {is} it?
A:"""


def test_a_template_of_xml() -> None:
    prompt = SAMPLE.prompt()
    assert prompt == TEXT
    first, third = "<title>One</title>\nfirst", "<title>Three</title>\nthird {x} {title}"
    assert prompt.part("document") == (first, "second", third)
    assert prompt.part("relevant") == (first, third)
    assert prompt.part("irrelevant") == ("second",)
    assert prompt.part("question") == ("who {is} it?",)
    assert prompt.part("instruction") == ("Use {these}:",)
    assert prompt.part("entry")[1] == '<doc n="2">\nsecond\n</doc>'


@pytest.mark.parametrize(
    ("place", "text", "questions"),
    [
        ("after", "Do.\n\n[1] x\n\nQ? w?\nA:", 1),
        ("before", "Do.\n\nQ? w?\n\n[1] x\nA:", 1),
        ("both", "Do.\n\nQ? w?\n\n[1] x\n\nQ? w?\nA:", 2),
    ],
)
def test_the_place_of_the_question(place: Any, text: str, questions: int) -> None:
    template = fl.PromptTemplate("Do.", "[{number}]", question="Q? {question}", cue="\nA:", question_place=place)
    prompt = fl.MultiDocSample("w?", ("a",), (fl.Document("", "x"),), 0, template=template).prompt()
    assert prompt == text
    assert prompt.part("question") == ("w?",) * questions
    bare = replace(template, instruction="")
    assert SAMPLE.with_template(bare).prompt().spans["instruction"] == ()
    assert not SAMPLE.with_template(bare).prompt().startswith("\n")


_WORDS = st.text(alphabet=string.ascii_letters + "{}<|> \n", max_size=6)


@settings(max_examples=60)
@given(_WORDS, _WORDS, _WORDS, _WORDS, st.sampled_from(["after", "before", "both"]), st.integers(0, 2))
def test_any_template_has_exact_spans(
    instruction: str, heading: str, footer: str, gap: str, place: Any, gold: int
) -> None:
    heading, footer = (text.replace("{", "{{").replace("}", "}}") for text in (heading, footer))
    template = fl.PromptTemplate(
        instruction, heading, "{title}: {text}", "{text}", footer, gap=gap, question_place=place
    )
    prompt = replace(SAMPLE, template=template, gold_index=gold, gold_indices=(gold,)).prompt()
    texts = ["One: first", "second", "Three: third {x} {title}"]
    assert prompt.part("document") == tuple(texts)
    assert prompt.part("relevant") == (texts[gold],)
    assert set(prompt.part("question")) == {"who {is} it?"}
    assert prompt.part("instruction") == ((instruction,) if instruction else ())


@pytest.mark.parametrize("kept", [(), (0,), (1,), (0, 2), (1, 2)])
def test_documents_are_removed_with_their_frames(kept: tuple[int, ...]) -> None:
    encoder = PromptEncoder(family_tokenizer("chatml"), True)
    shown = {i: (DOCUMENTS[i].title, DOCUMENTS[i].text) for i in kept}
    expected = encoder.encode(XML.prompt("who {is} it?", shown, (0, 2)))
    prompt = encoder.encode(SAMPLE.prompt())
    shorter = encoder.rewritten(prompt, removed_documents(prompt, kept))
    assert shorter.text == (expected.text if kept else expected.text.replace("\n\n\n\nQ:", "\n\nQ:"))
    if kept:
        assert {name: spans for name, spans in shorter.spans.items() if spans} == {
            name: spans for name, spans in expected.spans.items() if spans
        }


@pytest.mark.usefixtures("unchecked")
def test_a_yaml_file_holds_a_template(tmp_path: Path) -> None:
    path = tmp_path / "template.yaml"
    path.write_text(
        "instruction: Answer.\nheading: '[{number}] '\nquestion_place: both\nsystem: Be brief.\n"
        "turns:\n- {role: user, content: hello}\n- {role: assistant, content: good day}\n"
        "prefix: It is\nchat_arguments:\n  enable_thinking: false\n"
    )
    template = fl.PromptTemplate.load(path)
    assert template == fl.PromptTemplate(
        "Answer.",
        "[{number}] ",
        question_place="both",
        system="Be brief.",
        turns=({"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}),
        prefix="It is",
        chat_arguments={"enable_thinking": False},
    )
    assert fl.PromptTemplate.of(json.loads(json.dumps(template.describe()))) == template
    assert set(template.describe()) == {
        "instruction",
        "heading",
        "question_place",
        "system",
        "turns",
        "prefix",
        "chat_arguments",
    }
    assert fl.PromptTemplate().describe() == {}
    empty = tmp_path / "empty.yaml"
    empty.write_text("")
    assert fl.PromptTemplate.load(empty) == fl.PromptTemplate()
    path.write_text("instrucion: Answer.\n")
    with pytest.raises(
        ValueError, match=r"template.yaml is no prompt template: a template has no field 'instrucion'; "
    ):
        fl.PromptTemplate.load(path)
    path.write_text("- a\n")
    with pytest.raises(ValueError, match="it must map names of fields to values"):
        fl.PromptTemplate.load(path)
    with pytest.raises(FileNotFoundError):
        fl.PromptTemplate.load(tmp_path / "no.yaml")


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"document": "{title}"}, ValueError, r"document is '\{title\}'; it must contain \{text\} once"),
        ({"document": "{text} {text}"}, ValueError, r"it must contain \{text\} once"),
        ({"document": "{text} {body}"}, ValueError, r"the placeholder \{body\}; it may contain \{number\}, \{text\}"),
        ({"untitled": "{title} {text}"}, ValueError, r"untitled is .* with the placeholder \{title\}"),
        ({"heading": "{number:03}"}, ValueError, r"the placeholder \{number\}; it may contain"),
        ({"heading": "{"}, ValueError, r"heading is '\{', which is no format"),
        ({"question": "Question:"}, ValueError, r"question is 'Question:'; it must contain \{question\} once"),
        ({"question_place": "middle"}, ValueError, "question_place is 'middle'; it must be one of after, before, both"),
        ({"gap": 3}, TypeError, "gap is 3, a int; it must be a string"),
        ({"system": " "}, ValueError, "system is empty"),
        ({"turns": "hello"}, TypeError, "turns is 'hello'; messages are a list"),
        ({"turns": [{"content": "a"}]}, TypeError, r"turns\[0\] is .*, without a 'role'"),
        ({"turns": [{"role": "user"}]}, TypeError, r"turns\[0\]\['content'\] is None"),
        ({"chat_arguments": "x"}, TypeError, "chat_arguments is 'x'; it must map names to values"),
        ({"chat_arguments": {3: "x"}}, TypeError, "chat_arguments is {3: 'x'}; it must map names to values"),
        *(
            (
                {"chat_arguments": {name: value}},
                ValueError,
                f"chat_arguments has '{name}', which FocusLens sets itself: ",
            )
            for name, value in {
                "tokenize": True,
                "add_generation_prompt": False,
                "messages": [],
                "continue_final_message": True,
                "return_dict": True,
            }.items()
        ),
        *(
            (
                {name: "Sources for {question}"},
                ValueError,
                rf"{name} is .* with the placeholder \{{question\}}, which would stay .*It may stand in question;",
            )
            for name in ("instruction", "separator", "gap", "cue", "prefix", "system")
        ),
        (
            {"cue": "{{text}}"},
            ValueError,
            r"placeholder \{text\}, .* is a plain text. It may stand in document and unt",
        ),
        ({"gap": "\n{title}\n"}, ValueError, r"the placeholder \{title\}.* stand in heading and document and footer"),
        (
            {"turns": [{"role": "user", "content": "{question}"}]},
            ValueError,
            r"turns\[0\]\['content'\] is '\{question\}' with the placeholder \{question\}",
        ),
    ],
)
def test_a_template_that_makes_no_sense_is_refused(changes: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        fl.PromptTemplate(**changes)


def test_braces_that_are_no_placeholder_are_text() -> None:
    template = fl.PromptTemplate(instruction='Answer as {"answer": ...} {x}.', cue=" {}")
    assert template.prompt("who?", {0: ("", "red")}).startswith('Answer as {"answer": ...} {x}.')


def test_arguments_of_a_model_or_a_conversation_that_are_set_anyway_are_refused() -> None:
    with pytest.raises(ValueError, match="chat_template_kwargs has 'tokenize', which FocusLens sets itself"):
        PromptEncoder(family_tokenizer("chatml"), False, {"tokenize": True})
    with pytest.raises(ValueError, match="arguments has 'add_generation_prompt', which FocusLens sets itself"):
        Conversation(arguments={"add_generation_prompt": False})


def test_white_space_at_the_ends_of_a_format_and_doubled_braces() -> None:
    template = fl.PromptTemplate("", "[{number}]", "\n{title} {{x}}: {text} \n", question="{{question}} {question}!")
    prompt = SAMPLE.with_template(template).prompt()
    assert prompt.startswith("[1]\nOne {x}: first \n\n[2] second\n[3]\nThree")
    assert prompt.part("document")[0] == "One {x}: first"
    assert "{question} who {is} it?!" in prompt
    assert prompt.part("question") == ("who {is} it?",)


def test_titles_can_be_left_out_but_not_whole_documents() -> None:
    template = fl.PromptTemplate(document="{text}", untitled="{text}", heading="* ")
    prompt = SAMPLE.with_template(template).prompt()
    assert "* first\n* second\n* third" in prompt
    sample = fl.MultiDocSample("q?", ("a",), (fl.Document("Only a title", ""),), 0, template=template)
    with pytest.raises(ValueError, match="document 0 has a title and no text, and the template leaves titles out"):
        sample.prompt()


def test_the_default_template_changes_nothing(tmp_path: Path) -> None:
    path = write(tmp_path / "placed.jsonl", map(placed_record, range(3)))
    plain, same = (load_multidoc(path, num_documents=3, template=one) for one in (None, fl.PromptTemplate()))
    other = load_multidoc(path, num_documents=3, template=XML)
    assert prompts_digest(plain) == prompts_digest(same) != prompts_digest(other)
    assert plain.description == same.description
    assert other.description["template"] == XML.describe()
    assert other[0].prompt().startswith('Use {these}:\n\n<doc n="1">')
    assert "entry" not in plain[0].prompt().spans


def test_chat_parts_are_in_the_prompt_and_in_the_digest() -> None:
    encoder = PromptEncoder(family_tokenizer("llama3"), True)
    template = replace(
        XML,
        system="Be brief.",
        turns=({"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}),
        prefix="It",
    )
    messages = ({"role": "user", "content": "and?"}, {"role": "assistant", "content": "well"})
    sample = replace(SAMPLE, template=template, messages=messages)
    encoded = encoder.encode(sample.prompt())
    turn = "<|start_header_id|>{}<|end_header_id|>\n\n{}<|eot_id|>"
    before = [
        ("system", "Be brief."),
        ("user", "hello"),
        ("assistant", "good day"),
        ("user", "and?"),
        ("assistant", "well"),
    ]
    assert encoded.text == (
        "<|begin_of_text|>"
        + "".join(turn.format(*one) for one in before)
        + turn.format("user", TEXT)
        + "<|start_header_id|>assistant<|end_header_id|>\n\nIt"
    )
    assert [encoded.text[a:b] for a, b in encoded.characters["question"]] == ["who {is} it?"]
    for name, ranges in encoded.spans.items():
        for (start, end), (first, last) in zip(ranges, encoded.characters[name], strict=True):
            assert encoded.text[first:last].strip() in encoder.tokenizer.decode(encoded.tokens[start:end])
    again = pickle.loads(pickle.dumps(sample.prompt()))
    assert encoder.encode(again).text == encoded.text
    digests = {prompts_digest([replace(SAMPLE, template=one)]) for one in (XML, template, replace(template, prefix=""))}
    assert len(digests | {prompts_digest([sample])}) == 4
    assert hash(sample) == hash(replace(sample))


def test_chat_parts_are_refused_without_a_chat_template_and_twice() -> None:
    encoder = PromptEncoder(family_tokenizer("llama3", chat=False), False)
    for changes, part in (
        ({"system": "Be brief."}, "a system prompt or earlier messages"),
        ({"chat_arguments": {"tools": []}}, "arguments of a chat template"),
    ):
        with pytest.raises(ValueError, match=f"the prompt has {part}, but prompts are not put into a chat template"):
            encoder.encode(SAMPLE.with_template(replace(XML, **changes)).prompt())
    begun = encoder.encode(SAMPLE.with_template(replace(XML, prefix=" It is")).prompt())
    assert begun.text == f"{TEXT} It is"
    doubled = replace(SAMPLE, template=replace(XML, system="a"), messages=({"role": "system", "content": "b"},))
    with pytest.raises(ValueError, match="a system message stands after other messages; give one system prompt"):
        doubled.prompt()


def test_question_rows_read_the_question_after_the_documents(load_model: Any) -> None:
    model = load_model("llama")
    both, before = (
        model.encode(SAMPLE.with_template(fl.PromptTemplate(question_place=place)).prompt())
        for place in ("both", "before")
    )
    from focuslens.model.question_rows import row_weights
    from focuslens.prompts.batch import PromptBatch

    (start, end) = both.spans["question"][1]
    (weights,) = row_weights(PromptBatch.of([both]), "question")
    assert weights.nonzero()[:, 0].tolist() == list(range(start, end))
    (tail,) = row_weights(PromptBatch.of([both]), "tail")
    assert tail.nonzero()[:, 0].tolist() == list(range(start, len(both.tokens)))
    with pytest.raises(ValueError, match="asks its question before its documents"):
        row_weights(PromptBatch.of([before]), "tail")
    changed = model.encoder.with_question(both, "N/A")
    assert changed.text.count("N/A") == 2
    assert "who" not in changed.text


def test_a_sample_with_a_prompt_of_its_own(load_model: Any) -> None:
    class Plain(fl.MultiDocSample):
        def prompt(self, case: Any = "long") -> fl.Prompt:
            texts = " ".join(document.text for document in self.documents)
            return fl.Prompt(f"{texts} {self.question}", {"document": [(0, 5)], "relevant": [(0, 5)], "irrelevant": []})

    sample = Plain("who?", ("red",), DOCUMENTS[:1], 0)
    scores = fl.contextual_scores(load_model("llama"), [sample], max_new_tokens=2)
    assert not scores.relevant.isnan().any()
    assert prompts_digest([sample]) != prompts_digest([dataclasses.replace(sample, question="why?")])
