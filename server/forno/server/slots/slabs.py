"""Pinned memory with twins on a device, kept for the next slot that needs as much."""

from __future__ import annotations

import ctypes
import math
import threading
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from forno.kernels.devices import DeviceError, OutOfDeviceMemory

if TYPE_CHECKING:
    from forno.kernels.devices import Device

    Array = np.ndarray[Any, np.dtype[Any]]

ALIGNMENT_BYTES = 256
_SMALLEST_SLAB_BYTES = 64 * 1024
_NOWHERE = np.empty(0, np.uint8)


@dataclass(slots=True, eq=False)
class Slab:
    """Pinned memory and its twin on the device. Made by SlabPool; used by one slot at a time."""

    size_bytes: int
    pinned: int  # address; 0 = there is none, as the next two
    device: int  # address
    bytes: Array  # the pinned memory
    used_bytes: int = 0  # from its beginning, by what was placed last

    def place(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> tuple[Array, int]:
        """Room for one more tensor, and its address on the device.

        Raises:
            SlabFull: There is none.
        """
        start = -(-self.used_bytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
        end = start + math.prod(shape) * dtype.itemsize
        if end > self.size_bytes:
            raise SlabFull(end)
        self.used_bytes = end
        return self.bytes[start:end].view(dtype).reshape(shape), self.device + start


class SlabFull(Exception):
    """A tensor does not fit into what is left of its slab; as many bytes are needed so far."""

    def __init__(self, needed_bytes: int) -> None:
        super().__init__(f"{needed_bytes} bytes are needed")
        self.needed_bytes = needed_bytes


class SlabPool:
    """Slabs of one engine. Any thread that is attached; ends with `close`, which gives all of their memory back.

    Args:
        device: Whose memory.
        limit_bytes: Most memory of all slabs, on each side; 0 = as much as there is.
    """

    def __init__(self, device: Device, limit_bytes: int = 0) -> None:
        self._device = device
        self._limit_bytes = limit_bytes
        self._all: list[Slab] = []
        self._idle: list[Slab] = []
        self._given: deque[Slab] = deque()  # not yet in `_idle`
        self._lock = threading.Lock()

    @property
    def held_bytes(self) -> int:
        """Memory of all slabs, on each side."""
        return sum(slab.size_bytes for slab in self._all)

    def take(self, size_bytes: int, *, pinned: bool = True) -> Slab:
        """A slab of at least that size, on the device alone where it is not to be pinned.

        Raises:
            OutOfDeviceMemory: It does not fit.
        """
        wanted = 1 << (max(size_bytes, _SMALLEST_SLAB_BYTES) - 1).bit_length()
        with self._lock:
            while self._given:
                self._idle.append(self._given.popleft())
            fitting = [slab for slab in self._idle if slab.size_bytes == wanted and bool(slab.pinned) == pinned]
            if fitting:
                self._idle.remove(fitting[0])
                return fitting[0]
            if self._limit_bytes and self.held_bytes + wanted > self._limit_bytes:
                self._release(list(self._idle))
            if self._limit_bytes and self.held_bytes + wanted > self._limit_bytes:
                raise OutOfDeviceMemory(
                    f"slots need {wanted} bytes more, and hold {self.held_bytes} "
                    f"of {self._limit_bytes} that cuda.slot_limit_bytes allows"
                )
            slab = self._new(wanted) if pinned else Slab(wanted, 0, self._device.allocate(wanted), _NOWHERE)
            self._all.append(slab)
            return slab

    def give(self, slab: Slab) -> None:
        """Takes a slab back; nothing that uses it may be under way. Without a lock: a collection may call it."""
        self._given.append(slab)

    def close(self) -> None:
        """Gives all memory back, also that of slots which are still there. Idempotent."""
        with self._lock:
            self._given.clear()
            self._release(list(self._all))

    def _new(self, size_bytes: int) -> Slab:
        pinned = self._device.allocate_pinned(size_bytes)
        try:
            device = self._device.allocate(size_bytes)
        except BaseException:
            self._device.free_pinned(pinned)
            raise
        room = np.ctypeslib.as_array((ctypes.c_uint8 * size_bytes).from_address(pinned))
        return Slab(size_bytes, pinned, device, room)

    def _release(self, slabs: list[Slab]) -> None:
        failures: list[DeviceError] = []
        for slab in slabs:
            self._all.remove(slab)
            for free, pointer in ((self._device.free, slab.device), (self._device.free_pinned, slab.pinned)):
                try:
                    if pointer:
                        free(pointer)
                except DeviceError as error:  # the others may still go
                    failures.append(error)
        self._idle = [slab for slab in self._idle if slab in self._all]
        if failures:
            raise failures[0]
