"""Distractors that BM25 chooses: compared with the formula, without answers and near-duplicates, and reproducible."""

from __future__ import annotations

import gzip
import json
import logging
import math
import os
import re
import string
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from bm25s.stopwords import STOPWORDS_EN_PLUS

import focuslens as fl
from focuslens.data._bm25 import PassageIndex
from focuslens.prompts.sample import prompts_digest
from tests.support.multidoc_files import Json, oracle_record, placed_record, retrieval_record, titles, write
from tests.support.paths import ROOT, SHARED_DATA

ORACLE = SHARED_DATA / "nq-open-oracle.jsonl.gz"
needs_data = pytest.mark.skipif(not ORACLE.is_file(), reason=f"{ORACLE} is not there")

RIVER = "the long river rises in the northern hills and flows through nine towns before it meets the grey sea"

TEXTS = {
    "Bridge": "the old stone bridge over the river was opened in 1932",
    "Ferry": "a ferry crossed the river every hour until the bridge came",
    "Tower": "the stone tower is older than any bridge and any ferry",
    "Market": "the market opens in summer",
    "Harbour": "a harbour for one ferry and for nobody else in the world at all ferry ferry",
    "Museum": "paintings of ships and of storms",
    "Station": "trains leave the station for the river",
    "Again": "trains leave the station for the river",
}


@cache
def words(text: str) -> list[str]:
    return [word for word in re.findall(r"\w+", text.lower()) if word not in STOPWORDS_EN_PLUS]


def reference(question: str, texts: Sequence[str], k1: float = 1.5, b: float = 0.75) -> list[float]:
    """BM25 in Lucene's variant, from its formula."""
    documents = [Counter(words(text)) for text in texts]
    mean_length = sum(sum(document.values()) for document in documents) / len(documents)
    scores = [0.0] * len(documents)
    for word in words(question):
        holders = sum(word in document for document in documents)
        idf = math.log(1 + (len(documents) - holders + 0.5) / (holders + 0.5))
        for i, document in enumerate(documents):
            length = 1 - b + b * sum(document.values()) / mean_length
            scores[i] += idf * document[word] / (document[word] + k1 * length)
    return scores


def ranked(scores: Sequence[float]) -> list[int]:
    return sorted(range(len(scores)), key=lambda i: (-scores[i], i))


def records(
    texts: dict[str, str] = TEXTS, question: str = "when was the stone bridge over the river opened"
) -> list[Json]:
    """Records of an oracle file. Every question but the first asks for its title, which no other passage contains."""
    made = [oracle_record(i, text, (title,)) for i, (title, text) in enumerate(texts.items())]
    for record, title in zip(made, texts, strict=True):
        record["ctxs"][0]["title"] = title
    made[0] |= {"question": question, "answers": ["1932"]}
    return made


def documents(texts: dict[str, str] = TEXTS) -> list[fl.Document]:
    return [fl.Document(title, text) for title, text in texts.items()]


def load(path: Path, num_documents: int, **options: Any) -> fl.MultiDocData:
    return fl.load_multidoc(path, num_documents=num_documents, distractors="bm25", **options)


def distractors(sample: fl.MultiDocSample) -> set[str]:
    return {title for i, title in enumerate(titles(sample)) if i != sample.gold_index}


# --- scores and ranking -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "question",
    [
        "when was the stone bridge over the river opened",
        "Ferry, ferry and FERRY: the station?",
        "who painted the storms of 1932",
        "whose zeppelin was it",
    ],
)
def test_scores_are_those_of_the_formula(question: str) -> None:
    texts = list(TEXTS.values())
    index, expected = PassageIndex(texts), reference(question, texts)
    np.testing.assert_allclose(index.scores(question), expected, rtol=1e-12, atol=1e-15)
    assert index.ranking(question).tolist() == ranked(expected)


def test_passages_with_equal_scores_are_in_their_order() -> None:
    ranking = PassageIndex(["red", "blue sky", "red", "blue sea", "red"]).ranking("is it red").tolist()
    assert ranking == [0, 2, 4, 1, 3]
    assert PassageIndex(["!!!", "", "the"]).ranking("what is it").tolist() == [0, 1, 2]  # no words at all
    assert PassageIndex(["red", "blue"]).ranking("").tolist() == [0, 1]


