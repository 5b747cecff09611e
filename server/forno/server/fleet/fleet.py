"""The fleet: how many replicas there should be, and the order in which they come and go."""

from __future__ import annotations

import asyncio
import contextlib
import itertools
import logging
import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from forno.server import fixed, logs
from forno.server.errors import ConfigError
from forno.server.fleet import edge as edges
from forno.server.fleet.place import Place
from forno.server.fleet.placement import Placement, place
from forno.server.fleet.replica import Replica, ReplicaState
from forno.server.security import guard as guards

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from forno.server.config import Config
    from forno.server.repository import ModelSpec
    from forno.server.security.guard import Guard
    from forno.server.transport.envoy.supervisor import Envoy

log = logging.getLogger("forno.fleet")

MOST = 256
"""Most replicas of one fleet."""
_LOOK_S = 0.02
_ADMITTED_LIMIT_S = 10.0


@dataclass(frozen=True, slots=True)
class Order:
    """What a replica is to serve."""

    config: Config
    specs: Sequence[ModelSpec]


class Fleet:
    """Places with replicas in them, and the edge's knowledge of them. Owned by `run`; event loop only.

    Changes of the whole (`scale`, `restart`, `reload`) happen one at a time; what ends by itself is replaced meanwhile.

    Args:
        order: What to serve.
        address: Where callers reach it.
        folder: A private one, for sockets and the edge's list of replicas.
        edge: The edge.
        group: The process group of all that is started.
        read: Reads the settings again.
        on_change: Called whenever a replica begins or stops to take calls.
        guard: Of the supervisor's own pages.
    """

    def __init__(
        self,
        order: Order,
        address: str,
        folder: Path,
        edge: Envoy,
        group: int,
        read: Callable[[], Order],
        on_change: Callable[[], None],
        guard: Guard | None,
    ) -> None:
        self.order = order
        self.address = address
        self.wanted = order.config.fleet.replicas
        self.places: list[Place] = []
        self.ending = False
        self.last_look: Callable[[Replica], Awaitable[None]] | None = None  # at one that has ended its calls
        self._folder = folder
        self._edge = edge
        self._group = group
        self._read = read
        self._on_change = on_change
        self._guard = guard
        self._operation = asyncio.Lock()
        self._keeping: dict[Place, asyncio.Task[None]] = {}
        self._versions = itertools.count(1)
        self._generations = itertools.count()
        self._cpus = sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else range(os.cpu_count() or 1)

    @property
    def config(self) -> Config:
        """Settings of replicas that are started now."""
        return self.order.config

    def serving(self) -> list[Replica]:
        """Replicas that take calls."""
        return [one.serving for one in self.places if one.serving and one.serving.state is ReplicaState.READY]

    async def begin(self) -> None:
        """Starts the replicas, and returns when all of them take calls.

        Raises:
            ConfigError: They cannot serve what they should.
        """
        async with self._operation:
            await self._grow(self.wanted)

    async def scale(self, wanted: int) -> None:
        """Has so many replicas serve.

        Raises:
            ConfigError: They cannot serve what they should; there are as many as before.
        """
        async with self._operation:
            await self._scale(wanted)

    async def restart(self) -> None:
        """Replaces every replica, one after the other.

        Raises:
            ConfigError: A new one cannot serve what it should; the others stay.
        """
        async with self._operation:
            for one in list(self.places):
                await one.replace()

    async def reload(self) -> list[str]:
        """Reads the settings again, and replaces every replica by one that has them.

        Returns:
            The names of settings that were told and cannot change while the edge runs; it has the old ones.

        Raises:
            ConfigError: They are wrong, or a replica cannot serve with them; the old ones stay.
        """
        async with self._operation:
            log.info("reading the settings again")
            told, before = await asyncio.to_thread(self._read), self.order.config
            config, kept = fixed.keep(before, told.config)
            config, renewed, more = guards.renew(self._guard, before, config, self.address)
            order = Order(config, told.specs)
            for one in list(self.places):
                await one.replace(order)
                self.order = order  # what one can serve, the others can
            if self._guard and renewed:
                self._guard.become(renewed)
            logs.configure(config.server.log_level, config.server.log_format)
            if config.fleet.replicas != before.fleet.replicas:
                await self._scale(config.fleet.replicas)
            if kept := [*kept, *more]:
                log.warning("%s", fixed.told(kept))
            log.info("reloaded")
            return kept

    async def end(self) -> None:
        """Lets every replica finish its calls, and ends it."""
        self.ending = True
        for task in self._keeping.values():
            task.cancel()
        await asyncio.gather(*self._keeping.values(), return_exceptions=True)
        await asyncio.gather(*(one.clear() for one in self.places))

    def kill(self) -> None:
        """Ends every replica at once."""
        for one in self.places:
            for replica in (*one.leaving, one.serving):
                if replica:
                    replica.kill()

    async def views(self) -> dict[str, edges.HostView]:
        """The replicas as the edge sees them, by socket."""
        return edges.views(await asyncio.to_thread(self._edge.ask, "GET", "/clusters?format=json"))

    # What places ask of their fleet.

    async def start(self, index: int, order: Order | None) -> Replica:
        """Starts a replica, and returns it when it is ready.

        Raises:
            ConfigError: It cannot serve what it should.
            Ended: It ended for another reason.
        """
        order = order or self.order
        where = self._placement(index, order.config)
        replica = Replica(index, next(self._generations), self._folder, where)
        try:
            await replica.start(order, self.address, self._group, self._cpus)
        except BaseException:
            await replica.abandon()
            raise
        return replica

    def changed(self) -> None:
        """Tells the edge which replicas there are."""
        replicas = [
            (replica, replica.state is not ReplicaState.DRAINING)
            for one in self.places
            for replica in (*one.leaving, one.serving)
            if replica and replica.state is not ReplicaState.ENDED
        ]
        edges.publish(self._folder, next(self._versions), replicas)
        self._on_change()

    async def admitted(self, replica: Replica) -> None:
        """Returns when the edge sends a replica calls, or the replica has ended."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(_ADMITTED_LIMIT_S):
                while replica.state is not ReplicaState.ENDED:
                    view = (await self.views()).get(str(replica.socket))
                    if view and view.takes_calls:
                        return
                    await asyncio.sleep(_LOOK_S)

    async def left(self, replica: Replica) -> None:
        """Returns when no call is in flight at a replica that takes none, or after as long as draining may take."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(self.config.server.drain_s):
                while replica.state is not ReplicaState.ENDED:
                    view = (await self.views()).get(str(replica.socket))
                    if view is None or (not view.takes_calls and not view.active):
                        break
                    await asyncio.sleep(_LOOK_S)
        if self.last_look:
            await self.last_look(replica)

    async def _scale(self, wanted: int) -> None:
        before, self.wanted = self.wanted, wanted
        try:
            await self._grow(wanted)
        except ConfigError:
            self.wanted = before
            await self._shrink(before)
            raise
        await self._shrink(wanted)
        for one in self.places:
            if one.serving:
                one.serving.placement = self._placement(one.index, self.config)
                repin(one.serving.pid, one.serving.placement)

    async def _grow(self, wanted: int) -> None:
        """Adds places, and returns when every place has a replica that takes calls."""
        for index in range(len(self.places), wanted):
            one = Place(index, self)
            self.places.append(one)
            self._keeping[one] = asyncio.create_task(one.keep())
        while len(self.serving()) < len(self.places):
            await asyncio.wait(self._keeping.values(), timeout=_LOOK_S, return_when=asyncio.FIRST_COMPLETED)
            for task in self._keeping.values():
                if task.done() and not task.cancelled():
                    task.result()
            if self.ending:
                return

    async def _shrink(self, wanted: int) -> None:
        leaving, self.places = self.places[wanted:], self.places[: max(wanted, 0)]
        for one in leaving:
            self._keeping[one].cancel()
        await asyncio.gather(*(self._keeping.pop(one) for one in leaving), return_exceptions=True)
        self.places += leaving  # the edge hears of them until they have left
        try:
            await asyncio.gather(*(one.clear() for one in leaving))
        finally:
            self.places = [one for one in self.places if one not in leaving]
            self.changed()

    def _placement(self, index: int, config: Config) -> Placement:
        return place(index, max(self.wanted, index + 1), self._cpus, config.fleet)


def repin(pid: int, where: Placement) -> None:
    """Moves a running process, all its threads, to other cores."""
    if hasattr(os, "sched_setaffinity"):
        for task in Path(f"/proc/{pid}/task").glob("*"):
            with contextlib.suppress(OSError):  # that thread has ended
                os.sched_setaffinity(int(task.name), where.cpus)
