"""The short way of `Predict` and `PredictStream`: what a client's requests have in common is worked out once.

The native module cuts a request into its `key`, which says all but the elements, and the elements themselves
(transport/envoy/native/split.h). The first request of a key is looked at by the ordinary parser and checked; if it is
sound, the key gets a plan: which arrays to cut from the message and how to write the answer. Requests with that key
need no parser, no validation, no task and no messages. Whatever is not plain (typed values, strings, compressed
messages, faults) goes the ordinary way, which is the only one that says what is wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import numpy as np
from google.protobuf.message import DecodeError

from forno.server.errors import FornoError
from forno.server.request import Request, waits_until_us
from forno.server.security import access
from forno.server.servicers.plans import Plan, Plans
from forno.server.servicers.predictor import read_request
from forno.server.servicers.wire import AnswerWriter
from forno.v1 import predictor_pb2, tensor_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from google.rpc.status_pb2 import Status

    from forno.server.registry import Registry
    from forno.server.servicers.wire import Part

    Place = tuple[tuple[int, ...], np.dtype[Any], int]  # shape, dtype, offset


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


class HotPredict:
    """Answers split requests. Owned by the transport's host; event loop only.

    Args:
        registry: Where models are found, at each call, so that versions can be swapped.
        clock_us: Monotonic microseconds.
    """

    def __init__(self, registry: Registry, clock_us: Callable[[], int]) -> None:
        self._registry = registry
        self._clock_us = clock_us
        self.plans: Plans[Place] = Plans(registry)

    def __call__(self, key: bytes, replies: Sequence[Reply]) -> bool:
        """Takes requests, if it can.

        Args:
            key: What `split.h` left of each.
            replies: The requests, and where their answers go, unless the result is False. Where callers have rights,
                all of `access.CURRENT`.

        Returns:
            False where they have to go the ordinary way.
        """
        try:
            plan = self.plans.get(key) or self._learn(key, replies[0])
        except (FornoError, DecodeError):
            return False
        inputs = plan.inputs
        if not inputs:
            return False
        if replies[0].is_item and access.CURRENT.get() is not None:
            replies = self._admitted(plan, replies)
        submit, rows, write, priority, timeout_us = (
            *(plan.model.submit, plan.rows, plan.write),
            *(plan.priority, plan.timeout_us),
        )
        array: Any = np.ndarray
        first_shape, first_dtype, first_offset = inputs[0]
        for reply in replies:
            by_us = expires_us = reply.expires_us
            if timeout_us:
                expires_us = waits_until_us(by_us, timeout_us, self._clock_us())
            arrays = (array(first_shape, first_dtype, reply, first_offset),)
            if len(inputs) > 1:  # apart: a comprehension costs as much as all else here
                arrays += tuple([array(shape, dtype, reply, offset) for shape, dtype, offset in inputs[1:]])
            try:
                submit(Request(arrays, rows, write, reply, 0, expires_us, priority, 0, by_us))  # type: ignore[arg-type]
            except FornoError as error:
                reply.set_exception(error)
        return True

    def _admitted(self, plan: Plan[Place], replies: Sequence[Reply]) -> list[Reply]:
        """Those items of a stream that its caller may send; the others are answered here."""
        admitted, entitled = [], access.CURRENT.get()
        for reply in replies:
            try:
                access.next_item()
                if (caller := access.CURRENT.get()) is not entitled:  # whoever it is now may not use the model
                    self.plans.holds(plan)
                    entitled = caller
                admitted.append(reply)
            except FornoError as error:
                reply.set_exception(error)
        return admitted

    def error_item(self, request_id: str, error: Status) -> bytes:
        """The item of a stream that tells of an error."""
        return predictor_pb2.PredictStreamResponse(request_id=request_id, error=error).SerializeToString()

    def _learn(self, key: bytes, reply: Reply) -> Plan[Place]:
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
        inputs: list[Place] = []
        if not any(spec.dtype in _UNPLANNED for spec in signature.inputs):
            offsets = {tensor.name: spans[2 * index] for index, tensor in enumerate(request.inputs)}
            for spec, given in zip(signature.inputs, asked.inputs, strict=True):
                inputs.append((given.shape, spec.dtype, offsets[spec.name]))
        wanted = range(len(signature.outputs)) if asked.wanted is None else asked.wanted
        writer = AnswerWriter(model.name, model.version, [(index, signature.outputs[index]) for index in wanted])
        plan = Plan(
            *(request.model, request.version, request.label, signature, model, tuple(inputs)),
            *(asked.rows, asked.priority, asked.timeout_us, writer.parts),
        )
        return self.plans.keep(key, plan)
