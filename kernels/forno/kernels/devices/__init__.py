"""The seam between Forno and what computes: one small protocol, across which only integers and bytes pass.

Pointers, streams, events and functions are integers, so that whoever holds one needs no type of any GPU library, and
runtimes that take raw handles (ONNX Runtime, TensorRT) take these. One file an adapter, imported only when it is asked
for: importing this package needs no GPU, no driver and none of their libraries.
"""

from __future__ import annotations

import importlib
from contextlib import contextmanager
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

NAMES = ("cpu", "cuda", "pycuda")
"""Adapters: this CPU, NVIDIA's cuda-bindings, and PyCUDA."""


class DeviceError(Exception):
    """A device call failed; the text names the call, what the device said, and what was asked."""


class DeviceUnavailable(DeviceError):
    """There is no such device here; the text is one line that says what is missing and what to do."""


class OutOfDeviceMemory(DeviceError):
    """An allocation does not fit; the text says how much was asked for and how much is free."""


class Device(Protocol):
    """One device as seen by one process. Made by `open_device`; any thread within `attached`; ends with `close`.

    All work is asynchronous and goes to a stream: operations of one stream run in order, those of different streams in
    any, but for what `wait` orders. Errors of work under way show in a later call. Every handle is an integer of this
    device, is not 0, and is given back by the method that the one which made it names.
    """

    name: str  # of the adapter, one of NAMES
    ordinal: int  # which of the devices
    architecture: str  # what kernels are built for: "cpu", "sm_90"
    bus_id: str  # its place on the PCI bus, such as "0000:65:00.0"; empty where it has none
    description: str  # all that measurements depend on: "NVIDIA H200, 132 multiprocessors, driver 13"
    has_graphs: bool  # whether `begin_capture` and what follows work

    def attach(self) -> None:
        """Makes the device usable from the calling thread, until `detach`; see `attached`."""

    def detach(self) -> None:
        """Undoes `attach`. A thread must not end before."""

    def memory_bytes(self) -> tuple[int, int]:
        """Free and total memory of the device."""

    def allocate(self, size_bytes: int) -> int:
        """Memory of the device, aligned to 256 bytes, of any content; ends with `free`.

        Raises:
            OutOfDeviceMemory: It does not fit.
        """

    def free(self, pointer: int) -> None:
        """Gives memory back. Nothing that uses it may be under way."""

    def allocate_pinned(self, size_bytes: int) -> int:
        """Memory of the host that the device copies from and to by itself; ends with `free_pinned`.

        Raises:
            OutOfDeviceMemory: It does not fit.
        """

    def free_pinned(self, pointer: int) -> None:
        """Gives memory back. Nothing that uses it may be under way."""

    def new_stream(self) -> int:
        """A stream that does not wait for the default one; ends with `close_stream`."""

    def close_stream(self, stream: int) -> None:
        """Gives a stream back. Nothing may be under way in it."""

    def finish(self, stream: int) -> None:
        """Blocks until all work of the stream is done, without holding the interpreter's lock."""

    def new_event(self, *, busy_wait: bool = False) -> int:
        """An event, done until it is first recorded; ends with `close_event`.

        Args:
            busy_wait: Whether `synchronize` spins: some microseconds sooner, for a core.
        """

    def close_event(self, event: int) -> None:
        """Gives an event back."""

    def record(self, event: int, stream: int) -> None:
        """The event is done once all work is that is in the stream now."""

    def wait(self, stream: int, event: int) -> None:
        """What comes to the stream from now on runs only after the event, as recorded last."""

    def synchronize(self, event: int) -> None:
        """Blocks until the event, as recorded last, is done, without holding the interpreter's lock."""

    def copy_in(self, device_pointer: int, pinned_pointer: int, size_bytes: int, stream: int) -> None:
        """Copies from pinned to device memory."""

    def copy_out(self, pinned_pointer: int, device_pointer: int, size_bytes: int, stream: int) -> None:
        """Copies from device to pinned memory."""

    def fill(self, device_pointer: int, byte: int, size_bytes: int, stream: int) -> None:
        """Sets bytes of device memory."""

    def load_module(self, binary: bytes) -> int:
        """Kernels built for `architecture`; ends with `unload_module`."""

    def unload_module(self, module: int) -> None:
        """Gives a module and its functions back. None of them may be under way."""

    def function(self, module: int, name: str) -> int:
        """A kernel of a module, for as long as the module lives."""

    def launch(
        self, function: int, grid: tuple[int, int, int], block: tuple[int, int, int], arguments: bytes, stream: int
    ) -> None:
        """Runs a kernel.

        Args:
            function: Which.
            grid: Blocks along x, y and z; none is 0.
            block: Threads of each.
            arguments: As the C structure of the kernel's parameters would lie in memory, up to its last member.
            stream: Where it runs.
        """

    def begin_capture(self, stream: int) -> None:
        """What the calling thread gives to the stream from now on is kept for `replay` and does not run."""

    def end_capture(self, stream: int) -> int:
        """What was given since `begin_capture`, as a graph; ends with `close_graph`."""

    def replay(self, graph: int, stream: int) -> None:
        """Runs a graph, with the same pointers as when it was captured."""

    def close_graph(self, graph: int) -> None:
        """Gives a graph back."""

    def close(self) -> None:
        """Lets go of the device; all handles must have been given back. Idempotent."""

    def statistics(self) -> Mapping[str, int]:
        """How many handles are out, by kind: `allocations`, `pinned`, `streams`, `events`, `modules`, `graphs`."""


@contextmanager
def attached(device: Device) -> Iterator[None]:
    """The device is usable from the calling thread within."""
    device.attach()
    try:
        yield
    finally:
        device.detach()


def open_device(name: str, ordinal: int = 0) -> Device:
    """Opens a device, which is attached to no thread.

    Raises:
        DeviceUnavailable: There is none of that name and number here.
    """
    if name not in NAMES:
        raise DeviceUnavailable(f"there is no device '{name}', expected one of {', '.join(NAMES)}")
    module = importlib.import_module(f"forno.kernels.devices.{name}")
    device: Device = module.open_device(ordinal)
    return device
