"""The supervisor proper: holds the process until the end, and ends it in order.

not ready -> the edge accepts no more -> calls finish -> replicas end -> the edge ends -> nothing is left
"""

from __future__ import annotations

import asyncio
import logging
import signal
import sys
from typing import TYPE_CHECKING

import uvloop

from forno.server import fixed, processes
from forno.server.address import Address
from forno.server.errors import ConfigError
from forno.server.fleet import edge as edges
from forno.server.fleet.fleet import Fleet, Order
from forno.server.fleet.replica import RATES
from forno.server.fleet.services import Control, Health, Pages, add_pages
from forno.server.security import guard
from forno.server.transport.aio import AioHost
from forno.v1 import fleet_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Callable, Coroutine, Sequence
    from pathlib import Path

    from forno.server.config import Config
    from forno.server.repository import ModelSpec
    from forno.server.transport.envoy.supervisor import Envoy

log = logging.getLogger("forno.fleet")

_OPEN_LIMIT_S = 10.0
_LAST_ANSWERS_S = 2.0
_SUMS_INTERVAL_S = 5.0
_INTERRUPTED = 130


class Supervisor:
    """A fleet with its edge and its own services. One a process; ends when `run` returns.

    Args:
        config: All settings.
        specs: The models.
        address: Where the edge listens.
        folder: A private one, for everything.
        control: Where the control socket lies.
        edge: The edge, started.
        group: The process group of all that is started.
        read: Reads both again.
    """

    def __init__(
        self,
        config: Config,
        specs: Sequence[ModelSpec],
        address: str,
        folder: Path,
        control: Path,
        edge: Envoy,
        group: int,
        read: Callable[[], tuple[Config, Sequence[ModelSpec]]],
    ) -> None:
        self._config = config
        self._specs = specs
        self._address = address
        self._folder = folder
        self._control = control
        self._edge = edge
        self._group = group
        self._read = read
        self._stop: asyncio.Event
        self._changed: asyncio.Event
        self._fleet: Fleet
        self._at_once = False
        self._tasks: set[asyncio.Task[None]] = set()

    def run(self) -> int:
        """Serves until a signal.

        Returns:
            Exit status.

        Raises:
            ConfigError: It cannot be served as asked.
        """
        return uvloop.run(self._main())

    async def _main(self) -> int:
        self._stop, self._changed = asyncio.Event(), asyncio.Event()
        await self._opened()
        admitting = guard.make(self._config, self._address, self._folder / RATES)
        self._fleet = Fleet(
            Order(self._config, self._specs),
            self._address,
            self._folder,
            self._edge,
            self._group,
            lambda: Order(*self._read()),
            self._changed.set,
            admitting,
        )
        limit = self._config.server.max_message_bytes
        pages, whole = Pages(self._fleet), Health()
        self._fleet.last_look = pages.look
        inner = AioHost(
            Address(path=str(self._folder / edges.PAGES_SOCKET)),
            limit,
            lambda *_: None,
            guard=admitting,
            behind_envoy=True,
        )
        add_pages(inner.grpc, pages, whole)
        control = AioHost(Address(path=str(self._control)), limit, lambda *_: None)
        fleet_pb2_grpc.add_FleetServicer_to_server(Control(self._fleet), control.grpc)
        try:
            await inner.start()
            await control.start()
            self._on_signals()
            self._begin(self._keep_edge())
            self._begin(whole.follow(self._fleet, self._changed))
            self._begin(pages.keep_sums(_SUMS_INTERVAL_S))
            if await self._began():
                self._say()
                await self._stop.wait()
        finally:
            log.info("stopping")
            self._fleet.ending = True
            whole.end()
            await control.stop(0)
            await asyncio.to_thread(self._edge.stop_listening)
            await inner.stop(0)
            await self._finished()
            for task in self._tasks:
                task.cancel()
            await asyncio.to_thread(self._edge.close)
        return _INTERRUPTED if self._at_once else 0

    async def _opened(self) -> None:
        """Returns when the edge listens."""
        for _ in range(int(_OPEN_LIMIT_S / 0.02)):
            if (status := self._edge.returncode()) is not None:
                raise ConfigError(f"Envoy ended at once with status {status}; its log is above")
            if (await asyncio.to_thread(self._edge.ask, "GET", "/ready")).startswith("LIVE"):
                return
            await asyncio.sleep(0.02)
        raise ConfigError(f"Envoy did not open within {_OPEN_LIMIT_S:g} s; its log is above")

    async def _began(self) -> bool:
        """Whether all replicas take calls; not if it was stopped before."""
        beginning = asyncio.create_task(self._fleet.begin())
        stopping = asyncio.create_task(self._stop.wait())
        await asyncio.wait((beginning, stopping), return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not beginning.done():
            beginning.cancel()
            return False
        await beginning
        return True

    async def _finished(self) -> None:
        """Lets calls and replicas end, for at most as long as that may take; less after a second signal."""
        ending = asyncio.create_task(self._end())
        while not ending.done() and not self._at_once:
            await asyncio.wait((ending,), timeout=0.1)
        if self._at_once:
            ending.cancel()
            self._fleet.kill()

    async def _end(self) -> None:
        await asyncio.to_thread(self._edge.wait_answered, self._config.server.drain_s)
        await self._fleet.end()
        await asyncio.to_thread(self._edge.wait_answered, _LAST_ANSWERS_S)

    async def _keep_edge(self) -> None:
        """Starts the edge again where it ends: its port is open again at once."""
        while not self._stop.is_set():
            status = await asyncio.to_thread(self._edge.wait)
            if not self._stop.is_set():
                log.error("the edge ended with status %s; starting it again", status)
                self._edge.start({}, dies_with_us=True, group=self._group)
                await asyncio.sleep(0.1)

    def _on_signals(self) -> None:
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._on_stop)
        if processes.hears_hangups():
            loop.add_signal_handler(signal.SIGHUP, lambda: self._begin(self._reload()))

    def _on_stop(self) -> None:
        self._at_once = self._stop.is_set()
        self._stop.set()

    async def _reload(self) -> None:
        try:
            await self._fleet.reload()
        except Exception as error:  # noqa: BLE001  (whatever it is, what serves goes on)
            fixed.log_refused(log, error)

    def _begin(self, work: Coroutine[None, None, None]) -> None:
        task = asyncio.create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._on_task)

    def _on_task(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        if not task.cancelled() and (error := task.exception()):
            log.error("the supervisor failed", exc_info=error)
            self._stop.set()

    def _say(self) -> None:
        text = next((replica.text for replica in self._fleet.serving()), [])
        print(*text, sep="\n")  # noqa: T201
        count = len(self._fleet.serving())
        print(f"{count} replicas; `forno fleet status` shows them, `forno fleet --help` what can be done", flush=True)  # noqa: T201
        sys.stdout.flush()
