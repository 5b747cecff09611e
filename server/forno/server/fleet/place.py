"""One place in the fleet: keeps a replica in it, replaces it, and gives it up."""

from __future__ import annotations

import asyncio
import contextlib
import logging
from typing import TYPE_CHECKING, Protocol

from forno.server.errors import ConfigError
from forno.server.fleet.replica import Ended, Replica, ReplicaState, described

if TYPE_CHECKING:
    from forno.server.config import Config
    from forno.server.fleet.fleet import Order

log = logging.getLogger("forno.fleet")

_FIRST_WAIT_S, _LONGEST_WAIT_S = 0.1, 30.0
_STEADY_S = 30.0
_PROBE_INTERVAL_S = 1.0


class Surroundings(Protocol):
    """What a place asks of its fleet."""

    @property
    def config(self) -> Config:
        """Settings of the fleet."""

    async def start(self, index: int, order: Order | None) -> Replica:
        """Starts a replica, of another order than the fleet's if one is given, and returns it when it is ready."""

    def changed(self) -> None:
        """Is told whenever a replica begins or stops to take calls."""

    async def admitted(self, replica: Replica) -> None:
        """Returns when the edge sends it calls."""

    async def left(self, replica: Replica) -> None:
        """Returns when the edge has no call at it, or it has had long enough."""


class Backoff:
    """How long to wait before a start: twice as long after each failure, little after a steady run. Pure policy."""

    def __init__(self, most_s: float) -> None:
        self._most_s = most_s
        self._next_s = 0.0

    def wait_s(self) -> float:
        """The wait before the next start, in seconds."""
        return self._next_s

    def ended(self, ran_s: float) -> None:
        """Is told that a run, or an attempt at one, has ended after so many seconds."""
        steady = ran_s >= _STEADY_S
        self._next_s = 0.0 if steady else min(max(_FIRST_WAIT_S, self._next_s * 2), self._most_s)


class Place:
    """A numbered place. Owned by the fleet; event loop only; ends when `keep` is cancelled and `clear` returns.

    Args:
        index: Its number, from 0.
        fleet: Around it.
    """

    def __init__(self, index: int, fleet: Surroundings) -> None:
        self.index = index
        self.serving: Replica | None = None
        self.leaving: list[Replica] = []
        self.restarts = 0
        self.trouble = ""  # why nothing serves here, for people
        self._fleet = fleet
        self._backoff = Backoff(_LONGEST_WAIT_S)
        self._starting = asyncio.Lock()
        self._hurry = asyncio.Event()

    async def keep(self) -> None:
        """Has a replica serve here, always, until it is cancelled.

        Raises:
            ConfigError: The first one cannot serve what it should.
        """
        first = True
        loop = asyncio.get_running_loop()
        while True:
            async with self._starting:
                if self.serving is None:
                    await self._fill(first=first)
            first = False
            replica, began_s = self.serving, loop.time()
            if replica is None:
                continue
            probing = asyncio.create_task(self._probe(replica))
            try:
                await replica.ended()
            finally:
                probing.cancel()
            if replica is self.serving:
                self.serving = None
                self.restarts += 1
                self.trouble = f"ended {described(replica.returncode)}"
                self._fleet.changed()
                self._backoff.ended(loop.time() - began_s)
                log.warning("replica %d %s; starting another", self.index, self.trouble)

    async def replace(self, order: Order | None = None) -> None:
        """Puts a new replica here; the old one leaves when the new one takes calls.

        Raises:
            ConfigError: The new one cannot serve what it should; the old one stays.
        """
        self._hurry.set()
        async with self._starting:
            self._hurry.clear()
            try:
                successor = await self._fleet.start(self.index, order)
            except Ended as error:
                raise ConfigError(f"replica {self.index} {error} before it was ready; its log says more") from None
            old, self.serving = self.serving, successor
            if old is not None:
                self.leaving.append(old)  # it goes on taking calls until its successor does
            await self._admit(successor)
        if old is not None:
            await self._retire(old)

    async def clear(self) -> None:
        """Lets the replica finish its calls, and ends it. Call when `keep` has been cancelled."""
        if self.serving is not None:
            old, self.serving = self.serving, None
            self.leaving.append(old)
            await self._retire(old)

    async def _retire(self, replica: Replica) -> None:
        if replica.state is not ReplicaState.ENDED:
            replica.state = ReplicaState.DRAINING
            self._fleet.changed()
            await self._fleet.left(replica)
            await replica.stop(self._fleet.config.server.drain_s)
        self.leaving.remove(replica)
        self._fleet.changed()

    async def _fill(self, *, first: bool) -> None:
        loop = asyncio.get_running_loop()
        while self.serving is None:
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(self._backoff.wait_s()):
                    await self._hurry.wait()
                    return  # somebody else is about to put one here
            began_s = loop.time()
            try:
                self.serving = await self._fleet.start(self.index, None)
            except (ConfigError, Ended) as error:
                if first and isinstance(error, ConfigError):
                    raise
                self.trouble = str(error)
                self._backoff.ended(loop.time() - began_s)
                log.error(  # noqa: TRY400  (the process's own log has the traceback)
                    "replica %d does not start: %s; next try in %g s", self.index, error, self._backoff.wait_s()
                )
                continue
            await self._admit(self.serving)

    async def _admit(self, replica: Replica) -> None:
        """Has the edge send calls to a replica, and calls it ready when that is so."""
        self._fleet.changed()
        await self._fleet.admitted(replica)
        if replica.state is not ReplicaState.ENDED:
            replica.state = ReplicaState.READY
            self.trouble = ""
        self._fleet.changed()

    async def _probe(self, replica: Replica) -> None:
        """Kills a replica that has not answered for too long."""
        limit_s = self._fleet.config.fleet.hung_after_s
        loop = asyncio.get_running_loop()
        answered_s = loop.time()
        while limit_s:
            await asyncio.sleep(_PROBE_INTERVAL_S)
            if await replica.answers():
                answered_s = loop.time()
            elif loop.time() - answered_s >= limit_s and replica.state is ReplicaState.READY:
                log.warning("replica %d has not answered for %g s: killed", replica.index, limit_s)
                replica.kill()
                return
