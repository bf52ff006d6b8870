"""Scores of retrieval heads against a loop over Hugging Face's full eager patterns, and against worked examples."""

from __future__ import annotations

import math
import re
import sys
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

import focuslens as fl
from focuslens import FocusModel, NeedleSample, Prompt, RetrievalScores
from focuslens.model.generation import Generation, Prefix
from focuslens.prompts.batch import EncodedPrompt, PromptBatch
from focuslens.scores.retrieval_scores import NoRunCountsError, _run, copy_scores
from focuslens.scores.rouge import _scorer, rouge_1_recall
from tests.support.checkpoints import build_checkpoint
from tests.support.reference import ReferenceModel, tokens_of_ranges

FAMILIES = ("llama", "qwen3", "mistral_window")

NEEDLE = "silver garden castle silver castle garden tower"
ANSWER = "silver castle garden tower"
NEW_TOKENS = 8

MARGIN = 1e-5
"""Minimum distance between a head's largest attention weight and any weight that would change the outcome.

The distance exceeds the rounding error.
"""


def _prompts() -> dict[str, str]:
    """Prompts of unequal length, by name. The needle is at the beginning, in the middle or at the end."""
    made = {
        "middle": f"The painter saw {NEEDLE} near the harbour. Where?",
        "short": f"Is {NEEDLE} here",
    }
    filler = "The old wagon stood near the bridge and the market. A doctor met the queen on the island in winter."
    for number, word in enumerate(("copper", "stone", "lantern")):
        made[f"first {number}"] = f"{NEEDLE} {word}. {filler[30 * number : 80]} {word}"
        made[f"last {number}"] = f"{word} {filler[: 60 + 20 * number]} A {word} met {NEEDLE}"
    return made


def _samples() -> list[NeedleSample]:
    made: list[NeedleSample] = []
    for name, text in _prompts().items():
        start = text.index(NEEDLE)
        answer = start + NEEDLE.index(ANSWER)
        spans = {"needle": [(start, start + len(NEEDLE))], "answer": [(answer, answer + len(ANSWER))]}
        made.append(NeedleSample(Prompt(text, spans), ANSWER, len(text), 0.0, name))
    return made


@dataclass(frozen=True)
class Run:
    """One prompt's response, and each head's number of copied tokens from the loop over full attention patterns."""

    response: list[int]
    copies: list[list[int]]
    needle: int
    margin: float

    @property
    def scores(self) -> list[list[float]]:
        return [[steps / self.needle for steps in layer] for layer in self.copies]


