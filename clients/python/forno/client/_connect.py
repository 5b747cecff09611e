"""Connections: plain, or with TLS."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

if TYPE_CHECKING:
    from collections.abc import Sequence


@dataclass(frozen=True)
class Tls:
    """How to speak with a server that speaks TLS. All files are PEM.

    Args:
        ca_file: Authorities whose servers are believed; None = those that gRPC knows.
        certificate_file: A certificate to show; None = none.
        key_file: The certificate's private key.
    """

    ca_file: str | Path | None = None
    certificate_file: str | Path | None = None
    key_file: str | Path | None = None


def connect(address: str, tls: Tls | None, options: Sequence[tuple[str, Any]]) -> grpc.Channel:
    """A channel to a server.

    Raises:
        OSError: A file cannot be read.
    """
    if tls is None:
        return grpc.insecure_channel(address, options)
    authorities, key, certificate = [
        Path(file).read_bytes() if file else None for file in (tls.ca_file, tls.key_file, tls.certificate_file)
    ]
    return grpc.secure_channel(address, grpc.ssl_channel_credentials(authorities, key, certificate), options)
