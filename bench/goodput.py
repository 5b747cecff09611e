"""Answers within their deadline, at loads up to three times of what the engine can do.

Usage: python -m bench.goodput [--seconds 5] [--rounds 1] [--name goodput]

Requests of one row arrive at random (Poisson) at `Model.submit`, without a network. The engine is one whose cost is
known: 2 ms a run and 1 ms a row. Beside Forno stand two first-in-first-out batchers with the same limits in the same
run: one that runs whatever waits, and one that drops what has expired. Capacity is what the engine does with full
batches and nothing around it. Writes `results/NAME.json`, `.md` and `.svg`.
"""

from __future__ import annotations

import argparse
import asyncio
import random
import statistics
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from bench import chart, report
from forno.server.clock import clock_us
from forno.server.config import ModelSettings
from forno.server.engines import open_engine
from forno.server.errors import FornoError
from forno.server.metrics import Metrics
from forno.server.model import Model
from forno.server.request import Request

if TYPE_CHECKING:
    from collections.abc import Sequence

MAX_ROWS = 32
LOADS = (0.5, 1.0, 1.5, 2.0, 3.0)
DEADLINES_MS = {"equal": (100,), "mixed": (60, 100, 200)}
WARM_S = 1.0
SETTINGS = ModelSettings.model_validate(
    {
        "engine": "null",
        "null": {"delay_us": 2000, "row_delay_us": 1000, "shape": [-1, 4]},
        "batching": {"max_rows": MAX_ROWS},
    }
)


class Policy(Protocol):
    """What takes requests."""

    def submit(self, request: Request) -> None:
        """Queues a request, or raises."""

    async def close(self, grace_s: float) -> None:
        """Ends it."""


class Fifo:
    """A plain batcher: what came first runs first, as many rows as fit, on a thread.

    Args:
        drops: Whether what has expired is dropped rather than run.
    """

    def __init__(self, *, drops: bool) -> None:
        self._drops = drops
        self._engine = open_engine(None, SETTINGS)
        self._slot = self._engine.new_slot(MAX_ROWS)
        self._queue: asyncio.Queue[Request] = asyncio.Queue()
        self._pool = ThreadPoolExecutor(1)
        self._task = asyncio.create_task(self._serve())

    def submit(self, request: Request) -> None:
        """Queues a request."""
        if self._queue.qsize() < SETTINGS.batching.max_pending_rows:
            self._queue.put_nowait(request)
        else:
            request.future.cancel()

    async def close(self, grace_s: float) -> None:
        """Ends it; what waits is never answered."""
        del grace_s
        self._task.cancel()
        self._pool.shutdown()

    async def _serve(self) -> None:
        loop = asyncio.get_running_loop()
        while True:
            requests = [await self._queue.get()]
            while len(requests) < MAX_ROWS and not self._queue.empty():
                requests.append(self._queue.get_nowait())
            now_us = clock_us()
            if self._drops:
                requests = [each for each in requests if each.expires_us > now_us]
            if not requests:
                continue
            self._slot.load([each.inputs for each in requests], len(requests))
            await loop.run_in_executor(self._pool, self._engine.run, self._slot, len(requests))
            for each in requests:
                each.future.set_result(None)


@dataclass(frozen=True)
class Point:
    """What one policy did with one load."""

    policy: str
    deadlines: str
    load: float  # arrivals by capacity
    arrivals_per_s: float
    goodput_per_s: float
    goodput: float  # by capacity
    refused: float  # share that was told at once or before it ran
    late: float  # share of the answers that came too late
    p50_ms: float  # of the answers
    p99_ms: float
    p99_of_deadline: float  # time of an answer by its request's deadline


async def forno() -> Policy:
    """The model as it is served."""
    model = Model("costly", "1", None, SETTINGS, Metrics().model("costly", "1"))
    await model.load()
    return model


async def policy_of(name: str) -> Policy:
    """A policy by its name in the results."""
    return await forno() if name == "forno" else Fifo(drops=name == "fifo, drops expired")


def capacity_per_s(seconds: float = 1.0) -> float:
    """Rows that the engine does in a second, in full batches."""
    engine = open_engine(None, SETTINGS)
    slot = engine.new_slot(MAX_ROWS)
    slot.load([(np.zeros((MAX_ROWS, 4), np.float32),)], MAX_ROWS)
    runs, began_s = 0, time.perf_counter()
    while time.perf_counter() - began_s < seconds:
        engine.run(slot, MAX_ROWS)
        runs += 1
    return runs * MAX_ROWS / (time.perf_counter() - began_s)