def test_an_oracle_file_gives_the_passages_that_the_formula_ranks_first(tmp_path: Path) -> None:
    made = records()
    path = write(tmp_path / "o.jsonl", made)
    texts = [f"{title} {text}" for title, text in TEXTS.items()]
    for line, record in enumerate(made):
        # The answer to all questions but the first is the gold passage's title. "Again" repeats "Station".
        usable = [
            i
            for i in ranked(reference(record["question"], texts))
            if i != line and record["answers"][0].lower() not in texts[i].lower()
        ]
        for n in (1, 3):
            expected = {list(TEXTS)[i] for i in usable[:n]}
            samples = [sample for sample in load(path, n + 1) if sample.question_id == str(line)]
            assert [distractors(sample) for sample in samples] == [expected] * (n + 1)
    assert distractors(load(path, 3)[0]) == {"Ferry", "Tower"}


def test_the_whole_file_is_ranked_also_with_a_limit(tmp_path: Path) -> None:
    path = write(tmp_path / "o.jsonl.gz", records())
    assert list(load(path, 4, limit=1)) == list(load(path, 4))[:4]
    assert load(path, 4, limit=1).questions == 1


# --- passages that are left out ---------------------------------------------------------------------------------------


def test_passages_with_an_answer_are_left_out_and_counted(tmp_path: Path) -> None:
    texts = {
        "Bridge": "the stone bridge was opened by Ann Lee",
        "Rival": "the stone bridge was opened not by ann, lee!",  # the answer after normalisation
        "Ann Lee": "the stone bridge in a poem",  # the answer in the title
        "Tower": "a stone tower beside a bridge",
        "Market": "a market",
        "Ann Leeds": "a hall",  # less similar than the last distractor, and therefore not counted
    }
    made = records(texts, "who opened the stone bridge")
    made[0]["answers"] = ["Ann Lee"]
    path = write(tmp_path / "o.jsonl", made)
    data = load(path, 3, limit=1)
    assert distractors(data[0]) == {"Tower", "Market"}
    assert data.description["left_out"] == {"answers": 2, "near_duplicates": 0}
    # A second round takes the passage that contains the answer only as part of a longer word.
    more = load(path, 4, limit=1)
    assert distractors(more[0]) == {"Tower", "Market", "Ann Leeds"}
    assert more.description["left_out"] == {"answers": 2, "near_duplicates": 0}
    with pytest.raises(ValueError, match=r"o\.jsonl, line 1: there are 3 distractors, but num_documents=5 needs 4"):
        load(path, 5, limit=1)


def river(n: int, tail: str) -> str:
    """The first ``n`` words of the gold passage, and then other words."""
    return " ".join([*RIVER.split()[:n], tail])


def test_near_duplicates_of_the_gold_passage_are_left_out(tmp_path: Path) -> None:
    """The gold passage has 17 words without articles, so 13 n-grams; with its title, 18 words and 14 n-grams."""
    texts = {
        "River": RIVER,
        "Copy": RIVER,
        "Excerpt": "northern hills and flows through nine towns before it meets",  # contained in the gold passage
        "Longer": f"{RIVER} {' '.join(f'word{i}' for i in range(200))}",  # contains the gold passage
        "Kin": "the long river rises in the northern hills and feeds many mills that grind corn for bread and for beer",
        "Other": "the northern hills have a long river",
        "Sea": "ships cross the grey sea",
    }
    made = records(texts, "where does the long river rise in the northern hills")
    made[0]["answers"] = ["Alps"]
    data = load(write(tmp_path / "o.jsonl", made), 4, limit=1)
    assert distractors(data[0]) == {"Kin", "Other", "Sea"}
    assert data.description["left_out"] == {"answers": 0, "near_duplicates": 3}


@pytest.mark.parametrize(("shared", "usable"), [(8, True), (9, False)])
def test_more_than_half_of_the_shorter_passages_word_5_grams_make_a_near_duplicate(shared: int, usable: bool) -> None:
    gold = " ".join(f"w{i}" for i in range(40))
    other = " ".join([*(f"w{i}" for i in range(shared)), *(f"x{i}" for i in range(11 - shared))])
    # With the title, the other passage has 12 words and 8 n-grams, of which it shares ``shared - 4``: 4 are half.
    sample = fl.MultiDocSample("w0 w1", ("yes",), (fl.Document("gold", gold),), 0)
    passages = [fl.Document("other", other), fl.Document("far", "nothing")]
    assert titles(fl.with_distractors([sample], passages, 1)[0])[1] == ("other" if usable else "far")


def test_gold_passages_of_a_repeated_question_are_no_distractors(tmp_path: Path) -> None:
    made = records()
    made.append(oracle_record(9, "bridges in stone cross the river, opened long ago", ("long ago",)))
    made[-1]["question"] = made[0]["question"].upper()
    data = load(write(tmp_path / "o.jsonl", made), 5, gold_positions=(0,))
    assert data[0].question_id == data[len(made) - 1].question_id
    assert distractors(data[0]) == distractors(data[len(made) - 1])
    assert not {"Bridge", "G9"} & distractors(data[0])


