"""What the batcher chooses from what runs cost, on times that the tests make up."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import pytest

from forno.server.config import BatchingSettings
from forno.server.tuning import Tuner

if TYPE_CHECKING:
    from collections.abc import Callable


def tuner(**settings: Any) -> Tuner:
    limits = BatchingSettings(**settings)
    return Tuner(limits, limits.max_rows)


def serve(made: Tuner, run_us: Callable[[int], float], runs: int = 3000, *, gap_us: int = 1) -> list[int]:
    """So many full batches, rows arriving `gap_us` apart; gives their sizes."""
    sizes, now_us = [], 1
    for _ in range(runs):
        rows = made.cap
        now_us += rows * gap_us
        sizes.append(rows)
        made.ran(rows, int(run_us(rows)), now_us)
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


def test_a_latency_target_limits_the_rows():
    made = tuner(latency_target_ms=10)
    serve(made, lambda rows: 1_000 + 500 * rows)
    assert 2 * made.cost.typical_us(made.cap) <= 10_000
    assert made.cap >= 4


def test_nobody_waits_without_a_latency_target():
    made = tuner()
    serve(made, lambda rows: 5_000 + rows, gap_us=1000)
    assert made.delay_us == 0


def test_with_a_latency_target_requests_wait_for_company_where_it_pays():
    busy, idle, linear, given = (
        tuner(latency_target_ms=50),
        tuner(latency_target_ms=50),
        tuner(latency_target_ms=50),
        tuner(latency_target_ms=50, max_delay_us=7),
    )
    serve(busy, lambda rows: 1_000 + rows, gap_us=800)
    serve(idle, lambda rows: 1_000 + rows, gap_us=100_000)
    serve(linear, lambda rows: 5_000 * rows, gap_us=800)
    serve(given, lambda rows: 1_000 + rows, gap_us=800)
    assert 10_000 < busy.delay_us < 50_000
    assert idle.delay_us == linear.delay_us == 0
    assert given.delay_us == 7
