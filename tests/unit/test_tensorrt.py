"""The TensorRT engine over a fake TensorRT: slots, streams, memory, profiles and graphs are real, the plan is not."""

from __future__ import annotations

import asyncio
import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import TensorProto as Type
from tests.unit import onnx_models, plans
from tests.unit.devices import Losable
from tests.unit.test_engines import plain
from tests.unit.test_model import ask, made
from tests.unit.test_onnx_cuda import answers, normal

from forno.server.config import ModelSettings
from forno.server.engines import device_name, open_engine, tensorrt
from forno.server.engines.tensorrt import library
from forno.server.engines.tensorrt.engine import RunFailed, TensorrtEngine
from forno.server.errors import ConfigError, EngineLost, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

MLP = {"x": [[1, 8], [8, 8], [16, 8]]}


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Iterator[plans.StrictDevice]:
    for _, device in plans.fake(monkeypatch):
        yield device


def opened(plan: Path, device: Any, **settings: Any) -> TensorrtEngine:
    return TensorrtEngine(plan, ModelSettings(engine="tensorrt", device="cuda", **settings), library.find(), device)


def mlp(tmp_path: Path, *profiles: Any, **more: Any) -> tuple[Path, Path]:
    """A plan and the ONNX model that it was made of."""
    model = onnx_models.mlp(tmp_path / "m.onnx")
    return plans.write(tmp_path / "m.plan", model, *(profiles or (MLP,)), **more), model


@pytest.mark.parametrize("graphs", [False, True])
def test_batches_are_answered_as_by_the_model(tmp_path: Path, device: Any, graphs: bool) -> None:
    plan, model = mlp(tmp_path)
    engine = opened(plan, device, cuda={"graphs": graphs})
    assert [str(spec) for spec in (*engine.signature.inputs, *engine.signature.outputs)] == [
        "float32[?, 8]",
        "float32[?, 3]",
    ]
    assert engine.signature.batched
    slot = engine.new_slot(16)
    for rows in (1, 3, 3, 3, 16, 3, 16, 16):
        given = normal(rows, 8)
        (got,) = answers(engine, slot, (given,))
        np.testing.assert_allclose(got, plain(model, given)[0], rtol=1e-5, atol=1e-5)
    assert device.replays == (5 if graphs else 0)  # of 3 rows from the second run on, of 16 from the second on
    engine.close()
    del slot
    assert not any(device.statistics().values())


def test_several_inputs_and_outputs(tmp_path: Path, device: Any) -> None:
    model = onnx_models.two_in_two_out(tmp_path / "m.onnx")
    ranges = {"a": [[1, 4], [4, 4], [8, 4]], "b": [[1, 1], [4, 1], [8, 1]]}
    engine = opened(plans.write(tmp_path / "m.plan", model, ranges), device)
    given = (normal(5, 4), normal(5, 1))
    for _ in range(2):
        for got, want in zip(answers(engine, engine.new_slot(8), given), plain(model, *given), strict=True):
            np.testing.assert_array_equal(got, want)
    engine.close()


def test_the_nearest_profile_runs(tmp_path: Path, device: Any) -> None:
    small, large = {"x": [[1, 8], [1, 8], [4, 8]]}, {"x": [[1, 8], [16, 8], [16, 8]]}
    plan, model = mlp(tmp_path, small, large)
    engine = opened(plan, device)
    slot = engine.new_slot(16)
    for rows, profiles in ((1, {0}), (4, {0}), (5, {0, 1}), (16, {0, 1})):
        (got,) = answers(engine, slot, (normal(rows, 8),))
        np.testing.assert_allclose(got, plain(model, normal(rows, 8))[0], rtol=1e-5, atol=1e-5)
        assert {profile for profile, _ in engine._of_slots[slot]} == profiles
    engine.close()


def test_shapes_outside_of_all_profiles_are_named(tmp_path: Path, device: Any) -> None:
    plan, _ = mlp(tmp_path)
    engine = opened(plan, device)
    slot = engine.new_slot(32)
    with pytest.raises(InvalidArgument, match=r"not built for shape \[17, 8\], expected \[1, 8\] to \[16, 8\]"):
        answers(engine, slot, (normal(17, 8),))
    engine.close()


