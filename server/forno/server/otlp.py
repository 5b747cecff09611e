"""The only file that knows OpenTelemetry: spans of finished calls and metrics, sent by OTLP over gRPC.

Import it only when it is wanted: it loads the SDK. The standard environment variables hold:
OTEL_SERVICE_NAME, OTEL_RESOURCE_ATTRIBUTES, OTEL_BSP_*, and OTEL_EXPORTER_OTLP_HEADERS, _TIMEOUT,
_CERTIFICATE and _COMPRESSION.
"""

from __future__ import annotations

import logging
import time
import uuid
from importlib import metadata
from typing import TYPE_CHECKING

from opentelemetry.exporter.otlp.proto.grpc.metric_exporter import OTLPMetricExporter
from opentelemetry.exporter.otlp.proto.grpc.trace_exporter import OTLPSpanExporter
from opentelemetry.sdk.metrics.export import (
    AggregationTemporality,
    Gauge,
    HistogramDataPoint,
    Metric,
    MetricsData,
    NumberDataPoint,
    ResourceMetrics,
    ScopeMetrics,
    Sum,
)
from opentelemetry.sdk.metrics.export import Histogram as HistogramData
from opentelemetry.sdk.resources import Resource
from opentelemetry.sdk.trace import ReadableSpan
from opentelemetry.sdk.trace.export import BatchSpanProcessor
from opentelemetry.sdk.trace.id_generator import RandomIdGenerator
from opentelemetry.sdk.util.instrumentation import InstrumentationScope
from opentelemetry.trace import SpanContext, SpanKind, TraceFlags
from opentelemetry.trace.status import Status, StatusCode

from forno.server.metrics import HistogramPoint, Point

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence

    from forno.server.metrics import Family
    from forno.server.telemetry import Parent

_STATUS_NUMBERS = {
    name: number
    for number, name in enumerate((
        "OK", "CANCELLED", "UNKNOWN", "INVALID_ARGUMENT", "DEADLINE_EXCEEDED", "NOT_FOUND", "ALREADY_EXISTS",
        "PERMISSION_DENIED", "RESOURCE_EXHAUSTED", "FAILED_PRECONDITION", "ABORTED", "OUT_OF_RANGE",
        "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS", "UNAUTHENTICATED",
    ))
}  # fmt: skip
_SERVER_FAULTS = frozenset({"UNKNOWN", "DEADLINE_EXCEEDED", "UNIMPLEMENTED", "INTERNAL", "UNAVAILABLE", "DATA_LOSS"})
"""Statuses that mark a server's span as failed, by OpenTelemetry's conventions; the rest are the caller's."""

_TALKERS = (
    "opentelemetry.exporter.otlp.proto.grpc.exporter",
    "opentelemetry.sdk._shared_internal",
    "opentelemetry.sdk.trace.export",
)
"""Loggers that complain, with every batch, of a collector that is away."""


