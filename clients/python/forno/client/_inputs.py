"""Plain Python values as the arrays that a signature asks for."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import numpy as np

from forno.client._errors import InvalidArgument
from forno.v1 import tensors

if TYPE_CHECKING:
    from forno.client._values import TensorInfo

    Array = np.ndarray[Any, np.dtype[Any]]


def to_array(spec: TensorInfo, value: Any) -> Array:
    """The value as an array of the input's element type, with leading dimensions of one where it lacks some.

    Raises:
        InvalidArgument: The value is ragged, does not fit the element type, or has too many dimensions.
    """
    dtype = tensors.dtype_named(spec.data_type)
    try:
        array = _strings(value) if dtype == tensors.OBJECT else _numbers(value, dtype)
    except (ValueError, TypeError, OverflowError) as error:
        raise InvalidArgument(f"input {spec}: {_short(value)} does not fit: {error}") from error
    if array.ndim > len(spec.shape):
        raise InvalidArgument(f"input {spec}: the value has shape {list(array.shape)}")
    return array.reshape((1,) * (len(spec.shape) - array.ndim) + array.shape)


def random_array(spec: TensorInfo, rows: int, generator: np.random.Generator) -> Array:
    """An array that fits the input: `rows` rows, dimensions of any size 1, and values as tests like them."""
    shape = tuple(rows if index == 0 and size < 0 else max(size, 1) for index, size in enumerate(spec.shape))
    dtype = tensors.dtype_named(spec.data_type)
    if dtype == tensors.OBJECT:
        words = np.array(["free", "win", "cash", "hello", "lunch", "tomorrow"], dtype=object)
        return np.asarray(generator.choice(words, size=shape), dtype=object)
    if dtype.kind == "b":
        return np.asarray(generator.integers(0, 2, size=shape), dtype=dtype)
    if dtype.kind in "iu":
        return np.asarray(generator.integers(0, 10, size=shape), dtype=dtype)
    return np.asarray(generator.standard_normal(size=shape), dtype=dtype)


def _numbers(value: Any, dtype: np.dtype[Any]) -> Array:
    plain = np.asarray(value)
    if plain.dtype.kind not in "biuf" and plain.size:
        raise TypeError("expected numbers")
    whole = plain.dtype.kind in "biu" or bool((plain == np.trunc(plain)).all())
    if dtype.kind in "iub" and not whole:
        raise ValueError("a fraction, expected whole numbers")
    array = plain.astype(dtype)
    if dtype.kind in "iu" and not (array == plain).all():
        raise OverflowError(f"expected numbers from {np.iinfo(dtype).min} to {np.iinfo(dtype).max}")
    return array


def _strings(value: Any) -> Array:
    """An object array of texts; NumPy's own reading makes fixed-width text, which drops trailing zeros."""
    array = np.array(value, dtype=object)
    if any(not isinstance(item, str | bytes) for item in array.ravel().tolist()):
        raise TypeError("expected texts")
    return array


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:60]}..."
