"""Slots around which something is done to images and scores: on the device that the model runs on.

On a GPU the bytes of all images of a batch lie one after another in the slab that is copied in. A kernel makes the
model's input of them, in memory of the device alone, and another finds the best classes: they alone are copied out.
They run before and after what the engine enqueues, in no graph of it: what they are told differs from batch to batch.
"""

from __future__ import annotations

import math
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np

from forno.kernels import host
from forno.kernels.devices import attached
from forno.kernels.library import Kernels
from forno.server.slots.cuda import CudaSlot

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forno.server.processing import Processing
    from forno.server.signature import Signature
    from forno.server.slots import Slot
    from forno.server.slots.cuda import Ring, Tensor
    from forno.server.slots.slabs import Slab

    Array = np.ndarray[Any, np.dtype[Any]]


class HostProcessedSlot:
    """A slot of an engine on the CPU, which is loaded with images. See `Slot`.

    Args:
        inner: What the engine runs.
        processing: What is done before.
        max_rows: Most rows of a batch.
    """

    def __init__(self, inner: Slot, processing: Processing, max_rows: int) -> None:
        self.inner = inner
        self._image = processing.image
        self._room = None if self._image is None else np.empty((max_rows, *self._image.shape), self._image.dtype)

    @property
    def inputs(self) -> Sequence[Array]:
        """What the engine reads."""
        return self.inner.inputs

    @property
    def elements(self) -> int:
        """See `Slot`."""
        return self.inner.elements

    @property
    def padded_elements(self) -> int:
        """See `Slot`."""
        return self.inner.padded_elements

    def load(self, requests: Sequence[tuple[Array, ...]], rows: int) -> None:
        """Makes the model's input of the images."""
        image = self._image
        if image is None or self._room is None:
            self.inner.load(requests, rows)
            return
        at = image.index
        made, start = [], 0
        for request in requests:
            end = start + len(request[at])
            own = self._room[start:end]
            for pixels, out in zip(request[at], own, strict=True):
                window = image.window(*pixels.shape[:2])
                host.image_to_tensor(pixels, out, window, image.scale, image.bias, channels_last=image.channels_last)
            made.append((*request[:at], own, *request[at + 1 :]))
            start = end
        if len(requests[0]) == 1:  # then they are together already
            made = [(self._room[:start],)]
        self.inner.load(made, rows)

    def release(self) -> None:
        """Lets go of everything that belongs to the requests."""
        self.inner.release()


