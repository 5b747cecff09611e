"""REST calls that reach the host as they are, past Envoy's transcoder: HTTP in, HTTP out.

A route without the transcoder (ends.py) names the method that takes its calls. The servicer does not notice: its
request is made of path and body, its answer is the body of the response, and its status becomes an HTTP status with the
JSON that the transcoder would have written.
"""

from __future__ import annotations

import asyncio
import functools
from typing import TYPE_CHECKING, Any, Protocol, cast
from urllib.parse import unquote

import grpc
import orjson
from google.protobuf import json_format
from google.rpc import status_pb2

from forno.server.clock import clock_us
from forno.server.errors import DeadlineExceeded
from forno.server.request import NEVER_US
from forno.server.servicers import status
from forno.server.transport.envoy.context import Context, too_large
from forno.server.transport.envoy.metadata import from_wire

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forno.server.transport.envoy.calls import Call, JsonSplit
    from forno.server.transport.envoy.host import EnvoyHost
    from forno.server.transport.envoy.metadata import MetadataPair
    from forno.server.transport.envoy.methods import Method


class HttpHandler(Protocol):
    """A short way for the REST calls of one method, and what the ordinary way needs. Event loop only."""

    def request(self, path: str, content_type: str, body: bytes, /) -> Any:
        """The message that the method takes."""

    def __call__(self, key: bytes, counts: Sequence[int], numbers: bytes, reply: HttpReply, /) -> bool:
        """Takes a call whose body was split, and later answers it; False where it has to go the ordinary way."""


class HttpCall:
    """A call as `Context` knows it, over one that wants an HTTP response."""

    def __init__(self, call: Call) -> None:
        self._call = call
        self.deadline_us = call.deadline_us
        self.peer = call.peer
        self.metadata = call.metadata
        self.pending_bytes = 0
        self._body = b""

    def send_headers(self, pairs: Sequence[tuple[str, str]]) -> None:
        """Nothing: what gRPC sends first has no place in such a response."""

    def send_message(self, data: bytes) -> None:
        """Keeps the body until the status is known."""
        self._body = data

    def send_status(self, code: int, message: str, trailers: Sequence[tuple[str, str]]) -> None:
        """Sends the response; the message is percent-encoded."""
        if code == 0:
            self._call.respond(0, (), self._body)
        else:
            respond(self._call, code, unquote(message), list(from_wire(trailers)))


class HttpReply:
    """Where the answer to a REST call on the short way goes: as much of a future as the batcher and the worker need.

    Ended by an answer, an error or the caller's leaving, whichever is first. Envoy does not know every such call's
    deadline: it is kept here.

    Args:
        host: The call's.
        call: What to answer.
        path: The method's, for counting.
    """

    __slots__ = ("_call", "_done", "_host", "_path", "_timer", "expires_us")

    def __init__(self, host: EnvoyHost, call: Call, path: str) -> None:
        self._host, self._call, self._path = host, call, path
        self._done = False
        deadline_us = call.deadline_us
        self.expires_us = NEVER_US if deadline_us < 0 else deadline_us
        """Monotonic."""
        self._timer: asyncio.TimerHandle | None = None
        if deadline_us >= 0:
            wait_s = max(0, deadline_us - clock_us()) / 1e6
            self._timer = asyncio.get_running_loop().call_later(wait_s, self._expire)

    def done(self) -> bool:
        """Whether nobody waits any more."""
        return self._done

    def hand_over(self) -> None:
        """Leaves the call to the ordinary way."""
        self._finish()

    def set_result(self, parts: Sequence[bytes]) -> None:
        """Sends the body of a successful response."""
        body = b"".join(parts)
        if self._call.reply(body):
            self._finish()
            self._host.count_rpcs(self._path, "OK", 1)
        else:
            self.end(grpc.StatusCode.RESOURCE_EXHAUSTED, too_large(len(body)), ())

    def set_exception(self, error: BaseException) -> None:
        """Sends the status of an error."""
        self.end(*status.told(error))

    def end(self, code: grpc.StatusCode, details: str, trailing: Sequence[MetadataPair]) -> None:
        """Ends the call with an error."""
        self._finish()
        respond(self._call, code.value[0], details, trailing)
        self._host.count_rpcs(self._path, code.name, 1)

    def cancel(self) -> None:
        """The caller has gone."""
        self._finish()
        self._host.count_rpcs(self._path, "CANCELLED", 1)

    def _expire(self) -> None:
        if not self._done:
            self.set_exception(DeadlineExceeded("the deadline has passed"))

    def _finish(self) -> None:
        self._done = True
        self._host.forget(self._call)
        if self._timer is not None:
            self._timer.cancel()


def take(host: EnvoyHost, method: Method, call: Call, body: bytes, split: JsonSplit | None) -> None:
    """Has a call answered, on the short way where that can be."""
    handler = method.http
    if handler is not None and split is not None:
        reply = host.live[call] = HttpReply(host, call, method.path)
        try:
            if handler(*split, reply):
                return
        except Exception as error:  # noqa: BLE001  (the calls behind it must not suffer)
            reply.set_exception(error)
            return
        reply.hand_over()
    host.begin(call, method, body, 0)


def respond(call: Call, code: int, message: str, trailing: Sequence[MetadataPair]) -> None:
    """Sends an error as the transcoder would have: a JSON google.rpc.Status, further metadata as headers."""
    document = {"code": code, "message": message, "details": []}
    headers = []
    for key, value in trailing:
        if key == status.DETAILS_KEY and isinstance(value, bytes):
            document = json_format.MessageToDict(
                status_pb2.Status.FromString(value),
                preserving_proto_field_name=True,
                always_print_fields_with_no_presence=True,
            )
        elif isinstance(value, str):
            headers.append((key, value))
    call.respond(code, headers, orjson.dumps(document))


def context_of(handler: HttpHandler, call: Call) -> Context:
    """What the method's handler sees of a call."""
    decode = functools.partial(handler.request, call.path, call.content_type)
    return Context(cast("Call", HttpCall(call)), decode, body_of)


def body_of(response: Any) -> bytes:
    """The body of a response: that of a google.api.HttpBody, whose content type is JSON."""
    data: bytes = response.data
    return data