def test_outputs_whose_size_only_the_data_decide(tmp_path: Path, device: Any) -> None:
    model = onnx_models.filtered(tmp_path / "m.onnx")
    plan = plans.write(tmp_path / "m.plan", model, {"x": [[1, 4], [4, 4], [8, 4]]})
    engine = opened(plan, device, cuda={"graphs": True})
    slot = engine.new_slot(8)
    for given in (normal(5, 4), -np.ones((2, 4), np.float32), normal(8, 4)):
        for got, want in zip(answers(engine, slot, (given,)), plain(model, given), strict=True):
            np.testing.assert_array_equal(got, want, strict=True)
    engine.close()


def test_inputs_that_say_shapes_are_read_on_the_host(tmp_path: Path, device: Any) -> None:
    model = onnx_models.reshaped(tmp_path / "m.onnx")
    engine = opened(plans.write(tmp_path / "m.plan", model, {}), device, cuda={"graphs": True})
    slot = engine.new_slot(1)
    x = np.arange(4, dtype=np.float32)
    for shape in ((2, 2), (4, 1), (4, 1), (1, 4)):
        (y,) = answers(engine, slot, (x, np.array(shape)))
        np.testing.assert_array_equal(y, x.reshape(shape), strict=True)
    engine.close()


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("graphs", [False, True])
def test_instances_run_side_by_side(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, seed: int, graphs: bool) -> None:
    device = plans.StrictDevice(choose=random.Random(seed).choice)
    plans.installed(monkeypatch, device)
    plan, model = mlp(tmp_path)
    engine = opened(plan, device, cuda={"graphs": graphs})

    def serve(number: int) -> None:
        slot = engine.new_slot(4)
        for batch in range(10):
            given = np.random.default_rng(100 * number + batch).standard_normal((1 + batch % 3, 8)).astype("f4")
            (got,) = answers(engine, slot, (given,))
            np.testing.assert_allclose(got, plain(model, given)[0], rtol=1e-5, atol=1e-5)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(serve, range(3)))
    engine.close()
    plans.uninstalled()
    assert not any(device.statistics().values())


def test_contexts_of_slots_that_ended_are_used_again(tmp_path: Path, device: Any) -> None:
    plan, _ = mlp(tmp_path)
    engine = opened(plan, device)
    for _ in range(5):
        answers(engine, engine.new_slot(4), (normal(2, 8),))
    assert engine._engine.contexts == 1
    engine.close()


def test_a_run_that_cannot_be_recorded_runs_without_graphs(tmp_path: Path, device: Any, caplog: Any) -> None:
    plan, model = mlp(tmp_path, unrecordable=True)
    engine = opened(plan, device, cuda={"graphs": True})
    slot = engine.new_slot(4)
    for _ in range(4):
        (got,) = answers(engine, slot, (normal(2, 8),))
        np.testing.assert_allclose(got, plain(model, normal(2, 8))[0], rtol=1e-5, atol=1e-5)
    assert [record.message for record in caplog.records if "CUDA graphs" in record.message]
    assert device.replays == 0
    engine.close()