class Speaker:
    """A tiny random checkpoint that generates only tokens of the needle.

    An unrestricted model would hardly ever copy.
    """

    def __init__(self, name: str, directory: Path) -> None:
        self.directory = directory
        build_checkpoint(name, directory)
        hf: Any = cast("Any", AutoModelForCausalLM).from_pretrained(directory)
        self.words = sorted(set(self.reference.tokenizer(f" {NEEDLE}", add_special_tokens=False)["input_ids"]))
        first, _, third, _ = self.words
        rows = hf.lm_head.weight.detach().clone()
        with torch.no_grad():
            hf.lm_head.weight.zero_()
            # Rows come in opposite pairs. One logit of each pair is above the zero logit of all other tokens.
            hf.lm_head.weight[self.words] = torch.stack([rows[first], -rows[first], rows[third], -rows[third]])
        hf.save_pretrained(directory)
        del self.reference
        self._models: dict[str, FocusModel] = {}
        self._traces: dict[str, list[tuple[int, list[Tensor]]]] = {}

    @cached_property
    def reference(self) -> ReferenceModel:
        return ReferenceModel(self.directory)

    def model(self, backend: str, stop: list[int]) -> FocusModel:
        if backend not in self._models:
            options: dict[str, Any] = {"backend": backend, "device": "cpu"}
            self._models[backend] = FocusModel.from_pretrained(str(self.directory), **options)
        return FocusModel(
            self._models[backend].hooked, self._models[backend].tokenizer, stop_strings=(), stop_tokens=stop
        )

    def trace(self, prompt: str) -> list[tuple[int, list[Tensor]]]:
        """For each step, the generated token and every layer's attention ``[head row key]``, without a cache."""
        if prompt not in self._traces:
            ids = self.reference.ids(prompt).tolist()
            steps: list[tuple[int, list[Tensor]]] = []
            for _ in range(NEW_TOKENS):
                said = [token for token, _ in steps]
                with torch.no_grad():
                    out = self.reference.eager(torch.tensor([ids + said]), use_cache=False, output_attentions=True)
                steps.append((int(out.logits[0, -1].argmax()), [layer[0] for layer in out.attentions]))
            self._traces[prompt] = steps
        return self._traces[prompt]

    def run(self, prompt: str, part: str, stop: list[int], shift: int = 0) -> Run:
        """One prompt's response, and the tokens that each head copies, counted in a loop.

        A negative ``shift`` selects an earlier row of attention.
        """
        ids, text = self.reference.ids(prompt).tolist(), self.reference.text(prompt)
        assert text.count(part) == 1
        start = text.index(part)
        inside = tokens_of_ranges(self.reference.offsets(prompt), (start, start + len(part)))
        config = self.reference.eager.config
        copies = [[0] * config.num_attention_heads for _ in range(config.num_hidden_layers)]
        response: list[int] = []
        margin = math.inf
        for token, attention in self.trace(prompt):
            if token in stop:
                break
            response.append(token)
            copying = [key for key in inside if ids[key] == token]
            for layer, heads in enumerate(copies):
                for head in range(len(heads)):
                    row: list[float] = attention[layer][head, -1 + shift].tolist()
                    would = max((row[key] for key in copying), default=0.0)
                    would_not = max(weight for key, weight in enumerate(row) if key not in copying)
                    heads[head] += would > would_not
                    margin = min(margin, abs(would - would_not))
        return Run(response, copies, len(inside), margin)


@pytest.fixture(scope="module", params=FAMILIES)
def speaker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Speaker:
    return Speaker(request.param, tmp_path_factory.mktemp(request.param))


@pytest.fixture(scope="module")
def stop(speaker: Speaker) -> list[int]:
    """The needle token that, used as the stop token, ends responses at different steps and leaves the most copies."""

    def left(word: int) -> tuple[bool, int]:
        made = [speaker.run(text, ANSWER, [word]) for text in _prompts().values()]
        return len({len(run.response) for run in made}) > 1, sum(sum(map(sum, run.copies)) for run in made)

    return [max(speaker.words, key=left)]


@pytest.fixture(scope="module")
def runs(speaker: Speaker, stop: list[int]) -> list[Run]:
    return [speaker.run(text, ANSWER, stop) for text in _prompts().values()]


def recall_by_hand(response: str, reference: str) -> float:
    """ROUGE-1 recall without stemming. Stemming makes no two of these words equal."""
    said, wanted = (Counter(re.findall("[a-z0-9]+", text.lower())) for text in (response, reference))
    return sum((said & wanted).values()) / sum(wanted.values())


# --- against Hugging Face ---------------------------------------------------------------------------------------------


def test_scores_equal_a_loop_over_full_attention(
    speaker: Speaker, stop: list[int], runs: list[Run], backend: str
) -> None:
    samples, model = _samples(), speaker.model(backend, stop)
    texts = [speaker.reference.tokenizer.decode(run.response, skip_special_tokens=True).strip() for run in runs]
    recall = [recall_by_hand(text, ANSWER) for text in texts]
    least = min(recall)
    expected = torch.tensor([run.scores for run in runs])
    assert min(run.margin for run in runs) > MARGIN
    assert len({len(run.response) for run in runs}) > 1
    assert 0 < sum(one > least for one in recall) < len(samples)
    for batch_tokens in (80, 1000):
        found = fl.retrieval_scores(
            model, samples, max_new_tokens=NEW_TOKENS, min_recall=least, batch_tokens=batch_tokens
        )
        torch.testing.assert_close(found.by_sample, expected)
        assert found.responses == tuple(texts)
        assert found.recall == pytest.approx(recall)
        assert found.counted == tuple(one > least for one in recall)
        assert found.sample_ids == tuple(_prompts())
        counted = [run.scores for run, one in zip(runs, recall, strict=True) if one > least]
        torch.testing.assert_close(found.scores, torch.tensor(counted).mean(dim=0))


