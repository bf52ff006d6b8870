"""The synthetic corpus: reproducible, with disjoint splits, and answerable from the gold document alone."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from functools import cache
from hashlib import sha256
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from focuslens.data.synthetic import (
    CorpusSettings,
    Split,
    SyntheticContext,
    build_tokenizer,
    generate_context,
    load_synthetic,
    spread_positions,
)
from focuslens.data.synthetic_words import FILLER_STARTS, FIRST_NAMES, PLACE_NAMES, SURNAMES
from focuslens.prompts.sample import MultiDocSample

SPLITS: tuple[Split, ...] = ("train", "validation", "test")
POSITIONS = (0, 4, 9, 14, 19)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return build_tokenizer()


@pytest.fixture(scope="module")
def samples() -> list[MultiDocSample]:
    return load_synthetic(100)


def contexts(split: Split, count: int) -> Iterator[SyntheticContext]:
    rng = Random(7)
    return (generate_context(rng, 20, split) for _ in range(count))


def told(answer: str, text: str) -> bool:
    """Whether the text contains the answer as whole words, in order."""
    return re.search(rf"\b{re.escape(answer.lower())}\b", text.lower()) is not None


def names(text: str) -> set[str]:
    pairs = re.findall(r"\b([A-Z][a-z]+) (?=([A-Z][a-z]+))", text)
    return {f"{a} {b}" for a, b in pairs if (a in FIRST_NAMES and b in SURNAMES) or a in PLACE_NAMES}


def skeleton(text: str) -> str:
    """Wording of a question: its text with the name replaced."""
    return re.sub(r"\b[A-Z][a-z]+ [A-Z][a-z]+\b", "NAME", text)


def test_the_samples_are_those_of_every_process_and_version() -> None:
    # The digest is fixed. String hashing differs between processes, so code that depends on it would fail in some runs.
    samples = load_synthetic(7, split="validation", answerable=0.5)
    told_of = json.dumps([[str(sample.prompt()), sample.answers, sample.gold_index] for sample in samples])
    assert sha256(told_of.encode()).hexdigest()[:16] == "744666d2ae6d556e"


def test_the_seed_and_the_split_change_the_samples(samples: list[MultiDocSample]) -> None:
    other_seed, other_split = load_synthetic(5, seed=43), load_synthetic(5, split="train")
    assert len({samples[0].question, other_seed[0].question, other_split[0].question}) == 3


def test_fewer_samples_are_the_first_of_more(samples: list[MultiDocSample]) -> None:
    assert load_synthetic(12) == samples[:12]


def test_gold_positions_cycle_and_share_their_question(samples: list[MultiDocSample]) -> None:
    assert [sample.gold_index for sample in samples] == list(POSITIONS) * 20
    for start in range(0, 100, 5):
        variants = samples[start : start + 5]
        assert len({(v.question, v.answers, v.question_id, frozenset(v.documents)) for v in variants}) == 1
        assert len({tuple(d for d in v.documents if d != v.documents[v.gold_index or 0]) for v in variants}) == 1
    assert len({sample.question_id for sample in samples}) == 20
    assert len({sample.id for sample in samples}) == 100


def test_the_answer_is_in_the_gold_document_and_in_no_other(samples: list[MultiDocSample]) -> None:
    for sample in samples:
        found = [told(sample.answers[0], str(document)) for document in sample.documents]
        assert [index for index, there in enumerate(found) if there] == [sample.gold_index], sample.question


@pytest.mark.parametrize("split", SPLITS)
def test_every_question_of_a_context_is_told_by_its_document_alone(split: Split) -> None:
    for context in contexts(split, 20):
        for asked in context.answerable:
            found = [told(asked.answer, str(document)) for document in context.documents]
            assert [index for index, there in enumerate(found) if there] == [asked.gold_index], asked
            assert told(asked.answer, asked.response)


@cache
def used(split: Split) -> dict[str, set[str]]:
    """Names, values and question wordings in 40 contexts of a split."""
    found: dict[str, set[str]] = {"names": set(), "values": set(), "wordings": set()}
    for context in contexts(split, 40):
        found["names"].update(*(names(str(document)) for document in context.documents))
        found["values"].update(asked.answer for asked in context.answerable)
        found["wordings"].update(skeleton(asked.question) for asked in (*context.answerable, *context.unanswerable))
    return found


@pytest.mark.parametrize("part", ["names", "values", "wordings"])
def test_held_out_names_values_and_wordings_are_in_no_other_split(part: str) -> None:
    train, validation, test = (used(split)[part] for split in SPLITS)
    # The test split has a fifth of the wordings, which are six frames times three questions for each of nine
    # attributes.
    assert min(len(train), len(validation), len(test)) > (15 if part == "wordings" else 30), "too little to compare"
    assert not train & validation
    assert not train & test
    assert not validation & test


def test_held_out_names_and_values_are_made_of_words_that_training_has() -> None:
    for part in ("names", "values"):
        known = {word for text in used("train")[part] for word in text.split()}
        ours = {word for text in used("test")[part] for word in text.split() if not word.isdigit()}
        # 40 contexts do not contain every word of a split.
        assert len(ours - known) < 0.2 * len(ours), f"words that only the test split has: {ours - known}"


def test_questions_have_competitors_whose_names_share_a_part(samples: list[MultiDocSample]) -> None:
    rivals: list[int] = []
    for sample in samples[::5]:
        gold = sample.documents[sample.gold_index or 0]
        asked_of = next(iter(names(sample.question)))
        assert asked_of in gold.title
        others = [document.title for document in sample.documents if document != gold]
        rivals.append(sum(bool(set(asked_of.split()) & set(title.split())) for title in others))
    assert sum(rivals) / len(rivals) > 2.5


def test_without_lookalikes_no_part_of_a_name_comes_twice() -> None:
    settings = CorpusSettings(lookalikes=0.0, mentions=0.0, plain=1.0)
    for seed in range(20):
        documents = generate_context(Random(seed), 8, "train", settings).documents
        firsts = [document.title.split()[0] for document in documents]
        assert len(set(firsts)) == len(firsts)


def test_unanswerable_samples_are_answered_by_no_document() -> None:
    samples = load_synthetic(60, answerable=0.5)
    untold = [sample for sample in samples if sample.gold_index is None]
    questions = {sample.question_id for sample in samples}
    assert 0.3 < len({sample.question_id for sample in untold}) / len(questions) < 0.7
    assert len({sample.id for sample in samples}) == len(samples)
    for sample in untold:
        assert sample.answers == ("not recorded",)
        assert not any(told(sample.answers[0], str(document)) for document in sample.documents)


def test_the_share_of_answerable_questions_does_not_move_the_others() -> None:
    everything = {sample.id: sample for sample in load_synthetic(20, gold_positions=(3,))}
    some = [s for s in load_synthetic(20, gold_positions=(3,), answerable=0.6) if s.gold_index is not None]
    assert 0 < len(some) < 20
    assert all(everything[sample.id] == sample for sample in some)


@pytest.mark.parametrize("text", ["Port Ashby", "  two  spaces\n\n\tand a tab", "naïve 東京 🦜", "1874, 7 and 105"])
def test_the_tokenizer_loses_nothing(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    ids = tokenizer(text).input_ids
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_prompts_are_words_with_offsets_that_cut_the_text(
    tokenizer: PreTrainedTokenizerFast, samples: list[MultiDocSample]
) -> None:
    prompt = samples[7].prompt()
    encoded = tokenizer(str(prompt), return_offsets_mapping=True)
    assert tokenizer.decode(encoded.input_ids, skip_special_tokens=True) == str(prompt)
    offsets = encoded["offset_mapping"][1:]
    assert "".join(str(prompt)[start:end] for start, end in offsets) == str(prompt)
    letters = [str(prompt)[a:b] for a, b in offsets if b - a == 1 and str(prompt)[a:b].isalpha()]
    assert not letters, f"words missing from the vocabulary fall apart into {letters}"
    starts = {start for start, _ in offsets}
    assert all(start in starts for start, _ in prompt.spans["document"]), "a document starts inside a token"


@pytest.mark.parametrize("split", SPLITS)
def test_every_answer_and_response_is_made_of_known_words(tokenizer: PreTrainedTokenizerFast, split: Split) -> None:
    for context in contexts(split, 10):
        for asked in (*context.answerable, *context.unanswerable):
            answer = tokenizer(f" {asked.answer}", add_special_tokens=False).input_ids
            assert 1 <= len(answer) <= 3, asked.answer
            texts = [f" {asked.response}", f" {asked.question}"]
            tokens = [t for text in texts for t in tokenizer.tokenize(text)]
            assert not [t for t in tokens if len(t) == 1 and t.isalpha()], asked


def test_the_tokenizer_survives_saving(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    text = " Alden Marsh was born in Port Ashby."
    assert again(text).input_ids == tokenizer(text).input_ids
    assert again.decode(again(text).input_ids, skip_special_tokens=True) == text
    assert again.chat_template is None
    assert (again.bos_token, again.eos_token, again.pad_token) == ("<s>", "</s>", "<pad>")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_samples": 0}, "num_samples is 0"),
        ({"gold_positions": (0, 20)}, "gold_positions 20 is outside of the documents"),
        ({"gold_positions": ()}, "gold_positions is empty"),
        ({"answerable": 1.5}, "answerable is 1.5"),
        ({"num_documents": 61}, "num_documents is 61"),
    ],
)
def test_arguments_out_of_range_are_named(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        load_synthetic(**arguments)  # type: ignore[arg-type]


def test_no_token_of_the_held_out_splits_is_missing_from_training() -> None:
    """Every token of the held-out splits occurs in training.

    A capitalized or space-prefixed form of a word is a separate token. An untrained embedding has no meaning.
    """
    tokenizer = build_tokenizer()

    def tokens(split: Split, contexts: int) -> set[int]:
        found: set[int] = set()
        for seed in range(contexts):
            context = generate_context(Random(f"{split}/{seed}"), 20, split)
            found.update(tokenizer(str(MultiDocSample("?", ("x",), context.documents, None).prompt())).input_ids)
            for asked in (*context.answerable, *context.unanswerable):
                text = f"\n\nQuestion: {asked.question}\nAnswer: {asked.response}"
                found.update(tokenizer(text, add_special_tokens=False).input_ids)
        return found

    trained = tokens("train", 150)
    held_out: tuple[Split, Split] = ("validation", "test")
    for split in held_out:
        missing = tokens(split, 20) - trained
        assert not missing, [tokenizer.decode([token]) for token in missing]


def test_large_contexts_ask_nothing_unanswerable_that_a_document_tells():
    for seed in range(20):
        context = generate_context(Random(seed), 60, "test")
        told = {one.response.split(" was ")[0] for one in context.answerable}
        refused = [one.response.split(" was ")[0] for one in context.unanswerable]
        assert not told & set(refused)
        assert len(refused) == len(set(refused))


def test_a_context_that_needs_more_values_than_there_are_is_refused():
    with pytest.raises(ValueError, match=r"no further .* fewer documents or fewer facts"):
        generate_context(Random(0), 60, "train", CorpusSettings(facts=(5, 5)))


def test_default_gold_positions_are_spread_over_however_many_documents() -> None:
    assert spread_positions(20) == POSITIONS
    assert [sample.gold_index for sample in load_synthetic(5, num_documents=10)] == [0, 2, 4, 6, 9]
    assert [sample.gold_index for sample in load_synthetic(2, num_documents=1)] == [0, 0]


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"facts": (3, 1)}, r"facts is \(3, 1\)"),
        ({"facts": (0, 1)}, r"facts is \(0, 1\).* 1 or more"),
        ({"fillers": (-1, 1)}, r"fillers is \(-1, 1\)"),
        ({"lookalikes": 1.1}, "lookalikes is 1.1"),
        ({"mentions": -0.1}, "mentions is -0.1"),
        ({"plain": 2.0}, "plain is 2.0"),
    ],
)
def test_settings_out_of_range_are_named(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        CorpusSettings(**settings)


def test_the_plain_wording_is_refused_where_it_would_not_be_held_out() -> None:
    with pytest.raises(ValueError, match=r"plain is 0\.5.* not to test"):
        generate_context(Random(0), 4, "test", CorpusSettings(plain=0.5))


def test_pronouns_stand_only_behind_a_sentence_about_the_same_subject() -> None:
    """A pronoun follows only a sentence about the same subject, so that its referent is clear.

    After a sentence about another person "she" would be ambiguous, and after a filler sentence "it" would be.
    """
    settings = CorpusSettings(facts=(3, 4), fillers=(1, 1), mentions=1.0)
    pronouns = 0
    for seed in range(60):
        for document in generate_context(Random(seed), 10, "train", settings).documents:
            sentences = document.text.split(". ")
            for before, sentence in pairwise(sentences):
                if re.search(r"\b([Ss]he|[Hh]e|[Ii]t) (?!is well)", sentence):
                    pronouns += 1
                    assert not re.match("|".join(FILLER_STARTS), before), document.text
                    assert not re.search("confused|mistaken|instead|been lost", before), document.text
    assert pronouns > 100


def test_a_fact_right_behind_a_mention_of_somebody_else_has_the_full_name() -> None:
    settings = CorpusSettings(facts=(3, 4), fillers=(0, 0), mentions=1.0)
    behind = 0
    for seed in range(20):
        for document in generate_context(Random(seed), 10, "train", settings).documents:
            subject = re.sub("The story of |A short note on | in the local papers", "", document.title)
            for before, sentence in pairwise(document.text.split(". ")):
                if re.search("confused|mistaken|instead|been lost", before):
                    behind += 1
                    assert subject in sentence, document.text
    assert behind > 50
