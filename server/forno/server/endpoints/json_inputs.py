"""The tensors of a JSON request, read as what the signature wants. `json_body.py` shows the forms."""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any

import numpy as np

from forno.server.endpoints import json_document, json_numbers
from forno.server.endpoints.json_body import parse_plainly, wrong
from forno.server.endpoints.json_values import Place, from_base64, show, to_array
from forno.server.errors import InvalidArgument
from forno.server.spelling import listed, nearest
from forno.v1 import tensors

if TYPE_CHECKING:
    from collections.abc import Mapping

    from forno.server.endpoints.json_body import Body
    from forno.server.signature import Signature, TensorSpec

    Array = np.ndarray[Any, np.dtype[Any]]
    Specs = Mapping[str, TensorSpec]

_TYPED = ("floats", "doubles", "ints", "uints", "bools", "strings", "blobs")  # of the gRPC message
_ITEM = ("name", "data_type", "shape", "data", "b64", *_TYPED)
_MAX_DIMENSION = 2**31 - 1


def tensors_of(body: Body, signature: Signature) -> dict[str, Array]:
    """The inputs by name, of the signature's element types and the shapes that were written.

    Raises:
        InvalidArgument: They cannot be read as the signature's; names the input and the place.
    """
    specs = {spec.name: spec for spec in signature.inputs}
    if body.runs:
        try:
            return _read(body, specs)
        except (InvalidArgument, json_numbers.Unliftable):
            body = parse_plainly(body.text)  # and so learn what is wrong, if anything is
    return _read(body, specs)


def from_bytes(data: bytes, spec: TensorSpec, place: Place, shape: tuple[int, ...] | None = None) -> Array:
    """The tensor whose raw elements (little-endian, row-major; strings each after their length) these are.

    Raises:
        InvalidArgument: Their count does not fit the shape, or does not decide it where none is given.
    """
    if spec.dtype == tensors.OBJECT:
        if shape is None:
            raise place.wrong("holds strings, whose number does not show from outside: give `shape`")
        try:
            return tensors.unpack_strings(data, prod(shape)).reshape(shape)
        except ValueError as error:
            raise place.wrong(str(error)) from None
    count, rest = divmod(len(data), spec.dtype.itemsize)
    if shape is None and not rest:
        shape = fitting(count, spec)
        if shape is None:
            raise place.wrong(f"has {count} elements, which do not decide the shape of {spec}")
    if shape is None or count != prod(shape) or rest:
        wanted = f"shape {list(shape)} of" if shape is not None else "a multiple of"
        size = spec.dtype.itemsize * (prod(shape) if shape is not None else 1)
        raise place.wrong(f"has {len(data)} bytes, but {wanted} {tensors.name_of(spec.dtype)} needs {size}")
    return np.frombuffer(data, spec.dtype).reshape(shape)


