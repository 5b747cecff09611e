"""Metrics of GPUs: the real nvidia-ml-py, on a library of our own, and on none."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.compiling import NATIVE, shared_library

from forno.kernels.nvml import Reading
from forno.server.config import Config, ModelSettings
from forno.server.model import Gpu
from forno.server.repository import ModelSpec
from forno.server.server import Server

ROOT = Path(__file__).parents[2]
PROGRAM = """
import json, logging, sys
logging.basicConfig(level=logging.DEBUG, stream=sys.stderr, format="%(levelname)s %(message)s")
from forno.kernels.nvml import Nvml
nvml = Nvml()
readings = [nvml.read(bus_id) for bus_id in sys.argv[1:] * 2]
nvml.close()
nvml.close()
print(json.dumps(readings))
"""


def readings(*bus_ids: str, library: Path | None = None, fault: str = "") -> tuple[list[Any], list[str]]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "FAKE_NVML": fault}
    if library is not None:
        environment["LD_LIBRARY_PATH"] = str(library)
    done = subprocess.run(
        [sys.executable, "-c", PROGRAM, *bus_ids], capture_output=True, text=True, check=True, env=environment
    )
    return json.loads(done.stdout), done.stderr.splitlines()


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("pynvml", reason="nvidia-ml-py is not installed")
    folder = tmp_path_factory.mktemp("nvml")
    shared_library(folder / "libnvidia-ml.so.1", NATIVE / "fake_nvml.cc")
    return folder


def test_memory_and_load_are_told(library: Path) -> None:
    found, said = readings("0000:65:00.0", library=library)
    assert found == [[1_000_000_000, 150_000_000_000, 0.37]] * 2
    assert said == []


def test_a_part_of_a_gpu_has_memory_and_no_load(library: Path) -> None:
    found, said = readings("0000:65:00.0", library=library, fault="utilization")
    assert [reading[:2] for reading in found] == [[1_000_000_000, 150_000_000_000]] * 2
    assert all(reading[2] != reading[2] for reading in found)  # NaN
    assert said == []


@pytest.mark.parametrize(
    ("fault", "bus_id"), [("driver", "0000:65:00.0"), ("memory", "0000:65:00.0"), ("", "0000:01:00.0")]
)
def test_what_it_does_not_tell_is_said_once(library: Path, fault: str, bus_id: str) -> None:
    found, said = readings(bus_id, library=library, fault=fault)
    assert found == [None, None]
    assert len(said) == 1
    assert said[0].startswith("DEBUG no metrics of GPUs: NVMLError")


def test_without_a_driver_there_is_one_quiet_line(tmp_path: Path) -> None:
    found, said = readings("0000:65:00.0", library=tmp_path)
    if found == [None, None]:
        assert len(said) == 1
        assert said[0].startswith("DEBUG no metrics of GPUs: ")
    else:
        assert said == []  # this machine has one at that place


def test_no_gpu_is_not_asked_for() -> None:
    assert readings("") == ([None, None], [])


def test_the_metrics_name_each_gpu_once(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = ModelSettings(engine="null")
    specs = [ModelSpec(name, "1", None, settings) for name in ("a", "b", "c", "d")]
    server = Server(Config(), specs, "127.0.0.1:0", rest=False, show=None)
    models = server.registry.models()
    gpus = [(Gpu("cuda:0", "x"),), (Gpu("cuda:0", "x"), Gpu("cuda:1", "y")), (Gpu("cpu:0", ""),), ()]
    for model, gpu in zip(models, gpus, strict=True):
        model.gpus = gpu
    told = {"x": Reading(1, 2, 0.5), "y": None}
    monkeypatch.setattr(server._nvml, "read", told.__getitem__)
    gauges = [gauge for gauge in server._gauges() if "gpu" in gauge[0]]
    assert gauges == [
        ("forno_gpu_memory_used_bytes", {"gpu": "cuda:0"}, 1),
        ("forno_gpu_memory_total_bytes", {"gpu": "cuda:0"}, 2),
        ("forno_gpu_busy_ratio", {"gpu": "cuda:0"}, 0.5),
    ]
