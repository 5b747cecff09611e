"""Calls without tasks: what a hot handler is, and where its answers go."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Protocol

import grpc

from forno.server.transport.envoy.context import encode_details, too_large
from forno.server.transport.envoy.metadata import to_wire

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forno.server.transport.envoy.calls import Call, Layout
    from forno.server.transport.envoy.host import EnvoyHost, Method
    from forno.server.transport.envoy.metadata import MetadataPair

    Status = tuple[grpc.StatusCode, str, Sequence[MetadataPair]]


class HotHandler(Protocol):
    """A short way for the requests of one unary method that repeat (native/split.h). Event loop only."""

    @property
    def layout(self) -> Layout:
        """How requests are split."""

    def __call__(
        self, message: Any, key: bytes, spans: Sequence[int], request_id: bytes, deadline_us: int, reply: HotReply, /
    ) -> bool:
        """Takes a call, and later answers into `reply`; False where it has to go the ordinary way."""

    def learn(self, key: bytes, spans: Sequence[int], request: Any, /) -> None:
        """Is shown a request that the ordinary way has just answered."""

    def status_of(self, error: BaseException, /) -> Status:
        """What a caller is told of an error."""


class HotReply:
    """Where a hot handler's answer goes: as much of a future as the batcher and the worker need. No task waits for it.

    Made by the host for one call; ended by an answer, an error or the caller's leaving, whichever is first.
    """

    __slots__ = ("_call", "_done", "_host", "_method")

    def __init__(self, host: EnvoyHost, call: Call, method: Method) -> None:
        self._host = host
        self._call = call
        self._method = method
        self._done = False

    def done(self) -> bool:
        """Whether nobody waits any more."""
        return self._done

    def set_result(self, parts: Sequence[Any]) -> None:
        """Sends a message, given in parts that are copied here."""
        if self._call.reply(parts):
            self._done = True
            self._host.forget(self._call)
            self._host.note_answered(self._method)
        else:
            size = sum(len(memoryview(part).cast("B")) for part in parts)
            self.end(grpc.StatusCode.RESOURCE_EXHAUSTED, too_large(size), ())

    def set_exception(self, error: BaseException) -> None:
        """Sends the status of an error."""
        hot = self._method.hot
        if hot is not None:
            self.end(*hot.status_of(error))

    def end(self, code: grpc.StatusCode, details: str, trailing: Sequence[MetadataPair]) -> None:
        """Ends the call with an error."""
        self._done = True
        self._host.forget(self._call)
        self._call.send_status(code.value[0], encode_details(details), to_wire(trailing))
        self._host.count_rpcs(self._method.path, code.name, 1)

    def cancel(self) -> None:
        """The caller has gone."""
        self._done = True
        self._host.forget(self._call)
        self._host.count_rpcs(self._method.path, "CANCELLED", 1)
