"""Slots on a device, over the CPU's, whose streams go on in any order that events allow."""

from __future__ import annotations

import ctypes
import gc
import random
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.unit.devices import Counting

from forno.kernels.devices import OutOfDeviceMemory
from forno.kernels.devices.cpu import CpuDevice
from forno.server.config import PaddingSettings
from forno.server.shapes import plan
from forno.server.signature import Signature, TensorSpec
from forno.server.slots.cuda import Ring

if TYPE_CHECKING:
    from forno.server.slots.cuda import CudaSlot

F4, I8 = np.dtype(np.float32), np.dtype(np.int64)
PAIR = Signature((TensorSpec("a", F4, (-1, 3), ("", "")), TensorSpec("b", I8, (-1,), ("",))), (), batched=True)
OPEN = Signature((TensorSpec("x", F4, (-1, -1), ("", "size")),), (), batched=True)


def device_view(address: int, array: Any) -> Any:
    """The twin of a pinned array: the CPU's device memory can be looked into."""
    return np.frombuffer((ctypes.c_char * array.nbytes).from_address(address), array.dtype).reshape(array.shape)


def doubled(ring: Ring, slot: CudaSlot) -> list[Any]:
    """Enqueues twice each input as an output."""
    device = ring.device
    assert isinstance(device, CpuDevice)
    given = [device_view(address, array) for address, array in zip(slot.addresses, slot.inputs, strict=True)]
    placed = slot.place_outputs([array.shape for array in given], [array.dtype for array in given])
    outputs = [device_view(address, array) for array, address in placed]

    def compute() -> None:
        for array, output in zip(given, outputs, strict=True):
            output[...] = array * 2

    device.enqueue(ring.compute, compute)
    return [array for array, _ in placed]


def pair(seed: int, rows: int) -> tuple[Any, Any]:
    made = np.random.default_rng(seed)
    return made.normal(size=(rows, 3)).astype(F4), made.integers(0, 100, rows)


@settings(max_examples=30)
@given(data=st.data(), counts=st.lists(st.integers(1, 4), min_size=1, max_size=3))
def test_rows_go_through_and_come_back(data: Any, counts: list[int]) -> None:
    ring = Ring(CpuDevice(choose=lambda streams: data.draw(st.sampled_from(streams))))
    slot = ring.new_slot(PAIR, 12)
    for batch in range(2):
        requests = [pair(batch * 10 + index, rows) for index, rows in enumerate(counts)]
        slot.load(requests, sum(counts))
        outputs = ring.run(slot, lambda: doubled(ring, slot))
        for output, parts in zip(outputs, zip(*requests, strict=True), strict=True):
            np.testing.assert_array_equal(output, np.concatenate(parts) * 2)
        slot.release()
    ring.close()


@pytest.mark.parametrize("seed", range(5))
def test_threads_share_the_streams(seed: int) -> None:
    ring = Ring(CpuDevice(choose=random.Random(seed).choice))
    slots = [ring.new_slot(PAIR, 4) for _ in range(3)]

    def serve(number: int) -> None:
        slot = slots[number]
        for batch in range(15):
            request = pair(100 * number + batch, 1 + batch % 4)
            slot.load([request], len(request[1]))
            for output, array in zip(ring.run(slot, lambda: doubled(ring, slot)), request, strict=True):
                np.testing.assert_array_equal(output, array * 2)

    with ThreadPoolExecutor(3) as pool:
        list(pool.map(serve, range(3)))
    ring.close()
    assert not any(ring.device.statistics().values())


def test_a_batch_is_one_copy_each_way_of_what_is_used() -> None:
    device = Counting()
    ring = Ring(device)
    slot = ring.new_slot(PAIR, 64)
    slot.load([pair(1, 2), pair(2, 1)], 3)
    assert [address % 256 for address in slot.addresses] == [0, 0]
    addresses = list(slot.addresses)
    ring.run(slot, lambda: doubled(ring, slot))
    assert device.copies == [("in", 256 + 3 * 8), ("out", 256 + 3 * 8)]
    slot.load([pair(3, 3)], 3)
    assert slot.addresses == addresses  # as graphs and bindings need them
    ring.close()