class Otlp:
    """Sender to one collector. Owned by `Telemetry`; each method says its thread; ended by `stop`.

    An unreachable collector costs memory up to the bounded span queue (OTEL_BSP_MAX_QUEUE_SIZE) and a warning
    a minute; what does not fit is dropped.

    Args:
        endpoint: Where the collector listens: an http:, https: or unix: address.
    """

    def __init__(self, endpoint: str) -> None:
        for name in _TALKERS:
            logging.getLogger(name).addFilter(_quiet)
        insecure = not endpoint.startswith("https:")
        self._resource = _resource()
        self._scope = InstrumentationScope("forno.server")
        self._ids = RandomIdGenerator()
        self._started_ns = time.time_ns()
        self._spans = OTLPSpanExporter(endpoint=endpoint, insecure=insecure)
        self._metrics = OTLPMetricExporter(endpoint=endpoint, insecure=insecure)
        self._processor = BatchSpanProcessor(self._spans)

    def call(
        self,
        parent: Parent,
        name: str,
        start_ns: int,
        end_ns: int,
        stages: Sequence[tuple[str, int, int]],
        attributes: Mapping[str, str | int | float | bool],
        status: str,
    ) -> None:
        """Queue the spans of one call; arguments as in `Telemetry.record`. Event loop; never blocks."""
        # Taken anew each time, so that spans follow the wall clock when it is set.
        epoch_ns = time.time_ns() - time.monotonic_ns()
        service, _, method = name.rpartition("/")
        server = self._context(parent.trace_id)
        above = SpanContext(parent.trace_id, parent.span_id, is_remote=True) if parent.span_id else None
        self._processor.on_end(
            ReadableSpan(
                name,
                context=server,
                parent=above,
                resource=self._resource,
                attributes={
                    "rpc.system": "grpc",
                    "rpc.service": service,
                    "rpc.method": method,
                    "rpc.grpc.status_code": _STATUS_NUMBERS.get(status, 2),
                    **attributes,
                },
                kind=SpanKind.SERVER,
                status=Status(StatusCode.ERROR if status in _SERVER_FAULTS else StatusCode.UNSET),
                start_time=start_ns + epoch_ns,
                end_time=end_ns + epoch_ns,
                instrumentation_scope=self._scope,
            )
        )
        for stage, stage_start_ns, stage_end_ns in stages:
            self._processor.on_end(
                ReadableSpan(
                    stage,
                    context=self._context(parent.trace_id),
                    parent=server,
                    resource=self._resource,
                    start_time=stage_start_ns + epoch_ns,
                    end_time=stage_end_ns + epoch_ns,
                    instrumentation_scope=self._scope,
                )
            )

    def metrics(self, families: Sequence[Family]) -> None:
        """Send metrics. Blocks up to OTEL_EXPORTER_OTLP_TIMEOUT (10 s): not for the event loop."""
        now_ns = time.time_ns()
        metrics = [self._metric(family, now_ns) for family in families]
        scope = ScopeMetrics(self._scope, metrics, schema_url="")
        self._metrics.export(MetricsData([ResourceMetrics(self._resource, [scope], schema_url="")]))

    def flush(self, families: Sequence[Family]) -> None:
        """Send the spans that wait, and metrics if there are any. Blocks until sent, given up, or stopped."""
        self._processor.shutdown()  # type: ignore[no-untyped-call]
        if families:
            self.metrics(families)

    def stop(self) -> None:
        """End every attempt to send at once. Any thread; may be called again."""
        _quiet.hold_all()
        self._spans.shutdown()
        self._metrics.shutdown()

    def _context(self, trace_id: int) -> SpanContext:
        flags = TraceFlags(TraceFlags.SAMPLED)
        return SpanContext(trace_id, self._ids.generate_span_id(), is_remote=False, trace_flags=flags)

    def _metric(self, family: Family, now_ns: int) -> Metric:
        numbers = [
            NumberDataPoint(dict(point.labels), self._started_ns, now_ns, point.value)
            for point in family.points
            if isinstance(point, Point)
        ]
        data: Sum | Gauge | HistogramData
        match family.kind:
            case "counter":
                data = Sum(numbers, AggregationTemporality.CUMULATIVE, is_monotonic=True)
            case "gauge":
                data = Gauge(numbers)
            case "histogram":
                histograms = [
                    self._histogram(point, now_ns) for point in family.points if isinstance(point, HistogramPoint)
                ]
                data = HistogramData(histograms, AggregationTemporality.CUMULATIVE)
        return Metric(family.name, family.help, _unit(family.name), data)

    def _histogram(self, point: HistogramPoint, now_ns: int) -> HistogramDataPoint:
        return HistogramDataPoint(
            attributes=dict(point.labels),
            start_time_unix_nano=self._started_ns,
            time_unix_nano=now_ns,
            count=point.count,
            sum=point.sum,
            bucket_counts=point.counts,
            explicit_bounds=point.bounds,
            min=point.min,
            max=point.max,
        )


def _resource() -> Resource:
    found = Resource.create()  # reads OTEL_SERVICE_NAME and OTEL_RESOURCE_ATTRIBUTES
    ours: dict[str, str] = {}
    if str(found.attributes.get("service.name", "unknown_service")).startswith("unknown_service"):
        ours["service.name"] = "forno"
    if "service.instance.id" not in found.attributes:
        ours["service.instance.id"] = str(uuid.uuid4())  # else replicas would overwrite each other's metrics
    if "service.version" not in found.attributes:
        try:
            ours["service.version"] = metadata.version("forno")
        except metadata.PackageNotFoundError:  # run from a checkout that is not installed
            ours["service.version"] = "unknown"
    return found.merge(Resource(ours))


def _unit(name: str) -> str:
    stem = name.removesuffix("_total")
    return "s" if stem.endswith("_seconds") else "By" if stem.endswith("_bytes") else "1"


class Quiet(logging.Filter):
    """Lets one warning a minute pass, whoever it is from, and says how many it held back. Any thread.

    Args:
        clock_s: Monotonic seconds.
    """

    def __init__(self, clock_s: Callable[[], float] = time.monotonic) -> None:
        super().__init__()
        self._clock_s = clock_s
        self._next_s = float("-inf")
        self._held = 0

    def hold_all(self) -> None:
        """Hold everything back for a minute: what is said while closing is of no use."""
        self._next_s = max(self._next_s, self._clock_s() + 60)

    def filter(self, record: logging.LogRecord) -> bool:
        """Say whether a record passes, and turn one that does into a plain warning."""
        if record.levelno < logging.WARNING:
            return True
        if self._clock_s() < self._next_s:
            self._held += 1
            return False
        self._next_s = self._clock_s() + 60
        reason = record.getMessage()
        record.msg = f"Telemetry does not reach its collector: {reason} ({self._held} more held back)"
        record.args = ()
        record.exc_info = None
        record.levelno, record.levelname = logging.WARNING, "WARNING"
        self._held = 0
        return True


_quiet = Quiet()
