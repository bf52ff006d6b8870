"""Methods of a setting: errors, descriptions, settings that change nothing, and recorded sweeps."""

from __future__ import annotations

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.evaluation.methods.context_aware import jensen_shannon

HEADS = [(0, 1), (1, 2), (2, 0)]


@pytest.fixture
def model(load_model: Any) -> fl.FocusModel:
    return load_model("llama")


def tokens_of(responses: Any) -> list[list[int]]:
    return [response.tokens.tolist() for response in responses]


def plain(model: fl.FocusModel, prompts: Any, interventions: Any = ()) -> list[list[int]]:
    return tokens_of(model.generate(prompts, interventions, max_new_tokens=4))


def answered(method: Any, model: fl.FocusModel, prompts: Any, interventions: Any = ()) -> list[list[int]]:
    return tokens_of(method.respond(model, model.batch(prompts), interventions, max_new_tokens=4))


METHODS: dict[str, Any] = {
    "CAD": fl.ContextAwareDecoding(),
    "AdaCAD": fl.ContextAwareDecoding(None, 0.1),
    "SelfElicit": fl.SelfElicit(),
    "DocumentFilter": fl.DocumentFilter(HEADS, 2),
    "DocumentFilter with steering": fl.DocumentFilter(HEADS, 3, rows="tail", steer=0.01, best=2),
    "SelfElicit with other markers": fl.SelfElicit(0.7, (0, 0.5), ("<b>", "</b>"), "See {start}."),
    "DySCO": fl.DySCO(HEADS),
    "DySCO with other settings": fl.DySCO(
        HEADS, strength=3, decay=0.5, top_p=None, top_k=9, context_rows=2, template_rows=1, template=[[0], [5, 6]]
    ),
}
EVERY = pytest.mark.parametrize("method", METHODS.values(), ids=METHODS.keys())


# --- all methods ---


@EVERY
def test_a_method_can_be_pickled_and_described(method: Any) -> None:
    assert pickle.loads(pickle.dumps(method)) == method
    described = method.describe()
    assert json.loads(json.dumps(described)) == described
    assert isinstance(fl.Setting("x", method=method).describe()["method"]["kind"], str)


def test_descriptions_of_methods_differ() -> None:
    described = [json.dumps(method.describe()) for method in METHODS.values()]
    assert len(set(described)) == len(described)


@pytest.mark.parametrize("method", ["CAD", fl.ContextAwareDecoding, fl.SplitSoftmax(HEADS, 0.1)])
def test_a_value_that_is_no_method_is_refused(method: Any, unchecked: None) -> None:
    with pytest.raises(TypeError, match=r"method is .*; it must be a way of answering, such as fl.SelfElicit\(\)"):
        fl.Setting("x", method=method)


@EVERY
def test_a_sweep_records_a_method_and_continues_it(
    method: Any, model: fl.FocusModel, samples: list[fl.MultiDocSample], tmp_path: Path, monkeypatch: Any
) -> None:
    path, cut = tmp_path / "sweep.jsonl", tmp_path / "cut.jsonl"
    settings = [fl.Setting("baseline"), fl.Setting("method", method=method, parameters={"x": 1})]
    chosen = samples[2:]
    sweep = fl.run_sweep(model, chosen, settings, max_new_tokens=3, out=path, batch_tokens=1)
    assert list(sweep["method"].responses) == [
        method.respond(model, model.batch(sample.prompt()), max_new_tokens=3)[0].text for sample in chosen
    ]
    lines = path.read_text().splitlines(keepends=True)
    assert json.loads(lines[0])["header"]["settings"][1]["method"] == method.describe()
    cut.write_text("".join(lines[:-1]))
    batches: list[int] = []
    respond = type(method).respond

    def counted(self: Any, model: Any, batch: Any, *rest: Any, **options: Any) -> Any:
        batches.append(len(batch))
        return respond(self, model, batch, *rest, **options)

    monkeypatch.setattr(type(method), "respond", counted)
    again = fl.run_sweep(model, chosen, settings, max_new_tokens=3, out=cut, batch_tokens=1)
    assert again.evaluations == sweep.evaluations
    assert cut.read_text() == path.read_text()
    assert batches == [1]
    with pytest.raises(ValueError, match="settings differ"):
        fl.run_sweep(model, chosen, settings[:1], max_new_tokens=3, out=cut)


