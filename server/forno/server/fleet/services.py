"""What the supervisor itself answers: pages and health of the whole by the edge, control on a socket of its own."""

from __future__ import annotations

import asyncio
import logging
from typing import TYPE_CHECKING, Any, NamedTuple

import grpc
from google.api.httpbody_pb2 import HttpBody
from grpc_health.v1 import health_pb2_grpc

from forno.server.errors import ConfigError
from forno.server.fleet import exposition
from forno.server.fleet.fleet import MOST
from forno.server.fleet.replica import ReplicaState
from forno.server.metrics import CONTENT_TYPE
from forno.server.security.headers import EDGE_KEYS
from forno.server.servicers.health import HealthServicer
from forno.v1 import fleet_pb2, fleet_pb2_grpc, rest_pb2, rest_pb2_grpc

if TYPE_CHECKING:
    from collections.abc import Awaitable

    from forno.server.fleet.edge import HostView
    from forno.server.fleet.fleet import Fleet
    from forno.server.fleet.place import Place
    from forno.server.fleet.replica import Replica

    Context = grpc.aio.ServicerContext[Any, Any]

log = logging.getLogger("forno.fleet")

_SCRAPE_TIMEOUT_S = 2.0
_STATES = {
    ReplicaState.STARTING: fleet_pb2.REPLICA_STATE_STARTING,
    ReplicaState.READY: fleet_pb2.REPLICA_STATE_READY,
    ReplicaState.DRAINING: fleet_pb2.REPLICA_STATE_DRAINING,
}


