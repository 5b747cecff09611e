"""What a device can do by itself: copies, fills and each kernel, in gigabytes a second."""

from __future__ import annotations

import ctypes
import statistics
import time
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import numpy as np

from forno.kernels.devices import attached
from forno.kernels.library import Kernels

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forno.kernels.devices import Device

_REPEATS = 7


def copies(device: Device, most_bytes: int) -> dict[str, dict[str, float]]:
    """Gigabytes a second into the device, out of it, and both at once, by the bytes of one copy."""
    found: dict[str, dict[str, float]] = {"in": {}, "out": {}, "both at once, each": {}}
    size_bytes = 64 * 1024
    with attached(device):
        while size_bytes <= most_bytes:
            with _rooms(device, size_bytes) as (pinned, other, near, far, stream, second):

                def come_in(to: int = near, source: int = pinned, size: int = size_bytes, way: int = stream) -> None:
                    device.copy_in(to, source, size, way)

                def go_out(to: int = other, source: int = far, size: int = size_bytes, way: int = second) -> None:
                    device.copy_out(to, source, size, way)

                ways = {"in": (come_in,), "out": (go_out,), "both at once, each": (come_in, go_out)}
                for name, calls in ways.items():
                    seconds = _seconds(device, (stream, second), calls)
                    found[name][str(size_bytes)] = round(size_bytes / seconds / 1e9, 3)
            size_bytes *= 16
    return found


def kernels(device: Device, rows: int) -> dict[str, dict[str, float]]:
    """Each kernel on many rows: bytes that it must read and write, and gigabytes of those a second.

    `fill` is the driver's own, which only writes: what the others can be held to.
    """
    images, side, classes, tokens, dims, width = rows, 256, 1000, 128, 384, 128
    sizes = {  # bytes of what is read, and of what is written
        "fill": (0, rows * tokens * dims * 4),
        "image_to_tensor_f16": (images * side * side * 3, images * 224 * 224 * 3 * 2),
        "softmax_topk_f32": (rows * classes * 4, rows * 5 * 8),
        "mean_pool_f16": (rows * tokens * dims * 2, rows * dims * 4),
        "pack_rows_u64": (rows * width * 8, 2 * rows * width * 8),
        "scatter_rows_u128": (rows * tokens * dims * 4, rows * tokens * dims * 4),
        "cast_f32_f16": (rows * tokens * dims * 4, rows * tokens * dims * 2),
    }
    found = {}
    with attached(device):
        library = Kernels(device)
        room_bytes = max(max(pair) for pair in sizes.values())
        with _rooms(device, room_bytes) as (pinned, _, near, far, stream, _second):
            index = np.ctypeslib.as_array((ctypes.c_int64 * (rows * tokens)).from_address(pinned))
            index_at = device.allocate(index.nbytes)

            def put(values: Any) -> None:
                index.reshape(-1).view(np.uint8)[: values.nbytes] = values.reshape(-1).view(np.uint8)
                device.copy_in(index_at, pinned, index.nbytes, stream)
                device.finish(stream)

            device.fill(near, 0, room_bytes, stream)
            image_places = np.empty(images * 4, np.int64)  # offsets, then of each three pairs of numbers: see `ways`
            image_places[:images] = np.arange(images) * side * side * 3
            image_places[images:].reshape(images, 3)[:] = (side << 32 | side, 224 << 32 | 224, 0)
            runs: dict[str, tuple[Any, Callable[[], None]]] = {
                "fill": (np.zeros(1, np.int64), lambda: device.fill(far, 1, sizes["fill"][1], stream)),
                "image_to_tensor_f16": (
                    image_places,
                    lambda: library.image_to_tensor(
                        near, index_at, index_at + 8 * images, far, count=images, channels=3, height=224, width=224,
                        scale=(0.017,) * 3, bias=(-2.0,) * 3, dtype="float16", stream=stream,
                    ),
                ),
                "softmax_topk_f32": (
                    np.zeros(1, np.int64),
                    lambda: library.softmax_topk(
                        near, far, far + rows * 20, rows=rows, classes=classes, k=5, softmax=True, dtype="float32",
                        stream=stream,
                    ),
                ),
                "mean_pool_f16": (
                    np.ones(rows * tokens, np.int64),
                    lambda: library.mean_pool(
                        near, index_at, far, rows=rows, tokens=tokens, dims=dims, normalise=True, dtype="float16",
                        stream=stream,
                    ),
                ),
                "pack_rows_u64": (
                    np.arange(rows + 1, dtype=np.int64) * width,
                    lambda: library.pack_rows(
                        near, index_at, far, rows=rows, width=width, element_bytes=8, fill=0, stream=stream,
                        mask=far + rows * width * 8, mask_bytes=8,
                    ),
                ),
                "scatter_rows_u128": (
                    np.arange(rows, dtype=np.int32)[::-1].copy(),
                    lambda: library.scatter_rows(
                        near, index_at, far, rows=rows, to_rows=rows, row_bytes=tokens * dims * 4, stream=stream
                    ),
                ),
                "cast_f32_f16": (
                    np.zeros(1, np.int64),
                    lambda: library.cast(
                        near, far, elements=rows * tokens * dims, source_dtype="float32", target_dtype="float16",
                        stream=stream,
                    ),
                ),
            }  # fmt: skip
            for name, (values, run) in runs.items():
                put(values)
                moved = sum(sizes[name])
                seconds = _seconds(device, (stream,), (run,))
                found[name] = {
                    "bytes": moved,
                    "us": round(seconds * 1e6, 1),
                    "gb_per_s": round(moved / seconds / 1e9, 3),
                }
            device.free(index_at)
        library.close()
    return found


def _seconds(device: Device, streams: tuple[int, ...], calls: tuple[Callable[[], None], ...]) -> float:
    """The median time of all calls side by side, from the first call to the end of the last work."""
    times = []
    for _ in range(_REPEATS + 1):
        began = time.perf_counter()
        for call in calls:
            call()
        for stream in streams:
            device.finish(stream)
        times.append(time.perf_counter() - began)
    return statistics.median(times[1:])  # the first one loads


@contextmanager
def _rooms(device: Device, size_bytes: int) -> Iterator[tuple[int, int, int, int, int, int]]:
    pinned, other = device.allocate_pinned(size_bytes), device.allocate_pinned(size_bytes)
    near, far = device.allocate(size_bytes), device.allocate(size_bytes)
    streams = device.new_stream(), device.new_stream()
    try:
        yield (pinned, other, near, far, *streams)
    finally:
        for stream in streams:
            device.finish(stream)
            device.close_stream(stream)
        for pointer in (near, far):
            device.free(pointer)
        for pointer in (pinned, other):
            device.free_pinned(pointer)
