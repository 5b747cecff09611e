"""The plain gRPC server: `grpc.aio` and nothing else in the process."""

from __future__ import annotations

import asyncio
import inspect
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import grpc

from forno.server.address import Address
from forno.server.errors import ConfigError, FornoError
from forno.server.security import access, methods
from forno.server.security.credentials import credential_of
from forno.server.security.headers import ADMIN, CERTIFICATE, DOOR
from forno.server.servicers import status
from forno.server.transport import credentials

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Sequence

    from forno.server.config import SecuritySettings
    from forno.server.security.access import Principal
    from forno.server.security.guard import Guard

    CountRpcs = Callable[[str, str, int], None]

_UNREADABLE = "the request is not a message of the type that this method takes"
_NAMES = {code.value[0]: code.name for code in grpc.StatusCode}


class AioHost:
    """Servicers on `grpc.aio`. Owned by the server; event loop only; ends when `stop` returns.

    Args:
        address: Where to listen.
        max_message_bytes: Largest request or response message.
        count_rpcs: Told of ended calls: path, status name, how many.
        socket_mode: Permissions of a Unix socket.
        guard: Admits calls; None = all may come in.
        behind_envoy: Whether only our own Envoy can reach `address`, and says who calls.
        security: What the doors ask for, where they are its own.
    """

    def __init__(
        self,
        address: Address,
        max_message_bytes: int,
        count_rpcs: CountRpcs,
        socket_mode: int = 0o600,
        guard: Guard | None = None,
        *,
        behind_envoy: bool = False,
        security: SecuritySettings | None = None,
    ) -> None:
        self._address = address
        self._socket_mode = socket_mode
        tls = security.tls if security and security.tls.certificate_file else None
        self._credentials = credentials.of_settings(tls) if tls else None
        self._admin_address = Address.parse(security.admin_address) if security and security.admin_address else None

        certificates = bool(tls and tls.client_ca_file)

        def server(door: str) -> grpc.aio.Server:
            return grpc.aio.server(
                interceptors=[_Calls(count_rpcs, guard, behind_envoy, door, certificates and not door)],
                options=[
                    ("grpc.max_receive_message_length", max_message_bytes),
                    ("grpc.max_send_message_length", max_message_bytes),
                    ("grpc.so_reuseport", 0),  # two servers on one port would silently share its connections
                    ("grpc.http2.max_ping_strikes", 0),  # an Envoy before it may ask every second if it still runs
                ],
            )

        self._servers = [server(""), *([server(ADMIN)] if self._admin_address else [])]
        self.grpc: Any = self._servers[0] if len(self._servers) == 1 else _Both(self._servers)
        """What generated `add_XServicer_to_server` functions are given."""

    async def start(self) -> int:
        """Opens the doors.

        Returns:
            The port; 0 for a Unix socket.

        Raises:
            ConfigError: The address cannot be listened on.
        """
        umask = os.umask(0o777 & ~self._socket_mode)  # the socket is never open to more than it should be
        try:
            public, *admin = self._servers
            place = self._address
            port = self._open(public, place)
            for server in admin:
                place = self._admin_address or place
                server.add_insecure_port(str(place))
        except RuntimeError as error:
            raise ConfigError(f"cannot listen on {place}: it is taken, or is not ours ({error})") from None
        finally:
            os.umask(umask)
        for server in self._servers:
            await server.start()
        return 0 if self._address.path else port

    def _open(self, server: grpc.aio.Server, address: Address) -> int:
        if self._credentials:
            return server.add_secure_port(str(address), self._credentials)
        return server.add_insecure_port(str(address))

    async def stop(self, grace_s: float) -> None:
        """Refuses new calls, lets those in flight end, cuts off what is left after `grace_s`."""
        await asyncio.gather(*[server.stop(grace_s) for server in self._servers])
        _remove(self._address.path)


def _remove(path: str) -> None:
    if path:
        Path(path).unlink(missing_ok=True)


class _Both:
    """Servers that offer the same methods, each at its own door."""

    def __init__(self, servers: Sequence[grpc.aio.Server]) -> None:
        self._servers = servers

    def add_generic_rpc_handlers(self, handlers: Any) -> None:
        for server in self._servers:
            server.add_generic_rpc_handlers(handlers)

    def add_registered_method_handlers(self, service: str, handlers: Any) -> None:
        for server in self._servers:
            server.add_registered_method_handlers(service, handlers)  # type: ignore[attr-defined]  # not in its stubs


