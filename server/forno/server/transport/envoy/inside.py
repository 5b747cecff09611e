"""The interpreter's side of a server in Envoy: what runs on the thread that the native module starts.

The supervisor (`supervisor.py`), in the process that started Envoy, and this side talk over one socket pair. First
comes what to serve, from there; then a line a message: "ready", "failed TEXT" and "drained" come from here, "drain"
from there. If the supervisor dies, the socket closes, and this side drains and ends Envoy too: no orphan is left.
"""

from __future__ import annotations

import asyncio
import logging
import os
import pickle
import signal
import socket
import sys
from typing import TYPE_CHECKING

import uvloop

from forno.server import logs
from forno.server.errors import ConfigError
from forno.server.server import Server
from forno.server.transport.envoy.host import EnvoyHost

if TYPE_CHECKING:
    from collections.abc import Sequence

    from forno.server.config import Config
    from forno.server.repository import ModelSpec

log = logging.getLogger("forno")


class _InEnvoy:
    """`Host` for the server: calls arrive from the native module."""

    def __init__(self, host: EnvoyHost) -> None:
        self.grpc = host

    async def start(self) -> int:
        self.grpc.start()
        return 0

    async def stop(self, grace_s: float) -> None:
        try:
            async with asyncio.timeout(grace_s):
                await self.grpc.wait_idle()
        except TimeoutError:
            log.warning("%d calls are cut off after %g s of draining", self.grpc.calls_in_flight, grace_s)
            self.grpc.cancel_all()
            await self.grpc.wait_idle()


def main(descriptor: int) -> None:
    """Runs a server until it is told to stop.

    Args:
        descriptor: This side's end of the socket pair.
    """
    control = socket.socket(fileno=descriptor)
    sys.argv = ["forno", "serve"]
    size = int.from_bytes(control.recv(8, socket.MSG_WAITALL), "little")
    config, specs, address = pickle.loads(control.recv(size, socket.MSG_WAITALL))  # noqa: S301  (the supervisor's)
    uvloop.run(_serve(config, specs, address, control))


async def _serve(config: Config, specs: Sequence[ModelSpec], address: str, control: socket.socket) -> None:
    logs.configure(config.server.log_level, config.server.log_format)
    reader, writer = await asyncio.open_connection(sock=control)

    def say(line: str) -> None:
        if not writer.is_closing():
            writer.write(line.encode() + b"\n")

    try:
        server = Server(config, specs, address, rest=True)
        host = EnvoyHost(config.server.max_message_bytes, server.metrics.rpc, server.guard)
        watch = asyncio.create_task(_watch(reader, server, host))
        try:
            await server.run(_InEnvoy(host), on_ready=lambda: say("ready"))
        finally:
            watch.cancel()
        say("drained")
    except ConfigError as error:
        say("failed " + str(error).replace("\n", "\x1f"))
    if writer.is_closing() or reader.at_eof():  # the supervisor has gone: nobody else will end Envoy
        os.kill(os.getpid(), signal.SIGTERM)
    await writer.drain()
    writer.close()


async def _watch(reader: asyncio.StreamReader, server: Server, host: EnvoyHost) -> None:
    """Stops the server when the supervisor says so or has gone, or when Envoy itself ends."""
    ended = asyncio.create_task(host.stopped.wait())
    line = asyncio.create_task(reader.readline())
    await asyncio.wait((ended, line), return_when=asyncio.FIRST_COMPLETED)
    server.stop()
