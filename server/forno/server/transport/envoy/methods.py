"""What the host keeps of an RPC, and of a call whose handler runs."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from forno.server.transport.envoy.calls import NO_LAYOUT

if TYPE_CHECKING:
    import asyncio
    from collections.abc import Callable

    from forno.server.security.access import Principal
    from forno.server.transport.envoy.calls import Layout
    from forno.server.transport.envoy.context import Context
    from forno.server.transport.envoy.hot import HotHandler
    from forno.server.transport.envoy.http import HttpHandler


@dataclass(slots=True)
class Method:
    """One registered RPC."""

    path: str
    handler: Any  # grpc.RpcMethodHandler
    decode: Callable[[bytes], Any]
    encode: Callable[[Any], bytes]
    behavior: Callable[..., Any]
    generator: bool  # an async generator function, rather than a coroutine that writes
    need: str | None = None  # what the guard asks of its callers; None = nothing
    hot: HotHandler | None = None  # its short way
    layout: Layout = NO_LAYOUT
    http: HttpHandler | None = None  # of REST calls that come as they are


@dataclass(slots=True)
class Running:
    """A call whose handler runs as a task."""

    task: asyncio.Task[None]
    context: Context
    method: Method
    principal: Principal | None  # of a stream's items on the short way; its task has its own


def method_of(path: str, handler: Any) -> Method | None:
    """A handler that generated code registers, as an RPC; None where the servicer leaves it out.

    Raises:
        TypeError: It is not a coroutine function or async generator function.
    """
    behavior = (
        (handler.stream_stream if handler.response_streaming else handler.stream_unary)
        if handler.request_streaming
        else (handler.unary_stream if handler.response_streaming else handler.unary_unary)
    )
    if getattr(behavior, "__module__", "").endswith("_pb2_grpc"):
        return None  # the stub of generated code: unknown methods end the same way
    generator = inspect.isasyncgenfunction(behavior)
    if not generator and not inspect.iscoroutinefunction(behavior):
        raise TypeError(f"{path} is not an async function")
    decode, encode = handler.request_deserializer or bytes, handler.response_serializer or bytes
    return Method(path, handler, decode, encode, behavior, generator)
