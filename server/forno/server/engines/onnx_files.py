"""The files that an ONNX model consists of: itself, and those that its tensors name as where their data lie.

Only so much of the format is read as leads to those names (fields of onnx.proto); tensors are stepped over, however
large.
"""

from __future__ import annotations

import mmap
from contextlib import contextmanager
from typing import TYPE_CHECKING

from forno.server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

BELOW = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
"""Messages of a model that tensors are below, by kind: number of the field -> kind of what it holds."""
BYTES = 2
"""The wire type of messages and strings."""
_KEY, _VALUE = 1, 2


def files_of(model: Path) -> list[Path]:
    """The model file, and those with its data, by name.

    Raises:
        ConfigError: It is no ONNX model, or a file that it names is not there.
    """
    files = [model, *_beside(model)]
    for path in files:
        if not path.is_file():
            raise ConfigError(f"{model} has data in {path}, which is not there")
    return files


def bytes_of(model: Path) -> int:
    """How large a model is with its data, as far as that can be known: what is wrong with it, its runtime tells."""
    try:
        files = [model, *_beside(model)]
    except ConfigError:  # it is in another format, or broken
        files = [model]
    return sum([path.stat().st_size for path in files if path.is_file()])


@contextmanager
def mapped(model: Path) -> Iterator[memoryview]:
    """The bytes of a model file; what is found to be wrong with them within becomes a ConfigError that names it.

    Raises:
        ConfigError: It cannot be read, or is no ONNX model.
    """
    try:
        with model.open("rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))  # unmapped with its last view
        yield content
    except (ValueError, IndexError, RecursionError) as error:  # empty, or lengths that lead out of it
        raise ConfigError(f"{model} is not a readable ONNX model: {error}") from None
    except OSError as error:
        raise ConfigError(f"{error.filename or model} cannot be read: {error.strerror}") from error


def fields(view: memoryview) -> Iterator[tuple[int, int, memoryview]]:
    """The fields of a message: number, wire type, and the bytes of the value, of type 2 without their length.

    Raises:
        ValueError: It is no message.
        IndexError: It ends within a field.
    """
    at, end = 0, len(view)
    while at < end:
        tag, at = varint(view, at)
        begin = at
        match tag & 7:
            case 0:
                _, at = varint(view, at)
            case 1:
                at += 8
            case 2:
                size, begin = varint(view, at)
                at = begin + size
            case 5:
                at += 4
            case other:
                raise ValueError(f"a field of wire type {other}")
        if at > end:
            raise ValueError(f"a field of {at - begin} bytes, and {end - begin} are left")
        yield tag >> 3, tag & 7, view[begin:at]


def entry_of(view: memoryview) -> tuple[str, str]:
    """One of the entries that say where a tensor's data lie, such as ("location", "weights.bin").

    Raises:
        ValueError: It is none.
    """
    entry = {number: bytes(value).decode() for number, _, value in fields(view)}
    return entry.get(_KEY, ""), entry.get(_VALUE, "")


def _beside(model: Path) -> list[Path]:
    """The files with the model's data, by name.

    Raises:
        ConfigError: It is no ONNX model.
    """
    with mapped(model) as content:
        return [model.parent / name for name in sorted(set(_locations(content, "model")))]


def _locations(view: memoryview, kind: str) -> Iterator[str]:
    """Names of files with data, of a message of that kind and of those in it."""
    if kind == "entry":
        key, name = entry_of(view)
        if key == "location":
            yield name
        return
    for number, wire, value in fields(view):
        below = BELOW[kind].get(number)
        if below is not None and wire == BYTES:
            yield from _locations(value, below)


def varint(view: memoryview, at: int) -> tuple[int, int]:
    """A number, and where it ends."""
    value = shift = 0
    while True:
        byte = view[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("a number of more than 64 bits")
