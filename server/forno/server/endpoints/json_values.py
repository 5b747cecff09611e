"""Nested JSON values to arrays and back, strictly: nothing is rounded, cut, padded or guessed.

JSON has no NaN and no infinities: they are the strings "NaN", "Infinity" and "-Infinity", in both directions.
Elements of string tensors that are not text are {"b64": "..."}.
"""

from __future__ import annotations

import base64
import binascii
import math
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
import orjson

from forno.server.errors import InvalidArgument
from forno.v1 import tensors

if TYPE_CHECKING:
    from collections.abc import Sequence

    Array = np.ndarray[Any, np.dtype[Any]]

_MAX_RANK = 32
_SHOWN_CHARACTERS = 60
_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}
_EXACT_FLOAT = 2.0**53  # whole floats up to here stand for one integer only


@dataclass(frozen=True, slots=True)
class Place:
    """Where the values of one input stand in the body, for messages."""

    name: str  # of the input
    path: str  # such as "inputs.x"
    below: str = ""  # what follows the first index, such as ".x" where each row is an object

    def at(self, index: Sequence[int] = ()) -> str:
        """Path of the element at an index, such as "instances[3].x[0]"."""
        steps = [f"[{number}]" for number in index]
        return self.path + steps[0] + self.below + "".join(steps[1:]) if steps else self.path

    def wrong(self, text: str, index: Sequence[int] = ()) -> InvalidArgument:
        """The error that says `text` of the element at an index."""
        where = self.at(index)
        return InvalidArgument(f"input '{self.name}': {where} {text}", where)


def to_array(value: object, dtype: np.dtype[Any], place: Place) -> Array:
    """An array of exactly the nested lists' shape.

    Args:
        value: Nested lists, or one element.
        dtype: Element type that the values must fit.
        place: Where the value stands.

    Raises:
        InvalidArgument: The lists are ragged, or an element does not fit; names the place.
    """
    leaves, shape = _flatten(value, place)
    kinds = set(map(type, leaves))
    if list in kinds:
        _ragged(leaves, shape, place)
    if dtype == tensors.OBJECT:
        flat = _strings(leaves, kinds, shape, place)
    elif dtype.kind == "b":
        flat = _bools(leaves, kinds, shape, place)
    elif dtype.kind in "iu":
        flat = _integers(leaves, kinds, dtype, shape, place)
    else:
        flat = _floats(leaves, kinds, dtype, shape, place)
    return flat.reshape(shape)


def to_json(array: Array) -> Any:
    """What orjson can print (with `OPT_SERIALIZE_NUMPY`) as the array's nested lists, each number exactly."""
    if array.dtype == tensors.OBJECT:
        return _nested([_text(value) for value in array.ravel().tolist()], array.shape)
    if array.dtype.name == "bfloat16":
        array = array.astype(np.float32)
    if array.dtype.kind == "f" and not np.isfinite(array).all():
        return _nested(_with_words(array.ravel()), array.shape)
    return np.ascontiguousarray(array) if array.ndim else array.reshape(1)[0]


def from_base64(text: object, place: Place, index: Sequence[int] = ()) -> bytes:
    """The bytes that a base64 text stands for.

    Raises:
        InvalidArgument: It is no base64.
    """
    if not isinstance(text, str):
        raise place.wrong(f"has {show(text)} as b64, expected a base64 text", index)
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise place.wrong(f"is not valid base64 ({error}): {show(text)}", index) from None


def show(value: object) -> str:
    """A JSON value as the caller wrote it, cut where it is long."""
    match value:
        case list():
            return "a list"
        case dict():
            return "an object"
        case str():
            text = orjson.dumps(value[:_SHOWN_CHARACTERS]).decode()
            return text if len(value) <= _SHOWN_CHARACTERS else f'{text[:-1]}..."'
        case _:
            return orjson.dumps(value).decode()


def _flatten(value: object, place: Place) -> tuple[list[Any], tuple[int, ...]]:
    if not isinstance(value, list):
        return [value], ()
    level, shape = value, [len(value)]
    while level and type(level[0]) is list:
        if len(shape) == _MAX_RANK:
            raise place.wrong(f"is nested deeper than {_MAX_RANK} lists")
        width = len(level[0])
        if set(map(type, level)) != {list} or set(map(len, level)) != {width}:
            _ragged(level, tuple(shape), place)
        level = list(chain.from_iterable(level))
        shape.append(width)
    return level, tuple(shape)


def _ragged(level: list[Any], shape: tuple[int, ...], place: Place) -> NoReturn:
    first = _extent(level[0])
    other = next(number for number, item in enumerate(level) if _extent(item) != first)
    start = place.at([0] * len(shape))
    raise place.wrong(f"is {_extent(level[other])}, but {start} is {first}", _index(other, shape))