def test_no_distractor_occurs_twice(tmp_path: Path) -> None:
    texts = TEXTS | {"station": "Trains leave the station, for the river."}  # "Station" after normalisation
    made = records(texts, "which trains leave for the river")
    data = load(write(tmp_path / "o.jsonl", made), 4, limit=1)
    assert distractors(data[0]) == {"Station", "Again", "Ferry"}


# --- order and spans --------------------------------------------------------------------------------------------------


def test_the_seed_sets_the_order_and_not_the_choice(tmp_path: Path) -> None:
    path = write(tmp_path / "o.jsonl", records())
    orders: set[tuple[str, ...]] = set()
    for seed in range(12):
        samples = list(load(path, 5, gold_positions=(0, 2), seed=seed))
        assert list(load(path, 5, gold_positions=(0, 2), seed=seed)) == samples
        assert distractors(samples[0]) == distractors(samples[1])
        assert (samples[0].gold_index, samples[1].gold_index) == (0, 2)
        assert titles(samples[0])[0] == titles(samples[1])[2] == "Bridge"
        orders |= {tuple(title for title in titles(sample) if title != "Bridge") for sample in samples[:2]}
    assert len(orders) > 8
    assert len({frozenset(order) for order in orders}) == 1


def test_spans_are_those_of_the_documents(tmp_path: Path) -> None:
    for sample in load(write(tmp_path / "o.jsonl", records()), 4, gold_positions=(2,)):
        prompt = sample.prompt("long")
        shown = [str(document) for document in sample.documents]
        assert prompt.part("document") == tuple(shown)
        assert prompt.part("relevant") == (shown[2],)
        assert prompt.part("irrelevant") == (*shown[:2], shown[3])


SCRIPT = """
import sys, focuslens as fl
from focuslens.prompts.sample import prompts_digest
print(prompts_digest(fl.load_multidoc(sys.argv[1], num_documents=5, distractors="bm25")))
"""


def test_every_process_makes_the_same_choice(tmp_path: Path) -> None:
    path = write(tmp_path / "o.jsonl", records())
    digests = {prompts_digest(load(path, 5))}
    for hash_seed in ("1", "2"):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed, "PYTHONPATH": str(ROOT)}
        command = [sys.executable, "-c", SCRIPT, str(path)]
        digests.add(subprocess.run(command, env=environment, capture_output=True, text=True, check=True).stdout.strip())
    assert len(digests) == 1


# --- refusals ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("maker", "kind"), [(placed_record, "placed"), (retrieval_record, "retrieval")])
def test_files_with_distractors_of_their_own_are_refused(tmp_path: Path, maker: Any, kind: str) -> None:
    path = write(tmp_path / "f.jsonl", map(maker, range(3)))
    with pytest.raises(ValueError, match=rf"f\.jsonl is of the kind '{kind}', whose questions have distractors of"):
        load(path, 3)
    assert fl.load_multidoc(path, num_documents=3, distractors="random").description["distractors"] == "random"


@pytest.mark.usefixtures("unchecked")
def test_an_unknown_choice_is_refused(tmp_path: Path) -> None:
    choice: Any = "tfidf"
    with pytest.raises(ValueError, match="distractors is 'tfidf'; it must be one of random, bm25"):
        fl.load_multidoc(write(tmp_path / "o.jsonl", records()), num_documents=3, distractors=choice)


# --- samples and passages of one's own --------------------------------------------------------------------------------


def test_replaced_distractors_are_those_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path / "o.jsonl", records())
    for seed in (42, 7):
        expected = list(load(path, 5, gold_positions=(0, 2, 4), seed=seed))
        given = fl.load_multidoc(path, num_documents=5, gold_positions=(0, 2, 4), seed=99)
        assert list(given) != expected
        assert fl.with_distractors(given, documents(), 4, seed) == expected


def test_samples_keep_everything_but_their_distractors(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "focuslens")
    gold = fl.Document("Gold", "the bridge was opened in 1932")
    own = fl.Document("Own", "a distractor of the sample's own")
    first = fl.MultiDocSample("when was the bridge opened", ("1932",), (own, gold), 1, "q", "a")
    second = replace(first, question="the market in summer?", documents=(gold,), gold_index=0, name="b")
    without = fl.MultiDocSample("where is the ferry", ("here",), (own,), None)
    made = fl.with_distractors([first, second, without], documents(), 3)
    for before, after in zip((first, second, without), made, strict=True):
        assert replace(after, documents=before.documents) == before
        assert len(after.documents) == (3 if before.gold_index is None else 4)
        assert own not in after.documents
    assert made[0].documents[1] == made[1].documents[0] == gold
    assert distractors(made[0]) == distractors(made[1]) == {"Ferry", "Tower", "Market"}  # "Bridge" has the answer
    assert distractors(made[2]) == {"Ferry", "Tower", "Harbour"}
    assert "2 questions: 1 passages with an accepted answer, 0 gold passages" in caplog.text


