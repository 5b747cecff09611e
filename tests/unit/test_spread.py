"""One model on several devices."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from tests.compiling import needs_compiler
from tests.unit import onnx_models
from tests.unit.devices import Counting
from tests.unit.test_engines import plain
from tests.unit.test_model import ask, made
from tests.unit.test_processing import IMAGENET, images, wanted

from forno.kernels.devices import DeviceUnavailable
from forno.server.config import ModelSettings
from forno.server.engines import onnx_cuda
from forno.server.errors import ConfigError

if TYPE_CHECKING:
    from pathlib import Path


@pytest.fixture
def devices(monkeypatch: pytest.MonkeyPatch) -> Any:
    there = [Counting(ordinal=number, runtime_memory=True) for number in range(3)]

    def opened(name: str, ordinal: int) -> Counting:
        if ordinal >= len(there):
            raise DeviceUnavailable(f"there is no device '{name}:{ordinal}'")
        return there[ordinal]

    monkeypatch.setattr(onnx_cuda, "open_device", opened)
    yield there
    assert not any(value for device in there for value in device.statistics().values())


def test_each_device_takes_its_share(tmp_path: Path, devices: Any) -> None:
    path = onnx_models.mlp(tmp_path / "m.onnx")
    rows = np.random.default_rng(0).standard_normal((300, 8)).astype(np.float32)

    async def live() -> None:
        model = made(path, device="cuda", devices=[0, 2], instances=2, batching={"max_rows": 4})
        await model.load()
        assert [gpu.name for gpu in model.gpus] == ["cpu:0", "cpu:2"]
        for device in devices:
            device.copies.clear()
        got = await asyncio.gather(*[ask(model, x=row[None]) for row in rows])
        np.testing.assert_allclose(np.concatenate([y for (y,) in got]), plain(path, rows)[0], rtol=1e-5, atol=1e-5)
        await model.close(1)

    asyncio.run(live())
    batches = [sum(way == "in" for way, _ in device.copies) for device in devices]
    assert batches[1] == 0
    assert min(batches[0], batches[2]) >= 75 // 5
    assert batches[0] + batches[2] >= 75


@needs_compiler
def test_images_are_processed_where_they_are(tmp_path: Path, devices: Any) -> None:
    path = onnx_models.seeing(tmp_path / "m.onnx")
    pictures = images(1, *[(3 + number, 40 - number) for number in range(20)])
    _, classes = wanted(path, pictures, (6, 5), 3)

    async def live() -> None:
        model = made(
            path, device="cuda", devices=[0, 1], preprocess=IMAGENET, postprocess={"top_k": 3}, batching={"max_rows": 2}
        )
        await model.load()
        assert [device.statistics()["modules"] for device in devices] == [1, 1, 0]
        got = await asyncio.gather(*[ask(model, image=picture) for picture in pictures])
        np.testing.assert_array_equal(np.concatenate([best for _, best in got]), classes)
        await model.close(1)

    asyncio.run(live())


def test_one_that_is_not_there_fails_the_start_and_leaves_nothing(tmp_path: Path, devices: Any) -> None:
    model = made(onnx_models.mlp(tmp_path / "m.onnx"), device="cuda", devices=[0, 1, 7])
    with pytest.raises(ConfigError, match="there is no device 'cuda:7'"):
        asyncio.run(model.load())


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"devices": [0, 1]}, "`devices` numbers GPUs, but `device` is"),
        ({"devices": [0], "device": "cuda:1"}, "`device` is cuda:1: set it to cuda or pycuda"),
        ({"devices": [1, 1], "device": "cuda"}, "each number once"),
        ({"devices": [-1], "device": "cuda"}, "greater than or equal to 0"),
    ],
)
def test_devices_are_numbers_of_gpus(settings: Any, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        ModelSettings(**settings)
