"""What metrics cost a call: the very recordings that the server makes, timed in this process.

Usage: python -m bench.metrics_cost

Every batch is recorded once, every call's status is counted. The time of both, for each call, is put beside
what a call costs the server in all, as `results/tiny.json` has it. A difference between a server with and one without
metrics would be smaller than the drift of a machine. Writes results/metrics_cost.json and results/metrics_cost.md.
"""

from __future__ import annotations

import json
import sys
import time

from bench import report
from forno.server.metrics import Metrics

CALLS = 200_000
REPEATS = 5
METHOD = "forno.v1.Predictor/Predict"


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
    """Server CPU of a call by calls in flight, as last measured."""
    rows = json.loads((report.RESULTS / "tiny.json").read_text())["summary"]
    return {row["in_flight"]: row["cpu_us_per_call"] for row in rows if row["subject"] == "forno"}


def main() -> int:
    """Measures and writes.

    Returns:
        Exit status 0.
    """
    whole_us = cpu_us_per_call()
    lines = [
        "| calls a batch | recording, us a call | what a call costs the server, us | share |",
        "| --- | --- | --- | --- |",
    ]
    records: list[report.Record] = []
    for calls in sorted(whole_us):
        cost_us = record_us_per_call(calls)
        records.append({"calls_a_batch": calls, "recording_us": round(cost_us, 3), "call_us": whole_us[calls]})
        lines.append(f"| {calls} | {cost_us:.3f} | {whole_us[calls]:.1f} | {cost_us / whole_us[calls]:.2%} |")
    scrapes_us = {models: round(scrape_us(models)) for models in (1, 20)}
    lines += ["", *[f"A scrape of {models} models: {took_us} us." for models, took_us in scrapes_us.items()]]
    facts = report.facts(
        "bench.metrics_cost",
        f"in process, {CALLS:,} calls, best of {REPEATS}; what a call costs is that of results/tiny.json",
        records=records,
        scrapes_us=scrapes_us,
    )
    text = "\n".join(lines)
    report.write(report.RESULTS, "metrics_cost", facts, text)
    print(text)
    return 0


if __name__ == "__main__":
    sys.exit(main())
