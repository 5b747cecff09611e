"""What the response cache costs a miss and saves a hit, in process: no transport, a real model.

Usage: python -m bench.cache

Each input is asked for once of a model without cache, once of one with it (a miss), and again (a hit), in turn.
Writes results/cache.json and results/cache.md.
"""

from __future__ import annotations

import argparse
import asyncio
import statistics
import sys
import time
from typing import TYPE_CHECKING, Any

from bench import models, report
from forno.server.cache import CachedModel, key_of
from forno.server.config import CacheSettings, ModelSettings
from forno.server.endpoints import call
from forno.server.metrics import ModelMetrics
from forno.server.model import Model

if TYPE_CHECKING:
    from collections.abc import Callable

    import numpy as np

    Array = np.ndarray[Any, np.dtype[Any]]

SETTINGS = ModelSettings(cache=CacheSettings(max_bytes=64 << 20))
INPUTS = {"tiny": 2000, "resnet50": 25}


def timed_us(work: Callable[[], object]) -> float:
    """Time of one piece of work."""
    began_ns = time.perf_counter_ns()
    work()
    return (time.perf_counter_ns() - began_ns) / 1000


async def asked_us(model: Model, x: Array) -> float:
    """Time from a request's arrays to its answer's."""
    began_ns = time.perf_counter_ns()
    await call(model, {"x": x})
    return (time.perf_counter_ns() - began_ns) / 1000


async def measure(name: str) -> report.Record:
    """Medians of one model, in microseconds."""
    path = models.path_of(name)
    plain = Model(name, "1", path, ModelSettings(), ModelMetrics(name, "1"))
    cached = CachedModel(name, "1", path, SETTINGS, ModelMetrics(name, "1"))
    await plain.load()
    await cached.load()
    times_us: dict[str, list[float]] = {"plain": [], "miss": [], "hit": [], "key": []}
    for seed in range(INPUTS[name]):
        x = models.rows_of(name, 1, seed)
        pair = [("plain", plain), ("miss", cached)]
        for which, model in pair if seed % 2 else reversed(pair):
            times_us[which].append(await asked_us(model, x))
        times_us["hit"].append(await asked_us(cached, x))
        times_us["key"].append(timed_us(lambda x=x: key_of(str(cached), (x,))))  # type: ignore[misc]
    counted = cached.cache
    found: report.Record = {
        "model": name,
        "input_bytes": x.nbytes,
        "kept_bytes_an_answer": round(counted.kept_bytes / len(counted)),
        "inputs": INPUTS[name],
        **{f"{which}_us": round(statistics.median(values), 1) for which, values in times_us.items()},
    }
    await plain.close(1)
    await cached.close(1)
    return found


def table(records: list[report.Record]) -> str:
    """The figures as Markdown."""
    lines = [
        "Median time from a request's arrays to its answer's, one at a time; `key` is the part that hashes.\n",
        "| model | input bytes | without cache, us | miss, us | hit, us | key, us | a hit is faster by |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    lines += [
        f"| {row['model']} | {row['input_bytes']:,} | {row['plain_us']:,} | {row['miss_us']:,} | {row['hit_us']:,} "
        f"| {row['key_us']:,} | {row['plain_us'] / row['hit_us']:.1f}x |"
        for row in records
    ]
    return "\n".join(lines)


def main() -> int:
    """Measures and writes.

    Returns:
        Exit status 0.
    """
    argparse.ArgumentParser("python -m bench.cache", description=__doc__.partition("\n")[0]).parse_args()
    records = [asyncio.run(measure(name)) for name in INPUTS]
    facts = report.facts(
        "bench.cache",
        "in process, one request at a time, medians",
        records=records,
    )
    text = table(records)
    report.write(report.RESULTS, "cache", facts, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
