"""The short way of `Predict` and `PredictStream`: what a client's requests have in common is worked out once.

The native module cuts a request into its `key`, which says all but the elements, and the elements themselves
(transport/envoy/native/split.h). The first request of a key is looked at by the ordinary parser and checked; if it is
sound, the key gets a plan: which arrays to cut from the message and how to write the answer. Requests with that key
need no parser, no validation, no task and no messages. Whatever is not plain (typed values, strings, compressed
messages, faults) goes the ordinary way, which is the only one that says what is wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np
from google.protobuf.message import DecodeError
from google.rpc.status_pb2 import Status

from forno.server.errors import FornoError
from forno.server.request import Request
from forno.server.security import access
from forno.server.servicers import status
from forno.server.servicers.predictor import read_request
from forno.server.servicers.wire import AnswerWriter
from forno.v1 import predictor_pb2, tensor_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import grpc

    from forno.server.model import Model
    from forno.server.registry import Registry
    from forno.server.servicers.wire import Part
    from forno.server.signature import Signature

    Told = tuple[grpc.StatusCode, str, Sequence[tuple[str, str | bytes]]]

MAX_PLANS = 256
"""Keys that are remembered; the oldest goes first. A caller chooses keys, and must not choose our memory."""


def _number(message: Any, field: str) -> int:
    return int(message.DESCRIPTOR.fields_by_name[field].number)


_FIELDS = (
    _number(predictor_pb2.PredictRequest, "inputs"),
    _number(predictor_pb2.PredictRequest, "request_id"),
    _number(tensor_pb2.Tensor, "data"),
    _number(tensor_pb2.Tensor, "shape"),  # the last small field of a tensor
    _number(predictor_pb2.PredictResponse, "request_id"),
)
LAYOUT = (*_FIELDS, 0, 0, 0)
"""What the native module needs to know of `Predict`: field numbers, in the order of split.h's Layout."""
ITEM_LAYOUT = (
    *_FIELDS,
    _number(predictor_pb2.PredictStreamRequest, "request"),
    _number(predictor_pb2.PredictStreamResponse, "request_id"),
    _number(predictor_pb2.PredictStreamResponse, "response"),
)
"""The same of `PredictStream`."""

_UNPLANNED = frozenset((np.dtype(object), np.dtype(np.bool_)))
"""Element types whose bytes have to be looked at."""


class Reply(Protocol):
    """A request, as a buffer from the elements of its first tensor on, and the place for its answer.

    It is a future as far as the batcher and the worker need one.
    """

    is_item: bool
    expires_us: int

    def done(self) -> bool:
        """Whether nobody waits any more."""

    def set_result(self, result: Sequence[Part]) -> None:
        """Sends the answer; the parts are not kept."""

    def set_exception(self, error: BaseException) -> None:
        """Sends the error."""

    def message(self) -> bytes:
        """The serialized request, or item of a stream."""

    def spans(self) -> tuple[int, ...]:
        """Offset and size of the elements of each tensor, flat."""


class _Plan(NamedTuple):
    """How to treat requests of one key."""

    name: str
    version: str
    label: str
    signature: Signature
    model: Model
    inputs: tuple[tuple[tuple[int, ...], np.dtype[Any], int], ...]  # shape, dtype, offset; none where unplanned
    rows: int
    priority: int
    timeout_us: int  # queue timeout; 0 without one
    writer: AnswerWriter


class HotPredict:
    """Answers split requests. Owned by the transport's host; event loop only.

    Args:
        registry: Where models are found, at each call, so that versions can be swapped.
        clock_us: Monotonic microseconds.
    """

    def __init__(self, registry: Registry, clock_us: Callable[[], int]) -> None:
        self._registry = registry
        self._clock_us = clock_us
        self._plans: dict[bytes, _Plan] = {}

    def __call__(self, key: bytes, replies: Sequence[Reply]) -> bool:
        """Takes requests, if it can.

        Args:
            key: What `split.h` left of each.
            replies: The requests, and where their answers go, unless the result is False. Where callers have rights,
                one at a time, its caller being `access.CURRENT`.

        Returns:
            False where they have to go the ordinary way.
        """
        try:
            plan = self._plans.get(key)
            if plan is None or not self._is_current(plan):
                plan = self._learn(key, replies[0])
        except (FornoError, DecodeError):
            return False
        inputs = plan.inputs
        if not inputs:
            return False
        if replies[0].is_item and access.CURRENT.get() is not None:  # then it is the only one
            try:
                access.next_item()
                self._is_current(plan)  # whoever calls now may not use the model
            except FornoError as error:
                replies[0].set_exception(error)
                return True
        submit, rows, finish, priority = plan.model.submit, plan.rows, plan.writer.parts, plan.priority
        array: Any = np.ndarray
        first_shape, first_dtype, first_offset = inputs[0]
        for reply in replies:
            by_us = expires_us = reply.expires_us
            if plan.timeout_us:
                expires_us = min(by_us, self._clock_us() + plan.timeout_us)
            arrays = (array(first_shape, first_dtype, reply, first_offset),)
            if len(inputs) > 1:  # apart: a comprehension costs as much as all else here
                arrays += tuple([array(shape, dtype, reply, offset) for shape, dtype, offset in inputs[1:]])
            try:
                submit(Request(arrays, rows, finish, reply, 0, expires_us, priority, 0, by_us))  # type: ignore[arg-type]
            except FornoError as error:
                reply.set_exception(error)
        return True

    def status_of(self, error: BaseException) -> Told:
        """What a caller is told of an error: the same as on the ordinary way."""
        told = status.to_status(error)
        return status.CODES[told.code], told.message, status.trailing_metadata(error, told)

    def error_item(self, request_id: str, told: Told) -> bytes:
        """The item of a stream that tells of an error."""
        code, message, trailing = told
        details = dict(trailing).get(status.DETAILS_KEY)
        error = Status.FromString(details) if details else Status(code=code.value[0], message=message)
        return predictor_pb2.PredictStreamResponse(request_id=request_id, error=error).SerializeToString()

    def _is_current(self, plan: _Plan) -> bool:
        model = plan.model
        return self._registry.get(plan.name, plan.version, plan.label) is model and model.signature is plan.signature

    def _learn(self, key: bytes, reply: Reply) -> _Plan:
        """Makes a plan for a key from its first request.

        Raises:
            FornoError: The request is refused.
            DecodeError: It is none.
        """
        message = reply.message()
        request = (
            predictor_pb2.PredictStreamRequest.FromString(message).request
            if reply.is_item
            else predictor_pb2.PredictRequest.FromString(message)
        )
        asked = read_request(self._registry, request)
        model, spans = asked.model, reply.spans()
        signature = model.signature
        inputs: list[tuple[tuple[int, ...], np.dtype[Any], int]] = []
        if not any(spec.dtype in _UNPLANNED for spec in signature.inputs):
            offsets = {tensor.name: spans[2 * index] for index, tensor in enumerate(request.inputs)}
            for spec, given in zip(signature.inputs, asked.inputs, strict=True):
                inputs.append((given.shape, spec.dtype, offsets[spec.name]))
        wanted = range(len(signature.outputs)) if asked.wanted is None else asked.wanted
        if len(self._plans) >= MAX_PLANS:
            del self._plans[next(iter(self._plans))]
        plan = self._plans[key] = _Plan(
            *(request.model, request.version, request.label, signature, model, tuple(inputs)),
            *(asked.rows, asked.priority, asked.timeout_us),
            AnswerWriter(model.name, model.version, [(index, signature.outputs[index]) for index in wanted]),
        )
        return plan
