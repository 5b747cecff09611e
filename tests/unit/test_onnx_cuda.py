"""The engine for GPUs, run on the CPU: its slots, bindings and memory are real, and only the provider is another."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import TensorProto as Type
from tests.unit import onnx_models
from tests.unit.test_engines import plain
from tests.unit.test_model import ask, made

from forno.kernels.devices.cpu import CpuDevice
from forno.server.config import CudaSettings, ModelSettings
from forno.server.engines import onnx_cuda, open_engine
from forno.server.engines.onnx import OnnxEngine
from forno.server.engines.onnx_cuda import OnnxCudaEngine
from forno.server.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


def opened(path: Path, device: CpuDevice | None = None, **settings: Any) -> OnnxCudaEngine:
    return OnnxCudaEngine(path, CudaSettings(**settings), device or CpuDevice(runtime_memory=True))


def answers(engine: Any, slot: Any, *requests: tuple[Any, ...]) -> list[Any]:
    rows = sum(len(request[0]) for request in requests)
    slot.load(list(requests), rows)
    outputs = [np.array(output) for output in engine.run(slot, rows)]
    slot.release()
    return outputs


def same(path: Path, *requests: tuple[Any, ...], runs: int = 3) -> None:
    """Both engines answer alike, run after run: the first proves the bindings, the others use them."""
    ours, plain = opened(path), OnnxEngine(path, ModelSettings().onnx)
    slot, plain_slot = ours.new_slot(16), plain.new_slot(16)
    for _ in range(runs):
        for got, want in zip(answers(ours, slot, *requests), answers(plain, plain_slot, *requests), strict=True):
            np.testing.assert_array_equal(got, want)
            assert got.dtype == want.dtype
    ours.close()
    plain.close()
    assert not any(ours._device.statistics().values())


def normal(*shape: int) -> Any:
    return np.random.default_rng(sum(shape)).standard_normal(shape).astype(np.float32)


def test_batches_are_answered_as_on_the_cpu(tmp_path: Path) -> None:
    path = onnx_models.mlp(tmp_path / "m.onnx")
    same(path, (normal(2, 8),), (normal(1, 8),), (normal(3, 8),))
    same(path, (normal(1, 8),))


def test_several_inputs_and_outputs(tmp_path: Path) -> None:
    path = onnx_models.two_in_two_out(tmp_path / "m.onnx")
    same(path, (normal(2, 4), normal(2, 1)), (normal(5, 4), normal(5, 1)))


def test_an_input_that_is_also_an_output(tmp_path: Path) -> None:
    path = onnx_models.passed_through(tmp_path / "m.onnx")
    engine = opened(path)
    inputs = tuple([normal(2, *[abs(size) for size in spec.shape[1:]]) for spec in engine.signature.inputs])
    engine.close()
    same(path, inputs)


def test_outputs_of_open_shape(tmp_path: Path) -> None:
    path = onnx_models.filtered(tmp_path / "m.onnx")
    same(path, (normal(5, 4),))
    same(path, (-np.ones((2, 4), np.float32),))  # none comes out


def test_outputs_of_another_shape_than_declared(tmp_path: Path) -> None:
    engine = opened(onnx_models.reshaped(tmp_path / "m.onnx"))
    slot = engine.new_slot(1)
    x = np.arange(4, dtype=np.float32)
    for shape in ((2, 2), (2, 2), (4, 1), (2, 2)):
        (y,) = answers(engine, slot, (x, np.array(shape)))
        np.testing.assert_array_equal(y, x.reshape(shape), strict=True)
    with pytest.raises(Exception, match="Reshape"):
        answers(engine, slot, (x, np.array([3, 3])))
    engine.close()


@pytest.mark.parametrize("type_", [Type.FLOAT16, Type.BFLOAT16, Type.INT8, Type.INT64, Type.BOOL, Type.DOUBLE])
def test_every_type_of_fixed_size(tmp_path: Path, type_: int) -> None:
    path = onnx_models.one(tmp_path / "m.onnx", "Identity", type_, ["n", 5])
    engine = opened(path)
    dtype = engine.signature.inputs[0].dtype
    engine.close()
    same(path, (np.arange(10).reshape(2, 5).astype(dtype),))


def test_strings_are_refused_by_name(tmp_path: Path) -> None:
    path = onnx_models.one(tmp_path / "m.onnx", "Identity", Type.STRING, ["n"])
    device = CpuDevice()
    with pytest.raises(ConfigError, match="its tensor 'x' holds strings; set device: cpu"):
        opened(path, device)
    assert not any(device.statistics().values())


@pytest.mark.parametrize("seed", range(3))
def test_instances_run_side_by_side(tmp_path: Path, seed: int) -> None:
    path = onnx_models.mlp(tmp_path / "m.onnx")
    plain = OnnxEngine(path, ModelSettings().onnx)
    engine = opened(path, CpuDevice(runtime_memory=True, choose=random.Random(seed).choice))
    answers(engine, engine.new_slot(4), (normal(1, 8),))  # the proof, as at warm-up

    def serve(number: int) -> None:
        slot, other = engine.new_slot(4), plain.new_slot(4)
        for batch in range(10):
            given = (np.random.default_rng(100 * number + batch).standard_normal((1 + batch % 4, 8)).astype("f4"),)
            np.testing.assert_array_equal(answers(engine, slot, given)[0], answers(plain, other, given)[0])

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(serve, range(3)))
    engine.close()


def test_a_hundred_lives_leave_no_memory_behind(tmp_path: Path) -> None:
    path = onnx_models.mlp(tmp_path / "m.onnx")
    device = CpuDevice(runtime_memory=True)
    for _ in range(100):
        engine = opened(path, device)
        slots = [engine.new_slot(16) for _ in range(3)]
        answers(engine, slots[0], (normal(4, 8),))
        engine.close()
    assert not any(device.statistics().values())
    assert device.memory_bytes() == (1 << 34, 1 << 34)


def test_a_model_that_does_not_fit_is_refused_first(tmp_path: Path) -> None:
    path = onnx_models.mlp(tmp_path / "m.onnx")
    with pytest.raises(ConfigError, match=r"has \d+ bytes, but of the 100 bytes of device 'cpu:0' only 100 are free"):
        opened(path, CpuDevice(capacity_bytes=100))


def test_a_file_that_is_no_model(tmp_path: Path) -> None:
    path = tmp_path / "m.onnx"
    path.write_bytes(b"no model")
    device = CpuDevice()
    with pytest.raises(ConfigError, match=r"m\.onnx cannot be opened on 'cpu'"):
        opened(path, device)
    assert not any(device.statistics().values())


def test_a_runtime_without_cuda_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import onnxruntime

    if "CUDAExecutionProvider" in onnxruntime.get_available_providers():
        pytest.skip("this ONNX Runtime has CUDA")
    device = CpuDevice()
    device.name = "cuda"
    with pytest.raises(ConfigError, match=r"this ONNX Runtime has no CUDA; install it with 'forno\[gpu\]'"):
        opened(onnx_models.mlp(tmp_path / "m.onnx"), device)
    assert not any(device.statistics().values())


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "pycuda"])
def test_a_gpu_that_is_not_there_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: str) -> None:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    with pytest.raises(ConfigError) as caught:
        open_engine(onnx_models.mlp(tmp_path / "m.onnx"), ModelSettings(device=device))
    assert device.partition(":")[0] in str(caught.value)
    assert "\n" not in str(caught.value)


def test_the_null_engine_has_no_device() -> None:
    with pytest.raises(ConfigError, match="runs on the cpu alone, and device is 'cuda'"):
        open_engine(None, ModelSettings(engine="null", device="cuda"))


@pytest.mark.parametrize("device", ["gpu", "cuda:", "cpu:0", "cuda:x", "CUDA"])
def test_devices_are_named_exactly(device: str) -> None:
    with pytest.raises(ValueError, match="cpu, cuda or pycuda"):
        ModelSettings(device=device)


@pytest.mark.parametrize("instances", [1, 3])
def test_a_model_lives_on_a_device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, instances: int) -> None:
    device = CpuDevice(runtime_memory=True, choose=random.Random(1).choice)
    monkeypatch.setattr(onnx_cuda, "open_device", lambda name, ordinal: device)
    path = onnx_models.mlp(tmp_path / "m.onnx")
    rows = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)

    async def live() -> None:
        model = made(path, device="cuda", instances=instances)
        await model.load()
        assert not model.statistics().inline  # the event loop never waits for a device
        got = await asyncio.gather(*[ask(model, x=row[None]) for row in rows])
        np.testing.assert_allclose(np.concatenate([y for (y,) in got]), plain(path, rows)[0], rtol=1e-5, atol=1e-5)
        await model.close(1)

    asyncio.run(live())
    assert not any(device.statistics().values())
