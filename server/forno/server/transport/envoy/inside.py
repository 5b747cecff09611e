"""The interpreter's side of a server in Envoy: what runs on the thread that the native module starts.

The supervisor (`supervisor.py`), in the process that started Envoy, and this side talk over one socket pair, a line a
message: "ready", "failed TEXT" and "drained" come from here, "drain" from there. If the supervisor dies, the socket
closes, and this side drains and ends Envoy too: no orphan is left.
"""

from __future__ import annotations

import asyncio
import json
import logging
import os
import signal
import socket
import sys
from pathlib import Path
from typing import Any

import uvloop

from forno.server import logs
from forno.server.config import Config
from forno.server.errors import ConfigError
from forno.server.repository import find
from forno.server.server import Server
from forno.server.transport.envoy.host import EnvoyHost

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


def main(argument: str) -> None:
    """Runs a server until it is told to stop. Called by the native module.

    Args:
        argument: JSON: `config`, `paths`, `address`, and `control`, the descriptor of the socket pair.
    """
    given = json.loads(argument)
    control = socket.socket(fileno=given["control"])
    sys.argv = ["forno", "serve", *given["paths"]]
    uvloop.run(_serve(given, control))


async def _serve(given: dict[str, Any], control: socket.socket) -> None:
    config = Config.model_validate(given["config"])
    logs.configure(config.server.log_level, config.server.log_format)
    reader, writer = await asyncio.open_connection(sock=control)

    def say(line: str) -> None:
        if not writer.is_closing():
            writer.write(line.encode() + b"\n")

    try:
        specs = find([Path(path) for path in given["paths"]], config)
        server = Server(config, specs, given["address"], rest=True)
        host = EnvoyHost(config.server.max_message_bytes, server.metrics.rpc)
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
