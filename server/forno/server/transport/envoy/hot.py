"""Calls without tasks: what a hot handler is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    from google.rpc.status_pb2 import Status

    from forno.server.transport.envoy.calls import Reply


class HotHandler(Protocol):
    """A short way for requests that repeat (native/split.h): of a unary method, or as items of a stream.

    Event loop only.
    """

    def __call__(self, key: bytes, replies: Sequence[Reply], /) -> bool:
        """Takes requests of one key, and later answers each; False where they have to go the ordinary way."""

    def error_item(self, request_id: str, error: Status, /) -> bytes:
        """The item of a stream that tells of an error."""
