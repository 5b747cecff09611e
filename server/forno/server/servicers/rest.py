"""The Rest service: JSON bodies of models and endpoints, and the pages of the process."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

from google.api.httpbody_pb2 import HttpBody

from forno.server.clock import clock_us
from forno.server.endpoints import Payload, call, json_body, json_inputs, json_outputs
from forno.server.endpoints.json_values import Place
from forno.server.endpoints.payload import UNTOLD, is_json
from forno.server.errors import DeadlineExceeded, InvalidArgument, NotReady
from forno.server.metrics import CONTENT_TYPE as METRICS_CONTENT_TYPE
from forno.server.model import ModelState
from forno.server.request import NEVER_US, waits_until_us
from forno.server.servicers import status
from forno.v1 import rest_pb2, rest_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Mapping

    import grpc
    import numpy as np

    from forno.server.endpoints.endpoint import Endpoint
    from forno.server.endpoints.json_body import Body
    from forno.server.metrics import Metrics
    from forno.server.model import Model
    from forno.server.registry import Registry

    Array = np.ndarray[Any, np.dtype[Any]]
    Context = grpc.aio.ServicerContext[Any, Any]

_SELECTORS = ("model", "version", "label")

TIMEOUT_HEADER = "x-request-timeout-ms"
"""Header in which a REST caller says how long it waits; `grpc-timeout` is understood as well."""
_MAX_TIMEOUT_DIGITS = 9
_LONG_BYTES = 1 << 18


class RestServicer(rest_pb2_grpc.RestServicer):
    """Serves what REST has beside the mapped RPCs. Owned by the server; event loop only.

    Args:
        registry: The models.
        endpoints: The named endpoints.
        metrics: What /metrics shows.
        clock_us: Monotonic microseconds.
    """

    def __init__(
        self,
        registry: Registry,
        endpoints: Mapping[str, Endpoint],
        metrics: Metrics,
        clock_us: Callable[[], int] = clock_us,
    ) -> None:
        self._registry = registry
        self._endpoints = endpoints
        self._metrics = metrics
        self._clock_us = clock_us

    async def Predict(self, request: rest_pb2.RestPredictRequest, context: Context) -> HttpBody:
        """Runs a model on a JSON body, or on the raw bytes of its only input."""
        try:
            status.refuse_path_variables_in_query(context, _SELECTORS)
            timeout_us = _timeout_us(context)
            async with _late_after(timeout_us):
                return await self._predict(request, self._expiry_us(context, timeout_us))
        except Exception as error:  # noqa: BLE001  (the table knows every error)
            await status.abort(context, error)

    async def Invoke(self, request: rest_pb2.RestInvokeRequest, context: Context) -> HttpBody:
        """Calls a named endpoint."""
        try:
            status.refuse_path_variables_in_query(context, ("endpoint",))
            endpoint = status.find_endpoint(self._endpoints, request.endpoint)
            payload = Payload(content_type=request.body.content_type, data=request.body.data)
            timeout_us = _timeout_us(context)
            async with _late_after(timeout_us):
                reply = await endpoint.invoke(payload, expires_us=self._expiry_us(context, timeout_us))
            return _json(reply.value)
        except Exception as error:  # noqa: BLE001  (the table knows every error)
            await status.abort(context, error)

    async def Health(self, request: rest_pb2.HealthRequest, context: Context) -> HttpBody:
        """Says that the process lives."""
        return _json({"status": "ok"})

    async def Ready(self, request: rest_pb2.ReadyRequest, context: Context) -> HttpBody:
        """Says that every model is ready, or ends with UNAVAILABLE and names those that are not."""
        try:
            models = self._registry.seen()
            if not self._registry.ready():
                waited_for = [
                    f"{model.name} {model.version} is {model.state.value}"
                    for model in models
                    if model.state is not ModelState.READY
                ]
                raise NotReady(f"not ready: {', '.join(waited_for) or 'a model'}")
            states: dict[str, dict[str, str]] = {}
            for model in models:
                states.setdefault(model.name, {})[model.version] = model.state.value
            return _json({"ready": True, "models": states})
        except Exception as error:  # noqa: BLE001  (the table knows every error)
            await status.abort(context, error)

    async def Metrics(self, request: rest_pb2.MetricsRequest, context: Context) -> HttpBody:
        """Metrics in the Prometheus text format."""
        try:
            return HttpBody(content_type=METRICS_CONTENT_TYPE, data=self._metrics.prometheus())
        except Exception as error:  # noqa: BLE001  (the table knows every error)
            await status.abort(context, error)

    async def _predict(self, request: rest_pb2.RestPredictRequest, expires_us: int) -> HttpBody:
        media_type = request.body.content_type.partition(";")[0].strip().lower()
        data = request.body.data  # once: protobuf copies it at each look
        if media_type == "application/octet-stream":
            model = self._registry.get(request.model, request.version, request.label)
            body = json_body.Body(form="native", content=None)
            arrays = _raw_input(model, data)
        elif media_type in UNTOLD or is_json(media_type):
            body = json_body.parse(data)
            model = self._registry.get(*selected(request, body))
            model.signature.output_indexes(body.outputs)  # so that a wrong name costs no run
            await _after_others(data)
            arrays = json_inputs.tensors_of(body, model.signature)
        else:
            raise InvalidArgument(
                f"the content type is '{media_type[:100]}', expected application/json, "
                "or application/octet-stream with the raw bytes of a model's only input",
                "content-type",
            )
        now_us = self._clock_us()
        deadline_us = expires_us if body.timeout_us is None else min(expires_us, now_us + body.timeout_us)
        expires_us = waits_until_us(deadline_us, body.queue_timeout_us or 0, now_us)
        async with _late_after(body.timeout_us):
            answer = await call(model, arrays, expires_us=expires_us, priority=body.priority, deadline_us=deadline_us)
        await _after_others(data)
        value = json_outputs.document(
            body,
            answer,
            model.signature,
            rows=rows_of(arrays),
            model=model.name,
            version=model.version,
        )
        await _after_others(data)
        return _json(value)

    def _expiry_us(self, context: Context, timeout_us: int | None) -> int:
        remaining_s = context.time_remaining()
        remaining_us = [timeout_us] if timeout_us is not None else []
        if remaining_s is not None:
            remaining_us.append(int(remaining_s * 1e6))
        return self._clock_us() + min(remaining_us) if remaining_us else NEVER_US


def request_of(path: str, content_type: str, data: bytes) -> rest_pb2.RestPredictRequest:
    """The request that the transcoder would make of a call, by the paths of rest.proto."""
    words = path.removesuffix(":predict").split("/")[2:]  # of /v1/models/NAME/versions/VERSION:predict
    chosen = dict(zip(words[::2], words[1::2], strict=False))  # of /v1/predict nothing
    return rest_pb2.RestPredictRequest(
        model=chosen.get("models"),
        version=chosen.get("versions"),
        label=chosen.get("labels"),
        body=HttpBody(content_type=content_type, data=data),
    )


def rows_of(arrays: Mapping[str, Array]) -> int:
    """Instances of a request in rows."""
    return next((len(array) for array in arrays.values() if array.ndim), 1)


def selected(request: rest_pb2.RestPredictRequest, body: Body) -> tuple[str, str, str]:
    """Model, version and label, of which path and body may each say something, but not different things."""
    chosen = {}
    for key in _SELECTORS:
        of_path, of_body = getattr(request, key), getattr(body, key)
        if of_path and of_body and of_path != of_body:
            raise json_body.wrong(key, f"is '{of_body[:200]}', but the path says '{of_path[:200]}'")
        chosen[key] = of_path or of_body
    if not chosen["model"]:
        raise json_body.wrong("model", "is missing: name the model in the body, or call /v1/models/NAME:predict")
    if chosen["version"] and chosen["label"]:
        raise json_body.wrong("label", f"is '{chosen['label'][:200]}' beside a version, expected one of them")
    return chosen["model"], chosen["version"], chosen["label"]


def _timeout_us(context: Context) -> int | None:
    """How long the caller says in a header that it waits.

    Raises:
        InvalidArgument: It says so in another way than whole milliseconds.
    """
    for key, value in context.invocation_metadata() or ():
        if key == TIMEOUT_HEADER:
            text = value if isinstance(value, str) else value.decode(errors="replace")
            if not (text.isascii() and text.isdigit() and len(text) <= _MAX_TIMEOUT_DIGITS and int(text)):
                raise InvalidArgument(
                    f"the header {TIMEOUT_HEADER} is '{text[:100]}', expected whole milliseconds, "
                    f"1 to {10**_MAX_TIMEOUT_DIGITS - 1}",
                    TIMEOUT_HEADER,
                )
            return int(text) * 1000
    return None


@contextlib.asynccontextmanager
async def _late_after(timeout_us: int | None) -> AsyncIterator[None]:
    """Ends what takes longer. Envoy keeps the deadlines that it knows of, and these it does not.

    Raises:
        DeadlineExceeded: It took longer.
    """
    try:
        async with asyncio.timeout(None if timeout_us is None else timeout_us / 1e6):
            yield
    except TimeoutError:
        raise DeadlineExceeded("the deadline has passed") from None


def _raw_input(model: Model, data: bytes) -> dict[str, Array]:
    specs = model.signature.inputs
    if len(specs) != 1:
        names = ", ".join(f"'{spec.name}'" for spec in specs)
        raise InvalidArgument(
            f"raw bytes are the elements of one input, but model '{model.name}' has {len(specs)}: {names}; "
            "send application/json",
            "content-type",
        )
    return {specs[0].name: json_inputs.from_bytes(data, specs[0], Place(specs[0].name, "the body"))}


async def _after_others(body: bytes) -> None:
    """Lets small calls in between the steps of a long one, each of which holds the event loop for milliseconds."""
    if len(body) >= _LONG_BYTES:
        await asyncio.sleep(0)
        await asyncio.sleep(0)  # the loop looks at its sockets after the first


def _json(value: Any) -> HttpBody:
    return HttpBody(content_type="application/json", data=json_outputs.dumps(value))
