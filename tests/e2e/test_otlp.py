"""Spans and metrics as a real OTLP collector receives them, and collectors that are away or hang."""

from __future__ import annotations

import asyncio
import logging
import queue
import threading
import time
from concurrent import futures

import grpc
import pytest
from opentelemetry.proto.collector.metrics.v1 import metrics_service_pb2, metrics_service_pb2_grpc
from opentelemetry.proto.collector.trace.v1 import trace_service_pb2, trace_service_pb2_grpc
from opentelemetry.proto.trace.v1 import trace_pb2

from forno.server import otlp
from forno.server.config import TelemetrySettings
from forno.server.metrics import DURATION_BOUNDS_US, Metrics
from forno.server.telemetry import Telemetry

TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
SPAN = "00f067aa0ba902b7"
TRACEPARENT = f"00-{TRACE}-{SPAN}-01"
MS = 1_000_000


class Collector(trace_service_pb2_grpc.TraceServiceServicer, metrics_service_pb2_grpc.MetricsServiceServicer):
    """Keeps what it receives, once `open` is set."""

    def __init__(self, server: grpc.Server) -> None:
        self.received: list[object] = []
        self.headers: list[dict[str, str]] = []
        self.arrivals: queue.SimpleQueue[None] = queue.SimpleQueue()
        self.open = threading.Event()
        self.open.set()
        trace_service_pb2_grpc.add_TraceServiceServicer_to_server(self, server)
        metrics_service_pb2_grpc.add_MetricsServiceServicer_to_server(self, server)

    def Export(self, request, context):  # noqa: N802 - both services call it so
        self.open.wait(30)
        self.received.append(request)
        self.headers.append(dict(context.invocation_metadata()))
        self.arrivals.put(None)
        if isinstance(request, trace_service_pb2.ExportTraceServiceRequest):
            return trace_service_pb2.ExportTraceServiceResponse()
        return metrics_service_pb2.ExportMetricsServiceResponse()

    def resources(self):
        return [each.resource for request in self.received for each in getattr(request, "resource_spans", ())]

    def spans(self):
        return {
            span.name: span
            for request in self.received
            for resource in getattr(request, "resource_spans", ())
            for scope in resource.scope_spans
            for span in scope.spans
        }

    def metrics(self):
        return {
            metric.name: metric
            for request in self.received
            for resource in getattr(request, "resource_metrics", ())
            for scope in resource.scope_metrics
            for metric in scope.metrics
        }


@pytest.fixture(params=["unix", "http"])
def endpoint(request, tmp_path):
    return f"unix:{tmp_path}/otlp.sock" if request.param == "unix" else "http://127.0.0.1:"


@pytest.fixture
def collector(endpoint):
    server = grpc.server(futures.ThreadPoolExecutor(4))
    made = Collector(server)
    if endpoint.startswith("unix:"):
        server.add_insecure_port(endpoint)
        made.endpoint = endpoint
    else:
        made.endpoint = f"{endpoint}{server.add_insecure_port('127.0.0.1:0')}"
    server.start()
    yield made
    made.open.set()
    server.stop(None).wait()


def start(endpoint: str, metrics: Metrics | None = None, **settings: object) -> Telemetry:
    found = TelemetrySettings.model_validate({"otlp_endpoint": endpoint, **settings})
    telemetry = Telemetry.start(found, metrics or Metrics())
    assert telemetry is not None
    return telemetry


def attributes(span) -> dict[str, object]:
    return {each.key: getattr(each.value, each.value.WhichOneof("value")) for each in span.attributes}


async def test_spans_hang_under_the_callers_trace(collector, monkeypatch):
    monkeypatch.setenv("OTEL_SERVICE_NAME", "oven")
    monkeypatch.setenv("OTEL_EXPORTER_OTLP_HEADERS", "x-tenant=bakery")
    telemetry = start(collector.endpoint)
    begun_ns, begun_epoch_ns = time.monotonic_ns(), time.time_ns()
    parent = telemetry.sampled(TRACEPARENT)
    assert parent is not None
    telemetry.record(
        parent,
        "forno.v1.Predictor/Predict",
        begun_ns,
        begun_ns + 10 * MS,
        [
            ("queue", begun_ns + 1 * MS, begun_ns + 4 * MS),
            ("compute", begun_ns + 4 * MS, begun_ns + 8 * MS),
            ("encode", begun_ns + 8 * MS, begun_ns + 9 * MS),
        ],
        {"forno.model": "digits", "forno.version": "3", "forno.batch_rows": 17, "forno.request_id": "r-1"},
    )
    await telemetry.close(5)

    spans = collector.spans()
    server = spans.pop("forno.v1.Predictor/Predict")
    assert server.trace_id.hex() == TRACE
    assert server.parent_span_id.hex() == SPAN
    assert server.kind == trace_pb2.Span.SPAN_KIND_SERVER
    assert server.status.code == trace_pb2.Status.STATUS_CODE_UNSET
    assert abs(server.start_time_unix_nano - begun_epoch_ns) < 100 * MS
    assert server.end_time_unix_nano - server.start_time_unix_nano == 10 * MS
    assert attributes(server) == {
        "rpc.system": "grpc",
        "rpc.service": "forno.v1.Predictor",
        "rpc.method": "Predict",
        "rpc.grpc.status_code": 0,
        "forno.model": "digits",
        "forno.version": "3",
        "forno.batch_rows": 17,
        "forno.request_id": "r-1",
    }
    assert set(spans) == {"queue", "compute", "encode"}
    for stage in spans.values():
        assert stage.trace_id.hex() == TRACE
        assert stage.parent_span_id == server.span_id
        assert server.start_time_unix_nano < stage.start_time_unix_nano < stage.end_time_unix_nano
        assert stage.end_time_unix_nano < server.end_time_unix_nano
    assert len({span.span_id for span in [server, *spans.values()]}) == 4
    resource = attributes(collector.resources()[0])
    assert resource["service.name"] == "oven"
    assert resource["service.instance.id"]
    assert collector.headers[0]["x-tenant"] == "bakery"


