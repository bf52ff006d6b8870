"""The authors' published files: reading, validation and comparison, against loops, enumerations and known numbers."""

from __future__ import annotations

import csv
import hashlib
import json
import math
from fractions import Fraction
from itertools import combinations, product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from focuslens.cli.main import _parser, main
from focuslens.cli.published import run
from focuslens.directions.published import (
    compare_published,
    depth_profile,
    frequency_profile,
    head_table,
    initial_norm,
    load_published,
    load_published_ranking,
    rebin,
    shared_by_chance,
    summarize_published,
)
from focuslens.util.files import versions
from tests.support.paths import SHARED_DATA

SHAPES = {"owner_Small": (4, 3), "Tiny": (2, 5)}
D_HEAD = 8


def publish(root: Path, shapes: dict[str, tuple[int, int]] = SHAPES) -> Path:
    """Write a folder in the authors' layout with random vectors and rankings."""
    generator = torch.Generator().manual_seed(0)
    for name, (n_layers, n_heads) in shapes.items():
        vectors = root / "head_features" / name / "direction_relevant"
        vectors.mkdir(parents=True)
        for layer, part in product(range(n_layers), "qk"):
            made = torch.randn(n_heads, D_HEAD, generator=generator) * (20 if part == "q" else 0.2)
            torch.save(made.requires_grad_(), vectors / f"head_{part}_directions_{layer}.pth")
        everything = [[layer, head] for layer in range(n_layers) for head in range(n_heads)]
        order = torch.randperm(len(everything), generator=generator).tolist()
        write_ranking(root, name, [everything[i] for i in order])
    return root


def write_ranking(root: Path, name: str, ranking: Any) -> Path:
    file = root / "contextual_heads_scores_full_seq" / name / "relevant_heads.json"
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(json.dumps(ranking))
    return file


def raw(root: Path, name: str, part: str, layer: int, head: int) -> np.ndarray:
    path = root / "head_features" / name / "direction_relevant" / f"head_{part}_directions_{layer}.pth"
    return torch.load(path, weights_only=True)[head].detach().double().numpy()


