"""What the server counts and times: the one store, and its Prometheus text.

Everything here belongs to the event-loop thread: batches are recorded on it and scrapes read on it, so there
are no locks. Recording is per batch and keeps raw integers; they are folded into buckets a thousand at a time
or when read. OTLP export reads the same `Metrics.collect()`.
"""

from __future__ import annotations

import math
import os
from array import array
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"
"""Content type of `Metrics.prometheus()`."""

DURATION_BOUNDS_US = (
    *(50, 75, 100, 150, 200, 300, 500, 750),
    *(1_000, 1_500, 2_000, 3_000, 5_000, 7_500),
    *(10_000, 15_000, 20_000, 30_000, 50_000, 75_000),
    *(100_000, 150_000, 200_000, 300_000, 500_000, 750_000),
    *(1_000_000, 2_000_000, 5_000_000, 10_000_000, 30_000_000, 60_000_000),
)
"""Upper bounds of duration buckets, inclusive: steps of at most 1.7x to a second, where most requests end."""

ROW_BOUNDS = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)
"""Upper bounds of the buckets of rows in a batch, inclusive."""

OUTCOMES = ("ok", "failed", "overloaded", "expired", "cancelled", "invalid")
"""How a request to a model can end."""

CACHE_RESULTS = ("hit", "miss", "joined")
"""What a model's response cache can do with a request: answer it, let it run, or let it share a run."""

_FOLD_COUNT = 1024  # folding costs a sixtieth of this in microseconds: too short a pause to be seen
_MAX_RPC_SERIES = 1024  # a caller chooses the method's name, and must not be able to choose our memory

_US_PER_S = 1_000_000

HELP = {
    "forno_request_queue_seconds": "Time from arrival to the start of the run, of answered requests.",
    "forno_request_seconds": "Time from arrival to the answer, of answered requests.",
    "forno_compute_seconds": "Time of a run, of batches that succeeded.",
    "forno_batch_rows": "Rows that ran together, of batches that succeeded.",
    "forno_requests_total": "Requests to a model, by how they ended.",
    "forno_cache_requests_total": "Requests to a model with a cache; only a miss counts in other metrics of the model.",
    "forno_cache_bytes": "Memory of the answers that a model's cache keeps.",
    "forno_cache_entries": "Answers that a model's cache keeps.",
    "forno_elements_total": "Elements of inputs that ran, of models with padding.",
    "forno_padded_elements_total": "Of those, elements that no request has: what padding wastes.",
    "forno_rpcs_total": "Calls by method and gRPC status.",
    "forno_pending_requests": "Requests that wait for a run.",
    "forno_pending_rows": "Rows that wait for a run.",
    "forno_running_rows": "Rows that run now.",
    "forno_batch_rows_limit": "Most rows of a batch, as tuned now.",
    "forno_batch_delay_seconds": "Longest wait for company, as tuned now.",
    "forno_run_expected_seconds": "What a run of one row, and of as many as the limit, is expected to take.",
    "forno_gpu_memory_used_bytes": "Memory in use of a GPU that models run on, by all processes.",
    "forno_gpu_memory_total_bytes": "Memory of that GPU.",
    "forno_gpu_busy_ratio": "Share of the last moments in which a kernel ran on that GPU.",
    "forno_model_state": "1 for the state that the model is in.",
    "process_cpu_seconds_total": "User and system time of the process, in seconds.",
    "process_resident_memory_bytes": "Resident memory of the process, in bytes.",
    "process_open_fds": "Open file descriptors of the process.",
    "process_start_time_seconds": "Start of the process since the Unix epoch, in seconds.",
}


@dataclass(frozen=True, slots=True)
class Point:
    """One number of a counter or gauge."""

    labels: Mapping[str, str]
    value: float


@dataclass(frozen=True, slots=True)
class HistogramPoint:
    """One histogram, in its family's unit. `counts` are not cumulative; the last is of values above."""

    labels: Mapping[str, str]
    bounds: Sequence[float]
    counts: Sequence[int]
    sum: float
    min: float
    max: float

    @property
    def count(self) -> int:
        """Number of values seen."""
        return sum(self.counts)


@dataclass(frozen=True, slots=True)
class Family:
    """All points of one name, as they were when collected."""

    name: str
    kind: Literal["counter", "gauge", "histogram"]
    points: Sequence[Point | HistogramPoint]

    @property
    def help(self) -> str:
        """One sentence on what is counted."""
        return HELP.get(self.name, "")


