"""What a model takes and gives: names, element types, shapes, and which axis counts rows."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from forno.server.errors import InvalidArgument
from forno.v1 import tensors

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from forno.server.shapes import Padding

    Array = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One input or output."""

    name: str
    dtype: np.dtype[Any]
    shape: tuple[int, ...]  # -1 where any size is accepted; shape[0] counts rows where the model is batched
    dim_names: tuple[str, ...] = ()  # the model's own names of its dimensions, "" where it has none

    def __str__(self) -> str:
        dims = ", ".join("?" if size < 0 else str(size) for size in self.shape)
        return f"{tensors.name_of(self.dtype)}[{dims}]"


@dataclass(frozen=True)
class Signature:
    """Inputs and outputs of a model, in the model's order. Immutable; any thread."""

    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batched: bool  # axis 0 of every input and output counts independent rows
    padding: Padding | None = None  # how rows of different shapes share a run; None = they do not

    @cached_property
    def inputs_by_name(self) -> dict[str, TensorSpec]:
        """The inputs by name."""
        return {spec.name: spec for spec in self.inputs}

    def arrange(self, arrays: Mapping[str, Array]) -> tuple[Array, ...]:
        """The given arrays in the signature's order.

        Raises:
            InvalidArgument: An input is missing or unknown.
        """
        try:
            ordered = tuple([arrays[spec.name] for spec in self.inputs])
        except KeyError:
            ordered = ()
        if len(ordered) != len(self.inputs) or len(arrays) != len(ordered):
            raise self._names_wrong(arrays)
        return ordered

    def validate(self, arrays: Sequence[Array]) -> int:
        """Checks arrays in the signature's order and counts their rows.

        Returns:
            Rows of the request; 1 where the model is not batched.

        Raises:
            InvalidArgument: An element type, rank or dimension does not fit, or the request has no rows.
        """
        rows = -1
        for spec, array in zip(self.inputs, arrays, strict=True):
            shape = array.shape
            if array.dtype != spec.dtype:
                raise InvalidArgument(
                    f"input '{spec.name}': element type is {tensors.name_of(array.dtype)}, expected {spec}",
                    f"inputs[{spec.name}].data_type",
                )
            want = spec.shape
            # The usual case, rows free and the rest fixed, is settled by one comparison.
            if shape != want and not (shape and want and want[0] < 0 and shape[1:] == want[1:]):
                self._check_shape(spec, shape)
            if self.batched:
                if rows < 0:
                    rows = shape[0]
                elif rows != shape[0]:
                    raise InvalidArgument(
                        f"input '{spec.name}': {shape[0]} rows, but input '{self.inputs[0].name}' has {rows}",
                        f"inputs[{spec.name}].shape",
                    )
        if rows == 0:
            raise InvalidArgument("the request has no rows: dimension 0 is 0, expected at least 1", "inputs")
        return rows if self.batched and self.inputs else 1

    def output_indexes(self, names: Sequence[str]) -> tuple[int, ...] | None:
        """Positions of the outputs asked for; None for all of them.

        Raises:
            InvalidArgument: The model has no output of that name.
        """
        if not names:
            return None
        known = [spec.name for spec in self.outputs]
        for name in names:
            if name not in known:
                raise InvalidArgument(f"output '{name}' is unknown; this model has {_listed(known)}", "outputs")
        return tuple(known.index(name) for name in names)

    def as_text(self, arrays: Sequence[Array], indexes: Sequence[int]) -> tuple[Array, ...]:
        """The arrays, those at `indexes` with every string element as `str`: a runtime for text would misread others.

        Raises:
            InvalidArgument: An element is not text.
        """
        given = list(arrays)
        for index in indexes:
            values = given[index].ravel().tolist()
            if not all(type(value) is str and value.isascii() for value in values):
                name = self.inputs[index].name
                text = np.empty(len(values), object)
                text[:] = [_text(value, name, at) for at, value in enumerate(values)]
                given[index] = text.reshape(given[index].shape)
        return tuple(given)

    @staticmethod
    def _check_shape(spec: TensorSpec, shape: tuple[int, ...]) -> None:
        fits = len(shape) == len(spec.shape) and all(
            want in (-1, have) for have, want in zip(shape, spec.shape, strict=True)
        )
        if not fits:
            what = "shape" if len(shape) == len(spec.shape) else "rank"
            raise InvalidArgument(
                f"input '{spec.name}': {what} of {list(shape)} does not fit, expected {spec}",
                f"inputs[{spec.name}].shape",
            )

    def _names_wrong(self, arrays: Mapping[str, Array]) -> InvalidArgument:
        known = [spec.name for spec in self.inputs]
        missing = [name for name in known if name not in arrays]
        extra = [name for name in arrays if name not in known]
        text = "; ".join(
            [f"input '{name}' is missing" for name in missing] + [f"input '{name}' is unknown" for name in extra]
        )
        return InvalidArgument(f"{text}; this model takes {_listed(known)}", "inputs")


def _listed(names: Sequence[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"


def _text(value: object, name: str, at: int) -> str:
    try:
        if isinstance(value, bytes):
            return value.decode()
        text = str(value)
        text.encode()
    except UnicodeError:
        raise InvalidArgument(
            f"input '{name}': element {at} is not UTF-8 text, and this model takes no other bytes", f"inputs[{name}]"
        ) from None
    return text
