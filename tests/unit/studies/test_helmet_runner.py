"""HELMET's prompts in FocusLens, on the stand-in: tokens, responses, sink scores, files, and a killed run."""

from __future__ import annotations

import json
import pickle
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM

import focuslens as fl
from focuslens.evaluation import OtherResultsError
from focuslens.scores.contextual_scores import attention_pattern
from focuslens.studies.helmet.answering import Answering, answer_entry, answering_for, declared_penalty, require_askable
from focuslens.studies.helmet.results import write_results
from focuslens.studies.helmet.samples import read_samples, require_room, samples_digest, stop_tokens
from tests.support.helmet_runs import entries, load, write_data

HEADS = (fl.Head(0, 2), fl.Head(2, 1), fl.Head(1, 3))


@pytest.fixture
def root(tmp_path: Path) -> Path:
    return write_data(tmp_path / "root")


@pytest.fixture
def model(load_model: Any) -> fl.FocusModel:
    return load_model("llama", chat=False)


def steered(alpha: float) -> fl.Setting:
    query = 4 * torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
    return fl.Setting(f"3_{alpha:g}", (fl.FocusSteering(fl.FocusDirections(HEADS, query), alpha),))


def settings() -> tuple[fl.Setting, ...]:
    return (fl.Setting("baseline"), steered(1))


def test_prompts_are_the_templates_words_and_only_the_context_is_cut(root, model):
    checkout, (entry, short) = entries(root)
    tokenizer = model.tokenizer
    data = load(checkout, entry)
    for place, sample in enumerate(read_samples(checkout, entry, data, tokenizer)):
        row = data["data"][place]
        text = f"Given:\n{row['context']}\nThe key is {row['question']}.\nFound:"
        assert sample.tokens.tolist() == tokenizer(text)["input_ids"]
        assert (sample.id, sample.question, sample.truncated) == (str(place), row["question"], False)
    data, cut = load(checkout, short), 0
    for place, sample in enumerate(read_samples(checkout, short, data, tokenizer)):
        row, text = data["data"][place], tokenizer.decode(sample.tokens)
        assert text.endswith(f"\nThe key is {row['question']}.\nFound:")
        kept = text.removeprefix("<s>Given:\n").removesuffix(f"\nThe key is {row['question']}.\nFound:")
        assert row["context"].startswith(kept)
        assert sample.truncated == (kept != row["context"])
        cut += sample.truncated
    assert 0 < cut < 5


def test_chat_templates_are_helmets_with_arguments_only_where_asked_for(root, load_model):
    tokenizer = load_model("llama_chat").tokenizer
    tokenizer_before = dict(vars(tokenizer))
    checkout, (entry, _) = entries(root, "--use_chat_template", "True")
    data = load(checkout, entry)
    row, (sample, *_) = data["data"][0], read_samples(checkout, entry, data, tokenizer)
    turn = f"Given:\n{row['context']}\nThe key is {row['question']}."
    assert tokenizer.decode(sample.tokens) == f"<s>[user]\n{turn}\n[assistant]\n"
    template = "{{ day | default('now') }} " + tokenizer.chat_template
    given = {"chat_template": template, "day": "26 Jul"}
    (dated, *_) = read_samples(checkout, entry, data, tokenizer, given)
    assert tokenizer.decode(dated.tokens) == f"26 Jul <s>[user]\n{turn}\n[assistant]\n"
    assert dict(vars(tokenizer)) == tokenizer_before


def test_a_chat_template_that_there_is_not_is_refused_before_anything_is_run(root, model):
    checkout, both = entries(root, "--use_chat_template", "True")
    with pytest.raises(ValueError, match=r"json_kv is configured with the chat template.*--use-chat-template False"):
        require_askable(model, checkout, both)


def test_a_length_without_room_for_any_context_is_named(root, model):
    checkout, (entry, _) = entries(root, "--input_max_length", "20", "--generation_max_length", "6")
    with pytest.raises(ValueError, match=r"sample 0 of json_kv has no room for any context under 20 tokens.*--lengths"):
        read_samples(checkout, entry, load(checkout, entry), model.tokenizer)


