"""What the batcher itself costs a request: taken in, put into a batch, its run learned from. No loop, no engine.

Usage: python -m bench.policy

Requests of one row come in bursts of 8, 32 and 128 to a batcher with at most 32 rows a run, without deadlines, with
equal ones and with random ones. The least time of many repetitions is shown, since all else is other work.
"""

from __future__ import annotations

import argparse
import random
import time
from typing import TYPE_CHECKING

import numpy as np

from bench import report
from forno.server.batcher import Batcher
from forno.server.config import BatchingSettings
from forno.server.request import NEVER_US, Request

if TYPE_CHECKING:
    from collections.abc import Callable

BURSTS = (8, 32, 128)
BATCHES = 200
RUN_US, ROW_US = 2_000, 10
ROW = np.zeros((1, 64), np.float32)


class _Reply:
    """A future that nobody cancels."""

    def done(self) -> bool:
        return False


def deadlines(kind: str) -> Callable[[int], int]:
    """When a request that comes then expires."""
    source = random.Random(0)  # noqa: S311  (arrivals, not secrets)
    return {
        "none": lambda _now_us: NEVER_US,
        "equal": lambda now_us: now_us + 1_000_000,
        "random": lambda now_us: now_us + source.randrange(500_000, 2_000_000),
    }[kind]


def once_us(kind: str, burst: int, max_rows: int) -> float:
    """Microseconds a request, of so many batches."""
    batcher = Batcher(BatchingSettings(), max_rows, by_shape=False, refused=lambda _why, _count: None)
    reply, now_us, spent_ns, count = _Reply(), 1_000_000, 0, 0
    expires_us = deadlines(kind)
    for _ in range(BATCHES):
        now_us += 50
        requests = [
            Request((ROW,), 1, _nothing, reply, now_us, expires_us(now_us))  # type: ignore[arg-type]
            for _ in range(burst)
        ]
        began_ns = time.perf_counter_ns()
        for request in requests:
            batcher.submit(request)
        while (batch := batcher.try_close(now_us)) is not None:
            run_us = RUN_US + ROW_US * batch.rows
            batcher.expect([(batch, now_us)], now_us)
            now_us += run_us
            batcher.ran(batch, run_us, now_us)
            batcher.expect([], now_us)
        spent_ns += time.perf_counter_ns() - began_ns
        count += burst
        now_us += 10_000  # callers that come at random are waited for by nobody
    return spent_ns / 1000 / count


def _nothing(_answer: object) -> None:
    return None


def main() -> None:
    """Measures and writes."""
    parser = argparse.ArgumentParser("python -m bench.policy", description=__doc__.partition("\n")[0])
    parser.add_argument("--repeat", type=int, default=15)
    parser.add_argument("--name", default="policy")
    options = parser.parse_args()
    found = [
        {
            "deadlines": kind,
            "burst": burst,
            "us_per_request": min(once_us(kind, burst, 32) for _ in range(options.repeat)),
        }
        for kind in ("none", "equal", "random")
        for burst in BURSTS
    ]
    lines = ["| deadlines | requests at once | us a request |", "| --- | ---: | ---: |"]
    lines += [f"| {each['deadlines']} | {each['burst']} | {each['us_per_request']:.2f} |" for each in found]
    facts = report.facts(
        "bench.policy",
        f"least of {options.repeat} repetitions of {BATCHES} bursts",
        summary=found,
    )
    report.write(report.RESULTS, options.name, facts, "\n".join(lines))
    print("\n".join(lines))


if __name__ == "__main__":
    main()
