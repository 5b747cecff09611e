"""A server that another process of ours has started, told what to do over a socket pair, a line a message.

First comes what to serve, from there; then "ready JSON", "failed TEXT" and "drained" from here, and from there "drain"
and "reload BYTES", after which so many bytes say what to serve from now on. If the other side goes away, the server
drains and ends: no orphan is left.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import pickle
import signal
import socket
from typing import TYPE_CHECKING, Any

from forno.server import logs, processes
from forno.server.errors import ConfigError
from forno.server.server import Server

if TYPE_CHECKING:
    from collections.abc import Callable

    from forno.server.config import Config
    from forno.server.server import Host

LINE_BREAK = "\x1f"
"""Stands for a line break within a message."""


def read_errand(control: socket.socket) -> dict[str, Any]:
    """What `serve` is given, as the other side has sent it."""
    size = int.from_bytes(control.recv(8, socket.MSG_WAITALL), "little")
    given: dict[str, Any] = pickle.loads(control.recv(size, socket.MSG_WAITALL))  # noqa: S301  (our own)
    return given


async def serve(
    given: dict[str, Any],
    control: socket.socket,
    make: Callable[[Config, Server], Host],
    ended: asyncio.Event | None = None,
) -> bool:
    """Runs a server until it is told to stop.

    Args:
        given: `config`, `specs`, `address` for people, whether `rest` is served there, and, of a replica, its number
            as `replica` and the file `rates`.
        control: Our end of the socket pair.
        make: Makes the transport.
        ended: Set when the transport ends by itself.

    Returns:
        Whether the other side still listens.
    """
    config: Config = given["config"]
    logs.configure(config.server.log_level, config.server.log_format)
    replica = given.get("replica")
    shown: list[str] = []
    if replica is not None:
        if die := processes.die_with_parent(signal.SIGKILL):  # however stuck this one is
            die()
        _name_in_log(replica)
    reader, writer = await asyncio.open_connection(sock=control)

    def say(line: str) -> None:
        if not writer.is_closing():
            writer.write(line.encode() + b"\n")

    try:
        show = print if replica is None else shown.append
        rest, rates = given["rest"], given.get("rates")
        server = Server(config, given["specs"], given["address"], rest=rest, show=show, rates=rates)
        if server.guard and replica is not None:
            server.guard.trust_what_no_edge_vouches_for()
        watch = asyncio.create_task(_watch(reader, server, ended or asyncio.Event()))
        models = sorted({model.name for model in server.registry.models()})
        told = {"health_names": sorted(server.health_names()), "models": models}
        try:
            await server.run(make(config, server), on_ready=lambda: say(f"ready {json.dumps({**told, 'text': shown})}"))
        finally:
            watch.cancel()
        say("drained")
    except ConfigError as error:
        say("failed " + str(error).replace("\n", LINE_BREAK))
    with contextlib.suppress(OSError):  # it has gone, and had not read all that we said
        await writer.drain()
    listening = not (writer.is_closing() or reader.at_eof())
    writer.close()
    return listening


async def _watch(reader: asyncio.StreamReader, server: Server, ended: asyncio.Event) -> None:
    """Stops the server when the other side says so or has gone, or when the transport itself ends."""
    both = asyncio.create_task(ended.wait()), asyncio.create_task(_reload_as_told(reader, server))
    await asyncio.wait(both, return_when=asyncio.FIRST_COMPLETED)
    server.stop()


async def _reload_as_told(reader: asyncio.StreamReader, server: Server) -> None:
    """Returns when the other side says anything else, or has gone, be it in the middle of a message."""
    with contextlib.suppress(OSError, asyncio.IncompleteReadError):
        while (line := await reader.readline()).startswith(b"reload "):
            data = await reader.readexactly(int(line.split()[1]))
            server.reload(functools.partial(pickle.loads, data))


def _name_in_log(replica: int) -> None:
    """Has every line of the log say which replica it is from."""
    make = logging.getLogRecordFactory()

    def named(*args: Any, **kwargs: Any) -> logging.LogRecord:
        record = make(*args, **kwargs)
        record.replica = replica
        return record

    logging.setLogRecordFactory(named)