class Histogram:
    """Counts of integers per bucket. Owned by one `ModelMetrics`.

    Args:
        bounds: Inclusive upper bounds, ascending, in the unit of the values.
        scale: What a value is divided by for export, such as 1,000,000 from microseconds to seconds.
    """

    __slots__ = ("_bounds", "_count", "_max", "_min", "_scaled", "_sum", "_upto", "pending", "scale")

    def __init__(self, bounds: Sequence[int], scale: int = 1) -> None:
        self.pending: list[int] = []  # values not yet counted; whoever appends sees to it that `fold` follows
        self.scale = scale
        self._bounds = np.array(bounds, np.int64)
        self._scaled = [bound / scale for bound in bounds]
        self._upto = np.zeros(len(bounds), np.int64)  # values at or below each bound
        self._count = 0
        self._sum = 0
        self._min = 0
        self._max = 0

    def fold(self) -> None:
        """Count what is pending."""
        if not self.pending:
            return
        # Through array: it reads a list of integers in half the time that NumPy takes.
        values: np.ndarray[Any, np.dtype[np.int64]] = np.frombuffer(array("q", self.pending), np.int64)
        self.pending.clear()
        ordered = np.sort(values)
        self._upto += ordered.searchsorted(self._bounds, side="right")
        smallest, largest = int(ordered[0]), int(ordered[-1])
        self._min = min(self._min, smallest) if self._count else smallest
        self._max = max(self._max, largest) if self._count else largest
        self._count += len(ordered)
        self._sum += int(ordered.sum())

    def point(self, labels: Mapping[str, str]) -> HistogramPoint:
        """Return all that was seen so far."""
        self.fold()
        scale = self.scale
        counts: list[int] = np.diff(self._upto, prepend=0, append=self._count).tolist()
        low, high = self._min / scale, self._max / scale
        return HistogramPoint(labels, self._scaled, counts, self._sum / scale, low, high)


class ModelMetrics:
    """Counts and times of one version of a model. Made and kept by `Metrics`; event loop only."""

    __slots__ = ("cache", "compute", "elements", "labels", "outcomes", "padded_elements", "queue", "rows", "total")

    def __init__(self, name: str, version: str) -> None:
        self.labels = {"model": name, "version": version}
        self.outcomes = dict.fromkeys(OUTCOMES, 0)
        self.cache: dict[str, int] = {}  # by CACHE_RESULTS; empty where the model has no cache
        self.elements = 0  # that ran, where the model has padding
        self.padded_elements = 0  # of those, the ones that no request has
        self.queue = Histogram(DURATION_BOUNDS_US, _US_PER_S)
        self.total = Histogram(DURATION_BOUNDS_US, _US_PER_S)
        self.compute = Histogram(DURATION_BOUNDS_US, _US_PER_S)
        self.rows = Histogram(ROW_BOUNDS)

    def batch(
        self,
        queue_us: Sequence[int],
        total_us: Sequence[int],
        rows: int,
        compute_us: int,
        failed: bool = False,
    ) -> None:
        """Record one run.

        Args:
            queue_us: For each request, from its arrival to the start of the run.
            total_us: For each request, from its arrival to its answer, in the same order.
            rows: Rows of all requests.
            compute_us: Time of the run.
            failed: Whether the engine failed; such requests are counted, but enter no histogram.
        """
        if failed:
            self.outcomes["failed"] += len(total_us)
            return
        self.outcomes["ok"] += len(total_us)
        pending = self.queue.pending
        pending += queue_us
        self.total.pending += total_us
        runs = self.compute.pending
        runs.append(compute_us)
        self.rows.pending.append(rows)
        if len(pending) >= _FOLD_COUNT:
            self.queue.fold()
            self.total.fold()
        if len(runs) >= _FOLD_COUNT:
            self.compute.fold()
            self.rows.fold()

    def answered(self, queue_us: int, total_us: int) -> None:
        """Record a request that ran in parts, which `batch` was not told of.

        Args:
            queue_us: From its arrival to the start of the first part's run.
            total_us: From its arrival to its answer.
        """
        self.outcomes["ok"] += 1
        self.queue.pending.append(queue_us)
        self.total.pending.append(total_us)

    def padding(self, elements: int, padded: int) -> None:
        """Record what a run of a model with padding was given.

        Args:
            elements: Of all inputs.
            padded: Those of them that no request has.
        """
        self.elements += elements
        self.padded_elements += padded

    def refused(self, reason: str, count: int = 1) -> None:
        """Record requests that never ran.

        Args:
            reason: "overloaded", "expired", "cancelled", "failed" or "invalid".
            count: How many.
        """
        self.outcomes[reason] += count