def test_a_refused_run_leaves_the_slot_usable(tmp_path: Path, device: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    plan, model = mlp(tmp_path)
    engine = opened(plan, device)
    slot = engine.new_slot(4)
    answers(engine, slot, (normal(2, 8),))
    context = engine._of_slots[slot][0, ()].handle
    with monkeypatch.context() as patch:
        patch.setattr(context, "execute_async_v3", lambda stream: context._failed("enqueueV3: out of luck"))
        with pytest.raises(RunFailed, match="out of luck"):
            answers(engine, slot, (normal(2, 8),))
    answers(engine, slot, (normal(3, 8),))
    with monkeypatch.context() as patch:  # after the shapes of 2 rows were told
        patch.setattr(context, "infer_shapes", lambda: ["x"])
        with pytest.raises(RunFailed, match="shapes do not follow from the inputs, for want of x"):
            answers(engine, slot, (normal(2, 8),))
    for given in (2 * normal(3, 8), normal(2, 8)):
        np.testing.assert_allclose(answers(engine, slot, (given,))[0], plain(model, given)[0], rtol=1e-5, atol=1e-5)
    engine.close()


def test_a_hundred_lives_leave_no_memory_behind(tmp_path: Path, device: Any) -> None:
    plan, _ = mlp(tmp_path)
    for _ in range(100):
        engine = opened(plan, device, cuda={"graphs": True})
        slots = [engine.new_slot(16) for _ in range(2)]
        for _ in range(3):
            answers(engine, slots[0], (normal(4, 8),))
        engine.close()
    assert not any(device.statistics().values())
    assert device.memory_bytes() == (1 << 34, 1 << 34)


@pytest.mark.parametrize(
    ("more", "settings", "complaint"),
    [
        (
            {"release": "12.0.1.2"},
            {},
            r"built with TensorRT 12\.0\.1\.2, and 11\.4\.0\.106 is installed, which is older",
        ),
        ({"release": "10.13.3.9"}, {}, r"with TensorRT 10\.13\.3\.9.*set tensorrt\.version_compatible: true"),
        (
            {"release": "10.13.3.9"},
            {"tensorrt": {"version_compatible": True}},
            r"TensorRT cannot load .*Version tag does not match",
        ),
        ({"sm": "8.9"}, {}, r"for a GPU of compute capability 8\.9, and this one has 9\.0: build the plan on such"),
        ({"vectorized": ["x"]}, {}, "its tensor 'x' is of 'Four wide channel .* expected row-major order"),
        ({"channel_major": ["y"]}, {}, "its tensor 'y' is of 'Channel major FP16 format', expected row-major order"),
        ({"fp8": ["x"]}, {}, "its tensor 'x' is of TensorRT's type FP8, expected one of FLOAT, HALF"),
        ({"scratch_bytes": 1 << 40}, {}, r"1099511627776 bytes asked for"),
        ({}, {"cuda": {"memory_limit_bytes": 4095}}, r"in 4096 bytes, but cuda\.memory_limit_bytes allows 4095"),
    ],
)
def test_plans_that_cannot_run_are_one_line(
    tmp_path: Path, device: Any, more: Any, settings: Any, complaint: str
) -> None:
    plan, _ = mlp(tmp_path, **more)
    with pytest.raises(ConfigError, match=complaint) as caught:
        opened(plan, device, **settings)
    assert str(plan) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_version_compatible_plans_of_older_releases_run_where_they_are_trusted(tmp_path: Path, device: Any) -> None:
    plan, _ = mlp(tmp_path, release="10.13.3.9", version_compatible=True)
    opened(plan, device, tensorrt={"version_compatible": True}).close()
    with pytest.raises(ConfigError, match="if it was built version compatible and you trust the code"):
        opened(plan, device)


@pytest.mark.parametrize("content", [b"", b"ftrt", b"\x08\x0aonnx" * 20, b"ftrt" + bytes(40)])
def test_files_that_are_no_plans(tmp_path: Path, device: Any, content: bytes) -> None:
    path = tmp_path / "m.plan"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=r"is not a TensorRT plan|cannot load|was built with TensorRT 0\.0\.0\.0"):
        opened(path, device)


def test_a_plan_that_does_not_fit_is_refused_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = plans.StrictDevice(capacity_bytes=100)
    plans.installed(monkeypatch, device)
    plan, _ = mlp(tmp_path)
    with pytest.raises(ConfigError, match=r"has \d+ bytes, but of the 100 bytes of device 'cuda:0' only 100 are free"):
        opened(plan, device)
    plans.uninstalled()


@pytest.mark.parametrize("settings", [{}, {"device": "cuda:3"}, {"device": "pycuda"}])
def test_without_a_gpu_it_is_one_line_and_tensorrt_is_not_touched(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, str]
) -> None:
    plans.installed(monkeypatch)  # without a device, it does not survive a call
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    plan, model = mlp(tmp_path)
    for path in (plan, model):
        with pytest.raises(ConfigError, match=settings.get("device", "cuda").partition(":")[0]) as caught:
            open_engine(path, ModelSettings(engine="tensorrt", **settings))
        assert "\n" not in str(caught.value)
    plans.uninstalled()


def test_the_cpu_is_refused_in_words(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="runs on a GPU alone, and device is 'cpu'; remove it, or set device: cuda"):
        open_engine(tmp_path / "m.plan", ModelSettings(device="cpu"))
    assert device_name(tmp_path / "m.plan", ModelSettings()) == "cuda"
    assert device_name(tmp_path / "m.onnx", ModelSettings()) == "cpu"
    assert device_name(tmp_path / "m.onnx", ModelSettings(engine="tensorrt", device="cuda:1")) == "cuda:1"


def test_without_tensorrt_it_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device = plans.StrictDevice()
    monkeypatch.setattr(tensorrt, "open_device", lambda name, ordinal: device)
    monkeypatch.setattr(library, "_NAMES", ("tensorrt_of_nobody",))
    with pytest.raises(ConfigError, match=r"needs TensorRT; install it: pip install 'forno\[gpu,tensorrt\]'"):
        open_engine(tmp_path / "m.plan", ModelSettings())


