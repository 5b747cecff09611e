"""Arrays through kernels on any device: what the tests of kernels share."""

from __future__ import annotations

import ctypes
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from forno.kernels.library import Kernels

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

    from forno.kernels.devices import Device

    Array = np.ndarray[Any, np.dtype[Any]]


class KernelBench:
    """A device with its kernels and one stream. Used by one test at a time."""

    def __init__(self, device: Device, cache: Path | None = None) -> None:
        self.device = device
        self.kernels = Kernels(device, cache)
        self.stream = device.new_stream()

    def close(self) -> None:
        self.device.close_stream(self.stream)
        self.kernels.close()

    @contextmanager
    def on_device(self, *arrays: Array) -> Iterator[list[int]]:
        """Device memory with the arrays' contents; afterwards the arrays hold what the memory holds."""
        device, stream = self.device, self.stream
        sizes = [max(array.nbytes, 1) for array in arrays]
        pointers, pinned = [device.allocate(size) for size in sizes], [device.allocate_pinned(size) for size in sizes]
        try:
            for array, pointer, host in zip(arrays, pointers, pinned, strict=True):
                ctypes.memmove(host, np.ascontiguousarray(array).tobytes(), array.nbytes)
                device.copy_in(pointer, host, array.nbytes, stream)
            yield pointers
            for array, pointer, host in zip(arrays, pointers, pinned, strict=True):
                device.copy_out(host, pointer, array.nbytes, stream)
            device.finish(stream)
            for array, host in zip(arrays, pinned, strict=True):
                if array.flags.writeable:
                    read = np.frombuffer(ctypes.string_at(host, array.nbytes), np.uint8)
                    array.reshape(-1).view(np.uint8)[:] = read
        finally:
            device.finish(stream)
            for pointer, host in zip(pointers, pinned, strict=True):
                device.free(pointer)
                device.free_pinned(host)

    def image_to_tensor(
        self, images: list[Array], height: int, width: int, scale: Any, bias: Any, *, antialias: bool = True,
        dtype: str, windows: Any = None, channels_last: bool = False,
    ) -> Array:  # fmt: skip
        channels = len(scale)
        arena = np.concatenate([image.ravel() for image in images] or [np.zeros(0, np.uint8)])
        ends = np.cumsum([image.size for image in images])
        offsets = np.array([0, *ends[:-1]], np.int64)[: len(images)]
        windows = windows or [(height, width, 0, 0)] * len(images)
        pairs = zip(images, windows, strict=True)
        ways = np.array([(*image.shape[:2], *window) for image, window in pairs], np.int32)
        shape = (height, width, channels) if channels_last else (channels, height, width)
        out = np.empty((len(images), *shape), dtype)
        with self.on_device(arena, offsets, ways, out) as (arena_at, offsets_at, ways_at, out_at):
            self.kernels.image_to_tensor(
                arena_at, offsets_at, ways_at, out_at,
                count=len(images), channels=channels, height=height, width=width, scale=scale, bias=bias,
                antialias=antialias, channels_last=channels_last, dtype=dtype, stream=self.stream,
            )  # fmt: skip
        return out

    def pack_rows(self, rows: list[Array], width: int, fill: Any, mask_bytes: int) -> tuple[Array, Array]:
        dtype = rows[0].dtype if rows else np.dtype(np.int64)
        arena, offsets = joined(rows, dtype)
        out = np.empty((len(rows), width), dtype)
        mask = np.empty((len(rows), width), f"i{mask_bytes}" if mask_bytes else "i1")
        bits = int.from_bytes(np.array(fill, dtype).tobytes(), "little")
        with self.on_device(arena, offsets, out, mask) as (arena_at, offsets_at, out_at, mask_at):
            self.kernels.pack_rows(
                arena_at, offsets_at, out_at, rows=len(rows), width=width, element_bytes=dtype.itemsize, fill=bits,
                stream=self.stream, mask=mask_at if mask_bytes else 0, mask_bytes=mask_bytes,
            )  # fmt: skip
        return out, mask

    def unpack_rows(self, padded: Array, lengths: list[int]) -> Array:
        offsets = np.array([0, *np.cumsum(lengths)], np.int64)
        arena = np.empty(int(offsets[-1]), padded.dtype)
        with self.on_device(padded, offsets, arena) as (padded_at, offsets_at, arena_at):
            self.kernels.unpack_rows(
                padded_at, offsets_at, arena_at, rows=len(lengths), width=padded.shape[1],
                element_bytes=padded.itemsize, stream=self.stream,
            )  # fmt: skip
        return arena

    def scatter_rows(self, rows: Array, places: list[int], to: Array) -> Array:
        result = to.copy()
        with self.on_device(rows, np.array(places, np.int32), result) as (rows_at, places_at, result_at):
            self.kernels.scatter_rows(
                rows_at, places_at, result_at,
                rows=len(rows), to_rows=len(to), row_bytes=rows[:1].nbytes, stream=self.stream,
            )  # fmt: skip
        return result

    def softmax_topk(self, logits: Array, k: int, *, softmax: bool) -> tuple[Array, Array]:
        rows, classes = logits.shape
        values, indices = np.empty((rows, k), np.float32), np.empty((rows, k), np.int32)
        with self.on_device(logits, values, indices) as (logits_at, values_at, indices_at):
            self.kernels.softmax_topk(
                logits_at, values_at, indices_at, rows=rows, classes=classes, k=k, softmax=softmax,
                dtype=logits.dtype.name, stream=self.stream,
            )  # fmt: skip
        return values, indices

    def mean_pool(self, hidden: Array, mask: Array, *, normalise: bool) -> Array:
        rows, tokens, dims = hidden.shape
        out = np.empty((rows, dims), np.float32)
        with self.on_device(hidden, mask, out) as (hidden_at, mask_at, out_at):
            self.kernels.mean_pool(
                hidden_at, mask_at, out_at, rows=rows, tokens=tokens, dims=dims, normalise=normalise,
                dtype=hidden.dtype.name, stream=self.stream,
            )  # fmt: skip
        return out

    def cast(self, array: Array, dtype: Any) -> Array:
        out = np.empty(array.shape, dtype)
        with self.on_device(array, out) as (array_at, out_at):
            self.kernels.cast(
                array_at, out_at, elements=array.size, source_dtype=array.dtype.name, target_dtype=out.dtype.name,
                stream=self.stream,
            )  # fmt: skip
        return out


def joined(rows: list[Array], dtype: Any) -> tuple[Array, Array]:
    """Rows one after another, and where each begins and the last ends."""
    offsets = np.array([0, *np.cumsum([len(row) for row in rows])], np.int64)
    return np.concatenate(rows or [np.zeros(0, dtype)]), offsets