def _extent(item: object) -> str:
    if not isinstance(item, list):
        return "one element"
    return f"a list of {len(item)}"


def _strings(leaves: list[Any], kinds: set[type], shape: tuple[int, ...], place: Place) -> Array:
    if not kinds <= {str}:
        leaves = [
            leaf if type(leaf) is str else _blob(leaf, place, _index(number, shape))
            for number, leaf in enumerate(leaves)
        ]
    array = np.empty(len(leaves), object)
    array[:] = leaves
    return array


def _blob(leaf: object, place: Place, index: Sequence[int]) -> str | bytes:
    if not isinstance(leaf, dict) or leaf.keys() != {"b64"}:
        raise place.wrong(f'is {show(leaf)}, expected a string or {{"b64": "..."}}', index)
    data = from_base64(leaf["b64"], place, index)
    try:
        return data.decode()
    except UnicodeDecodeError:
        return data


def _bools(leaves: list[Any], kinds: set[type], shape: tuple[int, ...], place: Place) -> Array:
    if not kinds <= {bool}:
        other = next(number for number, leaf in enumerate(leaves) if type(leaf) is not bool)
        raise place.wrong(f"is {show(leaves[other])}, expected true or false", _index(other, shape))
    return np.array(leaves, np.bool_)


def _integers(leaves: list[Any], kinds: set[type], dtype: np.dtype[Any], shape: tuple[int, ...], place: Place) -> Array:
    if not kinds <= {int}:
        leaves = [
            leaf if type(leaf) is int else _whole(leaf, dtype, place, _index(number, shape))
            for number, leaf in enumerate(leaves)
        ]
    limits = np.iinfo(dtype)
    try:
        wide = np.array(leaves, np.uint64 if dtype == np.uint64 else np.int64)
    except OverflowError:
        fits = False
    else:
        fits = not leaves or bool(limits.min <= wide.min() and wide.max() <= limits.max)
    if not fits:
        other = next(number for number, leaf in enumerate(leaves) if not limits.min <= leaf <= limits.max)
        raise place.wrong(
            f"is {leaves[other]}, but {dtype.name} holds {limits.min} to {limits.max}", _index(other, shape)
        )
    return wide.astype(dtype, copy=False)


def _whole(leaf: object, dtype: np.dtype[Any], place: Place, index: Sequence[int]) -> int:
    if isinstance(leaf, float) and leaf.is_integer() and abs(leaf) <= _EXACT_FLOAT:
        return int(leaf)
    what = "a whole number that fits" if isinstance(leaf, float) else "a number"
    raise place.wrong(f"is {show(leaf)}, expected {what} ({dtype.name})", index)


def _floats(leaves: list[Any], kinds: set[type], dtype: np.dtype[Any], shape: tuple[int, ...], place: Place) -> Array:
    if not kinds <= {float, int}:
        leaves = leaves.copy()
        for number, kind in enumerate(map(type, leaves)):  # most are numbers, and a comprehension would touch each
            if kind is not float and kind is not int:
                leaves[number] = _not_finite(leaves[number], dtype, place, _index(number, shape))
    array = doubles_to(np.array(leaves, np.float64), dtype)
    if not np.isfinite(array).all():
        for number in np.flatnonzero(~np.isfinite(array)).tolist():
            if math.isfinite(leaves[number]):
                text = f"is {show(leaves[number])}, which is out of range for {tensors.name_of(dtype)}"
                raise place.wrong(text, _index(number, shape))
    return array


def doubles_to(array: Array, dtype: np.dtype[Any]) -> Array:
    """Doubles as a narrower float type; what is out of its range becomes infinite."""
    with np.errstate(over="ignore"):
        return array.astype(dtype, copy=False)


def _not_finite(leaf: object, dtype: np.dtype[Any], place: Place, index: Sequence[int]) -> float:
    found = _NOT_FINITE.get(leaf) if isinstance(leaf, str) else None
    if found is None:
        text = f"is {show(leaf)}, expected a number ({tensors.name_of(dtype)})"
        raise place.wrong(f'{text}, "NaN", "Infinity" or "-Infinity"' if isinstance(leaf, str) else text, index)
    return found


def _index(number: int, shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(int(step) for step in np.unravel_index(number, shape))


def _text(value: object) -> object:
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return {"b64": base64.b64encode(value).decode()}
    return value


def _with_words(flat: Array) -> list[Any]:
    values: list[Any] = list(flat)
    for number in np.flatnonzero(~np.isfinite(flat)).tolist():
        value = values[number]
        values[number] = "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"
    return values


def _nested(flat: list[Any], shape: tuple[int, ...]) -> Any:
    if not shape:
        return flat[0]
    for dim in range(len(shape) - 1, 0, -1):
        size, count = shape[dim], math.prod(shape[:dim])
        flat = [flat[number * size : (number + 1) * size] for number in range(count)]
    return flat
