"""The store of metrics and its Prometheus text."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from bisect import bisect_left

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from forno.server.metrics import (
    DURATION_BOUNDS_US,
    HELP,
    OUTCOMES,
    ROW_BOUNDS,
    HistogramPoint,
    Metrics,
    Point,
)

times_us = st.integers(min_value=0, max_value=100_000_000)
batches = st.lists(
    st.tuples(st.lists(st.tuples(times_us, times_us), max_size=80), st.integers(1, 5000), times_us, st.booleans()),
    max_size=40,
)


def read(metrics: Metrics) -> dict[str, list[tuple[str, dict[str, str], float]]]:
    """Parse the text as Prometheus' own client does."""
    families = text_string_to_metric_families(metrics.prometheus().decode())
    return {f.name: [(s.name, s.labels, s.value) for s in f.samples] for f in families}


def points(metrics: Metrics, name: str) -> list[Point | HistogramPoint]:
    return next((list(family.points) for family in metrics.collect() if family.name == name), [])


@given(batches)
def test_histograms_equal_a_naive_recount(recorded):
    metrics = Metrics()
    model = metrics.model("digits", "1")
    seen = {"forno_request_queue_seconds": [], "forno_request_seconds": [], "forno_compute_seconds": []}
    seen["forno_batch_rows"] = []
    failures = 0
    for requests, rows, compute_us, failed in recorded:
        queue_us = [queue for queue, _ in requests]
        total_us = [total for _, total in requests]
        model.batch(queue_us, total_us, rows, compute_us, failed=failed)
        if failed:
            failures += len(requests)
            continue
        seen["forno_request_queue_seconds"] += queue_us
        seen["forno_request_seconds"] += total_us
        seen["forno_compute_seconds"].append(compute_us)
        seen["forno_batch_rows"].append(rows)
    for name, values in seen.items():
        bounds, scale = (ROW_BOUNDS, 1) if name == "forno_batch_rows" else (DURATION_BOUNDS_US, 1_000_000)
        expected = [0] * (len(bounds) + 1)
        for value in values:
            expected[bisect_left(bounds, value)] += 1
        (point,) = points(metrics, name)
        assert isinstance(point, HistogramPoint)
        assert list(point.counts) == expected
        assert point.count == len(values)
        assert point.sum == sum(values) / scale
        assert (point.min, point.max) == ((min(values) / scale, max(values) / scale) if values else (0, 0))
    assert model.outcomes["ok"] == len(seen["forno_request_seconds"])
    assert model.outcomes["failed"] == failures


def test_many_batches_are_folded_long_before_they_are_read():
    model = Metrics().model("digits", "1")
    for _ in range(10_000):
        model.batch([7], [9], 1, 3)
    assert max(len(h.pending) for h in (model.queue, model.total, model.compute, model.rows)) < 2000


def test_prometheus_reads_cumulative_buckets_sum_and_count():
    metrics = Metrics()
    metrics.model("digits", "1").batch([40, 60, 90_000_000], [50, 51, 90_000_001], 3, 1500)
    samples = read(metrics)["forno_request_queue_seconds"]
    buckets = {labels["le"]: value for name, labels, value in samples if name.endswith("_bucket")}
    assert buckets["5e-05"] == 1
    assert buckets["7.5e-05"] == 2
    assert buckets["60.0"] == 2
    assert buckets["+Inf"] == 3
    assert len(buckets) == len(DURATION_BOUNDS_US) + 1
    rest = {name: (labels, value) for name, labels, value in samples if not name.endswith("_bucket")}
    assert rest["forno_request_queue_seconds_sum"] == ({"model": "digits", "version": "1"}, 90.0001)
    assert rest["forno_request_queue_seconds_count"][1] == 3