class _Calls(grpc.aio.ServerInterceptor):  # type: ignore[type-arg]  # generic in its stubs alone
    """Admits calls, and counts them by method and status."""

    def __init__(
        self, count_rpcs: CountRpcs, guard: Guard | None, behind_envoy: bool, door: str, certificates: bool
    ) -> None:
        self._count_rpcs = count_rpcs
        self._guard = guard
        self._behind_envoy = behind_envoy
        self._certificates = certificates
        self._door = f"{DOOR}\0{door}\0" if door else ""
        self._wrapped: dict[str, tuple[Any, Any]] = {}

    async def intercept_service(
        self,
        continuation: Callable[[grpc.HandlerCallDetails], Awaitable[grpc.RpcMethodHandler[Any, Any]]],
        handler_call_details: grpc.HandlerCallDetails,
    ) -> Any:
        path = handler_call_details.method
        wrapped = self._wrapped.get(path)
        if wrapped is None:
            handler: Any = await continuation(handler_call_details)
            if handler is None:
                self._count_rpcs(path, "UNIMPLEMENTED", 1)
                return None
            wrapped = self._wrapped[path] = self._both(handler, path)
        usual, asking = wrapped
        if asking is None or self._guard is None:
            return usual
        metadata: Any = handler_call_details.invocation_metadata
        credential = credential_of(metadata or (), trusted=self._behind_envoy, extra=self._door)
        return usual if self._guard.knows(methods.need(path), credential) else asking

    def _both(self, handler: Any, path: str) -> tuple[Any, Any]:
        """How a method is served, and how where nobody knows the caller: it is admitted before its message is read.

        Where it shows a certificate, the handshake has asked already, and only the call itself tells the names.
        """
        asked = self._guard and self._guard.admission(path) and not handler.request_streaming and not self._certificates
        return self._wrap(handler, path, asks=False), self._wrap(handler, path, asks=True) if asked else None

    def _wrap(self, handler: Any, path: str, *, asks: bool) -> Any:
        behavior: Callable[..., Any]
        comes_as_stream = handler.request_streaming or asks
        if handler.response_streaming:
            behavior = handler.stream_stream if handler.request_streaming else handler.unary_stream
            make = grpc.stream_stream_rpc_method_handler if comes_as_stream else grpc.unary_stream_rpc_method_handler
        else:
            behavior = handler.stream_unary if handler.request_streaming else handler.unary_unary
            make = grpc.stream_unary_rpc_method_handler if comes_as_stream else grpc.unary_unary_rpc_method_handler

        # grpc.aio answers UNKNOWN to what is no message, with a traceback in the log; Envoy's host INTERNAL. So unary
        # requests are decoded here, and of a stream's we hear by an error of our own.
        decode = None if handler.request_streaming else handler.request_deserializer

        guard = self._guard
        need = guard.admission(path) if guard else None

        async def admit(context: Any) -> None:
            try:
                access.CURRENT.set(self._admit(guard, need, context) if guard and need else None)
            except FornoError as error:
                await status.abort(context, error)

        async def decoded(request: Any, context: Any) -> Any:
            if asks:
                request = await _first(request)
            try:
                return decode(request) if decode else request
            except Exception as error:  # noqa: BLE001  (whatever the parser raised)
                await context.abort(grpc.StatusCode.INTERNAL, f"{_UNREADABLE}: {error}")

        async def call(request: Any, context: Any) -> Any:
            name = ""
            try:
                await admit(context)
                return await behavior(await decoded(request, context), context)
            except _UnreadableError as error:
                name = "INTERNAL"
                await context.abort(grpc.StatusCode.INTERNAL, str(error))
            except BaseException as error:
                name = _error_name(error, context)
                raise
            finally:
                self._count_rpcs(path, name or _status_name(context), 1)

        async def generate(request: Any, context: Any) -> AsyncIterator[Any]:
            name = ""
            try:
                await admit(context)
                async for response in behavior(await decoded(request, context), context):
                    yield response
            except _UnreadableError as error:
                name = "INTERNAL"
                await context.abort(grpc.StatusCode.INTERNAL, str(error))
            except BaseException as error:
                name = _error_name(error, context)
                raise
            finally:
                self._count_rpcs(path, name or _status_name(context), 1)

        return make(
            generate if inspect.isasyncgenfunction(behavior) else call,
            _reader(handler.request_deserializer) if handler.request_streaming else None,
            handler.response_serializer,
        )

    def _admit(self, guard: Guard, need: str, context: Any) -> Principal:
        """Who calls.

        Raises:
            FornoError: The call may not come in.
        """
        extra = self._door
        if self._certificates and (shown := context.auth_context().get("x509_pem_cert")):
            extra += f"{CERTIFICATE}\0{shown[0].decode()}\0"
        credential = credential_of(context.invocation_metadata() or (), trusted=self._behind_envoy, extra=extra)
        return guard.admit(need, credential, context.peer())


async def _first(requests: AsyncIterator[Any]) -> Any:
    """The message of a unary call that comes as a stream."""
    async for request in requests:
        return request
    raise _UnreadableError("the request has no message")


class _UnreadableError(Exception):
    """An item of a request stream is no message."""


def _reader(decode: Callable[[bytes], Any] | None) -> Callable[[bytes], Any] | None:
    """The deserializer of a request stream's items; raises `_UnreadableError` through whoever reads them."""
    if decode is None:
        return None

    def read(data: bytes) -> Any:
        try:
            return decode(data)
        except Exception as error:
            raise _UnreadableError(f"{_UNREADABLE}: {error}") from error

    return read


def _status_name(context: Any) -> str:
    code = context.code()
    return "OK" if not code else _NAMES.get(code, "UNKNOWN") if isinstance(code, int) else code.name


def _error_name(error: BaseException, context: Any) -> str:
    if isinstance(error, grpc.aio.AbortError):
        return _status_name(context)
    return "CANCELLED" if isinstance(error, (asyncio.CancelledError, GeneratorExit)) else "UNKNOWN"
