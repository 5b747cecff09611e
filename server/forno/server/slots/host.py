"""Slots in ordinary memory."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np

from forno.v1.tensors import OBJECT

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forno.server.shapes import Padding
    from forno.server.signature import Signature, TensorSpec

    Array = np.ndarray[Any, np.dtype[Any]]

BORROW_FROM_BYTES = 64 * 1024
"""A lone request of at least this size is read where it lies; below it a copy costs less than what it saves."""


class HostSlot:
    """Buffers for one batch in host memory. Made by an Engine, owned by a Worker; used by one thread at a time.

    Inputs of known row shape have a fixed place for `max_rows` rows; the others share a slab that grows to the largest
    seen; strings are Python objects and need none. A lone request is not copied where that saves something: the
    engine then reads the request's own arrays, if they are aligned and contiguous.

    With padding, `inputs` can have more rows than were asked for (the last one repeated), and the rows more elements
    than their request has.

    Args:
        signature: Its inputs; `batched` says whether axis 0 counts rows, `padding` what is filled up.
        max_rows: Most rows of a batch.
    """

    def __init__(self, signature: Signature, max_rows: int) -> None:
        self.inputs: list[Array] = []
        self.elements = 0  # that run, where there is padding
        self.padded_elements = 0  # of those, the ones that no request has
        self.fixed = False  # whether `inputs` are the leading rows of `places`
        self._padding = signature.padding if signature.batched else None
        self._rows = max_rows  # of the requests that are loaded
        self._run_rows = max_rows  # of `inputs`
        if self._padding is not None:
            max_rows = self._padding.rows_for(max_rows)
        self.places = self.new_places(signature, max_rows)
        self._all_fixed = all(place is not None for place in self.places)
        self._batched = signature.batched
        self._row_bytes = sum(place.nbytes for place in self.places if place is not None) // max_rows
        self._rooms: dict[int, list[Array]] = {}  # of a lone request in fixed places, by its rows
        self._slabs = [np.empty(0, np.uint8)] * len(self.places)

    def new_places(self, signature: Signature, max_rows: int) -> list[Array | None]:
        """Room for `max_rows` rows of each input that has a fixed place."""
        return [_place(spec, signature.batched, max_rows) for spec in signature.inputs]

    def load(self, requests: Sequence[tuple[Array, ...]], rows: int) -> None:
        """Brings the inputs of each request to their places."""
        if self._padding is not None:
            self._load_padded(self._padding, requests, rows)
        elif len(requests) > 1:
            self.fixed = self._all_fixed
            self.inputs = [self._joined(index, parts, rows) for index, parts in enumerate(zip(*requests, strict=True))]
        elif self._all_fixed and self._row_bytes * rows < BORROW_FROM_BYTES:
            self.fixed = True
            rooms = self._rooms.get(rows)
            if rooms is None:
                rooms = self._rooms[rows] = [
                    self.room(i, array.shape, array.dtype) for i, array in enumerate(requests[0])
                ]
            for room, array in zip(rooms, requests[0], strict=True):
                room[...] = array
            self.inputs = rooms
        else:
            self.fixed = False
            self.inputs = [self.readable(index, array) for index, array in enumerate(requests[0])]

    def release(self) -> None:
        """Lets go of everything that belongs to the requests."""
        self.inputs = []

    def own_rows(self, arrays: Sequence[Array]) -> Sequence[Array]:
        """Outputs without the rows that were added."""
        if self._rows == self._run_rows:
            return arrays
        return [array[: self._rows] if array.ndim and array.shape[0] == self._run_rows else array for array in arrays]

    def _load_padded(self, padding: Padding, requests: Sequence[tuple[Array, ...]], rows: int) -> None:
        run_rows = padding.rows_for(rows)
        self._rows, self._run_rows = rows, run_rows
        self.fixed = self._all_fixed
        self.inputs = []
        self.elements = self.padded_elements = 0
        for index, parts in enumerate(zip(*requests, strict=True)):
            shapes = [part.shape[1:] for part in parts]
            shape = padding.run_shape(index, shapes)
            padded = shapes.count(shape) < len(shapes)
            if padded or run_rows > rows:
                array = self._filled(index, parts, (run_rows, *shape), padding.inputs[index].value if padded else None)
            elif len(parts) > 1:
                array = self._joined(index, parts, rows)
            else:
                array = self.copied(index, parts[0]) if self.fixed else self.readable(index, parts[0])
            self.inputs.append(array)
            self.elements += array.size
            self.padded_elements += array.size - sum([part.size for part in parts])

    def _filled(self, index: int, parts: tuple[Array, ...], shape: tuple[int, ...], value: Any) -> Array:
        """The parts one after another, each row filled up with `value`, then the last row again."""
        dtype = parts[0].dtype
        array = np.empty(shape, object) if dtype == OBJECT else self.room(index, shape, dtype)
        if value is not None:
            array[: self._rows] = value
        start = 0
        if len(shape) == 2:  # the usual case, tokens, goes without the general one's slices
            for part in parts:
                rows, size = part.shape
                array[start : start + rows, :size] = part
                start += rows
        else:
            for part in parts:
                end = start + part.shape[0]
                array[(slice(start, end), *map(slice, part.shape[1:]))] = part
                start = end
        array[start:] = array[start - 1]
        return array

    def _joined(self, index: int, parts: tuple[Array, ...], rows: int) -> Array:
        """The parts one after another: [rows, *row shape]."""
        if parts[0].dtype == OBJECT:
            return np.concatenate(parts)
        room = self.room(index, (rows, *parts[0].shape[1:]), parts[0].dtype)
        return np.concatenate(parts, out=room)

    def readable(self, index: int, array: Array) -> Array:
        """The array itself if a runtime may read it, else a copy: message bytes can lie at any address."""
        flags = array.flags
        if flags.c_contiguous and flags.aligned:
            return array
        return self.copied(index, array)

    def copied(self, index: int, array: Array) -> Array:
        """A copy in the slot's own room."""
        if array.dtype == OBJECT:
            return np.array(array, order="C")
        room = self.room(index, array.shape, array.dtype)
        np.copyto(room, array)
        return room

    def room(self, index: int, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
        """Where the input of this batch has its place."""
        place = self.places[index]
        if place is not None:
            return place[: shape[0]] if self._batched else place
        needed_bytes = math.prod(shape) * dtype.itemsize
        slab = self._slabs[index]
        if slab.nbytes < needed_bytes:
            slab = self._slabs[index] = np.empty(needed_bytes, np.uint8)
        return slab[:needed_bytes].view(dtype).reshape(shape)


def _place(spec: TensorSpec, batched: bool, max_rows: int) -> Array | None:
    """Room for `max_rows` rows of the input; None where its row shape is open or it holds strings."""
    shape = (max_rows, *spec.shape[1:]) if batched else spec.shape
    if spec.dtype == OBJECT or any(size < 0 for size in shape):
        return None
    return np.empty(shape, spec.dtype)
