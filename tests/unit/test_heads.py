"""Names, rankings and random draws of heads."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from focuslens import Head, load_ranking, random_heads, rank_heads, sparsity
from focuslens.heads import check_heads, heads_by_layer, top_heads

SCORES = torch.tensor([[0.05, 0.3, 0.1], [0.2, 0.0, 0.3]])


def test_a_head_is_its_tuple_and_prints_by_name() -> None:
    assert Head(3, 14) == (3, 14)
    assert {(3, 14): "found"}[Head(3, 14)] == "found"
    assert str(Head(3, 14)) == "L3H14"


def test_rank_heads_sorts_by_score_and_breaks_ties_by_layer_then_head() -> None:
    assert rank_heads(SCORES) == [(0, 1), (1, 2), (1, 0), (0, 2), (0, 0), (1, 1)]
    assert rank_heads(torch.zeros(2, 2)) == [(0, 0), (0, 1), (1, 0), (1, 1)]


def test_top_heads_are_the_first_of_the_ranking() -> None:
    assert top_heads(SCORES, 2) == [(0, 1), (1, 2)]
    assert top_heads(SCORES, 0) == []
    assert len(top_heads(SCORES, 6)) == 6
    for k in (-1, 7):
        with pytest.raises(ValueError, match=f"k is {k}; the model has 6 heads"):
            top_heads(SCORES, k)


def test_rank_heads_refuses_scores_of_nothing() -> None:
    with pytest.raises(ValueError, match="NaN"):
        rank_heads(torch.tensor([[0.1, torch.nan]]))


@settings(max_examples=40)
@given(st.integers(1, 4), st.integers(1, 4), st.integers(0, 1000), st.data())
def test_random_heads_are_different_and_none_is_excluded(
    n_layers: int, n_heads: int, seed: int, data: st.DataObject
) -> None:
    everything = [(layer, head) for layer in range(n_layers) for head in range(n_heads)]
    excluded = data.draw(st.lists(st.sampled_from(everything), unique=True))
    left = set(everything) - set(excluded)
    k = data.draw(st.integers(0, len(left)))
    drawn = random_heads(n_layers, n_heads, k, exclude=excluded, seed=seed)
    assert len(drawn) == len(set(drawn)) == k
    assert set(drawn) <= left
    # The control heads for a small k are a prefix of those for a larger k.
    assert random_heads(n_layers, n_heads, len(left), exclude=excluded, seed=seed)[:k] == drawn


def test_random_heads_follow_the_seed_and_are_uniform() -> None:
    assert random_heads(8, 8, 20, seed=1) == random_heads(8, 8, 20, seed=1)
    assert random_heads(8, 8, 20, seed=1) != random_heads(8, 8, 20, seed=2)
    counts = Counter(head for seed in range(600) for head in random_heads(2, 3, 2, seed=seed))
    # In 600 draws of 2 of 6 heads, the count of a head has mean 200 and standard deviation
    # sqrt(600 * 1/3 * 2/3) = 11.5.
    assert set(counts) == {(layer, head) for layer in range(2) for head in range(3)}
    assert all(abs(count - 200) < 50 for count in counts.values())


@pytest.mark.parametrize("k", [-1, 4])
def test_random_heads_refuse_to_draw_more_than_there_are(k: int) -> None:
    with pytest.raises(ValueError, match=rf"cannot draw {k} random heads: 3 are left of 4"):
        random_heads(2, 2, k, exclude=[(0, 1)])


def test_heads_by_layer_sorts_layers_and_keeps_the_order_within_one() -> None:
    grouped = heads_by_layer([(2, 5), (0, 3), (2, 1), (0, 0)])
    assert list(grouped.items()) == [(0, [3, 0]), (2, [5, 1])]
    assert heads_by_layer([]) == {}


def test_check_heads_gives_heads_in_the_order_given() -> None:
    checked = check_heads([(1, 1), (0, 0)], 2, 2)
    assert checked == ((1, 1), (0, 0))
    assert all(isinstance(head, Head) for head in checked)


@pytest.mark.parametrize("head", [(2, 0), (0, 3), (-1, 0), (0, -1)])
def test_check_heads_refuses_a_head_that_does_not_exist(head: tuple[int, int]) -> None:
    with pytest.raises(ValueError, match=rf"\({head[0]}, {head[1]}\) does not exist: .* 0 to 1 with heads 0 to 2"):
        check_heads([(0, 0), head], 2, 3)


def test_check_heads_names_heads_that_come_twice() -> None:
    with pytest.raises(ValueError, match=r"more than once: L0H1$"):
        check_heads([(0, 1), (1, 1), (0, 1)], 2, 2)


def test_sparsity_counts_heads_strictly_above_each_threshold() -> None:
    scores = torch.tensor([[0.0, 0.1], [0.25, 0.125], [0.5, 0.0], [0.0, 0.0]])
    above_a_quarter, above_a_tenth, above_a_half = sparsity(scores, (0.25, 0.1, 0.5))
    assert (above_a_quarter.count, above_a_quarter.fraction, above_a_quarter.layers) == (1, 1 / 8, (2, 2))
    assert (above_a_tenth.count, above_a_tenth.fraction, above_a_tenth.layers) == (3, 3 / 8, (1, 2))
    assert (above_a_half.count, above_a_half.fraction, above_a_half.layers) == (0, 0.0, None)
    assert str(above_a_tenth) == "> 0.1: 3 heads (37.5%), layers 1 to 2"
    assert str(above_a_half) == "> 0.5: 0 heads (0.0%), no layer"


def test_sparsity_looks_at_the_thresholds_of_the_paper_unless_told_otherwise() -> None:
    assert [row.threshold for row in sparsity(SCORES)] == [0.2, 0.1, 0.05]


def test_a_saved_ranking_is_read_in_its_order(tmp_path: Path) -> None:
    path = tmp_path / "relevant_heads.json"
    path.write_text(json.dumps([[3, 1], [0, 2], [1, 0]]))
    ranking = load_ranking(path)
    assert ranking == [(3, 1), (0, 2), (1, 0)]
    assert all(isinstance(head, Head) for head in ranking)


@pytest.mark.parametrize("content", ['{"a": 1}', "[1, 2]", "[[1, 2, 3]]", '[["0", 1]]', "[[0.5, 1]]", "nonsense"])
def test_what_is_no_ranking_is_refused(tmp_path: Path, content: str) -> None:
    path = tmp_path / "ranking.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=r"not a ranking of heads|Expecting value"):
        load_ranking(path)


@pytest.mark.parametrize(
    ("name", "text", "heads"),
    [
        (
            "qrhead.yaml",
            '# Default\n\nattn_head_set: "13-16,12-12,2-0" # top16\nmodel_base_class: "X"',
            [(13, 16), (12, 12), (2, 0)],
        ),
        ("dysco.yaml", 'selected_heads: "[(17,24), (14,31)]"\ntop_k: 4096\nlist:\n  - [128000]', [(17, 24), (14, 31)]),
        ("core.json", '{"0-0": 0.01, "12-3": 0.5, "2-1": 0.2}', [(12, 3), (2, 1), (0, 0)]),
        ("retrieval.json", '{"0-0": [0.2, 0.4], "5-1": [0.9, 0.1], "1-1": [0]}', [(5, 1), (0, 0), (1, 1)]),
        ("pasta.json", '{"3": [1, 2], "0": [7]}', [(3, 1), (3, 2), (0, 7)]),
        ("plain.yml", "- [1, 2]\n- [0, 3]", [(1, 2), (0, 3)]),
    ],
)
def test_rankings_in_the_forms_of_others_are_read(
    name: str, text: str, heads: list[tuple[int, int]], tmp_path: Path
) -> None:
    (tmp_path / name).write_text(text)
    assert list(load_ranking(tmp_path / name)) == heads


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("a.json", '{"0-0": "best"}'),
        ("b.json", '{"0-0": []}'),
        ("c.json", '{"layer": [1]}'),
        ("d.yaml", "model: x"),
        ("e.json", '{"1": 2}'),
    ],
)
def test_files_in_no_form_are_refused(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    with pytest.raises(ValueError, match=r"is not a ranking of heads: expected JSON"):
        load_ranking(tmp_path / name)


def test_broken_yaml_is_named(tmp_path: Path) -> None:
    (tmp_path / "a.yaml").write_text("a: [1")
    with pytest.raises(ValueError, match="it is not YAML"):
        load_ranking(tmp_path / "a.yaml")
