"""An NVIDIA GPU through NVIDIA's own cuda-bindings: the driver's calls under their C names, without the GIL.

All of it happens in the device's primary context, the one that ONNX Runtime and TensorRT use too: handles of another
would be of no use to them.
"""

from __future__ import annotations

import ctypes
from collections import Counter
from typing import TYPE_CHECKING, Any

from forno.kernels.devices import DeviceError, DeviceUnavailable, OutOfDeviceMemory

try:
    from cuda.bindings import driver
except ImportError as error:
    raise DeviceUnavailable(
        "device 'cuda' needs NVIDIA's cuda-bindings; install it: pip install 'forno[gpu]'"
    ) from error

if TYPE_CHECKING:
    from collections.abc import Mapping

_END, _POINTER_FOLLOWS, _SIZE_FOLLOWS = 0, 1, 2  # CU_LAUNCH_PARAM_END and the next; a test compares
_PORTABLE = driver.CU_MEMHOSTALLOC_PORTABLE
_SUCCESS = driver.CUresult.CUDA_SUCCESS
_OUT_OF_MEMORY = driver.CUresult.CUDA_ERROR_OUT_OF_MEMORY
_MAJOR = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR
_MINOR = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR
_MULTIPROCESSORS = driver.CUdevice_attribute.CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT
_NAME_BYTES = 256
_NON_BLOCKING = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
_EVENT_FLAGS = driver.CUevent_flags.CU_EVENT_DISABLE_TIMING
_EVENT_BLOCKS = driver.CUevent_flags.CU_EVENT_BLOCKING_SYNC
_BUS_ID_BYTES = 16
_THREAD_LOCAL = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL


