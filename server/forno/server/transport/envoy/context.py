"""What a handler sees of its call: `grpc.aio.ServicerContext` over a call that Envoy carries."""

from __future__ import annotations

import asyncio
import base64
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote

import grpc

from forno.server.transport.envoy import compression

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence

    from forno.server.transport.envoy.calls import Call

    MetadataPair = tuple[str, str | bytes]

HIGH_WATER_BYTES = 1 << 20
"""A writer waits once so much of what it wrote has not left for the client."""

_NOT_METADATA = frozenset(("grpc-encoding", "grpc-accept-encoding"))
_PRINTABLE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


class Aborted(grpc.aio.AbortError):
    """Raised by `abort` through the handler; the status has been recorded by then."""


class Context(grpc.aio.ServicerContext[Any, Any]):
    """One call. Made by the host for each call, ended by its status; event loop only.

    Follows the behaviour of `grpc.aio` where that is observable, so that servicers cannot tell the difference.
    """

    def __init__(self, call: Call, decode: Callable[[bytes], Any], encode: Callable[[Any], bytes]) -> None:
        self._call = call
        self._decode = decode
        self._encode = encode
        self._code: grpc.StatusCode | int | None = None
        self._details = ""
        self._trailing: tuple[MetadataPair, ...] = ()
        self.headers_sent = False
        self._compress: str | None = None
        self._compress_next = True
        self._inbox: deque[tuple[bytes, bool]] = deque()
        self._half_closed = False
        self._waiter: asyncio.Future[None] | None = None
        self._writable: asyncio.Future[None] | None = None
        self._metadata: tuple[tuple[str, str], ...] | None = None
        self._callbacks: list[Callable[[Any], None]] = []
        self._cancelled = False
        self._done = False

    # What the host tells it.

    def on_message(self, message: bytes, compressed: bool) -> None:
        """One more message of the request stream."""
        self._inbox.append((message, compressed))
        self._wake()

    def on_half_close(self) -> None:
        """The request stream is complete."""
        self._half_closed = True
        self._wake()

    def on_writable(self) -> None:
        """What was written has left."""
        if self._writable is not None and not self._writable.done():
            self._writable.set_result(None)

    def on_cancel(self) -> None:
        """The caller has gone."""
        self._cancelled = True

    def finish(self, code: grpc.StatusCode | int | None = None, details: str | None = None) -> str:
        """Sends the status, once.

        Returns:
            The status' name, such as "OK".
        """
        chosen = code if code is not None else self._code if self._code is not None else grpc.StatusCode.OK
        number = chosen if isinstance(chosen, int) else chosen.value[0]
        text = self._details if details is None else details
        self._call.send_status(number, quote(text, safe=_PRINTABLE), _wire_metadata(self._trailing))
        self.close()
        return _NAMES.get(number, "UNKNOWN")

    def close(self) -> None:
        """Runs the done callbacks, once."""
        if not self._done:
            self._done = True
            for callback in self._callbacks:
                callback(self)

    @property
    def plain(self) -> bool:
        """Whether a successful answer needs nothing but the message: the host's short way."""
        return self._code is None and not (self._trailing or self.headers_sent or self._compress or self._callbacks)

    def decompress(self, message: bytes) -> bytes:
        """The message that a compressed one stands for.

        Raises:
            Aborted: The encoding is unknown, or the data is not of that encoding.
        """
        encoding = dict(self._raw_metadata()).get("grpc-encoding", "identity")
        try:
            return compression.decompress(message, encoding)
        except compression.UnknownEncodingError:
            self._code, self._details = (
                grpc.StatusCode.UNIMPLEMENTED,
                f"grpc-encoding '{encoding}' is not supported; supported: {compression.SUPPORTED}",
            )
        except ValueError as error:
            self._code, self._details = grpc.StatusCode.INTERNAL, f"the message is not valid {encoding}: {error}"
        raise Aborted

    async def read(self) -> Any:
        """The next request of the stream, or `grpc.aio.EOF`."""
        while not self._inbox:
            if self._half_closed:
                return grpc.aio.EOF
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        message, compressed = self._inbox.popleft()
        self._call.consumed(len(message))
        return self.decode(message, compressed)

    def decode(self, message: bytes, compressed: int) -> Any:
        """The request that a message holds.

        Raises:
            Aborted: It is not one.
        """
        if compressed:
            message = self.decompress(message)
        try:
            return self._decode(message)
        except Exception as error:
            self._code, self._details = grpc.StatusCode.INTERNAL, "Exception deserializing request!"
            raise Aborted from error

    async def requests(self) -> AsyncIterator[Any]:
        """The request stream as an iterator."""
        while (request := await self.read()) is not grpc.aio.EOF:
            yield request

    async def write(self, message: Any) -> None:
        """Sends one response; waits while the client reads more slowly than the handler writes."""
        if self._done:
            raise asyncio.InvalidStateError("the call has ended")
        if not self.headers_sent:
            await self.send_initial_metadata(())
        self.send(self._encode(message))
        if self._call.pending_bytes > HIGH_WATER_BYTES and self._call.notify_writable():
            self._writable = asyncio.get_running_loop().create_future()
            await self._writable

    def send(self, data: bytes) -> None:
        """Hands one serialized response to Envoy."""
        if self._compress and self._compress_next:
            self._call.send_message(compression.compress(data, self._compress), True)
        else:
            self._call.send_message(data)
        self._compress_next = True

    async def send_initial_metadata(self, initial_metadata: Iterable[MetadataPair]) -> None:
        """Sends the response headers; at most once, before the first message."""
        if self.headers_sent:
            raise RuntimeError("Send initial metadata failed: already sent")
        self.headers_sent = True
        pairs = _wire_metadata(initial_metadata)
        if self._compress:
            pairs.append(("grpc-encoding", self._compress))
        self._call.send_headers(pairs)

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Iterable[MetadataPair] = ()
    ) -> NoReturn:
        """Ends the call with an error status by raising through the handler."""
        if code is grpc.StatusCode.OK:
            code, details = grpc.StatusCode.UNKNOWN, ""
        self._code, self._details = code, details
        trailing = tuple(trailing_metadata)
        if trailing:
            self._trailing = trailing
        raise Aborted("Locally aborted.")

    def set_trailing_metadata(self, trailing_metadata: Iterable[MetadataPair]) -> None:
        """Sets what travels with the status."""
        self._trailing = tuple(trailing_metadata)

    def invocation_metadata(self) -> Any:
        """The caller's metadata; values of keys that end in "-bin" are bytes."""
        return grpc.aio.Metadata(
            *(
                (key, _from_base64(value) if key.endswith("-bin") else value)
                for key, value in self._raw_metadata()
                if key not in _NOT_METADATA
            )
        )

    def set_code(self, code: grpc.StatusCode) -> None:
        """Sets the status with which the call will end."""
        self._code = code

    def set_details(self, details: str) -> None:
        """Sets the message with which the call will end."""
        self._details = details

    def set_compression(self, compression: grpc.Compression) -> None:
        """Compresses responses, if the caller says that it understands the encoding."""
        wanted = {grpc.Compression.Deflate: "deflate", grpc.Compression.Gzip: "gzip"}.get(compression)
        accepted = dict(self._raw_metadata()).get("grpc-accept-encoding", "")
        self._compress = wanted if wanted in accepted.replace(" ", "").split(",") else None

    def disable_next_message_compression(self) -> None:
        """Sends the next response as it is."""
        self._compress_next = False

    def peer(self) -> str:
        """The caller's address in the form that gRPC uses."""
        address = self._call.peer
        return f"ipv6:{address}" if address.startswith("[") else f"ipv4:{address}" if ":" in address else address

    def peer_identities(self) -> Iterable[bytes] | None:
        """Always None: identities are Envoy's business."""
        return None

    def peer_identity_key(self) -> str | None:
        """Always None."""
        return None

    def auth_context(self) -> Mapping[str, Iterable[bytes]]:
        """Always empty."""
        return {}

    def time_remaining(self) -> float | None:
        """Seconds until the deadline, or None without one."""
        deadline_us = self._call.deadline_us
        return None if deadline_us < 0 else max(0.0, deadline_us / 1e6 - time.monotonic())

    def trailing_metadata(self) -> Sequence[MetadataPair]:
        """What has been set to travel with the status."""
        return self._trailing

    def code(self) -> grpc.StatusCode | int | None:
        """The status set so far."""
        return self._code

    def details(self) -> str:
        """The message set so far."""
        return self._details

    def add_done_callback(self, callback: Callable[[Any], None]) -> None:
        """Has `callback(context)` called when the call ends, however it ends."""
        self._callbacks.append(callback)

    def cancelled(self) -> bool:
        """Whether the caller has given up."""
        return self._cancelled

    def done(self) -> bool:
        """Whether the call has ended."""
        return self._done or self._cancelled

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _raw_metadata(self) -> tuple[tuple[str, str], ...]:
        if self._metadata is None:
            self._metadata = self._call.metadata()
        return self._metadata


_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


def _wire_metadata(pairs: Iterable[MetadataPair]) -> list[tuple[str, str]]:
    return [
        (key, base64.b64encode(value).rstrip(b"=").decode() if isinstance(value, bytes) else value)
        for key, value in pairs or ()
    ]


def _from_base64(value: str) -> bytes:
    return base64.b64decode(value + "=" * (-len(value) % 4))
