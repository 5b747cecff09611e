"""The one table from what went wrong to what a caller sees of it, by gRPC and by REST."""

from __future__ import annotations

import logging
import math
import secrets
from typing import TYPE_CHECKING, Any, NamedTuple, NoReturn
from urllib.parse import parse_qsl

import grpc
from google.rpc.error_details_pb2 import BadRequest, ErrorInfo, RetryInfo
from google.rpc.status_pb2 import Status

from forno.server import errors
from forno.server.security import access
from forno.server.spelling import listed, nearest

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from google.protobuf.message import Message

    from forno.server.endpoints.endpoint import Endpoint

    Told = tuple[grpc.StatusCode, str, tuple[tuple[str, str | bytes], ...]]

_log = logging.getLogger(__name__)


class Outcome(NamedTuple):
    """One row of the table."""

    code: grpc.StatusCode
    reason: str  # of google.rpc.ErrorInfo: for programs to compare


TABLE: dict[type, Outcome] = {
    errors.InvalidArgument: Outcome(grpc.StatusCode.INVALID_ARGUMENT, "INVALID_ARGUMENT"),
    errors.NotFound: Outcome(grpc.StatusCode.NOT_FOUND, "NOT_FOUND"),
    errors.NotReady: Outcome(grpc.StatusCode.UNAVAILABLE, "NOT_READY"),
    errors.Overloaded: Outcome(grpc.StatusCode.RESOURCE_EXHAUSTED, "OVERLOADED"),
    errors.RateLimited: Outcome(grpc.StatusCode.RESOURCE_EXHAUSTED, "RATE_LIMITED"),
    errors.Unauthenticated: Outcome(grpc.StatusCode.UNAUTHENTICATED, "UNAUTHENTICATED"),
    errors.PermissionDenied: Outcome(grpc.StatusCode.PERMISSION_DENIED, "PERMISSION_DENIED"),
    errors.DeadlineExceeded: Outcome(grpc.StatusCode.DEADLINE_EXCEEDED, "DEADLINE_EXCEEDED"),
    errors.EngineFailed: Outcome(grpc.StatusCode.INTERNAL, "ENGINE_FAILED"),
}
_UNEXPECTED = Outcome(grpc.StatusCode.INTERNAL, "UNEXPECTED")
CODES = {code.value[0]: code for code in grpc.StatusCode}

DOMAIN = "forno"
"""Domain of the reasons, in google.rpc.ErrorInfo."""

DETAILS_KEY = "grpc-status-details-bin"
"""Metadata key that carries the whole status, as grpc's own libraries read it."""

ORIGINAL_PATH_KEY = "x-envoy-original-path"
"""Metadata key that carries path and query of a REST call, as its caller wrote them."""

_MAX_MESSAGE_BYTES = 800  # message and details travel in trailers, which clients bound at 8 KiB
_MAX_FIELD_BYTES = 200
_MAX_LISTED = 20


def to_status(error: BaseException) -> Status:
    """What a caller is told of an error.

    Of one that nobody expected a caller gets an id only; it stands in the log, beside the traceback.
    """
    outcome = next((TABLE[kind] for kind in type(error).__mro__ if kind in TABLE), _UNEXPECTED)
    message = _cut(str(error), _MAX_MESSAGE_BYTES)
    if outcome is _UNEXPECTED:
        error_id = secrets.token_hex(6)
        _log.error("unexpected error %s", error_id, exc_info=error)
        message = f"the server failed in a way that nobody expected; its log says more under the id {error_id}"
    status = Status(code=outcome.code.value[0], message=message)
    details: list[Message] = [ErrorInfo(reason=outcome.reason, domain=DOMAIN)]
    match error:
        case errors.InvalidArgument(field=field) if field:
            violation = BadRequest.FieldViolation(field=_cut(field, _MAX_FIELD_BYTES), description=message)
            details.append(BadRequest(field_violations=[violation]))
        case errors.Overloaded():
            retry = RetryInfo()
            retry.retry_delay.FromMilliseconds(math.ceil(error.retry_after_s * 1000))
            details.append(retry)
        case _:
            pass
    for detail in details:
        status.details.add().Pack(detail)
    return status


def trailing_metadata(error: BaseException, status: Status) -> tuple[tuple[str, str | bytes], ...]:
    """The metadata that goes with a status: its details and, for REST, when to come back or with what."""
    metadata: tuple[tuple[str, str | bytes], ...] = ((DETAILS_KEY, status.SerializeToString()),)
    if isinstance(error, errors.Overloaded):
        metadata += (("retry-after", str(max(1, math.ceil(error.retry_after_s)))),)
    if isinstance(error, errors.Unauthenticated):
        metadata += (("www-authenticate", "Bearer"),)  # RFC 9110, 11.6.1: a 401 says what it wants
    return metadata


def told(error: BaseException) -> Told:
    """What a caller is told of an error: code, message and trailing metadata."""
    status = to_status(error)
    return CODES[status.code], status.message, trailing_metadata(error, status)


async def abort(context: grpc.aio.ServicerContext[Any, Any], error: BaseException) -> NoReturn:
    """Ends a call with the status of an error.

    Args:
        context: The call's, of either transport.
        error: What went wrong. One that already ends a call goes on doing so.

    Raises:
        Exception: The transport's own, always; it must not be caught.
    """
    if isinstance(error, grpc.aio.AbortError):
        raise error
    code, message, trailing = told(error)
    context.set_trailing_metadata(trailing)
    await context.abort(code, message)
    raise AssertionError("abort returned")  # it never does; this tells the type checker


def find_endpoint(endpoints: Mapping[str, Endpoint], name: str) -> Endpoint:
    """The endpoint of a name, for the caller of the call that runs.

    Raises:
        PermissionDenied: It is not for this caller, whether or not there is one.
        NotFound: There is none; names the nearest that the caller may use, or all if they are few.
    """
    access.check("endpoint", name)
    found = endpoints.get(name)
    if found is None:
        known = sorted(access.visible("endpoint", endpoints))
        meant = nearest(name, known)
        if meant is not None:
            hint = f"did you mean '{meant}'?"
        elif len(known) <= _MAX_LISTED:
            hint = f"there is {listed(known)}"
        else:
            hint = f"there is {listed(known[:_MAX_LISTED])}, and {len(known) - _MAX_LISTED} more"
        raise errors.NotFound(f"endpoint '{name[:200]}' is unknown; {hint}")
    return found


def refuse_path_variables_in_query(context: grpc.aio.ServicerContext[Any, Any], names: Iterable[str]) -> None:
    """Refuses a REST call whose query string sets what the path says: the transcoder would let the query win.

    Args:
        context: The call's; of a gRPC call there is no query string to look at.
        names: The variables of the path.

    Raises:
        InvalidArgument: The query string has one of them.
    """
    for key, value in context.invocation_metadata() or ():
        if key == ORIGINAL_PATH_KEY:
            path = value if isinstance(value, str) else value.decode(errors="replace")
            query = path.partition("?")[2]
            for parameter, _ in parse_qsl(query, keep_blank_values=True):
                if parameter in names:
                    raise errors.InvalidArgument(
                        f"query parameter `{parameter}` is not allowed: the path says which {parameter}",
                        parameter,
                    )


def _cut(text: str, max_bytes: int) -> str:
    data = text.encode(errors="replace")
    if len(data) <= max_bytes:
        return data.decode()
    return data[:max_bytes].decode(errors="ignore") + "..."
