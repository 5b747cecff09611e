"""MLPerf's LoadGen around a model in this process: its Server and Offline scenarios, by its own clock and rules.

LoadGen asks from a thread of its own; samples are handed to the event loop together, answered there, and told to it in
the order in which they end. What it writes is read back: the rate, the tail, and whether it holds the run for valid.
"""

from __future__ import annotations

import asyncio
import re
import tempfile
from collections import deque
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

try:
    import mlperf_loadgen as lg
except ImportError:  # pip install mlcommons-loadgen
    lg = None

_SAMPLES = 1024  # after which rows repeat
_MOST_UNDER_WAY = 32768  # Offline asks for all at once, and so many keep any model busy
_FIELDS = {
    "Offline": {"samples_per_s": r"^Samples per second: ([\d.e+]+)"},
    "Server": {
        "samples_per_s": r"^Completed samples per second\s*: ([\d.e+]+)",
        "p99_ns": r"^99\.00 percentile latency \(ns\)\s*: (\d+)",
    },
}


IS_THERE = lg is not None
"""Whether LoadGen is installed."""


async def scenario(
    name: str,
    ask: Callable[[], asyncio.Future[Any]],
    *,
    seconds: float,
    rate: float,
    latency_ms: float,
) -> dict[str, Any]:
    """One run.

    Args:
        name: "Offline", all samples at once; or "Server", a Poisson load.
        ask: Asks the model for the next row; the event loop's.
        seconds: Shortest time of the run.
        rate: Samples a second: those of the load, or as many as are expected of Offline.
        latency_ms: Server's bound, for 99 of 100.

    Returns:
        `valid`, as LoadGen says, and what it measured.
    """
    loop = asyncio.get_running_loop()
    failed: list[BaseException | None] = []

    def issue(samples: Sequence[Any]) -> None:  # LoadGen's thread
        loop.call_soon_threadsafe(begin, [sample.id for sample in samples])

    waiting: deque[int] = deque()
    under_way = 0

    def begin(ids: list[int]) -> None:
        nonlocal under_way
        waiting.extend(ids)
        while waiting and under_way < _MOST_UNDER_WAY:
            under_way += 1
            ask().add_done_callback(partial(end, waiting.popleft()))

    def end(number: int, future: asyncio.Future[Any]) -> None:
        nonlocal under_way
        under_way -= 1
        if future.exception() is not None:
            failed.append(future.exception())
        lg.QuerySamplesComplete([lg.QuerySampleResponse(number, 0, 0)])
        begin([])

    settings = lg.TestSettings()
    settings.scenario = getattr(lg.TestScenario, name)
    settings.mode = lg.TestMode.PerformanceOnly
    settings.min_duration_ms = int(seconds * 1000)
    settings.min_query_count = 1
    settings.offline_expected_qps = settings.server_target_qps = rate
    settings.server_target_latency_ns = int(latency_ms * 1e6)
    settings.server_target_latency_percentile = 0.99
    with tempfile.TemporaryDirectory(prefix="forno-loadgen-") as folder:
        logs = lg.LogSettings()
        logs.log_output.outdir = folder
        logs.enable_trace = False
        under_test = lg.ConstructSUT(issue, lambda: None)
        library = lg.ConstructQSL(_SAMPLES, _SAMPLES, lambda _indices: None, lambda _indices: None)
        try:
            await asyncio.to_thread(lg.StartTestWithLogSettings, under_test, library, settings, logs)
        finally:
            lg.DestroyQSL(library)
            lg.DestroySUT(under_test)
        summary = (Path(folder) / "mlperf_log_summary.txt").read_text()
    if failed:
        raise RuntimeError(f"{len(failed)} samples failed") from failed[0]
    found: dict[str, Any] = {"valid": re.search(r"^Result is : VALID", summary, re.MULTILINE) is not None}
    for key, pattern in _FIELDS[name].items():
        match = re.search(pattern, summary, re.MULTILINE)
        found[key] = float(match[1]) if match else None
    return found