def test_a_lone_request_is_copied_to_pinned_memory() -> None:
    ring = Ring(CpuDevice())
    signature = Signature((TensorSpec("x", F4, (-1, 40_000), ("", "")),), (), batched=True)
    slot = ring.new_slot(signature, 1)
    array = np.ones((1, 40_000), F4)  # large enough that a host slot would lend it
    slot.load([(array,)], 1)
    assert not np.shares_memory(slot.inputs[0], array)
    ring.close()


def test_rows_of_open_shape_take_a_larger_slab() -> None:
    ring = Ring(CpuDevice())
    slot = ring.new_slot(OPEN, 8)
    for size in (3, 70_000, 5):
        array = np.arange(2 * size, dtype=F4).reshape(2, size)
        slot.load([(array[:1],), (array[1:],)], 2)
        (output,) = ring.run(slot, lambda: doubled(ring, slot))
        np.testing.assert_array_equal(output, array * 2)
    assert ring.pool.held_bytes <= 4 * (1 << 20)
    ring.close()


def test_padded_rows_are_filled_on_the_way() -> None:
    padding = plan(OPEN, PaddingSettings(enabled=True, allowed_rows=(4,)))
    ring = Ring(CpuDevice())
    slot = ring.new_slot(Signature(OPEN.inputs, (), True, padding), 4)
    slot.load([(np.ones((1, 2), F4),), (np.full((1, 5), 3, F4),)], 2)
    outputs = slot.own_rows(ring.run(slot, lambda: doubled(ring, slot)))
    np.testing.assert_array_equal(outputs[0], [[2, 2, 0, 0, 0], [6] * 5])
    assert slot.inputs[0].shape == (4, 5)
    ring.close()


def test_a_failure_leaves_nothing_under_way() -> None:
    ring = Ring(CpuDevice())
    slot = ring.new_slot(PAIR, 4)
    slot.load([pair(1, 4)], 4)
    with pytest.raises(ZeroDivisionError):
        ring.run(slot, lambda: [np.array(1 // 0)])
    request = pair(2, 3)
    slot.load([request], 3)
    outputs = ring.run(slot, lambda: doubled(ring, slot))
    np.testing.assert_array_equal(outputs[0], request[0] * 2)
    ring.close()


def test_slots_that_end_leave_their_memory_to_the_next() -> None:
    ring = Ring(CpuDevice())

    def once() -> None:
        slot = ring.new_slot(PAIR, 8)
        slot.load([pair(1, 8)], 8)
        ring.run(slot, lambda: doubled(ring, slot))

    for _ in range(5):
        once()
        gc.collect()
    assert ring.device.statistics()["allocations"] == 2
    assert ring.device.statistics()["events"] == 3
    ring.close()


def test_the_limit_is_kept_and_named() -> None:
    ring = Ring(CpuDevice(), limit_bytes=128 * 1024)
    first, second = ring.new_slot(PAIR, 8), ring.new_slot(PAIR, 8)
    with pytest.raises(
        OutOfDeviceMemory, match=r"need 65536 bytes more, and hold 131072 of 131072 that cuda\.slot_limit"
    ):
        ring.new_slot(PAIR, 8)
    del first, second
    gc.collect()
    large = ring.new_slot(PAIR, 3000)  # takes the place of both
    assert ring.pool.held_bytes == 128 * 1024
    del large
    ring.close()
    assert ring.device.memory_bytes() == (1 << 34, 1 << 34)


def test_what_the_device_has_not_is_not_taken() -> None:
    ring = Ring(CpuDevice(capacity_bytes=100_000))
    kept = ring.new_slot(PAIR, 8)
    with pytest.raises(OutOfDeviceMemory, match="65536 bytes asked for"):
        ring.new_slot(PAIR, 8)
    assert ring.device.statistics()["pinned"] == 1  # what came first was given back
    del kept
    ring.close()
    ring.close()
