"""Interrupted training of focus directions resumes with the same numbers, and refuses checkpoints of other runs."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch

from focuslens import FocusDirections, MultiDocSample, train_focus_directions
from focuslens.directions import training

SITES = ["rotary", "projection"]
HEADS = [(2, 3), (0, 1), (2, 0), (2, 2)]


def same(one: FocusDirections, other: FocusDirections) -> bool:
    assert one.losses is not None
    assert other.losses is not None
    return one.digest == other.digest and torch.equal(one.losses, other.losses)


class Interrupted(Exception):
    pass


@pytest.mark.parametrize("site", SITES)
def test_an_interrupted_training_goes_on_to_the_same_numbers(
    load_model: Any, samples: list[MultiDocSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, site: Any
) -> None:
    model = load_model("llama")
    arguments: dict[str, Any] = {"site": site, "prompts": "gold", "epochs": 2, "max_new_tokens": 2, "seed": 3}
    whole = train_focus_directions(model, samples[1:], HEADS, **arguments)
    original, taken = training._step, list[int]()

    for step, every in ((1, 1), (2, 2), (3, 2), (4, 500), (5, 2)):
        path = tmp_path / f"{step}" / "state.pt"
        settings: dict[str, Any] = {**arguments, "checkpoint": path, "checkpoint_every": every}

        def interrupted(*args: Any, step: int = step) -> Any:
            if len(taken) == step:
                raise Interrupted
            taken.append(1)
            return original(*args)

        taken.clear()
        monkeypatch.setattr(training, "_step", interrupted)
        with pytest.raises(Interrupted):
            train_focus_directions(model, samples[1:], HEADS, **settings)
        taken.clear()
        monkeypatch.setattr(training, "_step", lambda *args: taken.append(1) or original(*args))
        assert same(train_focus_directions(model, samples[1:], HEADS, **settings), whole), (step, every)
        # The state is saved every ``every`` steps and after each epoch of three steps.
        assert len(taken) == 6 - max(n for n in range(step + 1) if n % every == 0 or n % 3 == 0)
    # A finished training run is loaded without any step.
    taken.clear()
    assert same(train_focus_directions(model, samples[1:], HEADS, **settings), whole)
    assert taken == []


def test_the_checkpoint_of_another_training_is_refused(
    load_model: Any, samples: list[MultiDocSample], tmp_path: Path
) -> None:
    model = load_model("llama")
    path = tmp_path / "state.pt"
    arguments: dict[str, Any] = {"epochs": 1, "max_new_tokens": 2, "checkpoint": path}
    train_focus_directions(model, samples[3:], HEADS[:2], **arguments)
    content = path.read_bytes()
    others: list[tuple[Any, list[MultiDocSample], Any, dict[str, Any]]] = [
        (model, samples[3:], HEADS[:2], {"seed": 1}),
        (model, samples[3:], HEADS[:2], {"epochs": 2}),
        (model, samples[3:], HEADS[:2], {"site": "projection"}),
        (model, samples[3:], HEADS[1::-1], {}),
        (model, samples[2:3], HEADS[:2], {}),
        (model, samples[3:], HEADS[:2], {"data": {"file": "other"}}),
        (model, samples[3:], HEADS[:2], {"data": {"distractors": "bm25"}}),
        (load_model("mistral"), samples[3:], HEADS[:2], {}),
        # The question, answers and titles are the same, but one document's text differs.
        (model, [reworded(samples[3])], HEADS[:2], {}),
    ]
    for other, chosen, heads, changed in others:
        with pytest.raises(
            ValueError, match=r"state\.pt is a checkpoint of another|state\.responses\.jsonl holds results of a"
        ):
            train_focus_directions(other, chosen, heads, **{**arguments, **changed})
    # A checkpoint without a choice of distractors has random ones.
    train_focus_directions(model, samples[3:], HEADS[:2], data={"distractors": "random"}, **arguments)
    assert path.read_bytes() == content


def test_other_gold_responses_are_another_training(
    load_model: Any, samples: list[MultiDocSample], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint is refused if the gold responses differ.

    Responses of one model can differ, because another batch size may break a tie differently.
    """
    model, responses = load_model("llama"), training.gold_responses
    arguments: dict[str, Any] = {"epochs": 1, "max_new_tokens": 2, "checkpoint": tmp_path / "state.pt"}
    train_focus_directions(model, samples[3:], HEADS[:2], **arguments)

    def others(*given: Any) -> Any:
        usable, said = responses(*given)
        return usable, [tokens + 1 for tokens in said]

    monkeypatch.setattr(training, "gold_responses", others)
    with pytest.raises(ValueError, match=r"another training .*gold responses"):
        train_focus_directions(model, samples[3:], HEADS[:2], **arguments)


def reworded(sample: MultiDocSample) -> MultiDocSample:
    documents = list(sample.documents)
    place = next(i for i in range(len(documents)) if i != sample.gold_index)
    documents[place] = dataclasses.replace(documents[place], text="Something else.")
    return dataclasses.replace(sample, documents=tuple(documents))
