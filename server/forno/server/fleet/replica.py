"""One replica: a server process on a Unix socket, from its start to its end."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from enum import Enum
from typing import TYPE_CHECKING

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from forno.server import logs
from forno.server.address import Address
from forno.server.errors import ConfigError
from forno.server.transport.control import LINE_BREAK
from forno.server.transport.envoy import supervisor
from forno.server.transport.envoy.ends import ModuleEnd

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence
    from pathlib import Path

    from forno.server.config import Config
    from forno.server.fleet.fleet import Order
    from forno.server.fleet.placement import Placement

RATES = "rates"
"""The file in the fleet's folder in which all replicas count clients' rates."""

_KILL_AFTER_S = 5.0
_PROBE_TIMEOUT_S = 1.0


class ReplicaState(Enum):
    """Where a replica is in its life; in this order, any of them may be followed by ENDED."""

    STARTING = "starting"
    READY = "ready"  # the edge sends it calls
    DRAINING = "draining"
    ENDED = "ended"


class Ended(Exception):
    """The process ended before it was ready, without a reason of its own."""


class Replica:
    """One process. Owned by a Place; event loop only, and started on the main thread; ends with its process.

    Args:
        index: Its place, from 0.
        generation: How many processes of this fleet were started before it; part of its socket's name, so that what
            the edge has learned of a dead one is not held against its successor.
        folder: Where its socket and files lie.
        placement: Its cores and GPU.
    """

    def __init__(self, index: int, generation: int, folder: Path, placement: Placement) -> None:
        self.index = index
        self.placement = placement
        self.state = ReplicaState.STARTING
        self.started_s = time.time()
        self.name = f"{index}-{generation}"
        self.socket = folder / f"{self.name}.sock"
        self.health_names: list[str] = []
        self.models: list[str] = []
        self.text: list[str] = []  # what it says of itself once it is ready
        self.channel = grpc.aio.insecure_channel(
            f"unix:{self.socket}",
            options=[
                ("grpc.max_receive_message_length", -1),
                ("grpc.initial_reconnect_backoff_ms", 50),
                ("grpc.max_reconnect_backoff_ms", 500),
            ],
        )
        self._folder = folder / self.name
        self._process: subprocess.Popen[bytes] | None = None
        self._envoy: supervisor.Envoy | None = None
        self._control: socket.socket
        self._ready: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._drained = asyncio.Event()
        self._ended = asyncio.Event()
        self._reading: asyncio.Task[None]
        self._closing: asyncio.Task[None]

    @property
    def pid(self) -> int:
        """Process id; 0 before there is a process."""
        return self._process.pid if self._process else 0

    @property
    def returncode(self) -> int | None:
        """Exit status, negative for a signal; None while it runs."""
        return self._process.returncode if self._process else None

    async def start(self, order: Order, public: str, group: int, cpus: Sequence[int]) -> None:
        """Starts the process, and returns when it has loaded all models.

        Args:
            order: What to serve.
            public: Where callers reach it, for its banner.
            group: The process group to join.
            cpus: The cores of the supervisor, to which its own affinity goes back.

        Raises:
            ConfigError: It cannot serve what it should.
            Ended: It ended for another reason.
        """
        self._control, theirs = socket.socketpair()
        self._control.setblocking(False)
        os.set_inheritable(theirs.fileno(), True)
        server = order.config.server.model_copy(update={"envoy_threads": 1, "socket_access": "owner"})
        config = order.config.model_copy(update={"server": server})
        with _affinity(self.placement.cpus, cpus):
            if config.server.transport == "envoy":
                self._process = self._start_envoy(config, theirs.fileno(), group)
            else:
                self._process = self._start_grpc(theirs.fileno(), group)
        theirs.close()
        loop = asyncio.get_running_loop()
        threading.Thread(
            target=self._wait, args=(self._process, loop), name=f"replica-{self.name}", daemon=True
        ).start()
        self._reading = asyncio.create_task(self._read())
        errand = {
            "config": config,
            "specs": order.specs,
            "address": public,
            "rest": True,
            "replica": self.index,
            "socket": str(self.socket),
            "rates": self.socket.parent / RATES,
        }
        with contextlib.suppress(OSError):  # it has ended already, which `_ready` tells
            await loop.sock_sendall(self._control, supervisor.packed(errand))
        await self._ready

    def _start_envoy(self, config: Config, control: int, group: int) -> subprocess.Popen[bytes]:
        self._envoy = supervisor.Envoy(
            config,
            Address(path=str(self.socket)),
            lambda _folder: ModuleEnd(supervisor.INSIDE, str(control)),
            logs.EnvoyLog().line,
            title=f"forno: replica {self.index}",
            folder=self._folder,
            inner=True,
        )
        environment = {**supervisor.interpreter_environment(), **self.placement.environment()}
        return self._envoy.start(environment, keep=[control], group=group)

    def _start_grpc(self, control: int, group: int) -> subprocess.Popen[bytes]:
        return subprocess.Popen(
            [sys.executable, "-m", "forno.server.fleet.grpc_replica", str(control)],
            env={**os.environ, **self.placement.environment()},
            pass_fds=[control],
            process_group=group,
        )

    async def answers(self) -> bool:
        """Whether it says SERVING now."""
        stub = health_pb2_grpc.HealthStub(self.channel)
        try:
            reply = await stub.Check(health_pb2.HealthCheckRequest(), timeout=_PROBE_TIMEOUT_S)
        except grpc.aio.AioRpcError:
            return False
        return bool(reply.status == health_pb2.HealthCheckResponse.SERVING)

    async def ended(self) -> None:
        """Returns when the process has ended."""
        await self._ended.wait()

    async def stop(self, drain_s: float) -> None:
        """Lets it finish its calls, at most so long, and ends it."""
        self.state = ReplicaState.DRAINING
        with contextlib.suppress(OSError):
            self._control.send(b"drain\n")
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(drain_s + _KILL_AFTER_S):
                await self._drained.wait()
        self._signal(signal.SIGTERM)
        try:
            async with asyncio.timeout(_KILL_AFTER_S):
                await self._ended.wait()
        except TimeoutError:
            self.kill()
            await self._ended.wait()

    async def abandon(self) -> None:
        """Ends it at once, and forgets it: for one that did not become ready."""
        self.kill()
        await self.channel.close(None)  # twice does no harm

    def kill(self) -> None:
        """Ends it at once."""
        self._signal(signal.SIGKILL)

    def _signal(self, number: int) -> None:
        if self._process and not self._ended.is_set():
            with contextlib.suppress(ProcessLookupError):
                self._process.send_signal(number)

    def _wait(self, process: subprocess.Popen[bytes], loop: asyncio.AbstractEventLoop) -> None:
        process.wait()
        with contextlib.suppress(RuntimeError):  # the loop has ended
            loop.call_soon_threadsafe(self._on_end)

    def _on_end(self) -> None:
        self.state = ReplicaState.ENDED
        self._drained.set()
        self._ended.set()
        self._reading.add_done_callback(lambda _: self._release())

    def _release(self) -> None:
        """After the process's last words."""
        if not self._ready.done():
            self._ready.set_exception(Ended(f"ended {described(self.returncode)}"))
        self._control.close()
        self._closing = asyncio.get_running_loop().create_task(self.channel.close(None))
        if self._envoy:
            self._envoy.close()
        self.socket.unlink(missing_ok=True)

    async def _read(self) -> None:
        loop, pending = asyncio.get_running_loop(), b""
        while received := await _received(loop, self._control):
            *lines, pending = (pending + received).split(b"\n")
            for line in lines:
                word, _, rest = line.decode().partition(" ")
                if word == "ready":
                    told = json.loads(rest)
                    self.health_names, self.models, self.text = told["health_names"], told["models"], told["text"]
                    if not self._ready.done():
                        self._ready.set_result(None)
                elif word == "drained":
                    self._drained.set()
                elif word == "failed" and not self._ready.done():
                    self._ready.set_exception(ConfigError(rest.replace(LINE_BREAK, "\n")))
        self._drained.set()


async def _received(loop: asyncio.AbstractEventLoop, control: socket.socket) -> bytes:
    try:
        return await loop.sock_recv(control, 65536)
    except OSError:
        return b""


def described(returncode: int | None) -> str:
    """An exit status in words."""
    if returncode is None:
        return "somehow"
    return f"by signal {-returncode}" if returncode < 0 else f"with status {returncode}"


@contextlib.contextmanager
def _affinity(cpus: Sequence[int], before: Sequence[int]) -> Iterator[None]:
    """Has what is started within run on these cores: a process has the affinity of the thread that starts it."""
    if not hasattr(os, "sched_setaffinity"):
        yield
        return
    os.sched_setaffinity(0, cpus)
    try:
        yield
    finally:
        os.sched_setaffinity(0, before)
