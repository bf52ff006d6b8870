"""The benchmark: contestants do the same work, parts and ratios add up, and no user's files are overwritten."""

from __future__ import annotations

import json
import math
import os
from collections import Counter
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from focuslens.data.synthetic import build_tokenizer
from tests.support.versions import needs_hooked

bench = pytest.importorskip("bench", reason="the experiments are not here")
import bench_contestants as contestants  # noqa: E402
import bench_families  # noqa: E402
import bench_model as models  # noqa: E402
import bench_overhead  # noqa: E402
import bench_page  # noqa: E402
import bench_real  # noqa: E402

LENGTH = 200
FLOOR = "Hugging Face, fused"
needs_linux = pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="memory is read from /proc")


@pytest.fixture(scope="module")
def directory(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directory of the benchmark's random model."""
    directory = tmp_path_factory.mktemp("bench")
    models.Bench(directory).make_checkpoint()
    return directory


@pytest.fixture(scope="module")
def short(directory: Path) -> models.Bench:
    return models.Bench(directory, LENGTH)


@pytest.fixture(autouse=True)
def _same_threads():
    """Restore torch's number of threads, which ``main`` changes."""
    threads = torch.get_num_threads()
    yield
    torch.set_num_threads(threads)


def contents(folder: Path) -> dict[str, tuple[bytes, int]]:
    return {path.name: (path.read_bytes(), path.stat().st_mtime_ns) for path in folder.iterdir()}


# --- the checkpoint ---


def test_a_folder_that_holds_something_is_left_as_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    (tmp_path / "model.safetensors").write_bytes(b"mine")
    before = contents(tmp_path)
    monkeypatch.setattr(bench, "demo_seconds", lambda: pytest.fail("it goes on"))
    for place in (tmp_path, tmp_path / "model.safetensors"):
        with pytest.raises(SystemExit, match=r"is not an empty folder; the random model is written to a new"):
            bench.main(["--checkpoint", str(place), "--out", str(tmp_path / "out")])
    assert contents(tmp_path) == before


def test_the_random_model_is_the_same_every_time(directory: Path, tmp_path: Path):
    (tmp_path / "empty").mkdir()
    for name in ("new", "empty"):
        models.Bench(tmp_path / name).make_checkpoint()
        made = (tmp_path / name / "model.safetensors").read_bytes()
        assert made == (directory / "model.safetensors").read_bytes()


@needs_linux
def test_a_process_that_takes_the_peak_only_reads_the_checkpoint(directory: Path, capsys: pytest.CaptureFixture[str]):
    before = contents(directory)
    where = ["--checkpoint", str(directory), "--device", "cpu", "--threads", "1", "--length", "100"]
    bench.main(["--peak", "score", FLOOR, *where])
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    # The memory is at least that of the cached keys and values, and at most that of a process with such a small model.
    assert 2 * 8 * 100 * 256 * 4 < found["bytes"] < 2**30
    assert found["total_bytes"] > found["bytes"] + (directory / "model.safetensors").stat().st_size
    assert contents(directory) == before


# --- time ---


@pytest.mark.parametrize("n", [2, 3, 4, 5])
def test_contestants_take_every_place_and_follow_each_other_equally_often(n: int):
    names = list("abcde"[:n])
    rounds = [bench.in_order(names, number) for number in range(2 * n)]
    for first in (0, n):
        for place in range(n):
            assert sorted(one[place] for one in rounds[first : first + n]) == names
    neighbours = Counter(pair for one in rounds for pair in pairwise(one))
    assert set(neighbours.values()) == {2}
    assert len(neighbours) == n * (n - 1)


def test_a_work_runs_in_those_orders_and_its_first_round_warms_up(monkeypatch: pytest.MonkeyPatch):
    ran: list[str] = []
    durations = {"a": 2.0, "b": 3.0, "c": 8.0}
    made = {name: models.Contestant(lambda _, name=name: lambda: ran.append(name), 2) for name in durations}
    monkeypatch.setattr(bench, "CONTESTANTS", {"work": made})
    monkeypatch.setattr(bench, "seconds_of", lambda run, _: (run(), len(ran) / 1000 + durations[ran[-1]])[1])
    found = bench.time_work(SimpleNamespace(device="cpu"), "work", 3)
    assert ran == [name for number in range(4) for name in bench.in_order(["a", "b", "c"], number)]
    for name, seconds in durations.items():
        calls = [i + 1 for i, one in enumerate(ran) if one == name][1:]
        assert found[name]["rounds"] == pytest.approx([2 * (seconds + call / 1000) for call in calls])
        assert found[name]["seconds"] == pytest.approx(2 * (seconds + calls[1] / 1000))
        ratios = [own / first for own, first in zip(found[name]["rounds"], found["a"]["rounds"], strict=True)]
        assert found[name]["ratio"] == pytest.approx(sorted(ratios)[1])


def test_the_papers_training_is_put_together_from_its_parts(monkeypatch: pytest.MonkeyPatch):
    run, done = object.__new__(contestants.PaperTraining), list[str]()

    def seconds_of(part: Any, _: str) -> float:
        part()
        return {"step": 0.5}.get(done[-1], 3)

    for name in ("cache_activations", "load", "step"):
        monkeypatch.setattr(run, name, lambda name=name: done.append(name))
    monkeypatch.setattr(bench, "seconds_of", seconds_of)
    taken = bench.timed_work(models.Contestant(lambda _: run), run, "cpu")
    assert done == ["cache_activations", "load", "step"]
    # For 100 samples, caching takes 3 s each, and a step takes 0.5 s for each of 20 heads in each of 10 epochs.
    assert taken == {"whole": 10_300, "caching": 3, "step": 0.5}
    written = bench.timing(models.Contestant(lambda _: run, 1, "a part"), [taken, taken], [103.0, 103.0])
    assert written["ratio"] == 100
    assert written["parts"] == {"caching": [3, 3], "step": [0.5, 0.5]}
    names = {"samples": 100, "caching": 3, "heads": 20, "epochs": 10, "step": 0.5}
    assert eval(written["formula"], names) == written["seconds"]
    assert {name: contestants.WORK[name] for name in ("samples", "heads", "epochs")}.items() <= names.items()


# --- memory ---


def test_slope_of_hand_worked_cases():
    assert bench.slope({1024: 7, 2048: 14, 8192: 56}) == pytest.approx(1)
    assert bench.slope({10: 5, 1000: 50}) == pytest.approx(0.5)
    # To base 2, the logarithms of lengths are 0, 1, 2 and of memory 0, 1, 1, so the slope is (-1 * -2/3 + 1 * 1/3) / 2.
    assert bench.slope({1: 1, 2: 2, 4: 2}) == pytest.approx(0.5)
    assert bench.slope({1: 1, 2: 4, 4: 4}) == pytest.approx(1)


@needs_linux
def test_memory_freed_before_the_run_is_not_had_for_nothing(monkeypatch: pytest.MonkeyPatch, short: Any):
    held: list[Any] = []

    def blocks() -> list[bytearray]:
        """50 MB in blocks too small for mmap. The heap keeps them when they are freed below another block."""
        return [bytearray(b"x") * 100_000 for _ in range(500)]

    def prepare(_: Any) -> Any:
        freed = blocks()
        held.append(bytearray(b"x") * 100_000)
        del freed
        return lambda: held.append(blocks())

    monkeypatch.setattr(bench, "CONTESTANTS", {"work": {"name": models.Contestant(prepare)}})
    assert bench.peak_here(short, "work", "name")["bytes"] > 40e6


def test_peak_is_the_median_of_processes_that_are_all_recorded(monkeypatch: pytest.MonkeyPatch, short: Any):
    printed = iter([{"bytes": b, "total_bytes": t} for b, t in ((30, 90), (10, 50), (20, 70))])
    commands: list[list[str]] = []

    def output_of(command: list[str]) -> str:
        commands.append(command)
        return f"noise\n{json.dumps(next(printed))}\n"

    monkeypatch.setattr(bench, "output_of", output_of)
    found = bench.peak(SimpleNamespace(threads=1), short, "score", FLOOR, 3)
    assert (found["bytes"], found["total_bytes"]) == (20, 70)
    assert [one["bytes"] for one in found["processes"]] == [30, 10, 20]
    assert [one["total_bytes"] for one in found["processes"]] == [90, 50, 70]
    options = bench.parse(commands[0][2:])
    assert options.peak == ["score", FLOOR]
    assert (options.checkpoint, options.length) == (short.directory, LENGTH)
    assert (options.device, options.dtype, options.threads) == ("cpu", "float32", 1)


@needs_hooked
def test_every_write_of_ours_counts_and_all_samples_of_the_papers(short: Any, monkeypatch: pytest.MonkeyPatch):
    synced: list[int] = []
    monkeypatch.setattr("focuslens.model.verification.write_json", lambda *_: None)  # a write of the first load only
    monkeypatch.setattr(os, "fsync", lambda handle: synced.append(os.fstat(handle).st_size))
    found = bench.written_bytes(short)
    writes = found["writes of FocusLens"]
    assert {name: len(sizes) for name, sizes in writes.items()} == {
        "checkpoint.responses.jsonl": 1,
        "checkpoint.pt": 10,
        "directions.safetensors": 1,
        "directions.json": 1,
    }
    assert found["FocusLens"] == sum(synced)
    # Float32 queries and keys of 100 samples in 8 layers of 256 numbers at 216 positions, plus the overhead of files.
    numbers = 100 * 8 * 2 * 256 * 216 * 4
    assert numbers < found["the paper's procedure"] < 1.02 * numbers


# --- contestants ---


@pytest.fixture(scope="module")
def stopping(short: Any, tmp_path_factory: pytest.TempPathFactory) -> models.Bench:
    """The same model, with the third token of its response as end-of-sequence token."""
    response = contestants.CONTESTANTS["score"][FLOOR].prepare(short)()[0, LENGTH:].tolist()
    directory = tmp_path_factory.mktemp("stopping")
    for path in short.directory.iterdir():
        (directory / path.name).write_bytes(path.read_bytes())
    end = {"eos_token_id": response[2], "eos_token": build_tokenizer().convert_ids_to_tokens(response[2])}
    for name in ("config.json", "generation_config.json", "tokenizer_config.json"):
        settings = json.loads((directory / name).read_text())
        changed = {key: value for key, value in end.items() if key in settings}
        (directory / name).write_text(json.dumps({**settings, **changed}))
    return models.Bench(directory, LENGTH)


@needs_hooked
def test_all_score_the_same_response_alike(stopping: Any):
    found = {name: one.prepare(stopping)() for name, one in contestants.CONTESTANTS["score"].items()}
    whole = found.pop(FLOOR)[0].tolist()
    assert whole[:LENGTH] == stopping.encoded().tokens.tolist()
    assert len(whole) == LENGTH + 16
    papers = found["the paper's procedure"]
    assert len(papers.scores) == 64
    assert max(papers.scores) > 0.1
    tokenizer = stopping.focus("bridge").tokenizer
    assert tokenizer.eos_token_id == whole[LENGTH + 2]
    text = tokenizer.decode(whole[LENGTH:], skip_special_tokens=True).strip()
    for name, one in found.items():
        if name.startswith("FocusLens"):
            assert one.responses == (text,)
            scores = one.relevant.flatten().tolist()
        else:
            assert one.response == whole[LENGTH:]
            scores = one.scores
        assert scores == pytest.approx(papers.scores, abs=1e-4), name


def test_sweep_and_floor_see_the_same_tokens(short: Any, monkeypatch: pytest.MonkeyPatch):
    seen: list[torch.Tensor] = []
    for module in (contestants, models):
        monkeypatch.setattr(module, "generate", lambda _, tokens, n: seen.append(tokens))
    for name in (FLOOR, "the paper's procedure"):
        contestants.CONTESTANTS["sweep"][name].prepare(short)()
    floor, paper = (tokens.tolist() for tokens in seen)
    assert floor == paper == [short.encoded().tokens.tolist()]
    model = short.focus("bridge")
    assert model.encode(short.sample.prompt()).tokens.tolist() == floor[0]
    assert len(floor[0]) == LENGTH


def test_the_floor_is_the_fused_causal_kernel(short: Any, monkeypatch: pytest.MonkeyPatch):
    plain, calls = torch.nn.functional.scaled_dot_product_attention, list[tuple[int, Any, bool]]()

    def spy(query: Any, key: Any, value: Any, attn_mask: Any = None, *rest: Any, is_causal: bool = False, **more: Any):
        calls.append((query.shape[-2], attn_mask, is_causal))
        return plain(query, key, value, attn_mask, *rest, is_causal=is_causal, **more)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    contestants.CONTESTANTS["score"][FLOOR].prepare(short)()
    assert calls[:8] == [(LENGTH, None, True)] * 8
    assert calls[8:] == [(1, None, False)] * 8 * 15


@needs_hooked
def test_the_papers_activations_are_those_of_transformerlens(short: Any):
    paper = contestants.PaperTraining(short)
    paper.cache_activations()
    _, cache = short.focus("hooked").hooked.run_with_cache(paper.tokens)
    for layer in range(8):
        for x in "qk":
            expected = cache[f"blocks.{layer}.attn.hook_rot_{x}"][0].transpose(0, 1)
            torch.testing.assert_close(torch.load(paper.path(layer, x)), expected, atol=1e-3, rtol=1e-4)


@needs_hooked
def test_a_step_of_the_paper_is_only_a_step(short: Any, monkeypatch: pytest.MonkeyPatch):
    paper = contestants.PaperTraining(short)
    paper.cache_activations()
    paper.load(5, 3)
    monkeypatch.setattr(torch, "load", lambda *_: pytest.fail("a step reads from disk"))
    losses = [float(paper.step()) for _ in range(8)]
    _, cache = short.focus("hooked").hooked.run_with_cache(paper.tokens)
    ((start, end),) = short.encoded().spans["relevant"]
    score = cache["blocks.5.attn.hook_pattern"][0, 3, LENGTH:, start:end].sum(dim=-1).mean()
    assert -losses[0] == pytest.approx(float(score), abs=1e-5)
    assert losses == sorted(losses, reverse=True)
    assert losses[-1] < losses[0]
    # Each AdamW step changes a number by at most 1e-3 for any gradient, so 8 steps change it by at most 8e-3.
    assert 5e-3 < paper.direction.abs().max() < 8.1e-3


@pytest.mark.parametrize("work", [pytest.param("steer", marks=needs_hooked), "steer_bridge"])
def test_steering_acts_and_differs_in_nothing_else(work: str, short: Any):
    unsteered, steered = (one.prepare(short)() for one in contestants.CONTESTANTS[work].values())
    expected = contestants.CONTESTANTS["score"][FLOOR].prepare(short)()[0, LENGTH:].tolist()
    assert unsteered.tokens.tolist() == expected
    assert len(steered.tokens) == 16
    assert steered.tokens.tolist() != expected


# --- the price of a decoded token ---


@pytest.fixture(scope="module")
def many_layers(tmp_path_factory: pytest.TempPathFactory) -> models.Bench:
    """The model whose passes are almost nothing but calls, and a shorter response."""
    made = bench_overhead.overhead_bench(tmp_path_factory.mktemp("overhead") / "model", "cpu", "float32")
    made.make_checkpoint()
    return replace(made, new_tokens=8)


def response_of(found: Any) -> list[int]:
    """Tokens of the response, whoever generated them."""
    whole = found[0] if isinstance(found, tuple) else found
    tokens = (whole.tokens if hasattr(whole, "tokens") else whole.flatten()).tolist()
    return tokens[256:] if len(tokens) > 256 else tokens


@pytest.mark.slow
@needs_hooked
@pytest.mark.parametrize("work", ["overhead_plain", "overhead_split", "overhead_steered"])
def test_all_generate_the_same_tokens_under_the_same_edits(work: str, many_layers: Any):
    pytest.importorskip("nnsight")
    contestants_ = bench_overhead.OVERHEAD[work]
    found = {name: response_of(one.prepare(many_layers)()) for name, one in contestants_.items() if not one.on_gpu}
    plain = found.pop(FLOOR)
    assert len(plain) == 8
    assert len(found) == 4
    expected = found["FocusLens, HookedTransformer"]
    assert all(tokens == expected for tokens in found.values())
    assert (expected == plain) is (work == "overhead_plain")


@pytest.mark.slow
@needs_hooked
def test_self_focus_chooses_in_a_prompt_of_the_same_length(many_layers: Any):
    found = {
        name: contestant.prepare(many_layers)()
        for work in ("overhead_focus", "overhead_focus_bridge")
        for name, contestant in bench_overhead.OVERHEAD[work].items()
    }
    tokens = {name: response_of(one) for name, one in found.items()}
    assert {len(own) for own in tokens.values()} == {8}
    for kind in ("plain", "self-focus"):
        assert tokens[f"HookedTransformer, {kind}"] == tokens[f"TransformerBridge, {kind}"]
    prompt = replace(many_layers, question=bench_overhead.QUESTION).encoded()
    ((start, end),) = prompt.spans["question"]
    assert len(prompt.tokens) == 256
    assert 12 <= end - start <= 24
    assert tokens["HookedTransformer, plain"] != tokens["HookedTransformer, self-focus"]


@pytest.mark.slow
@needs_hooked
def test_peers_read_the_masses_that_are_scored(many_layers: Any):
    pytest.importorskip("nnsight")
    work = bench_overhead.OVERHEAD["overhead_scored"]
    scores = work["FocusLens, HookedTransformer"].prepare(many_layers)().relevant
    # Its first row is the last one of the prompt, and its last token is not run. FocusLens runs the last token too.
    _, masses = work["nnsight"].prepare(replace(many_layers, new_tokens=9))()
    rows = torch.stack([mass[0] for mass in masses]).unflatten(0, (9, 28))[1:]
    torch.testing.assert_close(rows.mean(dim=0)[None], torch.as_tensor(scores), atol=1e-5, rtol=1e-3)


def _with_all_experts(config: Any) -> Any:
    if hasattr(config, "num_experts_per_tok"):
        config.num_experts_per_tok = config.num_local_experts
    return config


@pytest.mark.slow
@pytest.mark.parametrize("family", list(bench_families.FAMILY_TITLES))
def test_models_of_other_families_have_the_scores_of_all_patterns(
    family: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    """FocusLens's scores are what Hugging Face's own attentions give, and the model runs on the engine."""
    # Every expert acts. If some are chosen, two of them can have equal scores but for rounding, and the model jumps.
    config_of = bench_families._config
    monkeypatch.setattr(bench_families, "_config", lambda name: _with_all_experts(config_of(name)))
    made = bench_families.family_bench(family, tmp_path, 540, "cpu", "float32")
    runs = {name: one.prepare(made) for name, one in bench_families.FAMILIES[family].items()}
    plain, scores, masses = (run() for run in runs.values())
    assert plain.shape == (1, 540 + made.new_tokens)
    assert float((scores.relevant[0] - masses).abs().max()) < 1e-5
    assert float(masses.max()) > 0.05


def test_without_the_real_model_the_page_says_why(monkeypatch: pytest.MonkeyPatch):
    def of(*_: Any) -> Any:
        raise FileNotFoundError("no network")

    monkeypatch.setattr(bench_real.RealBench, "of", of)
    reason = bench.real(bench.parse(["--rounds", "1"]), "cpu", "float32")
    assert "no network" in reason
    assert reason in bench_page.decoding_tables({"overhead": {}, "real": reason})


# --- results ---


def fake_results() -> dict[str, Any]:
    """Results without two equal numbers."""
    number = iter(range(11, 10_000))

    def peak(scale: float = 1.0) -> dict[str, Any]:
        return {"bytes": next(number) * 2**20, "total_bytes": next(number) * 2**30 * scale}

    def device() -> dict[str, Any]:
        names = {work: ["first", *(f"{work} {i}" for i in range(3))] for work in bench_page.TITLES}
        return {
            "time": {
                work: {
                    name: {"seconds": next(number) + 0.25, "ratio": next(number) + 0.75, "measured": f"part of {name}"}
                    for name in of
                }
                for work, of in names.items()
            },
            "overhead": {
                work: {
                    name: {"seconds": next(number) + 0.125, "ratio": next(number) + 0.75, "measured": f"part of {name}"}
                    for name in ("first", "ours")
                }
                for work in bench_overhead.OVERHEAD_TITLES
            },
            "families": {
                family: {
                    name: {"seconds": next(number) + 0.25, "ratio": next(number) + 0.75, "measured": f"part of {name}"}
                    for name in ("first", "ours")
                }
                for family in bench_families.FAMILY_TITLES
            },
            "real": {
                work: {
                    "tokens": next(number),
                    "time": {
                        name: {"seconds": seconds, "ratio": next(number) + 0.75, "measured": "all of it"}
                        for name, seconds in zip(rows, (5, 6, 7, 8, 9, 2, 3, 4), strict=True)
                    },
                }
                for work, rows in bench_real.REAL.items()
            },
            "memory": {name: peak() for name in ("first", "second")},
            "length": {"ours": {"slope": next(number) + 0.5, "lengths": {1024: peak(0.1), 4096: peak(0.1)}}},
            "written": {"FocusLens": next(number) * 2**20, "the paper's procedure": next(number) * 2**20},
        }

    return {
        "settings": {"length": 3072, "rounds": 7, "short_rounds": 21, "processes": 9, "threads": 2},
        "processor": "A processor",
        "demo": {"seconds": 41.3},
        "results": {"cpu, float32": device(), "cuda, bfloat16": device()},
    }


def test_the_table_has_the_numbers_of_the_results():
    results = fake_results()
    table = bench_page.table(results)
    lines = table.splitlines()
    assert "Prompts of 3,072 tokens" in table
    assert "7 interleaved rounds" in table
    assert "and over 21 in the tasks of a model with 28 layers" in table
    assert "9 processes" in table
    assert "A processor, 2 threads" in table
    assert "41 s (bar: 90)" in table
    cut = lines.index("### cuda, bfloat16")
    for found, part in zip(results["results"].values(), (lines[:cut], lines[cut:]), strict=True):
        for rows in (*found["time"].values(), *found["families"].values()):
            for name, row in rows.items():
                assert f"| {name} | {row['seconds']:.2f} | {row['ratio']:.2f} | part of {name} |" in part
        for rows in found["overhead"].values():
            for name, row in rows.items():
                assert f"| {name} | {row['seconds']:.3f} | {row['ratio']:.2f} | part of {name} |" in part
        for task in found["real"].values():
            tokens = task["tokens"]
            # The prompt takes 2, 3 and 4 seconds, and 63 more tokens take 3 seconds each time.
            for name, prompt in ((FLOOR, 2), ("FocusLens, HookedTransformer", 3), ("FocusLens, TransformerBridge", 4)):
                assert f"| {name} | {tokens / prompt:,.0f} | 21 |" in part
        first, second = (row["bytes"] / 2**20 for row in found["memory"].values())
        assert f"| first | {first:.0f} | 1.00 |" in part
        assert f"| second | {second:.0f} | {second / first:.2f} |" in part
        small, large = found["length"]["ours"]["lengths"].values()
        above = f"| ours | {small['bytes'] >> 20} | {large['bytes'] >> 20} | {found['length']['ours']['slope']:.2f} |"
        assert part[part.index(above) - 2] == "|  | 1,024 | 4,096 | slope |"
        assert f"| ours | {small['total_bytes'] / 2**30:.2f} | {large['total_bytes'] / 2**30:.2f} |" in part
        ours, theirs = (size >> 20 for size in found["written"].values())
        assert f"Training writes {ours}.00 MiB; the paper's procedure {theirs} MiB." in part


def test_the_training_of_five_copies_is_called_so():
    for name in ("FocusLens, HookedTransformer", "FocusLens, TransformerBridge"):
        assert contestants.CONTESTANTS["train"][name].part == "5 samples, all copies of one, times 20"
        assert contestants.CONTESTANTS["train"][name].times == 20


@pytest.mark.parametrize(
    ("arguments", "gpu", "keys"),
    [
        ([], False, ["cpu, float32"]),
        ([], True, ["cpu, float32", "cuda, bfloat16"]),
        (["--device", "cuda"], True, ["cuda, bfloat16"]),
        (["--device", "cpu"], True, ["cpu, float32"]),
    ],
)
def test_a_gpu_comes_beside_the_cpu(
    arguments: list[str], gpu: bool, keys: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: gpu)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "A card")
    monkeypatch.setattr(bench, "demo_seconds", lambda: 1.0)
    monkeypatch.setattr(bench, "measure", lambda _, one: f"{one.device}, {one.dtype}")
    found = bench.run_all(bench.parse(arguments), tmp_path / "model")
    assert found["results"] == {key: key for key in keys}
    assert found["gpu"] == ("A card" if gpu else None)


@pytest.mark.parametrize("arguments", [["--lengths", "100"], ["--length", "20"], ["--rounds", "0"]])
def test_settings_that_would_fail_at_the_end_are_refused_at_the_start(
    arguments: list[str], capsys: pytest.CaptureFixture[str]
):
    with pytest.raises(SystemExit):
        bench.parse(arguments)
    assert "or more" in capsys.readouterr().err


@pytest.mark.slow
@needs_hooked
def test_the_whole_of_it_writes_its_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    pytest.importorskip("matplotlib")
    commands: list[list[str]] = []

    def output_of(command: list[str], **_: str) -> str:
        commands.append(command)
        if "--peak" in command:
            length = int(command[command.index("--length") + 1])
            return json.dumps({"bytes": length * 2**20, "total_bytes": length * 2**21})
        return {"rev-parse": "abc\n", "status": " M file\n"}.get(command[3], "")

    monkeypatch.setattr(bench, "output_of", output_of)
    monkeypatch.setattr(bench, "real", lambda *_: "No real model.")
    for name, value in {"TAUS": (0.1, 0.3, 0.6), "KS": (1, 2), "TRAINED_SAMPLES": 1, "EPOCHS": 1}.items():
        monkeypatch.setattr(contestants, name, value)
    folders = [tmp_path / "out", tmp_path / "docs"]
    introduction = f"# Speed and memory\n\nBy hand.\n\n{bench_page.MARKER}"
    folders[1].mkdir()
    (folders[1] / "bench.md").write_text(f"{introduction}| old |\n")
    tiny = ["--device", "cpu", "--length", "200", "--lengths", "100", "200", "--rounds", "1", "--processes", "1"]
    bench.main([*tiny, "--threads", "1", "--out", str(folders[0]), "--docs", str(folders[1])])
    for folder in folders:
        assert sorted(path.name for path in folder.iterdir()) == ["bench.json", "bench.md", "bench.png"]
        assert (folder / "bench.png").read_bytes().startswith(b"\x89PNG")
    results = json.loads((folders[1] / "bench.json").read_text())
    assert results["commit"] == {"id": "abc", "clean": False}
    assert results["model"]["hidden_size"] == 256
    assert results["settings"]["seed"] == 0
    assert results["settings"]["taus"] == [0.1, 0.3, 0.6, 1.5, 1000]
    assert results["processor"]
    assert results["cores"] == os.cpu_count()
    assert sum(command[1:4] == ["-m", "focuslens", "demo"] for command in commands) == 1
    found = results["results"]["cpu, float32"]
    assert set(found) == {"time", "families", "overhead", "real", "memory", "length", "written"}
    assert {work: set(rows) for work, rows in found["families"].items()} == {
        work: set(contestants) for work, contestants in bench_families.FAMILIES.items()
    }
    assert set(found["overhead"]) == set(bench_overhead.OVERHEAD_TITLES)
    ours = "FocusLens, HookedTransformer"
    assert set(found["overhead"]["overhead_plain"]) == {
        FLOOR,
        ours,
        "FocusLens, TransformerBridge",
        "nnsight",
        "TransformerLens",
    }
    for work, rows in found["time"].items():
        assert set(rows) == set(contestants.CONTESTANTS[work])
        assert all(math.isfinite(row["seconds"]) and row["seconds"] > 0 for row in rows.values())
    assert set(found["time"]) == set(bench_page.TITLES)
    ours = found["length"]["FocusLens, TransformerBridge"]
    assert ours["slope"] == pytest.approx(1)
    assert ours["lengths"]["200"]["total_bytes"] == 200 * 2**21
    tables, page = ((folder / "bench.md").read_text() for folder in folders)
    assert "Training writes" in tables
    assert page == introduction + tables
