"""Execution contexts: what one slot runs one profile with, and what was told it last, so that it is not told again."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from forno.kernels.devices import Device
    from forno.server.profiles import Shapes

    Key = tuple[int, Shapes]
    Addresses = tuple[int, ...]


class Context:
    """One of TensorRT's execution contexts. Made by a TensorrtEngine; used by one slot at a time.

    TensorRT leaves undefined what a graph does after another shape was told to the context that it was recorded from.
    So a context that records runs has one shape for all of its life.

    Args:
        handle: TensorRT's.
        key: Its profile, and the only shapes that it runs, or () where it runs any.
    """

    def __init__(self, handle: Any, key: Key) -> None:
        self.handle = handle
        self.key = key
        self.shapes: Shapes = ()  # of the inputs, as told last; empty = not known
        self.output_shapes: Shapes = ()  # that follow from them; -1 where only the data decide
        self.addresses: dict[str, int] = {}  # of tensors, as told last
        self.ran_with: Addresses = ()  # the last run, as long as nothing else was told since
        self.graph = 0
        self.graph_addresses: Addresses = ()
        self.rooms: dict[str, Any] = {}  # of outputs whose shape only the data decide

    def forget(self) -> None:
        """Has everything told anew: a call has failed, and what it left behind is not known."""
        self.shapes = self.ran_with = ()
        self.addresses = {}

    def close(self, device: Device) -> None:
        """Gives everything back. Nothing of it may be under way; the thread is attached."""
        if self.graph:
            device.close_graph(self.graph)
        for room in self.rooms.values():
            room.close()
        self.graph, self.rooms, self.handle = 0, {}, None


def output_room_type(module: Any) -> type:
    """The type of what gives TensorRT memory for an output whose size it knows only while it runs."""

    class OutputRoom(module.IOutputAllocator):  # type: ignore[misc]
        """Memory of one output of one context, as large as the largest seen. Called while `execute_async_v3` is."""

        def __init__(self, device: Device) -> None:
            module.IOutputAllocator.__init__(self)
            self._device = device
            self._held_bytes = 0
            self.address = 0
            self.shape: tuple[int, ...] = ()

        def reallocate_output_async(self, _name: str, _memory: int, size_bytes: int, _alignment: int, _: int) -> int:
            """Memory for the output: the device aligns all of it to 256 bytes, as TensorRT asks."""
            if size_bytes > self._held_bytes or not self.address:
                self.close()
                self.address = self._device.allocate(max(size_bytes, 1))
                self._held_bytes = size_bytes
            return self.address

        def notify_shape(self, _name: str, shape: Any) -> None:
            """The shape that has come out."""
            self.shape = tuple([int(shape[axis]) for axis in range(len(shape))])

        def close(self) -> None:
            """Gives the memory back."""
            if self.address:
                self._device.free(self.address)
                self.address = 0

    return OutputRoom
