"""The one table of element types, and tensors between NumPy and the wire.

A STRING tensor is an object array of `str` (or `bytes` where the bytes are not UTF-8). BFLOAT16 is
`ml_dtypes.bfloat16`, imported only when it is met.
"""

from __future__ import annotations

import math
import struct
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from forno.v1 import tensor_pb2 as pb

if TYPE_CHECKING:
    from collections.abc import Sequence

    Array = np.ndarray[Any, np.dtype[Any]]


class ElementType(NamedTuple):
    """One row of the table."""

    number: pb.DataType
    name: str  # what people read and write: "float32"
    numpy: str  # name of the NumPy dtype, little-endian
    typed: str  # the arm of Tensor.contents that carries it


TABLE = tuple(
    ElementType(getattr(pb, f"DATA_TYPE_{name.upper()}"), name, numpy, typed)
    for name, numpy, typed in (
        ("bool", "|b1", "bools"),
        ("int8", "|i1", "ints"),
        ("int16", "<i2", "ints"),
        ("int32", "<i4", "ints"),
        ("int64", "<i8", "ints"),
        ("uint8", "|u1", "uints"),
        ("uint16", "<u2", "uints"),
        ("uint32", "<u4", "uints"),
        ("uint64", "<u8", "uints"),
        ("float16", "<f2", "floats"),
        ("bfloat16", "bfloat16", "floats"),
        ("float32", "<f4", "floats"),
        ("float64", "<f8", "doubles"),
        ("string", "|O", "strings"),
    )
)
_BY_NUMBER: dict[int, ElementType] = {row.number: row for row in TABLE}
_BY_NAME = {row.name: row for row in TABLE}
_BY_NUMPY = {row.numpy: row for row in TABLE}
_RAW_DTYPE: dict[int, np.dtype[Any]] = {
    row.number: np.dtype(row.numpy) for row in TABLE if row.name not in ("bfloat16", "string")
}
_NUMBER_OF_DTYPE = {np.dtype(row.numpy): row.number for row in TABLE if row.number in _RAW_DTYPE}
STRING = pb.DATA_TYPE_STRING
OBJECT = np.dtype(object)


def dtype_named(name: str) -> np.dtype[Any]:
    """NumPy dtype of an element type's name.

    Raises:
        KeyError: There is no element type of that name.
    """
    return dtype_of(_BY_NAME[name].number)


def dtype_of(number: int) -> np.dtype[Any]:
    """NumPy dtype of a `DataType`.

    Raises:
        KeyError: The number is no element type, or is unspecified.
    """
    if number in _RAW_DTYPE:
        return _RAW_DTYPE[number]
    if number == STRING:
        return OBJECT
    if number == pb.DATA_TYPE_BFLOAT16:
        import ml_dtypes  # noqa: PLC0415  (only bfloat16 models pay for it)

        bfloat16: np.dtype[Any] = np.dtype(ml_dtypes.bfloat16)
        return bfloat16
    raise KeyError(number)


def number_of(dtype: np.dtype[Any]) -> pb.DataType:
    """`DataType` of a NumPy dtype; any kind of string dtype is STRING.

    Raises:
        KeyError: No element type corresponds to it.
    """
    found = _NUMBER_OF_DTYPE.get(dtype)
    if found is not None:
        return found
    if dtype.kind in "OUS":
        return STRING
    if dtype.name == "bfloat16":
        return pb.DATA_TYPE_BFLOAT16
    raise KeyError(dtype)


def name_of(dtype: np.dtype[Any]) -> str:
    """The name people use for a NumPy dtype, such as "float32" or "string"."""
    return _BY_NUMBER[number_of(dtype)].name


def typed_form(dtype: np.dtype[Any]) -> str:
    """The field of `Tensor` that holds typed elements of a NumPy dtype, such as "floats"."""
    return _BY_NUMBER[number_of(dtype)].typed


def encode(name: str, array: Array) -> pb.Tensor:
    """A tensor message with raw data: one copy of the elements."""
    number = number_of(array.dtype)
    data = pack_strings(array) if number == STRING else array.tobytes()
    return pb.Tensor(name=name, data_type=number, shape=array.shape, data=data)


def encode_typed(name: str, array: Array) -> pb.Tensor:
    """A tensor message with typed values: what a person would write. Slow; for small tensors."""
    row = _BY_NUMBER[number_of(array.dtype)]
    message = pb.Tensor(name=name, data_type=row.number, shape=array.shape)
    values = array.ravel().tolist()
    arm = row.typed
    if arm == "strings" and any(isinstance(value, bytes) for value in values):
        arm = "blobs"
        values = [value if isinstance(value, bytes) else value.encode() for value in values]
    getattr(message, arm).SetInParent()
    getattr(message, arm).values.extend(values)
    return message


def decode(tensor: pb.Tensor, dtype: np.dtype[Any] | None = None, shape: Sequence[int] | None = None) -> Array:
    """The tensor's elements; a view of the message's bytes where it holds raw numbers.

    Args:
        tensor: The message.
        dtype: What the signature expects; decides where typed contents leave the type open.
        shape: What the signature expects, -1 for any size; decides where typed contents leave the shape open.

    Raises:
        ValueError: The message contradicts itself or leaves something open; the text says what to change.
    """
    arm = tensor.WhichOneof("contents")
    if arm == "data":
        return _decode_raw(tensor)
    if arm is None:
        raise ValueError("has no contents; set `data` or one of the typed forms")
    return _decode_typed(tensor, arm, dtype, shape)


