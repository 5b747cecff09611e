"""Slots on a device: rows come together in pinned memory, and three streams carry them in, through and out.

    thread of an instance    load | enqueue | wait ------------------------->
    stream `come_in`                one copy in
    stream `compute`                            run
    stream `go_out`                                 one copy out

Each run waits on its own thread, without the interpreter's lock; meanwhile those of other instances are loaded, copied
and computed. A batch is one copy each way, however many tensors it has: they lie in one slab, 256 bytes aligned.
"""

from __future__ import annotations

import logging
import math
import threading
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from forno.kernels.devices import DeviceError, attached
from forno.server.errors import ConfigError, EngineLost
from forno.server.slots.host import HostSlot
from forno.server.slots.slabs import ALIGNMENT_BYTES, SlabFull, SlabPool

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence
    from pathlib import Path

    import numpy as np

    from forno.kernels.devices import Device
    from forno.kernels.library import Kernels
    from forno.server.signature import Signature
    from forno.server.slots.slabs import Slab

    Array = np.ndarray[Any, np.dtype[Any]]
    Tensor = tuple[Array, int]  # in pinned memory, and the address of its twin

log = logging.getLogger("forno.device")


class CudaSlot(HostSlot):
    """A slab for inputs and one for outputs. Made by a Ring, owned by a Worker; used by one thread at a time.

    Inputs lie one after another, as this batch has them, so that what is copied is what is used; the same counts of
    rows have the same addresses. A lone request is copied too: only pinned memory is copied by the device itself.

    Args:
        signature: Its inputs, none of which are strings.
        max_rows: Most rows of a batch.
        ring: Whose streams carry it.
    """

    def __init__(self, signature: Signature, max_rows: int, ring: Ring) -> None:
        self.ring = ring
        self.input_slab: Slab | None = None
        self.output_slab: Slab | None = None
        self.rooms: dict[str, Slab] = {}  # memory of the device alone
        self.events: tuple[int, int, int] = ring.take_events()  # inputs are there, outputs are made, outputs are here
        self.addresses: list[int] = []  # of `inputs` on the device
        self.copies_out: list[tuple[int, int, int]] = []  # to pinned, from device, bytes
        self.kept: object = None  # what must live until the outputs are copied
        super().__init__(signature, max_rows)

    def __del__(self) -> None:
        if hasattr(self, "events"):
            self.ring.take_back(self)

    def new_places(self, signature: Signature, max_rows: int) -> list[Array | None]:
        """No input has a fixed place; the slabs are of the size that a full batch needs, as far as that is known."""
        for name, specs in (("input_slab", signature.inputs), ("output_slab", signature.outputs)):
            shapes = [(max_rows, *spec.shape[1:]) if signature.batched else spec.shape for spec in specs]
            sizes = [math.prod(map(abs, shape)) * spec.dtype.itemsize + ALIGNMENT_BYTES
                     for shape, spec in zip(shapes, specs, strict=True)]  # fmt: skip
            if specs:
                self._slab(name, sum(sizes))
        return [None] * len(signature.inputs)

    def load(self, requests: Sequence[tuple[Array, ...]], rows: int) -> None:
        """Brings the inputs of each request to their places in pinned memory."""
        while True:
            slab = self._slab("input_slab", 0)
            slab.used_bytes = 0
            self.addresses = []
            try:
                self.place_inputs(requests, rows)
            except SlabFull as full:
                self._slab("input_slab", full.needed_bytes)
            else:
                return

    def place_inputs(self, requests: Sequence[tuple[Array, ...]], rows: int) -> None:
        """Brings the inputs to the slab, which is empty.

        Raises:
            SlabFull: It is too small.
        """
        super().load(requests, rows)

    def readable(self, index: int, array: Array) -> Array:
        """Always a copy."""
        return self.copied(index, array)

    def room(self, index: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """The next place in the slab."""
        array, address = self._slab("input_slab", 0).place(shape, dtype)
        self.addresses.append(address)
        return array

    def place_outputs(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype[Any]]) -> list[Tensor]:
        """Room for the outputs of this batch, which one copy brings out."""
        needed_bytes = sum(
            math.prod(shape) * dtype.itemsize + ALIGNMENT_BYTES for shape, dtype in zip(shapes, dtypes, strict=True)
        )
        slab = self._slab("output_slab", needed_bytes)
        slab.used_bytes = 0
        tensors = [slab.place(shape, dtype) for shape, dtype in zip(shapes, dtypes, strict=True)]
        self.copies_out = [(slab.pinned, slab.device, slab.used_bytes)]
        return tensors

    def bring_out(
        self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype[Any]], addresses: Sequence[int]
    ) -> list[Array]:
        """As `place_outputs`, for outputs that lie elsewhere on the device: each is copied from there."""
        arrays = [array for array, _ in self.place_outputs(shapes, dtypes)]
        pairs = zip(arrays, addresses, strict=True)
        self.copies_out = [(array.ctypes.data, address, array.nbytes) for array, address in pairs]
        return arrays

    def begin(self) -> None:
        """Enqueues what is to be done to the inputs before the model runs: nothing. Called by `Ring.run`."""

    def end(self, outputs: Sequence[Array]) -> Sequence[Array]:
        """Enqueues what is to be done to the outputs, and returns those that come of it. Called by `Ring.run`."""
        return outputs

    def release(self) -> None:
        """Lets go of everything that belongs to the requests."""
        super().release()
        self.kept = None

    def _slab(self, name: str, needed_bytes: int) -> Slab:
        """That slab, if need be another that is large enough."""
        slab: Slab | None = getattr(self, name)
        if slab is None or slab.size_bytes < needed_bytes:
            larger = self.ring.take_slab(needed_bytes)
            if slab is not None:
                self.ring.pool.give(slab)
            setattr(self, name, larger)
            return larger
        return slab


