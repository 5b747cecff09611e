"""The batching policy, on times that the tests make up."""

from __future__ import annotations

import asyncio
from collections import Counter
from contextlib import suppress
from functools import partial
from typing import TYPE_CHECKING, Any

import pytest
from tests.unit import puppets

from forno.server.batcher import Batcher
from forno.server.config import BatchingSettings
from forno.server.errors import DeadlineExceeded, InvalidArgument, Overloaded
from forno.server.request import Batch

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from forno.server.request import Request


@pytest.fixture
def make() -> Iterator[Callable[..., Request]]:
    loop = asyncio.new_event_loop()
    yield partial(puppets.request, loop)
    loop.close()


def batcher(
    *, by_shape: bool = True, instances: int = 1, refused: Counter[str] | None = None, **settings: Any
) -> Batcher:
    counts = Counter() if refused is None else refused
    limits = BatchingSettings(**settings)
    return Batcher(
        limits,
        limits.max_rows,
        by_shape=by_shape,
        instances=instances,
        refused=lambda why, count: counts.update({why: count}),
    )


def test_nothing_waits_in_an_empty_batcher():
    policy = batcher()
    assert policy.try_close(0) is None
    assert policy.next_close_us() is None
    assert policy.next_expiry_us() is None


def test_a_free_engine_never_waits_without_a_delay(make):
    policy = batcher()
    policy.submit(make())
    assert policy.next_close_us() == 0
    batch = policy.try_close(5)
    assert (batch.rows, batch.closed_us) == (1, 5)
    assert policy.statistics().pending_requests == policy.pending_rows == 0


def test_requests_leave_in_the_order_of_their_arrival_up_to_max_rows(make):
    policy = batcher(max_rows=4)
    waiting = [make(rows=rows) for rows in (2, 1, 2, 1)]
    for each in waiting:
        policy.submit(each)
    assert policy.try_close(1).requests == waiting[:2]  # the third does not fit, and the fourth does not overtake it
    assert policy.try_close(1).requests == waiting[2:]


def test_a_higher_priority_goes_first(make):
    policy = batcher(max_rows=2)
    low, also_low, high = make(priority=-1), make(priority=-1), make(priority=7)
    for each in (low, also_low, high):
        policy.submit(each)
    assert policy.try_close(1).requests == [high, low]
    assert policy.try_close(1).requests == [also_low]


def test_shapes_batch_apart_and_the_earlier_goes_first(make):
    policy = batcher()
    narrow, wide, also_narrow = make(arrived_us=1), make(width=3, arrived_us=2), make(arrived_us=3)
    for each in (narrow, wide, also_narrow):
        policy.submit(each)
    assert policy.statistics().shapes == 2
    assert policy.try_close(4).requests == [narrow, also_narrow]
    assert policy.try_close(4).requests == [wide]


def test_a_full_shape_does_not_wait_for_one_that_is_not(make):
    policy = batcher(max_rows=2, max_delay_us=100)
    policy.submit(make(width=3, arrived_us=1))
    for _ in range(2):
        policy.submit(make(arrived_us=2))
    assert policy.try_close(3).rows == 2
    assert policy.try_close(3) is None
    assert policy.next_close_us() == 101


def test_a_batch_waits_for_company_no_longer_than_the_delay(make):
    policy = batcher(max_delay_us=100)
    policy.submit(make(arrived_us=10))
    policy.submit(make(arrived_us=60))
    assert policy.next_close_us() == 110
    assert policy.try_close(109) is None
    assert policy.try_close(110).rows == 2


def test_what_is_left_of_a_full_group_waits_from_its_own_arrival(make):
    policy = batcher(max_rows=2, max_delay_us=100)
    for arrived_us in (10, 20, 30):
        policy.submit(make(arrived_us=arrived_us))
    assert policy.try_close(40).rows == 2
    assert policy.try_close(40) is None
    assert policy.next_close_us() == 130


def test_a_low_priority_waits_no_longer_than_the_delay_either(make):
    policy = batcher(max_delay_us=100)
    policy.submit(make(arrived_us=10, priority=0))
    policy.submit(make(arrived_us=90, priority=9))
    assert policy.try_close(110).rows == 2


def test_a_request_that_would_expire_waits_for_half_its_time(make):
    policy = batcher(max_delay_us=1000)
    policy.submit(make(arrived_us=10, expires_us=210))
    assert policy.next_close_us() == 110


