"""From settings to a running server: chooses the transport, and holds the process until the end.

Kept light: with servicers inside Envoy this process never imports gRPC, NumPy or a runtime.
"""

from __future__ import annotations

import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forno.server import logs
from forno.server.errors import ConfigError
from forno.server.transport.envoy import supervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from forno.server.config import Config

_MAX_PORT = 65535


def serve(config: Config, paths: Sequence[str]) -> int:
    """Serves what `config` and `paths` name until SIGINT or SIGTERM, then drains.

    Returns:
        Exit status.

    Raises:
        ConfigError: It cannot be served as asked.
    """
    logs.configure(config.server.log_level, config.server.log_format)
    host, port = _free_address(config.server.address)
    transport = config.server.transport
    if transport == "grpc":
        return _run(_serve_grpc(config, paths, f"{host}:{port}"))
    if transport == "envoy":
        reason = supervisor.why_not_inside()
        if not reason:
            status, message = supervisor.serve_inside(config, paths, host, port, logs.EnvoyLog().line)
            if message:
                print(f"forno: {message}", file=sys.stderr)  # noqa: T201
            return status
        print(f"forno: {reason}; serving with --transport proxy instead, which is slower", file=sys.stderr)  # noqa: T201
    return _run(_serve_proxy(config, paths, host, port))


def _run(main: Coroutine[Any, Any, None]) -> int:
    try:
        import uvloop  # noqa: PLC0415  (not everywhere)

        uvloop.run(main)
    except ImportError:
        import asyncio  # noqa: PLC0415  (heavy)

        asyncio.run(main)
    return 0


async def _serve_grpc(config: Config, paths: Sequence[str], address: str) -> None:
    from forno.server.transport.aio import AioHost  # noqa: PLC0415  (heavy)

    await _run_server(config, paths, address, rest=False, make=lambda count: AioHost(address, _limit(config), count))


async def _serve_proxy(config: Config, paths: Sequence[str], host: str, port: int) -> None:
    from forno.server.transport.envoy.proxy import ProxyHost  # noqa: PLC0415  (heavy)

    await _run_server(
        config,
        paths,
        f"{host}:{port}",
        rest=True,
        make=lambda count: ProxyHost(config, host, port, count, logs.EnvoyLog().line),
    )


def _limit(config: Config) -> int:
    return config.server.max_message_bytes


async def _run_server(
    config: Config, paths: Sequence[str], address: str, *, rest: bool, make: Callable[[Any], Any]
) -> None:
    import asyncio  # noqa: PLC0415  (heavy)

    from forno.server.repository import find  # noqa: PLC0415
    from forno.server.server import Server  # noqa: PLC0415  (heavy)

    server = Server(config, find([Path(path) for path in paths], config), address, rest=rest)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, server.stop)
    await server.run(make(server.metrics.rpc))


def _free_address(address: str) -> tuple[str, int]:
    """HOST and PORT of a setting, with a free port for 0.

    Raises:
        ConfigError: It is not an address, or the port cannot be listened on.
    """
    host, separator, port_text = address.rpartition(":")
    host = host.strip("[]")
    if not separator or not host or not port_text.isdigit() or int(port_text) > _MAX_PORT:
        raise ConfigError(f"server.address is {address!r}; expected HOST:PORT, such as 127.0.0.1:8080")
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, int(port_text), type=socket.SOCK_STREAM)[0]
        with socket.socket(family, kind) as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(target)
            probe.listen()
            return str(target[0]), int(probe.getsockname()[1])
    except socket.gaierror:
        raise ConfigError(f"server.address is {address!r}: there is no host {host!r}") from None
    except OSError as error:
        raise ConfigError(
            f"cannot listen on {address}: {(error.strerror or str(error)).lower()}; "
            "stop what uses it, or choose another port with --address HOST:PORT (port 0 = any free one)"
        ) from None
