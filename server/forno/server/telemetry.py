"""Which calls are traced, and the door to OpenTelemetry.

Off, it costs nothing: `Telemetry.start` returns None and nothing of OpenTelemetry is imported. On, a call
that is not sampled costs one look at a string. A sampled call keeps a few integers while it runs; its spans
are made from them after it is answered, and leave on a thread of the exporter's own.
"""

from __future__ import annotations

import asyncio
import random
import re
from typing import TYPE_CHECKING, NamedTuple

from forno.server.errors import ConfigError

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from forno.server.config import TelemetrySettings
    from forno.server.metrics import Metrics
    from forno.server.otlp import Otlp

_TRACEPARENT = re.compile(r"(?!ff)([0-9a-f]{2})-([0-9a-f]{32})-([0-9a-f]{16})-[0-9a-f]{2}(-.*)?")
_FLAGS_END = 54  # index of the digit that holds the sampled bit
_UNSAMPLED = frozenset("02468ace")


class Parent(NamedTuple):
    """What a traced call's span hangs under."""

    trace_id: int
    span_id: int  # 0: nothing; the call begins its own trace


class Telemetry:
    """Traces and exported metrics. Made at start, owned by the server; event loop only; ended by `close`.

    Args:
        settings: What is sent, and where.
        metrics: What `export_metrics` reads.
        otlp: What sends it.
    """

    def __init__(self, settings: TelemetrySettings, metrics: Metrics, otlp: Otlp) -> None:
        self._traces = settings.traces
        self._sample_ratio = settings.sample_ratio
        self._interval_s = settings.metrics_interval_s
        self._metrics = metrics
        self._otlp = otlp
        self._random = random.Random()  # noqa: S311 - picks samples, guards nothing

    @classmethod
    def start(cls, settings: TelemetrySettings, metrics: Metrics) -> Telemetry | None:
        """Connect in the background to the collector of `settings`.

        Returns:
            None where there is nowhere to send to, or nothing to send.

        Raises:
            ConfigError: The endpoint is not an address, or OpenTelemetry is not installed.
        """
        endpoint = settings.otlp_endpoint
        if not endpoint or not (settings.traces or settings.metrics_interval_s):
            return None
        if not endpoint.startswith(("http://", "https://", "unix:")):
            raise ConfigError(
                f"telemetry.otlp_endpoint is {endpoint!r}; expected a URL such as http://127.0.0.1:4317, "
                "https://collector:4317 or unix:/run/collector.sock."
            )
        try:
            from forno.server.otlp import Otlp  # noqa: PLC0415 - a tenth of a second that only its users pay
        except ModuleNotFoundError as error:
            raise ConfigError(
                f"telemetry.otlp_endpoint is set, but the module {error.name!r} is missing: "
                "pip install 'forno[server,telemetry]', or leave the setting empty."
            ) from error
        return cls(settings, metrics, Otlp(endpoint))

    def sampled(self, traceparent: str | None) -> Parent | None:
        """Say whether a call is traced, and under what.

        A caller's own decision is followed; calls without a readable `traceparent` go by `sample_ratio`.

        Args:
            traceparent: The W3C header of the call, if it has one.

        Returns:
            What to hand to `record`, or None for a call that is not traced.
        """
        if not self._traces:
            return None
        if traceparent is not None and len(traceparent) > _FLAGS_END:
            if traceparent[_FLAGS_END] in _UNSAMPLED:
                return None
            match = _TRACEPARENT.fullmatch(traceparent)
            if match is not None and not (match[1] == "00" and match[4]):
                parent = Parent(int(match[2], 16), int(match[3], 16))
                if parent.trace_id and parent.span_id:
                    return parent
        if self._sample_ratio and self._random.random() < self._sample_ratio:
            return Parent(self._random.getrandbits(128) or 1, 0)
        return None

    def record(
        self,
        parent: Parent,
        name: str,
        start_ns: int,
        end_ns: int,
        stages: Sequence[tuple[str, int, int]] = (),
        attributes: Mapping[str, str | int | float | bool] | None = None,
        status: str = "OK",
    ) -> None:
        """Make the spans of a call that has ended. Call it after the answer has left; it never blocks.

        Args:
            parent: What `sampled` returned.
            name: The RPC, such as "forno.v1.Predictor/Predict".
            start_ns: When the call arrived; of time.monotonic_ns(), as are all times here.
            end_ns: When its answer left.
            stages: (name, start, end) of each stage, such as "queue"; each becomes a child span.
            attributes: Such as "forno.model", "forno.version", "forno.batch_rows", "forno.request_id".
            status: Name of the call's gRPC status.
        """
        self._otlp.call(parent, name, start_ns, end_ns, stages, attributes or {}, status)

    async def export_metrics(self) -> None:
        """Send the metrics at every interval until cancelled; return at once where none are to be sent."""
        while self._interval_s:
            await asyncio.sleep(self._interval_s)
            families = self._metrics.collect()
            await asyncio.to_thread(self._otlp.metrics, families)

    async def close(self, timeout_s: float) -> None:
        """Send what waits, for at most `timeout_s`; after that what is left is lost.

        Args:
            timeout_s: The longest wait, in seconds.
        """
        families = self._metrics.collect() if self._interval_s else []
        flushed = asyncio.ensure_future(asyncio.to_thread(self._otlp.flush, families))
        await asyncio.wait([flushed], timeout=timeout_s)
        self._otlp.stop()
        await flushed
