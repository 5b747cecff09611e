"""Requests to a model as JSON, in the three forms that people use.

    rows       {"instances": [row, ...]}                 -> {"predictions": [row, ...]}
    columns    {"inputs": value | {name: value}}         -> {"outputs": value | {name: value}}
    native     {"inputs": [{"name", "data", ...}]}       -> {"model", "version", "outputs": [...], "timings"}

The first two are those of TensorFlow Serving and KServe v1: where there is one input (output) its name may be
(is) left out. A row is one instance; with several inputs it is an object. The native form is `PredictRequest`
for people.

Here is what does not need the model: the envelope. `json_inputs.py` reads the tensors, `json_outputs.py`
writes them.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

import orjson

from forno.server.endpoints import json_document, json_numbers
from forno.server.endpoints.json_values import show
from forno.server.errors import InvalidArgument

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]
    Form = Literal["rows", "columns", "native"]

_TOP = (
    *("instances", "inputs", "outputs", "model", "version", "label"),
    *("request_id", "parameters", "signature_name"),
)
_PARAMETERS = ("priority", "queue_timeout_ms", "timeout_ms")
_MAX_PRIORITY = 100
_MAX_TIMEOUT_MS = 86_400_000
_MAX_ID_CHARACTERS = 128


@dataclass(slots=True)
class Body:
    """A request as its caller wrote it; its tensors are read once the model is known, and so their types."""

    form: Form
    content: Any  # of `instances` or `inputs`
    model: str = ""
    version: str = ""
    label: str = ""
    outputs: tuple[str, ...] = ()
    request_id: str = ""
    priority: int = 0
    queue_timeout_us: int | None = None  # longest wait in the queue
    timeout_us: int | None = None  # when the answer is of no use
    runs: Sequence[bytes | Array] = field(default=(), repr=False)  # lifted out of the content, see json_numbers.py
    text: bytes = field(default=b"", repr=False)  # of the whole body, where runs are lifted out of it

    def is_run(self, value: object) -> bool:
        """Whether a value of the content is the mark of a lifted run."""
        return bool(self.runs) and type(value) is dict and json_numbers.MARK in value


def parse(text: bytes) -> Body:
    """The request that a body stands for.

    Raises:
        InvalidArgument: It is not JSON, or in none of the forms; says where.
    """
    rest, runs = json_numbers.lift(text)
    if runs:
        try:
            value = orjson.loads(rest)
            json_document.refuse_repeated_keys(rest, value)
            return of_value(value, runs, text)
        except (orjson.JSONDecodeError, InvalidArgument):
            pass  # the plain reader says what is wrong, if anything is
    return parse_plainly(text)


def parse_plainly(text: bytes) -> Body:
    """As `parse`, without lifting runs of numbers."""
    return of_value(json_document.parse(text))


def of_value(value: Any, runs: Sequence[bytes | Array] = (), text: bytes = b"") -> Body:
    """The request that an already parsed body stands for.

    Raises:
        InvalidArgument: It is in none of the forms; says where.
    """
    if type(value) is not dict:
        raise InvalidArgument(f'the body is {show(value)}, expected an object such as {{"instances": [...]}}')
    json_document.refuse_unknown(value, _TOP, "")
    if ("instances" in value) == ("inputs" in value):
        raise InvalidArgument("the body needs exactly one of `instances` (rows) and `inputs` (columns)")
    if value.get("signature_name", "serving_default") != "serving_default":
        seen = show(value["signature_name"])
        raise wrong("signature_name", f'is {seen}, but models here have one signature, "serving_default"')
    priority, queue_timeout_us, timeout_us = _parameters(value.get("parameters", {}))
    body = Body(
        form="rows",
        content=value["instances"] if "instances" in value else value["inputs"],
        model=_string(value, "model"),
        version=str(value["version"]) if type(value.get("version")) is int else _string(value, "version"),
        label=_string(value, "label"),
        outputs=_names(value.get("outputs", [])),
        request_id=_string(value, "request_id"),
        priority=priority,
        queue_timeout_us=queue_timeout_us,
        timeout_us=timeout_us,
        runs=runs,
        text=text,
    )
    if len(body.request_id) > _MAX_ID_CHARACTERS:
        seen = f"{len(body.request_id)} characters"
        raise wrong("request_id", f"has {seen}, expected at most {_MAX_ID_CHARACTERS}")
    if "inputs" in value:
        body.form = "native" if _is_native(body.content) else "columns"
    elif not body.is_run(body.content) and not (type(body.content) is list and body.content):
        seen = "an empty list" if body.content == [] else show(body.content)
        raise wrong("instances", f"is {seen}, expected a list of at least one row")
    return body


def wrong(path: str, text: str) -> InvalidArgument:
    """The error that says `text` of what stands at a path of the body."""
    return InvalidArgument(f"`{path}` {text}", path)


def _is_native(content: object) -> bool:
    """Whether `inputs` lists named tensors, rather than being the values of the only input."""
    if type(content) is not list:
        return False
    return not content or (type(content[0]) is dict and content[0].keys() != {"b64"})


def _string(value: Mapping[str, Any], key: str) -> str:
    found = value.get(key, "")
    if not isinstance(found, str):
        raise wrong(key, f"is {show(found)}, expected a string")
    return found


def _names(names: object) -> tuple[str, ...]:
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise wrong("outputs", f"is {show(names)}, expected a list of output names")
    return tuple(names)


def _parameters(values: object) -> tuple[int, int | None, int | None]:
    if not isinstance(values, dict):
        raise wrong("parameters", f"is {show(values)}, expected an object")
    json_document.refuse_unknown(values, _PARAMETERS, "parameters")
    priority = values.get("priority", 0)
    if type(priority) is not int or abs(priority) > _MAX_PRIORITY:
        seen = show(priority)
        raise wrong("parameters.priority", f"is {seen}, expected -{_MAX_PRIORITY} to {_MAX_PRIORITY}, whole")
    return priority, _microseconds(values, "queue_timeout_ms"), _microseconds(values, "timeout_ms")


def _microseconds(values: Mapping[str, Any], key: str) -> int | None:
    milliseconds = values.get(key)
    if milliseconds is None:
        return None
    if type(milliseconds) not in (int, float) or not 0 < milliseconds <= _MAX_TIMEOUT_MS:
        seen = show(milliseconds)
        raise wrong(f"parameters.{key}", f"is {seen}, expected over 0, at most {_MAX_TIMEOUT_MS}")
    return int(milliseconds * 1000)
