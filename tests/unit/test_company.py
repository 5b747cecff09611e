"""Who is waited for: callers that were just answered and come back at once, and nobody else."""

from __future__ import annotations

import pytest
from bench.simulation import Load, Simulation, noisy

from forno.server.company import Company
from forno.server.cost import Cost
from forno.server.request import Batch, Request


def flat(rows: int = 32) -> Cost:
    """A run costs 4 ms, a row next to nothing."""
    cost = Cost(rows)
    for count in (1, 8, 32):
        cost.learn(count, 4_000 + count)
    return cost


def batch(*arrived_us: int) -> Batch:
    return Batch([Request((), 1, print, None, each) for each in arrived_us], len(arrived_us))  # type: ignore[arg-type]


def serve(company: Company, cost: Cost, back_us: int, callers: int = 8, runs: int = 30) -> None:
    """Runs of all callers, each of whom asks again so long after a run."""
    now_us = 10_000
    for _ in range(runs):
        ended_us = now_us + 4_000
        company.ran(batch(*[now_us - 4_000 + back_us] * callers), ended_us - 4_000, 0, cost)
        now_us = ended_us


def test_callers_who_come_back_at_once_are_waited_for():
    company, cost = Company(), flat()
    serve(company, cost, back_us=300)
    assert company.rows == 8
    assert company.delay_us == pytest.approx(1_000, abs=10)


@pytest.mark.parametrize(
    ("callers", "back_us", "cost"),
    [
        (1, 300, flat()),  # alone: there is nobody to wait for
        (8, 2_000, flat()),  # they think first
    ],
)
def test_nobody_else_is(callers, back_us, cost):
    company = Company()
    serve(company, cost, back_us, callers)
    assert company.rows == company.delay_us == 0


def test_nobody_is_waited_for_where_running_together_saves_nothing():
    cost = Cost(32)
    for count in (1, 8, 32):
        cost.learn(count, 4_000 * count)
    company = Company()
    serve(company, cost, back_us=300)
    assert company.rows == 0


@pytest.mark.parametrize("callers", [2, 8, 32])
def test_a_fixed_number_of_callers_stays_in_step(callers):
    """Without it one runs alone, then all others: half of the rate where only runs cost."""
    load = Load(in_air=callers, think_us=100)
    samples = [(rows, 5_000.0 + 10 * rows) for rows in (1, 2, 4, 8, 16, 32) for _ in range(5)]
    waits = Simulation({}, noisy(5_000, 10), load, samples=samples).run(3)
    never = Simulation({"max_delay_us": 0}, noisy(5_000, 10), load, samples=samples).run(3)
    assert waits.answers_per_s > 1.7 * never.answers_per_s


@pytest.mark.parametrize("share", [0.1, 0.5, 0.8])
def test_calls_at_random_wait_no_longer_for_it(share):
    load = Load(rate_per_s=share * 32 / 5_320e-6)
    samples = [(rows, 5_000.0 + 10 * rows) for rows in (1, 2, 4, 8, 16, 32) for _ in range(5)]
    took = [
        sum(found.took_us) / found.answers
        for found in (
            Simulation(settings, noisy(5_000, 10), load, samples=samples).run(4)
            for settings in ({"max_rows": 32}, {"max_rows": 32, "max_delay_us": 0})
        )
    ]
    assert took[0] < 1.05 * took[1]


@pytest.mark.parametrize("think_us", [0, 100, 3_000])
def test_one_caller_never_waits(think_us):
    load = Load(in_air=1, think_us=think_us)
    waits, never = [Simulation(settings, noisy(3_000, 10), load).run(3) for settings in ({}, {"max_delay_us": 0})]
    assert sum(waits.took_us) / waits.answers == pytest.approx(sum(never.took_us) / never.answers, rel=0.005)
