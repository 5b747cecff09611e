"""grpc.health.v1, which tells callers of those models alone that they may know of.

Not the servicer of `grpcio-health-checking`: that forgets every watcher of a name when one of them leaves, and keeps a
watcher's call open while the server drains, which then lasts as long as it may.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any, Protocol

import grpc
from grpc_health.v1 import health_pb2, health_pb2_grpc

from forno.server.security import access

if TYPE_CHECKING:
    from collections.abc import Iterable

    class Named(Protocol):
        """A model."""

        @property
        def name(self) -> str:
            """What it is called."""

    class Models(Protocol):
        """Where names of models are known; a `Registry` is one."""

        def models(self) -> Iterable[Named]:
            """All of them."""

    Context = grpc.aio.ServicerContext[Any, Any]

_STATUS = health_pb2.HealthCheckResponse


class HealthServicer(health_pb2_grpc.HealthServicer):  # type: ignore[misc]  # Any in its stubs
    """The health of the server (""), of its services and of each model, by name. Event loop only.

    Args:
        registry: Says which names are models.
    """

    def __init__(self, registry: Models) -> None:
        self._registry = registry
        self._serving: dict[str, bool] = {}
        self._over = False
        self._changed = asyncio.Event()  # replaced when it is set: everybody who waits is woken once

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> health_pb2.HealthCheckResponse:
        """Says whether one of them serves."""
        status = self._status(request.service)
        if status == _STATUS.SERVICE_UNKNOWN:
            await context.abort(grpc.StatusCode.NOT_FOUND)
        return _STATUS(status=status)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """Says so again whenever that changes, until the server ends."""
        told = None
        while True:
            changed = self._changed
            status = self._status(request.service)
            if status != told:
                await context.write(_STATUS(status=status))
                told = status
            if self._over:
                await context.abort(grpc.StatusCode.UNAVAILABLE, "the server is shutting down")
            if changed is self._changed:
                await changed.wait()

    def set(self, name: str, *, serving: bool) -> None:
        """Changes what is told of a name."""
        self._serving[name] = serving
        self._wake()

    def forget(self, name: str) -> None:
        """Knows a name no more."""
        self._serving.pop(name, None)
        self._wake()

    def shut_down(self) -> None:
        """Tells that nothing serves any more, and ends the calls of those who watch."""
        self._over = True
        self._wake()

    def _wake(self) -> None:
        self._changed.set()
        self._changed = asyncio.Event()

    def _status(self, name: str) -> Any:
        hidden = not access.sees("model", name) and any(model.name == name for model in self._registry.models())
        serving = None if hidden else self._serving.get(name)
        if serving is None:
            return _STATUS.SERVICE_UNKNOWN
        return _STATUS.SERVING if serving and not self._over else _STATUS.NOT_SERVING
