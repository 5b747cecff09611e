"""The files that an ONNX model consists of: itself, and those that its tensors name as where their data lie.

Only so much of the format is read as leads to those names (fields of onnx.proto); tensors are stepped over, however
large.
"""

from __future__ import annotations

import mmap
from typing import TYPE_CHECKING

from forno.server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

_BELOW = {
    "model": {7: "graph", 25: "function"},
    "graph": {1: "node", 5: "tensor", 15: "sparse tensor"},
    "function": {7: "node"},
    "node": {5: "attribute"},
    "attribute": {5: "tensor", 6: "graph", 10: "tensor", 11: "graph", 22: "sparse tensor", 23: "sparse tensor"},
    "sparse tensor": {1: "tensor", 2: "tensor"},
    "tensor": {13: "entry"},
}
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


def _beside(model: Path) -> list[Path]:
    """The files with the model's data, by name.

    Raises:
        ConfigError: It is no ONNX model.
    """
    try:
        with model.open("rb") as file:
            content = memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))  # unmapped with its last view
        return [model.parent / name for name in sorted(set(_locations(content, "model")))]
    except (ValueError, IndexError, RecursionError) as error:  # empty, or lengths that lead out of it
        raise ConfigError(f"{model} is not a readable ONNX model: {error}") from None
    except OSError as error:
        raise ConfigError(f"{model} cannot be read: {error.strerror}") from error


def _locations(view: memoryview, kind: str) -> Iterator[str]:
    """Names of files with data, of a message of that kind and of those in it."""
    if kind == "entry":
        entry = {number: bytes(part) for number, part in _parts(view)}
        if entry.get(_KEY) == b"location":
            yield entry.get(_VALUE, b"").decode()
        return
    for number, part in _parts(view):
        below = _BELOW[kind].get(number)
        if below is not None:
            yield from _locations(part, below)


def _parts(view: memoryview) -> Iterator[tuple[int, memoryview]]:
    """Fields that hold bytes, with their numbers."""
    at, end = 0, len(view)
    while at < end:
        tag, at = _varint(view, at)
        match tag & 7:
            case 0:
                _, at = _varint(view, at)
            case 1:
                at += 8
            case 2:
                size, at = _varint(view, at)
                if at + size > end:
                    raise ValueError(f"a field of {size} bytes, and {end - at} are left")
                yield tag >> 3, view[at : at + size]
                at += size
            case 5:
                at += 4
            case other:
                raise ValueError(f"a field of wire type {other}")


def _varint(view: memoryview, at: int) -> tuple[int, int]:
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
