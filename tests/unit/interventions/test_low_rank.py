"""Directions with a rank: the artefact, its checks, and the vector at given queries."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from focuslens import FocusDirections, FocusModel, FocusSteering
from focuslens.interventions import intervention_from

HEADS = [(2, 3), (0, 1), (1, 0)]


def numbers(*size: int, seed: int) -> torch.Tensor:
    return torch.randn(*size, generator=torch.Generator().manual_seed(seed))


def directions(site: Any = "rotary", rank: int = 2, key: bool = False) -> FocusDirections:
    return FocusDirections(
        HEADS,
        numbers(3, 16, seed=0),
        numbers(3, 16, seed=1) if key else None,
        site,
        {"losses": [[-0.1, -0.2, -0.3]]},
        numbers(3, 16, rank, seed=2),
        numbers(3, 16, rank, seed=3),
    )


@pytest.mark.parametrize("site", ["rotary", "projection"])
def test_saved_directions_are_those_that_are_loaded(tmp_path: Path, site: Any) -> None:
    made = directions(site, key=site == "projection")
    loaded = FocusDirections.load(made.save(tmp_path))
    assert (loaded.digest, loaded.rank, loaded.site) == (made.digest, 2, site)
    for name in ("query", "key", "u", "v"):
        before, after = getattr(made, name), getattr(loaded, name)
        assert before is after is None or torch.equal(before, after)
    assert sorted(load_file(tmp_path / "directions.safetensors")) == sorted(
        name for name in ("query", "key", "u", "v") if getattr(made, name) is not None
    )


def test_files_without_a_rank_are_those_of_earlier_versions(tmp_path: Path) -> None:
    """Files of this form were written before directions had a rank. They load, and save to the same bytes."""
    query, provenance = numbers(3, 16, seed=0), {"seed": 3}
    content = hashlib.sha256(json.dumps(["rotary", [list(head) for head in HEADS]]).encode())
    content.update(query.numpy().tobytes())
    config = {
        "format": 1,
        "site": "rotary",
        "d_head": 16,
        "heads": [list(head) for head in HEADS],
        "sha256": content.hexdigest(),
        "provenance": provenance,
    }
    FocusDirections(HEADS, query).save(tmp_path / "old")
    (tmp_path / "old" / "directions.json").write_text(json.dumps(config, indent=2))
    loaded = FocusDirections.load(tmp_path / "old")
    assert (loaded.rank, loaded.u, loaded.v) == (0, None, None)
    loaded.save(tmp_path / "new")
    for name in ("directions.json", "directions.safetensors"):
        assert (tmp_path / "new" / name).read_bytes() == (tmp_path / "old" / name).read_bytes()


def test_earlier_versions_refuse_directions_with_a_rank(tmp_path: Path) -> None:
    directions().save(tmp_path)
    path = tmp_path / "directions.json"
    config = json.loads(path.read_text())
    assert config["format"] == 2
    path.write_text(json.dumps({**config, "format": 1}))
    with pytest.raises(
        ValueError, match="has format 1; this version reads format 1, and format 2 if there are u and v"
    ):
        FocusDirections.load(tmp_path)


def test_every_matrix_counts_in_the_digest() -> None:
    made = directions()
    assert made.u is not None
    assert made.v is not None
    others = [replace(made, u=2 * made.u), replace(made, v=2 * made.v), replace(made, u=None, v=None)]
    assert len({made.digest, *(other.digest for other in others)}) == 4


def test_selected_heads_keep_their_matrices() -> None:
    made = directions("projection", key=True)
    chosen = made.select([(1, 0), (2, 3)])
    for name in ("query", "key", "u", "v"):
        assert torch.equal(getattr(chosen, name), getattr(made, name)[[2, 0]])


def test_the_vector_at_a_query_is_that_of_the_equation() -> None:
    made, queries = directions(), numbers(5, 3, 16, seed=4)
    assert made.u is not None
    assert made.v is not None
    vectors = made.at(queries)
    for row in range(5):
        for head in range(3):
            matrix = made.u[head].double() @ made.v[head].double().T
            expected = made.query[head].double() + matrix @ queries[row, head].double()
            torch.testing.assert_close(vectors[row, head].double(), expected, rtol=0, atol=1e-4)
            assert float(made.product_norms[head]) == pytest.approx(float(matrix.norm()), rel=1e-5)
    constant = FocusDirections(HEADS, made.query)
    assert torch.equal(constant.at(queries)[3], made.query)
    assert constant.product_norms.tolist() == [0, 0, 0]


def test_reports_show_the_rank() -> None:
    assert "rank 2" in repr(directions())
    assert "rank 2" in directions()._repr_html_()
    assert "norm of U V^T" in directions()._repr_html_()
    assert "rank" not in repr(FocusDirections(HEADS, numbers(3, 16, seed=0)))


def test_steering_is_rebuilt_from_its_description() -> None:
    steering = FocusSteering(directions(), 0.5, HEADS[:2])
    assert steering.describe()["rank"] == 2
    rebuilt: Any = intervention_from(steering.describe(), [directions()])
    assert rebuilt.describe() == steering.describe()
    assert "rank" not in FocusSteering(FocusDirections(HEADS, numbers(3, 16, seed=0)), 1.0).describe()


def test_rank_0_steers_bit_for_bit_as_a_plain_addition(load_model: Any) -> None:
    model: FocusModel = load_model("llama")
    vectors, q = numbers(3, 16, seed=0), numbers(2, 5, 4, 16, seed=1)
    for name, hook in FocusSteering(FocusDirections(HEADS, vectors), 0.3).hooks(model):
        layer = int(name.split(".")[1])
        expected = q.clone()
        for (where, head), vector in zip(HEADS, vectors, strict=True):
            if where == layer:
                expected[:, :, head] += 0.3 * vector
        steered = hook(q, None)
        assert steered is not None
        assert torch.equal(steered, expected)


U = numbers(3, 16, 2, seed=2)


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("u", "v", "error", "message"),
    [
        (U, None, ValueError, "u is given without v; give both"),
        (None, U, ValueError, "v is given without u; give both"),
        (U[:2], U, ValueError, r"u has shape \(2, 16, 2\); it must be \(3, 16, rank\)"),
        (U, U[:, :8], ValueError, r"v has shape \(3, 8, 2\)"),
        (U, U[:, :, 0], ValueError, r"v has shape \(3, 16\)"),
        (U[..., :0], U[..., :0], ValueError, "leave u and v out for rank 0"),
        (U, U[..., :1], ValueError, r"u is \(3, 16, 2\) and v \(3, 16, 1\)"),
        (U, U / 0, ValueError, "v holds values that are not finite"),
        (U.tolist(), U, TypeError, r"u is a list; it must be a tensor \[n, d_head, rank\]"),
    ],
)
def test_matrices_that_make_no_sense_are_refused(u: Any, v: Any, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        FocusDirections(HEADS, torch.zeros(3, 16), u=u, v=v)