def test_after_hurry_nothing_waits(make):
    policy = batcher(max_delay_us=1000)
    policy.submit(make())
    policy.hurry()
    policy.submit(make())
    assert policy.try_close(2).rows == 2


def test_each_request_is_its_own_batch_where_rows_do_not_group(make):
    policy = Batcher(BatchingSettings(max_delay_us=1000), 1, by_shape=False, refused=lambda _why, _count: None)
    policy.submit(make())
    policy.submit(make(width=5))
    assert [policy.try_close(1).rows, policy.try_close(1).rows] == [1, 1]


def test_too_many_rows_for_a_batch_are_refused_with_the_limit(make):
    with pytest.raises(InvalidArgument, match=r"5 rows.*at most 4.*batching\.max_rows"):
        batcher(max_rows=4).submit(make(rows=5))


def test_a_request_without_time_is_refused(make):
    refused: Counter[str] = Counter()
    with pytest.raises(DeadlineExceeded, match="did not run"):
        batcher(refused=refused).submit(make(arrived_us=10, expires_us=10))
    assert refused == {"expired": 1}


def test_the_bound_holds_and_its_name_is_told(make):
    refused: Counter[str] = Counter()
    policy = batcher(max_rows=4, max_pending_rows=6, refused=refused)
    policy.submit(make(rows=4))
    policy.submit(make(rows=2))
    with pytest.raises(Overloaded, match=r"6 rows wait already, and 1 more .*batching\.max_pending_rows = 6"):
        policy.submit(make())
    assert policy.pending_rows == 6
    assert refused == {"overloaded": 1}


def test_a_single_larger_request_enters_an_empty_queue_only(make):
    policy = batcher(max_rows=8, max_pending_rows=4)
    policy.submit(make(rows=8))
    with pytest.raises(Overloaded):
        policy.submit(make())


def test_cancelled_and_expired_requests_make_room(make):
    refused: Counter[str] = Counter()
    policy = batcher(max_pending_rows=3, refused=refused)
    cancelled, expired, kept = make(), make(arrived_us=1, expires_us=50), make()
    for each in (cancelled, expired, kept):
        policy.submit(each)
    cancelled.future.cancel()
    late = [make(arrived_us=60), make(arrived_us=60)]
    for each in late:
        policy.submit(each)
    assert refused == {"cancelled": 1, "expired": 1}
    assert policy.try_close(61).requests == [kept, *late]


def test_a_long_full_queue_is_not_searched_for_each_refusal(make):
    policy = batcher(max_pending_rows=64)
    waiting = [make() for _ in range(64)]
    for each in waiting:
        policy.submit(each)
    with pytest.raises(Overloaded):
        policy.submit(make())
    waiting[0].future.cancel()
    refusals = 0
    for _ in range(64):
        try:
            policy.submit(make())
        except Overloaded:
            refusals += 1
    assert refusals < 64
    assert policy.pending_rows == 64


def test_cancelled_and_expired_requests_never_leave_in_a_batch(make):
    refused: Counter[str] = Counter()
    policy = batcher(refused=refused)
    cancelled, expired, kept = make(), make(expires_us=50), make(expires_us=51)
    for each in (cancelled, expired, kept):
        policy.submit(each)
    cancelled.future.cancel()
    assert policy.try_close(50).requests == [kept]
    assert refused == {"cancelled": 1, "expired": 1}
    with pytest.raises(DeadlineExceeded, match="after 49 us in the queue"):
        expired.future.result()


def test_a_queue_of_the_dead_gives_no_batch(make):
    policy = batcher()
    for width in (1, 2, 3):
        dead = make(width=width)
        policy.submit(dead)
        dead.future.cancel()
    assert policy.try_close(1) is None
    assert policy.statistics().pending_requests == policy.pending_rows == policy.statistics().shapes == 0


def test_requests_expire_while_they_wait(make):
    policy = batcher(max_delay_us=1000)
    soon, later = make(expires_us=50), make(width=3, expires_us=80)
    for each in (later, soon):
        policy.submit(each)
    assert policy.next_expiry_us() == 50
    policy.expire(49)
    assert policy.pending_requests == 2
    policy.expire(50)
    assert isinstance(soon.future.exception(), DeadlineExceeded)
    assert not later.future.done()
    assert policy.next_expiry_us() == 80
    policy.expire(80)
    assert isinstance(later.future.exception(), DeadlineExceeded)
    assert policy.pending_rows == 0
    assert policy.next_close_us() is policy.next_expiry_us() is None


