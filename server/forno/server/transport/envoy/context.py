"""What a handler sees of its call: `grpc.aio.ServicerContext` over a call that Envoy carries."""

from __future__ import annotations

import asyncio
import logging
import time
from collections import deque
from typing import TYPE_CHECKING, Any, NoReturn
from urllib.parse import quote

import grpc

from forno.server.transport.envoy import compression, metadata

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Callable, Iterable, Mapping, Sequence

    from forno.server.transport.envoy.calls import Call
    from forno.server.transport.envoy.metadata import MetadataPair

log = logging.getLogger("forno.transport")

EOF: Any = grpc.aio.EOF  # type: ignore[attr-defined]  # missing in the stubs

HIGH_WATER_BYTES = 1 << 20
"""A writer waits once so much of what it wrote has not left for the client."""

MESSAGES_A_TURN = 64
"""How many messages of one call are read or written before other calls get a turn."""

_PRINTABLE = "".join(chr(code) for code in range(0x20, 0x7F) if chr(code) != "%")


def encode_details(text: str) -> str:
    """A status' message as `grpc-message` carries it: percent-encoded (gRPC over HTTP/2, "Status-Message")."""
    return quote(text, safe=_PRINTABLE, errors="replace")


def too_large(size_bytes: int) -> str:
    """What a caller is told of a response over the message limit."""
    return f"the response has {size_bytes} bytes, the limit is {compression.limit_bytes()} (server.max_message_bytes)"


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
        self._code: grpc.StatusCode | None = None
        self._details = ""
        self._trailing: tuple[MetadataPair, ...] = ()
        self._trailing_fields: list[tuple[str, str]] = []
        self._aborted = False
        self.headers_sent = False
        self._compress: str | None = None
        self._compress_next = True
        self._inbox: deque[tuple[bytes, bool]] = deque()
        self._half_closed = False
        self._waiter: asyncio.Future[None] | None = None
        self._writers: list[asyncio.Future[None]] = []
        self._items_waiter: asyncio.Future[None] | None = None
        self._turn = 0
        self._metadata: Sequence[tuple[str, str]] | None = None
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
        writers, self._writers = self._writers, []
        for writer in writers:
            if not writer.done():
                writer.set_result(None)

    def on_items_done(self) -> None:
        """The last item on the short way has been answered."""
        if self._items_waiter is not None and not self._items_waiter.done():
            self._items_waiter.set_result(None)

    def on_cancel(self) -> None:
        """The caller has gone."""
        self._cancelled = True

    def finish(self, code: grpc.StatusCode | None = None, details: str | None = None) -> str:
        """Sends the status, once.

        Returns:
            The status' name, such as "OK".
        """
        chosen = code or self._code or grpc.StatusCode.OK
        text = self._details if details is None else details
        self._call.send_status(chosen.value[0], encode_details(text), self._trailing_fields)
        self.close()
        return str(chosen.name)

    def close(self) -> None:
        """Runs the done callbacks, once."""
        if not self._done:
            self._done = True
            for callback in self._callbacks:
                try:
                    callback(self)
                except Exception:
                    log.exception("a done callback raised")

    async def items_done(self) -> None:
        """Returns when no item of the stream is on the short way any more."""
        if self._call.notify_items_done():
            self._items_waiter = asyncio.get_running_loop().create_future()
            await self._items_waiter

    def has_answered(self) -> bool:
        """Whether the client was given an answer that the handler does not know of: by the short way."""
        return self._call.replied

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
        if encoding == "identity":
            text = "a message is flagged as compressed, but there is no grpc-encoding that says how"
            raise self._refusal(grpc.StatusCode.INTERNAL, text)
        try:
            return compression.decompress(message, encoding)
        except compression.UnknownEncodingError:
            self._trailing_fields.append(("grpc-accept-encoding", compression.SUPPORTED))
            text = f"grpc-encoding '{encoding}' is not supported; supported: {compression.SUPPORTED}"
            raise self._refusal(grpc.StatusCode.UNIMPLEMENTED, text) from None
        except compression.TooLargeError as error:
            raise self._refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, f"the message is too large: {error}") from None
        except ValueError as error:
            raise self._refusal(grpc.StatusCode.INTERNAL, f"the message is not valid {encoding}: {error}") from None

    async def read(self) -> Any:
        """The next request of the stream, or `grpc.aio.EOF`."""
        while not self._inbox:
            if self._half_closed:
                return EOF
            self._waiter = asyncio.get_running_loop().create_future()
            try:
                await self._waiter
            finally:
                self._waiter = None
        message, compressed = self._inbox.popleft()
        self._call.consumed(len(message))
        await self._breathe()
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
            text = f"the request is not a message of the type that this method takes: {error}"
            raise self._refusal(grpc.StatusCode.INTERNAL, text) from error

    def requests(self) -> AsyncIterator[Any]:
        """The request stream as an iterator."""
        return _Requests(self)

    async def write(self, message: Any) -> None:
        """Sends one response; waits while the client reads more slowly than the handler writes."""
        if self._done:
            raise asyncio.InvalidStateError("the call has ended")
        if self._aborted:  # and the handler has caught that
            raise self._refusal(self._code or grpc.StatusCode.UNKNOWN, self._details)
        data = self._encode(message)
        if not self.headers_sent:
            await self.send_initial_metadata(())
        self.send(data)
        if self._call.pending_bytes > HIGH_WATER_BYTES and self._call.notify_writable():
            writer = asyncio.get_running_loop().create_future()
            self._writers.append(writer)
            await writer
        else:
            await self._breathe()

    def send(self, data: bytes) -> None:
        """Hands one serialized response to Envoy.

        Raises:
            Aborted: It is over the message limit.
        """
        self.check_size(data)
        if self._compress and self._compress_next:
            self._call.send_message(compression.compress(data, self._compress), True)
        else:
            self._call.send_message(data)
        self._compress_next = True

    def check_size(self, data: bytes) -> None:
        """Refuses a response that is over the message limit.

        Raises:
            Aborted: It is.
        """
        if len(data) > compression.limit_bytes():
            raise self._refusal(grpc.StatusCode.RESOURCE_EXHAUSTED, too_large(len(data)))

    async def send_initial_metadata(self, initial_metadata: Iterable[MetadataPair]) -> None:
        """Sends the response headers; at most once, before the first message."""
        if self.headers_sent:
            raise RuntimeError("Send initial metadata failed: already sent")
        pairs = metadata.to_wire(initial_metadata)
        self.headers_sent = True
        if self._compress:
            pairs.append(("grpc-encoding", self._compress))
        self._call.send_headers(pairs)

    async def abort(
        self, code: grpc.StatusCode, details: str = "", trailing_metadata: Iterable[MetadataPair] = ()
    ) -> NoReturn:
        """Ends the call with an error status by raising through the handler."""
        if code is grpc.StatusCode.OK:
            code, details = grpc.StatusCode.UNKNOWN, ""
        if trailing := tuple(trailing_metadata):
            self.set_trailing_metadata(trailing)
        raise self._refusal(code, details)

    async def abort_with_status(self, status: grpc.Status) -> NoReturn:
        """Ends the call with a status and its details, such as `rpc_status.to_status` makes."""
        await self.abort(status.code, status.details, status.trailing_metadata or ())

    def set_trailing_metadata(self, trailing_metadata: Iterable[MetadataPair]) -> None:
        """Sets what travels with the status."""
        trailing = tuple(trailing_metadata)
        self._trailing_fields = metadata.to_wire(trailing)
        self._trailing = trailing

    def invocation_metadata(self) -> Any:
        """The caller's metadata; values of keys that end in "-bin" are bytes."""
        return grpc.aio.Metadata(*metadata.from_wire(self._raw_metadata()))

    def set_code(self, code: grpc.StatusCode | int) -> None:
        """Sets the status with which the call will end."""
        self._code = _CODES.get(code, grpc.StatusCode.UNKNOWN) if isinstance(code, int) else code

    def set_details(self, details: str) -> None:
        """Sets the message with which the call will end."""
        self._details = details

    def set_compression(self, compression: grpc.Compression) -> None:
        """Compresses responses, if the caller says that it understands the encoding.

        Raises:
            RuntimeError: The headers, which say so, have been sent.
        """
        if self.headers_sent:
            raise RuntimeError("Compression setting must be specified before sending initial metadata")
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

    def time_remaining(self) -> float | None:  # type: ignore[override]  # the stubs forget calls without a deadline
        """Seconds until the deadline, or None without one."""
        deadline_us = self._call.deadline_us
        return None if deadline_us < 0 else max(0.0, deadline_us / 1e6 - time.monotonic())

    def trailing_metadata(self) -> Sequence[MetadataPair]:  # type: ignore[override]  # as grpc.aio itself does
        """What has been set to travel with the status."""
        return self._trailing

    def code(self) -> grpc.StatusCode | None:  # type: ignore[override]  # none has been set at first
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

    def _refusal(self, code: grpc.StatusCode, details: str) -> Aborted:
        self._code, self._details, self._aborted = code, details, True
        return Aborted("Locally aborted.")

    async def _breathe(self) -> None:
        """Lets other calls run now and then: neither reading nor writing has to wait for anything while all is well."""
        self._turn += 1
        if self._turn == MESSAGES_A_TURN:
            self._turn = 0
            await asyncio.sleep(0)

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)

    def _raw_metadata(self) -> Sequence[tuple[str, str]]:
        if self._metadata is None:
            self._metadata = self._call.metadata()
        return self._metadata


class _Requests:
    """`Context.read` as an iterator. Not a generator: one that is left half-way would have to be closed."""

    def __init__(self, context: Context) -> None:
        self._context = context

    def __aiter__(self) -> _Requests:
        return self

    async def __anext__(self) -> Any:
        request = await self._context.read()
        if request is EOF:
            raise StopAsyncIteration
        return request


_CODES = {code.value[0]: code for code in grpc.StatusCode}
