"""What every adapter must do alike: on the CPU, on a GPU, and through the real libraries on a fake driver.

They ask for a `device`, which is opened anew for each test, and closed after it with nothing left behind.
"""

from __future__ import annotations

import ctypes
import re
import threading
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest

from forno.kernels.devices import DeviceError, OutOfDeviceMemory
from forno.kernels.library import Kernels

if TYPE_CHECKING:
    from forno.kernels.devices import Device

_BYTES = 4096


class Rooms:
    """Pinned and device memory, streams and events for one test."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self.pinned_in, self.pinned_out = device.allocate_pinned(_BYTES), device.allocate_pinned(_BYTES)
        self.near, self.far = device.allocate(_BYTES), device.allocate(_BYTES)
        self.streams = [device.new_stream() for _ in range(3)]
        self.events = [device.new_event(), device.new_event(busy_wait=True), device.new_event()]

    def host(self, pointer: int, dtype: Any) -> Any:
        return np.frombuffer((ctypes.c_char * _BYTES).from_address(pointer), dtype)

    def close(self) -> None:
        for stream in self.streams:
            self.device.finish(stream)
            self.device.close_stream(stream)
        for event in self.events:
            self.device.close_event(event)
        for pinned in (self.pinned_in, self.pinned_out):
            self.device.free_pinned(pinned)
        for room in (self.near, self.far):
            self.device.free(room)


@pytest.fixture
def rooms(device: Device) -> Any:
    made = Rooms(device)
    yield made
    made.close()
    assert not any(device.statistics().values())


def test_bytes_go_in_and_come_out(device: Device, rooms: Rooms) -> None:
    written, read = rooms.host(rooms.pinned_in, np.uint8), rooms.host(rooms.pinned_out, np.uint8)
    written[:] = np.arange(_BYTES) % 251
    stream = rooms.streams[0]
    device.copy_in(rooms.near, rooms.pinned_in, _BYTES, stream)
    device.fill(rooms.near + 16, 7, 32, stream)
    device.copy_out(rooms.pinned_out + 8, rooms.near + 8, _BYTES - 8, stream)
    device.finish(stream)
    want = np.arange(_BYTES) % 251
    want[16:48] = 7
    np.testing.assert_array_equal(read[8:], want[8:])


def test_memory_is_aligned(device: Device, rooms: Rooms) -> None:
    assert rooms.near % 256 == 0
    assert rooms.far % 256 == 0


def test_streams_wait_for_events(device: Device, rooms: Rooms) -> None:
    kernels = Kernels(device)
    written, read = rooms.host(rooms.pinned_in, np.float32), rooms.host(rooms.pinned_out, np.float16)
    come_in, compute, go_out = rooms.streams
    for batch in range(3):  # as slots are used, one batch after another
        written[:256] = np.arange(256) + batch
        device.copy_in(rooms.near, rooms.pinned_in, 1024, come_in)
        device.record(rooms.events[0], come_in)
        device.wait(compute, rooms.events[0])
        kernels.cast(
            rooms.near, rooms.far, elements=256, source_dtype="float32", target_dtype="float16", stream=compute
        )
        device.record(rooms.events[1], compute)
        device.wait(go_out, rooms.events[1])
        device.copy_out(rooms.pinned_out, rooms.far, 512, go_out)
        device.record(rooms.events[2], go_out)
        device.synchronize(rooms.events[2])
        np.testing.assert_array_equal(read[:256], np.arange(256) + batch)
    kernels.close()


def test_its_place_on_the_bus_is_told_where_it_has_one(device: Device) -> None:
    assert re.fullmatch("" if device.name == "cpu" else r"[0-9a-f]{4,8}:[0-9a-f]{2}:[0-9a-f]{2}\.[0-9]", device.bus_id)


def test_an_event_that_was_never_recorded_is_done(device: Device, rooms: Rooms) -> None:
    device.wait(rooms.streams[0], rooms.events[0])
    device.synchronize(rooms.events[0])
    device.finish(rooms.streams[0])


def test_graphs_run_again_with_new_contents(device: Device, rooms: Rooms) -> None:
    stream = rooms.streams[0]
    if not device.has_graphs:
        with pytest.raises(DeviceError, match="has no graphs; choose device 'cuda'"):
            device.begin_capture(stream)
        return
    written, read = rooms.host(rooms.pinned_in, np.uint8), rooms.host(rooms.pinned_out, np.uint8)
    read[:] = 99
    device.begin_capture(stream)
    device.copy_in(rooms.near, rooms.pinned_in, 64, stream)
    device.fill(rooms.near, 1, 8, stream)
    device.copy_out(rooms.pinned_out, rooms.near, 64, stream)
    graph = device.end_capture(stream)
    device.finish(stream)
    assert (read == 99).all()  # captured, not run
    for content in (5, 6):
        written[:64] = content
        device.replay(graph, stream)
        device.finish(stream)
        assert read[:64].tolist() == [1] * 8 + [content] * 56
    device.close_graph(graph)


def test_too_much_memory_is_refused_and_nothing_else(device: Device, rooms: Rooms) -> None:
    free, total = device.memory_bytes()
    assert 0 < free <= total
    with pytest.raises(OutOfDeviceMemory, match=f"{total + 1} bytes asked for"):
        device.allocate(total + 1)
    pointer = device.allocate(1 << 20)
    assert device.memory_bytes()[0] <= free - (1 << 20)
    device.free(pointer)
    assert device.memory_bytes() == (free, total)


def test_unknown_kernels_and_no_modules_are_told(device: Device, rooms: Rooms) -> None:
    kernels = Kernels(device)
    with pytest.raises(DeviceError, match=r"[fF]unction"):
        device.function(kernels._module, "no_such_kernel")
    kernels.close()
    with pytest.raises(DeviceError, match=r"[mM]odule"):
        device.load_module(b"no kernels at all")


def test_another_thread_attaches_itself(device: Device, rooms: Rooms) -> None:
    seen: list[Any] = []

    def work() -> None:
        device.attach()
        try:
            pointer = device.allocate(256)
            device.fill(pointer, 3, 256, rooms.streams[1])
            device.copy_out(rooms.pinned_out, pointer, 256, rooms.streams[1])
            device.finish(rooms.streams[1])
            device.free(pointer)
            seen.append(rooms.host(rooms.pinned_out, np.uint8)[:256].tolist())
        finally:
            device.detach()

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [[3] * 256]


def test_closing_twice_is_closing_once(device: Device) -> None:
    device.close()
    device.close()
