"""Focus directions on disk: a saved file loads bit for bit, and inconsistent files raise errors."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from focuslens import FocusDirections, FocusModel, Head
from tests.support.paths import SHARED_DATA

HEADS = [(2, 3), (0, 1), (1, 0)]


def directions(*, key: bool = True, **provenance: Any) -> FocusDirections:
    query, keys = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    return FocusDirections(HEADS, query, keys if key else None, "projection" if key else "rotary", provenance)


@pytest.mark.parametrize("key", [True, False])
def test_what_is_saved_comes_back_bit_for_bit(tmp_path: Path, key: bool) -> None:
    losses = torch.rand(4, 3, generator=torch.Generator().manual_seed(1))
    saved = directions(key=key, model={"name": "naïve"}, losses=losses.tolist())
    assert saved.save(tmp_path / "new" / "mine") == tmp_path / "new" / "mine"
    loaded = FocusDirections.load(tmp_path / "new" / "mine")
    assert loaded.heads == saved.heads
    assert all(isinstance(head, Head) for head in loaded.heads)
    assert torch.equal(loaded.query, saved.query)
    assert loaded.query.dtype == torch.float32
    if saved.key is None:
        assert loaded.key is None
    else:
        assert loaded.key is not None
        assert torch.equal(loaded.key, saved.key)
    assert (loaded.site, loaded.provenance, loaded.digest) == (saved.site, saved.provenance, saved.digest)
    assert loaded.losses is not None
    assert torch.equal(loaded.losses, losses)
    assert sorted(path.name for path in (tmp_path / "new" / "mine").iterdir()) == [
        "directions.json",
        "directions.safetensors",
    ]


def test_the_json_can_be_read_by_anyone(tmp_path: Path) -> None:
    directions().save(tmp_path)
    config = json.loads((tmp_path / "directions.json").read_text())
    assert config["heads"] == [[2, 3], [0, 1], [1, 0]]
    assert (config["format"], config["site"], config["d_head"]) == (1, "projection", 16)


def test_vectors_become_float32_on_the_cpu_and_leave_the_graph() -> None:
    query = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    made = FocusDirections(HEADS, query, query.bfloat16())
    assert made.key is not None
    assert (made.query.dtype, made.key.dtype) == (torch.float32, torch.float32)
    assert not made.query.requires_grad
    assert (len(made), made.d_head, made.site, made.losses) == (3, 16, "rotary", None)


def test_directions_do_not_follow_the_tensors_they_were_made_of() -> None:
    query, key = torch.ones(3, 16), torch.ones(3, 16)
    made = FocusDirections(HEADS, query, key)
    query.zero_()
    key.zero_()
    assert made.key is not None
    assert (float(made.query.sum()), float(made.key.sum())) == (48, 48)


def test_select_reorders_heads_vectors_and_losses() -> None:
    made = directions(losses=[[-0.1, -0.2, -0.3], [-0.4, -0.5, -0.6]])
    some = made.select([(1, 0), (2, 3)])
    assert some.heads == ((1, 0), (2, 3))
    assert made.key is not None
    assert some.key is not None
    assert torch.equal(some.query, made.query[[2, 0]])
    assert torch.equal(some.key, made.key[[2, 0]])
    assert some.site == "projection"
    assert some.losses is not None
    torch.testing.assert_close(some.losses, torch.tensor([[-0.3, -0.1], [-0.6, -0.4]]))
    assert made.losses is not None
    assert made.losses.shape == (2, 3)
    assert len(made.select([])) == 0
    with pytest.raises(ValueError, match=r"no direction for L1H1, L2H2; there are 3 heads"):
        made.select([(1, 0), (1, 1), (2, 2)])
    with pytest.raises(ValueError, match="named more than once"):
        made.select([(1, 0), (1, 0)])


def test_the_digest_tells_directions_apart() -> None:
    made = directions()
    other = made.query.clone()
    other[1, 2] += 1e-6
    different = [
        made,
        FocusDirections(HEADS, other, made.key, made.site),
        FocusDirections(HEADS, made.query, other, made.site),
        FocusDirections(HEADS, made.query, None, made.site),
        FocusDirections(HEADS, made.query, made.key, "rotary"),
        FocusDirections([(2, 3), (0, 1), (1, 1)], made.query, made.key, made.site),
        made.select(HEADS[::-1]),
    ]
    assert len({one.digest for one in different}) == len(different)
    assert FocusDirections(HEADS, made.query, made.key, made.site, {"model": "b"}).digest == made.digest
    assert made.select(HEADS).digest == made.digest


@pytest.mark.usefixtures("unchecked")
@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"heads": [(0, 1), (0, 1), (1, 0)]}, "named more than once"),
        ({"site": "query"}, "site is 'query'; it must be one of rotary, projection"),
        ({"query": torch.zeros(2, 16)}, r"query has shape \(2, 16\); for 3 heads it must be \(3, d_head\)"),
        ({"query": torch.zeros(3, 4, 4)}, r"query has shape \(3, 4, 4\)"),
        ({"key": torch.zeros(4, 16)}, r"key has shape \(4, 16\)"),
        ({"key": torch.zeros(3, 8)}, r"query is \(3, 16\) and key \(3, 8\)"),
        ({"query": torch.full((3, 16), torch.nan)}, "query holds values that are not finite"),
        ({"key": torch.full((3, 16), torch.inf)}, "key holds values that are not finite"),
    ],
)
def test_directions_that_make_no_sense_are_refused(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        FocusDirections(**cast("Any", {"heads": HEADS, "query": torch.zeros(3, 16), **arguments}))


@pytest.mark.usefixtures("unchecked")
def test_heads_of_any_library_are_saved_as_numbers(tmp_path: Path) -> None:
    made = FocusDirections(cast("Any", np.array(HEADS)), torch.zeros(3, 16))
    made.save(tmp_path)
    assert FocusDirections.load(tmp_path).heads == tuple(HEADS)
    with pytest.raises(TypeError, match=r"\(0.5, 1\) is not a head; heads are \(layer, head\) pairs"):
        FocusDirections(cast("Any", [(0.5, 1), (0, 1), (1, 0)]), torch.zeros(3, 16))


# --- inconsistent files ---


def test_a_directory_that_lacks_a_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no directions.safetensors; is it a directory written by"):
        FocusDirections.load(tmp_path)
    directions().save(tmp_path)
    (tmp_path / "directions.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"holds no directions.json"):
        FocusDirections.load(tmp_path)


@pytest.mark.parametrize("format", [0, 2, None, "1"])
def test_another_format_is_refused(tmp_path: Path, format: Any) -> None:
    directions().save(tmp_path)
    path = tmp_path / "directions.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": format}))
    with pytest.raises(ValueError, match=rf"has format {format!r}; this version reads format 1"):
        FocusDirections.load(tmp_path)


@pytest.mark.usefixtures("unchecked")
def test_vectors_of_other_heads_are_refused(tmp_path: Path) -> None:
    directions().save(tmp_path)
    save_file({"query": torch.zeros(2, 16)}, tmp_path / "directions.safetensors")
    with pytest.raises(ValueError, match=r"query has shape \(2, 16\)"):
        FocusDirections.load(tmp_path)


def test_vectors_and_json_of_two_savings_are_refused(tmp_path: Path) -> None:
    # A save over other directions, killed between its two files, leaves a directory like this.
    directions().save(tmp_path / "old")
    made = FocusDirections(HEADS[::-1], torch.ones(3, 16), torch.ones(3, 16), "projection")
    made.save(tmp_path / "new")
    (tmp_path / "new" / "directions.safetensors").replace(tmp_path / "old" / "directions.safetensors")
    with pytest.raises(ValueError, match="do not belong together"):
        FocusDirections.load(tmp_path / "old")


@pytest.mark.parametrize("broken", ["provenance", "disk"])
def test_a_failed_saving_leaves_what_was_there(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str) -> None:
    first = directions()
    first.save(tmp_path)
    second = FocusDirections(HEADS, torch.ones(3, 16), provenance={"path": Path("x")} if broken == "provenance" else {})
    if broken == "disk":

        def fail(handle: int) -> None:
            raise OSError("disk full")

        monkeypatch.setattr(os, "fsync", fail)
    with pytest.raises((OSError, TypeError)):
        second.save(tmp_path)
    assert FocusDirections.load(tmp_path).digest == first.digest
    assert len(list(tmp_path.iterdir())) == 2


def test_what_is_neither_a_directory_nor_a_repository_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match="neither a directory nor"):
        FocusDirections.load(tmp_path / "missing" / "deeper" / "still")


def test_a_repository_on_the_hub_is_downloaded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    directions().save(tmp_path / "snapshot")
    asked: list[Any] = []

    def download(repository: str, **arguments: Any) -> str:
        asked.append((repository, arguments))
        return str(tmp_path / "snapshot")

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    loaded = FocusDirections.load("user/directions", revision="v1")
    assert loaded.digest == directions().digest
    files = ["directions.safetensors", "directions.json"]
    assert asked == [("user/directions", {"revision": "v1", "allow_patterns": files})]


def test_a_repository_on_the_hub_gets_both_files(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    calls: list[Any] = []

    class Hub:
        def __init__(self, token: str | None) -> None:
            calls.append(token)

        def create_repo(self, name: str, *, private: bool, exist_ok: bool) -> str:
            calls.append((name, private, exist_ok))
            return f"https://hub/{name}"

        def upload_folder(self, *, repo_id: str, folder_path: Path) -> None:
            calls.append((repo_id, FocusDirections.load(folder_path).digest))

    monkeypatch.setattr(huggingface_hub, "HfApi", Hub)
    address = directions().push_to_hub("user/mine", private=True, token="secret")
    assert address == "https://hub/user/mine"
    assert calls == ["secret", ("user/mine", True, True), ("user/mine", directions().digest)]


def test_a_model_of_another_shape_is_refused(load_model: Any) -> None:
    model: FocusModel = load_model("llama")  # 3 layers, 4 heads, d_head 16
    directions().require_shape(model.shape)
    with pytest.raises(ValueError, match="directions have d_head = 8, the model has 16"):
        FocusDirections(HEADS, torch.zeros(3, 8)).require_shape(model.shape)
    with pytest.raises(ValueError, match=r"head \(3, 0\) does not exist"):
        FocusDirections([(3, 0)], torch.zeros(1, 16)).require_shape(model.shape)
    with pytest.raises(ValueError, match="of a model with n_layers = 5, this one has 3"):
        directions(shape={"n_heads": 4, "n_layers": 5}).require_shape(model.shape)


# --- the authors' published files ---


def publish(directory: Path, layers: dict[str, torch.Tensor]) -> Path:
    directory.mkdir(parents=True)
    for name, vectors in layers.items():
        torch.save(vectors, directory / f"head_{name}.pth")
    return directory


def layer_files(n_layers: int, n_heads: int = 2, d_head: int = 4) -> dict[str, torch.Tensor]:
    """One file per layer.

    A number is 100 layer + 10 head + dimension, so that it shows its place. Keys are negative.
    """
    numbers = torch.arange(n_heads)[:, None] * 10.0 + torch.arange(d_head)
    return {
        f"{kind}_directions_{layer}": sign * (100 * layer + numbers)
        for layer in range(n_layers)
        for kind, sign in (("q", 1), ("k", -1))
    }


def test_published_files_are_read_in_the_order_of_layers_and_heads(tmp_path: Path) -> None:
    # With eleven layers, layer 10 would come before layer 2 in order of names.
    directory = publish(tmp_path / "some_model" / "direction_relevant", layer_files(11))
    (directory / "notes.pth").write_bytes(b"something else")
    made = FocusDirections.from_published(directory)
    assert made.heads == tuple((layer, head) for layer in range(11) for head in range(2))
    assert made.site == "rotary"
    assert made.key is not None
    for place, (layer, head) in enumerate(made.heads):
        expected = [100.0 * layer + 10 * head + d for d in range(4)]
        assert made.query[place].tolist() == expected
        assert made.key[place].tolist() == [-number for number in expected]
    assert made.provenance["shape"] == {"n_layers": 11, "n_heads": 2, "d_head": 4}
    assert "some_model" in made.provenance["source"]


def test_published_vectors_may_be_parameters_in_half_precision(tmp_path: Path) -> None:
    files = {name: torch.nn.Parameter(vectors.half()) for name, vectors in layer_files(1).items()}
    made = FocusDirections.from_published(publish(tmp_path / "m", cast("Any", files)))
    assert made.query.dtype == torch.float32
    assert made.query[1].tolist() == [10, 11, 12, 13]


@pytest.mark.parametrize(
    ("removed", "changed", "error", "message"),
    [
        (["q_directions_0"], {}, FileNotFoundError, "holds no head_q_directions_0.pth, but later layers"),
        (["q_directions_1"], {}, FileNotFoundError, "holds no head_q_directions_1.pth, but later layers"),
        (["k_directions_1"], {}, FileNotFoundError, "holds no head_k_directions_1.pth"),
        ([], {"k_directions_2": torch.zeros(2, 5)}, ValueError, "differ in shape"),
        ([], {"q_directions_1": torch.zeros(8)}, ValueError, r"does not hold a tensor \[n_heads, d_head\]"),
        ([], {"q_directions_1": {"a": 1}}, ValueError, r"does not hold a tensor \[n_heads, d_head\]"),
    ],
)
def test_published_files_that_do_not_fit_together_are_refused(
    tmp_path: Path, removed: list[str], changed: dict[str, Any], error: type[Exception], message: str
) -> None:
    files = {**layer_files(3), **changed}
    directory = publish(tmp_path / "m", {name: vectors for name, vectors in files.items() if name not in removed})
    with pytest.raises(error, match=message):
        FocusDirections.from_published(directory)


def test_a_directory_without_published_files_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no head_q_directions_LAYER\.pth"):
        FocusDirections.from_published(tmp_path)


DATA = SHARED_DATA
LLAMA = DATA / "published" / "head_features" / "meta-llama_Llama-3.2-3B-Instruct" / "direction_relevant"


@pytest.mark.skipif(not LLAMA.is_dir(), reason="the published directions are not here; set FOCUSLENS_DATA")
def test_the_authors_own_files() -> None:
    from focuslens import load_ranking

    made = FocusDirections.from_published(LLAMA)
    assert (len(made), made.d_head, made.site) == (28 * 24, 128, "rotary")
    ranking = DATA / "published" / "contextual_heads_scores_full_seq" / LLAMA.parent.name / "relevant_heads.json"
    heads = load_ranking(ranking)
    assert sorted(heads) == [(layer, head) for layer in range(28) for head in range(24)]
    best = made.select(heads[:8])
    assert best.key is not None
    # Query vectors were trained. Key vectors are the initial noise, because their gradient is zero at this site.
    query_norms, key_norms = best.query.norm(dim=-1), best.key.norm(dim=-1)
    assert 19 < float(query_norms.min()) < float(query_norms.max()) < 26
    assert 0.1 < float(key_norms.min()) < float(key_norms.max()) < 0.6
    layer, head = heads[0]
    raw = torch.load(LLAMA / f"head_q_directions_{layer}.pth", map_location="cpu", weights_only=True)[head].float()
    assert torch.equal(best.query[0], raw)
