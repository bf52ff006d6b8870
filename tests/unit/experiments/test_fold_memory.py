"""Folding needs memory for a part of a shard, not for a whole shard."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import ROOT

SCRIPT = ROOT / "experiments" / "fold_memory.py"


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="peak memory is read from /proc")
def test_a_checkpoint_is_never_in_memory(tmp_path):
    command = [sys.executable, SCRIPT, "--gigabytes", "1", "--work", tmp_path / "work"]
    said = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    ((peak, before),) = re.findall(r"at most ([\d.]+) GiB, of it ([\d.]+) before", said)
    assert "0.96 GB in 1 shards" in said
    assert float(peak) - float(before) < 0.1
    assert not list((tmp_path / "work").iterdir())