def test_every_model_is_read_with_its_sources(tmp_path: Path):
    root = publish(tmp_path)
    small, tiny = load_published(root)
    assert (small.name, small.label, small.n_layers, small.n_heads) == ("owner_Small", "Small", 4, 3)
    assert (tiny.name, tiny.label, tiny.n_layers, tiny.n_heads) == ("Tiny", "Tiny", 2, 5)
    assert len(small.directions) == 12
    files = [path for path in root.rglob("*") if path.is_file()]
    assert {**small.sources, **tiny.sources} == {
        path.relative_to(root).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
    ranked = root / "contextual_heads_scores_full_seq" / "Tiny" / "relevant_heads.json"
    assert list(tiny.ranking) == [tuple(pair) for pair in json.loads(ranked.read_text())]
    assert load_published_ranking(ranked) == list(tiny.ranking)
    assert tiny.top(3) == tiny.ranking[:3]


def test_what_is_missing_is_named(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"no folder .*nowhere/head_features"):
        load_published(tmp_path / "nowhere")
    (tmp_path / "head_features").mkdir()
    with pytest.raises(FileNotFoundError, match="head_features contains no folder of a model"):
        load_published(tmp_path)
    (tmp_path / "head_features" / "Tiny").mkdir()
    with pytest.raises(FileNotFoundError, match=r"no folder .*head_features/Tiny/direction_relevant"):
        load_published(tmp_path)
    (tmp_path / "head_features" / "Tiny").rmdir()
    root = publish(tmp_path)
    ranked = root / "contextual_heads_scores_full_seq" / "Tiny" / "relevant_heads.json"
    ranked.unlink()
    with pytest.raises(FileNotFoundError, match=r"no file .*/Tiny/relevant_heads\.json"):
        load_published(root)
    (root / "head_features" / "owner_Small" / "direction_relevant" / "head_k_directions_2.pth").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no head_k_directions_2\.pth"):
        load_published(root)


@pytest.mark.parametrize(
    ("ranking", "message"),
    [
        ([[0, 0], [2, 1]], r"Tiny/relevant_heads\.json: head \(2, 1\) does not exist: .* layers 0 to 1 with heads"),
        ([[0, 0], [1, 5]], r"head \(1, 5\) does not exist"),
        ([[0, 0], [1, -1]], r"head \(1, -1\) does not exist"),
        ([[0, 0], [1, 1], [0, 0]], r"Tiny/relevant_heads\.json: heads named more than once: L0H0"),
        ([], r"Tiny/relevant_heads\.json contains an empty ranking"),
        ([[0]], r"is not a ranking of heads"),
    ],
)
def test_rankings_that_cannot_be_are_refused(tmp_path: Path, ranking: Any, message: str):
    root = publish(tmp_path)
    file = write_ranking(root, "Tiny", ranking)
    with pytest.raises(ValueError, match=message):
        load_published(root)
    with pytest.raises(ValueError, match=message):
        load_published_ranking(file, 2, 5)


def test_a_ranking_of_an_unknown_model_is_checked_as_far_as_it_can_be(tmp_path: Path):
    assert load_published_ranking(write_ranking(tmp_path, "a", [[7, 1], [0, 9]])) == [(7, 1), (0, 9)]
    for ranking, message in (([[0, -1]], "does not exist"), ([[3, 3], [3, 3]], "more than once"), ([], "an empty")):
        with pytest.raises(ValueError, match=f"relevant_heads.json.*{message}"):
            load_published_ranking(write_ranking(tmp_path, "b", ranking))


def test_more_heads_than_are_ranked_are_refused(tmp_path: Path):
    model = load_published(publish(tmp_path))[1]
    for top in (0, 11):
        with pytest.raises(ValueError, match=f"top is {top}; the ranking of Tiny has 10 heads: give 1 to 10"):
            summarize_published(model, top)


def energies(vector: np.ndarray) -> list[float]:
    """Energy share of each pair of dimensions (i, i + d_head / 2)."""
    squares = [vector[i] ** 2 + vector[i + D_HEAD // 2] ** 2 for i in range(D_HEAD // 2)]
    return [square / sum(squares) for square in squares]


def test_every_head_has_its_norms_and_quarters(tmp_path: Path):
    root = publish(tmp_path)
    write_ranking(root, "owner_Small", [[3, 1], [0, 2]])
    frame = head_table(load_published(root)[0])
    assert len(frame) == 12
    assert frame["rank"].head(2).tolist() == [1, 2]
    assert frame["rank"].isna().sum() == 10
    assert list(zip(frame["layer"], frame["head"], strict=True))[:2] == [(3, 1), (0, 2)]
    for row in frame.to_dict("records"):
        vectors = {part: raw(root, "owner_Small", part, row["layer"], row["head"]) for part in "qk"}
        assert row["query_norm"] == pytest.approx(math.sqrt(sum(x * x for x in vectors["q"])))
        assert row["key_norm"] == pytest.approx(math.sqrt(sum(x * x for x in vectors["k"])))
        assert [row[f"quarter_{i}"] for i in range(1, 5)] == pytest.approx(energies(vectors["q"]))


def test_a_summary_is_of_the_best_heads_and_of_all(tmp_path: Path):
    root = publish(tmp_path)
    model = load_published(root)[0]
    row = summarize_published(model, 3)
    best = [raw(root, model.name, "q", *head) for head in model.ranking[:3]]
    every = [raw(root, model.name, "q", layer, head) for layer in range(4) for head in range(3)]
    assert (row["n_layers"], row["n_heads"], row["d_head"], row["top"]) == (4, 3, 8, 3)
    assert row["first_layer"] == min(layer for layer, _ in model.ranking[:3])
    assert row["last_layer"] == max(layer for layer, _ in model.ranking[:3])
    for name, vectors in (("top", best), ("all", every)):
        norms = [math.sqrt(sum(x * x for x in vector)) for vector in vectors]
        assert row[f"query_norm_{name}_min"] == pytest.approx(min(norms))
        assert row[f"query_norm_{name}_median"] == pytest.approx(np.median(norms))
        assert row[f"query_norm_{name}_max"] == pytest.approx(max(norms))
        means = np.mean([energies(vector) for vector in vectors], axis=0)
        assert [row[f"quarter_{i}_{name}"] for i in range(1, 5)] == pytest.approx(means)
        np.testing.assert_allclose(frequency_profile(model, 3)[name], means)
    peak = np.mean([energies(vector) for vector in best], axis=0)
    assert (row["peak_pair_top"], row["peak_share_top"]) == (int(peak.argmax()), pytest.approx(peak.max()))
    keys = [np.linalg.norm(raw(root, model.name, "k", *head)) for head in model.ranking[:3]]
    assert row["key_norm_top_max"] == pytest.approx(max(keys))
    assert row["initial_norm"] == pytest.approx(0.01 * math.sqrt(8))


def test_initial_noise_has_the_norm_of_noise():
    noise = 0.01 * torch.randn(4000, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    assert float(noise.square().sum(dim=1).mean().sqrt()) == pytest.approx(initial_norm(128), rel=0.01)


@given(st.lists(st.integers(0, 9), min_size=1, max_size=9), st.integers(1, 12))
def test_mass_is_divided_by_how_much_of_a_cell_lies_in_a_bin(mass: list[int], bins: int):
    expected: list[float] = []
    for one in range(bins):
        start, end, share = Fraction(one, bins), Fraction(one + 1, bins), Fraction(0)
        for cell, amount in enumerate(mass):
            left, right = Fraction(cell, len(mass)), Fraction(cell + 1, len(mass))
            share += amount * max(Fraction(0), min(end, right) - max(start, left)) * len(mass)
        expected.append(float(share))
    np.testing.assert_allclose(rebin(np.array(mass, dtype=float), bins), expected, atol=1e-9)


def test_a_layer_on_a_boundary_counts_on_both_sides():
    heads = [(0, 0), (1, 0), (1, 1), (2, 5)]
    np.testing.assert_allclose(depth_profile(heads, 3, bins=2), [0.5, 0.5])
    np.testing.assert_allclose(depth_profile(heads[:3], 3, bins=2), [2 / 3, 1 / 3])
    np.testing.assert_allclose(depth_profile(heads[:1], 10), [1, *[0] * 9])
    np.testing.assert_allclose(depth_profile([(9, 0)], 10), [*[0] * 9, 1])


@pytest.mark.parametrize(("first", "second", "k"), [((2, 2), (1, 3), 2), ((3, 1), (3, 1), 2), ((1, 4), (4, 1), 3)])
def test_chance_is_counted_over_all_draws(first: tuple[int, int], second: tuple[int, int], k: int):
    draws = [
        [set(draw) for draw in combinations(product(range(shape[0]), range(shape[1])), k)] for shape in (first, second)
    ]
    shared = [len(a & b) for a in draws[0] for b in draws[1]]
    expected = [shared.count(number) / len(shared) for number in range(k + 1)]
    assert shared_by_chance(first, second, k) == pytest.approx(expected)


@given(st.tuples(st.integers(2, 40), st.integers(2, 40)), st.tuples(st.integers(2, 40), st.integers(2, 40)))
def test_the_mean_by_chance_has_a_closed_form(first: tuple[int, int], second: tuple[int, int]):
    k = 4
    chances = shared_by_chance(first, second, k)
    common = min(first[0], second[0]) * min(first[1], second[1])
    assert sum(chances) == pytest.approx(1)
    mean = sum(number * chance for number, chance in enumerate(chances))
    assert mean == pytest.approx(k * k * common / (math.prod(first) * math.prod(second)))


def test_pairs_of_models_are_compared(tmp_path: Path):
    root = publish(tmp_path, {"A": (4, 3), "B": (2, 5), "C": (4, 3)})
    write_ranking(root, "A", [[0, 1], [1, 1], [3, 0], [2, 2]])
    write_ranking(root, "B", [[1, 1], [0, 4], [0, 1], [1, 0]])
    write_ranking(root, "C", [[3, 0], [1, 1], [0, 1], [0, 0]])
    frame = compare_published(load_published(root), 3, bins=4)
    assert list(zip(frame["first"], frame["second"], strict=True)) == [("A", "B"), ("A", "C"), ("B", "C")]
    assert frame["shared"].tolist() == [2, 3, 2]
    assert frame["expected"].tolist() == pytest.approx([9 * 6 / 120, 9 / 12, 9 * 6 / 120])
    # A has a third of its heads in each of the quarters 1, 2 and 4. In B, layer 0 (two heads) covers quarters 1 and 2,
    # and layer 1 (one head) covers 3 and 4.
    assert frame["depth_overlap"].tolist() == pytest.approx([5 / 6, 1, 5 / 6])
    assert frame["depth_correlation"].tolist() == pytest.approx([1 / math.sqrt(3), 1, 1 / math.sqrt(3)])
    assert frame["p"][1] == pytest.approx(1 / math.comb(12, 3))
    assert frame.equals(compare_published(load_published(root), 3, bins=4))
    assert compare_published(load_published(root)[:1], 3).empty


def test_depth_is_compared_with_random_heads(tmp_path: Path):
    """The overlap in depth is compared with that of random heads.

    With one head per model, two layers and two bins, random heads are in the same bin half of the time.
    """
    root = publish(tmp_path, {"A": (2, 2), "B": (2, 2), "C": (1, 2)})
    write_ranking(root, "A", [[0, 1]])
    write_ranking(root, "B", [[0, 0]])
    row, flat, _ = compare_published(load_published(root), 1, bins=2).to_dict("records")
    assert (row["shared"], row["depth_overlap"]) == (0, 1)
    assert row["depth_overlap_chance"] == pytest.approx(0.5, abs=0.05)
    assert row["depth_p"] == pytest.approx(0.5, abs=0.05)
    # A one-layer model spreads its head evenly over both bins, so its overlap with any head is one half.
    assert (flat["depth_overlap"], flat["depth_overlap_chance"], flat["depth_p"]) == (0.5, 0.5, 1)
    assert math.isnan(flat["depth_correlation"])


def run_published(*arguments: str) -> None:
    run(_parser().parse_args(["published", *arguments]))


def test_the_command_prints_each_model_and_each_pair(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = publish(tmp_path)
    run_published(str(root), "--top", "3")
    printed = capsys.readouterr().out
    small, tiny = (summarize_published(model, 3) for model in load_published(root))
    assert "owner_Small: 4 layers of 3 heads, d_head 8" in printed
    assert f"top 3 heads: layers {tiny['first_layer']} to {tiny['last_layer']}" in printed
    assert "initial noise 0.03" in printed
    assert " ".join(f"{small[f'query_norm_top_{of}']:.1f}" for of in ("min", "median", "max")) in printed
    assert "  ".join(f"{tiny[f'quarter_{i}_top']:6.1%}" for i in range(1, 5)) in printed
    assert "The top 3 heads of every two models" in printed
    layer, head = load_published(root)[1].ranking[2]
    norms = [float(np.linalg.norm(raw(root, "Tiny", part, layer, head))) for part in "qk"]
    cells = [f"{x:.3f}" for norm in norms for x in (norm, norm / (0.01 * math.sqrt(8)))]
    assert ["3", str(layer), str(head), *cells] in [line.split() for line in printed.splitlines()]
    assert sorted(path.name for path in root.iterdir()) == ["contextual_heads_scores_full_seq", "head_features"]


def test_the_command_writes_numbers_figures_and_their_sources(tmp_path: Path):
    root = publish(tmp_path / "data")
    run_published(str(root), "--top", "3", "--out", str(tmp_path / "out"))
    names = ["models", "heads", "frequency", "depth", "pairs", "sources"]
    figures = ["norms-owner_Small.png", "norms-Tiny.png", "frequency.png", "depth.png"]
    written = {path.name: path.read_bytes() for path in (tmp_path / "out").iterdir()}
    assert sorted(written) == sorted([*(f"{name}.csv" for name in names), *figures, "published.json", "index.html"])
    models = load_published(root)
    result = json.loads(written["published.json"])
    assert result["sources"] == {model.name: dict(model.sources) for model in models}
    assert result["versions"] == versions()
    assert result["models"] == [summarize_published(model, 3) for model in models]
    assert result["pairs"][0]["expected"] == pytest.approx(9 * 6 / 120)
    page = written["index.html"].decode()
    assert page.count("<img") == 4
    for model in models:
        ranked = f"contextual_heads_scores_full_seq/{model.name}/relevant_heads.json"
        assert f"{ranked}, sha256 {model.sources[ranked]}" in page
        assert model.directions.digest in page
    assert str(tmp_path) not in page + written["published.json"].decode()
    with (tmp_path / "out" / "heads.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 22
    norm = np.linalg.norm(raw(root, "Tiny", "q", *models[1].ranking[0]))
    (first,) = (row for row in rows if (row["model"], row["rank"]) == ("Tiny", "1"))
    assert float(first["query_norm"]) == pytest.approx(norm)


def test_the_document_of_the_command_is_what_it_writes(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root, out = publish(tmp_path / "data"), tmp_path / "out"
    documents: list[dict[str, Any]] = []
    for more in (["--out", str(out)], []):
        assert main(["published", str(root), "--top", "3", "--json", *more]) == 0
        documents.append(json.loads(capsys.readouterr().out))
    assert sorted(documents[0].pop("written")) == sorted(str(path) for path in out.iterdir())
    assert documents[1].pop("written") == []
    assert documents == [json.loads((out / "published.json").read_text())] * 2


def test_one_model_alone_is_compared_with_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    root = publish(tmp_path / "data", {"Tiny": (2, 5)})
    run_published(str(root), "--top", "2", "--out", str(tmp_path / "out"))
    assert "every two models" not in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "published.json").read_text())["pairs"] == []
    assert "every two models" not in (tmp_path / "out" / "index.html").read_text()


DATA = SHARED_DATA / "published"


@pytest.mark.skipif(not DATA.is_dir(), reason="the authors' published files are not here; set FOCUSLENS_DATA")
def test_the_authors_own_files():
    models = {model.label: model for model in load_published(DATA)}
    shapes = {name: (model.n_layers, model.n_heads, model.directions.d_head) for name, model in models.items()}
    assert shapes == {
        "Llama-3.2-3B-Instruct": (28, 24, 128),
        "Ministral-8B-Instruct-2410": (36, 32, 128),
        "Qwen2.5-7B-Instruct": (28, 28, 128),
    }
    for model in models.values():
        assert sorted(model.ranking) == list(model.directions.heads)
    llama, _, qwen = (summarize_published(model, 8) for model in models.values())
    assert llama["initial_norm"] == pytest.approx(0.11, abs=0.005)
    norms = {part: [round(llama[f"{part}_norm_top_{of}"], 2) for of in ("min", "max")] for part in ("query", "key")}
    assert norms["key"] == [0.18, 0.55]
    assert [round(norm) for norm in norms["query"]] == [20, 25]
    assert round(qwen["key_norm_top_max"], 1) == 1.7
    assert 18 < qwen["query_norm_top_min"] < qwen["query_norm_top_max"] < 26
    # In the 20 best heads of Llama, the fastest quarter of the frequencies has 2 % of the energy, and
    # the next has 43 %.
    twenty = summarize_published(models["Llama-3.2-3B-Instruct"], 20)
    assert [round(100 * twenty[f"quarter_{i}_top"]) for i in (1, 2)] == [2, 43]