@EVERY
def test_arguments_that_a_method_cannot_use_are_refused(method: Any, model: fl.FocusModel, unchecked: None) -> None:
    if not isinstance(method, fl.DySCO):  # which needs no documents
        with pytest.raises((ValueError, KeyError), match="span 'document'"):
            method.respond(model, model.batch(fl.Prompt("where is it?", spans={"question": [(0, 12)]})))
    alone: Any = fl.SplitSoftmax(HEADS, 0.1)
    with pytest.raises(TypeError, match="interventions is one SplitSoftmax"):
        method.respond(model, model.batch("a"), alone)


@pytest.mark.parametrize("name", ["CAD", "SelfElicit", "DocumentFilter"])
def test_an_intervention_on_positions_is_refused(
    name: str, model: fl.FocusModel, samples: list[fl.MultiDocSample]
) -> None:
    with pytest.raises(
        ValueError, match=r"SplitSoftmax acts on the token positions \(3, 9\), and \w+ runs.*named span"
    ):
        answered(METHODS[name], model, samples[0].prompt(), [fl.SplitSoftmax(HEADS, 0.1, span=(3, 9))])


# --- context-aware decoding ---


@pytest.mark.parametrize("interventions", [(), (fl.SplitSoftmax(HEADS, 0.1),)])
def test_a_weight_of_zero_is_plain_generation(
    model: fl.FocusModel, samples: list[fl.MultiDocSample], interventions: Any
) -> None:
    prompts = [sample.prompt() for sample in samples]
    expected = plain(model, prompts, interventions)
    assert answered(fl.ContextAwareDecoding(0), model, prompts, interventions) == expected
    assert answered(fl.ContextAwareDecoding(1), model, prompts, interventions) != expected


def test_interventions_act_with_the_documents_only(
    model: fl.FocusModel, samples: list[fl.MultiDocSample], monkeypatch: pytest.MonkeyPatch
) -> None:
    logits: list[tuple[torch.Tensor, ...]] = []
    monkeypatch.setattr(fl.ContextAwareDecoding, "combined", lambda self, *rows: logits.append(rows) or rows[0])
    prompt, seconds = samples[0].prompt(), list[torch.Tensor]()
    ablation, chooser = fl.HeadAblation(HEADS, positions="all"), fl.SelfFocus(HEADS, 0.1)
    for interventions in ([], [ablation], [chooser], [ablation, chooser]):
        answered(fl.ContextAwareDecoding(), model, prompt, interventions)
        expected = model.prefill(prompt, interventions, hold_last=True)
        wanted = plain(model, [prompt], interventions)[0][0]
        assert int(logits[0][0].argmax()) == wanted
        if chooser not in interventions:
            completed = model.completed(expected, interventions).logits
            assert completed is not None
            assert torch.allclose(logits[0][0], completed, atol=1e-4)
        seconds.append(logits[0][1])
        logits.clear()
    assert all(torch.allclose(second, seconds[0], atol=1e-4) for second in seconds)


def test_penalties_apply_to_the_combined_logits(model: fl.FocusModel, samples: list[fl.MultiDocSample]) -> None:
    """A token that may not occur is replaced by the next best of the combined logits."""
    prompts = [sample.prompt() for sample in samples[:2]]
    first = answered(fl.ContextAwareDecoding(), model, prompts)
    penalised = fl.FocusModel(
        model.hooked, model.tokenizer, stop_strings=(), decoding=replace(model.decoding, suppress_tokens=(first[0][0],))
    )
    second = answered(fl.ContextAwareDecoding(), penalised, prompts)
    assert second[0][0] != first[0][0]
    assert all(first[0][0] not in response for response in second)


@pytest.mark.parametrize("name", ["CAD", "DySCO"])
def test_a_stop_string_ends_a_response(name: str, model: fl.FocusModel, samples: list[fl.MultiDocSample]) -> None:
    method, prompt = METHODS[name], samples[0].prompt()
    (whole,) = method.respond(model, model.batch(prompt), max_new_tokens=6)
    text = model.tokenizer.decode(whole.tokens[2:4])
    stopping = fl.FocusModel(model.hooked, model.tokenizer, stop_strings=(text,))
    (short,) = method.respond(stopping, stopping.batch(prompt), max_new_tokens=6)
    assert short.finished
    assert short.tokens.tolist() == whole.tokens[: len(short.tokens)].tolist()
    assert len(short.tokens) < 4