def fitting(count: int, spec: TensorSpec) -> tuple[int, ...] | None:
    """The one shape of so many elements that fits the signature; None where there is not exactly one."""
    fixed = prod(size for size in spec.shape if size >= 0)
    free = sum(size < 0 for size in spec.shape)
    if free == 0:
        return spec.shape if count == fixed else None
    if free > 1 or fixed == 0 or count % fixed:
        return None
    return tuple(count // fixed if size < 0 else size for size in spec.shape)


def _read(body: Body, specs: Specs) -> dict[str, Array]:
    match body.form:
        case "rows":
            return _from_rows(body, specs)
        case "columns":
            return _from_columns(body, specs)
        case "native":
            return _from_native(body, specs)


def _from_rows(body: Body, specs: Specs) -> dict[str, Array]:
    rows = body.content
    if body.is_run(rows) or type(rows[0]) is not dict or _is_blob(rows[0], specs):
        return _only(body, specs, "instances")
    names = rows[0].keys()
    for number, row in enumerate(rows):
        where = f"instances[{number}]"
        if type(row) is not dict:
            raise wrong(where, f"is {show(row)}, but instances[0] is an object")
        if row.keys() != names:
            differing = listed(sorted(f"'{name[:100]}'" for name in names ^ row.keys()))
            raise wrong(where, f"has other inputs than instances[0]: {differing} in one of them only")
    json_document.refuse_unknown(names, specs, "instances[0]")
    return {
        name: _array(body, [row[name] for row in rows], specs[name], Place(name, "instances", f".{name}"))
        for name in names
    }


def _from_columns(body: Body, specs: Specs) -> dict[str, Array]:
    content = body.content
    if body.is_run(content) or type(content) is not dict or _is_blob(content, specs):
        return _only(body, specs, "inputs")
    json_document.refuse_unknown(content, specs, "inputs")
    return {name: _array(body, value, specs[name], Place(name, f"inputs.{name}")) for name, value in content.items()}


def _only(body: Body, specs: Specs, path: str) -> dict[str, Array]:
    if len(specs) != 1:
        names = listed([f"'{name}'" for name in specs])
        raise wrong(path, f"has values without names, but this model has {len(specs)} inputs: {names}")
    (spec,) = specs.values()
    return {spec.name: _array(body, body.content, spec, Place(spec.name, path))}


def _is_blob(value: object, specs: Specs) -> bool:
    """Whether an object is the bytes of one string, not inputs by name."""
    return type(value) is dict and value.keys() == {"b64"} and "b64" not in specs


def _from_native(body: Body, specs: Specs) -> dict[str, Array]:
    arrays: dict[str, Array] = {}
    for number, item in enumerate(body.content):
        where = f"inputs[{number}]"
        if type(item) is not dict:
            raise wrong(where, f'is {show(item)}, expected an object with "name" and "data"')
        json_document.refuse_unknown(item, _ITEM, where)
        name = item.get("name")
        if name is None:
            raise wrong(where, f"has no `name`; this model takes {listed([*specs])}")
        if name not in specs if isinstance(name, str) else True:
            meant = nearest(name, specs) if isinstance(name, str) else None
            hint = f"did you mean '{meant}'?" if meant else f"this model takes {listed([*specs])}"
            raise wrong(f"{where}.name", f"is {show(name)}, which is no input; {hint}")
        if name in arrays:
            raise wrong(f"{where}.name", f"is {show(name)}, which an earlier item has given")
        arrays[name] = _native_array(body, item, specs[name], where)
    return arrays


def _native_array(body: Body, item: Mapping[str, Any], spec: TensorSpec, where: str) -> Array:
    wanted = tensors.name_of(spec.dtype)
    given = item.get("data_type", wanted)
    if given not in (wanted, f"DATA_TYPE_{wanted.upper()}"):
        raise wrong(f"{where}.data_type", f"is {show(given)}, but input '{spec.name}' is {spec}")
    forms = [key for key in item if key in ("data", "b64", *_TYPED)]
    if len(forms) != 1:
        raise wrong(where, "needs exactly one of `data` and `b64`, or one typed form such as `floats`")
    shape = _dims(item["shape"], f"{where}.shape") if "shape" in item else None
    if "b64" in item:
        place = Place(spec.name, f"{where}.b64")
        return from_bytes(from_base64(item["b64"], place), spec, place, shape)
    place = Place(spec.name, f"{where}.{forms[0]}")
    value = item["data"] if forms[0] == "data" else _typed_values(body, item[forms[0]], forms[0], spec, place)
    array = _array(body, value, spec, place)
    if shape is None:
        if array.ndim != 1 or len(spec.shape) == 1:
            return array
        shape = fitting(array.size, spec)
        if shape is None:
            raise place.wrong(f"has {array.size} values, which do not decide the shape of {spec}: give `shape`")
    written = shape if array.size else shape[: array.ndim]  # lists of nothing do not say what they lack
    if array.ndim > 1 and array.shape != written:
        raise place.wrong(f"is nested as {list(array.shape)}, but `shape` is {list(shape)}")
    if array.size != prod(shape):
        raise place.wrong(f"has {array.size} values, but shape {list(shape)} needs {prod(shape)}")
    return array.reshape(shape)


def _typed_values(body: Body, form: Any, name: str, spec: TensorSpec, place: Place) -> Any:
    """What `data` would hold instead of a typed form of the gRPC message."""
    typed = tensors.typed_form(spec.dtype)
    if name != typed and (name, typed) != ("blobs", "strings"):
        raise place.wrong(f"is given, but {tensors.name_of(spec.dtype)} elements go into `{typed}`")
    values = form["values"] if type(form) is dict and form.keys() == {"values"} else None
    if name == "blobs" and type(values) is list:
        return [{"b64": value} for value in values]
    if type(values) is not list and not body.is_run(values):
        raise place.wrong(f'is {show(form)}, expected {{"values": [...]}}')
    return values


def _array(body: Body, value: Any, spec: TensorSpec, place: Place) -> Array:
    if body.is_run(value):
        return json_numbers.read(body.runs[value[json_numbers.MARK]], spec.dtype)
    if body.runs and type(value) is list and value and all(map(body.is_run, value)):
        rows = [json_numbers.read(body.runs[row[json_numbers.MARK]], spec.dtype) for row in value]
        if len({row.shape for row in rows}) != 1:
            raise json_numbers.Unliftable
        return np.stack(rows)
    return to_array(value, spec.dtype, place)


def _dims(value: object, path: str) -> tuple[int, ...]:
    if not isinstance(value, list):
        raise wrong(path, f"is {show(value)}, expected a list of dimensions")
    for number, size in enumerate(value):
        if type(size) is not int or not 0 <= size <= _MAX_DIMENSION:
            raise wrong(f"{path}[{number}]", f"is {show(size)}, expected 0 to {_MAX_DIMENSION}, whole")
    return tuple(value)
