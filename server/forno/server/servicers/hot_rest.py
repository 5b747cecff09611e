"""The short way of REST's Predict: what a client's JSON bodies have in common is worked out once.

The native module cuts a body into its `key`, which says all but the numbers, and the numbers
(transport/envoy/native/json_split.h). A key is read by the ordinary reader, with the places of its arrays marked, and
becomes a plan: which model, which numbers are which input, how to write the answer. Requests of that key need no
parser, no validation, no task and no messages. Whatever does not fit (errors above all) goes the ordinary way,
`rest.py`, which is the only one that says what is wrong.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
import orjson

from forno.server.endpoints import json_body, json_document, json_inputs, json_numbers, json_outputs
from forno.server.endpoints.json_numbers import MARK, Unliftable
from forno.server.endpoints.payload import UNTOLD, is_json
from forno.server.errors import FornoError
from forno.server.request import Request, waits_until_us
from forno.server.servicers import rest
from forno.server.servicers.plans import Plan, Plans

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from forno.server.endpoints.json_body import Body
    from forno.server.model import Model
    from forno.server.registry import Registry
    from forno.server.request import Answer
    from forno.server.signature import Signature
    from forno.v1 import rest_pb2

    Array = np.ndarray[Any, np.dtype[Any]]
    Write = Callable[[Answer], Sequence[bytes]]
    Place = tuple[int, int, np.dtype[Any], tuple[int, ...]]  # first number, end, dtype, shape


class Reply(Protocol):
    """The place for an answer: a future as far as the batcher and the worker need one."""

    expires_us: int

    def done(self) -> bool:
        """Whether nobody waits any more."""

    def set_result(self, parts: Sequence[bytes]) -> None:
        """Sends the answer."""

    def set_exception(self, error: BaseException) -> None:
        """Sends the error."""


class HotRest:
    """Answers split `Predict` bodies. Owned by the transport's host; event loop only.

    Args:
        registry: Where models are found, at each call, so that versions can be swapped.
        clock_us: Monotonic microseconds.
    """

    def __init__(self, registry: Registry, clock_us: Callable[[], int]) -> None:
        self._registry = registry
        self._clock_us = clock_us
        self.plans: Plans[Place] = Plans(registry)

    def request(self, path: str, content_type: str, body: bytes) -> rest_pb2.RestPredictRequest:
        """The message that `Rest.Predict` takes."""
        return rest.request_of(path, content_type, body)

    def __call__(self, key: bytes, counts: Sequence[int], numbers: bytes, reply: Reply) -> bool:
        """Takes one call, if it can.

        Args:
            key: What is left of the body without the numbers.
            counts: Numbers of each array.
            numbers: All of them, as doubles.
            reply: Where the answer goes, unless the result is False.

        Returns:
            False where the call has to go the ordinary way.
        """
        try:
            plan = self.plans.get(key) or self._learn(key, counts)
            doubles = np.frombuffer(numbers)
            inputs = tuple(
                [
                    json_numbers.of_doubles(doubles[start:end], dtype).reshape(shape)
                    for start, end, dtype, shape in plan.inputs
                ]
            )
        except (FornoError, Unliftable, orjson.JSONDecodeError):
            return False
        expires_us = answer_by_us = reply.expires_us
        if plan.timeout_us:
            expires_us = waits_until_us(answer_by_us, plan.timeout_us, self._clock_us())
        try:
            plan.model.submit(
                Request(inputs, plan.rows, plan.write, reply, 0, expires_us, plan.priority, deadline_us=answer_by_us)  # type: ignore[arg-type]
            )
        except FornoError as error:
            reply.set_exception(error)
        return True

    def _learn(self, key: bytes, counts: Sequence[int]) -> Plan[Place]:
        """Makes a plan for a key.

        Raises:
            FornoError: The request is wrong; the ordinary way will say so.
            Unliftable: It has no plan.
            JSONDecodeError: It is not JSON.
        """
        path, content_type, text = key.split(b"\n", 2)
        media_type = content_type.decode("latin-1").partition(";")[0].strip().lower()
        if not (media_type in UNTOLD or is_json(media_type)):
            raise Unliftable
        value = orjson.loads(text)
        json_document.refuse_repeated_keys(text, value)
        shapes: list[tuple[int, ...]] = []
        value = _numbered(value, shapes)
        ends = np.cumsum([0, *counts]).tolist()
        body = json_body.of_value(value, [np.broadcast_to(0.0, shape) for shape in shapes])
        name, version, label = rest.selected(rest.request_of(path.decode(), "", b""), body)
        model = self._registry.get(name, version, label)
        signature = model.signature
        arrays = json_inputs.tensors_of(body, signature)
        ordered = signature.arrange(arrays)
        rows = signature.validate(ordered)
        if body.timeout_us is not None:  # nobody here keeps it
            raise Unliftable
        places = _places(body, signature)
        inputs: list[Place] = []
        for spec, array in zip(signature.inputs, ordered, strict=True):
            runs = places[spec.name]
            start, end = ends[runs[0]], ends[runs[-1] + 1]
            if list(runs) != list(range(runs[0], runs[-1] + 1)) or end - start != prod(array.shape):
                raise Unliftable
            inputs.append((start, end, spec.dtype, array.shape))
        plan = Plan(
            *(name, version, label, signature, model, tuple(inputs), rows, body.priority),
            *(body.queue_timeout_us or 0, _writer(body, arrays, model)),
        )
        return self.plans.keep(key, plan)


def _numbered(value: Any, shapes: list[tuple[int, ...]]) -> Any:
    """The value with {MARK: number} for each marked array, and their shapes."""
    if type(value) is dict:
        if MARK in value:
            shapes.append(tuple(value[MARK]))
            return {MARK: len(shapes) - 1}
        return {key: _numbered(item, shapes) for key, item in value.items()}
    return [_numbered(item, shapes) for item in value] if type(value) is list else value


def _places(body: Body, signature: Signature) -> dict[str, list[int]]:
    """Which arrays are an input's elements, one after another.

    Raises:
        Unliftable: Not all elements are in arrays.
    """

    def run_of(value: Any) -> int:
        if not body.is_run(value):
            raise Unliftable
        number: int = value[MARK]
        return number

    content = body.content
    if body.is_run(content):
        return {signature.inputs[0].name: [run_of(content)]}
    match body.form:
        case "rows":
            if type(content[0]) is not dict or body.is_run(content[0]):
                return {signature.inputs[0].name: [run_of(row) for row in content]}
            return {name: [run_of(row[name]) for row in content] for name in content[0]}
        case "columns":
            if type(content) is not dict:
                raise Unliftable
            return {name: [run_of(value)] for name, value in content.items()}
        case "native":
            return {item["name"]: [run_of(item.get("data"))] for item in content}


def _writer(body: Body, arrays: Any, model: Model) -> Write:
    """What writes the answers to requests of one key, as `rest.py` would."""
    signature, name, version = model.signature, model.name, model.version
    rows = rest.rows_of(arrays)
    indexes = signature.output_indexes(body.outputs)
    single = range(len(signature.outputs)) if indexes is None else indexes
    heads = {"rows": (b'{"predictions":', b"}"), "columns": (b'{"outputs":', b"}")}
    body.content = None  # a plan lives long, and the content is not needed for the answer
    body.runs = ()

    def write(answer: Answer) -> Sequence[bytes]:
        value = json_outputs.document(body, answer, signature, rows=rows, model=name, version=version)
        return (json_outputs.dumps(value),)

    if len(single) != 1 or body.form not in heads or signature.outputs[single[0]].dtype.kind not in "fiu":
        return write
    (index,), (head, tail) = single, heads[body.form]
    by_rows = body.form == "rows"

    def write_plainly(answer: Answer) -> Sequence[bytes]:
        output = answer.outputs[index]
        if not output.ndim or (by_rows and output.shape[0] != rows) or not output.flags.c_contiguous:
            return write(answer)
        text = orjson.dumps(output, option=orjson.OPT_SERIALIZE_NUMPY)
        if b"n" in text:  # of "null": what is not finite has words of its own
            return write(answer)
        return head, text, tail

    return write_plainly
