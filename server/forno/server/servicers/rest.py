"""The Rest service: JSON bodies of models and endpoints, and the pages of the process."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from google.api.httpbody_pb2 import HttpBody

from forno.server.clock import clock_us
from forno.server.endpoints import Payload, call, json_body, json_inputs, json_outputs
from forno.server.endpoints.json_values import Place
from forno.server.endpoints.payload import UNTOLD, is_json
from forno.server.errors import InvalidArgument, NotReady
from forno.server.metrics import CONTENT_TYPE as METRICS_CONTENT_TYPE
from forno.server.model import ModelState
from forno.server.request import NEVER_US
from forno.server.servicers import status
from forno.v1 import rest_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

    import grpc
    import numpy as np

    from forno.server.endpoints.endpoint import Endpoint
    from forno.server.endpoints.json_body import Body
    from forno.server.metrics import Metrics
    from forno.server.model import Model
    from forno.server.registry import Registry
    from forno.v1 import rest_pb2

    Array = np.ndarray[Any, np.dtype[Any]]
    Context = grpc.aio.ServicerContext[Any, Any]

_SELECTORS = ("model", "version", "label")


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
            return await self._predict(request, self._expiry_us(context.time_remaining()))
        except Exception as error:  # noqa: BLE001  (the table knows every error)
            await status.abort(context, error)

    async def Invoke(self, request: rest_pb2.RestInvokeRequest, context: Context) -> HttpBody:
        """Calls a named endpoint."""
        try:
            status.refuse_path_variables_in_query(context, ("endpoint",))
            endpoint = status.find_endpoint(self._endpoints, request.endpoint)
            payload = Payload(content_type=request.body.content_type, data=request.body.data)
            reply = await endpoint.invoke(payload, expires_us=self._expiry_us(context.time_remaining()))
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
        if media_type == "application/octet-stream":
            model = self._registry.get(request.model, request.version, request.label)
            body = json_body.Body(form="native", content=None)
            arrays = _raw_input(model, request.body.data)
        elif media_type in UNTOLD or is_json(media_type):
            body = json_body.parse(request.body.data)
            model = self._registry.get(*_selected(request, body))
            model.signature.output_indexes(body.outputs)  # so that a wrong name costs no run
            arrays = json_inputs.tensors_of(body, model.signature)
        else:
            raise InvalidArgument(
                f"the content type is '{media_type[:100]}', expected application/json, "
                "or application/octet-stream with the raw bytes of a model's only input",
                "content-type",
            )
        deadline_us = expires_us
        if body.queue_timeout_us is not None:
            expires_us = min(expires_us, self._clock_us() + body.queue_timeout_us)
        answer = await call(model, arrays, expires_us=expires_us, priority=body.priority, deadline_us=deadline_us)
        value = json_outputs.document(
            body,
            answer,
            model.signature,
            rows=next((len(array) for array in arrays.values() if array.ndim), 1),
            model=model.name,
            version=model.version,
        )
        return _json(value)

    def _expiry_us(self, remaining_s: float | None) -> int:
        return NEVER_US if remaining_s is None else self._clock_us() + int(remaining_s * 1e6)


def _selected(request: rest_pb2.RestPredictRequest, body: Body) -> tuple[str, str, str]:
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


def _json(value: Any) -> HttpBody:
    return HttpBody(content_type="application/json", data=json_outputs.dumps(value))
