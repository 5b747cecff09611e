"""The measured cost of runs."""

from __future__ import annotations

import random
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from forno.server.cost import Cost, steps


def test_steps_tell_few_rows_apart_exactly_and_many_by_quarters():
    assert steps(1) == [1]
    assert steps(5) == [1, 2, 3, 4, 5]
    assert steps(32) == [1, 2, 3, 4, 5, 6, 7, 8, 10, 12, 14, 16, 20, 24, 28, 32]
    assert len(steps(65536)) < 64


def test_nothing_is_known_before_the_first_run():
    cost = Cost(8)
    assert not cost.known
    assert cost.typical_us(8) == cost.safe_us(1) == cost.drain_us(100, 8) == 0


def test_what_was_never_run_is_drawn_from_its_neighbours():
    cost = Cost(32)
    cost.learn(2, 100)
    cost.learn(8, 400)
    assert cost.typical_us(1) == 100
    assert cost.typical_us(5) == pytest.approx(250)
    assert cost.typical_us(32) == pytest.approx(1600)


def test_few_samples_leave_a_wide_margin_that_many_make_small():
    cost = Cost(4)
    cost.learn(4, 1000)
    assert cost.safe_us(4) > 2000
    for _ in range(100):
        cost.learn(4, 1000)
    assert 1000 <= cost.safe_us(4) < 1050


def test_the_margin_covers_the_noise():
    source, cost = random.Random(1), Cost(4)
    for _ in range(1000):
        cost.learn(3, source.gauss(1000, 50))
    over = sum(source.gauss(1000, 50) > cost.safe_us(3) for _ in range(1000))
    assert over < 50
    assert cost.safe_us(3) < 1300


def test_one_hiccup_changes_little_and_a_new_speed_all():
    cost = Cost(8)
    for _ in range(50):
        cost.learn(1, 100)
        cost.learn(8, 500)
    cost.learn(1, 100_000)
    assert cost.typical_us(1) < 120
    for _ in range(200):
        cost.learn(1, 300)
    assert cost.typical_us(1) == pytest.approx(300, rel=0.05)
    assert cost.typical_us(8) > 750  # the machine is slower: that holds for what did not run, too


def test_a_hiccup_in_the_first_run_of_a_count_is_not_taken_at_its_word():
    cost = Cost(32)
    for _ in range(20):
        cost.learn(1, 1_000)
        cost.learn(32, 32_000)
    cost.learn(16, 200_000)
    assert cost.typical_us(16) < 25_000


def test_a_queue_drains_in_full_batches_and_a_rest():
    cost = Cost(4)
    for rows, run_us in ((1, 100), (4, 200)):
        cost.learn(rows, run_us)
    assert cost.drain_us(9, 4) == 500
    assert cost.drain_us(0, 4) == 0


@given(st.lists(st.tuples(st.integers(1, 40), st.integers(0, 100_000)), min_size=1, max_size=50))
def test_more_rows_never_cost_less_and_safe_is_never_below_typical(runs):
    cost = Cost(40)
    for rows, run_us in runs:
        cost.learn(rows, run_us)
    typical = [cost.typical_us(rows) for rows in range(1, 41)]
    safe = [cost.safe_us(rows) for rows in range(1, 41)]
    assert all(few <= many for few, many in pairwise(typical))
    assert all(few <= many for few, many in pairwise(safe))
    assert all(one <= other for one, other in zip(typical, safe, strict=True))


@given(st.lists(st.tuples(st.integers(1, 32), st.floats(1, 1e6)), max_size=40))
def test_one_row_costs_what_the_table_says(runs):
    cost = Cost(32)
    for rows, run_us in runs:
        cost.learn(rows, run_us)
    assert cost.one_row_us() == cost.typical_us(1)
