"""This CPU as a device: the same calls, the same kernels, no GPU.

Work stays in its stream until somebody waits, and then only as much of it runs as has to: whoever forgets to wait reads
old bytes here every time, not once in a while. Memory starts out as rubbish, and every access is checked against
what was allocated. Tests choose the order in which streams go on, and so find any that is not safe.
"""

from __future__ import annotations

import ctypes
import itertools
import tempfile
import threading
from bisect import bisect_right, insort
from collections import Counter, deque
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from forno.kernels.devices import DeviceError, DeviceUnavailable, OutOfDeviceMemory

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from typing import TypeAlias

    _Operation: TypeAlias = "_Wait | Callable[[], object]"

_ALIGNMENT_BYTES = 256
_RUBBISH = 0xA5
_OUTCOMES = {1: "its blocks are no whole warps along x", 2: "not all threads of a block come to a barrier"}


@dataclass(slots=True)
class _Event:
    """How often it was recorded, and how many of those records are done."""

    recorded: int = 0
    done: int = 0


@dataclass(slots=True)
class _Wait:
    """An operation that lets a stream go on once the event's record of that number is done."""

    event: _Event
    number: int


@dataclass(slots=True)
class _Memory:
    """Allocations of one kind: their first bytes in order, and what keeps them alive."""

    kind: str
    starts: list[int]
    rooms: dict[int, np.ndarray[Any, np.dtype[np.uint8]]]

    def allocate(self, size_bytes: int) -> int:
        room = np.full(size_bytes + _ALIGNMENT_BYTES, _RUBBISH, np.uint8)
        pointer = -(-room.ctypes.data // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
        self.rooms[pointer] = room[pointer - room.ctypes.data :][:size_bytes]
        insort(self.starts, pointer)
        return pointer

    def free(self, pointer: int) -> int:
        if pointer not in self.rooms:
            raise DeviceError(f"free: {pointer:#x} is no {self.kind} memory that is allocated")
        self.starts.remove(pointer)
        return self.rooms.pop(pointer).nbytes

    def check(self, what: str, pointer: int, size_bytes: int) -> None:
        at = bisect_right(self.starts, pointer) - 1
        if at < 0 or pointer + size_bytes > self.starts[at] + self.rooms[self.starts[at]].nbytes:
            raise DeviceError(f"{what}: {size_bytes} bytes at {pointer:#x} are not within {self.kind} memory")


class CpuDevice:
    """See `Device`. Any thread; calls take turns.

    Args:
        ordinal: Its number; there is only 0.
        capacity_bytes: Its memory.
        runtime_memory: Whether what others in this process allocate is its memory too, as a runtime's outputs are.
        choose: Which of the streams (by number, ascending) that can go on does so next; the first by default.
    """

    name = "cpu"
    architecture = "cpu"
    bus_id = ""
    description = "this CPU"
    has_graphs = True

    def __init__(
        self,
        ordinal: int = 0,
        capacity_bytes: int = 1 << 34,
        *,
        runtime_memory: bool = False,
        choose: Callable[[Sequence[int]], int] | None = None,
    ) -> None:
        self.ordinal = ordinal
        self._capacity_bytes = self._free_bytes = capacity_bytes
        self._runtime_memory = runtime_memory
        self._choose = choose or (lambda streams: streams[0])
        self._handles = itertools.count(1)
        self._device = _Memory("device", [], {})
        self._pinned = _Memory("pinned", [], {})
        self._streams: dict[int, deque[_Operation]] = {}
        self._events: dict[int, _Event] = {}
        self._modules: dict[int, ctypes.CDLL] = {}
        self._functions: dict[int, _Function] = {}
        self._graphs: dict[int, list[_Operation]] = {}
        self._captures: dict[int, list[_Operation]] = {}
        self._lock = threading.RLock()

    def attach(self) -> None:
        """Needs nothing."""

    def detach(self) -> None:
        """Needs nothing."""

    def memory_bytes(self) -> tuple[int, int]:
        """Free and total memory of the device."""
        return self._free_bytes, self._capacity_bytes

    def allocate(self, size_bytes: int) -> int:
        """Memory of the device."""
        with self._lock:
            if size_bytes > self._free_bytes:
                raise OutOfDeviceMemory(f"allocate: {size_bytes} bytes asked for, {self._free_bytes} are free")
            self._free_bytes -= size_bytes
            return self._device.allocate(size_bytes)

    def free(self, pointer: int) -> None:
        """Gives memory back."""
        with self._lock:
            self._free_bytes += self._device.free(pointer)

    def allocate_pinned(self, size_bytes: int) -> int:
        """Memory of the host."""
        with self._lock:
            return self._pinned.allocate(size_bytes)

    def free_pinned(self, pointer: int) -> None:
        """Gives memory back."""
        with self._lock:
            self._pinned.free(pointer)

    def new_stream(self) -> int:
        """A stream."""
        with self._lock:
            stream = next(self._handles)
            self._streams[stream] = deque()
            return stream

    def close_stream(self, stream: int) -> None:
        """Gives a stream back."""
        with self._lock:
            if self._streams[stream]:
                raise DeviceError(f"close_stream: {len(self._streams[stream])} operations are under way in it")
            del self._streams[stream]

    def finish(self, stream: int) -> None:
        """Blocks until all work of the stream is done."""
        with self._lock:
            self._run_until(lambda: not self._streams[stream], "finish")

    def new_event(self, *, busy_wait: bool = False) -> int:
        """An event."""
        with self._lock:
            event = next(self._handles)
            self._events[event] = _Event()
            return event

    def close_event(self, event: int) -> None:
        """Gives an event back."""
        with self._lock:
            del self._events[event]

    def record(self, event: int, stream: int) -> None:
        """The event is done once all work is that is in the stream now."""
        with self._lock:
            self._refuse_in_capture("record", stream)
            own = self._events[event]
            own.recorded += 1
            self._put(stream, partial(_reach, own, own.recorded))

    def wait(self, stream: int, event: int) -> None:
        """What comes to the stream from now on runs only after the event, as recorded last."""
        with self._lock:
            self._refuse_in_capture("wait", stream)
            own = self._events[event]
            self._put(stream, _Wait(own, own.recorded))

    def synchronize(self, event: int) -> None:
        """Blocks until the event, as recorded last, is done."""
        with self._lock:
            own = self._events[event]
            number = own.recorded
            self._run_until(lambda: own.done >= number, "synchronize")

    def copy_in(self, device_pointer: int, pinned_pointer: int, size_bytes: int, stream: int) -> None:
        """Copies from pinned to device memory."""
        with self._lock:
            self._pinned.check("copy_in", pinned_pointer, size_bytes)
            self._device.check("copy_in", device_pointer, size_bytes)
            self._put(stream, partial(ctypes.memmove, device_pointer, pinned_pointer, size_bytes))

    def copy_out(self, pinned_pointer: int, device_pointer: int, size_bytes: int, stream: int) -> None:
        """Copies from device to pinned memory."""
        with self._lock:
            self._pinned.check("copy_out", pinned_pointer, size_bytes)
            if not self._runtime_memory:
                self._device.check("copy_out", device_pointer, size_bytes)
            self._put(stream, partial(ctypes.memmove, pinned_pointer, device_pointer, size_bytes))

    def fill(self, device_pointer: int, byte: int, size_bytes: int, stream: int) -> None:
        """Sets bytes of device memory."""
        with self._lock:
            self._device.check("fill", device_pointer, size_bytes)
            self._put(stream, partial(ctypes.memset, device_pointer, byte, size_bytes))

    def load_module(self, binary: bytes) -> int:
        """A shared library with the kernels; see `forno.kernels.build`."""
        with self._lock, tempfile.TemporaryDirectory(prefix="forno-kernels-") as folder:
            path = Path(folder) / "kernels.so"
            path.write_bytes(binary)
            try:
                library = ctypes.CDLL(str(path))  # stays mapped after its file is gone
            except OSError as error:
                raise DeviceError(f"load_module: {error}") from None
            module = next(self._handles)
            self._modules[module] = library
            return module

    def unload_module(self, module: int) -> None:
        """Gives a module back."""
        with self._lock:
            del self._modules[module]

    def function(self, module: int, name: str) -> int:
        """A kernel of a module."""
        with self._lock:
            try:
                kernel = self._modules[module][f"on_cpu_{name}"]
            except AttributeError:
                raise DeviceError(f"function: the module has no kernel '{name}'") from None
            kernel.argtypes, kernel.restype = (ctypes.c_char_p, ctypes.c_size_t), ctypes.c_void_p
            function = next(self._handles)
            self._functions[function] = _Function(name, kernel, self._modules[module])
            return function

    def launch(
        self, function: int, grid: tuple[int, int, int], block: tuple[int, int, int], arguments: bytes, stream: int
    ) -> None:
        """Runs a kernel."""
        if not all(grid) or not all(block):
            raise DeviceError(f"launch: an empty grid, {grid} blocks of {block} threads")
        with self._lock:
            bound = _Bound(self._functions[function], arguments)
            self._put(stream, lambda: bound.run(grid, block))

    def begin_capture(self, stream: int) -> None:
        """What is given to the stream from now on is kept for `replay` and does not run."""
        with self._lock:
            if stream in self._captures:
                raise DeviceError("begin_capture: the stream is being captured already")
            self._captures[stream] = []

    def end_capture(self, stream: int) -> int:
        """What was given since `begin_capture`."""
        with self._lock:
            if stream not in self._captures:
                raise DeviceError("end_capture: the stream is not being captured")
            graph = next(self._handles)
            self._graphs[graph] = self._captures.pop(stream)
            return graph

    def replay(self, graph: int, stream: int) -> None:
        """Runs a graph."""
        with self._lock:
            for operation in self._graphs[graph]:
                self._put(stream, operation)

    def close_graph(self, graph: int) -> None:
        """Gives a graph back."""
        with self._lock:
            del self._graphs[graph]

    def close(self) -> None:
        """Lets go of the device."""

    def statistics(self) -> Mapping[str, int]:
        """How many handles are out, by kind."""
        return Counter(
            allocations=len(self._device.rooms),
            pinned=len(self._pinned.rooms),
            streams=len(self._streams),
            events=len(self._events),
            modules=len(self._modules),
            graphs=len(self._graphs),
        )

    def enqueue(self, stream: int, operation: Callable[[], object]) -> None:
        """Puts any function into a stream. Only here: a GPU's driver must not call Python."""
        with self._lock:
            self._put(stream, operation)

    def _put(self, stream: int, operation: _Operation) -> None:
        self._captures.get(stream, self._streams[stream]).append(operation)

    def _refuse_in_capture(self, what: str, stream: int) -> None:
        if stream in self._captures:
            raise DeviceError(f"{what}: not while the stream is being captured")

    def _run_until(self, reached: Callable[[], bool], what: str) -> None:
        """Lets streams go on, one operation at a time, until it is so."""
        while not reached():
            ready = [stream for stream, operations in self._streams.items() if operations and _can_run(operations[0])]
            if not ready:
                raise DeviceError(f"{what}: streams wait for each other")
            operation = self._streams[self._choose(ready)].popleft()
            if not isinstance(operation, _Wait):
                operation()


class _Function:
    """A kernel, and how its library runs it."""

    def __init__(self, name: str, bind: Any, library: ctypes.CDLL) -> None:
        self.name = name
        self.bind = bind
        self.run, self.drop = library.on_cpu_run, library.on_cpu_drop
        self.run.argtypes, self.drop.argtypes = (ctypes.c_void_p, ctypes.c_uint * 6), (ctypes.c_void_p,)


class _Bound:
    """A kernel with its arguments."""

    def __init__(self, function: _Function, arguments: bytes) -> None:
        self._function = function
        self._bound = function.bind(arguments, len(arguments))
        if not self._bound:
            raise DeviceError(f"launch: kernel '{function.name}' takes not {len(arguments)} bytes of arguments")

    def __del__(self) -> None:
        self._function.drop(self._bound)  # which may be null

    def run(self, grid: tuple[int, int, int], block: tuple[int, int, int]) -> None:
        outcome = self._function.run(self._bound, (ctypes.c_uint * 6)(*grid, *block))
        if outcome:
            raise DeviceError(f"launch: kernel '{self._function.name}' failed: {_OUTCOMES[outcome]}")


def _reach(event: _Event, number: int) -> None:
    event.done = max(event.done, number)


def _can_run(operation: _Operation) -> bool:
    return not isinstance(operation, _Wait) or operation.event.done >= operation.number


def open_device(ordinal: int = 0) -> CpuDevice:
    """Opens it.

    Raises:
        DeviceUnavailable: The number is not 0.
    """
    if ordinal != 0:
        raise DeviceUnavailable(f"there is no device cpu:{ordinal}; the only one is cpu:0")
    return CpuDevice(ordinal)
