"""The types of `_forno_envoy`, which exists only inside Envoy (native/module.cc)."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Sequence


class Call(Protocol):
    """One gRPC call that Envoy carries. Event loop only. Dropping it without a status ends the call with INTERNAL."""

    method: int
    deadline_us: int
    peer: str
    gone: bool
    pending_bytes: int

    def metadata(self) -> tuple[tuple[str, str], ...]: ...
    def send_headers(self, pairs: Sequence[tuple[str, str]], /) -> None: ...
    def send_message(self, data: bytes, compressed: bool = False, /) -> None: ...
    def send_status(self, code: int, message: str, trailers: Sequence[tuple[str, str]], /) -> None: ...
    def consumed(self, count: int, /) -> None: ...
    def notify_writable(self) -> bool: ...


class Native(Protocol):
    """The module itself."""

    CALL: int
    MESSAGE: int
    HALF_CLOSE: int
    CANCEL: int
    WRITABLE: int
    STOP: int

    def serve(self, methods: list[tuple[str, bool]], max_message_bytes: int, max_inbox_bytes: int, /) -> int: ...
    def take(self) -> list[tuple[int, Call, bytes | None, int]]: ...
    def reply(self, replies: list[tuple[Call, bytes]], /) -> None: ...
