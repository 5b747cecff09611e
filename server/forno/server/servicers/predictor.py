"""The Predictor service: protobuf to arrays, submit, await, arrays to protobuf."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from google.protobuf import json_format

from forno.server.clock import clock_us
from forno.server.endpoints import Payload
from forno.server.errors import InvalidArgument, NotReady
from forno.server.request import NEVER_US, Request, waits_until_us
from forno.server.security import access
from forno.server.servicers import describe, status
from forno.v1 import model_pb2, predictor_pb2, predictor_pb2_grpc, tensors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    import grpc

    from forno.server.endpoints.endpoint import Endpoint
    from forno.server.model import Model
    from forno.server.registry import Registry
    from forno.server.request import Answer

    Array = np.ndarray[Any, np.dtype[Any]]
    Context = grpc.aio.ServicerContext[Any, Any]

MAX_REQUEST_ID_LENGTH = 128
MAX_PRIORITY = 100
_UNKNOWN: Array = np.empty(0)
MAX_STREAM_IN_FLIGHT = 256
"""Requests of one stream that may be on their way; the stream is not read further until one is answered."""


class PredictorServicer(predictor_pb2_grpc.PredictorServicer):
    """Serves models and endpoints by gRPC. Event loop only."""

    def __init__(
        self,
        registry: Registry,
        endpoints: Mapping[str, Endpoint],
        clock_us: Callable[[], int] = clock_us,
    ) -> None:
        self._registry = registry
        self._endpoints = endpoints
        self._clock_us = clock_us

    async def Predict(self, request: predictor_pb2.PredictRequest, context: Context) -> predictor_pb2.PredictResponse:
        """Runs a model on one request."""
        try:
            return await self._submit(request, context.time_remaining())  # type: ignore[no-any-return]
        except Exception as error:  # noqa: BLE001  (the table knows every error)
            await status.abort(context, error)

    async def PredictStream(
        self, request_iterator: AsyncIterator[predictor_pb2.PredictStreamRequest], context: Context
    ) -> AsyncIterator[predictor_pb2.PredictStreamResponse]:
        """Runs a model on each request of a stream; answers as they are ready."""
        stream = _Stream()
        reader = asyncio.create_task(self._read_stream(request_iterator, context, stream))
        try:
            while (answer := await stream.answers.get()) is not None:
                yield answer
                stream.room.release()
            await reader
        except NotReady as error:
            await status.abort(context, error)
        finally:
            reader.cancel()
            for future in stream.pending:
                future.cancel()

    async def Invoke(self, request: predictor_pb2.InvokeRequest, context: Context) -> predictor_pb2.InvokeResponse:
        """Calls a named endpoint."""
        try:
            _check_request_id(request.request_id)
            endpoint = status.find_endpoint(self._endpoints, request.endpoint)
            match request.WhichOneof("input"):
                case "value":
                    payload = Payload(value=json_format.MessageToDict(request.value))
                case "body":
                    payload = Payload(content_type=request.body.content_type, data=request.body.data)
                case _:
                    raise InvalidArgument("the call has no input; set `value` or `body`", "input")
            reply = await endpoint.invoke(payload, expires_us=self._expiry_us(context.time_remaining()))
            response = predictor_pb2.InvokeResponse(
                model=reply.model,
                version=reply.version,
                request_id=request.request_id,
                timings=predictor_pb2.Timings(
                    queue_us=reply.queue_us, compute_us=reply.compute_us, batch_rows=reply.batch_rows
                ),
            )
            json_format.ParseDict(reply.value, response.output)
            return response
        except Exception as error:  # noqa: BLE001  (the table knows every error)
            await status.abort(context, error)

    async def GetModel(self, request: predictor_pb2.GetModelRequest, context: Context) -> model_pb2.Model:
        """Describes one model, ready or not."""
        try:
            status.refuse_path_variables_in_query(context, ("model",))
            model = self._registry.find(request.model, request.version, request.label)
            return describe.model(model, self._registry, self._endpoints.values())
        except Exception as error:  # noqa: BLE001  (the table knows every error)
            await status.abort(context, error)

    async def ListModels(
        self, request: predictor_pb2.ListModelsRequest, context: Context
    ) -> predictor_pb2.ListModelsResponse:
        """Describes every model."""
        try:
            found = [describe.model(model, self._registry, self._endpoints.values()) for model in self._registry.seen()]
            return predictor_pb2.ListModelsResponse(models=found)
        except Exception as error:  # noqa: BLE001  (the table knows every error)
            await status.abort(context, error)

    def _submit(self, request: predictor_pb2.PredictRequest, remaining_s: float | None) -> asyncio.Future[Any]:
        """Hands a request to its model; the future gives its `PredictResponse`.

        Raises:
            FornoError: The request is refused.
        """
        asked = read_request(self._registry, request)
        deadline_us = self._expiry_us(remaining_s)
        request_id = request.request_id

        def finish(answer: Answer) -> predictor_pb2.PredictResponse:
            return encode_answer(asked.model, answer, asked.wanted, request_id)

        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        asked.model.submit(
            Request(
                *(asked.inputs, asked.rows, finish, future),
                expires_us=waits_until_us(deadline_us, asked.timeout_us, self._clock_us()),
                priority=asked.priority,
                deadline_us=deadline_us,
            )
        )
        return future

    def _expiry_us(self, remaining_s: float | None) -> int:
        return NEVER_US if remaining_s is None else self._clock_us() + int(remaining_s * 1e6)

    async def _read_stream(
        self, requests: AsyncIterator[predictor_pb2.PredictStreamRequest], context: Context, stream: _Stream
    ) -> None:
        """Submits what the stream brings; every request gets exactly one answer into the queue, then comes None.

        Raises:
            NotReady: The model of the first request is.
        """
        begun = False

        def done(future: asyncio.Future[Any], request_id: str) -> None:
            stream.pending.discard(future)
            if not future.cancelled():
                error = future.exception()
                stream.answers.put_nowait(_stream_answer(request_id, future.result() if error is None else error))

        try:
            async for item in requests:
                await stream.room.acquire()
                request_id = item.request.request_id
                try:
                    access.next_item()
                    future = self._submit(item.request, context.time_remaining())
                except Exception as error:
                    if isinstance(error, NotReady) and not (begun or _has_answered(context)):
                        raise
                    stream.answers.put_nowait(_stream_answer(request_id, error))
                    continue
                finally:
                    begun = True
                stream.pending.add(future)
                future.add_done_callback(lambda future, request_id=request_id: done(future, request_id))  # type: ignore[misc]
            for _ in range(MAX_STREAM_IN_FLIGHT):
                await stream.room.acquire()
        finally:
            stream.answers.put_nowait(None)


class _Stream:
    """What the two sides of a stream share: one submits, the other sends."""

    def __init__(self) -> None:
        self.answers: asyncio.Queue[predictor_pb2.PredictStreamResponse | None] = asyncio.Queue()
        self.pending: set[asyncio.Future[Any]] = set()
        self.room = asyncio.Semaphore(MAX_STREAM_IN_FLIGHT)  # given back when an answer has been taken for sending


class Asked(NamedTuple):
    """What a request asks for, checked."""

    model: Model
    inputs: tuple[Array, ...]  # in the signature's order
    rows: int
    wanted: tuple[int, ...] | None  # outputs, by their places in the signature; None = all
    priority: int
    timeout_us: int  # in the queue; 0 without one


def read_request(registry: Registry, request: predictor_pb2.PredictRequest) -> Asked:
    """Looks a request up and through.

    Raises:
        FornoError: It is refused.
    """
    _check_request_id(request.request_id)
    model = registry.get(request.model, request.version, request.label)
    signature = model.signature
    inputs = signature.arrange(decode_inputs(request.inputs, signature.inputs_by_name))
    rows = signature.validate(inputs)
    wanted = signature.output_indexes(request.outputs)
    priority = timeout_us = 0
    if request.HasField("parameters"):
        parameters = request.parameters
        priority = parameters.priority
        if abs(priority) > MAX_PRIORITY:
            raise InvalidArgument(
                f"parameters.priority is {priority}, expected {-MAX_PRIORITY} to {MAX_PRIORITY}", "parameters.priority"
            )
        if parameters.HasField("queue_timeout"):
            timeout_us = parameters.queue_timeout.ToMicroseconds()
            if timeout_us <= 0:
                raise InvalidArgument(
                    f"parameters.queue_timeout is {timeout_us} us, expected more than 0", "parameters.queue_timeout"
                )
    return Asked(model, inputs, rows, wanted, priority, timeout_us)


def decode_inputs(inputs: Any, specs: Mapping[str, Any]) -> dict[str, Array]:
    """The arrays of a request's tensors by name; those of unknown names, which the signature refuses, unread.

    Raises:
        InvalidArgument: A tensor contradicts itself or comes twice.
    """
    arrays: dict[str, Array] = {}
    for index, tensor in enumerate(inputs):
        name = tensor.name
        spec = specs.get(name)
        try:
            array = tensors.decode(tensor, spec.dtype, spec.shape) if spec else _UNKNOWN
        except ValueError as error:
            raise InvalidArgument(f"input '{name}': {error}", f"inputs[{index}]") from None
        if name in arrays:
            raise InvalidArgument(f"input '{name}' is given twice", f"inputs[{index}].name")
        arrays[name] = array
    return arrays


def encode_answer(
    model: Model, answer: Answer, wanted: tuple[int, ...] | None, request_id: str
) -> predictor_pb2.PredictResponse:
    """The response message: one copy of the outputs."""
    response = predictor_pb2.PredictResponse(
        model=model.name,
        version=model.version,
        request_id=request_id,
        timings=predictor_pb2.Timings(
            queue_us=answer.queue_us, compute_us=answer.compute_us, batch_rows=answer.batch_rows
        ),
    )
    specs, outputs = model.signature.outputs, answer.outputs
    for index in range(len(specs)) if wanted is None else wanted:
        response.outputs.append(tensors.encode(specs[index].name, outputs[index]))
    return response


def _has_answered(context: Context) -> bool:
    """Whether a stream has answers that its handler does not know of: a transport may have a shorter way for some."""
    has_answered = getattr(context, "has_answered", None)
    return has_answered is not None and has_answered()


def _stream_answer(request_id: str, outcome: Any) -> predictor_pb2.PredictStreamResponse:
    if isinstance(outcome, BaseException):
        return predictor_pb2.PredictStreamResponse(request_id=request_id, error=status.to_status(outcome))
    return predictor_pb2.PredictStreamResponse(request_id=request_id, response=outcome)


def _check_request_id(request_id: str) -> None:
    if len(request_id) > MAX_REQUEST_ID_LENGTH:
        raise InvalidArgument(
            f"request_id has {len(request_id)} characters, expected at most {MAX_REQUEST_ID_LENGTH}", "request_id"
        )