def test_take_all_empties_the_queue(make):
    policy = batcher()
    waiting = [make(width=width, priority=width) for width in (1, 2, 2)]
    for each in waiting:
        policy.submit(each)
    assert set(policy.take_all()) == set(waiting)
    assert policy.pending_rows == 0
    assert policy.try_close(9) is None


def known(policy: Batcher, run_us: int, *row_counts: int) -> Batcher:
    """Has the policy know what runs take: as long for one row as for many."""
    tuner = policy._tuner_of(((2,),))
    for rows in row_counts or (1, 32):
        for _ in range(100):
            tuner.cost.learn(rows, run_us)
    policy._tuner, policy._ran_us = tuner, 1
    return policy


def test_the_soonest_deadline_goes_first_and_none_counts_as_a_far_one(make):
    policy = batcher(max_rows=1)
    order = [
        make(),
        make(expires_us=900_000),
        make(expires_us=500_000),
        make(arrived_us=2, expires_us=90_000_000),
        make(arrived_us=3),
    ]
    for each in order:
        policy.submit(each)
    got = [policy.try_close(1).requests[0] for _ in order]
    assert got == [order[2], order[1], order[0], order[3], order[4]]


def test_a_low_priority_is_promoted_after_its_time(make):
    policy = batcher(max_rows=1, promote_after_ms=1)
    low = make(priority=-1, arrived_us=10)
    policy.submit(low)
    for _ in range(3):
        policy.submit(make(priority=5, arrived_us=900))
    assert policy.try_close(1009).requests[0].priority == 5
    assert policy.try_close(1010).requests == [low]


def test_a_starved_shape_goes_before_a_higher_priority(make):
    policy = batcher(max_rows=1, promote_after_ms=1)
    low = make(priority=-1, arrived_us=10, width=3)
    policy.submit(low)
    policy.submit(make(priority=5, arrived_us=900))
    assert policy.try_close(1010).requests == [low]


def test_a_row_that_would_make_a_member_late_is_left_for_the_next_batch(make):
    policy = batcher(max_rows=32)
    tuner = policy._tuner_of(((2,),))
    for _ in range(100):
        for rows in (1, 2, 4, 8):
            tuner.cost.learn(rows, rows * 1000)
    policy._ran_us = 1
    waiting = [make(expires_us=4_600), *[make(expires_us=50_000) for _ in range(6)]]
    for each in waiting:
        policy.submit(each)
    assert policy.try_close(1).requests == waiting[:4]
    assert policy.try_close(4_001).requests == waiting[4:]


def test_an_impossible_deadline_is_refused_with_when_to_come_again(make):
    refused: Counter[str] = Counter()
    policy = known(batcher(max_rows=1, refused=refused), 1000, 1)
    for _ in range(10):
        policy.submit(make())
    policy.free_us = 2_000
    policy.submit(make(expires_us=3_500))  # before those without a deadline
    for _ in range(3):
        policy.submit(make(expires_us=9_000))
    with pytest.raises(Overloaded, match="deadline is 3899 us away") as caught:
        policy.submit(make(expires_us=3_900))
    assert 0 < caught.value.retry_after_s < 0.01
    assert refused == {"overloaded": 1}


def test_what_was_taken_is_not_made_late_by_what_comes_after(make):
    policy = known(batcher(max_rows=1), 1000, 1)
    for _ in range(4):
        policy.submit(make(expires_us=5_000))
    with pytest.raises(Overloaded, match="would make requests late that were taken before it"):
        policy.submit(make(expires_us=4_900))
    policy.submit(make(expires_us=4_900, priority=1))


def test_a_queue_timeout_limits_the_wait_and_not_the_answer(make):
    policy = known(batcher(), 1000)
    waiting = make(expires_us=500)
    waiting.deadline_us = 1 << 62
    policy.submit(waiting)
    assert policy.try_close(499).requests == [waiting]


def test_a_higher_priority_is_admitted_before_what_waits(make):
    policy = known(batcher(max_rows=1), 1000, 1)
    for _ in range(4):
        policy.submit(make(expires_us=50_000))
    with pytest.raises(Overloaded):
        policy.submit(make(expires_us=2_500, priority=-1))
    policy.submit(make(expires_us=2_500, priority=1))