@pytest.mark.parametrize("version", ["9.3.0.1", "10.12.0.36", "12.0.0.1"])
def test_releases_that_are_not_known(monkeypatch: pytest.MonkeyPatch, version: str) -> None:
    plans.installed(monkeypatch, version=version)
    with pytest.raises(ConfigError, match=rf"TensorRT {version} is installed, expected at least 10\.13 and less"):
        library.find()
    plans.uninstalled()


def live(monkeypatch: pytest.MonkeyPatch, device: Any, plan: Path, check: Any, **settings: Any) -> None:
    """A whole model, from its plan to its end."""
    monkeypatch.setattr(tensorrt, "open_device", lambda name, ordinal: device)

    async def whole() -> None:
        model = made(plan, **settings)
        await model.load()
        assert not model.statistics().inline  # the event loop never waits for a device
        await check(model)
        await model.close(1)

    asyncio.run(whole())


@pytest.mark.parametrize("instances", [1, 3])
def test_a_model_lives(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Any, instances: int) -> None:
    plan, onnx = mlp(tmp_path)
    rows = np.random.default_rng(0).standard_normal((200, 8)).astype(np.float32)

    async def check(model: Any) -> None:
        assert model.max_rows == 16  # the profile's, below the 32 of the settings
        got = await asyncio.gather(*[ask(model, x=row[None]) for row in rows])
        np.testing.assert_allclose(np.concatenate([y for (y,) in got]), plain(onnx, rows)[0], rtol=1e-5, atol=1e-5)

    live(monkeypatch, device, plan, check, instances=instances)


def test_batches_have_the_rows_of_the_profiles(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Any) -> None:
    plan, onnx = mlp(tmp_path, *({"x": [[rows, 8]] * 3} for rows in (4, 8)))
    rows = np.random.default_rng(0).standard_normal((37, 8)).astype(np.float32)

    async def check(model: Any) -> None:
        assert (model.max_rows, model.signature.padding.allowed_rows) == (8, (4, 8))
        got = await asyncio.gather(*[ask(model, x=row[None]) for row in rows])
        np.testing.assert_allclose(np.concatenate([y for (y,) in got]), plain(onnx, rows)[0], rtol=1e-5, atol=1e-5)

    live(monkeypatch, device, plan, check)


def test_a_request_that_no_profile_holds_fails_alone(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Any
) -> None:
    model = onnx_models.one(tmp_path / "m.onnx", "Relu", Type.FLOAT, ["n", "length"])
    plan = plans.write(tmp_path / "m.plan", model, {"x": [[1, 400], [4, 500], [8, 600]]})

    async def check(model: Any) -> None:
        assert model.signature.batched  # its first runs found sizes that it was built for
        good = [ask(model, x=normal(1, size)) for size in (400, 500, 600)]
        with pytest.raises(
            InvalidArgument, match=r"input 'x': the engine was not built for shape \[700\], expected \[400\] to \[600\]"
        ):
            ask(model, x=normal(1, 700))
        assert [got.shape for (got,) in await asyncio.gather(*good)] == [(1, 400), (1, 500), (1, 600)]

    live(monkeypatch, device, plan, check)


def test_rows_that_neither_settings_nor_plan_allow(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, device: Any
) -> None:
    plan, _ = mlp(tmp_path, {"x": [[8, 8], [8, 8], [16, 8]]})
    with pytest.raises(ConfigError, match=r"batching\.max_rows is 4, but the plan runs 8 rows or more"):
        live(monkeypatch, device, plan, None, batching={"max_rows": 4})
    with pytest.raises(ConfigError, match=r"padding\.allowed_rows is \[2, 4\], but the plan runs 8 to 16 rows"):
        live(monkeypatch, device, plan, None, padding={"allowed_rows": [2, 4]})


def test_a_device_that_is_lost_takes_the_engine_with_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    class Device(Losable, plans.StrictDevice):
        pass

    device = Device()
    plans.installed(monkeypatch, device)
    plan, _ = mlp(tmp_path)
    engine = opened(plan, device, cuda={"graphs": True})
    slot = engine.new_slot(4)
    for _ in range(3):
        answers(engine, slot, (normal(2, 8),))
    device.is_lost = True
    for _ in range(2):
        with pytest.raises(EngineLost, match=r"device 'cuda:0' is lost to this process: finish failed: an illegal"):
            answers(engine, slot, (normal(2, 8),))
    engine.close()  # gives back what can be, and raises nothing
    plans.uninstalled()