class CudaDevice:
    """See `Device`.

    Args:
        ordinal: Which GPU, as the driver counts them (CUDA_VISIBLE_DEVICES applies).

    Raises:
        DeviceUnavailable: There is no driver, or no such GPU.
    """

    name = "cuda"
    has_graphs = True

    def __init__(self, ordinal: int = 0) -> None:
        self.ordinal = ordinal
        self._out: Counter[str] = Counter(allocations=0, pinned=0, streams=0, events=0, modules=0, graphs=0)
        self._device = _found(ordinal)
        self._context: Any = _call("cuDevicePrimaryCtxRetain", self._device)
        major = _call("cuDeviceGetAttribute", _MAJOR, self._device)
        minor = _call("cuDeviceGetAttribute", _MINOR, self._device)
        self.architecture = f"sm_{major}{minor}"
        self.bus_id = _call("cuDeviceGetPCIBusId", _BUS_ID_BYTES, self._device).split(b"\0")[0].decode().lower()
        name = _call("cuDeviceGetName", _NAME_BYTES, self._device).partition(b"\0")[0].decode()
        multiprocessors = _call("cuDeviceGetAttribute", _MULTIPROCESSORS, self._device)
        driver_major = _call("cuDriverGetVersion") // 1000
        self.description = f"{name}, {multiprocessors} multiprocessors, driver {driver_major}"

    def attach(self) -> None:
        """Makes the device usable from the calling thread."""
        _call("cuCtxPushCurrent", self._context)

    def detach(self) -> None:
        """Undoes `attach`."""
        _call("cuCtxPopCurrent")

    def memory_bytes(self) -> tuple[int, int]:
        """Free and total memory of the device."""
        free, total = _call("cuMemGetInfo")
        return int(free), int(total)

    def allocate(self, size_bytes: int) -> int:
        """Memory of the device."""
        pointer = int(_call("cuMemAlloc", size_bytes))
        self._out["allocations"] += 1
        return pointer

    def free(self, pointer: int) -> None:
        """Gives memory back."""
        _call("cuMemFree", pointer)
        self._out["allocations"] -= 1

    def allocate_pinned(self, size_bytes: int) -> int:
        """Memory of the host."""
        pointer = int(_call("cuMemHostAlloc", size_bytes, _PORTABLE))
        self._out["pinned"] += 1
        return pointer

    def free_pinned(self, pointer: int) -> None:
        """Gives memory back."""
        _call("cuMemFreeHost", pointer)
        self._out["pinned"] -= 1

    def new_stream(self) -> int:
        """A stream."""
        stream = int(_call("cuStreamCreate", _NON_BLOCKING.value))
        self._out["streams"] += 1
        return stream

    def close_stream(self, stream: int) -> None:
        """Gives a stream back."""
        _call("cuStreamDestroy", stream)
        self._out["streams"] -= 1

    def finish(self, stream: int) -> None:
        """Blocks until all work of the stream is done."""
        _call("cuStreamSynchronize", stream)

    def new_event(self, *, busy_wait: bool = False) -> int:
        """An event."""
        flags = _EVENT_FLAGS.value | (0 if busy_wait else _EVENT_BLOCKS.value)
        event = int(_call("cuEventCreate", flags))
        self._out["events"] += 1
        return event

    def close_event(self, event: int) -> None:
        """Gives an event back."""
        _call("cuEventDestroy", event)
        self._out["events"] -= 1

    def record(self, event: int, stream: int) -> None:
        """The event is done once all work is that is in the stream now."""
        _call("cuEventRecord", event, stream)

    def wait(self, stream: int, event: int) -> None:
        """What comes to the stream from now on runs only after the event, as recorded last."""
        _call("cuStreamWaitEvent", stream, event, 0)

    def synchronize(self, event: int) -> None:
        """Blocks until the event, as recorded last, is done."""
        _call("cuEventSynchronize", event)

    def copy_in(self, device_pointer: int, pinned_pointer: int, size_bytes: int, stream: int) -> None:
        """Copies from pinned to device memory."""
        _call("cuMemcpyHtoDAsync", device_pointer, pinned_pointer, size_bytes, stream)

    def copy_out(self, pinned_pointer: int, device_pointer: int, size_bytes: int, stream: int) -> None:
        """Copies from device to pinned memory."""
        _call("cuMemcpyDtoHAsync", pinned_pointer, device_pointer, size_bytes, stream)

    def fill(self, device_pointer: int, byte: int, size_bytes: int, stream: int) -> None:
        """Sets bytes of device memory."""
        _call("cuMemsetD8Async", device_pointer, byte, size_bytes, stream)

    def load_module(self, binary: bytes) -> int:
        """A cubin, PTX text or a fat binary with the kernels; see `forno.kernels.build`."""
        module = int(_call("cuModuleLoadData", binary))
        self._out["modules"] += 1
        return module

    def unload_module(self, module: int) -> None:
        """Gives a module back."""
        _call("cuModuleUnload", module)
        self._out["modules"] -= 1

    def function(self, module: int, name: str) -> int:
        """A kernel of a module."""
        return int(_call("cuModuleGetFunction", module, name.encode()))

    def launch(
        self, function: int, grid: tuple[int, int, int], block: tuple[int, int, int], arguments: bytes, stream: int
    ) -> None:
        """Runs a kernel."""
        room = ctypes.c_char_p(arguments)  # the very bytes, which the driver reads before it returns
        size = ctypes.c_size_t(len(arguments))
        extra = (ctypes.c_void_p * 5)(
            _POINTER_FOLLOWS, ctypes.cast(room, ctypes.c_void_p), _SIZE_FOLLOWS, ctypes.addressof(size), _END
        )
        _call("cuLaunchKernel", function, *grid, *block, 0, stream, 0, ctypes.addressof(extra))

    def begin_capture(self, stream: int) -> None:
        """What the calling thread gives to the stream from now on is kept for `replay` and does not run."""
        _call("cuStreamBeginCapture", stream, _THREAD_LOCAL)

    def end_capture(self, stream: int) -> int:
        """What was given since `begin_capture`."""
        captured = _call("cuStreamEndCapture", stream)
        try:
            graph = int(_call("cuGraphInstantiate", captured, 0))
        finally:
            _call("cuGraphDestroy", captured)
        self._out["graphs"] += 1
        return graph

    def replay(self, graph: int, stream: int) -> None:
        """Runs a graph."""
        _call("cuGraphLaunch", graph, stream)

    def close_graph(self, graph: int) -> None:
        """Gives a graph back."""
        _call("cuGraphExecDestroy", graph)
        self._out["graphs"] -= 1

    def close(self) -> None:
        """Lets go of the device."""
        if self._context is not None:
            self._context = None
            _call("cuDevicePrimaryCtxRelease", self._device)

    def statistics(self) -> Mapping[str, int]:
        """How many handles are out, by kind."""
        return dict(self._out)


def _call(name: str, *arguments: Any) -> Any:
    """Calls the driver.

    Raises:
        DeviceError, OutOfDeviceMemory: It said anything but success.
    """
    status, *values = getattr(driver, name)(*arguments)
    if status == _SUCCESS:
        return values[0] if len(values) == 1 else values
    if status == _OUT_OF_MEMORY:
        asked = f": {arguments[0]} bytes asked for" if arguments and isinstance(arguments[0], int) else ""
        raise OutOfDeviceMemory(f"{name}: out of memory{asked}")
    raise DeviceError(f"{name} failed: {_meaning(status)}")


def _meaning(status: Any) -> str:
    failed, text = driver.cuGetErrorString(status)
    return f"{status.name}, {text.decode()}" if failed == _SUCCESS else str(status.name)


def _found(ordinal: int) -> Any:
    """The driver's handle of the GPU."""
    try:
        _call("cuInit", 0)
        count = _call("cuDeviceGetCount")
    except (DeviceError, RuntimeError) as error:  # cuda-bindings raises RuntimeErrors where there is no driver at all
        why = " ".join(str(error).split())
        raise DeviceUnavailable(f"there is no device 'cuda:{ordinal}': no usable NVIDIA driver ({why})") from error
    if ordinal >= count:
        raise DeviceUnavailable(f"there is no device 'cuda:{ordinal}'; this machine shows {count} to this process")
    return _call("cuDeviceGet", ordinal)


def open_device(ordinal: int = 0) -> CudaDevice:
    """Opens a GPU; see `CudaDevice`."""
    return CudaDevice(ordinal)
