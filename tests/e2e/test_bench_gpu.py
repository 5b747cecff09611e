"""The measurement of GPUs runs as a whole, on the CPU, so that it does where there is one."""

from __future__ import annotations

import json
import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests.e2e.forno_server import ROOT, environment

from forno.kernels import build

if TYPE_CHECKING:
    from pathlib import Path


def bench(*arguments: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu", "--model", "tiny", "--rows", "8", "--seconds", "0.05", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=50, check=False)


@pytest.mark.skipif(not build.compiler(), reason="the kernels need a C++ compiler on the CPU")
def test_everything_is_measured(tmp_path: Path) -> None:
    done = bench("--device", "cpu", "--out", str(tmp_path))
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "gpu-cpu-tiny.json").read_text())
    assert all(speed > 0 for way in record["copies_gb_per_s"].values() for speed in way.values())
    assert len(record["kernels"]) == 7
    assert all(kernel["us"] > 0 for kernel in record["kernels"].values())
    assert record["bare_rows_per_s"] > 0
    assert sorted(record["forno"]) == ["1", "2", "3"]
    assert all(way["offline_rows_per_s"] > 0 and way["loads"] for way in record["forno"].values())


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = bench("--device", "cuda:9", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "cuda" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not any(tmp_path.iterdir())
