"""What each kernel computes, said in NumPy: the definition that tests hold the kernels to; to be read, not fast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Sequence

    Array = np.ndarray[Any, np.dtype[Any]]

_SMALLEST_NORM = 1e-12  # as in torch.nn.functional.normalize


def resize_weights(source: int, target: int, *, antialias: bool) -> Array:
    """How much of each of `source` pixels is in each of `target` pixels: float64 [target, source], rows sum to 1.

    A triangle filter around the centre of the target pixel, (target pixel + 1/2) * source / target; it reaches one
    source pixel to either side, or with antialiasing source / target pixels where that is more. What lies outside is
    left out and the rest weighed up. That is Pillow's `BILINEAR` with antialiasing, and without it ONNX's `linear` with
    `half_pixel`, and OpenCV's `INTER_LINEAR`.
    """
    reach = max(source / target, 1.0) if antialias else 1.0
    centres = (np.arange(target) + 0.5) * (source / target)
    distances = np.abs(np.arange(source) + 0.5 - centres[:, None])
    weights: Array = np.maximum(1.0 - distances / reach, 0.0)
    weights /= weights.sum(axis=1, keepdims=True)
    return weights


def image_to_tensor(
    images: Sequence[Array],
    height: int,
    width: int,
    scale: Sequence[float],
    bias: Sequence[float],
    *,
    antialias: bool = True,
    dtype: str = "float32",
    windows: Sequence[tuple[int, int, int, int]] | None = None,
    channels_last: bool = False,
) -> Array:
    """Images of uint8 [height, width, channels], of any sizes, as one tensor [images, channels, height, width].

    A value of 0 to 255, not rounded in between, times the channel's scale, plus its bias. Each image is resized to the
    first two numbers of its window, and what begins at the last two, top and left, is taken; without windows it is
    resized to what is wanted. With `channels_last` the channels are the last axis.
    """
    resized = []
    for image, (rows, columns, top, left) in zip(images, windows or [(height, width, 0, 0)] * len(images), strict=True):
        down = resize_weights(image.shape[0], rows, antialias=antialias)[top : top + height]
        across = resize_weights(image.shape[1], columns, antialias=antialias)[left : left + width]
        resized.append(down @ image.transpose(2, 0, 1).astype(np.float64) @ across.T)
    channels = len(scale)
    stacked = np.stack(resized) if resized else np.zeros((0, channels, height, width))
    by_channel = (1, channels, 1, 1)
    with np.errstate(over="ignore"):
        normalised: Array = (stacked * np.reshape(scale, by_channel) + np.reshape(bias, by_channel)).astype(dtype)
    return normalised.transpose(0, 2, 3, 1) if channels_last else normalised


def pack_rows(rows: Sequence[Array], width: int, fill: Any) -> tuple[Array, Array]:
    """Rows [length] as one batch [rows, width], filled up or cut off, and the mask of their own elements (int64)."""
    dtype = rows[0].dtype if rows else np.dtype(np.int64)
    out = np.full((len(rows), width), fill, dtype)
    mask = np.zeros((len(rows), width), np.int64)
    for index, row in enumerate(rows):
        own = row[:width]
        out[index, : len(own)] = own
        mask[index, : len(own)] = 1
    return out, mask


def unpack_rows(padded: Array, lengths: Sequence[int]) -> Array:
    """The leading elements of each row, one row after another: [sum of lengths]."""
    return np.concatenate([row[:length] for row, length in zip(padded, lengths, strict=True)] or [padded[:0, 0]])


def scatter_rows(rows: Array, places: Sequence[int], to: Array) -> Array:
    """`to` with row r of `rows` in row places[r]; places outside are left out."""
    result = to.copy()
    for row, place in zip(rows, places, strict=True):
        if 0 <= place < len(result):
            result[place] = row
    return result


def softmax_topk(logits: Array, k: int, *, softmax: bool) -> tuple[Array, Array]:
    """The best k of each row [rows, classes], best first: values (float32) and indices (int32), both [rows, k].

    NaN comes before all, equal values (0 and -0 are equal) by their index. Probabilities are those of NumPy's own
    arithmetic: a NaN or an infinity in a row makes all of them NaN.
    """
    wide = logits.astype(np.float64)
    order = np.where(np.isnan(wide), 1, 0), np.where(np.isnan(wide), 0, wide)
    indices = np.lexsort((np.broadcast_to(np.arange(wide.shape[1]), wide.shape), -order[1], -order[0]), axis=1)[:, :k]
    values = wide
    if softmax and wide.size:
        with np.errstate(invalid="ignore", over="ignore"):
            powers = np.exp(wide - wide.max(axis=1, keepdims=True))
            values = powers / powers.sum(axis=1, keepdims=True)
    return np.take_along_axis(values, indices, axis=1).astype(np.float32), indices.astype(np.int32)


def mean_pool(hidden: Array, mask: Array, *, normalise: bool) -> Array:
    """The mean over tokens whose mask is not 0: [rows, tokens, dims] to float32 [rows, dims].

    With `normalise` of length 1. A row without tokens is zero. What is masked has no influence, not even NaN.
    """
    own = (mask != 0)[:, :, None]
    sums = np.where(own, hidden.astype(np.float64), 0.0).sum(axis=1)
    means = sums / np.maximum(own.sum(axis=1), 1)
    if normalise:
        with np.errstate(invalid="ignore"):
            means = means / np.maximum(np.linalg.norm(means, axis=1, keepdims=True), _SMALLEST_NORM)
    pooled: Array = means.astype(np.float32)
    return pooled


def cast(array: Array, dtype: Any) -> Array:
    """Rounded to the nearest, ties to even; what is too large becomes infinite."""
    with np.errstate(over="ignore", invalid="ignore"):
        return array.astype(dtype)
