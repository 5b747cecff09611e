"""The measurement of GPUs runs as a whole, on the CPU, so that it does where there is one."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from typing import TYPE_CHECKING, Any

import numpy as np
import onnxruntime
import pytest
from bench import gpu_models, models
from tests.compiling import needs_compiler
from tests.e2e.forno_server import ROOT, environment

if TYPE_CHECKING:
    from pathlib import Path


def bench(*arguments: str, model: str = "tiny") -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "bench.gpu", "--model", model, "--rows", "8", "--seconds", "0.05", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, timeout=50, check=False)


@needs_compiler
@pytest.mark.parametrize("model", ["tiny", "small-uint8", "small-minilm"])
def test_everything_is_measured(tmp_path: Path, model: str) -> None:
    done = bench("--device", "cpu", "--out", str(tmp_path), model=model)
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / f"gpu-cpu-{model}.json").read_text())
    assert all(speed > 0 for way in record["copies_gb_per_s"].values() for speed in way.values())
    assert len(record["kernels"]) == 7
    assert all(kernel["us"] > 0 for kernel in record["kernels"].values())
    assert record["bare_rows_per_s"] > 0
    assert sorted(record["forno"]) == ["1", "2", "3"]
    assert all(way["offline_rows_per_s"] > 0 and way["loads"] for way in record["forno"].values())
    assert record["overlap"] > 0
    if importlib.util.find_spec("mlperf_loadgen"):
        for way in record["forno"].values():
            assert sorted(way["loadgen"]) == ["Offline", "Server"]
            assert all(found["samples_per_s"] > 0 for found in way["loadgen"].values())
            assert way["loadgen"]["Server"]["p99_ns"] > 0


def test_the_models_of_the_record_have_the_shapes_of_the_real_ones(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(models, "CACHE", tmp_path)
    encoder = gpu_models._encoder("deep", layers=2, width=48, heads=4, tokens=16, vocabulary=50)
    session = onnxruntime.InferenceSession(str(encoder), providers=["CPUExecutionProvider"])
    rows = np.random.default_rng(0).integers(0, 50, (3, 16))
    (together,) = session.run(None, {"x": rows})
    assert together.shape == (3, 48)
    assert np.isfinite(together).all()
    for index in range(3):
        np.testing.assert_allclose(session.run(None, {"x": rows[index : index + 1]})[0][0], together[index], atol=1e-5)
    subject = gpu_models.SUBJECTS["resnet50-uint8"]
    assert (subject.rows(2).dtype, subject.rows(2).shape) == (np.uint8, (2, 224, 224, 3))
    assert (subject.own_rows(2).dtype, subject.own_rows(2).shape) == (np.float16, (2, 3, 224, 224))


def test_what_needs_a_gpu_says_so(tmp_path: Path) -> None:
    done = bench("--device", "cpu", "--out", str(tmp_path), model="resnet50-uint8-tensorrt")
    assert done.returncode == 1
    assert done.stderr == "'resnet50-uint8-tensorrt' runs on a GPU alone, and --device is cpu\n"


def test_without_a_gpu_it_says_so(tmp_path: Path) -> None:
    done = bench("--device", "cuda:9", "--out", str(tmp_path))
    assert done.returncode == 1
    assert "cuda" in done.stderr
    assert len(done.stderr.splitlines()) == 1
    assert not any(tmp_path.iterdir())
