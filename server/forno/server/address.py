"""Where a server listens: a TCP port, or a Unix socket."""

from __future__ import annotations

from dataclasses import dataclass

UNIX = "unix:"
MAX_PATH_BYTES = 107
"""Longest path of a Unix socket: Linux's bound, less the byte that ends it."""

_MAX_PORT = 65535


@dataclass(frozen=True, slots=True)
class Address:
    """HOST:PORT, or unix:PATH; which of both, `path` says."""

    host: str = ""
    port: int = 0
    path: str = ""  # of a Unix socket, which has neither host nor port

    @classmethod
    def parse(cls, text: str) -> Address:
        """Reads a setting; an IPv6 host stands in brackets, and comes without them.

        Raises:
            ValueError: It is neither form; the text says what is expected.
        """
        if text.startswith(UNIX):
            return cls(path=_socket_path(text.removeprefix(UNIX)))
        host, colon, port = text.rpartition(":")
        if host.startswith("[") and host.endswith("]"):
            host = host[1:-1]
        elif ":" in host:
            host = ""
        if not (host and colon and port.isascii() and port.isdecimal() and int(port) <= _MAX_PORT):
            raise ValueError(
                "HOST:PORT with a port from 0 to 65535, such as 127.0.0.1:8080, 0.0.0.0:80 or [::1]:8080, or unix:PATH"
            )
        return cls(host, int(port))

    def __str__(self) -> str:
        if self.path:
            return f"{UNIX}{self.path}"
        return f"[{self.host}]:{self.port}" if ":" in self.host else f"{self.host}:{self.port}"


def _socket_path(text: str) -> str:
    """PATH of unix:PATH; gRPC's other way to write an absolute one, unix:///PATH, means the same."""
    path = text[2:] if text.startswith("///") else text
    if not path or path.startswith(("@", "//")) or "\0" in path:
        raise ValueError("unix:PATH with the path of a socket, such as unix:/run/forno/forno.sock")
    if len(path.encode()) > MAX_PATH_BYTES:
        raise ValueError(f"unix:PATH with a path of at most {MAX_PATH_BYTES} bytes")
    return path