def test_the_divergence_is_that_of_known_distributions() -> None:
    same = torch.tensor([0.3, 0.2, 0.5]).log()
    assert float(jensen_shannon(same, same + 3)) == pytest.approx(0, abs=1e-12)
    apart = torch.tensor([[0.0, -math.inf], [-math.inf, 0.0]])
    assert float(jensen_shannon(apart[0], apart[1])) == pytest.approx(math.log(2))
    p, q = torch.tensor([0.5, 0.5]), torch.tensor([0.25, 0.75])
    expected = (0.5 * math.log(0.5 / 0.375) + 0.5 * math.log(0.5 / 0.625)) / 2
    expected += (0.25 * math.log(0.25 / 0.375) + 0.75 * math.log(0.75 / 0.625)) / 2
    assert float(jensen_shannon(p.log(), q.log())) == pytest.approx(expected)


def test_weights_that_are_none_are_refused(unchecked: None) -> None:
    for alpha in (-0.1, math.inf, math.nan):
        with pytest.raises(ValueError, match=r"alpha is .*; it must be a finite number, 0 or more"):
            fl.ContextAwareDecoding(alpha)
    with pytest.raises(TypeError, match="alpha is 'x', a str; it must be one number"):
        fl.ContextAwareDecoding("x")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"min_alpha is 0.3, which needs alpha=None; alpha is 1"):
        fl.ContextAwareDecoding(1.0, 0.3)


# --- SelfElicit ---


def test_every_sentence_is_marked_if_none_needs_attention(model: fl.FocusModel) -> None:
    text = "See.\nThe cat sat. No. Was it mine?\nA dog\n\nWhose cat?"
    ranges = [(text.index("The"), text.index("\nA")), (text.index("A dog"), text.index("\n\nW"))]
    spans = {
        "instruction": [(0, 4)],
        "document": ranges,
        "relevant": ranges[:1],
        "question": [(text.index("Who"), len(text))],
    }
    method = fl.SelfElicit(0, markers=("<", ">"), note="{start}{end}")
    (marked,) = method.marked(model, model.batch(fl.Prompt(text, spans)))
    # A sentence of less than six characters is not marked: 'No.' and, with its space left out, 'A dog'.
    assert marked.text == "See. <>\n< The cat sat. > No. < Was it mine? >\nA dog\n\nWhose cat?"
    parts = {name: [marked.text[start:end] for start, end in ranges] for name, ranges in marked.characters.items()}
    assert parts["document"] == ["< The cat sat. > No. < Was it mine? >", "A dog"]
    assert parts["instruction"] == ["See. <>"]
    assert parts["relevant"] == parts["document"][:1]
    assert parts["question"] == ["Whose cat?"]


def test_the_note_stands_before_the_question_if_there_is_no_instruction(model: fl.FocusModel) -> None:
    for text, expected in (
        ("A cat is here.\n\nQ: Who?", "< A cat is here. >\n\nnote\nQ: Who?"),
        ("A cat is here. Who?", "< A cat is here. > note\nWho?"),
    ):
        spans = {"document": [(0, 14)], "question": [(text.index("Who"), len(text))]}
        method = fl.SelfElicit(1, markers=("<", ">"), note="note")
        (marked,) = method.marked(model, model.batch(fl.Prompt(text, spans)))
        assert marked.text == expected


def test_interventions_act_on_the_marked_prompt(model: fl.FocusModel, samples: list[fl.MultiDocSample]) -> None:
    split = fl.SplitSoftmax(HEADS, 0.01)
    method, prompts = fl.SelfElicit(), [sample.prompt() for sample in samples]
    marked = method.marked(model, model.batch(prompts))
    assert answered(method, model, prompts, [split]) == plain(model, marked, [split]) != plain(model, marked)


