"""What metrics cost a call: the very recordings that the server makes, timed in this process.

Usage: python -m bench.metrics_cost

Every batch is recorded once, every call's status is counted. The time of both, for each call, is put beside
what a call costs the server in all (`bench/results/latest.json`, where there is one). A difference between a
server with and one without metrics would be smaller than the drift of a machine.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path

from forno.server.metrics import Metrics

CALLS = 200_000
REPEATS = 5
METHOD = "forno.v1.Predictor/Predict"
RESULTS = Path(__file__).parent / "results" / "latest.json"


def record_us_per_call(calls_per_batch: int) -> float:
    """Time of all recordings, for each call, best of a few repeats."""
    metrics = Metrics()
    model = metrics.model("tiny", "1")
    queue_us = [100 + number for number in range(calls_per_batch)]
    total_us = [200 + number for number in range(calls_per_batch)]
    batches = CALLS // calls_per_batch
    best_s = float("inf")
    for _ in range(REPEATS):
        began_s = time.perf_counter()
        for _ in range(batches):
            model.batch(queue_us, total_us, calls_per_batch, 50)
            for _ in range(calls_per_batch):
                metrics.rpc(METHOD, "OK")
        best_s = min(best_s, time.perf_counter() - began_s)
    return best_s * 1e6 / (batches * calls_per_batch)


def scrape_us(models: int) -> float:
    """Time to render the metrics of that many models, best of a few repeats."""
    metrics = Metrics()
    for number in range(models):
        metrics.model(f"model-{number}", "1").batch([100] * 512, [200] * 512, 512, 50)
    best_s = float("inf")
    for _ in range(REPEATS):
        began_s = time.perf_counter()
        metrics.prometheus()
        best_s = min(best_s, time.perf_counter() - began_s)
    return best_s * 1e6


def cpu_us_per_call() -> dict[int, float]:
    """Server CPU of a call by calls in flight, as last measured; empty without a measurement."""
    if not RESULTS.exists():
        return {}
    rows = json.loads(RESULTS.read_text())["summary"]
    return {row["in_flight"]: row["cpu_us_per_call"] for row in rows if row["subject"] == "forno"}


def main() -> int:
    """Measures and prints.

    Returns:
        Exit status 0.
    """
    whole_us = cpu_us_per_call()
    for calls_per_batch in (1, 16, 64):
        cost_us = record_us_per_call(calls_per_batch)
        text = f"{calls_per_batch:>3} calls a batch: {cost_us:.3f} us a call"
        if calls_per_batch in whole_us:
            share = cost_us / whole_us[calls_per_batch]
            text += f", {share:.2%} of the {whole_us[calls_per_batch]:.1f} us that a call costs the server"
        print(text)
    for models in (1, 20):
        print(f"a scrape of {models} models: {scrape_us(models):.0f} us")
    return 0


if __name__ == "__main__":
    sys.exit(main())
