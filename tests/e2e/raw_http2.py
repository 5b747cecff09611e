"""A gRPC client that can do what a proper one never does: any frame, any split, any end."""

from __future__ import annotations

import contextlib
import socket
import struct
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import h2.config
import h2.connection
import h2.errors
import h2.events
import h2.exceptions
import h2.settings

if TYPE_CHECKING:
    from collections.abc import Iterable
    from types import TracebackType

MAX_FRAME_BYTES = 16384


def frame(message: bytes, flag: int = 0) -> bytes:
    """A message with its prefix."""
    return struct.pack(">BI", flag, len(message)) + message


@dataclass
class Answer:
    """What came back on one stream."""

    headers: dict[str, str] = field(default_factory=dict)
    body: bytes = b""
    trailers: dict[str, str] = field(default_factory=dict)
    ended: bool = False
    reset: int | None = None

    @property
    def status(self) -> str:
        """The gRPC status; empty where there was none."""
        return self.trailers.get("grpc-status") or self.headers.get("grpc-status", "")

    @property
    def message(self) -> str:
        return self.trailers.get("grpc-message") or self.headers.get("grpc-message", "")


class RawClient:
    """One HTTP/2 connection."""

    def __init__(self, port: int, window_bytes: int = 1 << 20) -> None:
        self.port = port
        self.socket = socket.create_connection(("127.0.0.1", port))
        self.socket.settimeout(5)
        self.h2 = h2.connection.H2Connection(h2.config.H2Configuration(validate_outbound_headers=False))
        self.h2.initiate_connection()
        self.h2.update_settings({h2.settings.SettingCodes.INITIAL_WINDOW_SIZE: window_bytes})
        self.answers: dict[int, Answer] = {}
        self.acknowledge = True  # whether received data opens the window again
        self.flush()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.socket.close()

    def open(self, rpc: str, extra: Iterable[tuple[str, str]] = (), *, end: bool = False, **changed: str) -> int:
        """Starts a call; `changed` are pseudo and standard headers other than the usual ones."""
        stream = self.h2.get_next_available_stream_id()
        standard = {
            ":method": "POST",
            ":scheme": "http",
            ":path": f"/test.Conformance/{rpc}",
            ":authority": "test",
            "content-type": "application/grpc",
            "te": "trailers",
        }
        standard |= {
            (":" if key in {"method", "path"} else "") + key.replace("_", "-"): v for key, v in changed.items()
        }
        self.answers[stream] = Answer()
        self.h2.send_headers(stream, [*standard.items(), *extra], end_stream=end)
        self.flush()
        return stream

    def send(self, stream: int, data: bytes, *, end: bool = False, piece_bytes: int = MAX_FRAME_BYTES) -> None:
        """Sends data in pieces, as far as the windows let it.

        Raises:
            h2.exceptions.ProtocolError: The server has reset the stream, before or while it was waited for room.
        """
        pieces = [data[at : at + piece_bytes] for at in range(0, len(data), piece_bytes)] or [b""]
        for index, piece in enumerate(pieces):
            while self.h2.local_flow_control_window(stream) < len(piece):
                if self.answers[stream].reset is not None:
                    raise h2.exceptions.StreamClosedError(stream)  # its window opens no more
                self.receive()
            self.h2.send_data(stream, piece, end_stream=end and index == len(pieces) - 1)
            self.flush()

    def reset(self, stream: int) -> None:
        self.h2.reset_stream(stream, h2.errors.ErrorCodes.CANCEL)
        self.flush()

    def receive(self, limit_s: float = 5.0) -> bool:
        """Takes what comes next; False when nothing came in time or the connection has ended."""
        self.socket.settimeout(limit_s)
        try:
            data = self.socket.recv(1 << 16)
        except TimeoutError:
            return False
        if not data:
            return False
        for event in self.h2.receive_data(data):
            self._handle(event)
        self.flush()
        return True

    def answer(self, stream: int, limit_s: float = 5.0) -> Answer:
        """What came on a stream once that has ended, or after `limit_s`."""
        answer, end = self.answers[stream], time.monotonic() + limit_s
        while not answer.ended and answer.reset is None and (left_s := end - time.monotonic()) > 0:
            with contextlib.suppress(ConnectionError):
                if self.receive(left_s):
                    continue
            break
        return answer

    def _handle(self, event: h2.events.Event) -> None:
        match event:
            case h2.events.ResponseReceived():
                self.answers[event.stream_id].headers = _text(event.headers)
            case h2.events.TrailersReceived():
                self.answers[event.stream_id].trailers = _text(event.headers)
            case h2.events.DataReceived():
                self.answers[event.stream_id].body += event.data
                if self.acknowledge:
                    self.h2.acknowledge_received_data(event.flow_controlled_length, event.stream_id)
            case h2.events.StreamEnded():
                self.answers[event.stream_id].ended = True
            case h2.events.StreamReset():
                self.answers[event.stream_id].reset = int(event.error_code)
            case _:
                pass

    def flush(self) -> None:
        self.socket.sendall(self.h2.data_to_send())


def _text(headers: Iterable[tuple[bytes | str, bytes | str]]) -> dict[str, str]:
    return {
        key if isinstance(key, str) else key.decode(): value if isinstance(value, str) else value.decode("latin-1")
        for key, value in headers
    }
