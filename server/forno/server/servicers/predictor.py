"""The Predictor service: protobuf to arrays, submit, await, arrays to protobuf."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any

from google.protobuf import json_format

from forno.server.clock import clock_us
from forno.server.endpoints import Payload
from forno.server.errors import InvalidArgument
from forno.server.request import NEVER_US, Request
from forno.server.security import access
from forno.server.servicers import describe, status
from forno.v1 import model_pb2, predictor_pb2, predictor_pb2_grpc, tensors

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    import grpc
    import numpy as np

    from forno.server.endpoints.endpoint import Endpoint
    from forno.server.model import Model
    from forno.server.registry import Registry
    from forno.server.request import Answer

    Array = np.ndarray[Any, np.dtype[Any]]
    Context = grpc.aio.ServicerContext[Any, Any]

MAX_REQUEST_ID_LENGTH = 128
MAX_PRIORITY = 100
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
        answers: asyncio.Queue[predictor_pb2.PredictStreamResponse | None] = asyncio.Queue()
        pending: set[asyncio.Future[Any]] = set()
        reader = asyncio.create_task(self._read_stream(request_iterator, context, answers, pending))
        try:
            while (answer := await answers.get()) is not None:
                yield answer
            await reader
        finally:
            reader.cancel()
            for future in pending:
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
        _check_request_id(request.request_id)
        model = self._registry.get(request.model, request.version, request.label)
        signature = model.signature
        arrays = decode_inputs(request.inputs, signature.inputs_by_name)
        ordered = signature.arrange(arrays)
        rows = signature.validate(ordered)
        wanted = signature.output_indexes(request.outputs)
        deadline_us = expires_us = self._expiry_us(remaining_s)
        priority = 0
        if request.HasField("parameters"):
            expires_us, priority = self._parameters(request.parameters, expires_us)
        request_id = request.request_id

        def finish(answer: Answer) -> predictor_pb2.PredictResponse:
            return encode_answer(model, answer, wanted, request_id)

        future: asyncio.Future[Any] = asyncio.get_running_loop().create_future()
        model.submit(
            Request(ordered, rows, finish, future, expires_us=expires_us, priority=priority, deadline_us=deadline_us)
        )
        return future

    def _expiry_us(self, remaining_s: float | None) -> int:
        return NEVER_US if remaining_s is None else self._clock_us() + int(remaining_s * 1e6)

    def _parameters(self, parameters: predictor_pb2.Parameters, expires_us: int) -> tuple[int, int]:
        if abs(parameters.priority) > MAX_PRIORITY:
            raise InvalidArgument(
                f"parameters.priority is {parameters.priority}, expected {-MAX_PRIORITY} to {MAX_PRIORITY}",
                "parameters.priority",
            )
        if parameters.HasField("queue_timeout"):
            timeout_us = parameters.queue_timeout.ToMicroseconds()
            if timeout_us <= 0:
                raise InvalidArgument(
                    f"parameters.queue_timeout is {timeout_us} us, expected more than 0", "parameters.queue_timeout"
                )
            expires_us = min(expires_us, self._clock_us() + timeout_us)
        return expires_us, parameters.priority

    async def _read_stream(
        self,
        requests: AsyncIterator[predictor_pb2.PredictStreamRequest],
        context: Context,
        answers: asyncio.Queue[predictor_pb2.PredictStreamResponse | None],
        pending: set[asyncio.Future[Any]],
    ) -> None:
        """Submits what the stream brings; every request gets exactly one answer into the queue, then comes None."""
        room = asyncio.Semaphore(MAX_STREAM_IN_FLIGHT)

        def done(future: asyncio.Future[Any], request_id: str) -> None:
            pending.discard(future)
            room.release()
            if future.cancelled():
                return
            error = future.exception()
            answers.put_nowait(_stream_answer(request_id, future.result() if error is None else error))

        try:
            async for item in requests:
                await room.acquire()
                request_id = item.request.request_id
                try:
                    access.next_item()
                    future = self._submit(item.request, context.time_remaining())
                except Exception as error:  # noqa: BLE001  (concerns this request only)
                    room.release()
                    answers.put_nowait(_stream_answer(request_id, error))
                    continue
                pending.add(future)
                future.add_done_callback(lambda future, request_id=request_id: done(future, request_id))  # type: ignore[misc]
            for _ in range(MAX_STREAM_IN_FLIGHT):
                await room.acquire()
        finally:
            answers.put_nowait(None)


def decode_inputs(inputs: Any, specs: Mapping[str, Any]) -> dict[str, Array]:
    """The arrays of a request's tensors by name.

    Raises:
        InvalidArgument: A tensor contradicts itself or comes twice.
    """
    arrays: dict[str, Array] = {}
    for index, tensor in enumerate(inputs):
        name = tensor.name
        spec = specs.get(name)
        try:
            array = tensors.decode(tensor, spec.dtype, spec.shape) if spec else tensors.decode(tensor)
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


def _stream_answer(request_id: str, outcome: Any) -> predictor_pb2.PredictStreamResponse:
    if isinstance(outcome, BaseException):
        return predictor_pb2.PredictStreamResponse(request_id=request_id, error=status.to_status(outcome))
    return predictor_pb2.PredictStreamResponse(request_id=request_id, response=outcome)


def _check_request_id(request_id: str) -> None:
    if len(request_id) > MAX_REQUEST_ID_LENGTH:
        raise InvalidArgument(
            f"request_id has {len(request_id)} characters, expected at most {MAX_REQUEST_ID_LENGTH}", "request_id"
        )
