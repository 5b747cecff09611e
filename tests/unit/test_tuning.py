"""What the batcher chooses from what runs cost, on times that the tests make up."""

from __future__ import annotations

import random
import statistics
from typing import TYPE_CHECKING, Any

import pytest

from forno.server.config import BatchingSettings
from forno.server.request import Batch
from forno.server.tuning import Tuner

if TYPE_CHECKING:
    from collections.abc import Callable


def tuner(**settings: Any) -> Tuner:
    limits = BatchingSettings(**settings)
    return Tuner(limits, limits.max_rows)


def serve(made: Tuner, run_us: Callable[[int], float], runs: int = 3000, *, waiting: int = 1000) -> list[int]:
    """So many batches while so many rows wait; gives their sizes."""
    sizes = []
    for _ in range(runs):
        rows = made.limit(waiting)
        sizes.append(rows)
        made.ran(Batch([], rows, limit=rows), int(run_us(rows)), None)
    return sizes


@pytest.mark.parametrize(
    ("run_us", "least", "most"),
    [
        (lambda rows: 20_000 * rows, 1, 2),  # a row costs a row
        (lambda rows: 5_000 + rows, 32, 32),  # only the run costs
        (lambda rows: 1_000 * rows if rows <= 4 else 4_000 + 2_000 * (rows - 4), 1, 4),  # a cache grows too small
    ],
)
def test_the_cap_goes_where_rows_are_cheapest(run_us, least, most):
    made = tuner()
    sizes = serve(made, run_us)
    assert least <= sizes[-1] <= most


def test_the_cap_follows_a_change():
    made = tuner()
    serve(made, lambda rows: 20_000 * rows)
    assert made.cap <= 2
    serve(made, lambda rows: 2_000 + rows)
    assert made.cap >= 28


def test_trials_become_rare():
    sizes = serve(tuner(), lambda rows: 5_000 + rows, 4000)
    assert sum(size != 32 for size in sizes[1000:]) < 20


@pytest.mark.parametrize("settings", [{"max_rows": 16}, {"tune": "off"}])
def test_a_fixed_cap_stays(settings):
    made = tuner(**settings)
    serve(made, lambda rows: 20_000 * rows)
    assert made.cap == settings.get("max_rows", 32)


def test_a_latency_target_limits_the_rows_while_the_engine_keeps_up():
    made = tuner(latency_target_ms=10)
    made.begin([(rows, 1_000 + 500 * rows) for rows in (1, 2, 4, 8, 16, 32)] * 10)
    assert 4 <= made.cap < 16
    assert 2 * made.cost.typical_us(made.cap) <= 10_000
    assert made.limit(made.cap) == made.limit(20) == made.cap
    assert made.limit(200) > made.cap  # behind a backlog nobody is in time, so it goes the fastest way


@pytest.mark.parametrize("seed", range(20))
@pytest.mark.parametrize(("run_us", "row_us", "least"), [(2_000, 19_000, 2), (2_000, 100, 32), (30, 10, 8)])
def test_noise_does_not_lead_the_cap_astray(run_us, row_us, least, seed):
    source, made = random.Random(seed), tuner()

    def noisy(rows: int) -> float:
        us = (run_us + row_us * rows) * source.gauss(1, 0.05)
        return us * 3 if source.random() < 0.05 else us

    made.begin([(1, noisy(1)), (2, 3 * noisy(2))])  # the machine was busy
    sizes = serve(made, noisy, 600)
    assert statistics.median(sizes[300:]) >= least


def test_a_size_is_tried_only_where_so_many_rows_wait():
    made = tuner()
    made.begin([(1, 1000.0), (4, 1200.0), (8, 9000.0)])
    sizes = serve(made, lambda rows: 1000 + rows, 500, waiting=7)
    assert made.cap == 4
    assert max(sizes) == 4
