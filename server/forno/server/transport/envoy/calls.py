"""The types of `_forno_envoy`, which exists only inside Envoy (native/module.cc)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence
    from typing import Any

Layout = tuple[int, int, int, int]
"""Field numbers that tell the module how to split requests (native/split.h)."""

NO_LAYOUT: Layout = (0, 0, 0, 0)
"""Requests are not split."""

Split = tuple[bytes, tuple[int, ...], bytes]
"""Key, spans and request id of a split request."""


class Call(Protocol):
    """One gRPC call that Envoy carries. Event loop only. Dropping it without a status ends the call with INTERNAL."""

    method: int
    deadline_us: int
    peer: str
    credential: str
    gone: bool
    pending_bytes: int

    def metadata(self) -> Sequence[tuple[str, str]]:
        """The caller's headers, without those of the transport."""

    def reply(self, parts: Sequence[Any], /) -> bool:
        """Answers a unary call with success; False, and nothing sent, where the message would be too large."""

    def send_headers(self, pairs: Sequence[tuple[str, str]], /) -> None:
        """Sends initial metadata."""

    def send_message(self, data: bytes, compressed: bool = False, /) -> None:
        """Sends one message."""

    def send_status(self, code: int, message: str, trailers: Sequence[tuple[str, str]], /) -> None:
        """Ends the call; the message is percent-encoded."""

    def consumed(self, count: int, /) -> None:
        """Says that so many bytes of the request stream have been used up."""

    def notify_writable(self) -> bool:
        """Whether a WRITABLE event will come; False where all that was sent has left."""


Event = tuple[int, Call, bytes | None, bool, Split | None]
"""Kind, call, message, whether it is compressed, and how it is split."""


class Native(Protocol):
    """The module itself."""

    CALL: int
    MESSAGE: int
    HALF_CLOSE: int
    CANCEL: int
    WRITABLE: int
    STOP: int

    def serve(self, methods: list[tuple[str, bool, Layout]], max_message_bytes: int, max_inbox_bytes: int, /) -> int:
        """Opens the doors; the descriptor that is readable when events wait."""

    def take(self) -> list[Event]:
        """All events that wait."""