@pytest.mark.parametrize(
    ("status", "number", "failed"), [("INTERNAL", 13, True), ("INVALID_ARGUMENT", 3, False), ("OK", 0, False)]
)
async def test_a_sampled_call_without_a_parent_begins_a_trace(collector, status, number, failed):
    telemetry = start(collector.endpoint, sample_ratio=1)
    parent = telemetry.sampled(None)
    assert parent is not None
    now_ns = time.monotonic_ns()
    telemetry.record(parent, "forno.v1.Predictor/Predict", now_ns - MS, now_ns, status=status)
    await telemetry.close(5)
    (span,) = collector.spans().values()
    assert len(span.trace_id) == 16
    assert span.parent_span_id == b""
    assert attributes(span)["rpc.grpc.status_code"] == number
    assert (span.status.code == trace_pb2.Status.STATUS_CODE_ERROR) == failed
    assert attributes(collector.resources()[0])["service.name"] == "forno"


async def test_metrics_arrive_as_they_are_in_the_store(collector):
    metrics = Metrics()
    metrics.model("digits", "1").batch([40, 60], [150, 90_000_000], 2, 1500)
    metrics.rpc("forno.v1.Predictor/Predict", "OK", 2)
    metrics.watch(lambda: [("forno_pending_rows", {"model": "digits", "version": "1"}, 7)])
    telemetry = start(collector.endpoint, metrics, metrics_interval_s=0.05)
    export = asyncio.ensure_future(telemetry.export_metrics())
    for _ in range(2):
        await asyncio.to_thread(collector.arrivals.get, timeout=10)
    export.cancel()
    metrics.rpc("forno.v1.Predictor/Predict", "OK")
    await telemetry.close(5)

    found = collector.metrics()
    histogram = found["forno_request_seconds"].histogram.data_points[0]
    assert attributes(histogram) == {"model": "digits", "version": "1"}
    assert (histogram.count, histogram.sum) == (2, 90.00015)
    assert list(histogram.explicit_bounds) == [bound / 1e6 for bound in DURATION_BOUNDS_US]
    assert sum(histogram.bucket_counts) == 2
    assert histogram.bucket_counts[-1] == 1
    assert (histogram.min, histogram.max) == (0.00015, 90.0)
    assert found["forno_request_seconds"].unit == "s"
    assert found["forno_rpcs_total"].sum.is_monotonic
    assert found["forno_rpcs_total"].sum.data_points[0].as_int == 3  # the last of them sent by close
    assert found["forno_pending_rows"].gauge.data_points[0].as_int == 7
    assert found["process_resident_memory_bytes"].unit == "By"


async def test_metrics_are_not_exported_unless_asked_for(collector):
    telemetry = start(collector.endpoint)
    async with asyncio.timeout(1):
        await telemetry.export_metrics()
    await telemetry.close(5)
    assert not collector.received


async def test_a_collector_that_is_away_costs_neither_time_nor_words(caplog, monkeypatch):
    monkeypatch.setattr(otlp._quiet, "_next_s", 0.0)
    telemetry = start("http://127.0.0.1:1", metrics_interval_s=0.01)
    export = asyncio.ensure_future(telemetry.export_metrics())
    parent = telemetry.sampled(TRACEPARENT)
    assert parent is not None
    slowest_ns = 0
    for _ in range(3000):  # more than the queue of spans holds
        now_ns = time.monotonic_ns()
        telemetry.record(parent, "a/b", now_ns, now_ns, [("queue", now_ns, now_ns)])
        slowest_ns = max(slowest_ns, time.monotonic_ns() - now_ns)
    await asyncio.sleep(0.3)
    export.cancel()
    begun_s = time.monotonic()
    await telemetry.close(0.2)
    assert time.monotonic() - begun_s < 3
    assert slowest_ns < 500 * MS
    (warning,) = [each for each in caplog.records if each.levelno >= logging.WARNING]
    assert warning.getMessage().startswith("Telemetry does not reach its collector: ")


async def test_closing_does_not_wait_for_a_collector_that_hangs(collector):
    collector.open.clear()
    telemetry = start(collector.endpoint, metrics_interval_s=60)
    parent = telemetry.sampled(TRACEPARENT)
    assert parent is not None
    for _ in range(2000):
        telemetry.record(parent, "a/b", 1, 2)
    begun_s = time.monotonic()
    await telemetry.close(0.3)
    assert 0.25 < time.monotonic() - begun_s < 3