def test_the_whole_needle_can_be_asked_for(speaker: Speaker, stop: list[int], runs: list[Run], backend: str) -> None:
    samples, model = _samples(), speaker.model(backend, stop)
    whole = [speaker.run(text, NEEDLE, stop) for text in _prompts().values()]
    assert min(run.margin for run in whole) > MARGIN
    expected = torch.tensor([run.scores for run in whole])
    assert not torch.equal(expected, torch.tensor([run.scores for run in runs]))
    # If a prompt has no answer span, the needle span is the default.
    bare = [
        NeedleSample(Prompt(one.prompt.text, {"needle": one.prompt.spans["needle"]}), ANSWER, 0, 0.0, one.id)
        for one in samples
    ]
    for asked, span in ((samples, "needle"), (bare, None)):
        found = fl.retrieval_scores(model, asked, span=span, max_new_tokens=NEW_TOKENS, min_recall=0.0)
        torch.testing.assert_close(found.by_sample, expected)


def test_the_prompts_tell_right_from_wrong(speaker: Speaker, stop: list[int], runs: list[Run]) -> None:
    """The tests above can fail: heads copy needles at either end of a prompt, and an earlier row gives other scores."""
    copied: Counter[str] = Counter()
    for name, run in zip(_prompts(), runs, strict=True):
        copied[name.split()[0]] += sum(map(sum, run.copies))
    assert copied["last"] > 0
    assert copied["first"] > 0
    earlier = [speaker.run(text, ANSWER, stop, shift=-1) for text in _prompts().values()]
    assert [run.copies for run in earlier] != [run.copies for run in runs]
    assert [run.response for run in earlier] == [run.response for run in runs]


def test_hidden_needles_are_scored_from_end_to_end(speaker: Speaker, stop: list[int], backend: str) -> None:
    """Scores of `needle_samples` prompts equal those of a loop that finds the needle by string search."""
    needle = fl.Needle("what did the sailor see?", f"The sailor saw the {NEEDLE}.", ANSWER)
    haystack = " ".join(f"The wagon met {n} queens. Winter came to the tower." for n in range(12))
    model = speaker.model(backend, stop)
    samples = fl.needle_samples(model, haystack, [needle], (60, 120), (0, 1))
    expected = [speaker.run(sample.prompt.text, ANSWER, stop) for sample in samples]
    assert min(run.margin for run in expected) > MARGIN
    recall = [recall_by_hand(speaker.reference.tokenizer.decode(run.response), ANSWER) for run in expected]
    assert max(recall) > 0
    found = fl.retrieval_scores(model, samples, max_new_tokens=NEW_TOKENS, min_recall=0.0)
    torch.testing.assert_close(found.by_sample, torch.tensor([run.scores for run in expected]))
    assert found.recall == pytest.approx(recall)


# --- hand-computed cases ----------------------------------------------------------------------------------------------


def test_a_case_worked_by_hand() -> None:
    # Two prompts, the second left-padded by one. The needle is tokens 7 8 9 of the first prompt and 8 8 of the second.
    keys = torch.tensor([[5, 7, 8, 9, 6, -1, -1], [0, 8, 8, 9, 7, -1, -1]])
    needle = torch.tensor([[0, 1, 1, 1, 0, 0, 0], [0, 1, 1, 0, 0, 0, 0]]).bool()
    generated = torch.tensor([[7, 8, 6], [8, 9, -1]])
    attended = torch.tensor(
        [
            # Head 0: 7 and 8 from the needle, then 6 from outside. Head 1: 8 while 7 is generated, 9 while 8 is
            # generated, then a key of the response.
            [[[1, 2, 4], [2, 3, 5]]],
            # Head 0: 8 from the second needle token, 9 from outside, then no step. Head 1: a wrong token, a padding
            # key, then a key beyond the end.
            [[[2, 3, 1], [4, 0, 6]]],
        ]
    )
    expected = torch.tensor([[[2 / 3, 0.0]], [[1 / 2, 0.0]]])
    torch.testing.assert_close(copy_scores(attended, keys, needle, generated), expected)