class Ring:
    """The streams that carry the slots of one engine, and their memory. Made by an engine; ends with `close`.

    Several threads may call `run`, each with a slot of its own. They take turns to enqueue, so that batches come out in
    the order in which they went in, and wait side by side.

    What goes wrong on a device shows in whichever call comes next, so a failure is every batch's that is under way.
    After one, the streams are finished before anybody's memory is used again. Where even that fails, the device is lost
    to this process (an address that is not there, a bus error: the driver then refuses every call), and so is the ring.

    Args:
        device: Where it runs; attached to no thread when a method is called, and closed with the ring.
        limit_bytes: Most memory of the slots, on each side; 0 = as much as there is.
        busy_wait: Whether a thread that waits for its outputs spins.
    """

    def __init__(self, device: Device, limit_bytes: int = 0, *, busy_wait: bool = False) -> None:
        self.device = device
        self.pool = SlabPool(device, limit_bytes)
        self.lost = ""  # why nothing runs any more; empty while it does
        self.slot_kind: Callable[[Signature, int, Ring], CudaSlot] = CudaSlot
        self.kernels: Kernels | None = None  # that its slots launch, if they do
        self._busy_wait = busy_wait
        self._turn = threading.Lock()
        self._events: list[int] = []
        self._idle_events: list[tuple[int, int, int]] = []  # appended to by any thread, without a lock
        self._streams: list[int] = []
        self._closed = False
        try:
            with attached(device):
                for _ in range(3):
                    self._streams.append(device.new_stream())
        except BaseException:
            self.close()
            raise
        self.come_in, self.compute, self.go_out = self._streams

    def check_fits(self, path: Path, model_bytes: int) -> None:
        """Compares a model with the memory that is free. What runs take is known only when they run.

        Raises:
            ConfigError: It is larger.
        """
        with attached(self.device):
            free_bytes, total_bytes = self.device.memory_bytes()
        if model_bytes > free_bytes:
            raise ConfigError(
                f"{path} has {model_bytes} bytes, but of the {total_bytes} bytes of device "
                f"'{self.device.name}:{self.device.ordinal}' only {free_bytes} are free"
            )

    def new_slot(self, signature: Signature, max_rows: int) -> CudaSlot:
        """Buffers for one batch of up to `max_rows` rows.

        Raises:
            OutOfDeviceMemory: They do not fit.
        """
        with attached(self.device):
            return self.slot_kind(signature, max_rows, self)

    def run(self, slot: CudaSlot, enqueue: Callable[[], Sequence[Array]], *, alone: bool = False) -> Sequence[Array]:
        """Copies in, has the model enqueue its work to the stream `compute`, copies out, and waits for that.

        Args:
            slot: What runs; loaded.
            enqueue: Is to place the slot's outputs and return them; they are filled when this returns.
            alone: Whether no other ring of this process may be at work meanwhile; see `Gate`.

        Raises:
            EngineLost: The device can run nothing any more.
        """
        with _gate.alone() if alone else _gate.together():
            return self._run(slot, enqueue)

    def _run(self, slot: CudaSlot, enqueue: Callable[[], Sequence[Array]]) -> Sequence[Array]:
        device = self.device
        inputs_there, outputs_made, outputs_here = slot.events
        slab = slot.input_slab
        if self.lost:
            raise EngineLost(self.lost)
        with attached(device):
            try:
                with self._turn:
                    if slab is not None and slab.used_bytes:
                        device.copy_in(slab.device, slab.pinned, slab.used_bytes, self.come_in)
                    device.record(inputs_there, self.come_in)
                    device.wait(self.compute, inputs_there)
                    slot.begin()
                    outputs = slot.end(enqueue())
                    device.record(outputs_made, self.compute)
                    device.wait(self.go_out, outputs_made)
                    for to, source, size_bytes in slot.copies_out:
                        if size_bytes:
                            device.copy_out(to, source, size_bytes, self.go_out)
                    device.record(outputs_here, self.go_out)
                device.synchronize(outputs_here)
            except BaseException as error:
                self._recover(error)
                raise
        return outputs

    def take_slab(self, size_bytes: int, *, pinned: bool = True) -> Slab:
        """Memory for a slot; see `SlabPool.take`.

        Raises:
            OutOfDeviceMemory: It does not fit.
        """
        with attached(self.device):
            return self.pool.take(size_bytes, pinned=pinned)

    def take_events(self) -> tuple[int, int, int]:
        """Events for a new slot. The thread is attached."""
        if self._idle_events:
            return self._idle_events.pop()
        for busy_wait in (False, False, self._busy_wait):
            self._events.append(self.device.new_event(busy_wait=busy_wait))
        return self._events[-3], self._events[-2], self._events[-1]

    def take_back(self, slot: CudaSlot) -> None:
        """Keeps what a slot that ends had for the next one. On any thread, at any time, without calling the device."""
        for slab in (slot.input_slab, slot.output_slab, *slot.rooms.values()):
            if slab is not None:
                self.pool.give(slab)
        self._idle_events.append(slot.events)

    def finish(self) -> None:
        """Waits for what is under way, as far as the device still answers."""
        with attached(self.device):
            for stream in self._streams:
                with taken_as_it_comes("a stream"):
                    self.device.finish(stream)

    def close(self) -> None:
        """Gives streams, events, all memory and the device back, as far as it still takes them. Idempotent."""
        if self._closed:
            return
        self._closed = True
        self.finish()
        with attached(self.device):
            for stream in self._streams:
                with taken_as_it_comes("a stream"):
                    self.device.close_stream(stream)
            for event in self._events:
                with taken_as_it_comes("an event"):
                    self.device.close_event(event)
            if self.kernels is not None:
                with taken_as_it_comes("kernels"):
                    self.kernels.close()
            with taken_as_it_comes("memory"):
                self.pool.close()
        with taken_as_it_comes("the device"):
            self.device.close()

    def _recover(self, error: BaseException) -> None:
        """Waits for what is under way, before anybody uses the memory again.

        Raises:
            EngineLost: That is impossible.
        """
        try:
            for stream in self._streams:
                self.device.finish(stream)
        except DeviceError as last:
            self.lost = f"device '{self.device.name}:{self.device.ordinal}' is lost to this process: {last}"
            raise EngineLost(self.lost) from error


class Gate:
    """Lets any number of threads in together, or one alone. Any thread.

    A runtime that captures a graph in the driver's global mode, as ONNX Runtime does, has to be alone with the driver:
    some calls of other threads would fail meanwhile, and the capture with them. That is once for each graph.
    """

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._inside = 0
        self._closed = False  # for somebody who is, or wants to be, alone

    @contextmanager
    def together(self) -> Iterator[None]:
        """Waits while somebody is alone."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._inside += 1
        try:
            yield
        finally:
            with self._changed:
                self._inside -= 1
                self._changed.notify_all()

    @contextmanager
    def alone(self) -> Iterator[None]:
        """Waits until all others have left; nobody enters meanwhile."""
        with self._changed:
            self._changed.wait_for(lambda: not self._closed)
            self._closed = True
            self._changed.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            with self._changed:
                self._closed = False
                self._changed.notify_all()


_gate = Gate()  # of this process: graphs are captured against the whole of it


@contextmanager
def taken_as_it_comes(what: str) -> Iterator[None]:
    """What ends goes on ending: a device that is lost takes nothing back, and has nothing left to give."""
    try:
        yield
    except DeviceError as error:
        log.debug("%s could not be given back: %s", what, error)