async def measure(name: str, deadlines: str, load: float, capacity: float, seconds: float, seed: int) -> Point:
    """One policy under one load."""
    policy = await policy_of(name)
    loop, source = asyncio.get_running_loop(), random.Random(seed)  # noqa: S311  (arrivals, not secrets)
    row = np.zeros((1, 4), np.float32)
    took: list[tuple[float, int]] = []  # time and deadline of answers to what came after the warm-up
    sent, began_s = 0, time.monotonic()
    due_s = began_s
    while due_s < began_s + WARM_S + seconds:
        due_s += source.expovariate(load * capacity)
        wait_s = due_s - time.monotonic()
        if wait_s > 0:
            await asyncio.sleep(wait_s)
        deadline_ms = source.choice(DEADLINES_MS[deadlines])
        counted = due_s > began_s + WARM_S
        sent += counted
        future = loop.create_future()
        future.add_done_callback(_recorder(took if counted else [], due_s, deadline_ms))
        request = Request((row,), 1, _nothing, future, clock_us(), int(due_s * 1e6) + deadline_ms * 1000)
        try:
            policy.submit(request)
        except FornoError:
            future.cancel()
        if sent % 16 == 0:
            await asyncio.sleep(0)
    await asyncio.sleep(max(DEADLINES_MS[deadlines]) / 1000)
    await policy.close(0)
    good = sum(ms <= deadline for ms, deadline in took)
    times = np.array([ms for ms, _ in took] or [0.0])
    shares = np.array([ms / deadline for ms, deadline in took] or [0.0])
    return Point(
        name,
        deadlines,
        load,
        sent / seconds,
        good / seconds,
        good / seconds / capacity,
        1 - len(took) / sent,
        1 - good / max(len(took), 1),
        float(np.percentile(times, 50)),
        float(np.percentile(times, 99)),
        float(np.percentile(shares, 99)),
    )


def _nothing(_answer: Any) -> None:
    return None


def _recorder(took: list[tuple[float, int]], due_s: float, deadline_ms: int) -> Any:
    def record(future: asyncio.Future[Any]) -> None:
        if not future.cancelled() and future.exception() is None:
            took.append(((time.monotonic() - due_s) * 1000, deadline_ms))

    return record


def median_of(points: Sequence[Point]) -> Point:
    """The round with the median goodput."""
    middle = statistics.median_low([point.goodput for point in points])
    return next(point for point in points if point.goodput == middle)


def table(points: Sequence[Point]) -> str:
    """Markdown for people."""
    lines = [
        "| policy | deadlines | load | goodput by capacity | refused | late | p50 ms | p99 ms | p99 by deadline |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    lines += [
        f"| {p.policy} | {p.deadlines} | {p.load:g} | {p.goodput:.3f} | {p.refused:.3f} | {p.late:.3f} "
        f"| {p.p50_ms:.1f} | {p.p99_ms:.1f} | {p.p99_of_deadline:.2f} |"
        for p in points
    ]
    return "\n".join(lines)


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=5.0)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--name", default="goodput")
    parser.add_argument("--policies", default="forno;fifo;fifo, drops expired")
    options = parser.parse_args()
    capacity = capacity_per_s()
    print(f"capacity {capacity:.0f} rows/s")
    points, rounds = [], []
    for deadlines in DEADLINES_MS:
        for load in LOADS:
            for name in options.policies.split(";"):
                found = [
                    asyncio.run(measure(name, deadlines, load, capacity, options.seconds, seed))
                    for seed in range(options.rounds)
                ]
                rounds += found
                points.append(median_of(found))
                print(table(points[-1:]).splitlines()[-1], flush=True)
    record = report.facts(
        "bench.goodput",
        f"in process, of {options.rounds} rounds of {options.seconds:g} s the one with the median goodput",
        settings=SETTINGS.model_dump(mode="json", include={"null", "batching"}),
        capacity_per_s=capacity,
        points=[asdict(point) for point in points],
        rounds=[asdict(point) for point in rounds],
    )
    about = f"Capacity is {capacity:.0f} rows a second: 2 ms a run and 1 ms a row, in batches of up to {MAX_ROWS}."
    report.write(report.RESULTS, options.name, record, f"{about}\n\n{table(points)}")
    lines = {
        name: [(p.load, p.goodput) for p in points if p.policy == name and p.deadlines == "equal"]
        for name in options.policies.split(";")
    }
    picture = chart.lines("Answers within 100 ms", "arrivals by capacity", "answers in time by capacity", lines)
    (report.RESULTS / f"{options.name}.svg").write_text(picture)


if __name__ == "__main__":
    main()
