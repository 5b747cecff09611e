"""Asks Envoy's administration interface, over its Unix socket."""

from __future__ import annotations

import http.client
import socket
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from pathlib import Path

TIMEOUT_S = 2.0


def ask(path: Path, method: str, target: str) -> str:
    """What Envoy answers; empty if it has just ended.

    Args:
        path: The socket.
        method: HTTP method.
        target: Path and query.
    """
    connection = _UnixConnection(path)
    try:
        connection.request(method, target)
        return connection.getresponse().read().decode()
    except OSError:
        return ""
    finally:
        connection.close()


class _UnixConnection(http.client.HTTPConnection):
    """HTTP over a Unix socket."""

    def __init__(self, path: Path) -> None:
        super().__init__("localhost", timeout=TIMEOUT_S)
        self._path = path

    def connect(self) -> None:
        """Connects to the socket instead of the host."""
        self.sock = socket.socket(socket.AF_UNIX)
        self.sock.settimeout(TIMEOUT_S)
        self.sock.connect(str(self._path))
