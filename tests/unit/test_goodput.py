"""Answers in time under more load than the engine can carry, on made-up time, with and without disturbed runs."""

from __future__ import annotations

import random

import numpy as np
import pytest
from bench.simulation import Load, Simulation, noisy

MAX_ROWS = 32
SECONDS = 6


def capacity_per_s(run) -> float:
    source = random.Random(0)
    return MAX_ROWS * 1e6 / (sum(run(MAX_ROWS, source) for _ in range(2000)) / 2000)


@pytest.mark.parametrize("load", [1.5, 2.0, 3.0])
@pytest.mark.parametrize("deadlines_ms", [(100,), (60, 100, 200)], ids=["equal", "mixed"])
@pytest.mark.parametrize(("deviation", "hiccups", "least"), [(0.003, 0, 0.95), (0.05, 0, 0.95), (0.02, 0.02, 0.9)])
def test_overload_costs_next_to_nothing(load, deadlines_ms, deviation, hiccups, least):
    run = noisy(2_000, 1_000, deviation=deviation, hiccups=hiccups)
    arrivals = Load(rate_per_s=load * capacity_per_s(run), deadlines_ms=deadlines_ms)
    found = Simulation({"max_rows": MAX_ROWS}, run, arrivals, seed=3).run(SECONDS)
    assert found.in_time / SECONDS >= least * capacity_per_s(run)
    if not hiccups:
        assert np.percentile(found.used, 99) <= 1.0