def test_settings_of_self_elicit_that_cannot_be_are_refused(model: fl.FocusModel, unchecked: None) -> None:
    with pytest.raises(ValueError, match=r"alpha is 1\.5; it must be a number from 0 to 1"):
        fl.SelfElicit(1.5)
    with pytest.raises(ValueError, match=r"layers is \(0.9, 0.5\); it must be two fractions"):
        fl.SelfElicit(layers=(0.9, 0.5))
    with pytest.raises(TypeError, match=r"markers is '<b>'; it must be a pair, such as \('<b>', '</b>'\)"):
        fl.SelfElicit(markers="<b>")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="markers is empty"):
        fl.SelfElicit(markers=("<b>", ""))
    with pytest.raises(ValueError, match=r"layers \(0.0, 0.1\) of 3 layers are none"):
        answered(
            fl.SelfElicit(layers=(0, 0.1)),
            model,
            fl.Prompt("A cat. Who?", {"document": [(0, 6)], "question": [(7, 11)]}),
        )
    with pytest.raises(ValueError, match=r"no span .instruction. or .question., .*; it has \[.document.\]"):
        answered(fl.SelfElicit(), model, fl.Prompt("A cat. Who?", {"document": [(0, 6)]}))


# --- filter of documents ---


def test_a_filter_that_keeps_all_documents_is_plain_generation(
    model: fl.FocusModel, samples: list[fl.MultiDocSample]
) -> None:
    prompts = [sample.prompt() for sample in samples]
    split = fl.SplitSoftmax(HEADS, 0.01)
    for method in (fl.DocumentFilter(HEADS, 6), fl.DocumentFilter(HEADS, 100, steer=1.0)):
        assert answered(method, model, prompts) == plain(model, prompts)
        assert answered(method, model, prompts, [split]) == plain(model, prompts, [split])
    assert answered(fl.DocumentFilter(HEADS, 1), model, prompts) != plain(model, prompts)


def test_an_intervention_can_act_on_the_best_documents(model: fl.FocusModel, samples: list[fl.MultiDocSample]) -> None:
    prompts, split = [sample.prompt() for sample in samples], fl.SplitSoftmax(HEADS, 0.01, span="attended")
    method = fl.DocumentFilter(HEADS, 3, best=2)
    batch = model.batch(prompts)
    filtered = method.filtered(model, batch)
    assert answered(method, model, prompts, [split]) == plain(model, filtered, [split]) != plain(model, filtered)
    for before, after, order in zip(batch.prompts, filtered, method.rankings(model, batch), strict=True):
        texts = [before.text[slice(*before.characters["document"][i])] for i in sorted(order[:2])]
        assert [after.text[start:end] for start, end in after.characters["attended"]] == texts
        assert len(after.spans["attended"]) == 2


def test_a_prompt_without_documents_stays_as_it_is(model: fl.FocusModel) -> None:
    prompt = fl.Prompt("Why is it so?", {"document": [], "question": [(0, 13)]})
    assert answered(fl.DocumentFilter(HEADS, steer=0.01), model, prompt) == plain(model, [prompt])


def test_settings_of_a_filter_that_cannot_be_are_refused(model: fl.FocusModel, unchecked: None) -> None:
    with pytest.raises(ValueError, match="there are no heads to rank documents by"):
        fl.DocumentFilter([])
    with pytest.raises(ValueError, match="best is 0; it must be at least 1"):
        fl.DocumentFilter(HEADS, best=0)
    with pytest.raises(ValueError, match=r"rows is 'all'; it must be one of question, tail, last"):
        fl.DocumentFilter(HEADS, rows="all")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=r"steer is 0\.0; it must be a finite number above 0"):
        fl.DocumentFilter(HEADS, steer=0)
    with pytest.raises(ValueError, match=r"head \(9, 0\) does not exist"):
        answered(fl.DocumentFilter([(9, 0)]), model, fl.Prompt("a b", {"document": [(0, 1)], "question": [(2, 3)]}))


# --- DySCO ---


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize(
    "interventions",
    [(), (fl.SplitSoftmax(HEADS, 0.01), fl.HeadAblation([(0, 0)], positions="all")), (fl.SelfFocus(HEADS, 0.01),)],
    ids=["none", "of all rows", "that chooses"],
)
def test_a_strength_of_one_is_plain_generation(
    name: str, interventions: Any, load_model: Any, samples: list[fl.MultiDocSample]
) -> None:
    model, prompts = load_model(name), [sample.prompt() for sample in samples[3:]]
    expected = plain(model, prompts, interventions)
    assert answered(fl.DySCO(HEADS, strength=1), model, prompts, interventions) == expected
    assert answered(fl.DySCO(HEADS, strength=9), model, prompts, interventions) != expected