def test_an_idle_engine_puts_an_old_estimate_to_the_test(make):
    policy = known(batcher(), 50_000)
    with pytest.raises(Overloaded):
        policy.submit(make(arrived_us=1_000, expires_us=9_000))
    probe = make(arrived_us=1_000_001, expires_us=1_009_000)
    policy.submit(probe)
    assert policy.try_close(1_000_001).requests == [probe]


def test_an_idle_engine_tries_what_it_can_make_while_little_is_known(make):
    policy = batcher(max_rows=1)
    policy._tuner_of(((2,),)).cost.learn(1, 50_000)
    policy._ran_us = 1
    with pytest.raises(Overloaded, match=r"be answered after \d+ us; it did not run"):
        policy.submit(make(expires_us=45_000))
    attempt = make(expires_us=60_000)
    policy.submit(attempt)
    assert policy.try_close(0).requests == [attempt]
    policy.free_us = 50_000
    with pytest.raises(Overloaded, match="behind the requests ahead; it did not run"):
        policy.submit(make(expires_us=110_000))


def test_what_became_hopeless_is_refused_before_it_runs(make):
    policy = known(batcher(), 1000)
    late, early = make(expires_us=3_000), make(expires_us=9_000)
    policy.submit(early)
    policy.submit(late)
    assert policy.try_close(2_500).requests == [early]
    assert isinstance(late.future.exception(), Overloaded)
    assert policy.pending_rows == policy.pending_requests == 0


def test_a_crowd_is_not_held_up_by_the_few_that_leave_no_time_for_a_full_batch(make):
    policy = batcher(max_rows=8)
    tuner = policy._tuner_of(((2,),))
    for _ in range(100):
        for rows in (1, 8):
            tuner.cost.learn(rows, 1000 + rows * 100)
    policy._ran_us = 1
    tight, crowd = make(expires_us=6_000), [make(expires_us=60_000) for _ in range(12)]
    for each in (*crowd, tight):
        policy.submit(each)
    assert policy.try_close(4_700).requests == crowd[:8]
    assert isinstance(tight.future.exception(), Overloaded)


@pytest.mark.parametrize(
    ("instances", "started_us", "free_us"),
    [
        (1, [], 500),
        (1, [400], 1_400),
        (1, [400, 0], 2_400),
        (2, [400], 500),
        (2, [400, 300], 1_300),
        (2, [400, 300, 0], 1_400),
        (2, [400, 0], 1_400),
    ],
)
def test_an_engine_is_free_when_the_first_of_its_instances_is(make, instances, started_us, free_us):
    policy = known(batcher(instances=instances), 1_000)
    runs = [Batch([], 1, 0, policy._tuner_of(((2,),))) for _ in started_us]
    policy.expect(zip(runs, started_us, strict=True), now_us=500)
    assert policy.free_us == free_us


def test_more_instances_admit_more(make):
    def admitted(instances: int) -> int:
        policy = known(batcher(max_rows=1, instances=instances), 1_000, 1)
        with suppress(Overloaded):
            for _ in range(1_000):
                policy.submit(make(arrived_us=1, expires_us=10_000))
        return policy.pending_requests

    one, two = admitted(1), admitted(2)
    assert 1.8 * one <= two <= 2.2 * one


def test_a_full_queue_tells_when_it_will_have_drained(make):
    policy = known(batcher(max_rows=4, max_pending_rows=8), 10_000, 1, 4)
    for _ in range(8):
        policy.submit(make())
    with pytest.raises(Overloaded) as caught:
        policy.submit(make())
    assert caught.value.retry_after_s == pytest.approx(0.02)


def test_first_runs_decide_the_rows_of_a_batch():
    settings = BatchingSettings()
    samples = [(rows, 20_000.0 * rows) for rows in (1, 2, 4) for _ in range(3)]
    policy = Batcher(settings, 32, by_shape=False, refused=lambda _why, _count: None, samples=samples)
    found = policy.statistics()
    assert found.rows_cap == 1
    assert found.one_row_us == found.cap_us == pytest.approx(20_000)


def test_a_request_larger_than_the_cap_runs_alone(make):
    policy = Batcher(
        BatchingSettings(), 32, by_shape=False, refused=lambda _why, _count: None, samples=[(1, 20_000), (2, 40_000)]
    )
    large, small = make(rows=9), make()
    policy.submit(large)
    policy.submit(small)
    assert policy.try_close(1).requests == [large]
    assert policy.try_close(1).requests == [small]
