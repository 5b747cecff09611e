"""A call served by a task: the handler runs, and every way out of it becomes a status."""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import logging
from typing import TYPE_CHECKING

import grpc

from forno.server.transport.envoy.context import Aborted
from forno.server.transport.envoy.methods import Running

if TYPE_CHECKING:
    from forno.server.transport.envoy.calls import Call
    from forno.server.transport.envoy.context import Context
    from forno.server.transport.envoy.host import EnvoyHost
    from forno.server.transport.envoy.methods import Method

log = logging.getLogger("forno.transport")

EARLY_S = 0.02
"""How long before its deadline a stream of responses is ended. Envoy, which keeps the deadlines of all calls, can only
reset a stream that has begun, and a client may take that for another error."""


async def unary(host: EnvoyHost, method: Method, context: Context, call: Call, message: bytes, compressed: int) -> None:
    """Serves a call of one request and one response."""
    try:
        request = context.decode(message, compressed)
        response = await method.behavior(request, context)
        data = method.encode(response) if response is not None else b""
        if response is not None and context.plain and call.reply(data):
            host.count_rpcs(method.path, "OK", 1)
        elif response is None and context.code() is None:
            raise TypeError("the handler returned None")  # as in stock gRPC: UNKNOWN
        else:
            await _answer(host, method, context, data)
    except BaseException as error:  # noqa: BLE001  (every way out becomes a status)
        _fail(host, method, context, error)
    finally:
        host.forget(call)


async def _answer(host: EnvoyHost, method: Method, context: Context, data: bytes) -> None:
    if context.code() in (None, grpc.StatusCode.OK):
        context.check_size(data)
        if not context.headers_sent:
            await context.send_initial_metadata(())
        context.send(data)
    host.count_rpcs(method.path, context.finish(), 1)


async def stream(
    host: EnvoyHost, method: Method, context: Context, call: Call, message: bytes | None, compressed: int
) -> None:
    """Serves a call with streams in either direction, or both."""
    remaining_s = context.time_remaining() if method.handler.response_streaming else None
    expiry = None
    if remaining_s is not None:
        expiry = asyncio.get_running_loop().call_later(
            remaining_s - min(EARLY_S, remaining_s / 10), _expire, host, call
        )
    try:
        streaming = method.handler.request_streaming
        request = context.requests() if streaming else context.decode(message or b"", compressed)
        if not method.handler.response_streaming:
            await _answer(host, method, context, method.encode(await method.behavior(request, context)))
            return
        if method.generator:
            # Closed here: left to the garbage collector, its `finally` would run at any time.
            async with contextlib.aclosing(method.behavior(request, context)) as responses:
                async for response in responses:
                    await context.write(response)
        else:
            await method.behavior(request, context)
        if method.hot is not None:
            await context.items_done()
        if not context.headers_sent and context.code() in (None, grpc.StatusCode.OK):
            await context.send_initial_metadata(())
        host.count_rpcs(method.path, context.finish(), 1)
    except BaseException as error:  # noqa: BLE001  (every way out becomes a status)
        _fail(host, method, context, error)
    finally:
        if expiry is not None:
            expiry.cancel()
        host.forget(call)


def cancel(host: EnvoyHost, call: Call, running: Running) -> None:
    """Cancels a call's task, which then answers by what its context says."""
    task = running.task
    task.cancel()
    if inspect.getcoroutinestate(task.get_coro()) == inspect.CORO_CREATED:  # type: ignore[arg-type]
        # It will never run, nor what should run at its end.
        _fail(host, running.method, running.context, asyncio.CancelledError())
        host.forget(call)


def _expire(host: EnvoyHost, call: Call) -> None:
    if isinstance(running := host.live[call], Running):
        running.context.set_code(grpc.StatusCode.DEADLINE_EXCEEDED)
        running.context.set_details("the deadline has passed")
        cancel(host, call, running)


def _fail(host: EnvoyHost, method: Method, context: Context, error: BaseException) -> None:
    if isinstance(error, Aborted):
        name = context.finish()
    elif isinstance(error, asyncio.CancelledError):
        if context.cancelled():
            context.close()
            name = "CANCELLED"
        else:  # the server ended it, or the handler cancelled itself
            code = context.code() or grpc.StatusCode.CANCELLED
            name = context.finish(code, context.details() or "the call was cancelled by the server")
    else:
        log.error("%s raised", method.path, exc_info=error)
        name = context.finish(grpc.StatusCode.UNKNOWN, f"Unexpected {type(error)}: {error}")
    host.count_rpcs(method.path, name, 1)
    if isinstance(error, (SystemExit, KeyboardInterrupt)):
        raise error
