"""The interpreter's side of a server in Envoy: what runs on the thread that the native module starts.

The supervisor (`supervisor.py`), in the process that started Envoy, and this side talk over one socket pair
(`transport/control.py`). If the supervisor dies, the socket closes, and this side drains and ends Envoy too.
"""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
from typing import TYPE_CHECKING, Any

import uvloop

from forno.server.transport import control
from forno.server.transport.envoy.host import EnvoyHost

if TYPE_CHECKING:
    from forno.server.config import Config
    from forno.server.server import Server

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
    ours = socket.socket(fileno=descriptor)
    sys.argv = ["forno", "serve"]
    uvloop.run(_serve(control.read_errand(ours), ours))


async def _serve(given: dict[str, Any], ours: socket.socket) -> None:
    ended = asyncio.Event()

    def make(config: Config, server: Server) -> _InEnvoy:
        limits = config.server
        host = EnvoyHost(limits.max_message_bytes, server.metrics.rpc, server.guard, limits.max_call_s)
        host.stopped = ended
        return _InEnvoy(host)

    if not await control.serve(given, ours, make, ended):
        os.kill(os.getpid(), signal.SIGTERM)  # nobody else will end Envoy
