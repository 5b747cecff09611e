"""Spans of calls: wrapped around servicers and models only where telemetry is on, so that off costs nothing.

    rpc span |-- decode --|-- queue --|-- compute --|-- encode --|

A sampled call keeps a few integers while it runs. They travel in a context variable from the servicer's method to the
model's `submit`, which runs in the same task; the spans are made after the answer has left.
"""

from __future__ import annotations

import asyncio
import time
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable

    import grpc

    from forno.server.model import Model
    from forno.server.request import Answer, Request
    from forno.server.telemetry import Telemetry

    Stage = tuple[str, int, int]

TRACED = ("Predict", "Invoke")
"""Methods whose calls are traced, of every servicer that has them."""


@dataclass(slots=True)
class _Trace:
    """What is known of one sampled call; times of time.monotonic_ns()."""

    start_ns: int
    stages: list[Stage] = field(default_factory=list)
    attributes: dict[str, str | int] = field(default_factory=dict)


_current: ContextVar[_Trace | None] = ContextVar("forno_trace", default=None)


def watch_servicer(servicer: Any, service: str, telemetry: Telemetry) -> None:
    """Has the servicer's `TRACED` methods make spans.

    Args:
        servicer: Not yet added to a server.
        service: Full name of its service, such as "forno.v1.Predictor".
        telemetry: Decides which calls are traced, and takes their spans.
    """
    for name in TRACED:
        setattr(servicer, name, _traced(getattr(servicer, name), f"{service}/{name}", telemetry))


def watch_model(model: Model) -> None:
    """Has the model tell the trace of a sampled call, if the request belongs to one, where its time went."""
    submit = model.submit

    def traced_submit(request: Request) -> None:
        trace = _current.get()
        if trace is not None:
            request.finish = _watched(request.finish, trace, model, time.monotonic_ns())
        submit(request)

    model.submit = traced_submit  # type: ignore[method-assign]


def _watched(
    finish: Callable[[Answer], Any], trace: _Trace, model: Model, submitted_ns: int
) -> Callable[[Answer], Any]:
    def finish_and_note(answer: Answer) -> Any:
        now_ns = time.monotonic_ns()
        queued_ns = submitted_ns + answer.queue_us * 1000
        computed_ns = min(now_ns, queued_ns + answer.compute_us * 1000)
        result = finish(answer)
        trace.stages += [
            ("decode", trace.start_ns, submitted_ns),
            ("queue", submitted_ns, queued_ns),
            ("compute", queued_ns, computed_ns),
            ("encode", now_ns, time.monotonic_ns()),
        ]
        trace.attributes.update(
            {"forno.model": model.name, "forno.version": model.version, "forno.batch_rows": answer.batch_rows}
        )
        return result

    return finish_and_note


def _traced(method: Callable[..., Any], name: str, telemetry: Telemetry) -> Callable[..., Any]:
    async def call(request: Any, context: grpc.aio.ServicerContext[Any, Any]) -> Any:
        parent = telemetry.sampled(_traceparent(context))
        if parent is None:
            return await method(request, context)
        trace = _Trace(time.monotonic_ns())
        request_id = getattr(request, "request_id", "")
        if request_id:
            trace.attributes["forno.request_id"] = request_id
        token = _current.set(trace)
        status = "OK"
        try:
            return await method(request, context)
        except asyncio.CancelledError:
            status = "CANCELLED"
            raise
        except BaseException:
            status = getattr(context.code(), "name", "UNKNOWN")
            raise
        finally:
            _current.reset(token)
            asyncio.get_running_loop().call_soon(
                telemetry.record,
                *(parent, name, trace.start_ns, time.monotonic_ns(), trace.stages, trace.attributes, status),
            )

    return call


def _traceparent(context: grpc.aio.ServicerContext[Any, Any]) -> str | None:
    for key, value in context.invocation_metadata() or ():
        if key == "traceparent":
            return value if isinstance(value, str) else value.decode("ascii", "replace")
    return None
