"""grpc.health.v1, which tells callers of those models alone that they may know of."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from grpc_health.v1 import health, health_pb2

from forno.server.security import access

if TYPE_CHECKING:
    import grpc

    from forno.server.registry import Registry

    Context = grpc.aio.ServicerContext[Any, Any]


class HealthServicer(health.aio.HealthServicer):  # type: ignore[misc,name-defined]  # missing in its stubs
    """The health of the server (""), of its services and of each model, by name. Event loop only.

    Args:
        registry: Says which names are models.
    """

    def __init__(self, registry: Registry) -> None:
        super().__init__()
        self._registry = registry

    async def Check(self, request: health_pb2.HealthCheckRequest, context: Context) -> Any:
        """Says whether one of them serves."""
        return await super().Check(self._seen(request), context)

    async def Watch(self, request: health_pb2.HealthCheckRequest, context: Context) -> None:
        """Says so again whenever that changes."""
        await super().Watch(self._seen(request), context)

    def _seen(self, request: health_pb2.HealthCheckRequest) -> health_pb2.HealthCheckRequest:
        """The request; one that asks for nothing that exists where the caller may not know of what it names."""
        name = request.service
        hidden = not access.sees("model", name) and any(model.name == name for model in self._registry.models())
        return health_pb2.HealthCheckRequest(service="\0unknown") if hidden else request
