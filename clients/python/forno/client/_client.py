"""The client: one channel, five calls."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Self

import grpc
import numpy as np
from google.api import httpbody_pb2
from google.protobuf import json_format, struct_pb2

from forno.client._connect import Tls, connect
from forno.client._errors import InvalidArgument, from_rpc
from forno.client._inputs import to_array
from forno.client._values import Invocation, ModelInfo, Prediction, model_of, timings_of
from forno.v1 import predictor_pb2 as pb
from forno.v1 import predictor_pb2_grpc, tensors

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from types import TracebackType

# Message sizes are the server's to limit.
_OPTIONS = [("grpc.max_receive_message_length", -1), ("grpc.max_send_message_length", -1)]


class Client:
    """Calls one server. Any thread may use it; `close` or the end of a `with` block ends it.

    Args:
        address: HOST:PORT of the server.
        timeout_s: How long a call may take, in seconds, where the call itself does not say; None = for ever.
        credential: An API key or token to show at each call; empty = none. Without `tls` it travels in the clear.
        tls: What to believe and show where the server speaks TLS; None = it does not.
    """

    def __init__(
        self,
        address: str = "127.0.0.1:8080",
        *,
        timeout_s: float | None = 60.0,
        credential: str = "",
        tls: Tls | None = None,
    ) -> None:
        self.address = address
        self._timeout_s = timeout_s
        self._metadata = (("authorization", f"Bearer {credential}"),) if credential else ()
        self._channel = connect(address, tls, _OPTIONS)
        self._stub = predictor_pb2_grpc.PredictorStub(self._channel)
        self._known: dict[tuple[str, str, str], ModelInfo] = {}  # what lists of numbers are converted by

    def predict(
        self,
        model: str,
        inputs: Mapping[str, Any],
        *,
        version: str = "",
        label: str = "",
        outputs: Sequence[str] = (),
        request_id: str = "",
        priority: int = 0,
        timeout_s: float | None = None,
    ) -> Prediction:
        """Runs a model.

        Args:
            model: The model's name.
            inputs: Each input by name. Arrays go as they are; numbers, texts and lists of them become what
            the
                model's signature says, which is asked for once, and may leave out leading dimensions of one.
            version: The version that answers; empty = the default one.
            label: The label whose version answers; not together with `version`.
            outputs: Names of the outputs wanted; empty = all.
            request_id: Stands in the server's log.
            priority: Higher runs first, from -100 to 100.
            timeout_s: How long the call may take, in seconds; None = as the client was made.

        Raises:
            RequestError: The call failed; its subclass says how.
        """
        request = pb.PredictRequest(model=model, outputs=outputs, request_id=request_id)
        _select(request, version, label)
        for name, value in inputs.items():
            if not isinstance(value, np.ndarray):
                value = self._converted(model, version, label, name, value)  # noqa: PLW2901  (the same, as an array)
            try:
                request.inputs.append(tensors.encode(name, value))
            except KeyError:
                raise InvalidArgument(f"input {name!r}: no model takes arrays of {value.dtype}") from None
        if priority:
            request.parameters.priority = priority
        response = self._call(self._stub.Predict, request, timeout_s)
        arrays = {tensor.name: tensors.decode(tensor) for tensor in response.outputs}
        return Prediction(arrays, response.model, response.version, timings_of(response.timings))

    def invoke(
        self,
        endpoint: str,
        value: Any = None,
        *,
        data: bytes | None = None,
        content_type: str = "application/octet-stream",
        request_id: str = "",
        timeout_s: float | None = None,
    ) -> Invocation:
        """Calls an endpoint.

        Args:
            endpoint: The endpoint's name, such as "spam/detect".
            value: A JSON value, such as {"text": "..."}.
            data: A document, such as the bytes of an image, in place of `value`.
            content_type: What `data` is, such as "image/png".
            request_id: Stands in the server's log.
            timeout_s: How long the call may take, in seconds; None = as the client was made.

        Raises:
            RequestError: The call failed; its subclass says how.
        """
        request = pb.InvokeRequest(endpoint=endpoint, request_id=request_id)
        if data is None:
            try:
                request.value.CopyFrom(json_format.ParseDict(value, struct_pb2.Value()))
            except json_format.ParseError as error:
                raise InvalidArgument(f"the value is not JSON: {error}") from error
        else:
            request.body.CopyFrom(httpbody_pb2.HttpBody(content_type=content_type, data=data))
        response = self._call(self._stub.Invoke, request, timeout_s)
        output = json_format.MessageToDict(response.output)
        return Invocation(output, response.model, response.version, timings_of(response.timings))

    def models(self, *, timeout_s: float | None = None) -> list[ModelInfo]:
        """Every version of every model, by name, the newest version first.

        Raises:
            RequestError: The call failed.
        """
        response = self._call(self._stub.ListModels, pb.ListModelsRequest(), timeout_s)
        return [model_of(model) for model in response.models]

    def model(self, name: str, *, version: str = "", label: str = "", timeout_s: float | None = None) -> ModelInfo:
        """One model: its state, inputs and outputs.

        Raises:
            NotFound: There is no such model, version or label.
            RequestError: The call failed.
        """
        request = pb.GetModelRequest(model=name)
        _select(request, version, label)
        return model_of(self._call(self._stub.GetModel, request, timeout_s))

    def close(self) -> None:
        """Ends the connection and every call still on it. May be called again."""
        self._channel.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.close()

    def _call(self, method: Callable[..., Any], request: Any, timeout_s: float | None) -> Any:
        try:
            limit_s = self._timeout_s if timeout_s is None else timeout_s
            return method(request, timeout=limit_s, metadata=self._metadata)
        except grpc.RpcError as error:
            self._known.clear()  # the model may have changed
            raise from_rpc(error, self.address) from None

    def _converted(self, model: str, version: str, label: str, name: str, value: Any) -> np.ndarray[Any, Any]:
        key = (model, version, label)
        info = self._known.get(key)
        if info is None:
            info = self._known[key] = self.model(model, version=version, label=label)
        for spec in info.inputs:
            if spec.name == name:
                return to_array(spec, value)
        known = ", ".join(repr(spec.name) for spec in info.inputs)
        raise InvalidArgument(f"input {name!r} is unknown; {model} takes {known or 'none'}")


def _select(request: pb.PredictRequest | pb.GetModelRequest, version: str, label: str) -> None:
    if version and label:
        raise InvalidArgument(f"version {version!r} and label {label!r} given; expected one of them")
    if version:
        request.version = version
    if label:
        request.label = label
