"""The stages that `bench.profile` times."""

from __future__ import annotations

import functools
import importlib
import itertools

import pytest
from bench import stages


@pytest.mark.parametrize(
    "place", [place for places in stages.STAGES.values() for place in places if not place.startswith("_forno_envoy:")]
)
def test_each_stage_begins_where_it_says(place):
    module, _, path = place.partition(":")
    assert callable(functools.reduce(getattr, path.split("."), importlib.import_module(module)))


def test_a_stage_has_its_own_time_without_those_within(monkeypatch):
    outer, inner, *_ = stages.STAGES
    ticks = itertools.count(0, 10)  # each look at the clock takes 10 ns
    monkeypatch.setattr(stages.time, "perf_counter_ns", lambda: next(ticks))
    clock = stages.Clock()
    within = clock.timed(inner, lambda: 1)
    assert clock.timed(outer, lambda: within() + within())() == 2
    assert (clock.own_ns[inner], clock.calls[inner], clock.inner[inner]) == (20, 2, 0)
    assert (clock.own_ns[outer], clock.calls[outer], clock.inner[outer]) == (30, 1, 2)


def test_a_stage_that_raises_is_timed_and_left():
    stage = next(iter(stages.STAGES))
    clock = stages.Clock()
    failing = clock.timed(stage, lambda: 1 // 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            failing()
    assert (clock.calls[stage], clock.inner[stage]) == (2, 0)
