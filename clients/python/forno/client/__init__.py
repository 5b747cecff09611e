"""A client for Forno, over gRPC.

    from forno.client import Client

    with Client("127.0.0.1:8080") as client:
        prediction = client.predict("digits", {"pixels": pixels})
        print(prediction.outputs["label"], prediction.timings.compute_us)

A `Client` may be shared by threads. Errors are a `RequestError`; `forno/client/_errors.py` draws the tree.
"""

from __future__ import annotations

from forno.client._client import Client
from forno.client._connect import Tls
from forno.client._errors import (
    DeadlineExceeded,
    InvalidArgument,
    NotAllowed,
    NotFound,
    Overloaded,
    RequestError,
    ServerError,
    Unavailable,
)
from forno.client._values import Invocation, ModelInfo, Prediction, TensorInfo, Timings

__all__ = [
    "Client",
    "DeadlineExceeded",
    "InvalidArgument",
    "Invocation",
    "ModelInfo",
    "NotAllowed",
    "NotFound",
    "Overloaded",
    "Prediction",
    "RequestError",
    "ServerError",
    "TensorInfo",
    "Timings",
    "Tls",
    "Unavailable",
]
