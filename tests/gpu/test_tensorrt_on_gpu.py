"""TensorRT on a real GPU: plans are built from small models, run, and give what the CPU gives."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import TensorProto as Type
from onnx import helper
from tests.gpu.pictures import check_pictures
from tests.unit import onnx_models
from tests.unit.test_engines import plain
from tests.unit.test_onnx_cuda import answers, normal
from tests.unit.test_onnx_float16 import normalized, resized
from tests.unit.test_tensorrt_refit import seen

from forno.kernels.devices import DeviceUnavailable, attached, open_device
from forno.server.config import ModelSettings
from forno.server.engines import open_engine
from forno.server.engines.tensorrt import library
from forno.server.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path

pytestmark = [pytest.mark.gpu, pytest.mark.timeout(600)]


@pytest.fixture(scope="module", params=["cuda", "pycuda"])
def device(request: pytest.FixtureRequest) -> str:
    try:
        made = open_device(request.param)
        if not library.find().builds:
            pytest.skip("only a runtime of TensorRT is installed")
    except (DeviceUnavailable, ConfigError) as error:
        pytest.skip(str(error))
    made.close()
    return str(request.param)


def opened(device: str, path: Path, graphs: bool = False, **tensorrt: Any) -> Any:
    settings = {"cache_dir": path.parent / "cache", "optimization_level": 0, **tensorrt}
    return open_engine(
        path,
        ModelSettings(
            engine="tensorrt",
            device=device,
            tensorrt=settings,
            batching={"max_rows": 8},
            cuda={"tf32": False, "graphs": graphs},
        ),
    )


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (onnx_models.mlp, (normal(5, 8),)),
        (onnx_models.two_in_two_out, (normal(3, 4), normal(3, 1))),
        (onnx_models.filtered, (normal(6, 4),)),
    ],
)
def test_answers_are_the_cpus(tmp_path: Path, device: str, make: Any, inputs: tuple[Any, ...], graphs: bool) -> None:
    path = make(tmp_path / "m.onnx")
    engine = opened(device, path, graphs)
    slot = engine.new_slot(8)
    for _ in range(3):
        for got, want in zip(answers(engine, slot, inputs), plain(path, *inputs), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-4)
    engine.close()


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize("half", [False, True])
def test_pictures_in_and_best_classes_out(tmp_path: Path, device: str, graphs: bool, half: bool) -> None:
    check_pictures(tmp_path, lambda path: opened(device, path, graphs), half=half)


def test_the_nearest_of_two_profiles_and_version_compatible_plans(tmp_path: Path, device: str) -> None:
    path = onnx_models.mlp(tmp_path / "m.onnx")
    profiles = [
        {"x": {"min": [1, 8], "opt": [1, 8], "max": [2, 8]}},
        {"x": {"min": [1, 8], "opt": [8, 8], "max": [8, 8]}},
    ]
    engine = opened(device, path, profiles=profiles, version_compatible=True)
    slot = engine.new_slot(8)
    for rows in (1, 8, 2, 5):
        (got,) = answers(engine, slot, (normal(rows, 8),))
        np.testing.assert_allclose(got, plain(path, normal(rows, 8))[0], rtol=1e-4, atol=1e-4)
    engine.close()


def biased(path: Path, seed: int) -> Path:
    """x @ w + b, where b is zero for seed 0: what a build could leave out."""
    random = np.random.default_rng(seed)
    b = random.standard_normal(16) * (seed > 0)
    weights = {"w": random.standard_normal((8, 16)).astype(np.float32), "b": b.astype(np.float32)}
    gemm = [helper.make_node("Gemm", ["x", "w", "b"], ["y"])]
    inputs, outputs = [("x", Type.FLOAT, ["rows", 8])], [("y", Type.FLOAT, ["rows", 16])]
    return onnx_models.save(path, inputs, outputs, gemm, weights)


@pytest.mark.parametrize("version_compatible", [False, True])
@pytest.mark.parametrize("precision", ["model", "fp16"])
@pytest.mark.parametrize(("make", "shape", "weights"), [(seen, (3, 3, 4, 4), 7), (biased, (3, 8), 2)])
def test_the_next_version_takes_the_plan_with_its_own_weights(
    tmp_path: Path,
    device: str,
    caplog: Any,
    make: Any,
    shape: Any,
    weights: int,
    precision: str,
    version_compatible: bool,
) -> None:
    try:
        library.find().check_refit()
    except ConfigError as error:
        pytest.skip(str(error))
    x = normal(*shape)
    for seed in range(3):
        path = make(tmp_path / f"{seed}.onnx", seed=seed)
        with caplog.at_level("INFO", "forno.engine.tensorrt"):
            engine = opened(device, path, refit=True, precision=precision, version_compatible=version_compatible)
        (got,), (want,) = answers(engine, engine.new_slot(8), (x,)), plain(path, x)
        relative = 0.01 if precision == "fp16" else 0.0001
        np.testing.assert_allclose(got, want, rtol=0, atol=relative * np.abs(want).max())
        engine.close()
    assert caplog.text.count(f"given {weights} weights") == 2, caplog.text


@pytest.mark.parametrize("make", [normalized, resized])
def test_float16_answers_are_near_the_cpus(tmp_path: Path, device: str, make: Any) -> None:
    if not library.find().converts("fp16"):
        pytest.skip("this release chooses types itself")
    path = make(tmp_path / "m.onnx")
    engine = opened(device, path, precision="fp16")
    shape = engine.signature.inputs[0].shape[1:]
    for scale in (1, 3000):
        x = scale * normal(3, *shape)
        (got,), (want,) = answers(engine, engine.new_slot(8), (x,)), plain(path, x)
        np.testing.assert_allclose(got, want, rtol=0, atol=0.01 * np.abs(want).max())
    engine.close()


def test_a_hundred_lives_leave_no_memory_behind(tmp_path: Path, device: str) -> None:
    path = onnx_models.mlp(tmp_path / "m.onnx")
    watcher = open_device(device)
    free_bytes = []
    for _ in range(101):
        engine = opened(device, path, graphs=True)
        slot = engine.new_slot(8)
        for _ in range(3):
            answers(engine, slot, (normal(8, 8),))
        engine.close()
        with attached(watcher):
            free_bytes.append(watcher.memory_bytes()[0])
    watcher.close()
    assert free_bytes[-1] >= free_bytes[0] - (64 << 20)  # what the driver keeps for itself once a library was used
