"""A request that waits alone takes a shorter way through the batcher; nothing that can be seen of it may differ."""

from __future__ import annotations

import asyncio
from collections import Counter

from hypothesis import example, given, settings
from hypothesis import strategies as st
from tests.unit import puppets

from forno.server.batcher import Batcher
from forno.server.config import BatchingSettings
from forno.server.errors import FornoError
from forno.server.request import NEVER_US

SUBMIT = st.tuples(
    st.just("submit"),
    st.sampled_from([1, 1, 1, 2, 5]),  # rows
    st.sampled_from([None, None, 0, 40, 150, 400, 5_000, 10**6]),  # time that it has
    st.sampled_from([2, 2, 3]),  # width of its rows
    st.sampled_from([0, 0, 1, -1]),  # priority
)
CLOSE = st.tuples(st.just("close"), st.booleans(), st.sampled_from([50, 90, 200, 900]))  # only full; what a run takes
OTHERS = st.sampled_from([("cancel", 0), ("cancel", 1), ("ask",), ("expire",), ("wait", 60), ("wait", 300)])
STEPS = st.lists(st.one_of(SUBMIT, CLOSE, OTHERS), min_size=10, max_size=40)


class Grouped(Batcher):
    """Has every request wait in a group, and every deadline looked at closely."""

    def submit(self, request):
        super().submit(request)
        self._group_the_lone()

    def _has_ample_time(self, request, tuner, now_us):
        return False


class Played:
    """One batcher, and what is seen of it while the steps are played."""

    def __init__(self, kind, loop, by_shape, limits, samples=((1, 100.0), (4, 130.0))):
        self.seen = []
        self.counts = Counter()
        self._loop = loop
        self._requests = []
        self._policy = kind(
            limits,
            limits.max_rows,
            by_shape=by_shape,
            refused=lambda why, count: self.counts.update({why: count}),
            samples=samples,
        )

    def step(self, now_us, what, *values):
        policy = self._policy
        if what == "submit":
            self._submit(now_us, *values)
        elif what == "close":
            only_full, run_us = values
            batch = policy.try_close(now_us, only_full=only_full)
            self.seen.append(batch and ([self._requests.index(each) for each in batch.requests], batch.limit))
            if batch:
                for each in batch.requests:
                    each.future.cancel()
                policy.ran(batch, run_us, now_us + run_us)
        elif what == "cancel" and values[0] < len(self._requests):
            self._requests[-1 - values[0]].future.cancel()
        elif what == "ask":
            self.seen.append((policy.next_close_us(), policy.next_expiry_us(), policy.statistics()))
        elif what == "expire":
            policy.expire(now_us)
        told = [
            type(each.future.exception()).__name__
            for each in self._requests
            if each.future.done() and not each.future.cancelled()
        ]
        self.seen.append((policy.pending_requests, policy.pending_rows, told, dict(self.counts)))

    def _submit(self, now_us, rows, time_us, width, priority):
        one = puppets.request(
            self._loop,
            rows=rows,
            width=width,
            arrived_us=now_us,
            expires_us=NEVER_US if time_us is None else now_us + time_us,
            priority=priority,
        )
        self._requests.append(one)
        try:
            self._policy.submit(one)
        except FornoError as error:
            self.seen.append((type(error).__name__, str(error)))


@settings(max_examples=400, deadline=None)
@given(
    steps=STEPS,
    by_shape=st.booleans(),
    limits=st.fixed_dictionaries({"max_rows": st.sampled_from([1, 4, 8])}, optional={"max_delay_us": st.just(300)}),
)
@example(steps=[("submit", 1, None, 2, 0), ("cancel", 0), ("close", False, 50)], by_shape=False, limits={"max_rows": 4})
@example(steps=[("submit", 1, 40, 2, 0), ("wait", 60), ("close", False, 50)], by_shape=True, limits={"max_rows": 4})
def test_nothing_differs_for_a_request_that_waits_alone(steps, by_shape, limits):
    loop = asyncio.new_event_loop()
    try:
        both = [Played(kind, loop, by_shape, BatchingSettings(**limits)) for kind in (Batcher, Grouped)]
        now_us = 1_000_000
        for what, *values in steps:
            now_us += values[0] if what == "wait" else 7
            for played in both:
                played.step(now_us, what, *values)
            assert both[0].seen == both[1].seen
    finally:
        loop.close()


def test_a_lone_caller_waits_for_those_who_come_back():
    loop = asyncio.new_event_loop()
    try:
        samples = [(rows, 4_000.0 + rows) for rows in (1, 4, 8)]
        both = [Played(kind, loop, False, BatchingSettings(max_rows=8), samples) for kind in (Batcher, Grouped)]
        now_us = 1_000_000
        for _ in range(30):  # all eight are answered, and come back one after another
            for played in both:
                played.step(now_us, "submit", 1, None, 2, 0)
                played.step(now_us, "close", False, 4_000)
                for _ in range(7):
                    played.step(now_us + 300, "submit", 1, None, 2, 0)
                played.step(now_us + 300, "close", False, 4_000)
            now_us += 4_300
        assert both[0].seen == both[1].seen
        assert None in both[0].seen  # somebody was made to wait
    finally:
        loop.close()
