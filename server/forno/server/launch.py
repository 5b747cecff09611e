"""From settings to a running server: chooses the transport, and holds the process until the end.

Kept light: with servicers inside Envoy this process never imports gRPC, NumPy or a runtime.
"""

from __future__ import annotations

import errno
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from forno.server import logs, processes
from forno.server.address import Address
from forno.server.errors import ConfigError
from forno.server.security.exposure import why_open
from forno.server.transport.envoy import ceilings, outside, supervisor

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence

    from forno.server.config import Config
    from forno.server.repository import ModelSpec
    from forno.server.server import Server

    Read = Callable[[], tuple[Config, Sequence[ModelSpec]]]

log = logging.getLogger("forno")


def serve(config: Config, specs: Sequence[ModelSpec], read: Read) -> int:
    """Serves models until SIGINT or SIGTERM, then drains; SIGHUP reads the settings again.

    Args:
        config: All settings.
        specs: The models.
        read: Reads both again.

    Returns:
        Exit status.

    Raises:
        ConfigError: It cannot be served as asked.
    """
    logs.configure(config.server.log_level, config.server.log_format)
    address = _claimed(config.server.address, "server.address")
    if config.security.admin_address:
        _claimed(config.security.admin_address, "security.admin_address")
    if processes.hears_hangups():
        signal.signal(signal.SIGHUP, lambda *_: None)  # until there is something that can be read again
    transport = config.server.transport
    for warning in filter(None, (why_open(config), ceilings.raise_open_files(config.server.max_connections))):
        print(f"forno: warning: {warning}", file=sys.stderr)  # noqa: T201
    if config.fleet.replicas:
        from forno.server.fleet import run  # noqa: PLC0415  (a single server needs none of it)

        return run.serve(config, specs, address, read)
    if transport == "grpc":
        return _run(_serve_grpc(config, specs, address, read))
    if transport == "envoy":
        reason = supervisor.why_not_inside()
        if not reason:
            status, message = outside.serve_inside(config, specs, address, logs.EnvoyLog().line, read)
            if message:
                print(f"forno: {message}", file=sys.stderr)  # noqa: T201
            return status
        print(f"forno: {reason}; serving with --transport proxy instead, which is slower", file=sys.stderr)  # noqa: T201
    return _run(_serve_proxy(config, specs, address, read))


def _run(main: Coroutine[Any, Any, None]) -> int:
    try:
        import uvloop  # noqa: PLC0415  (not everywhere)

        uvloop.run(main)
    except ImportError:
        import asyncio  # noqa: PLC0415  (heavy)

        asyncio.run(main)
    return 0


async def _serve_grpc(config: Config, specs: Sequence[ModelSpec], address: Address, read: Read) -> None:
    from forno.server.transport.aio import AioHost  # noqa: PLC0415  (heavy)

    def make(server: Server) -> AioHost:
        limit, mode = config.server.max_message_bytes, config.server.socket_mode
        return AioHost(address, limit, server.metrics.rpc, mode, server.guard, security=config.security)

    await _run_server(config, specs, address, read, rest=False, make=make)


async def _serve_proxy(config: Config, specs: Sequence[ModelSpec], address: Address, read: Read) -> None:
    from forno.server.transport.envoy.proxy import ProxyHost  # noqa: PLC0415  (heavy)

    def make(server: Server) -> ProxyHost:
        return ProxyHost(config, address, server.metrics.rpc, logs.EnvoyLog().line, server.guard)

    await _run_server(config, specs, address, read, rest=True, make=make)


async def _run_server(
    config: Config, specs: Sequence[ModelSpec], address: Address, read: Read, *, rest: bool, make: Callable[[Any], Any]
) -> None:
    import asyncio  # noqa: PLC0415  (heavy)

    from forno.server.server import Server  # noqa: PLC0415  (heavy)

    server = Server(config, specs, str(address), rest=rest)
    for number in (signal.SIGINT, signal.SIGTERM):
        asyncio.get_running_loop().add_signal_handler(number, server.stop)
    if processes.hears_hangups():
        asyncio.get_running_loop().add_signal_handler(signal.SIGHUP, server.reload, read)
    await server.run(make(server))


def _claimed(text: str, setting: str) -> Address:
    """The address of a setting, with a free port for 0; what a dead server has left of a Unix socket is removed.

    Raises:
        ConfigError: It cannot be listened on.
    """
    address = Address.parse(text)
    try:
        return _claimed_path(address) if address.path else _claimed_port(address)
    except socket.gaierror:
        raise ConfigError(f"{setting} is {text!r}: there is no host {address.host!r}") from None
    except OSError as error:
        other = "path" if address.path else "port with --address HOST:PORT (port 0 = any free one)"
        raise ConfigError(
            f"cannot listen on {text}: {(error.strerror or str(error)).lower()}; "
            f"stop what uses it, or choose another {other}"
        ) from None


def _claimed_port(address: Address) -> Address:
    family, kind, _, _, target = socket.getaddrinfo(address.host, address.port, type=socket.SOCK_STREAM)[0]
    with socket.socket(family, kind) as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        probe.bind(target)
        probe.listen()
        return Address(str(target[0]), int(probe.getsockname()[1]))


def _claimed_path(address: Address) -> Address:
    path = Path(address.path).absolute()
    with socket.socket(socket.AF_UNIX) as probe:
        if path.is_socket():
            try:
                probe.connect(str(path))
            except ConnectionRefusedError:
                path.unlink()  # nobody listens: its server was killed
            else:
                raise OSError(errno.EADDRINUSE, os.strerror(errno.EADDRINUSE))
        elif path.exists():
            raise OSError(errno.EEXIST, "a file is there that is no socket")
    with socket.socket(socket.AF_UNIX) as probe:
        probe.bind(str(path))
    path.unlink()
    return Address(path=str(path))
