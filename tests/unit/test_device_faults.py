"""What a device that fails in the middle of work does to callers, to other batches and to memory."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from onnx import TensorProto as Type
from onnx import helper
from tests.unit import onnx_models
from tests.unit.devices import Losable
from tests.unit.test_engines import plain
from tests.unit.test_model import ask, made
from tests.unit.test_onnx_cuda import answers, normal, opened
from tests.unit.test_slots_cuda import PAIR, doubled, pair

from forno.kernels.devices import DeviceError
from forno.kernels.devices.cpu import CpuDevice
from forno.server.engines import onnx_cuda
from forno.server.engines.onnx_files import bytes_of
from forno.server.errors import ConfigError, EngineFailed, EngineLost, NotReady
from forno.server.model import ModelState
from forno.server.slots.cuda import Gate, Ring

if TYPE_CHECKING:
    from pathlib import Path


class Faulty(Losable):
    """Fails in one copy out, too, when it is told to."""

    fails_once = False

    def copy_out(self, *to_do: int) -> None:
        if self.fails_once:
            self.fails_once = False
            raise DeviceError("copy_out failed: a passing fault")
        super().copy_out(*to_do)


@pytest.fixture
def device(monkeypatch: pytest.MonkeyPatch) -> Faulty:
    made = Faulty(runtime_memory=True)
    monkeypatch.setattr(onnx_cuda, "open_device", lambda name, ordinal: made)
    return made


def test_a_passing_fault_fails_its_batch_alone(tmp_path: Path, device: Faulty) -> None:
    path = onnx_models.mlp(tmp_path / "m.onnx")

    async def live() -> None:
        model = made(path, device="cuda")
        await model.load()
        row = normal(1, 8)
        device.fails_once = True
        with pytest.raises(EngineFailed, match="log has more under"):
            await ask(model, x=row)
        (y,) = await ask(model, x=row)
        np.testing.assert_allclose(y, plain(path, row)[0], rtol=1e-5, atol=1e-5)
        assert model.state is ModelState.READY
        await model.close(1)

    asyncio.run(live())
    assert not any(device.statistics().values())


def test_a_device_that_is_lost_ends_the_model_and_not_the_server(
    tmp_path: Path, device: Faulty, caplog: pytest.LogCaptureFixture
) -> None:
    path = onnx_models.mlp(tmp_path / "m.onnx")
    told: list[str] = []

    async def live() -> None:
        model = made(path, device="cuda", batching={"max_rows": 1, "max_delay_us": 0})
        await model.load()
        model.on_failed = lambda: told.append(model.error)
        device.is_lost = True
        asked = [ask(model, x=normal(1, 8)) for _ in range(6)]
        ends = await asyncio.gather(*asked, return_exceptions=True)
        assert isinstance(ends[0], EngineFailed)  # it was in the run
        assert all(isinstance(end, EngineFailed | NotReady) for end in ends), ends
        assert isinstance(ends[-1], NotReady)  # it waited, and may try elsewhere
        with pytest.raises(NotReady, match=r"is failed, not ready to serve .*device 'cpu:0' is lost to this process"):
            ask(model, x=normal(1, 8))
        await model.close(1)

    asyncio.run(live())
    assert len(told) == 1
    assert "start the server anew" in caplog.text
    assert device.statistics()["pinned"] == 0  # what the host has is given back all the same
    assert device.statistics()["events"] == 0


def test_a_device_that_is_lost_at_the_first_run_fails_the_start(tmp_path: Path, device: Faulty) -> None:
    path = onnx_models.mlp(tmp_path / "m.onnx")
    device.is_lost = True
    model = made(path, device="cuda")
    with pytest.raises(ConfigError, match=r"cannot be loaded: EngineLost: device 'cpu:0' is lost"):
        asyncio.run(model.load())
    assert model.state is ModelState.FAILED


def test_slots_that_do_not_fit_fail_the_start_and_leave_nothing(tmp_path: Path, device: Faulty) -> None:
    path = onnx_models.mlp(tmp_path / "m.onnx")
    model = made(path, device="cuda", instances=4, cuda={"slot_limit_bytes": 256 * 1024})
    with pytest.raises(ConfigError, match=r"slots need 65536 bytes more, .* cuda\.slot_limit_bytes allows"):
        asyncio.run(model.load())
    assert not any(device.statistics().values())


def test_after_a_loss_every_run_says_so_and_touches_nothing() -> None:
    device = Losable(runtime_memory=True)
    ring = Ring(device)
    slots = [ring.new_slot(PAIR, 4) for _ in range(2)]
    for number, slot in enumerate(slots):
        slot.load([pair(number, 4)], 4)
    device.is_lost = True
    for slot in slots:
        with pytest.raises(EngineLost, match="lost to this process: finish failed: an illegal memory access"):
            ring.run(slot, lambda slot=slot: doubled(ring, slot))  # type: ignore[misc]
    ring.close()
    ring.close()


def test_streams_that_cannot_be_made_leave_nothing() -> None:
    class Poor(CpuDevice):
        def new_stream(self) -> int:
            if len(self._streams) == 2:
                raise DeviceError("new_stream: out of resources")
            return super().new_stream()

    device = Poor()
    with pytest.raises(DeviceError, match="out of resources"):
        Ring(device)
    assert not any(device.statistics().values())


def test_who_is_alone_meets_nobody() -> None:
    gate, inside, most = Gate(), 0, 0
    alone_saw: list[int] = []
    lock = threading.Lock()

    def together() -> None:
        nonlocal inside, most
        for _ in range(200):
            with gate.together():
                with lock:
                    inside += 1
                    most = max(most, inside)
                with lock:
                    inside -= 1

    def alone() -> None:
        for _ in range(50):
            with gate.alone():
                alone_saw.append(inside)

    threads = [threading.Thread(target=each) for each in (together, together, together, alone, alone)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(20)
    assert alone_saw == [0] * 100
    assert most >= 1


class TestGraphs:
    def engine(self, tmp_path: Path, **settings: Any) -> Any:
        return opened(onnx_models.mlp(tmp_path / "m.onnx"), graphs=True, **settings)

    def test_each_shape_of_each_slot_and_thread_has_its_own(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = self.engine(tmp_path)
        path = tmp_path / "m.onnx"
        given: list[str] = []
        enqueue = engine._enqueue

        def watched(io: Any, options: Any) -> None:
            given.append(options.get_run_config_entry("gpu_graph_id"))
            enqueue(io, options)

        monkeypatch.setattr(engine, "_enqueue", watched)
        slots = [engine.new_slot(4) for _ in range(2)]
        answers(engine, slots[0], (normal(1, 8),))  # the proof, on the thread that opened it

        def serve() -> None:
            for _ in range(2):
                for slot in slots:
                    for rows in (1, 2):
                        x = normal(rows, 8)
                        (y,) = answers(engine, slot, (x,))
                        np.testing.assert_allclose(y, plain(path, x)[0], rtol=1e-5, atol=1e-5)

        for _ in range(2):
            thread = threading.Thread(target=serve)
            thread.start()
            thread.join()
        assert given[:2] == ["-1", "-1"]
        first, second = given[2:10], given[10:]
        assert first[:4] == first[4:] == ["1", "2", "3", "4"]
        assert second[:4] == second[4:] == ["5", "6", "7", "8"]
        engine.close()

    def test_what_cannot_be_captured_runs_without(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        engine = self.engine(tmp_path)
        enqueue, fails = engine._enqueue, True

        def refusing(io: Any, options: Any) -> None:
            if options.get_run_config_entry("gpu_graph_id") != "-1":
                raise RuntimeError("operation not permitted when stream is capturing")
            if not fails:
                raise RuntimeError("no kernel at all")
            enqueue(io, options)

        slot = engine.new_slot(4)
        answers(engine, slot, (normal(1, 8),))
        monkeypatch.setattr(engine, "_enqueue", refusing)
        seen: list[Any] = []

        def serve() -> None:
            nonlocal fails
            seen.extend(answers(engine, slot, (normal(3, 8),)) for _ in range(2))
            fails = False
            try:
                answers(engine, slot, (normal(3, 8),))
            except RuntimeError as error:
                seen.append(str(error))

        thread = threading.Thread(target=serve)
        thread.start()
        thread.join()
        np.testing.assert_array_equal(seen[0], seen[1])
        assert seen[2] == "no kernel at all"
        assert caplog.text.count("runs of 3 rows go without a graph: operation not permitted") == 1
        engine.close()

    def test_open_shapes_are_refused(self, tmp_path: Path) -> None:
        device = CpuDevice(runtime_memory=True)
        with pytest.raises(ConfigError, match=r"cuda\.graphs needs fixed row shapes, but '\w+' is"):
            opened(onnx_models.one(tmp_path / "m.onnx", "Identity", Type.FLOAT, ["n", "m"]), device, graphs=True)
        assert not any(device.statistics().values())


def test_memory_can_be_given_back_after_each_run(tmp_path: Path) -> None:
    path = onnx_models.mlp(tmp_path / "m.onnx")
    engine = opened(path, shrink_memory=True)
    slot = engine.new_slot(4)
    for _ in range(2):
        np.testing.assert_allclose(
            answers(engine, slot, (normal(3, 8),))[0], plain(path, normal(3, 8))[0], rtol=1e-5, atol=1e-5
        )
    engine.close()


def shaping(path: Path, operator: str) -> Path:
    """x, reshaped by what is computed of its shape, and `operator` of that."""
    import onnx

    nodes = [
        helper.make_node("Shape", ["x"], ["shape"]),
        helper.make_node("Gather", ["shape", "zero"], ["rows"]),
        helper.make_node("Concat", ["rows", "rest"], ["target"], axis=0),
        helper.make_node("Reshape", ["x", "target"], ["flat"]),
        helper.make_node(operator, ["flat"], ["y"]),
    ]
    numbers = [helper.make_tensor("zero", Type.INT64, [1], [0]), helper.make_tensor("rest", Type.INT64, [1], [-1])]
    x = helper.make_tensor_value_info("x", Type.FLOAT, ["n", 2, 3])
    y = helper.make_tensor_value_info("y", Type.FLOAT, ["n", 6])
    graph = helper.make_graph(nodes, "shaping", [x], [y], numbers)
    onnx.save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    return path


@pytest.mark.parametrize(("operator", "refused"), [("Erf", ["Erf"]), ("Neg", [])])
def test_only_what_computes_shapes_may_run_elsewhere(tmp_path: Path, operator: str, refused: list[str]) -> None:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
    path = shaping(tmp_path / "m.onnx", operator)
    session = onnxruntime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
    assert onnx_cuda.strangers(session, "CPUExecutionProvider") == []
    assert onnx_cuda.strangers(session, "CUDAExecutionProvider") == refused


def test_weights_beside_the_model_are_counted(tmp_path: Path) -> None:
    import onnx

    path = onnx_models.mlp(tmp_path / "m.onnx")
    whole = path.stat().st_size
    assert bytes_of(path) == whole
    onnx.save(
        onnx.load(path), tmp_path / "split.onnx", save_as_external_data=True, location="weights.bin", size_threshold=0
    )
    (tmp_path / "another.bin").write_bytes(bytes(1000))
    split, weights = (tmp_path / "split.onnx").stat().st_size, (tmp_path / "weights.bin").stat().st_size
    assert weights > 0
    assert bytes_of(tmp_path / "split.onnx") == split + weights
    broken = tmp_path / "broken.onnx"
    broken.write_bytes(path.read_bytes()[: whole // 2] + b"\xff" * 20)
    assert bytes_of(broken) == whole // 2 + 20
