"""Calls without tasks: what a hot handler is."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence

    import grpc

    from forno.server.transport.envoy.calls import Reply
    from forno.server.transport.envoy.metadata import MetadataPair

    Status = tuple[grpc.StatusCode, str, Sequence[MetadataPair]]


class HotHandler(Protocol):
    """A short way for requests that repeat (native/split.h): of a unary method, or as items of a stream.

    Event loop only.
    """

    def __call__(self, key: bytes, replies: Sequence[Reply], /) -> bool:
        """Takes requests of one key, and later answers each; False where they have to go the ordinary way."""

    def status_of(self, error: BaseException, /) -> Status:
        """What a caller is told of an error."""

    def error_item(self, request_id: str, status: Status, /) -> bytes:
        """The item of a stream that tells of an error."""