def test_digests_tell_samples_apart(root, model):
    checkout, (entry, short) = entries(root)
    one, other = (read_samples(checkout, e, load(checkout, e), model.tokenizer) for e in (entry, short))
    assert samples_digest(one) == samples_digest(list(one)) != samples_digest(other)
    assert samples_digest(one) != samples_digest([replace(one[0], question="another"), *one[1:]])


def test_prompts_that_do_not_fit_are_named_with_the_remedy_before_any_is_run(root, load_model, tmp_path):
    small = load_model("llama", n_ctx=110, chat=False)
    checkout, both = entries(root)
    with pytest.raises(
        ValueError, match=r"sample \d of json_kv has \d+ tokens.*context has 110: leave out the length 160.*--n-ctx 1"
    ):
        require_askable(small, checkout, both)
    samples = read_samples(checkout, both[1], load(checkout, both[1]), small.tokenizer)
    longest = max(len(sample.tokens) for sample in samples)
    require_room(both[1], samples, longest + 4)
    with pytest.raises(ValueError, match=f"--n-ctx {longest + 4} or more"):
        require_room(both[1], samples, longest + 3)
    answering = Answering((fl.Setting("baseline"),), both[0].max_new_tokens)
    with pytest.raises(ValueError, match="leave out the length 160"):
        answer_entry(small, checkout, both[0], answering, tmp_path)
    assert not list(tmp_path.glob("*.jsonl"))


def test_new_lines_end_a_response_where_helmet_says_so(root, model):
    _, (entry, _) = entries(root)
    own, runs = model.stop_tokens, model
    assert stop_tokens(model.tokenizer, own, entry) == answering_for(runs, entry, (), ()).stop_tokens == own
    _, (entry, _) = entries(root, "--stop_newline", "True")
    newline = model.tokenizer.convert_tokens_to_ids("Ċ")
    assert newline is not None
    assert set(answering_for(runs, entry, (), ()).stop_tokens or ()) == {*own, newline}


def results_of(answering: Answering, model: Any, sample: Any) -> dict[str, dict[str, Any]]:
    """Result of each setting on one sample."""
    return {name: result for name, (result,) in answering(model, [sample])}


def test_a_response_ends_where_the_task_says_and_the_model_stays_as_it_is(root, model):
    checkout, (entry, _) = entries(root)
    sample = read_samples(checkout, entry, load(checkout, entry), model.tokenizer)[0]
    own = model.stop_tokens
    whole = results_of(Answering((fl.Setting("baseline"),), 6), model, sample)["baseline"]["tokens"]
    short = results_of(Answering((fl.Setting("baseline"),), 6, stop_tokens=(whole[2],)), model, sample)["baseline"]
    assert short["tokens"] == whole[: whole.index(whole[2]) + 1]
    assert model.stop_tokens == own


def test_responses_are_those_of_hugging_face_and_of_the_steered_model(root, model, checkpoint):
    checkout, (entry, _) = entries(root)
    theirs: Any = AutoModelForCausalLM.from_pretrained(checkpoint("llama"), attn_implementation="eager")
    chosen = (*settings(), steered(-1))  # two settings that run together
    answering = Answering(chosen, entry.max_new_tokens, HEADS)
    for sample in read_samples(checkout, entry, load(checkout, entry), model.tokenizer)[:3]:
        results = results_of(answering, model, sample)
        ids = sample.tokens[None]
        with torch.no_grad():
            made = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        tokens = made[0, len(sample.tokens) :].tolist()
        assert results["baseline"]["tokens"] == tokens
        assert results["baseline"]["output"] == model.tokenizer.decode(tokens, skip_special_tokens=True)
        encoded = fl.EncodedPrompt(sample.tokens, {})
        for setting in chosen:
            alone = model.generate(encoded, setting.interventions, max_new_tokens=6)
            found = results[setting.name]
            assert found["tokens"][: len(alone.tokens)] == alone.tokens.tolist()
            response = torch.tensor([token for token in found["tokens"] if token not in model.stop_tokens])
            everything = range(len(sample.tokens) + len(response))
            patterns = attention_pattern(
                model, encoded, response, HEADS, list(everything), interventions=setting.interventions
            )
            rows = patterns[:, len(sample.tokens) :, :2].sum(dim=2).mean(dim=1)
            torch.testing.assert_close(torch.tensor(found["sink"]), rows, atol=1e-5, rtol=0)
        assert len({tuple(found["tokens"]) for found in results.values()}) == 3


