"""An NVIDIA GPU through PyCUDA.

It shares the primary context (`pycuda.autoinit` would make another, of no use to ONNX Runtime), and keeps PyCUDA's
objects beside the integers that stand for them. PyCUDA holds the interpreter's lock while it launches, records and
allocates, and has no graphs: `cuda` is the better choice where cuda-bindings can be installed.
"""

from __future__ import annotations

import ctypes
import itertools
from typing import TYPE_CHECKING, Any

import numpy as np

from forno.kernels.devices import DeviceError, DeviceUnavailable, OutOfDeviceMemory

try:
    from pycuda import driver
except ImportError as error:  # also where libcuda.so.1 is missing, which PyCUDA is linked against
    raise DeviceUnavailable(
        f"device 'pycuda' needs PyCUDA and an NVIDIA driver ({error}); install it: pip install pycuda"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping


class PycudaDevice:
    """See `Device`. PyCUDA aborts the process where a thread ends while it is attached.

    Args:
        ordinal: Which GPU, as the driver counts them (CUDA_VISIBLE_DEVICES applies).

    Raises:
        DeviceUnavailable: There is no such GPU.
    """

    name = "pycuda"
    has_graphs = False

    def __init__(self, ordinal: int = 0) -> None:
        self.ordinal = ordinal
        try:
            driver.init()
            count = driver.Device.count()
        except driver.Error as error:
            raise DeviceUnavailable(f"there is no device 'pycuda:{ordinal}': no usable driver ({error})") from error
        if ordinal >= count:
            raise DeviceUnavailable(
                f"there is no device 'pycuda:{ordinal}'; this machine shows {count} to this process"
            )
        device = driver.Device(ordinal)
        self._context: Any = device.retain_primary_context()
        self.architecture = "sm_{}{}".format(*device.compute_capability())
        self.bus_id = str(device.pci_bus_id()).lower()
        multiprocessors = device.get_attribute(driver.device_attribute.MULTIPROCESSOR_COUNT)
        driver_major = driver.get_driver_version() // 1000
        self.description = f"{device.name()}, {multiprocessors} multiprocessors, driver {driver_major}"
        self._allocations: dict[int, Any] = {}
        self._pinned: dict[int, Any] = {}
        self._streams: dict[int, Any] = {}
        self._events: dict[int, Any] = {}
        self._modules: dict[int, Any] = {}
        self._functions: dict[int, tuple[int, Any]] = {}  # with the module
        self._numbers = itertools.count(1)  # of events, modules and functions: PyCUDA shows no handle

    def attach(self) -> None:
        """Makes the device usable from the calling thread."""
        _call("push", self._context.push)

    def detach(self) -> None:
        """Undoes `attach`."""
        _call("pop", driver.Context.pop)

    def memory_bytes(self) -> tuple[int, int]:
        """Free and total memory of the device."""
        free, total = _call("mem_get_info", driver.mem_get_info)
        return int(free), int(total)

    def allocate(self, size_bytes: int) -> int:
        """Memory of the device."""
        allocation = _call("mem_alloc", driver.mem_alloc, size_bytes)
        self._allocations[int(allocation)] = allocation
        return int(allocation)

    def free(self, pointer: int) -> None:
        """Gives memory back."""
        _call("free", self._allocations.pop(pointer).free)

    def allocate_pinned(self, size_bytes: int) -> int:
        """Memory of the host."""
        flags = driver.host_alloc_flags.PORTABLE
        room = _call("pagelocked_empty", driver.pagelocked_empty, size_bytes, np.uint8, mem_flags=flags)
        self._pinned[room.ctypes.data] = room
        return int(room.ctypes.data)

    def free_pinned(self, pointer: int) -> None:
        """Gives memory back."""
        _call("free", self._pinned.pop(pointer).base.free)

    def new_stream(self) -> int:
        """A stream."""
        stream = _call("Stream", driver.Stream, 1)  # CU_STREAM_NON_BLOCKING, which PyCUDA has no name for
        self._streams[stream.handle] = stream
        return int(stream.handle)

    def close_stream(self, stream: int) -> None:
        """Gives a stream back."""
        del self._streams[stream]

    def finish(self, stream: int) -> None:
        """Blocks until all work of the stream is done."""
        _call("synchronize", self._streams[stream].synchronize)

    def new_event(self, *, busy_wait: bool = False) -> int:
        """An event."""
        flags = driver.event_flags.DISABLE_TIMING | (0 if busy_wait else driver.event_flags.BLOCKING_SYNC)
        event = next(self._numbers)
        self._events[event] = _call("Event", driver.Event, flags)
        return event

    def close_event(self, event: int) -> None:
        """Gives an event back."""
        del self._events[event]

    def record(self, event: int, stream: int) -> None:
        """The event is done once all work is that is in the stream now."""
        _call("record", self._events[event].record, self._streams[stream])

    def wait(self, stream: int, event: int) -> None:
        """What comes to the stream from now on runs only after the event, as recorded last."""
        _call("wait_for_event", self._streams[stream].wait_for_event, self._events[event])

    def synchronize(self, event: int) -> None:
        """Blocks until the event, as recorded last, is done."""
        _call("synchronize", self._events[event].synchronize)

    def copy_in(self, device_pointer: int, pinned_pointer: int, size_bytes: int, stream: int) -> None:
        """Copies from pinned to device memory."""
        room = _view(pinned_pointer, size_bytes)
        _call("memcpy_htod_async", driver.memcpy_htod_async, device_pointer, room, self._streams[stream])

    def copy_out(self, pinned_pointer: int, device_pointer: int, size_bytes: int, stream: int) -> None:
        """Copies from device to pinned memory."""
        room = _view(pinned_pointer, size_bytes)
        _call("memcpy_dtoh_async", driver.memcpy_dtoh_async, room, device_pointer, self._streams[stream])

    def fill(self, device_pointer: int, byte: int, size_bytes: int, stream: int) -> None:
        """Sets bytes of device memory."""
        _call("memset_d8_async", driver.memset_d8_async, device_pointer, byte, size_bytes, self._streams[stream])

    def load_module(self, binary: bytes) -> int:
        """A cubin, PTX text or a fat binary with the kernels; see `forno.kernels.build`."""
        module = next(self._numbers)
        self._modules[module] = _call("module_from_buffer", driver.module_from_buffer, binary)
        return module

    def unload_module(self, module: int) -> None:
        """Gives a module back."""
        self._functions = {key: (own, kernel) for key, (own, kernel) in self._functions.items() if own != module}
        del self._modules[module]

    def function(self, module: int, name: str) -> int:
        """A kernel of a module."""
        function = next(self._numbers)
        self._functions[function] = (module, _call("get_function", self._modules[module].get_function, name))
        return function

    def launch(
        self, function: int, grid: tuple[int, int, int], block: tuple[int, int, int], arguments: bytes, stream: int
    ) -> None:
        """Runs a kernel."""
        # What `prepared_async_call` does with the arguments once it has packed them.
        kernel = self._functions[function][1]
        _call("_launch_kernel", kernel._launch_kernel, grid, block, arguments, 0, self._streams[stream])  # noqa: SLF001

    def begin_capture(self, stream: int) -> None:
        """PyCUDA has no graphs."""
        raise DeviceError("begin_capture: PyCUDA has no graphs; choose device 'cuda'")

    def end_capture(self, stream: int) -> int:
        """PyCUDA has no graphs."""
        raise DeviceError("end_capture: PyCUDA has no graphs; choose device 'cuda'")

    def replay(self, graph: int, stream: int) -> None:
        """PyCUDA has no graphs."""
        raise DeviceError("replay: PyCUDA has no graphs; choose device 'cuda'")

    def close_graph(self, graph: int) -> None:
        """PyCUDA has no graphs."""
        raise DeviceError("close_graph: PyCUDA has no graphs; choose device 'cuda'")

    def close(self) -> None:
        """Lets go of the device."""
        if self._context is not None:
            _call("detach", self._context.detach)
            self._context = None

    def statistics(self) -> Mapping[str, int]:
        """How many handles are out, by kind."""
        return {
            "allocations": len(self._allocations),
            "pinned": len(self._pinned),
            "streams": len(self._streams),
            "events": len(self._events),
            "modules": len(self._modules),
            "graphs": 0,
        }


def _call(name: str, method: Callable[..., Any], *arguments: Any, **named: Any) -> Any:
    """Calls PyCUDA.

    Raises:
        DeviceError, OutOfDeviceMemory: It raised an error of its own.
    """
    try:
        return method(*arguments, **named)
    except driver.MemoryError as error:
        asked = f": {arguments[0]} bytes asked for" if arguments else ""
        raise OutOfDeviceMemory(f"{name}: out of memory{asked}") from error
    except driver.Error as error:
        raise DeviceError(f"{name} failed: {error}") from error


def _view(pointer: int, size_bytes: int) -> Any:
    return (ctypes.c_char * size_bytes).from_address(pointer)


def open_device(ordinal: int = 0) -> PycudaDevice:
    """Opens a GPU; see `PycudaDevice`."""
    return PycudaDevice(ordinal)