def test_a_prompt_shorter_than_the_rows_to_read_is_read_from_its_first_row(model: fl.FocusModel) -> None:
    prompt = model.encode("river stone lantern")
    n = len(prompt.tokens)
    for context_rows, template_rows in ((n, 0), (100, 2), (0, 100), (0, 0)):
        settings: dict[str, Any] = {"context_rows": context_rows, "template_rows": template_rows}
        assert answered(fl.DySCO(HEADS, strength=1, **settings), model, prompt) == plain(model, [prompt])
        assert len(answered(fl.DySCO(HEADS, **settings), model, prompt)[0]) == 4


def test_the_context_ends_a_response(model: fl.FocusModel) -> None:
    prompt = torch.arange(5, 5 + 3).repeat(model.shape.n_ctx)[: model.shape.n_ctx - 2]
    assert len(answered(fl.DySCO(HEADS), model, prompt)[0]) <= 2
    with pytest.raises(ValueError, match="do not fit the model's context"):
        answered(fl.DySCO(HEADS), model, torch.cat((prompt, prompt[:3])))


def test_the_most_relevant_tokens_are_chosen() -> None:
    relevance = torch.tensor([0.1, 0.4, 0.05, 0.3, 0.15], dtype=torch.float64)

    def chosen(**settings: Any) -> list[int]:
        return fl.DySCO(HEADS, **settings).chosen(relevance).nonzero().flatten().tolist()

    assert chosen(top_p=0.86) == [1, 3, 4]
    assert chosen(top_p=0.5) == [1]
    assert chosen(top_p=0.1) == [1]  # at least one
    assert chosen(top_p=0.86, top_k=2) == [1, 3]
    assert chosen(top_p=None, top_k=4) == [0, 1, 3, 4]
    assert chosen(top_p=None, top_k=9) == [0, 1, 2, 3, 4]


def test_token_sequences_of_a_template_are_found(model: fl.FocusModel) -> None:
    batch = model.batch(torch.tensor([0, 5, 6, 5, 7, 5, 6, 0]))
    mask = fl.DySCO(HEADS, template=[[0], [5, 6], [9]]).template_mask(model, batch)
    assert mask.tolist() == [True, True, True, False, False, True, True, True]
    assert fl.DySCO(HEADS).template_mask(model, batch).tolist() == [True, *[False] * 6, True]
    assert not fl.DySCO(HEADS, template=[]).template_mask(model, batch).any()


def test_tokens_that_are_left_out_are_not_scaled(model: fl.FocusModel, samples: list[fl.MultiDocSample]) -> None:
    """If all tokens are left out, only the newest one is scaled."""
    prompt = model.encode(samples[0].prompt())
    none = answered(fl.DySCO(HEADS, strength=50, template=[prompt.tokens.tolist()]), model, prompt)
    least = answered(fl.DySCO(HEADS, strength=50, top_k=1, template=[]), model, prompt)
    every = answered(fl.DySCO(HEADS, strength=50, top_p=1.0, template=[]), model, prompt)
    assert len({json.dumps(tokens) for tokens in (none, least, every)}) == 3


def test_settings_of_dysco_that_cannot_be_are_refused(model: fl.FocusModel, unchecked: None) -> None:
    with pytest.raises(ValueError, match="there are no heads to read"):
        fl.DySCO([])
    with pytest.raises(ValueError, match="top_p and top_k are None"):
        fl.DySCO(HEADS, top_p=None, top_k=None)
    with pytest.raises(ValueError, match=r"strength is 0\.0; it must be a finite number, above 0$"):
        fl.DySCO(HEADS, strength=0)
    with pytest.raises(ValueError, match=r"decay is -1\.0; it must be a finite number, 0 or more"):
        fl.DySCO(HEADS, decay=-1)
    with pytest.raises(ValueError, match=r"top_p is 1\.5; it must be a finite number, above 0 and at most 1"):
        fl.DySCO(HEADS, top_p=1.5)
    with pytest.raises(ValueError, match="top_k is 0; it must be at least 1"):
        fl.DySCO(HEADS, top_k=0)
    with pytest.raises(ValueError, match=r"head \(9, 0\) does not exist"):
        answered(fl.DySCO([(9, 0)]), model, "a")
