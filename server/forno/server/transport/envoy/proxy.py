"""Servicers in this process, behind a separate Envoy: where they cannot run inside it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from forno.server.address import Address
from forno.server.errors import ConfigError
from forno.server.transport.aio import AioHost
from forno.server.transport.envoy.ends import ProxyEnd
from forno.server.transport.envoy.supervisor import Envoy

if TYPE_CHECKING:
    from collections.abc import Callable
    from typing import Any

    from forno.server.config import Config
    from forno.server.security.guard import Guard
    from forno.server.transport.aio import CountRpcs

_SOCKET = "servicers.sock"


class ProxyHost:
    """A plain gRPC server on a Unix socket, and Envoy before it on the public port. Owned by the server."""

    def __init__(
        self,
        config: Config,
        address: Address,
        count_rpcs: CountRpcs,
        on_log: Callable[[str], None],
        guard: Guard | None,
    ) -> None:
        self._envoy = Envoy(config, address, lambda folder: ProxyEnd(folder / _SOCKET), on_log)
        inner = Address(path=str(self._envoy.folder / _SOCKET))
        self._aio = AioHost(inner, config.server.max_message_bytes, count_rpcs, guard=guard, behind_envoy=True)

    @property
    def grpc(self) -> Any:
        """What generated `add_XServicer_to_server` functions are given."""
        return self._aio.grpc

    async def start(self) -> int:
        """Opens the inner door, then the public one.

        Raises:
            ConfigError: Envoy does not start.
        """
        await self._aio.start()
        self._envoy.start({}, dies_with_us=True)  # it holds nothing that tells it otherwise
        await asyncio.sleep(0.05)
        if (status := self._envoy.returncode()) is not None:
            raise ConfigError(f"Envoy ended at once with status {status}; its log is above")
        return 0

    async def stop(self, grace_s: float) -> None:
        """Closes the public door, lets calls end, then ends both."""
        await asyncio.to_thread(self._envoy.stop_listening)
        await self._aio.stop(grace_s)
        await asyncio.to_thread(self._envoy.wait_answered, 1.0)
        await asyncio.to_thread(self._envoy.close)
