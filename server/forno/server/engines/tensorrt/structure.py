"""What two versions of a model have in common: all of an ONNX file but the values of its weights.

A weight is an initializer of the main graph that holds floating-point numbers: what training changes. Whether a plan
takes another value for one is for TensorRT to say (`refit.py`): some, such as the limits of a Clip, become part of it.
What only describes a model, such as who made it and when, is no part of its structure.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forno.server.engines.onnx_files import BELOW, BYTES, entry_of, fields, mapped, varint

if TYPE_CHECKING:
    from pathlib import Path

_TYPES = {1, 10, 11, 16}  # float32, float16, float64, bfloat16
_REMARKS = {
    "model": {2, 3, 5, 6, 14},  # producer and its version, the model's version, texts
    "graph": {2, 10, 16},
    "function": {8, 14},
    "node": {6, 9},
    "attribute": {13},
    "tensor": {12, 16},
}
_TYPE, _NAME, _BESIDE = 2, 8, 13
_DATA = {4, 5, 6, 7, 9, 10, 11, 14}
_INPUT, _OPERATOR, _DOMAIN = 1, 4, 7
_INITIALIZER = 5
_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True)
class Structure:
    """A model in two parts. Immutable.

    Args:
        digest: Of everything but the values of weights.
        weights: Name -> digest of its value.
        folded: Weights that batch normalizations take, of which TensorRT makes others.
        foldings: How many batch normalizations there are of which it does.
    """

    digest: str
    weights: dict[str, str]
    folded: frozenset[str]
    foldings: int


def structure_of(model: Path) -> Structure:
    """The structure of an ONNX model, and its weights. Reads all of it.

    Raises:
        ConfigError: It cannot be read, or is no ONNX model.
    """
    with mapped(model) as content:
        reader = _Reader(model.parent)
        reader.read(content, "model", main=True)
    normalizations = [names for names in reader.normalizations if set(names) <= reader.weights.keys()]
    folded = frozenset([name for names in normalizations for name in names])
    return Structure(reader.rest.hexdigest(), reader.weights, folded, len(normalizations))


class _Reader:
    """Takes one model apart. Made for one call.

    Args:
        folder: Where the files with its data are.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self.rest = hashlib.sha256()
        self.weights: dict[str, str] = {}
        self.normalizations: list[list[str]] = []  # their weights: scale, shift, mean and variance

    def read(self, view: memoryview, kind: str, *, main: bool = False) -> None:
        """A message of that kind; `main` = the model or its own graph, not one within a node."""
        for number, wire, value in fields(view):
            if number in _REMARKS.get(kind, ()):
                continue
            below = BELOW[kind].get(number) if wire == BYTES else None
            if below is None:
                _feed(self.rest, number, wire, value)
                continue
            self.rest.update(b"%d{" % number)
            if below == "tensor":
                self._read_tensor(value, replaceable=main and (kind, number) == ("graph", _INITIALIZER))
            else:
                self.read(value, below, main=main and kind == "model")
            if below == "node" and main:
                self._note_normalization(value)
            self.rest.update(b"}")

    def _read_tensor(self, view: memoryview, *, replaceable: bool) -> None:
        parts = list(fields(view))
        types = [varint(value, 0)[0] for number, wire, value in parts if (number, wire) == (_TYPE, 0)]
        name = next((bytes(value).decode() for number, _, value in parts if number == _NAME), "")
        is_weight = replaceable and bool(name) and types[-1:] != [] and types[-1] in _TYPES
        data = hashlib.sha256() if is_weight else self.rest
        beside = {}
        for number, wire, value in parts:
            if number == _BESIDE:
                key, where = entry_of(value)
                beside[key] = where
            elif number not in _REMARKS["tensor"]:
                _feed(data if number in _DATA else self.rest, number, wire, value)
        if "location" in beside:
            self._feed_from_file(data, beside)
        if is_weight:
            self.weights[name] = data.hexdigest()

    def _feed_from_file(self, data: Any, beside: dict[str, str]) -> None:
        left = int(beside["length"]) if "length" in beside else None
        with (self._folder / beside["location"]).open("rb") as file:
            file.seek(int(beside.get("offset", 0)))
            while chunk := file.read(_CHUNK_BYTES if left is None else min(left, _CHUNK_BYTES)):
                data.update(chunk)
                left = None if left is None else left - len(chunk)

    def _note_normalization(self, node: memoryview) -> None:
        given: dict[int, list[str]] = {_INPUT: [], _OPERATOR: [], _DOMAIN: []}
        for number, _, value in fields(node):
            if number in given:
                given[number].append(bytes(value).decode())
        if given[_OPERATOR] == ["BatchNormalization"] and not "".join(given[_DOMAIN]):
            self.normalizations.append(given[_INPUT][1:5])


def _feed(digest: Any, number: int, wire: int, value: memoryview) -> None:
    digest.update(b"%d %d %d:" % (number, wire, len(value)))
    digest.update(value)
