"""Message encodings of gRPC over HTTP/2: identity, gzip and deflate."""

from __future__ import annotations

import zlib

SUPPORTED = "identity, deflate, gzip"
_WBITS = {"gzip": 31, "deflate": 15}

_limit_bytes = 64 * 1024 * 1024


class UnknownEncodingError(ValueError):
    """The encoding is none of those that gRPC defines here."""


class TooLargeError(ValueError):
    """The message is over the limit."""


def set_limit(limit_bytes: int) -> None:
    """Sets the largest message, as it is before compression."""
    global _limit_bytes  # noqa: PLW0603  (one server a process; set once at start)
    _limit_bytes = limit_bytes


def limit_bytes() -> int:
    """The largest message."""
    return _limit_bytes


def decompress(data: bytes, encoding: str) -> bytes:
    """The message that `data` stands for.

    Raises:
        UnknownEncodingError: The encoding is not supported.
        TooLargeError: It is larger than the message limit.
        ValueError: The data is broken.
    """
    if encoding not in _WBITS:
        raise UnknownEncodingError(encoding)
    stream = zlib.decompressobj(_WBITS[encoding])
    try:
        message = stream.decompress(data, _limit_bytes + 1)
    except zlib.error as error:
        raise ValueError(str(error)) from None
    if len(message) > _limit_bytes:
        raise TooLargeError(f"it holds more than {_limit_bytes} bytes (server.max_message_bytes)")
    if not stream.eof:
        raise ValueError("it ends too early")
    if stream.unused_data:
        raise ValueError("something follows after its end")
    return message


def compress(data: bytes, encoding: str) -> bytes:
    """`data` in an encoding of `SUPPORTED` other than identity."""
    stream = zlib.compressobj(6, zlib.DEFLATED, _WBITS[encoding])
    return stream.compress(data) + stream.flush()