def test_no_steps_copy_nothing() -> None:
    empty = torch.zeros(1, 2, 3, 0, dtype=torch.long)
    needle, keys = torch.ones(1, 4).bool(), torch.zeros(1, 4, dtype=torch.long)
    assert torch.equal(copy_scores(empty, keys, needle, torch.zeros(1, 0, dtype=torch.long)), torch.zeros(1, 2, 3))


class FakeModel:
    """Two layers of two heads with fixed attention. The response to both prompts is "b c" (tokens 11, 12)."""

    shape = type("Shape", (), {"n_layers": 2, "n_heads": 2})
    pad_token = 0
    steps = (
        # Per layer: attention of the prompts' last rows, which generate "b", ...
        [[[0.0, 0.1, 0.6, 0.3], [0.0, 0.1, 0.3, 0.6]], [[0.0, 0.8, 0.1, 0.1], [0.9, 0.0, 0.1, 0.0]]],
        # ... of the row of "b", which generates "c", ...
        [[[0.0, 0.1, 0.1, 0.6, 0.2]] * 2, [[0.0, 0.1, 0.1, 0.2, 0.6], [0.0, 0.0, 0.3, 0.4, 0.3]]],
        # ... and of the row of "c". This row ends the response, so it does not count although it attends to "b".
        [[[0.0, 0.0, 0.9, 0.1, 0.0, 0.0]] * 2] * 2,
    )

    def prefill(self, prompts: list[EncodedPrompt], *, hold_last: bool) -> Prefix:
        assert hold_last  # the observers must see the first generating row
        batch = PromptBatch.of(prompts)
        return Prefix(batch, batch.tokens(0), None, batch.mask(), None)

    def decode(self, prefix: Prefix, *, max_new_tokens: int, observers: Any) -> list[Generation]:
        assert max_new_tokens == 5
        for layers in self.steps:
            for layer, heads in enumerate(layers):
                (observe,) = (function for name, function in observers if name == f"blocks.{layer}.attn.hook_pattern")
                pattern = torch.tensor([heads] * len(prefix.batch))[:, :, None]
                assert observe(pattern, None) is None
        return [Generation("b c", torch.tensor([11, 12]), finished=True)] * len(prefix.batch)


def test_scores_of_a_fake_pattern() -> None:
    """Scores use the rows that generate tokens, and keys are columns of the padded batch."""
    # "a b c" is padded by one, and its "b c" is to be copied. In "b a b c", the first "b" is to be copied.
    short = EncodedPrompt(torch.tensor([10, 11, 12]), {"copied": ((1, 3),)})
    long = EncodedPrompt(torch.tensor([11, 10, 11, 12]), {"copied": ((0, 1),)})
    scores, texts = _run(cast("Any", FakeModel()), [short, long], 100, max_new_tokens=5)
    # Layer 0: head 0 attends to "b", then to "c"; head 1 to "c" in both steps. Layer 1: head 0 attends to column 1,
    # then to the "b" of the response; head 1 to column 0 (padding of the short prompt, needle of the long prompt), then
    # to "c".
    expected = torch.tensor([[[1.0, 0.5], [0.0, 0.5]], [[0.0, 0.0], [0.0, 1.0]]])
    torch.testing.assert_close(scores, expected)
    assert texts == ["b c", "b c"]


def made_scores(**changes: Any) -> RetrievalScores:
    fields: dict[str, Any] = {
        "by_sample": torch.tensor([[[0.5, 0.0], [0.25, 1.0]], [[9.0, 9.0], [9.0, 9.0]], [[0.1, 0.0], [0.25, 0.5]]]),
        "recall": (0.75, 0.5, 1.0),
        "min_recall": 0.5,
        "responses": ("x", "y", "z"),
        "sample_ids": ("a", "b", "c"),
    }
    return RetrievalScores(**{**fields, **changes})


