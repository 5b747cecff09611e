r"""Long runs of numbers, lifted out of a JSON body so that simdjson reads them straight into a buffer.

    {"inputs":{"x":[[0.5,1],[2,3]]}}   ->   {"inputs":{"x":{"\u0000":0}}}   and the run   [[0.5,1],[2,3]]

An accelerator: without the package `pysimdjson`, or wherever anything at all is unusual, the plain reader
reads the body and nothing changes but speed. So there are no messages here. It never accepts what the plain
reader would refuse: the remainder and every run must each be valid JSON, which makes their composition valid,
and the run's brackets must be exactly those of a full array.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import numpy as np

from forno.server.endpoints.json_values import doubles_to

simdjson: Any
try:
    import simdjson
except ImportError:  # there is not a wheel for every platform
    simdjson = None

if TYPE_CHECKING:
    Array = np.ndarray[Any, np.dtype[Any]]

MARK = "\0"
"""Key of the object that stands for a run. No caller can write it: it needs an escape, and a body with one is
not lifted."""

_MIN_BYTES = 4096  # shorter runs are read as fast by the plain reader
_KEPT_BYTES = 4 * 1024 * 1024
_MAX_RANK = 32
_EMPTY = re.compile(rb"\[\s*\]")
_MAX_EXACT = 2**53 - 1  # larger doubles may stand for several integers
_WIDE_ENOUGH = (np.dtype(np.float32), np.dtype(np.float64))
_NUMBER_BYTES = b"0123456789.eE+- \t\r\n"


# A parser keeps about six times the size of the largest run that it has read. To get and touch that memory anew
# costs as much as the parsing, so one is kept for runs of common sizes. Event loop only.
_parser: Any = simdjson.Parser() if simdjson is not None else None


class Unliftable(Exception):
    """The run is not a full array of such numbers."""


def lift(body: bytes) -> tuple[bytes, list[bytes]]:
    """Replaces long runs of numbers by marks.

    Returns:
        The body with {MARK: n} in place of the n-th run, and the runs; none where there is nothing to gain.
    """
    if simdjson is None or len(body) < _MIN_BYTES or b"\\" in body:
        return body, []
    parts = body.split(b'"')  # without escapes, every other part is outside of strings
    runs: list[bytes] = []
    for number in range(0, len(parts), 2):
        part = parts[number]
        if len(part) < _MIN_BYTES:
            continue
        start, end = part.find(b"["), part.find(b"}")
        run = part[start : end if end >= 0 else len(part)].rstrip(b", \t\r\n")
        if start < 0 or not run.endswith(b"]") or _EMPTY.match(run):
            continue
        parts[number] = b'%b{"\\u0000":%d}%b' % (part[:start], len(runs), part[start + len(run) :])
        runs.append(run)
    return (b'"'.join(parts), runs) if runs else (body, runs)


def read(run: bytes | Array, dtype: np.dtype[Any]) -> Array:
    """The array that a run stands for. Of one that has been read already only the shape counts.

    Raises:
        Unliftable: It is not a full array of numbers that fit the element type.
    """
    kind = "d" if dtype.kind in "fV" else "u" if dtype == np.uint64 else "i" if dtype.kind in "iu" else ""
    if not kind:
        raise Unliftable
    if not isinstance(run, bytes):
        return np.broadcast_to(np.zeros((), dtype), run.shape)
    brackets = run.translate(None, _NUMBER_BYTES)
    shape = _shape(brackets)
    if brackets != _brackets(shape):
        raise Unliftable
    try:
        parser = _parser if len(run) <= _KEPT_BYTES else simdjson.Parser()
        buffer = parser.parse(run).as_buffer(of_type=kind)
        flat: Array = np.frombuffer(buffer, {"d": np.float64, "i": np.int64, "u": np.uint64}[kind])
        flat = flat.reshape(shape)
    except (ValueError, TypeError, AttributeError, RuntimeError) as error:  # whatever simdjson says
        raise Unliftable from error
    if kind == "d":
        array = doubles_to(flat, dtype)
        if not np.isfinite(array).all():
            raise Unliftable
        return array
    limits = np.iinfo(dtype)
    if flat.size and not (limits.min <= flat.min() and flat.max() <= limits.max):
        raise Unliftable
    return flat.astype(dtype, copy=False)


def of_doubles(doubles: Array, dtype: np.dtype[Any]) -> Array:
    """Numbers, none of them larger than 3e38, as an element type.

    Raises:
        Unliftable: One does not fit, or may not have been a double.
    """
    if dtype in _WIDE_ENOUGH:
        return doubles.astype(dtype)
    if dtype.kind in "fV":
        array = doubles_to(doubles, dtype)
        if not np.isfinite(array).all():
            raise Unliftable
        return array
    limits = np.iinfo(dtype)
    low, high = max(limits.min, -_MAX_EXACT), min(limits.max, _MAX_EXACT)
    if not (low <= doubles.min() and doubles.max() <= high and (doubles == np.trunc(doubles)).all()):
        raise Unliftable
    return doubles.astype(dtype)


def _shape(brackets: bytes) -> tuple[int, ...]:
    """The only shape that can have these brackets: how often each level's list fits before it closes."""
    rank = len(brackets) - len(brackets.lstrip(b"["))
    if not 0 < rank <= _MAX_RANK:
        raise Unliftable
    count = brackets.find(b"]") - rank + 1
    shape = [count]
    unit = count + 1  # bytes of one list of the level: its brackets, its items and the commas between them
    for depth in range(1, rank):
        if count < 1:  # something closes too soon, or never
            break
        close = brackets.find(b"]" * (depth + 1))
        inside = close + depth - (rank - depth)  # of the level's first list, without its own brackets
        count = (inside + 1) // (unit + 1)
        shape.append(count)
        unit = count * (unit + 1) + 1
    if min(shape) < 1:
        raise Unliftable
    return tuple(reversed(shape))


def _brackets(shape: tuple[int, ...]) -> bytes:
    text = b""
    for size in reversed(shape):
        text = b"[" + b",".join([text] * size) + b"]"
    return text
