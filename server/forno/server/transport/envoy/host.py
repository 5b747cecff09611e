"""The gRPC server inside Envoy: events in, handlers run, answers out, each in bulk.

The native module puts what Envoy's workers have received into one queue and writes one descriptor when that was empty.
The event loop takes all that waits and starts a task per call, or hands a hot method's call straight to its handler.
"""

from __future__ import annotations

import asyncio
import importlib
from dataclasses import replace
from typing import TYPE_CHECKING, Any

import grpc
from google.rpc.status_pb2 import Status

from forno.server import turn
from forno.server.errors import FornoError
from forno.server.security import access
from forno.server.servicers import status
from forno.server.transport.envoy import compression, http, tasks
from forno.server.transport.envoy.calls import JSON_LAYOUT, NO_LAYOUT
from forno.server.transport.envoy.context import Context, encode_details, too_large
from forno.server.transport.envoy.ends import HTTP_PREFIX, MAX_STREAM_S
from forno.server.transport.envoy.metadata import to_wire
from forno.server.transport.envoy.methods import Method, Running, method_of

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from forno.server.security.guard import Guard
    from forno.server.transport.envoy.calls import Call, JsonSplit, Layout, Native, Reply
    from forno.server.transport.envoy.hot import HotHandler
    from forno.server.transport.envoy.metadata import MetadataPair

    CountRpcs = Callable[[str, str, int], None]

MAX_INBOX_BYTES = 4 * 1024 * 1024
MAX_ITEMS = 256
"""Items of one stream that may be on the short way at once; the others wait, and the stream is not read further."""
_DRAIN_POLL_S = 0.01