def test_every_outcome_is_there_from_the_start_and_counts():
    metrics = Metrics()
    model = metrics.model("digits", "1")
    model.refused("overloaded", 3)
    model.refused("expired")
    model.batch([1], [2], 1, 1, failed=True)
    counted = {labels["outcome"]: value for _, labels, value in read(metrics)["forno_requests"]}
    assert counted == {**dict.fromkeys(OUTCOMES, 0), "overloaded": 3, "expired": 1, "failed": 1}


def test_an_unknown_reason_is_a_fault_of_ours():
    with pytest.raises(KeyError):
        Metrics().model("digits", "1").refused("tired")


def test_the_same_version_keeps_its_counts_when_loaded_again():
    metrics = Metrics()
    metrics.model("digits", "1").refused("invalid")
    metrics.model("digits", "1").refused("invalid")
    assert metrics.model("digits", "1").outcomes["invalid"] == 2
    assert metrics.model("digits", "2").outcomes["invalid"] == 0


@given(st.text(st.characters(codec="utf-8"), max_size=20), st.text(st.characters(codec="utf-8"), max_size=20))
def test_any_label_survives_the_text_format(name, version):
    metrics = Metrics()
    metrics.watch(lambda: [("forno_pending_rows", {"model": name, "version": version}, 4)])
    assert read(metrics)["forno_pending_rows"] == [("forno_pending_rows", {"model": name, "version": version}, 4.0)]


def test_gauges_are_read_at_each_scrape_and_grouped_by_name():
    metrics = Metrics()
    depths = [1.0, 2.0]
    for index in range(2):
        metrics.watch(
            lambda index=index: [
                ("forno_pending_rows", {"model": f"m{index}"}, depths[index]),
                ("forno_model_state", {"model": f"m{index}", "state": "ready"}, 1),
            ]
        )
    depths[1] = float("inf")
    text = metrics.prometheus().decode()
    assert text.count("# TYPE forno_pending_rows gauge") == 1
    assert text.count("# HELP forno_pending_rows") == 1
    assert [value for _, _, value in read(metrics)["forno_pending_rows"]] == [1.0, float("inf")]
    assert len(read(metrics)["forno_model_state"]) == 2


def test_calls_are_counted_by_method_and_status():
    metrics = Metrics()
    metrics.rpc("forno.v1.Predictor/Predict", "OK", 32)
    metrics.rpc("forno.v1.Predictor/Predict", "OK")
    metrics.rpc("forno.v1.Predictor/Predict", "NOT_FOUND")
    assert {labels["code"]: value for _, labels, value in read(metrics)["forno_rpcs"]} == {
        "OK": 33,
        "NOT_FOUND": 1,
    }


def test_invented_methods_do_not_fill_the_memory():
    metrics = Metrics()
    for index in range(5000):
        metrics.rpc(f"x/{index}", "UNIMPLEMENTED")
    samples = read(metrics)["forno_rpcs"]
    assert len(samples) < 1100
    assert sum(value for _, _, value in samples) == 5000


def test_the_process_is_described():
    samples = {name: found[0][2] for name, found in read(Metrics()).items()}
    assert samples["process_cpu_seconds"] > 0
    assert 1e6 < samples["process_resident_memory_bytes"] < 1e12
    assert 3 <= samples["process_open_fds"] <= 1e5
    assert time.time() - 86_400 < samples["process_start_time_seconds"] <= time.time() + 1


def test_all_names_have_a_help_text_and_follow_the_conventions():
    metrics = Metrics()
    metrics.model("digits", "1")
    metrics.rpc("a/b", "OK")
    for family in metrics.collect():
        assert family.name in HELP
        assert family.name.endswith("_total") == (family.kind == "counter")


def test_importing_it_loads_neither_opentelemetry_nor_grpc():
    program = """
import sys
import forno.server.logs, forno.server.metrics, forno.server.telemetry
print(sorted({name.partition(".")[0] for name in sys.modules} & {"opentelemetry", "grpc", "google"}))
"""
    ran = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        capture_output=True,
        text=True,
        check=True,
    )
    assert ran.stdout.strip() == "[]"