def test_a_checkpoints_repetition_penalty_is_that_of_hugging_face(root, model, checkpoint, tmp_path):
    folder = shutil.copytree(checkpoint("llama"), tmp_path / "penalised")
    config = json.loads((folder / "generation_config.json").read_text())
    (folder / "generation_config.json").write_text(json.dumps({**config, "repetition_penalty": 1.3}))
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    own = fl.FocusModel.from_pretrained(str(folder), chat=False, device="cpu", stop_strings=())
    checkout, (entry, _) = entries(root)
    assert declared_penalty(model) == 1
    penalty, chosen = declared_penalty(own), (*settings(), steered(-1))
    assert penalty == 1.3
    changed = 0
    samples = read_samples(checkout, entry, load(checkout, entry), own.tokenizer)
    for sample in samples:
        ids = sample.tokens[None]
        with torch.no_grad():
            made = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False)
        together = results_of(Answering(chosen, 12, repetition_penalty=penalty), own, sample)
        assert together["baseline"]["tokens"] == made[0, len(sample.tokens) :].tolist()
        for setting in chosen[1:]:  # two settings that run together
            alone = results_of(Answering((setting,), 12, repetition_penalty=penalty), own, sample)
            assert together[setting.name] == alone[setting.name]
        changed += together != results_of(Answering(chosen, 12), own, sample)
    assert changed
    with pytest.raises(ValueError, match="repetition_penalty is 0"):
        results_of(Answering(settings()[:1], 2, repetition_penalty=0), own, samples[0])


def test_the_token_that_ends_a_response_counts_and_an_empty_response_has_no_attention(root, model):
    checkout, (entry, _) = entries(root)
    sample = read_samples(checkout, entry, load(checkout, entry), model.tokenizer)[0]
    first = results_of(Answering((fl.Setting("baseline"),), 6), model, sample)["baseline"]["tokens"][0]
    stopping = fl.FocusModel(model.hooked, model.tokenizer, chat=False, stop_strings=(), stop_tokens=(first,))
    results = results_of(Answering((fl.Setting("baseline"),), 6, HEADS), stopping, sample)
    assert results["baseline"]["tokens"] == [first]
    assert results["baseline"]["output"] == model.tokenizer.decode([first])
    assert results["baseline"]["sink"] == [None] * 3


def test_a_response_ends_before_a_stop_string_of_the_model(root, model):
    """Text and tokens then contain neither the string nor anything after it."""
    checkout, (entry, _) = entries(root)
    sample = read_samples(checkout, entry, load(checkout, entry), model.tokenizer)[0]
    answering = Answering((fl.Setting("baseline"),), 12, HEADS)
    whole = results_of(answering, model, sample)["baseline"]
    stop = whole["output"].strip()[8:10]
    stopping = fl.FocusModel(model.hooked, model.tokenizer, chat=False, stop_strings=(stop,))
    found = results_of(answering, stopping, sample)["baseline"]
    assert found["output"] == whole["output"][: whole["output"].index(stop)].strip()
    assert found["tokens"] == whole["tokens"][: len(found["tokens"])]
    assert 0 < len(found["tokens"]) < len(whole["tokens"])
    assert len(model.tokenizer.decode(found["tokens"][:-1]).strip()) <= len(found["output"])
    assert found["sink"] != whole["sink"]


def test_the_work_on_a_sample_is_a_plain_value(root, model):
    checkout, (entry, _) = entries(root)
    sample = read_samples(checkout, entry, load(checkout, entry), model.tokenizer)[0]
    answering = Answering(settings(), 3, HEADS)
    copied, travelled = pickle.loads(pickle.dumps((answering, sample)))
    assert results_of(copied, model, travelled) == results_of(answering, model, sample)