class DeviceProcessedSlot(CudaSlot):
    """A slot that a device's kernels work on before the model and after it. See `CudaSlot`.

    Args:
        processing: What they do.
        kernels: Of the device.
        signature: The model's own.
        max_rows: Most rows of a batch.
        ring: Whose streams carry it.
    """

    def __init__(
        self, processing: Processing, kernels: Kernels, signature: Signature, max_rows: int, ring: Ring
    ) -> None:
        self._image, self._ranking = processing.image, processing.ranking
        self._kernels = kernels
        self._images_at: tuple[int, int, int] = (0, 0, 0)  # bytes, offsets and ways of the images of this batch
        self._scores_at = 0
        self._scores_shape: tuple[int, ...] = ()
        self._scores_dtype = ""
        self._best: list[Tensor] = []  # values and classes, in the slab that is copied out
        super().__init__(signature, max_rows, ring)
        if signature.batched and signature.padding is not None:
            max_rows = signature.padding.rows_for(max_rows)
        if self._image is not None:
            self._room("input", max_rows * math.prod(self._image.shape) * self._image.dtype.itemsize)
        if self._ranking is not None:
            spec = signature.outputs[self._ranking.index]
            self._room("scores", max_rows * self._ranking.classes * spec.dtype.itemsize)

    def place_inputs(self, requests: Sequence[tuple[Array, ...]], rows: int) -> None:
        """Brings the bytes of images to pinned memory, and the other inputs as usual."""
        image = self._image
        if image is None:
            super().place_inputs(requests, rows)
            return
        at = image.index
        nothing = np.empty((rows, 0), image.dtype)
        without, start = [], 0
        for request in requests:
            end = start + len(request[at])
            without.append((*request[:at], nothing[start:end], *request[at + 1 :]))
            start = end
        super().place_inputs(without, rows)
        run_rows = self.inputs[at].shape[0]
        pictures = [picture for request in requests for picture in request[at]]
        self._place_images(pictures, run_rows)
        shape = (run_rows, *image.shape)
        self.inputs[at] = _only_a_shape(shape, image.dtype)
        self.addresses[at] = self._room("input", math.prod(shape) * image.dtype.itemsize).device

    def begin(self) -> None:
        """Enqueues the kernel that makes the model's input of the images."""
        image = self._image
        if image is None:
            return
        bytes_at, offsets_at, ways_at = self._images_at
        self._kernels.image_to_tensor(
            bytes_at,
            offsets_at,
            ways_at,
            self.addresses[image.index],
            count=self.inputs[image.index].shape[0],
            channels=image.channels,
            height=image.height,
            width=image.width,
            scale=image.scale,
            bias=image.bias,
            channels_last=image.channels_last,
            dtype=image.dtype.name,
            stream=self.ring.compute,
        )

    def place_outputs(self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype[Any]]) -> list[Tensor]:
        """Room for the outputs: that of the scores is not copied out, but that of the best of them is."""
        ranking = self._ranking
        if ranking is None:
            return super().place_outputs(shapes, dtypes)
        at = ranking.index
        shape, dtype = shapes[at], dtypes[at]
        best = (shape[0], ranking.k)
        *others, values, classes = super().place_outputs(
            [*shapes[:at], *shapes[at + 1 :], best, best],
            [*dtypes[:at], *dtypes[at + 1 :], np.dtype(np.float32), np.dtype(np.int32)],
        )
        self._best = [values, classes]
        self._scores_shape, self._scores_dtype = shape, dtype.name
        self._scores_at = self._room("scores", math.prod(shape) * dtype.itemsize).device
        return [*others[:at], (_only_a_shape(shape, dtype), self._scores_at), *others[at:]]

    def bring_out(
        self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[np.dtype[Any]], addresses: Sequence[int]
    ) -> list[Array]:
        """As `place_outputs`, for outputs that lie elsewhere on the device."""
        ranking = self._ranking
        if ranking is None:
            return super().bring_out(shapes, dtypes, addresses)
        arrays = [array for array, _ in self.place_outputs(shapes, dtypes)]
        self._scores_at = addresses[ranking.index]
        copied = [*zip(arrays, addresses, strict=True)]
        del copied[ranking.index]
        self.copies_out = [(array.ctypes.data, address, array.nbytes) for array, address in (*copied, *self._best)]
        return arrays

    def end(self, outputs: Sequence[Array]) -> Sequence[Array]:
        """Enqueues the kernel that finds the best classes."""
        ranking = self._ranking
        if ranking is None:
            return outputs
        (values, values_at), (classes, classes_at) = self._best
        self._kernels.softmax_topk(
            self._scores_at,
            values_at,
            classes_at,
            rows=self._scores_shape[0],
            classes=self._scores_shape[1],
            k=ranking.k,
            softmax=ranking.softmax,
            dtype=self._scores_dtype,
            stream=self.ring.compute,
        )
        return [*outputs[: ranking.index], values, *outputs[ranking.index + 1 :], classes]

    def _place_images(self, pictures: Sequence[Array], run_rows: int) -> None:
        """Their bytes, where each begins, and how it comes to its size; the last one again for rows that are added."""
        image = self._image
        if image is None:
            return
        offsets = np.cumsum([0, *[picture.size for picture in pictures]])
        arena, arena_at = self._placed((int(offsets[-1]),), np.dtype(np.uint8))
        for start, picture in zip(offsets.tolist(), pictures, strict=False):
            np.copyto(arena[start : start + picture.size].reshape(picture.shape), picture)
        rows = [*range(len(pictures)), *[len(pictures) - 1] * (run_rows - len(pictures))]
        starts, starts_at = self._placed((run_rows,), np.dtype(np.int64))
        starts[:] = offsets[rows]
        ways, ways_at = self._placed((run_rows, 6), np.dtype(np.int32))
        sizes = [picture.shape[:2] for picture in pictures]
        ways[:] = np.array([(*size, *image.window(*size)) for size in sizes])[rows]
        self._images_at = (arena_at, starts_at, ways_at)

    def _placed(self, shape: tuple[int, ...], dtype: np.dtype[Any]) -> Tensor:
        return self._slab("input_slab", 0).place(shape, dtype)

    def _room(self, name: str, needed_bytes: int) -> Slab:
        """Memory of the device alone, if need be another that is large enough."""
        room = self.rooms.get(name)
        if room is None or room.size_bytes < needed_bytes:
            larger = self.ring.take_slab(needed_bytes, pinned=False)
            if room is not None:
                self.ring.pool.give(room)
            self.rooms[name] = room = larger
        return room


def process(ring: Ring, processing: Processing) -> None:
    """Has a ring make slots that are processed from now on.

    Raises:
        DeviceError, BuildFailed: There are no kernels for the device.
    """
    with attached(ring.device):
        ring.kernels = Kernels(ring.device)
    ring.slot_kind = partial(DeviceProcessedSlot, processing, ring.kernels)


def _only_a_shape(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Array:
    """Stands for what is on the device alone."""
    return np.broadcast_to(np.zeros((), dtype), shape)
