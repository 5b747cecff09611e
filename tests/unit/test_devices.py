"""The device adapters: the CPU's own promises, those that all share, and what is said where there is no GPU."""

from __future__ import annotations

import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.compiling import NATIVE, fake_driver, needs_compiler
from tests.device_cases import *  # noqa: F403
from tests.device_cases import Rooms

from forno.kernels import build
from forno.kernels.devices import NAMES, DeviceError, DeviceUnavailable, open_device
from forno.kernels.devices.cpu import CpuDevice

if TYPE_CHECKING:
    from collections.abc import Iterator

ROOT = Path(__file__).parent.parent.parent


@pytest.fixture(scope="session")
def cache(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("cache")


@pytest.fixture
def device(cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    if not build.compiler():
        pytest.skip("the kernels need a C++ compiler on the CPU")
    monkeypatch.setenv("XDG_CACHE_HOME", str(cache))
    made = open_device("cpu")
    yield made
    made.close()


class TestCpu:
    def test_nothing_runs_before_somebody_waits(self, rooms: Rooms) -> None:
        read = rooms.host(rooms.pinned_out, np.uint8)
        rooms.device.fill(rooms.near, 7, 8, rooms.streams[0])
        rooms.device.copy_out(rooms.pinned_out, rooms.near, 8, rooms.streams[0])
        assert (read == 0xA5).all()
        rooms.device.finish(rooms.streams[0])
        assert (read[:8] == 7).all()

    @settings(max_examples=60)
    @given(data=st.data(), forgotten=st.sampled_from([None, 0, 1]))
    def test_any_order_that_events_allow(self, data: Any, forgotten: int | None) -> None:
        order: list[int] = []

        def choose(streams: Any) -> int:
            order.append(data.draw(st.sampled_from(streams)))
            return order[-1]

        rooms = Rooms(CpuDevice(choose=choose))
        written, read = rooms.host(rooms.pinned_in, np.uint8), rooms.host(rooms.pinned_out, np.uint8)
        written[:] = 1
        device, (come_in, compute, go_out) = rooms.device, rooms.streams
        device.copy_in(rooms.near, rooms.pinned_in, 64, come_in)
        device.record(rooms.events[0], come_in)
        if forgotten != 0:
            device.wait(compute, rooms.events[0])
        device.fill(rooms.near, 2, 32, compute)
        device.record(rooms.events[1], compute)
        if forgotten != 1:
            device.wait(go_out, rooms.events[1])
        device.copy_out(rooms.pinned_out, rooms.near, 64, go_out)
        device.record(rooms.events[2], go_out)
        device.synchronize(rooms.events[2])
        if forgotten is None:
            assert read[:64].tolist() == [2] * 32 + [1] * 32
        elif order[0] == rooms.streams[forgotten + 1]:  # the one that should have waited went first
            assert read[:64].tolist() != [2] * 32 + [1] * 32
        for stream in rooms.streams:
            device.finish(stream)

    def test_streams_that_wait_for_each_other_are_told(self) -> None:
        device = CpuDevice()
        first, second, event = device.new_stream(), device.new_stream(), device.new_event()
        device.record(event, first)
        device.wait(second, event)
        device._streams[first].appendleft(device._streams[second][0])  # which no caller can make
        with pytest.raises(DeviceError, match="streams wait for each other"):
            device.finish(second)

    @pytest.mark.parametrize(
        ("what", "complaint"),
        [
            (lambda d, r: d.copy_in(r.near, r.pinned_in, 5000, r.streams[0]), "copy_in: 5000 bytes .* pinned memory"),
            (lambda d, r: d.copy_in(r.near + 1, r.pinned_in, 4096, r.streams[0]), "4096 bytes .* device memory"),
            (lambda d, r: d.copy_in(r.near, r.near, 8, r.streams[0]), "not within pinned memory"),
            (lambda d, r: d.copy_out(r.far, r.near, 8, r.streams[0]), "not within pinned memory"),
            (lambda d, r: d.fill(r.pinned_in, 0, 8, r.streams[0]), "not within device memory"),
            (lambda d, r: d.free(r.near + 256), "is no device memory that is allocated"),
            (lambda d, r: d.free_pinned(r.near), "is no pinned memory that is allocated"),
            (lambda d, r: d.end_capture(r.streams[0]), "is not being captured"),
            (lambda d, r: d.launch(1, (0, 1, 1), (32, 1, 1), b"", r.streams[0]), "an empty grid"),
        ],
    )  # fmt: skip
    def test_misuse_is_refused(self, rooms: Rooms, what: Any, complaint: str) -> None:
        with pytest.raises(DeviceError, match=complaint):
            what(rooms.device, rooms)

    def test_a_stream_with_work_is_not_closed(self, rooms: Rooms) -> None:
        rooms.device.fill(rooms.near, 0, 8, rooms.streams[0])
        with pytest.raises(DeviceError, match="1 operations are under way"):
            rooms.device.close_stream(rooms.streams[0])

    def test_only_own_work_is_captured(self, rooms: Rooms) -> None:
        device, stream = rooms.device, rooms.streams[0]
        device.begin_capture(stream)
        with pytest.raises(DeviceError, match="being captured already"):
            device.begin_capture(stream)
        with pytest.raises(DeviceError, match="record: not while the stream is being captured"):
            device.record(rooms.events[0], stream)
        device.close_graph(device.end_capture(stream))

    def test_arguments_are_counted(self, rooms: Rooms) -> None:
        from forno.kernels.library import Kernels

        kernels = Kernels(rooms.device)
        function = rooms.device.function(kernels._module, "cast_f32_f16")
        with pytest.raises(DeviceError, match="'cast_f32_f16' takes not 20 bytes"):
            rooms.device.launch(function, (1, 1, 1), (32, 1, 1), b"\0" * 20, rooms.streams[0])
        kernels.close()


@pytest.mark.parametrize(
    ("name", "ordinal", "complaint"),
    [
        ("cpu", 1, "there is no device cpu:1; the only one is cpu:0"),
        ("gpu", 0, "there is no device 'gpu', expected one of cpu, cuda, pycuda"),
    ],
)
def test_devices_that_are_not_there_are_named(name: str, ordinal: int, complaint: str) -> None:
    with pytest.raises(DeviceUnavailable, match=complaint):
        open_device(name, ordinal)


@pytest.mark.parametrize("name", NAMES[1:])
def test_without_a_gpu_one_line_and_no_crash(name: str, tmp_path: Path) -> None:
    program = (
        "from forno.kernels.devices import DeviceUnavailable, open_device\n"
        f"try:\n    open_device('{name}')\nexcept DeviceUnavailable as error:\n    print(error)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(ROOT / "kernels"), "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    assert len(done.stdout.splitlines()) == 1
    assert f"device '{name}" in done.stdout


@needs_compiler
@pytest.mark.parametrize("name", NAMES[1:])
def test_the_real_library_on_a_fake_driver(name: str, tmp_path: Path) -> None:
    """All shared cases and all kernels once more, in a process whose libcuda.so.1 is tests/native/fake_driver.cc."""
    pytest.importorskip("cuda.bindings" if name == "cuda" else "pycuda", reason=f"the library of '{name}' is missing")
    cache = tmp_path / "cache"
    build.kernels_for("sm_90", cache / "forno" / "kernels")  # NVRTC is not for a fake driver
    fake_driver(tmp_path, unused_calls() if name == "pycuda" else "")
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(tmp_path),
        "XDG_CACHE_HOME": str(cache),
        "FORNO_TEST_DEVICE": name,
    }
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "tests/gpu/test_on_gpu.py"]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=environment, cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr
    assert " passed" in done.stdout


def unused_calls() -> str:
    """The calls that PyCUDA is linked against, used or not, and that the fake driver lacks: they fail."""
    library = importlib.util.find_spec("pycuda._driver")
    assert library is not None
    listed = subprocess.run(
        ["nm", "-D", "--undefined-only", library.origin], capture_output=True, text=True, check=True
    )
    fake = (NATIVE / "fake_driver.cc").read_text()
    wanted = re.findall(r" U (cu[A-Z]\w+)", listed.stdout)
    return "".join(f"CALL {call}() {{ return 801; }}\n" for call in wanted if f"CALL {call}(" not in fake)