class Metrics:
    """The store of all metrics of the process. Made at start, owned by the server; event loop only."""

    def __init__(self) -> None:
        self._models: dict[tuple[str, str], ModelMetrics] = {}
        self._rpcs: dict[tuple[str, str], int] = {}
        self._watched: list[Callable[[], Iterable[tuple[str, dict[str, str], float]]]] = []

    def model(self, name: str, version: str) -> ModelMetrics:
        """Return the metrics of one version of a model; the same ones when it is loaded again."""
        key = (name, version)
        found = self._models.get(key)
        if found is None:
            found = self._models[key] = ModelMetrics(name, version)
        return found

    def rpc(self, method: str, code: str, count: int = 1) -> None:
        """Record finished calls.

        Args:
            method: Full name, such as "forno.v1.Predictor/Predict".
            code: Name of the gRPC status, such as "OK".
            count: How many.
        """
        key = (method, code)
        if key not in self._rpcs and len(self._rpcs) >= _MAX_RPC_SERIES:
            key = ("other", code)
        self._rpcs[key] = self._rpcs.get(key, 0) + count

    def watch(self, gauges: Callable[[], Iterable[tuple[str, dict[str, str], float]]]) -> None:
        """Add a callback that gives (name, labels, value) of gauges whenever the metrics are read."""
        self._watched.append(gauges)

    def collect(self) -> list[Family]:
        """Return everything as it is now."""
        models = list(self._models.values())
        families = [
            Family("forno_request_queue_seconds", "histogram", [m.queue.point(m.labels) for m in models]),
            Family("forno_request_seconds", "histogram", [m.total.point(m.labels) for m in models]),
            Family("forno_compute_seconds", "histogram", [m.compute.point(m.labels) for m in models]),
            Family("forno_batch_rows", "histogram", [m.rows.point(m.labels) for m in models]),
            Family(
                "forno_requests_total",
                "counter",
                [Point({**m.labels, "outcome": name}, n) for m in models for name, n in m.outcomes.items()],
            ),
            Family(
                "forno_cache_requests_total",
                "counter",
                [Point({**m.labels, "result": name}, n) for m in models for name, n in m.cache.items()],
            ),
            Family("forno_elements_total", "counter", [Point(m.labels, m.elements) for m in models if m.elements]),
            Family(
                "forno_padded_elements_total",
                "counter",
                [Point(m.labels, m.padded_elements) for m in models if m.elements],
            ),
            Family(
                "forno_rpcs_total",
                "counter",
                [Point({"method": method, "code": code}, n) for (method, code), n in self._rpcs.items()],
            ),
        ]
        gauges: dict[str, list[Point]] = {}
        for watched in self._watched:
            for name, labels, value in watched():
                gauges.setdefault(name, []).append(Point(labels, value))
        families += [Family(name, "gauge", points) for name, points in gauges.items()]
        families += _process()
        return [family for family in families if family.points]

    def prometheus(self) -> bytes:
        """Return everything in Prometheus' text format 0.0.4; its content type is `CONTENT_TYPE`."""
        return "".join(line for family in self.collect() for line in _text(family)).encode()


def _process() -> Iterator[Family]:
    times = os.times()
    yield Family("process_cpu_seconds_total", "counter", [Point({}, times.user + times.system)])
    proc = Path("/proc/self")
    try:
        pages = int((proc / "statm").read_text().split()[1])
        started_ticks = int((proc / "stat").read_text().rpartition(")")[2].split()[19])
        booted_s = int(Path("/proc/stat").read_text().partition("btime ")[2].split(maxsplit=1)[0])
        open_fds = sum(1 for _ in (proc / "fd").iterdir()) - 1  # less the one that lists them
    except (OSError, IndexError, ValueError):
        return  # no /proc, or one that hides this: nothing is better than a guess
    yield Family("process_resident_memory_bytes", "gauge", [Point({}, pages * os.sysconf("SC_PAGE_SIZE"))])
    yield Family("process_open_fds", "gauge", [Point({}, open_fds)])
    started_s = booted_s + started_ticks / os.sysconf("SC_CLK_TCK")
    yield Family("process_start_time_seconds", "gauge", [Point({}, started_s)])


def _text(family: Family) -> Iterator[str]:
    name = family.name
    if family.help:
        escaped = family.help.replace("\\", r"\\").replace("\n", r"\n")
        yield f"# HELP {name} {escaped}\n"
    yield f"# TYPE {name} {family.kind}\n"
    for point in family.points:
        inner = ",".join(f'{label}="{value.translate(_LABEL_ESCAPES)}"' for label, value in point.labels.items())
        labels = f"{{{inner}}}" if inner else ""
        if isinstance(point, Point):
            yield f"{name}{labels} {_number(point.value)}\n"
            continue
        bucket = f"{name}_bucket{{{inner}," if inner else f"{name}_bucket{{"
        seen = 0
        for bound, count in zip((*point.bounds, math.inf), point.counts, strict=True):
            seen += count
            yield f'{bucket}le="{_number(bound)}"}} {seen}\n'
        yield f"{name}_sum{labels} {_number(point.sum)}\n"
        yield f"{name}_count{labels} {seen}\n"


_LABEL_ESCAPES = str.maketrans({"\\": r"\\", '"': r"\"", "\n": r"\n"})


def _number(value: float) -> str:
    if isinstance(value, int):
        return str(value)
    if math.isfinite(value):
        return repr(float(value))
    return "NaN" if math.isnan(value) else "+Inf" if value > 0 else "-Inf"