def test_samples_of_a_question_at_the_same_position_have_other_orders() -> None:
    sample = fl.MultiDocSample("when was the bridge opened", ("1932",), tuple(documents())[:1], 0, "q")
    made = fl.with_distractors([replace(sample, name=name) for name in "abcdef"], documents(), 5)
    assert len({tuple(titles(sample)) for sample in made}) > 3
    assert len({frozenset(titles(sample)) for sample in made}) == 1


def test_answers_and_gold_documents_of_all_samples_of_a_question_count() -> None:
    gold = [fl.Document(title, TEXTS[title]) for title in ("Bridge", "Ferry")]
    samples = [
        fl.MultiDocSample("bridge and river", (answer,), (document,), 0, "q", answer)
        for document, answer in zip(gold, ("1932", "older"), strict=True)
    ]
    assert [distractors(sample) for sample in fl.with_distractors(samples, documents(), 1)] == [{"Again"}] * 2


@pytest.mark.usefixtures("unchecked")
def test_replacements_that_cannot_be_made_are_refused() -> None:
    sample = fl.MultiDocSample("when was the bridge opened", ("1932",), tuple(documents()), 4, "q")
    first = replace(sample, gold_index=0)
    refusals: list[tuple[type[Exception], str, Any, Any, Any]] = [
        (ValueError, "n is 0; it must be at least 1", [first], documents(), 0),
        (TypeError, "n is 'x', a str; it must be an integer", [first], documents(), "x"),
        (TypeError, r"samples is one MultiDocSample", first, documents(), 3),
        (TypeError, r"passages\[0\] is 'text', a str; it must be a list of Document", [first], ["text"], 1),
        (ValueError, "sample 'q@4' is at 4, but with n=3 there are 4 documents", [sample], documents(), 3),
        (ValueError, "there are 0 distractors for question 'q', but n is 2", [first], [], 2),
        (ValueError, "7 distractors for question 'q', but n is 8: 0 other passages", [first], documents(), 8),
        (ValueError, "the answer 'The' is empty after", [replace(first, answers=("The",))], documents(), 1),
    ]
    for kind, message, samples, passages, n in refusals:
        with pytest.raises(kind, match=message):
            fl.with_distractors(samples, passages, n)
    assert fl.with_distractors([], documents(), 3) == []


# --- the real file ----------------------------------------------------------------------------------------------------


def norm(text: str) -> str:
    kept = "".join(c for c in text.lower() if c not in string.punctuation)
    return " ".join(word for word in re.split(r"\s+", kept) if word not in {"a", "an", "the", ""})


@pytest.mark.slow
@needs_data
def test_the_real_oracle_file() -> None:
    data = load(ORACLE, 20, gold_positions=(0,))
    lines = [json.loads(line) for line in gzip.decompress(ORACLE.read_bytes()).splitlines()]
    texts = [f"{line['ctxs'][0]['title']} {line['ctxs'][0]['text']}" for line in lines]
    assert data.description["left_out"] == {"answers": 2338, "near_duplicates": 217}
    assert prompts_digest(data[:300])[:16] == "216e11e7d8ebea5e"
    random = fl.load_multidoc(ORACLE, gold_positions=(0,))
    overlap = {"bm25": 0.0, "random": 0.0}
    for line in range(0, 2655, 177):
        scores = reference(lines[line]["question"], texts)
        by_text = dict(zip(texts, scores, strict=True))
        chosen = [f"{document.title} {document.text}" for document in data[line].documents[1:]]
        answers = [norm(answer) for answer in lines[line]["answers"]]
        better = {text for text, score in by_text.items() if score > min(map(by_text.__getitem__, chosen)) + 1e-9}
        for text in better - set(chosen) - {texts[line]}:  # left out with a reason
            grams = [set(zip(*(norm(one).split()[i:] for i in range(5)), strict=False)) for one in (text, texts[line])]
            repeats = 2 * len(grams[0] & grams[1]) > min(map(len, grams))
            duplicate = norm(text) in map(norm, chosen)
            assert repeats or duplicate or any(answer in norm(text) for answer in answers), text
        assert not any(answer in norm(text) for answer in answers for text in chosen)
        overlap["bm25"] += sum(by_text[text] for text in chosen)
        overlap["random"] += sum(by_text[f"{d.title} {d.text}"] for d in random[line].documents[1:])
    assert overlap["bm25"] > 10 * overlap["random"]
