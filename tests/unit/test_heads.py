"""Names, rankings and random draws of heads."""

from __future__ import annotations

import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import focuslens as fl
from focuslens import Head, load_ranking, random_heads, rank_heads, save_ranking, sparsity
from focuslens.heads import ModelShape, check_heads, heads_by_layer, top_heads

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


SHAPE = ModelShape(n_layers=3, n_heads=4, n_key_value_heads=2, d_head=8, d_model=32, d_vocab=10, n_ctx=16)
RANKING = [(2, 3), (0, 1), (0, 0), (1, 2), (2, 2), (1, 0), (2, 0), (0, 3), (1, 1), (0, 2), (1, 3), (2, 1)]


def test_a_ranking_is_written_and_read_in_each_form(tmp_path: Path) -> None:
    for form, name in (("focuslens", "heads.json"), ("qrhead", "heads.yaml")):
        save_ranking(RANKING[:5], tmp_path / name, form=form)
        assert load_ranking(tmp_path / name) == RANKING[:5]
    assert json.loads((tmp_path / "heads.json").read_text()) == [list(head) for head in RANKING[:5]]
    content = yaml.safe_load((tmp_path / "heads.yaml").read_text())
    assert content == {"attn_head_set": "2-3,0-1,0-0,1-2,2-2"}
    # QRHead reads the set in this way.
    heads = [tuple(map(int, head.split("-"))) for head in content["attn_head_set"].split(",")]
    assert heads == RANKING[:5]


def test_duoattentions_form_has_a_value_per_key_value_head(tmp_path: Path) -> None:
    save_ranking(RANKING, tmp_path / "duo", form="duoattention", shape=SHAPE)
    # DuoAttention reads the directory in this way.
    values = np.loadtxt(tmp_path / "duo" / "full_attention_heads.tsv", dtype=float, delimiter="\t")
    sizes = json.loads((tmp_path / "duo" / "config.json").read_text())
    assert (sizes["sink_size"], sizes["recent_size"]) == (128, 256)
    # Key-value heads in the order of their best query heads: 2/1, 0/0, 1/1, 1/0, 2/0, 0/1.
    np.testing.assert_allclose(values, [[5 / 6, 1 / 6], [3 / 6, 4 / 6], [2 / 6, 6 / 6]], atol=1e-6)
    better_half = np.argwhere(values >= np.quantile(values, 0.5)).tolist()
    assert better_half == [[0, 0], [1, 1], [2, 1]]
    order = [(2, 2), (2, 3), (0, 0), (0, 1), (1, 2), (1, 3), (1, 0), (1, 1), (2, 0), (2, 1), (0, 2), (0, 3)]
    for path in (tmp_path / "duo", tmp_path / "duo" / "full_attention_heads.tsv"):
        assert load_ranking(path, shape=SHAPE) == order
    save_ranking(RANKING[:2], tmp_path / "few", form="duoattention", shape=SHAPE)
    assert load_ranking(tmp_path / "few", shape=SHAPE) == order[:4]
    save_ranking(load_ranking(tmp_path / "few", shape=SHAPE), tmp_path / "again", form="duoattention", shape=SHAPE)
    assert load_ranking(tmp_path / "again", shape=SHAPE) == order[:4]


def test_a_published_pattern_is_read(tmp_path: Path) -> None:
    (tmp_path / "full_attention_heads.tsv").write_text("1.2e-01\t0.0\n9.5e-01\t1.0e+00\n0.000\t5.0e-02\n")
    assert load_ranking(tmp_path, shape=SHAPE)[:4] == [(1, 2), (1, 3), (1, 0), (1, 1)]
    assert len(load_ranking(tmp_path, shape=SHAPE)) == 8
    with pytest.raises(ValueError, match=r"one value per key-value head; .*load_ranking\(path, shape=model.shape\)"):
        load_ranking(tmp_path)
    smaller = replace(SHAPE, n_layers=2)
    with pytest.raises(ValueError, match=r"head \(2, 2\) does not exist"):
        load_ranking(tmp_path, shape=smaller)
    for text in ("", "1\t2\n3\n", "a\tb\n"):
        (tmp_path / "full_attention_heads.tsv").write_text(text)
        with pytest.raises(ValueError, match="is not a pattern of DuoAttention"):
            load_ranking(tmp_path, shape=SHAPE)


def test_a_ranking_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "heads"
    with pytest.raises(ValueError, match="form is 'xml'; it must be one of focuslens, qrhead, duoattention"):
        save_ranking(RANKING, path, form="xml")
    with pytest.raises(ValueError, match=r"one value per key-value head; pass shape=model\.shape"):
        save_ranking(RANKING, path, form="duoattention")
    with pytest.raises(ValueError, match="the ranking is empty"):
        save_ranking([], path)
    with pytest.raises(ValueError, match=r"head \(3, 0\) does not exist"):
        save_ranking([(3, 0)], path, form="qrhead", shape=SHAPE)
    with pytest.raises(ValueError, match="more than once: L0H1"):
        save_ranking([(0, 1), (0, 1)], path)
    assert not list(tmp_path.iterdir())


def test_heads_that_see_a_whole_prompt():
    kinds = (fl.HeadKind(), fl.HeadKind(window=8, sink=True), fl.HeadKind(chunk=5, rotary=False))
    assert list(map(str, kinds)) == ["full", "window 8, sink-gated", "chunk 5, no rotary"]
    assert [kind.plain for kind in kinds] == [True, False, False]
    heads = [(2, 0), (1, 1), (0, 0)]
    assert fl.whole_prompt_heads(heads, kinds) == [(0, 0)]
    assert fl.whole_prompt_heads(heads, kinds, 6) == [(1, 1), (0, 0)]
    assert fl.whole_prompt_heads(heads, kinds, 9) == [(0, 0)]
    with pytest.raises(ValueError, match="head L3H0 is in layer 3, and there are kinds of 3 layers"):
        fl.whole_prompt_heads([(3, 0)], kinds)
