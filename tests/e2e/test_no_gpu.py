"""A GPU that is asked for and not there ends the start in one line."""

from __future__ import annotations

import subprocess
import sys
from typing import TYPE_CHECKING

import pytest
from tests.e2e.forno_server import ROOT, environment, forno
from tests.unit import onnx_models

if TYPE_CHECKING:
    from pathlib import Path


@pytest.mark.parametrize("device", ["cuda", "cuda:7", "pycuda"])
def test_a_device_that_is_not_there_ends_the_start(tmp_path: Path, device: str) -> None:
    onnx_models.mlp(tmp_path / "m.onnx")
    settings = tmp_path / "forno.yaml"
    settings.write_text(f"models: {{m: {{path: m.onnx, device: '{device}'}}}}\n")
    done = forno("serve", settings, "--transport", "grpc", "--address", "127.0.0.1:0", CUDA_VISIBLE_DEVICES="")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.splitlines()
    assert line.startswith("forno: ")
    assert device.partition(":")[0] in line


def test_the_check_of_a_gpu_ends_in_one_line_without_one() -> None:
    done = subprocess.run(
        ["bash", str(ROOT / "tools" / "gpu_check.sh")],
        env={**environment(), "CUDA_VISIBLE_DEVICES": "", "PYTHON_BIN": sys.executable},
        capture_output=True,
        text=True,
        timeout=30,
        check=False,
    )
    assert done.returncode == 3, done.stdout
    (line,) = done.stderr.splitlines()
    assert line.startswith("gpu-check: ")
    assert done.stdout == ""
