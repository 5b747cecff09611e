"""How a call can end badly.

    RequestError
     |- InvalidArgument     the request is wrong; the message says what to change
     |- NotAllowed          no credential, not a valid one, or not one for this
     |- NotFound            no model, version, label or endpoint of that name
     |- Unavailable         no server there, or the model is not ready; trying again may help
     |- Overloaded          refused without having waited; try again after `retry_after_s`
     |- DeadlineExceeded    the call's time ran out
     `- ServerError         the server's fault; the message has an id that is in its log

The message is the server's own wherever a server has answered.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import grpc

if TYPE_CHECKING:
    from collections.abc import Iterable

_DETAILS = "grpc-status-details-bin"


class RequestError(Exception):
    """Base of all errors of a call.

    Attributes:
        code: Name of the gRPC status, such as "INVALID_ARGUMENT"; empty where the call was not made.
    """

    def __init__(self, message: str, code: str = "") -> None:
        super().__init__(message)
        self.code = code


class InvalidArgument(RequestError):
    """The request is wrong; the message says what was seen, what was expected, and for which input."""


class NotAllowed(RequestError):
    """The server asks for a credential, does not know this one, or does not let it use what the call names."""


class NotFound(RequestError):
    """There is no model, version, label or endpoint of that name."""


class Unavailable(RequestError):
    """No server answers, or the model is not ready. Trying again later may help."""


class Overloaded(RequestError):
    """The server refused the request at once because it has too much to do.

    Attributes:
        retry_after_s: When the server expects to have room, in seconds; None where it does not say.
    """

    def __init__(self, message: str, code: str = "", retry_after_s: float | None = None) -> None:
        super().__init__(message, code)
        self.retry_after_s = retry_after_s


class DeadlineExceeded(RequestError):
    """The call's time ran out, here or while it waited in the server."""


class ServerError(RequestError):
    """The server failed; where the message carries an id, the server's log has the cause under it."""


_KINDS: dict[grpc.StatusCode, type[RequestError]] = {
    grpc.StatusCode.INVALID_ARGUMENT: InvalidArgument,
    grpc.StatusCode.UNAUTHENTICATED: NotAllowed,
    grpc.StatusCode.PERMISSION_DENIED: NotAllowed,
    grpc.StatusCode.NOT_FOUND: NotFound,
    grpc.StatusCode.UNAVAILABLE: Unavailable,
    grpc.StatusCode.FAILED_PRECONDITION: Unavailable,
    grpc.StatusCode.DEADLINE_EXCEEDED: DeadlineExceeded,
    grpc.StatusCode.INTERNAL: ServerError,
    grpc.StatusCode.UNKNOWN: ServerError,
    grpc.StatusCode.UNIMPLEMENTED: ServerError,
    grpc.StatusCode.DATA_LOSS: ServerError,
}


def from_rpc(error: grpc.RpcError, address: str) -> RequestError:
    """The error that a failed call of grpc's means."""
    if not isinstance(error, grpc.Call):
        return RequestError(str(error))
    status, text = error.code(), error.details() or "the server gave no reason"
    code = status.name
    if status is grpc.StatusCode.RESOURCE_EXHAUSTED:
        return Overloaded(text, code, _retry_after_s(error.trailing_metadata() or ()))
    if status is grpc.StatusCode.UNAVAILABLE and "connect" in text.lower():
        text = f"no server answers at {address}: {text.rpartition(': ')[2]}"
    if status is grpc.StatusCode.DEADLINE_EXCEEDED and text == "Deadline Exceeded":
        text = f"no answer from {address} in time"
    return _KINDS.get(status, RequestError)(text, code)


def _retry_after_s(metadata: Iterable[tuple[str, str | bytes]]) -> float | None:
    """The delay that the rich error details ask for (google.rpc.RetryInfo)."""
    from google.rpc import error_details_pb2, status_pb2  # noqa: PLC0415  (only a refused call needs them)

    for key, value in metadata:
        if key == _DETAILS and isinstance(value, bytes):
            for detail in status_pb2.Status.FromString(value).details:
                info = error_details_pb2.RetryInfo()
                if detail.Unpack(info):
                    return float(info.retry_delay.ToTimedelta().total_seconds())
    return None