def run(root: Path, model: fl.FocusModel, folder: Path, chosen: Any = None, **options: Any) -> Any:
    checkout, (entry, _) = entries(root)
    answering = Answering(settings() if chosen is None else chosen, entry.max_new_tokens, HEADS)
    return checkout, entry, *answer_entry(model, checkout, entry, answering, folder, **options)


def test_a_killed_run_goes_on_and_repeats_nothing(root, model, tmp_path, monkeypatch):
    *_, store = run(root, model, tmp_path)
    whole = store.path.read_text().splitlines(keepends=True)
    assert len(whole) == 6
    store.path.write_text("".join(whole[:3]) + whole[3][:20])
    asked: list[str] = []
    call = Answering.__call__

    def counted(self: Any, model: Any, batch: Any, *rest: Any) -> Any:
        asked.append(batch[0].id)
        return call(self, model, batch, *rest)

    monkeypatch.setattr(Answering, "__call__", counted)
    run(root, model, tmp_path)
    assert asked == ["2", "3", "4"]
    assert store.path.read_text() == "".join(whole)
    with pytest.raises(OtherResultsError, match="settings"):
        run(root, model, tmp_path, settings()[:1])


def test_when_memory_runs_out_the_budget_stays_smaller(root, model, tmp_path, monkeypatch):
    budgets: list[int] = []
    call = Answering.__call__

    def scarce(self: Any, model: Any, batch: Any, budget: int, *rest: Any) -> Any:
        budgets.append(budget)
        if budget > 40:
            raise MemoryError("none left")
        return call(self, model, batch, budget, *rest)

    monkeypatch.setattr(Answering, "__call__", scarce)
    with pytest.warns(UserWarning, match="memory ran out"):
        *_, store = run(root, model, tmp_path, batch_tokens=1000)
    assert len(store.records) == 5
    assert budgets[0] == 1000
    assert all(budget <= 40 for budget in budgets[-5:])


def test_files_are_written_by_helmets_code_with_what_made_them(root, model, tmp_path):
    checkout, entry, data, store = run(root, model, tmp_path / "records")
    records = list(store.records.values())
    records[1]["results"]["3_1"]["output"] = f" castle {data['data'][1]['answer'][1]}"
    scores = write_results(checkout, entry, data, store, model.tokenizer, tmp_path / "output")
    assert sorted(path.name for path in (tmp_path / "output").iterdir()) == ["model-3_1", "model-baseline"]
    for name in ("baseline", "3_1"):
        folder = tmp_path / "output" / f"model-{name}"
        (file,) = folder.glob("*.json")
        assert file.name == "json_kv_eval_pairs_in160.json"
        content = json.loads(file.read_text())
        assert json.loads((folder / f"{file.name}.score").read_text()) == content["averaged_metrics"]
        assert content["args"]["output_dir"] == str(folder)
        assert (content["args"]["num_workers"], content["args"]["overwrite"]) == (4, False)
        assert content["throughput"] is None
        assert content["focuslens"]["setting"] == name
        assert {"model", "data", "settings", "seed", "versions", "helmet"} <= content["focuslens"].keys()
        for place, (row, record) in enumerate(zip(content["data"], records, strict=True)):
            said = "Found:" + record["results"][name]["output"]
            assert row["output"] == said
            assert row["output_len"] == len(record["results"][name]["tokens"])
            right = sum(answer in said for answer in data["data"][place]["answer"]) / 2
            assert row["substring_exact_match"] == right
            assert scores.values[name][place] == 100 * right
            assert scores.sinks[name][place] == pytest.approx(100 * sum(record["results"][name]["sink"]) / 3)
    assert scores.values["3_1"][1] == 100
    assert scores.questions == tuple(record["question"] for record in records)
    assert scores.truncated == 0


def test_a_figure_that_helmet_did_not_compute_is_named(root, model, tmp_path):
    checkout, entry, data, store = run(root, model, tmp_path / "records")
    other = replace(entry, task=replace(entry.task, metric="NDCG@10"))
    with pytest.raises(ValueError, match=r"computed no NDCG@10 for json_kv; its results have question"):
        write_results(checkout, other, data, store, model.tokenizer, tmp_path / "output")
