"""The short way of `Predict`: what a client's calls have in common is worked out once.

The native module cuts a request into its `key`, which says all but the elements, and the places where those lie
(transport/envoy/native/split.h). The first request of a key goes the ordinary way; if that takes it, the key gets a
plan: which arrays to cut from the message and how to write the answer. Later requests with that key need no parser, no
validation, no task and no messages. Whatever is not plain (typed values, strings, compressed messages, errors) goes the
ordinary way, which is the only one that says what is wrong.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from forno.server.errors import FornoError
from forno.server.request import NEVER_US, Request
from forno.server.servicers import status
from forno.server.servicers.wire import AnswerWriter
from forno.v1 import predictor_pb2, tensor_pb2

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    import grpc

    from forno.server.model import Model
    from forno.server.registry import Registry
    from forno.server.request import Answer
    from forno.server.servicers.wire import Part
    from forno.server.signature import Signature

MAX_PLANS = 256
"""Keys that are remembered; the oldest goes first. A caller chooses keys, and must not choose our memory."""

LAYOUT = (
    predictor_pb2.PredictRequest.DESCRIPTOR.fields_by_name["inputs"].number,
    predictor_pb2.PredictRequest.DESCRIPTOR.fields_by_name["request_id"].number,
    tensor_pb2.Tensor.DESCRIPTOR.fields_by_name["data"].number,
    tensor_pb2.Tensor.DESCRIPTOR.fields_by_name["shape"].number,
)
"""What the native module needs to know of the contract: field numbers of the tensors and the id in a request, and of
the elements and the last small field in a tensor."""

_UNPLANNED = frozenset((np.dtype(object), np.dtype(np.bool_)))
"""Element types whose bytes have to be looked at."""


class Reply(Protocol):
    """A place for one answer: a future as far as the batcher and the worker need one."""

    def done(self) -> bool:
        """Whether nobody waits any more."""

    def set_result(self, result: Sequence[Part]) -> None:
        """Sends the answer; the parts are not kept."""

    def set_exception(self, error: BaseException) -> None:
        """Sends the error."""


class _Plan(NamedTuple):
    """How to treat requests of one key."""

    name: str
    version: str
    label: str
    signature: Signature
    model: Model
    inputs: tuple[tuple[int, np.dtype[Any], int, tuple[int, ...]], ...]  # offset's place in spans, dtype, count, shape
    rows: int
    priority: int
    timeout_us: int  # queue timeout; 0 without one
    writer: AnswerWriter


class HotPredict:
    """Answers split `Predict` requests. Owned by the transport's host; event loop only.

    Args:
        registry: Where models are found, at each call, so that versions can be swapped.
        clock_us: Monotonic microseconds.
    """

    def __init__(self, registry: Registry, clock_us: Callable[[], int]) -> None:
        self._registry = registry
        self._clock_us = clock_us
        self._plans: dict[bytes, _Plan] = {}

    def __call__(
        self,
        message: Any,
        key: bytes,
        spans: Sequence[int],
        request_id: bytes,
        deadline_us: int,
        reply: Reply,
    ) -> bool:
        """Takes one call, if it can.

        Args:
            message: The serialized request, as a buffer.
            key: What `split.h` left of it.
            spans: Offset and size of the elements of each tensor, flat.
            request_id: The request's id.
            deadline_us: On the monotonic clock; negative without one.
            reply: Where the answer goes, unless the result is False.

        Returns:
            False where the call has to go the ordinary way.
        """
        plan = self._plans.get(key)
        if plan is None:
            return False
        model = plan.model
        try:
            if self._registry.get(plan.name, plan.version, plan.label) is not model:
                return False
            if model.signature is not plan.signature:
                return False
            inputs = tuple(
                [
                    np.frombuffer(message, dtype, count, spans[place]).reshape(shape)
                    for place, dtype, count, shape in plan.inputs
                ]
            )
            expires_us = answer_by_us = deadline_us if deadline_us >= 0 else NEVER_US
            if plan.timeout_us:
                expires_us = min(expires_us, self._clock_us() + plan.timeout_us)
            writer = plan.writer

            def finish(answer: Answer) -> Sequence[Part]:
                return writer.parts(answer, request_id)

            model.submit(
                Request(inputs, plan.rows, finish, reply, 0, expires_us, plan.priority, deadline_us=answer_by_us)  # type: ignore[arg-type]
            )
        except FornoError as error:
            reply.set_exception(error)
        return True

    @property
    def layout(self) -> tuple[int, int, int, int]:
        """How requests are split."""
        return LAYOUT

    def status_of(self, error: BaseException) -> tuple[grpc.StatusCode, str, Sequence[tuple[str, str | bytes]]]:
        """What a caller is told of an error: the same as on the ordinary way."""
        told = status.to_status(error)
        return status.CODES[told.code], told.message, status.trailing_metadata(error, told)

    def learn(self, key: bytes, spans: Sequence[int], request: predictor_pb2.PredictRequest) -> None:
        """Makes a plan for a key, from a request that the ordinary way has taken."""
        model = self._registry.get(request.model, request.version, request.label)
        signature = model.signature
        places = {tensor.name: 2 * index for index, tensor in enumerate(request.inputs)}
        given = {tensor.name: tensor for tensor in request.inputs}
        if len(spans) != 2 * len(request.inputs) or any(spec.dtype in _UNPLANNED for spec in signature.inputs):
            return
        inputs = []
        for spec in signature.inputs:
            shape = tuple(given[spec.name].shape)
            count = spans[places[spec.name] + 1] // spec.dtype.itemsize
            inputs.append((places[spec.name], spec.dtype, count, shape))
        wanted = signature.output_indexes(request.outputs)
        indexes = range(len(signature.outputs)) if wanted is None else wanted
        timeout_us = request.parameters.queue_timeout.ToMicroseconds()
        if len(self._plans) >= MAX_PLANS:
            del self._plans[next(iter(self._plans))]
        self._plans[key] = _Plan(
            request.model,
            request.version,
            request.label,
            signature,
            model,
            tuple(inputs),
            inputs[0][3][0] if signature.batched and inputs else 1,
            request.parameters.priority,
            timeout_us,
            AnswerWriter(model.name, model.version, [(index, signature.outputs[index]) for index in indexes]),
        )
