"""ONNX models on a real GPU: the CUDA provider gives what the CPU's does, from our memory and in our stream."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.gpu.pictures import check_pictures
from tests.unit import onnx_models
from tests.unit.test_engines import plain
from tests.unit.test_onnx_cuda import answers, normal
from tests.unit.test_onnx_float16 import normalized, resized

from forno.kernels.devices import DeviceUnavailable, attached, open_device
from forno.server.config import ModelSettings
from forno.server.engines import open_engine

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from forno.kernels.devices import Device

pytestmark = pytest.mark.gpu

_SLACK_BYTES = 64 << 20  # what the driver keeps for itself once a library was used


@pytest.fixture(scope="module", params=["cuda", "pycuda"])
def device(request: pytest.FixtureRequest) -> Iterator[Device]:
    runtime = pytest.importorskip("onnxruntime", reason="ONNX Runtime is not installed")
    if "CUDAExecutionProvider" not in runtime.get_available_providers():
        pytest.skip("this ONNX Runtime has no CUDA")
    try:
        made = open_device(request.param)
    except DeviceUnavailable as error:
        pytest.skip(str(error))
    yield made
    made.close()


def engine_on(device: Device, path: Path) -> Any:
    return open_engine(path, ModelSettings(device=device.name, cuda={"tf32": False}))


@pytest.mark.parametrize(
    ("make", "inputs"),
    [
        (onnx_models.mlp, (normal(5, 8),)),
        (onnx_models.two_in_two_out, (normal(3, 4), normal(3, 1))),
        (onnx_models.passed_through, (normal(3, 4),)),
        (onnx_models.filtered, (normal(6, 4),)),
    ],
)
def test_answers_are_the_cpus(tmp_path: Path, device: Device, make: Any, inputs: tuple[Any, ...]) -> None:
    path = make(tmp_path / "m.onnx")
    engine = engine_on(device, path)
    slot = engine.new_slot(8)
    for _ in range(3):  # the first proves bindings, the others use them
        for got, want in zip(answers(engine, slot, inputs), plain(path, *inputs), strict=True):
            np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
    engine.close()


@pytest.mark.parametrize("graphs", [False, True])
@pytest.mark.parametrize(
    ("make", "scale"), [(onnx_models.mlp, 1), (onnx_models.seeing, 1), (normalized, 3000), (resized, 3000)]
)
def test_float16_answers_are_near_the_cpus(tmp_path: Path, device: Device, make: Any, scale: int, graphs: bool) -> None:
    path = make(tmp_path / "m.onnx")
    settings = {"precision": "fp16", "tf32": False, "graphs": graphs}
    engine = open_engine(path, ModelSettings(device=device.name, cuda=settings, padding={"allowed_rows": [3]}))
    slot = engine.new_slot(3)
    x = scale * normal(3, *engine.signature.inputs[0].shape[1:])
    (want,) = plain(path, x)
    with ThreadPoolExecutor(
        1
    ) as pool:  # the first run proves bindings; graphs are of threads that are not the opener's
        for got in pool.map(lambda _: answers(engine, slot, (x,))[0], range(3)):
            assert got.dtype == np.float32
            np.testing.assert_allclose(got, want, rtol=0, atol=0.01 * np.abs(want).max())
    engine.close()


@pytest.mark.parametrize("half", [False, True])
def test_pictures_in_and_best_classes_out(tmp_path: Path, device: Device, half: bool) -> None:
    check_pictures(tmp_path, lambda path: engine_on(device, path), half=half)


def test_instances_run_side_by_side(tmp_path: Path, device: Device) -> None:
    path = onnx_models.mlp(tmp_path / "m.onnx")
    engine = engine_on(device, path)
    answers(engine, engine.new_slot(4), (normal(1, 8),))

    def serve(number: int) -> None:
        slot = engine.new_slot(4)
        for batch in range(100):
            given = np.random.default_rng(1000 * number + batch).standard_normal((1 + batch % 4, 8)).astype(np.float32)
            np.testing.assert_allclose(answers(engine, slot, (given,))[0], plain(path, given)[0], rtol=1e-5, atol=1e-5)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(serve, range(3)))
    engine.close()


def test_a_hundred_lives_leave_no_memory_behind(tmp_path: Path, device: Device) -> None:
    path = onnx_models.mlp(tmp_path / "m.onnx")
    free_bytes = []
    for _ in range(101):
        engine = engine_on(device, path)
        answers(engine, engine.new_slot(16), (normal(16, 8),))
        engine.close()
        with attached(device):
            free_bytes.append(device.memory_bytes()[0])
    assert free_bytes[-1] >= free_bytes[0] - _SLACK_BYTES
