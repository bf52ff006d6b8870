"""``focuslens helmet`` on a local Ray cluster of two workers writes the same bytes as one process."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import focuslens as fl
from focuslens.cli.main import main
from tests.support.helmet_runs import STAND_IN, write_data

ray: Any = pytest.importorskip("ray")

POOL = ["--ray", "--ray-workers", "2", "--ray-threads", "1"]


@pytest.fixture(scope="module")
def cluster() -> Iterator[None]:
    """A local Ray cluster with two CPUs and no usage reports. This process has one thread, like the workers."""
    os.environ |= {"RAY_USAGE_STATS_ENABLED": "0", "RAY_worker_niceness": "0"}
    quiet: dict[str, Any] = {"include_dashboard": False, "log_to_driver": False, "logging_level": logging.ERROR}
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    ray.init(address="local", num_cpus=2, object_store_memory=100 * 2**20, **quiet)
    yield
    ray.shutdown()
    torch.set_num_threads(before)


@pytest.fixture
def options(checkpoint: Any, load_model: Any, tmp_path: Path) -> list[str]:
    model, query = load_model("llama"), 4 * torch.randn(3, 16, generator=torch.Generator().manual_seed(3))
    directions = fl.FocusDirections([(2, 1), (0, 2), (1, 3)], query, provenance={"model": model.description})
    directions.save(tmp_path / "directions")
    root = write_data(tmp_path / "root")
    named = ["--helmet", str(STAND_IN), "--config", "configs/pair.yaml", "--data", str(root), "--quiet"]
    named += ["--model", str(checkpoint("llama")), "--dtype", "float32", "--device", "cpu", "--max-test-samples", "8"]
    named += ["--directions", str(tmp_path / "directions"), "--heads", "1,3", "--alpha", "-1,1"]
    # With ``stop_newline``, the stop tokens differ from the checkpoint's.
    return ["helmet", *named, "--helmet-arg", "stop_newline=True", "--out", str(tmp_path / "out")]


def files_of(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


@pytest.mark.slow
@pytest.mark.usefixtures("cluster")
def test_two_workers_write_the_files_of_one_process_also_on_from_where_it_was_killed(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "out"
    assert main(options) == 0
    said, expected = capsys.readouterr().out, files_of(out)
    assert len([name for name in expected if name.startswith("records")]) == 2
    out.rename(tmp_path / "one")
    assert main([*options, *POOL]) == 0
    assert capsys.readouterr().out == said
    assert files_of(out) == expected
    record = json.loads((out / "helmet.json").read_text())
    assert [setting["name"] for setting in record["settings"]] == ["baseline", "1_-1", "1_1", "3_-1", "3_1"]
    kept = min((out / "records").iterdir())
    kept.write_bytes(kept.read_bytes()[: len(kept.read_bytes()) // 2])
    max((out / "records").iterdir()).unlink()
    assert main([*options, *POOL]) == 0
    assert files_of(out) == expected