def test_runs_that_do_not_find_the_needle_do_not_count() -> None:
    scores = made_scores()
    assert scores.counted == (True, False, True)  # recall must exceed min_recall
    torch.testing.assert_close(scores.scores, torch.tensor([[0.3, 0.0], [0.25, 0.75]]))
    assert scores.ranking() == [(1, 1), (0, 0), (1, 0), (0, 1)]
    assert scores.top_heads(2) == [(1, 1), (0, 0)]
    assert len(scores) == 3
    frame = scores.to_frame()
    assert list(frame.columns) == ["layer", "head", "score"]
    assert frame.iloc[1].tolist() == pytest.approx([0, 0, 0.3])


@pytest.mark.parametrize(
    ("response", "reference", "recall"),
    [
        ("The records were broken!", "a record was broken", 2 / 4),  # stems: record, broken
        ("take, take, take", "Take a walk; take it", 2 / 5),  # a word counts at most as often as in the reference
        ("", "walk", 0.0),
    ],
)
def test_recall_worked_by_hand(response: str, reference: str, recall: float) -> None:
    assert rouge_1_recall(response, reference) == pytest.approx(recall)


def test_the_demo_model_copies() -> None:
    model = FocusModel.demo(device="cpu")
    samples = fl.synthetic_needles(3, n=6)
    found = fl.retrieval_scores(model, samples, max_new_tokens=20, min_recall=0.25)
    assert found.scores[found.top_heads(1)[0]] > 0.05


# --- errors -----------------------------------------------------------------------------------------------------------


def sample(text: str = "a river. Where?", reference: str = "river") -> NeedleSample:
    return NeedleSample(Prompt(text, {"needle": [(2, 7)]}), reference, 1, 0.0, "the sample")


@pytest.mark.parametrize(
    ("samples", "settings", "message"),
    [
        ([], {}, "there are no samples"),
        (
            [sample()],
            {"min_recall": 50},
            "min_recall is 50; recall must exceed it, so it must be at least 0 and below 1",
        ),
        ([sample()], {"min_recall": 1.0}, "min_recall is 1;"),
        ([sample()], {"min_recall": -0.1}, "min_recall is -0.1;"),
        ([sample()], {"span": "answer"}, "'the sample' has no span 'answer'; it has needle"),
        ([sample(reference="東京")], {}, "the reference '東京' has no word that ROUGE counts"),
        ([sample()], {"max_new_tokens": 0}, "max_new_tokens is 0"),
        ([sample()], {"batch_tokens": 0}, "batch_tokens is 0"),
    ],
)
def test_what_cannot_be_scored_is_refused(
    samples: list[NeedleSample], settings: dict[str, Any], message: str, load_model: Any
) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        fl.retrieval_scores(load_model("llama"), samples, **settings)


def test_runs_of_which_none_counts_are_refused(load_model: Any) -> None:
    with pytest.raises(NoRunCountsError, match=r"none of the 1 runs counts: .* recall is 0\.000 .*'the sample'"):
        fl.retrieval_scores(load_model("llama"), [sample(reference="meadow")], max_new_tokens=2)
    with pytest.raises(NoRunCountsError, match=r"is 0\.400 \(sample 'c', whose response is 'z'\), .* exceed .*=0\.5"):
        made_scores(recall=(0.1, 0.2, 0.4))


def test_a_prompt_that_leaves_no_room_has_no_response(load_model: Any, reference: Any) -> None:
    one = sample()
    model = load_model("llama", n_ctx=len(reference("llama").ids(one.prompt)))
    with pytest.raises(ValueError, match=r"best ROUGE-1 recall is 0\.000 .* whose response is ''"):
        fl.retrieval_scores(model, [one])


def test_more_heads_than_there_are_is_refused() -> None:
    for k in (-1, 5):
        with pytest.raises(ValueError, match=f"k is {k}; the model has 4 heads"):
            made_scores().top_heads(k)


def test_without_rouge_score_an_error_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    _scorer.cache_clear()
    monkeypatch.setitem(sys.modules, "rouge_score.rouge_scorer", None)
    with pytest.raises(ImportError, match=re.escape("pip install 'focuslens[rouge]'")):
        rouge_1_recall("a", "a")
