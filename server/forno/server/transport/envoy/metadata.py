"""Metadata on its way between Python and the wire (gRPC over HTTP/2, "Custom-Metadata")."""

from __future__ import annotations

import base64
import binascii
import contextlib
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    MetadataPair = tuple[str, str | bytes]

_KEY = re.compile(r"[0-9a-z_.-]+")
_VALUE = re.compile(r"[\x20-\x7e]*")

# What belongs to the transport: said by it alone, and never part of an application's metadata.
_OURS = frozenset(
    (
        *("content-length", "content-type", "grpc-accept-encoding", "grpc-encoding", "grpc-message", "grpc-status"),
        *("connection", "host", "keep-alive", "proxy-connection", "te", "trailer", "transfer-encoding", "upgrade"),
    )
)


def to_wire(pairs: Iterable[MetadataPair] | None) -> list[tuple[str, str]]:
    """An application's metadata as header fields; those that belong to the transport are left out, as grpc.aio does.

    Raises:
        ValueError: A key or value cannot be a header field.
        TypeError: A value is of another type than its key says.
    """
    return [(key, _value(key, value)) for key, value in pairs or () if key not in _OURS]


def _value(key: str, value: str | bytes) -> str:
    if not _KEY.fullmatch(key):
        raise ValueError(f"the metadata key {key!r} has other characters than 0-9 a-z _ . -")
    if key.endswith("-bin"):
        if not isinstance(value, bytes):
            kind = type(value).__name__
            raise TypeError(f"the metadata value of {key!r} is {kind}; expected bytes, as the key ends in -bin")
        return base64.b64encode(value).rstrip(b"=").decode()
    text = value.decode("latin-1") if isinstance(value, bytes) else value
    if not _VALUE.fullmatch(text):
        raise ValueError(
            f"the metadata value {text!r} of {key!r} is not printable ASCII; give bytes under a key that ends in -bin"
        )
    return text


def from_wire(fields: Iterable[tuple[str, str]]) -> Iterator[MetadataPair]:
    """The application's share of header fields. A value that should be base64 and is not, is left out."""
    for key, value in fields:
        if key in _OURS:
            continue
        if not key.endswith("-bin"):
            yield key, value
            continue
        for part in value.split(","):  # fields of one name may have been joined on the way
            unpadded = part.strip().rstrip("=")
            with contextlib.suppress(binascii.Error):
                yield key, base64.b64decode(unpadded + "=" * (-len(unpadded) % 4), validate=True)