class EnvoyHost:
    """Offers what generated `add_XServicer_to_server` functions need, over calls that Envoy carries.

    Owned by the server; event loop only; ends when `stop` returns.

    Args:
        max_message_bytes: Largest request or response message.
        count_rpcs: Told of ended calls: path, status name, how many.
        guard: Admits calls; None = all may come in.
        max_call_s: Longest time for a message to come whole, in seconds. A unary call whose deadline is just that long
            has it from an Envoy in front, which keeps it: its handler sees none.
    """

    def __init__(
        self,
        max_message_bytes: int,
        count_rpcs: CountRpcs,
        guard: Guard | None = None,
        max_call_s: float = MAX_STREAM_S,
    ) -> None:
        self._native: Native = importlib.import_module("_forno_envoy")
        self._limits = (max_message_bytes, MAX_INBOX_BYTES, MAX_ITEMS, max_call_s)
        self.count_rpcs = count_rpcs
        self._guard = guard
        self._methods: list[Method] = []
        self.live: dict[Call, Running | http.HttpReply] = {}  # but those on the short way, which the module knows
        self._loop = asyncio.get_running_loop()
        self._idle = asyncio.Event()
        self._draining = False
        self.stopped = asyncio.Event()
        """Set when Envoy is shutting down under us."""
        compression.set_limit(max_message_bytes)

    def add_generic_rpc_handlers(self, generic_rpc_handlers: Sequence[grpc.GenericRpcHandler[Any, Any]]) -> None:
        """Does nothing: generated code registers the same methods by name as well."""

    def add_registered_method_handlers(self, service_name: str, method_handlers: Mapping[str, Any]) -> None:
        """Adds the methods of a service.

        Raises:
            TypeError: A handler is not a coroutine function or async generator function.
        """
        found = (method_of(f"/{service_name}/{name}", handler) for name, handler in method_handlers.items())
        for method in filter(None, found):
            method.need = self._guard.admission(method.path) if self._guard else None
            self._methods.append(method)

    def add_hot_handler(self, path: str, handler: HotHandler, layout: Layout) -> None:
        """Gives a method, registered before, a short way for requests that repeat.

        Args:
            path: The method, unary or of streams in both directions.
            handler: Takes the requests.
            layout: How they are split and answered.

        Raises:
            KeyError: There is no such method.
        """
        methods = {method.path: method for method in self._methods}
        methods[path].hot, methods[path].layout = handler, layout

    def add_http_handler(self, path: str, handler: http.HttpHandler, *, hot: bool) -> None:
        """Has a unary method, registered before, take REST calls past the transcoder (`HTTP_ROUTES`, ends.py).

        Args:
            path: The method's.
            handler: Makes its requests.
            hot: Whether it answers those that it can.
        """
        plain = next(method for method in self._methods if method.path == path)
        layout = JSON_LAYOUT if hot else NO_LAYOUT
        self._methods.append(replace(plain, encode=http.body_of, hot=None, layout=layout, http=handler))

    def start(self) -> None:
        """Opens the doors: from now on calls arrive."""
        methods = [
            (
                HTTP_PREFIX * bool(method.http) + method.path,
                method.handler.request_streaming,
                method.need is not None,
                method.layout,
            )
            for method in self._methods
        ]
        if self._guard:
            self._guard.on_change = self._native.forget_callers
        descriptor = self._native.serve(methods, *self._limits, self._fail_reply)
        self._loop.add_reader(descriptor, self._drain)

    @property
    def calls_in_flight(self) -> int:
        """Calls that have not been answered."""
        return len(self.live) + len(self._native.unanswered())

    async def wait_idle(self) -> None:
        """Refuses new calls from now on, and returns when none is in flight."""
        self._draining = True
        while self.live:
            self._idle.clear()
            await self._idle.wait()
        while self._native.unanswered():  # noqa: ASYNC110  (nobody is told of each answer)
            await asyncio.sleep(_DRAIN_POLL_S)

    def cancel_all(self) -> None:
        """Ends what is still in flight with UNAVAILABLE."""
        for reply in self._native.unanswered():
            self._end_reply(reply, grpc.StatusCode.UNAVAILABLE, "the server is shutting down", ())
        for call, running in list(self.live.items()):
            if isinstance(running, http.HttpReply):
                running.end(grpc.StatusCode.UNAVAILABLE, "the server is shutting down", ())
                continue
            running.context.set_code(grpc.StatusCode.UNAVAILABLE)
            running.context.set_details("the server is shutting down")
            tasks.cancel(self, call, running)

    def _drain(self) -> None:
        native = self._native
        turn.begin()
        try:
            for kind, call, message, more in native.take():
                if kind == native.HOT:
                    self._take_short_way(self._methods[call], message, more)
                elif kind == native.HTTP:
                    self._take_http(call, message, more)
                else:
                    self._handle(kind, call, message, more)
        finally:
            turn.end(self._loop)
            native.flush()

    def _take_short_way(self, method: Method, key: bytes, replies: Sequence[Reply]) -> None:
        """Hands requests of one key to their handler, or lets them go the ordinary way."""
        if self._draining and not replies[0].is_item:  # callers that never pause would keep the server alive
            for reply in replies:
                self._end_reply(reply, grpc.StatusCode.UNAVAILABLE, "the server is shutting down", ())
            return
        if self._guard is None or method.need is None:
            access.CURRENT.set(None)  # whoever came before in this turn is not the caller now
            self._hand_to(method, key, replies)
            return
        first = replies[0]  # all of one caller, or items of one stream
        if first.call and isinstance(running := self.live.get(first.call), Running):
            access.CURRENT.set(running.principal)
            self._hand_to(method, key, replies)
            running.principal = access.CURRENT.get()
        elif not first.is_item:
            while replies:
                count = 1
                if self._admit(self._guard, method, replies[0], replies[0].end):
                    if (principal := access.CURRENT.get()) is not None:
                        count += principal.take(len(replies) - 1)
                    self._hand_to(method, key, replies[:count])
                replies = replies[count:]

    def _hand_to(self, method: Method, key: bytes, replies: Sequence[Reply]) -> None:
        try:
            if method.hot is not None and method.hot(key, replies):
                return
        except Exception as error:  # noqa: BLE001  (the calls behind them must not suffer)
            for reply in replies:
                reply.set_exception(error)
            return
        for reply in replies:
            message = reply.message()
            call = reply.hand_over()
            if call is None:
                continue
            if not reply.is_item:
                self.begin(call, method, message, 0)
            elif isinstance(running := self.live.get(call), Running):
                running.context.on_message(message, False)

    def _take_http(self, call: Call, body: bytes, split: JsonSplit | None) -> None:
        method, refuse = self._methods[call.method], http.HttpCall(call).send_status
        if self._draining:
            refuse(grpc.StatusCode.UNAVAILABLE.value[0], "the server is shutting down", ())
        elif not self._guard or self._admit(self._guard, method, call, refuse):
            http.take(self, method, call, body, split)

    def _handle(self, kind: int, call: Call, message: bytes | None, compressed: int) -> None:
        native = self._native
        if kind in (native.CALL, native.ASK):
            self._count_answered()
            method = self._methods[call.method]
            refuse = http.HttpCall(call).send_status if method.http else call.send_status
            if self._draining:
                refuse(grpc.StatusCode.UNAVAILABLE.value[0], "the server is shutting down", ())
            elif kind == native.ASK:
                self._ask(method, call, refuse)
            elif self._guard is None or self._admit(self._guard, method, call, refuse):
                self.begin(call, method, message, compressed)
            return
        if kind == native.STOP:
            self.stopped.set()
            return
        if isinstance(call, int):
            self.count_rpcs(self._methods[call].path, "CANCELLED", 1)
            return
        running = self.live.get(call)
        if running is None:
            return
        if isinstance(running, http.HttpReply):
            running.cancel()
            return
        context = running.context
        if kind == native.MESSAGE:
            context.on_message(message or b"", bool(compressed))
        elif kind == native.HALF_CLOSE:
            context.on_half_close()
        elif kind == native.WRITABLE:
            context.on_writable()
        elif kind == native.ITEMS_DONE:
            context.on_items_done()
        else:
            context.on_cancel()
            tasks.cancel(self, call, running)

    def begin(self, call: Call, method: Method, message: bytes | None, compressed: int) -> None:
        """Has a call served by a task."""
        context = http.context_of(method.http, call) if method.http else Context(call, method.decode, method.encode)
        if method.handler.request_streaming or method.handler.response_streaming:
            run = tasks.stream(self, method, context, call, message, compressed)
        else:
            run = tasks.unary(self, method, context, call, message or b"", compressed)
        self.live[call] = Running(self._loop.create_task(run), context, method, access.CURRENT.get())

    def _fail_reply(self, reply: Reply, why: BaseException | int) -> None:
        """Answers a request on the short way with an error; `why` may be the size of an answer that is too large."""
        hot = self._methods[reply.method].hot
        if hot is None:
            return
        over = grpc.StatusCode.RESOURCE_EXHAUSTED
        if reply.is_item:
            error = (
                Status(code=over.value[0], message=too_large(why)) if isinstance(why, int) else status.to_status(why)
            )
            reply.send(hot.error_item(reply.request_id, error))
        elif isinstance(why, int):
            self._end_reply(reply, over, too_large(why), ())
        else:
            self._end_reply(reply, *status.told(why))

    def _end_reply(self, reply: Reply, code: grpc.StatusCode, details: str, trailing: Sequence[MetadataPair]) -> None:
        reply.end(code.value[0], encode_details(details), to_wire(trailing))
        self.count_rpcs(self._methods[reply.method].path, code.name, 1)

    def _ask(self, method: Method, call: Call, refuse: Callable[..., None]) -> None:
        """Has the message of a caller taken in, or refuses it before that has come."""
        try:
            known = not self._guard or not method.need or self._guard.ask(method.need, call.credential, call.peer)
        except FornoError as error:
            self._refuse(method, refuse, error)
        else:
            call.let_in(known)

    def _admit(self, guard: Guard, method: Method, caller: Call | Reply, refuse: Callable[..., None]) -> bool:
        """Lets a call in, as the principal of what runs from here and of the task that will serve it; or refuses it."""
        principal = None
        if method.need is not None:
            try:
                principal = guard.admit(method.need, caller.credential, caller.peer)
            except FornoError as error:
                self._refuse(method, refuse, error)
                return False
        access.CURRENT.set(principal)
        return True

    def _refuse(self, method: Method, refuse: Callable[..., None], error: FornoError) -> None:
        code, message, trailing = status.told(error)
        refuse(code.value[0], encode_details(message), to_wire(trailing))
        self.count_rpcs(method.path, code.name, 1)

    def forget(self, call: Call) -> None:
        """Lets go of a call that has ended."""
        self.live.pop(call, None)
        if not self.live:
            self._idle.set()

    def _count_answered(self) -> None:
        """Counts successes on the short way; before the next call begins, and so before a scrape."""
        for number, count in self._native.take_answered():
            self.count_rpcs(self._methods[number].path, "OK", count)
