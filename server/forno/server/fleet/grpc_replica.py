"""A replica on plain gRPC, as a program that `replica.py` starts with a descriptor as its argument."""

from __future__ import annotations

import signal
import socket
import sys
from typing import TYPE_CHECKING

import uvloop

from forno.server import processes
from forno.server.address import Address
from forno.server.transport import control
from forno.server.transport.aio import AioHost

if TYPE_CHECKING:
    from forno.server.config import Config
    from forno.server.server import Server


def main(descriptor: int) -> None:
    """Runs a server until it is told to stop.

    Args:
        descriptor: Our end of the socket pair.
    """
    ours = socket.socket(fileno=descriptor)
    given = control.read_errand(ours)
    processes.call_itself(f"forno: replica {given['replica']}")
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the supervisor tells us when to end

    def make(config: Config, server: Server) -> AioHost:
        address, limit = Address(path=given["socket"]), config.server.max_message_bytes
        return AioHost(address, limit, server.metrics.rpc, guard=server.guard, behind_envoy=True)

    uvloop.run(control.serve(given, ours, make))


if __name__ == "__main__":
    main(int(sys.argv[1]))
