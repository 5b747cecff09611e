"""The kernels as methods: pointers and shapes in, work in a stream out.

What each computes is said in NumPy by the function of its name in `forno.kernels.reference`.
"""

from __future__ import annotations

import ctypes
from ctypes import c_float, c_int32, c_int64, c_uint8, c_uint16, c_uint32, c_uint64, c_void_p
from typing import TYPE_CHECKING, Any

from forno.kernels.build import kernels_for

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from forno.kernels.devices import Device

MOST_PIXELS = 32767
"""Longest side of an image, before and after."""
MOST_CHANNELS = 4
_BLOCK = 256
_WARP = 32
_MOST_BLOCKS = 1 << 20  # along x, and the loops in the kernels do the rest
_MOST_BLOCKS_Y = 65535
_SHORT = {"float16": "f16", "bfloat16": "bf16", "float32": "f32"}
_UNITS = {1: c_uint8, 2: c_uint16, 4: c_uint32, 8: c_uint64}


class Normalise(ctypes.Structure):
    """What a channel's value is multiplied by, and what is then added to it."""

    _fields_ = (("scale", c_float * MOST_CHANNELS), ("bias", c_float * MOST_CHANNELS))


class Kernels:
    """The kernels of one device. Used by threads that are attached to it; ends with `close`.

    All methods put work into a stream and return at once. Where a shape is wrong they raise ValueError; what lies in
    memory (offsets, places, sizes) they do not see.

    Args:
        device: Where they run.
        cache: Folder where built kernels are kept; see `forno.kernels.build.kernels_for`, also for what it raises.
    """

    def __init__(self, device: Device, cache: Path | None = None) -> None:
        self._device = device
        self._module = device.load_module(kernels_for(device.architecture, cache))
        self._functions: dict[str, int] = {}

    def image_to_tensor(
        self,
        images: int,
        offsets: int,
        ways: int,
        out: int,
        *,
        count: int,
        channels: int,
        height: int,
        width: int,
        scale: Sequence[float],
        bias: Sequence[float],
        dtype: str,
        stream: int,
        antialias: bool = True,
        channels_last: bool = False,
    ) -> None:
        """Resizes (bilinear, half-pixel centres), crops and normalises images of uint8 [height, width, channels].

        Args:
            images: uint8; the images, anywhere in it.
            offsets: int64 [count]; where each begins.
            ways: int32 [count, 6]; for each its height and width, the height and width that it is resized to, and
                there the top and the left of the window that is made of it. Sides are 1 to MOST_PIXELS.
            out: [count, channels, height, width], or with `channels_last` [count, height, width, channels].
            count: Of images.
            channels: Of each, 1 to MOST_CHANNELS.
            height: Of what comes out, 1 to MOST_PIXELS.
            width: The same.
            scale: For each channel, what a value of 0 to 255 is multiplied by.
            bias: For each channel, what is added then.
            dtype: Of what comes out, float16 or float32.
            stream: Where it runs.
            antialias: Whether what is made smaller is a mean of all of its pixels, as Pillow does, or of the two
                nearest along each axis, as OpenCV does.
            channels_last: Which of the two orders comes out.
        """
        _expect("channels", channels, 1, MOST_CHANNELS)
        _expect("height", height, 1, MOST_PIXELS)
        _expect("width", width, 1, MOST_PIXELS)
        if len(scale) != channels or len(bias) != channels:
            raise ValueError(f"{len(scale)} scales and {len(bias)} biases for {channels} channels")
        floats = c_float * MOST_CHANNELS
        arguments = (
            *(c_void_p(images), c_void_p(offsets), c_void_p(ways), c_void_p(out), c_int32(count), c_int32(channels)),
            *(c_int32(height), c_int32(width), c_int32(antialias), c_int32(channels_last)),
            Normalise(floats(*scale), floats(*bias)),
        )
        self._along_rows(f"image_to_tensor_{_float(dtype)}", count, height * width, arguments, stream)

    def pack_rows(
        self,
        arena: int,
        offsets: int,
        out: int,
        *,
        rows: int,
        width: int,
        element_bytes: int,
        fill: int,
        stream: int,
        mask: int = 0,
        mask_bytes: int = 0,
    ) -> None:
        """Rows of different lengths to a padded batch.

        Args:
            arena: Elements of all rows, one row after another.
            offsets: int64 [rows + 1]; where each begins, and where the last ends.
            out: [rows, width].
            rows: Of the batch; one that ends where it begins is all padding.
            width: Of the batch; what is longer is cut off.
            element_bytes: 1, 2, 4 or 8.
            fill: What the padding is made of, as an unsigned integer of an element's bits.
            stream: Where it runs.
            mask: [rows, width], 1 where there is an element of a row and 0 elsewhere; 0 = none wanted.
            mask_bytes: Of an integer of the mask: 1, 4 or 8.
        """
        if bool(mask) != bool(mask_bytes) or mask_bytes not in {0, 1, 4, 8}:
            raise ValueError(f"a mask at {mask:#x} of integers of {mask_bytes} bytes, expected 1, 4 or 8, or no mask")
        unit = _unit(element_bytes)
        arguments = (
            *(c_void_p(arena), c_void_p(offsets), c_void_p(out), c_void_p(mask), c_int32(mask_bytes)),
            *(c_int32(rows), c_int32(width), unit(fill)),
        )
        self._along_rows(f"pack_rows_u{8 * element_bytes}", rows, width, arguments, stream)

    def unpack_rows(
        self, padded: int, offsets: int, arena: int, *, rows: int, width: int, element_bytes: int, stream: int
    ) -> None:
        """The way back of `pack_rows`: the leading elements of padded[rows, width] to arena, by offsets."""
        _unit(element_bytes)
        arguments = (c_void_p(padded), c_void_p(offsets), c_void_p(arena), c_int32(rows), c_int32(width))
        self._along_rows(f"unpack_rows_u{8 * element_bytes}", rows, width, arguments, stream)

    def scatter_rows(
        self, rows_from: int, places: int, to: int, *, rows: int, to_rows: int, row_bytes: int, stream: int
    ) -> None:
        """Row r of the first becomes row places[r] (int32 [rows], each another) of the last, which has `to_rows` rows.

        A place outside of those is left out.
        """
        aligned = rows_from | to | row_bytes
        unit_bytes = next(unit for unit in (16, 4, 1) if aligned % unit == 0)
        units = row_bytes // unit_bytes
        arguments = (
            *(c_void_p(rows_from), c_void_p(places), c_void_p(to)),
            *(c_int32(rows), c_int32(to_rows), c_int64(units)),
        )
        self._along_rows(f"scatter_rows_u{8 * unit_bytes}", rows, units, arguments, stream)

    def softmax_topk(
        self,
        logits: int,
        values: int,
        indices: int,
        *,
        rows: int,
        classes: int,
        k: int,
        softmax: bool,
        dtype: str,
        stream: int,
    ) -> None:
        """The best k classes of each row, best first; of equal ones the first, and NaN before all.

        Args:
            logits: [rows, classes].
            values: float32 [rows, k]; probabilities, or what stands in logits.
            indices: int32 [rows, k].
            rows: Of the batch.
            classes: Of each row.
            k: 1 to `classes`.
            softmax: Whether values are probabilities.
            dtype: Of logits, float16 or float32.
            stream: Where it runs.
        """
        _expect("k", k, 1, classes)
        arguments = (
            *(c_void_p(logits), c_void_p(values), c_void_p(indices)),
            *(c_int32(rows), c_int32(classes), c_int32(k), c_int32(softmax)),
        )
        self._block_a_row(f"softmax_topk_{_float(dtype)}", rows, arguments, stream)

    def mean_pool(
        self,
        hidden: int,
        mask: int,
        out: int,
        *,
        rows: int,
        tokens: int,
        dims: int,
        normalise: bool,
        dtype: str,
        stream: int,
    ) -> None:
        """The mean of each row's tokens: hidden[rows, tokens, dims], mask int64 [rows, tokens] to float32 [rows, dims].

        With `normalise` of length 1; zero where a row has no tokens. `dtype` is that of hidden, float16 or float32.
        """
        arguments = (
            *(c_void_p(hidden), c_void_p(mask), c_void_p(out)),
            *(c_int32(rows), c_int32(tokens), c_int32(dims), c_int32(normalise)),
        )
        self._block_a_row(f"mean_pool_{_float(dtype)}", rows, arguments, stream)

    def cast(
        self, source: int, target: int, *, elements: int, source_dtype: str, target_dtype: str, stream: int
    ) -> None:
        """Float32 to float16 or bfloat16, rounded to the nearest, ties to even; or back."""
        types = (source_dtype, target_dtype)
        if types.count("float32") != 1 or not set(types) <= set(_SHORT):
            raise ValueError(f"no cast from {source_dtype} to {target_dtype}, expected float32 and a shorter float")
        arguments = (c_void_p(source), c_void_p(target), c_int64(elements))
        self._along_rows(f"cast_{_SHORT[source_dtype]}_{_SHORT[target_dtype]}", 1, elements, arguments, stream)

    def close(self) -> None:
        """Gives the kernels back; nothing of them may be under way. Idempotent."""
        if self._module:
            self._device.unload_module(self._module)
            self._module = 0

    def _along_rows(self, name: str, rows: int, items: int, arguments: tuple[Any, ...], stream: int) -> None:
        """Threads along x go through the items of a row, blocks along y through rows."""
        threads = min(_BLOCK, -(-items // _WARP) * _WARP)
        if rows > 0 and items > 0:
            blocks = min(-(-items // threads), _MOST_BLOCKS)
            self._launch(name, (blocks, min(rows, _MOST_BLOCKS_Y), 1), threads, arguments, stream)

    def _block_a_row(self, name: str, rows: int, arguments: tuple[Any, ...], stream: int) -> None:
        if rows > 0:
            self._launch(name, (min(rows, _MOST_BLOCKS), 1, 1), _BLOCK, arguments, stream)

    def _launch(
        self, name: str, grid: tuple[int, int, int], threads: int, arguments: tuple[Any, ...], stream: int
    ) -> None:
        function = self._functions.get(name)
        if function is None:
            function = self._functions[name] = self._device.function(self._module, name)
        self._device.launch(function, grid, (threads, 1, 1), packed(arguments), stream)


def packed(arguments: Sequence[Any]) -> bytes:
    """The ctypes values as the members of a C structure, without what may be added at its end."""
    content = bytearray()
    for argument in arguments:
        alignment = ctypes.alignment(argument)
        content += bytes(-len(content) % alignment) + bytes(argument)
    return bytes(content)


def _float(dtype: str) -> str:
    if dtype not in {"float16", "float32"}:
        raise ValueError(f"no kernel for {dtype}, expected float16 or float32")
    return _SHORT[dtype]


def _unit(element_bytes: int) -> Any:
    if element_bytes not in _UNITS:
        raise ValueError(f"elements of {element_bytes} bytes, expected 1, 2, 4 or 8")
    return _UNITS[element_bytes]


def _expect(name: str, value: int, least: int, most: int) -> None:
    if not least <= value <= most:
        raise ValueError(f"{name} is {value}, expected {least} to {most}")