def _decode_raw(tensor: pb.Tensor) -> Array:
    number, dims, data = tensor.data_type, tuple(tensor.shape), tensor.data
    try:
        dtype = dtype_of(number)
    except KeyError:
        raise ValueError(f"data_type is {_type_text(number)}; raw data needs one") from None
    count = _element_count(dims)
    if number == STRING:
        return unpack_strings(data, count).reshape(dims)
    if len(data) != count * dtype.itemsize:
        raise ValueError(
            f"data holds {len(data)} bytes, but shape {list(dims)} of {_BY_NUMBER[number].name} "
            f"needs {count * dtype.itemsize}"
        )
    if dtype.kind == "b" and data.translate(None, b"\0\1"):
        raise ValueError("data of bool has a byte that is neither 0 nor 1")
    return np.frombuffer(data, dtype).reshape(dims)


def _decode_typed(tensor: pb.Tensor, arm: str, dtype: np.dtype[Any] | None, shape: Sequence[int] | None) -> Array:
    if tensor.data_type:
        try:
            dtype = dtype_of(tensor.data_type)
        except KeyError:
            raise ValueError(f"data_type {_type_text(tensor.data_type)} is unknown") from None
    if dtype is None:
        raise ValueError("data_type is missing and no signature decides it")
    wanted = _BY_NUMBER[number_of(dtype)]
    if arm != wanted.typed and not (arm == "blobs" and wanted.typed == "strings"):
        raise ValueError(f"{arm} given, but {wanted.name} elements go into `{wanted.typed}`")
    values = getattr(tensor, arm).values
    dims = tuple(tensor.shape) or _infer_shape(len(values), shape)
    count = _element_count(dims)
    if len(values) != count:
        raise ValueError(f"{arm} holds {len(values)} values, but shape {list(dims)} needs {count}")
    if arm in ("strings", "blobs"):
        array = np.empty(count, object)
        array[:] = values
        return array.reshape(dims)
    if arm in ("ints", "uints"):
        wide = np.array(values, np.int64 if arm == "ints" else np.uint64)
        limits = np.iinfo(dtype)
        if count and (wide.min() < limits.min or wide.max() > limits.max):
            raise ValueError(
                f"values reach from {wide.min()} to {wide.max()}, but {wanted.name} holds {limits.min} to {limits.max}"
            )
        return wide.astype(dtype).reshape(dims)
    given = np.array(values, np.float64 if arm == "doubles" else np.float32)
    with np.errstate(over="ignore"):
        array = given.astype(dtype)
    if dtype.itemsize == 2 and np.any(np.isinf(array) & np.isfinite(given)):
        raise ValueError(f"values reach to {np.abs(given[np.isfinite(given)]).max()}, which {wanted.name} cannot hold")
    return array.reshape(dims)


def _infer_shape(count: int, shape: Sequence[int] | None) -> tuple[int, ...]:
    """The one shape that fits `count` values where the signature has at most one open dimension."""
    if shape is None:
        return (count,)
    fixed = math.prod(size for size in shape if size >= 0)
    free = sum(size < 0 for size in shape)
    if free == 0:
        return tuple(shape)
    if free == 1 and fixed and count % fixed == 0:
        return tuple(count // fixed if size < 0 else size for size in shape)
    raise ValueError(f"shape is missing, and {count} values do not decide it for {list(shape)}")


def _element_count(dims: tuple[int, ...]) -> int:
    for size in dims:
        if size < 0:
            raise ValueError(f"shape {list(dims)} has a negative dimension")
    return math.prod(dims)


def _type_text(number: int) -> str:
    names = pb.DataType.keys()
    return names[number] if 0 <= number < len(names) else str(number)


def pack_strings(array: Array) -> bytes:
    """Elements of a string array, each as its length (little-endian uint32) and its bytes."""
    parts: list[bytes] = []
    for value in array.ravel().tolist():
        data = value if isinstance(value, bytes) else str(value).encode()
        parts.append(struct.pack("<I", len(data)))
        parts.append(data)
    return b"".join(parts)


def unpack_strings(data: bytes, count: int) -> Array:
    """The inverse of `pack_strings`: `count` elements, text where they are UTF-8.

    Raises:
        ValueError: The data does not hold exactly `count` elements.
    """
    if count > len(data) // 4:
        raise ValueError(f"data holds {len(data)} bytes, too few for {count} strings")
    array = np.empty(count, object)
    at = 0
    for index in range(count):
        end = at + 4
        if end > len(data):
            raise ValueError(f"data ends inside string {index} of {count}")
        (length,) = struct.unpack_from("<I", data, at)
        at, end = end, end + length
        if end > len(data):
            raise ValueError(f"string {index} of {count} says {length} bytes, but {len(data) - at} are left")
        raw = data[at:end]
        try:
            array[index] = raw.decode()
        except UnicodeDecodeError:
            array[index] = raw
        at = end
    if at != len(data):
        raise ValueError(f"{len(data) - at} bytes are left over after {count} strings")
    return array