class Pages(rest_pb2_grpc.RestServicer):
    """Health, readiness and metrics of the whole. Owned by `run`; event loop only."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet
        self._sums = exposition.Sums()

    async def Health(self, request: rest_pb2.HealthRequest, context: Context) -> HttpBody:
        """Says that the supervisor lives, and so replicas that end are started again."""
        return HttpBody(content_type="application/json", data=b'{"status":"ok"}')

    async def Ready(self, request: rest_pb2.ReadyRequest, context: Context) -> HttpBody:
        """As a replica says, or UNAVAILABLE where none serves."""
        for replica in () if self._fleet.ending else self._fleet.serving():
            try:
                stub = rest_pb2_grpc.RestStub(replica.channel)
                # As the caller, who may not know of every model.
                caller = [pair for pair in context.invocation_metadata() or () if pair[0] in EDGE_KEYS]
                reply: HttpBody = await stub.Ready(request, timeout=_SCRAPE_TIMEOUT_S, metadata=caller)
            except grpc.aio.AioRpcError:
                continue
            return reply
        ended = "the server is shutting down" if self._fleet.ending else f"no replica of {self._fleet.wanted} serves"
        await context.abort(grpc.StatusCode.UNAVAILABLE, f"not ready: {ended}")
        raise AssertionError("abort returned")

    async def Predict(self, request: rest_pb2.RestPredictRequest, context: Context) -> HttpBody:
        """Is never called: the edge has replicas for it."""
        raise NotImplementedError

    async def Invoke(self, request: rest_pb2.RestInvokeRequest, context: Context) -> HttpBody:
        """Is never called: the edge has replicas for it."""
        raise NotImplementedError

    async def Metrics(self, request: rest_pb2.MetricsRequest, context: Context) -> HttpBody:
        """Metrics of each replica, and their sums."""
        serving = self._fleet.serving()
        scraped = await asyncio.gather(*(_scrape(replica) for replica in serving))
        found = {replica: families for replica, families in zip(serving, scraped, strict=True) if families}
        alive = [*serving, *(replica for one in self._fleet.places for replica in one.leaving)]
        for replica, families in found.items():
            self._sums.remember(replica.name, families)
        sums = self._sums.total(replica.name for replica in alive)
        text = exposition.render({replica.index: families for replica, families in found.items()}, sums)
        return HttpBody(content_type=CONTENT_TYPE, data=(text + self._own()).encode())

    async def keep_sums(self, interval_s: float) -> None:
        """Looks at all counters every so often, so that little is missing in the sums when a replica is killed."""
        while True:
            await asyncio.sleep(interval_s)
            for replica in self._fleet.serving():
                await self.look(replica)

    async def look(self, replica: Replica) -> None:
        """Remembers what a replica counts now."""
        if families := await _scrape(replica):
            self._sums.remember(replica.name, families)

    def _own(self) -> str:
        restarts = "".join(
            f'forno_replica_restarts_total{{replica="{one.index}"}} {one.restarts}\n' for one in self._fleet.places
        )
        return (
            "# HELP forno_replicas Replicas: those that should be there, and those that take calls.\n"
            "# TYPE forno_replicas gauge\n"
            f'forno_replicas{{state="wanted"}} {self._fleet.wanted}\n'
            f'forno_replicas{{state="serving"}} {len(self._fleet.serving())}\n'
            "# HELP forno_replica_restarts_total Processes that have ended without being asked to.\n"
            "# TYPE forno_replica_restarts_total counter\n" + restarts
        )


async def _scrape(replica: Replica) -> dict[str, exposition.Family]:
    """What a replica counts; empty where it does not answer."""
    try:
        stub = rest_pb2_grpc.RestStub(replica.channel)
        reply = await stub.Metrics(rest_pb2.MetricsRequest(), timeout=_SCRAPE_TIMEOUT_S)
    except grpc.aio.AioRpcError:
        return {}
    return exposition.parse(reply.data.decode())


class _Named(NamedTuple):
    """What is told of a model."""

    name: str


class Health:
    """grpc.health.v1 of the whole: SERVING while a replica serves. Owned by `run`; event loop only."""

    def __init__(self) -> None:
        self._names: set[str] = {""}
        self._models: set[str] = set()
        self.servicer = HealthServicer(self)

    def models(self) -> list[_Named]:
        """All that there have been."""
        return [_Named(name) for name in self._models]

    async def follow(self, fleet: Fleet, changed: asyncio.Event) -> None:
        """Tells what is so now, and whenever `changed` is set."""
        while True:
            serving = fleet.serving()
            self._names.update(*(replica.health_names for replica in serving))
            self._models.update(*(replica.models for replica in serving))
            known = set(serving[0].health_names) if serving else set()
            for name in self._names:
                self.servicer.set(name, serving=name in known)
            await changed.wait()
            changed.clear()

    def end(self) -> None:
        """Says NOT_SERVING from now on, and ends the calls of those who watch."""
        self.servicer.shut_down()


def add_pages(server: grpc.aio.Server, pages: Pages, whole: Health) -> None:
    """Adds what callers reach through the edge."""
    rest_pb2_grpc.add_RestServicer_to_server(pages, server)
    health_pb2_grpc.add_HealthServicer_to_server(whole.servicer, server)


class Control(fleet_pb2_grpc.FleetServicer):
    """The Fleet service. Owned by `run`; event loop only."""

    def __init__(self, fleet: Fleet) -> None:
        self._fleet = fleet

    async def GetFleet(self, request: fleet_pb2.GetFleetRequest, context: Context) -> fleet_pb2.FleetStatus:
        """Says which replicas there are."""
        views = await self._fleet.views()
        status = fleet_pb2.FleetStatus(address=self._fleet.address, replicas_wanted=self._fleet.wanted)
        for one in self._fleet.places:
            status.replicas.extend(_replica(one, replica, views) for replica in (*one.leaving, one.serving) if replica)
            if one.serving is None and not one.leaving:
                status.replicas.append(_replica(one, None, views))
        return status

    async def ScaleFleet(self, request: fleet_pb2.ScaleFleetRequest, context: Context) -> fleet_pb2.FleetStatus:
        """Changes their number."""
        if not 1 <= request.replicas <= MOST:
            text = f"replicas is {request.replicas}, expected a whole number from 1 to {MOST}"
            await context.abort(grpc.StatusCode.INVALID_ARGUMENT, text)
        log.info("scaling from %d to %d replicas", self._fleet.wanted, request.replicas)
        return await self._do(self._fleet.scale(request.replicas), context)

    async def RestartFleet(self, request: fleet_pb2.RestartFleetRequest, context: Context) -> fleet_pb2.FleetStatus:
        """Replaces them."""
        return await self._do(self._fleet.restart(), context)

    async def ReloadFleet(self, request: fleet_pb2.ReloadFleetRequest, context: Context) -> fleet_pb2.FleetStatus:
        """Replaces them by some with new settings."""
        return await self._do(self._fleet.reload(), context)

    async def _do(self, change: Awaitable[list[str] | None], context: Context) -> fleet_pb2.FleetStatus:
        # A caller that goes away does not leave a change half done.
        doing = asyncio.ensure_future(change)
        try:
            kept = await asyncio.shield(doing)
        except ConfigError as error:
            await context.abort(grpc.StatusCode.FAILED_PRECONDITION, str(error))
        except asyncio.CancelledError:
            doing.add_done_callback(_log_failure)
            raise
        status = await self.GetFleet(fleet_pb2.GetFleetRequest(), context)
        status.kept_settings.extend(kept or ())
        return status


def _log_failure(done: asyncio.Future[Any]) -> None:
    if not done.cancelled() and (error := done.exception()):
        log.error("a change that nobody waits for has failed: %s", error)


def _replica(one: Place, replica: Replica | None, views: dict[str, HostView]) -> fleet_pb2.Replica:
    told = fleet_pb2.Replica(
        index=one.index, restarts=one.restarts, trouble=one.trouble, state=fleet_pb2.REPLICA_STATE_STARTING
    )
    if replica:
        told.state = _STATES.get(replica.state, fleet_pb2.REPLICA_STATE_DRAINING)
        told.pid = replica.pid
        told.start_time.FromMilliseconds(int(replica.started_s * 1000))
        told.cpus.extend(replica.placement.cpus)
        told.gpus = replica.placement.gpus or ""
        if view := views.get(str(replica.socket)):
            told.active_calls, told.total_calls = view.active, view.total
    return told
