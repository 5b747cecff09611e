"""How requests of different row shapes come to share a run. Pure policy: no clock, no engine, no buffer.

Sizes that are near to each other form a bucket; requests of one bucket run together, the shorter ones filled up with a
value that the model is known to ignore, and each gets back its own part of the outputs. Axes are known by the name that
the model gives them: an output whose axis has the name of a padded input axis is cut back to the request's own size.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import numpy as np

from forno.server.errors import ConfigError, InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Collection, Mapping, Sequence

    from forno.server.config import PaddingSettings
    from forno.server.request import RowShapes
    from forno.server.signature import Signature, TensorSpec

Cut = tuple[slice, ...]
Axes = tuple[tuple[int, str], ...]
"""Axes, the one of the rows being 0, with the name of what they measure."""

_LEAST_BUCKET = 8
_TEXT_KINDS = "O"


@dataclass(frozen=True, slots=True)
class PaddedInput:
    """What may be padded of one input, and with what."""

    name: str
    axes: Axes
    value: Any


@dataclass(frozen=True, slots=True)
class Fit:
    """What padding means for requests of one set of row shapes."""

    key: RowShapes  # of the bucket: requests of equal keys can share a run
    cuts: tuple[Cut, ...] | None  # for each output, where a request's own part is; None where nothing is cut


@dataclass(frozen=True)
class Padding:
    """Which axes of a model are padded, to what sizes, and how its outputs are cut back. Immutable; any thread."""

    inputs: tuple[PaddedInput, ...]
    outputs: tuple[Axes, ...]  # for each output, the axes to cut back
    sizes: tuple[int, ...] = ()  # the buckets' largest sizes, ascending; empty = steps of a half and a third
    exact: bool = False  # rows are padded to the bucket's size; otherwise to the longest that run together
    allowed_rows: tuple[int, ...] = ()  # row counts that may run, ascending; empty = all

    @property
    def names(self) -> tuple[str, ...]:
        """What the padded axes measure, each once."""
        return tuple(dict.fromkeys(name for spec in self.inputs for _, name in spec.axes))

    def only(self, names: Collection[str]) -> Padding:
        """The same for some of the names; axes of the others must be equal in a batch."""
        inputs = [replace(spec, axes=tuple([axis for axis in spec.axes if axis[1] in names])) for spec in self.inputs]
        outputs = [tuple([axis for axis in axes if axis[1] in names]) for axes in self.outputs]
        return replace(self, inputs=tuple(inputs), outputs=tuple(outputs))

    def size_for(self, size: int) -> int:
        """The largest size of the bucket that a size is in; a size above all buckets is alone in its own."""
        if not self.sizes:
            return _step(size)
        index = bisect_left(self.sizes, size)
        return self.sizes[index] if size > 0 and index < len(self.sizes) else size

    def rows_for(self, rows: int) -> int:
        """The count of rows that runs where `rows` are there."""
        index = bisect_left(self.allowed_rows, rows)
        return self.allowed_rows[index] if index < len(self.allowed_rows) else rows

    def fit(self, row_shapes: RowShapes) -> Fit:
        """The bucket of a request, and where its own part of the outputs is.

        Raises:
            InvalidArgument: Axes of one name differ in size: padded, they would seem to be right.
        """
        own: dict[str, tuple[int, str]] = {}  # size, and the input that it was seen in
        key = []
        for spec, shape in zip(self.inputs, row_shapes, strict=True):
            bucket = list(shape)
            for axis, name in spec.axes:
                size = shape[axis - 1]
                known, where = own.setdefault(name, (size, spec.name))
                if size != known:
                    raise InvalidArgument(
                        f"input '{spec.name}': dimension {axis} ('{name}') is {size}, but it is {known} in input "
                        f"'{where}'; expected the same size",
                        f"inputs[{spec.name}].shape",
                    )
                bucket[axis - 1] = self.size_for(size)
            key.append(tuple(bucket))
        cuts = [_cut(axes, {name: size for name, (size, _) in own.items()}) for axes in self.outputs]
        return Fit(tuple(key), tuple(cuts) if any(cuts) else None)

    def run_shape(self, index: int, shapes: Sequence[tuple[int, ...]]) -> tuple[int, ...]:
        """The row shape with which an input runs, of the row shapes that run together."""
        first = shapes[0]
        axes = self.inputs[index].axes
        if not axes:
            return first
        longest = list(first)
        for axis, _ in axes:
            size = max([shape[axis - 1] for shape in shapes])
            longest[axis - 1] = self.size_for(size) if self.exact else size
        return tuple(longest)


def plan(signature: Signature, settings: PaddingSettings) -> Padding | None:
    """What the settings ask for; None where they ask for nothing.

    Raises:
        ConfigError: They name what the model does not have.
    """
    if settings.enabled is False:
        if not settings.allowed_rows:
            return None
        inputs = tuple([PaddedInput(spec.name, (), _value(spec, settings.values)) for spec in signature.inputs])
        return Padding(inputs, ((),) * len(signature.outputs), allowed_rows=settings.allowed_rows)
    _check_names("values", settings.values, signature.inputs)
    _check_names("axes", settings.axes, signature.inputs)
    _check_names("outputs", settings.outputs, signature.outputs)
    inputs = tuple(
        [
            PaddedInput(spec.name, _input_axes(spec, settings), _value(spec, settings.values))
            for spec in signature.inputs
        ]
    )
    padding = Padding(inputs, (), settings.sizes, settings.exact, settings.allowed_rows)
    outputs = tuple([_output_axes(spec, settings, padding.names) for spec in signature.outputs])
    return replace(padding, outputs=outputs)


def rows_limit(max_rows: int, allowed_rows: Sequence[int]) -> int:
    """Most rows of a run: the largest allowed count within `max_rows`.

    Raises:
        ConfigError: No allowed count is within it.
    """
    if not allowed_rows:
        return max_rows
    within = [rows for rows in allowed_rows if rows <= max_rows]
    if not within:
        raise ConfigError(
            f"padding.allowed_rows begins with {allowed_rows[0]}, but batching.max_rows is {max_rows}; "
            "expected an allowed count within it"
        )
    return max(within)


def _step(size: int) -> int:
    """The next of 8, 12, 16, 24, 32, 48, 64, 96, ...: so few sizes group well, and waste a third at most."""
    if size <= _LEAST_BUCKET:
        return _LEAST_BUCKET if size else 0
    power = 1 << (size - 1).bit_length()
    return power * 3 // 4 if size <= power * 3 // 4 else power


def _cut(axes: Axes, sizes: Mapping[str, int]) -> Cut:
    """An index that takes the leading `sizes` of the axes; empty where there are none."""
    if not axes:
        return ()
    index = [slice(None)] * (1 + max(axis for axis, _ in axes))
    for axis, name in axes:
        index[axis] = slice(sizes[name])
    return tuple(index)


def _input_axes(spec: TensorSpec, settings: PaddingSettings) -> Axes:
    axes: Sequence[int] = range(1, len(spec.shape))
    if settings.axes:
        axes = settings.axes.get(spec.name, ())
        for axis in axes:
            if not 0 < axis < len(spec.shape) or spec.shape[axis] >= 0:
                raise ConfigError(
                    f"padding.axes.{spec.name} has {axis}, but the input is {spec}; expected the number of a dimension "
                    "of any size, which is not the one of the rows"
                )
    return tuple([(axis, _axis_name(spec, axis)) for axis in axes if spec.shape[axis] < 0])


def _output_axes(spec: TensorSpec, settings: PaddingSettings, names: Collection[str]) -> Axes:
    given = settings.outputs.get(spec.name)
    if given is None:
        return tuple([(axis, name) for axis, name in enumerate(spec.dim_names) if axis and name in names])
    for axis, name in given.items():
        if name not in names or not 0 < axis < len(spec.shape):
            raise ConfigError(
                f"padding.outputs.{spec.name} has {axis}: {name}, but the output is {spec}; expected the number of a "
                f"dimension, and what it measures: {_listed(names)}"
            )
    return tuple(given.items())


def _axis_name(spec: TensorSpec, axis: int) -> str:
    """The model's own name of the axis, or one made of the input's, such as `tokens.1`."""
    return (spec.dim_names[axis] if spec.dim_names else "") or f"{spec.name}.{axis}"


def _value(spec: TensorSpec, values: Mapping[str, Any]) -> Any:
    """What the input is padded with."""
    text = spec.dtype.kind in _TEXT_KINDS
    value = values.get(spec.name, "" if text else 0)
    if isinstance(value, str) != text or not (text or _holds(spec.dtype, value)):
        raise ConfigError(f"padding.values.{spec.name} is {value!r}, which is no element of the input: it is {spec}")
    return value


def _holds(dtype: np.dtype[Any], value: float) -> bool:
    try:
        with np.errstate(all="ignore"):
            kept = np.full((), value, dtype)
    except (ValueError, OverflowError):
        return False
    whole = dtype.kind in "iu"
    return not whole or (math.isfinite(value) and kept.item() == value)


def _check_names(key: str, given: Mapping[str, object], specs: Sequence[TensorSpec]) -> None:
    known = [spec.name for spec in specs]
    for name in given:
        if name not in known:
            raise ConfigError(f"padding.{key} has '{name}', which the model does not have; it has {_listed(known)}")


def _listed(names: Collection[str]) -> str:
    return ", ".join(f"'{name}'" for name in names) or "none"
