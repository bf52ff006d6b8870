"""The choice of a sweep's best setting, and the comparison of two settings."""

from __future__ import annotations

from typing import Any

import pytest

from focuslens import Evaluation, Setting, Sweep, best_setting, split_softmax_settings
from focuslens.evaluation import bootstrap_mean


def sweep_of(varied: list[dict[str, Any]], right: list[int]) -> Sweep:
    """A synthetic sweep over 20 questions. ``right`` is the number of correct answers per setting."""
    names = tuple(str(i) for i in range(20))
    settings = tuple(Setting(str(one), parameters=one) for one in varied)
    evaluations: dict[str, Evaluation] = {}
    for setting, n in zip(settings, right, strict=True):
        correct = tuple(i < n for i in range(20))
        evaluations[setting.name] = Evaluation(names, names, names, correct, bootstrap_mean([*map(float, correct)]))
    return Sweep(settings, evaluations, {})


@pytest.mark.parametrize(
    ("varied", "right", "expected"),
    [
        ([{"tau": 0.03, "k": 4}, {"tau": 0.1, "k": 8}, {"tau": 0.1, "k": 6}], [18] * 3, {"tau": 0.1, "k": 6}),
        ([{"tau": 0.2, "k": 4}, {"tau": 4.0, "k": 8}], [18] * 2, {"tau": 4.0, "k": 8}),
        ([{"tau": 0.0, "k": 4}, {"tau": 0.1, "k": 8}], [18] * 2, {"tau": 0.1, "k": 8}),
        ([{"tau": 0.03, "k": 4}, {"tau": 0.1, "k": 8}], [19, 18], {"tau": 0.03, "k": 4}),
        ([{"alpha": 3.0, "k": 4}, {"alpha": -1.0, "k": 8}, {"alpha": 1.5, "k": 4}], [16] * 3, {"alpha": -1.0, "k": 8}),
        ([{}, {"alpha": 3.0}, {"alpha": 2.0}], [20, 15, 15], {"alpha": 2.0}),
    ],
)
def test_of_equal_settings_the_gentlest_is_chosen(varied, right, expected):
    assert best_setting(sweep_of(varied, right)).parameters == expected


def test_only_what_is_given_is_chosen_among():
    sweep = sweep_of([{"alpha": 1.0, "k": 1}, {"alpha": 2.0, "k": 2}], [20, 10])
    assert best_setting(sweep, sweep.settings[1:]).parameters == {"alpha": 2.0, "k": 2}


@pytest.mark.parametrize("settings", [None, ()])
def test_nothing_to_choose_among_is_refused(settings):
    with pytest.raises(ValueError, match="no setting to choose among"):
        best_setting(sweep_of([{}], [3]), settings)


def test_samples_of_one_question_are_compared_together():
    def evaluation(right: int) -> Evaluation:
        ids, questions = tuple(str(i) for i in range(20)), tuple(str(i // 5) for i in range(20))
        correct = tuple(i < right for i in range(20))
        return Evaluation(ids, questions, ids, correct, bootstrap_mean([*map(float, correct)], groups=questions))

    found = evaluation(20).compare(evaluation(5))
    assert (found.only_first, found.only_second) == (15, 0)
    assert found.p_value == pytest.approx(2 / 2**3)  # three questions, not fifteen samples


def test_arguments_of_another_kind_are_named():
    heads = [(0, 0)]
    with pytest.raises(TypeError, match="taus"):
        split_softmax_settings(heads, 0.3, [1])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="taus"):
        split_softmax_settings(heads, ["x"], [1])  # pyright: ignore[reportArgumentType]
    with pytest.raises(TypeError, match="name"):
        Setting(3)  # pyright: ignore[reportArgumentType]
    sweep = sweep_of([{"tau": 1.0}], [3])
    with pytest.raises(TypeError, match="other"):
        next(iter(sweep.evaluations.values())).compare(3)  # pyright: ignore[reportArgumentType]
